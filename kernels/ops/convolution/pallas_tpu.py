"""A convolution for Mosaic TPU: products over places, with images as rows.

Operands lie as [H, W, N, C], which XLA chooses for NHWC too: H and W are then
outside of the tiles, so that each place of the kernel meets a block of memory
as it is. Outputs that meet the same places of the kernel inside the image are
computed together, in one product over all of these places and channels; none
is computed with the border's zeros.

Shapes: N images, H W C image, I J kernel's height and width, F features.
"""

import functools
from typing import NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import numpy as np

from kernels.ops.convolution import activations
from kernels.ops.convolution import shapes

# For what the compiler puts beside the blocks.
_SPARE_VMEM = 16 * 2**20


class Settings(NamedTuple):
  """What the kernel knows while it is traced."""

  strides: tuple[int, int]
  padding: tuple[int, int]  # before the first row and column
  in_scale: bool
  in_shift: bool
  in_activation: str | None
  scale: bool
  shift: bool
  residual: bool
  activation: str | None
  statistics: bool
  sizes: tuple[int, int]  # H, W
  images: int  # without those that fill up the last block
  rows: int  # of the whole output
  single: bool  # a pixel needs no other, so that x is in blocks of rows too

  @property
  def prologue(self) -> bool:
    return self.in_scale or self.in_shift or self.in_activation is not None


def forward(
  x: jax.Array,
  w: jax.Array,
  *,
  strides: tuple[int, int],
  padding: tuple[tuple[int, int], tuple[int, int]],
  in_scale: jax.Array | None,
  in_shift: jax.Array | None,
  in_activation: str | None,
  scale: jax.Array | None,
  shift: jax.Array | None,
  residual: jax.Array | None,
  activation: str | None,
  statistics: bool,
  interpret: bool,
):
  """The convolution of in_activation(x in_scale + in_shift), and what follows.

  Args:
    x: [N, H, W, C].
    w: [I, J, C, F], of x's dtype.
    strides, padding: of H and W; the border is 0 behind the prologue.
    in_scale, in_shift: float32 [C] or None.
    in_activation, activation: in activations.ACTIVATIONS.
    scale, shift: float32 [F] or None.
    residual: [N, H', W', F] or None.
    statistics: instead of scale, shift, residual and activation.
    interpret: on any platform, slowly.

  Returns:
    activation(scale conv + shift + residual), [N, H', W', F] of x's dtype; with
    `statistics` (that, counts [T], sums and squares [T, F]), of tiles as
    reference.combine takes them.
  """
  count = x.shape[0]
  sizes = shapes.output_size(x.shape[1:3], w.shape[:2], strides, padding)
  images = shapes.tpu_images(x.dtype)
  single = w.shape[:2] == (1, 1) and not any(map(sum, padding))
  if single:
    # A pixel needs no other: they are one row of blocks.
    x = x[:, :: strides[0], :: strides[1]].reshape(count, -1, 1, x.shape[3])
    strides = 1, 1
    if residual is not None:
      residual = residual.reshape(count, -1, 1, residual.shape[3])
  rows, columns = (x.shape[1], 1) if single else sizes
  held = shapes.tpu_held(rows, columns, w.shape[3], x.dtype)
  settings = Settings(
    strides,
    tuple(low for low, _ in padding),
    in_scale is not None,
    in_shift is not None,
    in_activation,
    scale is not None,
    shift is not None,
    residual is not None,
    activation,
    statistics,
    x.shape[1:3],
    count,
    rows,
    single,
  )
  x = _interleaved(_images_inside(x, images), strides)
  height, width, padded, channels = x.shape[2:]
  features = w.shape[3]
  whole = lambda shape: pl.BlockSpec(shape, lambda *_: (0,) * len(shape))  # noqa: E731
  block = pl.BlockSpec((held, columns, images, features), _rows_of)
  operands = [x, w]
  specs = [
    pl.BlockSpec(
      (*strides, held if single else height, width, images, channels),
      lambda n, h: (0, 0, h if single else 0, 0, n, 0),
    ),
    whole(w.shape),
  ]
  for one in (in_scale, in_shift, scale, shift):
    if one is not None:
      operands.append(one.reshape(1, -1))
      specs.append(whole((1, one.size)))
  if residual is not None:
    operands.append(_images_inside(residual, images))
    specs.append(block)
  grid = (padded // images, pl.cdiv(rows, held))
  y_shape = (rows, columns, padded, features)
  out_shape = [jax.ShapeDtypeStruct(y_shape, x.dtype)]
  out_specs = [block]
  if statistics:
    # A row of a tile for each block, which holds only one.
    tiles = (*grid, 8, features)
    out_shape += [jax.ShapeDtypeStruct(tiles, jnp.float32)] * 2
    one = pl.BlockSpec((1, 1, 8, features), lambda n, h: (n, h, 0, 0))
    out_specs += [one, one]
  scratch = []
  if settings.prologue:
    scratch.append(pltpu.VMEM(specs[0].block_shape, x.dtype))
  needed = shapes.tpu_bytes(
    (count, *settings.sizes, channels), w.shape, x.dtype, strides, padding
  )
  products = 2 * w.size * rows * columns * padded
  moved = sum(one.size * one.dtype.itemsize for one in (*operands, *out_shape))
  y, *found = pl.pallas_call(
    functools.partial(kernel, settings),
    out_shape=out_shape,
    grid=grid,
    in_specs=specs,
    out_specs=out_specs,
    scratch_shapes=scratch,
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'arbitrary'),
      vmem_limit_bytes=needed + _SPARE_VMEM,
    ),
    cost_estimate=pl.CostEstimate(
      flops=products, bytes_accessed=moved, transcendentals=0
    ),
    interpret=interpret,
    name='conv2d_stats' if statistics else 'conv2d',
  )(*operands)
  y = jnp.transpose(y, (2, 0, 1, 3))[:count].reshape(count, *sizes, features)
  if not statistics:
    return y
  in_image = [min(images, count - n) for n in range(0, count, images)]
  in_rows = [min(held, rows - h) * columns for h in range(0, rows, held)]
  counts = jnp.asarray(np.outer(in_image, in_rows).reshape(-1), jnp.float32)
  return y, counts, *(one[:, :, 0].reshape(-1, features) for one in found)


