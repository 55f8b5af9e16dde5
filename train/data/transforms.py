"""The augmentations that config.data.augment names, each of one example.

Shapes: H W C image, float32 from 0 to 255; D features.
"""

import math

import jax
import jax.numpy as jnp

from train.data import randaugment

# ---------------------------------------------------------------- geometry


def pad_crop(key: jax.Array, image: jax.Array, *, padding: int) -> jax.Array:
  """`padding` pixels of 0 on each side, then a crop of the old size.

  He et al. (2015), section 4.2: 4 pixels for CIFAR-10. Left out, an eighth of
  the image's side. [H, W, C] -> [H, W, C].
  """
  padded = jnp.pad(image, ((padding, padding), (padding, padding), (0, 0)))
  start = jax.random.randint(key, (2,), 0, 2 * padding + 1)
  return jax.lax.dynamic_slice(padded, (*start, 0), image.shape)


def flip(
  key: jax.Array, image: jax.Array, *, probability: float = 0.5
) -> jax.Array:
  """Left and right exchanged, with a probability: [H, W, C] -> [H, W, C]."""
  return jnp.where(_happens(key, probability), image[:, ::-1], image)


def translate(
  key: jax.Array, image: jax.Array, *, fraction: float = 0.1
) -> jax.Array:
  """Moved by up to a fraction of each side, bilinear: [H, W, C] -> the like."""
  height, width, _ = image.shape
  y, x = jax.random.uniform(key, (2,), minval=-fraction, maxval=fraction)
  moved = ((1, 0, -y * height), (0, 1, -x * width))
  return randaugment.warp(image, moved, 0)


def rotate(
  key: jax.Array, image: jax.Array, *, degrees: float = 15.0
) -> jax.Array:
  """Turned about its centre by up to so many degrees, either way.

  [H, W, C] -> [H, W, C], bilinear.
  """
  limit = math.radians(degrees)
  angle = jax.random.uniform(key, (), minval=-limit, maxval=limit)
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  return randaugment.warp(image, ((cos, sin, 0), (-sin, cos, 0)), 0)


def stretch(
  key: jax.Array,
  image: jax.Array,
  *,
  min_area: float = 0.5,
  max_area: float = 1.0,
  max_aspect: float = 4 / 3,
) -> jax.Array:
  """A box of random area and aspect, stretched over the image, bilinear.

  The random resized crop of Szegedy et al. (2015), for which min_area is 0.08.
  Its area is uniform from `min_area` to `max_area`, shares of the image's; more
  than 1 shows the image smaller, with 0 around it. The logarithm of its aspect
  is uniform too, up to that of `max_aspect` either way. [H, W, C] -> the like.
  """
  draws = jax.random.uniform(key, (4,))
  area = min_area + (max_area - min_area) * draws[0]
  aspect = max_aspect ** (2 * draws[1] - 1)
  sides = jnp.sqrt(jnp.stack([area / aspect, area * aspect]))
  # A part of the image has no more than all of its height and width.
  sides = jnp.where(area <= 1, jnp.minimum(sides, 1), sides)
  centre = (draws[2:] - 0.5) * (1 - sides)
  y, x = centre * jnp.asarray(image.shape[:2])
  return randaugment.warp(image, ((sides[0], 0, y), (0, sides[1], x)), 0)


# ------------------------------------------------------------------ values


def colour(
  key: jax.Array,
  image: jax.Array,
  *,
  brightness: float = 0.4,
  contrast: float = 0.4,
  saturation: float = 0.4,
  hue: float = 0.1,
) -> jax.Array:
  """Brightness, contrast, saturation and hue jittered, in this order.

  Howard (2013), with PIL's ImageEnhance: a factor from 1 - x to 1 + x against
  black, the mean grey, and the grey of each pixel. Then the hue turns by up to
  `hue` of the whole circle, either way. [H, W, C] -> [H, W, C].
  """
  draws = jax.random.uniform(key, (4,), minval=-1, maxval=1)
  if brightness:
    image = randaugment.blend(image, 0, 1 + brightness * draws[0])
  if contrast:
    mean = randaugment.luma(image).mean()
    image = randaugment.blend(image, mean, 1 + contrast * draws[1])
  if saturation:
    grey = randaugment.luma(image)
    image = randaugment.blend(image, grey, 1 + saturation * draws[2])
  if hue:
    image = randaugment.turn_hue(image, hue * draws[3])
  return image


def noise(key: jax.Array, x: jax.Array, *, std: float = 8.0) -> jax.Array:
  """Gaussian noise of that standard deviation, in the units of x.

  On an image [H, W, C] clipped to 0 to 255, on a row [D] not at all.
  """
  noisy = x + std * jax.random.normal(key, x.shape)
  return jnp.clip(noisy, 0, 255) if x.ndim == 3 else noisy


def cutout(key: jax.Array, image: jax.Array, *, size: int) -> jax.Array:
  """A square of `size` pixels a side set to 0: [H, W, C] -> [H, W, C].

  DeVries & Taylor (2017): its centre is any pixel, so that it can reach over
  the border. Left out, half of the image's side, 16 for CIFAR-10 as there.
  """
  return jnp.where(_box(key, image.shape, (size, size)), 0, image)


# ------------------------------------------------------------------ mixing


def mixup(
  key: jax.Array,
  x: jax.Array,
  other: jax.Array,
  *,
  alpha: float = 0.2,
  probability: float = 1.0,
) -> tuple[jax.Array, jax.Array]:
  """share * other + (1 - share) * x, with share ~ Beta(alpha, alpha).

  Zhang et al. (2018). [H, W, C] or [D], twice -> the like, and the share [].
  """
  share = _share(key, alpha, probability)
  return x + share * (other - x), share


def cutmix(
  key: jax.Array,
  image: jax.Array,
  other: jax.Array,
  *,
  alpha: float = 1.0,
  probability: float = 1.0,
) -> tuple[jax.Array, jax.Array]:
  """A box of another image, of a share ~ Beta(alpha, alpha) of the area.

  Yun et al. (2019), algorithm A1: the centre is any pixel, what reaches over
  the border is lost, and the share is that of the pixels replaced.
  [H, W, C] twice -> [H, W, C], and the share [].
  """
  box_key, share_key = jax.random.split(key)
  side = jnp.sqrt(_share(share_key, alpha, probability))
  sides = [(size * side).astype(jnp.int32) for size in image.shape[:2]]
  box = _box(box_key, image.shape, sides)
  return jnp.where(box, other, image), box.mean(dtype=jnp.float32)


def _share(key, alpha, probability):
  """Beta(alpha, alpha), or 0 where it does not happen."""
  share_key, happens_key = jax.random.split(key)
  share = jax.random.beta(share_key, alpha, alpha)
  return jnp.where(_happens(happens_key, probability), share, 0)


def _happens(key, probability):
  return jax.random.uniform(key) < probability


def _box(key, shape, sides):
  """Where a box around a random pixel is, bool [H, W, 1]."""
  inside = True
  for axis, side in enumerate(sides):
    centre_key = jax.random.fold_in(key, axis)
    centre = jax.random.randint(centre_key, (), 0, shape[axis])
    place = jax.lax.broadcasted_iota(jnp.int32, (*shape[:2], 1), axis)
    place -= centre - side // 2
    inside &= (place >= 0) & (place < side)
  return inside
