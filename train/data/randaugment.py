"""PIL's image operations as JAX, and RandAugment, which draws among them.

Everything here is of one image, for jax.vmap: float32 [H, W, C], 0 to 255.
Warps are PIL's too: bilinear, and a pixel whose centre comes from outside the
image takes the fill.
"""

import jax
import jax.numpy as jnp

# Cubuk et al. (2020), table 6, with the ranges of AutoAugment's table 6.
OPERATIONS = (
  'identity',
  'autocontrast',
  'equalize',
  'rotate',
  'solarize',
  'color',
  'posterize',
  'contrast',
  'brightness',
  'sharpness',
  'shear_x',
  'shear_y',
  'translate_x',
  'translate_y',
)
MAX_MAGNITUDE = 30
_FILL = 128.0  # The authors' grey.
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, which PIL's mode L is.


def randaugment(
  key: jax.Array, image: jax.Array, *, num_ops: int = 2, magnitude: int = 9
) -> jax.Array:
  """RandAugment (Cubuk et al. 2020): [H, W, C] -> [H, W, C], whole numbers.

  `num_ops` times one of the 14 operations, each as likely, all at the same
  `magnitude`, 0 to 30, in a direction drawn where they have two; what a warp
  uncovers is grey (128). Defaults are those of the paper's ResNet-50.
  """

  def step(image, key):
    operation, sign = jax.random.split(key)
    operation = jax.random.randint(operation, (), 0, len(OPERATIONS))
    sign = jax.random.rademacher(sign, (), jnp.float32)
    return apply(image, operation, sign * magnitude), None

  # Operations are of whole numbers, which what came before need not give.
  image = jnp.round(image)
  # A loop, whose body the compiler cannot merge into the one before: it would
  # compute each pixel anew for every neighbour that reads it.
  return jax.lax.scan(step, image, jax.random.split(key, num_ops))[0]


def apply(
  image: jax.Array, operation: jax.Array, magnitude: jax.Array
) -> jax.Array:
  """One operation on [H, W, C]; whole numbers, as PIL's.

  Under jax.vmap each image has its own operation, so that all are computed:
  hence one warp for the five that move pixels, and one blend for four.

  Args:
    image: [H, W, C], whole numbers, 0 to 255; `color` leaves all but three
      channels as they are.
    operation: int32 [], a place in OPERATIONS.
    magnitude: float32 [], -30 to 30: the sign is the direction.
  """
  height, width, channels = image.shape
  share = magnitude / MAX_MAGNITUDE

  def only(name, value, otherwise=0.0):
    return jnp.where(operation == OPERATIONS.index(name), value, otherwise)

  # PIL's shear leaves the first corner where it is, not the centre.
  shear_x, shear_y = only('shear_x', 0.3 * share), only('shear_y', 0.3 * share)
  angle = only('rotate', jnp.deg2rad(30.0) * share)
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  # 150 of ImageNet's 331 pixels.
  shift_x = only('translate_x', 150 / 331 * width * share)
  shift_y = only('translate_y', 150 / 331 * height * share)
  result = warp(
    image,
    (
      (cos, sin + shear_y, shear_y * width / 2 + shift_y),
      (shear_x - sin, cos, shear_x * height / 2 + shift_x),
    ),
    _FILL,
  )

  grey = jnp.round(luma(image))
  plain = only('contrast', jnp.round(grey.mean()))
  plain = only('sharpness', _smooth(image), plain)
  blends = ('contrast', 'brightness', 'sharpness')
  if channels == 3:
    plain = only('color', grey, plain)
    blends += ('color',)
  blended = blend(image, plain, 1 + 0.9 * share)
  for name in blends:
    result = only(name, blended, result)

  share = jnp.abs(share)
  lost = 2.0 ** jnp.round(4 * share)  # From 8 bits to 4.
  result = only('posterize', jnp.floor(image / lost) * lost, result)
  solarized = jnp.where(image < 256 * (1 - share), image, 255 - image)
  result = only('solarize', solarized, result)
  result = only('autocontrast', _autocontrast(image), result)
  result = only('equalize', _equalize(image), result)
  return jnp.round(result)