def _rows_of(n, h):
  return h, 0, n, 0


def _images_inside(x, images):
  """[N, H, W, C] as [H, W, N', C], N' a multiple of `images`."""
  missing = -x.shape[0] % images
  if missing:
    x = jnp.pad(x, ((0, missing), (0, 0), (0, 0), (0, 0)))
  return jnp.transpose(x, (1, 2, 0, 3))


def _interleaved(x, strides):
  """[H, W, N, C] as [s, t, H / s, W / t, N, C]: a place meets one block of it.

  Where strides are 1 it stays as it is.
  """
  height, width, *rest = x.shape
  down, across = strides
  below, right = -height % down, -width % across
  x = jnp.pad(x, ((0, below), (0, right), (0, 0), (0, 0)))
  x = x.reshape(-1, down, (width + right) // across, across, *rest)
  return jnp.transpose(x, (1, 3, 0, 2, 4, 5))


def kernel(settings: Settings, x_ref, w_ref, *refs):
  """The body: in a block of outputs all that `forward` says.

  Args:
    settings: its.
    x_ref: [s, t, H / s, W / t, N, C], whole images or blocks of pixels.
    w_ref: [I, J, C, F].
    *refs: of in_scale, in_shift, scale, shift [1, *] and the residual those
      that there are; the output [h, W', N, F]; the tiles' sums and squares [1,
      1, 8, F]; and with a prologue a place for what it makes of x.
  """
  refs = list(refs)

  def given(present):
    return refs.pop(0) if present else None

  in_scale, in_shift = given(settings.in_scale), given(settings.in_shift)
  scale, shift = given(settings.scale), given(settings.shift)
  residual = given(settings.residual)
  y_ref = refs.pop(0)
  sums_ref, squares_ref = (given(settings.statistics) for _ in range(2))
  held, width, images, features = y_ref.shape
  image, tile = pl.program_id(0) * images, pl.program_id(1)
  there = jnp.minimum(images, settings.images - image)
  above = 0 if settings.single else tile * held
  if settings.prologue:
    (z_ref,) = refs

    def load(row, _):
      x = x_ref[:, :, row].astype(jnp.float32)
      x = x if in_scale is None else x * in_scale[...]
      x = x if in_shift is None else x + in_shift[...]
      x = activations.activate(settings.in_activation, x)
      z_ref[:, :, row] = x.astype(z_ref.dtype)

    # A whole image is loaded for the first of its blocks, and stays.
    @pl.when(settings.single or tile == 0)
    def _():
      lax.fori_loop(0, z_ref.shape[2], load, None)

    x_ref = z_ref

  def over_pixels(y):
    """The sum [1, F] of [h, W, N, F], without what fills up the last block."""
    if settings.images % images:
      place = image + lax.broadcasted_iota(jnp.int32, y.shape, 2)
      y = jnp.where(place < settings.images, y, 0)
    return y.reshape(-1, features).sum(0, keepdims=True)

  def write(first, rows, taps, total):
    """Computes some rows of the block."""
    place = pl.ds(first, rows)
    y = _product(settings, x_ref, w_ref, above + first, rows, taps, width)
    if settings.statistics:
      y = y.astype(y_ref.dtype)
      y_ref[place] = y
      return total + over_pixels(y.astype(jnp.float32))
    y = y if scale is None else y * scale[...]
    y = y if shift is None else y + shift[...]
    y = y if residual is None else y + residual[place].astype(jnp.float32)
    y = activations.activate(settings.activation, y)
    y_ref[place] = y.astype(y_ref.dtype)
    return total

  def compute(segments):
    total = jnp.zeros((1, features), jnp.float32)
    most = shapes.tpu_rows(width, features, y_ref.dtype)
    for start, stop, taps in segments:
      total = _some_at_a_time(
        start, stop, most, functools.partial(write, taps=taps), total
      )
    if not settings.statistics:
      return
    rows = segments[-1][1]
    mean = total / (there * rows * width).astype(jnp.float32)

    def apart(row, squares):
      y = y_ref[pl.ds(row, 1)].astype(jnp.float32)
      return squares + over_pixels(jnp.square(y - mean))

    squares = lax.fori_loop(0, rows, apart, jnp.zeros_like(total))
    sums_ref[0, 0] = jnp.broadcast_to(total, (8, features))
    squares_ref[0, 0] = jnp.broadcast_to(squares, (8, features))

  blocks = _blocks(settings, w_ref.shape[0], held)
  for segments, (first, last) in blocks:
    if len(blocks) == 1:
      compute(segments)
    else:
      pl.when((first <= tile) & (tile <= last))(
        functools.partial(compute, segments)
      )


def _blocks(settings, taps, held):
  """[segments, (first, last)] of equal blocks of rows one after the other."""
  found = []
  everything = _segments(settings, 0, taps, settings.rows)
  for tile, start in enumerate(range(0, settings.rows, held)):
    stop = min(start + held, settings.rows)
    segments = tuple(
      (max(a, start) - start, min(b, stop) - start, inside)
      for a, b, inside in everything
      if a < stop and b > start
    )
    if found and found[-1][0] == segments:
      found[-1][1] = found[-1][1][0], tile
    else:
      found.append([segments, (tile, tile)])
  return found


def _segments(settings, axis, taps, outputs):
  """[start, stop, taps] of outputs that meet the same taps inside the image."""
  found = []
  for place in range(outputs):
    first = place * settings.strides[axis] - settings.padding[axis]
    inside = tuple(
      k for k in range(taps) if 0 <= first + k < settings.sizes[axis]
    )
    if found and found[-1][2] == inside:
      found[-1][1] = place + 1
    else:
      found.append([place, place + 1, inside])
  return found


def _some_at_a_time(start, stop, most, write, carry):
  """write(first, rows, total=carry) for all rows from start to stop."""
  whole = (stop - start) // most
  if whole > 1:
    carry = lax.fori_loop(
      0,
      whole,
      lambda i, carry: write(start + i * most, most, total=carry),
      carry,
    )
    start += whole * most
  for first in range(start, stop, most):
    carry = write(first, min(most, stop - first), total=carry)
  return carry


def _product(settings, x_ref, w_ref, first, rows, taps, columns):
  """The convolution's [rows, W', N, F] in float32, from row `first` on."""
  images, channels = x_ref.shape[4:]
  features = w_ref.shape[3]
  exact = x_ref.dtype == jnp.float32
  dot = functools.partial(
    jnp.dot,
    preferred_element_type=jnp.float32,
    precision=lax.Precision.HIGHEST if exact else None,
  )

  def met(i, j, start, stop):
    """What of x the kernel's place (i, j) meets."""
    row, above = divmod(i - settings.padding[0], settings.strides[0])
    column, left = divmod(j - settings.padding[1], settings.strides[1])
    return x_ref[
      above, left, pl.ds(first + row, rows), pl.ds(start + column, stop - start)
    ].reshape(-1, channels)

  parts = []
  for start, stop, across in _segments(settings, 1, w_ref.shape[1], columns):
    places = [(i, j) for i in taps for j in across]
    xs = [met(i, j, start, stop) for i, j in places]
    ws = [w_ref[i, j] for i, j in places]
    if not places:
      y = jnp.zeros((rows * (stop - start) * images, features), jnp.float32)
    elif channels % 128 or channels % shapes.TPU_DEPTH == 0:
      y = functools.reduce(jnp.add, map(dot, xs, ws))
    else:
      y = dot(jnp.concatenate(xs, 1), jnp.concatenate(ws, 0))
    parts.append(y.reshape(rows, stop - start, images, features))
  return jnp.concatenate(parts, 1)