def warp(image: jax.Array, matrix, fill: float) -> jax.Array:
  """Moves the pixels of [H, W, C] as PIL's Image.transform does, bilinear.

  Args:
    image: [H, W, C].
    matrix: 2 rows of 3 numbers, which take (y, x, 1) of a pixel of the result,
      in pixels from the centre of the image, to the y and x where it was.
    fill: the value of what was outside.
  """
  middles = [(size - 1) / 2 for size in image.shape[:2]]
  y, x = jnp.meshgrid(
    *(jnp.arange(size) - (size - 1) / 2 for size in image.shape[:2]),
    indexing='ij',
  )
  places = [
    a * y + b * x + c + middle
    for (a, b, c), middle in zip(matrix, middles, strict=True)
  ]

  def channel(plane):
    return jax.scipy.ndimage.map_coordinates(plane, places, 1, 'nearest')

  moved = jax.vmap(channel, -1, -1)(image)
  inside = True
  for place, size in zip(places, image.shape[:2], strict=True):
    inside &= (place >= -0.5) & (place < size - 0.5)
  return jnp.where(inside[..., None], moved, fill)


def luma(image: jax.Array) -> jax.Array:
  """The brightness of each pixel, [H, W, 1]: PIL's mode L, not rounded."""
  if image.shape[-1] != 3:
    return image.mean(-1, keepdims=True)
  return (image * jnp.asarray(_LUMA)).sum(-1, keepdims=True)


def blend(image: jax.Array, plain: jax.Array, factor: jax.Array) -> jax.Array:
  """PIL's Image.blend: `plain` at 0, the image at 1, beyond it above 1."""
  return jnp.clip(image + (1 - factor) * (plain - image), 0, 255)


def turn_hue(image: jax.Array, turn: jax.Array) -> jax.Array:
  """[H, W, 3] with the hue of HSV turned by a share of the circle, [].

  Saturation and value, so each pixel's lowest and highest channel, stay.
  """
  high = image.max(-1, keepdims=True)
  spread = high - image.min(-1, keepdims=True)
  red, green, blue = jnp.split(image / jnp.where(spread > 0, spread, 1), 3, -1)
  # In sixths of the circle from red, through green (2) and blue (4).
  hue = jnp.where(green >= blue, 2 + blue - red, 4 + red - green)
  hue = jnp.where(red >= jnp.maximum(green, blue), green - blue, hue)
  # How far each channel is from its own hue, -3 to 3.
  away = (hue + 6 * turn - jnp.asarray([0.0, 2.0, 4.0]) + 3) % 6 - 3
  return high - spread * jnp.clip(jnp.abs(away) - 1, 0, 1)


def _smooth(image):
  """PIL's filter SMOOTH: each pixel, five times, with its eight neighbours.

  The border stays as it is.
  """
  if min(image.shape[:2]) < 3:
    return image
  rows = image[:-2] + image[1:-1] + image[2:]
  nine = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]
  inner = jnp.round((nine + 4 * image[1:-1, 1:-1]) / 13)
  return image.at[1:-1, 1:-1].set(inner)


def _autocontrast(image):
  """Each channel's darkest pixel to 0 and brightest to 255."""
  low, high = image.min((0, 1)), image.max((0, 1))
  spread = jnp.maximum(high - low, 1)
  stretched = jnp.floor((image - low) * 255 / spread)
  return jnp.where(high > low, stretched, image)


def _equalize(image):
  """Each channel through its own cumulative histogram, as PIL counts it."""
  levels = image.astype(jnp.int32)

  def channel(plane):
    counts = jnp.bincount(plane.ravel(), length=256)
    last = counts[plane.max()]
    step = (plane.size - last) // 255
    below = jnp.cumsum(counts) - counts
    table = (below + step // 2) // jnp.maximum(step, 1)
    return jnp.where(step > 0, jnp.minimum(table, 255)[plane], plane)

  return jax.vmap(channel, -1, -1)(levels).astype(image.dtype)
