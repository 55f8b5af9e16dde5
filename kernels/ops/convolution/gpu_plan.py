"""What the Mosaic GPU convolution decides while tracing, before it runs.

Plan has the tiles, the steps and the copies; the functions make the operands as
the kernel takes them, strides as channels or as axes of their own and zeros up
to whole tiles, and lay out its shared memory.
"""

import dataclasses
import math

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np

# Pixels of a warpgroup's half of a tile.
ROWS = 128
# Filters of a piece of a tile: a row of 128 bytes, the widest swizzle.
PIECE = 64
# Blocks that run at a time, on an H100 or H200; a tile more would be a second
# round of all.
_PROGRAMS = 132
# Bytes of shared memory for the operands and the output.
_MEMORY = 208 * 1024


@dataclasses.dataclass(frozen=True)
class Plan:
  """What is known while tracing, of the convolution that the kernel computes.

  Attributes:
    pixels: (N, Ho, Wo) of the output.
    size: (H, W) of x.
    taps: (I, J) of w.
    strides: of rows and columns.
    lows: the padding before x.
    channels: of x.
    filters: of w.
    box: (images, rows, columns) of a tile of pixels, powers of two.
    in_activation: of forward.
    activation: of forward.
    prologue: x is transformed.
    affine: y is scaled and shifted.
    residual: there is one.
    statistics: of forward.
    interpret: of forward.
  """

  pixels: tuple[int, int, int]
  size: tuple[int, int]
  taps: tuple[int, int]
  strides: tuple[int, int]
  lows: tuple[int, int]
  channels: int
  filters: int
  box: tuple[int, int, int]
  in_activation: str | None
  activation: str | None
  prologue: bool
  affine: bool
  residual: bool
  statistics: bool
  interpret: bool

  @property
  def depth(self) -> int:
    return _depth(self.channels)

  @property
  def channel_steps(self) -> int:
    return -(-self.channels // self.depth)

  @property
  def steps(self) -> int:
    return math.prod(self.taps) * self.channel_steps

  @property
  def stored(self) -> int:
    """Filters of y in memory, whose rows are of 16 bytes."""
    return -(-self.filters // 8) * 8

  @property
  def width(self) -> int:
    """Filters of a tile."""
    return PIECE if self.filters <= PIECE else 2 * PIECE

  @property
  def pieces(self) -> int:
    return self.width // PIECE

  @property
  def column_tiles(self) -> int:
    return -(-self.filters // self.width)

  @property
  def pixel_tiles(self) -> tuple[int, int, int]:
    return tuple(
      -(-size // length)
      for size, length in zip(self.pixels, self.box, strict=True)
    )

  @property
  def tiles(self) -> int:
    return math.prod(self.pixel_tiles) * self.column_tiles

  @property
  def programs(self) -> int:
    # Interpreted two, that tests come to a program's second tile.
    return min(self.tiles, 2 if self.interpret else _PROGRAMS)

  @property
  def slots(self) -> int:
    """Steps whose operands are in shared memory."""
    one = 2 * self.depth * (2 * ROWS + self.width)
    return min((_MEMORY - 4 * ROWS * self.width) // one, 6)

  @property
  def half(self) -> tuple[int, int, int]:
    """The box of a warpgroup's half."""
    axis = next(axis for axis, length in enumerate(self.box) if length > 1)
    return tuple(
      length // 2 if place == axis else length
      for place, length in enumerate(self.box)
    )

  @property
  def staged(self) -> int:
    """Copies that the output of a half waits for."""
    windows = len(self.windows(self.half, (0, 0, 0)))
    return self.affine + self.residual * windows * self.pieces

  @property
  def fronts(self) -> tuple[int, int]:
    """Strides by which a window may begin before x."""
    return tuple(
      -(-low // stride)
      for low, stride in zip(self.lows, self.strides, strict=True)
    )

  @property
  def sees_padding(self) -> bool:
    """Some pixel of y sees what is not in x."""
    return any(self.lows) or any(
      (out - 1) * stride + tap > size
      for out, stride, tap, size in zip(
        self.pixels[1:], self.strides, self.taps, self.size, strict=True
      )
    )

  def counts(self) -> np.ndarray:
    """float32 [T], the pixels in each half of a tile."""
    inside = []
    for size, tiles, length, half in zip(
      self.pixels, self.pixel_tiles, self.box, self.half, strict=True
    ):
      starts = np.arange(tiles)[:, None] * length + [0, length - half]
      inside.append(np.clip(size - starts, 0, half))
    images, rows, columns = inside
    counts = images[:, None, None] * rows[:, None] * columns
    return counts.reshape(-1).astype(np.float32)

  def place(self, tile):
    """A tile's number among pixels, its first pixel and its first filter."""
    number, column = divided(tile, self.column_tiles)
    rest, columns = divided(number, self.pixel_tiles[2])
    index = (*divided(rest, self.pixel_tiles[1]), columns)
    start = tuple(i * size for i, size in zip(index, self.box, strict=True))
    return number, start, column * self.width

  def tap(self, step):
    """(i, j) and the first channel of a step."""
    tap, channel = divided(step, self.channel_steps)
    return divided(tap, self.taps[1]), channel * self.depth

  def windows(self, box, start):
    """The copies of a box: [(index into [N, H, W], first row)].

    One for the whole box; interpreted one for each run of columns.
    """
    if not self.interpret:
      index = tuple(pl.ds(s, b) for s, b in zip(start, box, strict=True))
      return [(index, None)]
    run = min(box[2], ROWS)
    windows = []
    for row in range(0, math.prod(box), run):
      image, line, column = map(int, np.unravel_index(row, box))
      index = (
        start[0] + image,
        start[1] + line,
        pl.ds(start[2] + column, run),
      )
      windows.append((index, row))
    return windows


def box(pixels: tuple[int, int, int]) -> tuple[int, int, int]:
  """The box of 2 * ROWS pixels that wastes the fewest, widest first."""
  sizes = [2**power for power in range((2 * ROWS).bit_length())]
  boxes = [
    (2 * ROWS // (rows * columns), rows, columns)
    for columns in reversed(sizes)
    for rows in reversed(sizes)
    if rows * columns <= 2 * ROWS
  ]
  return min(
    boxes,
    key=lambda box: math.prod(
      -(-size // length) for size, length in zip(pixels, box, strict=True)
    ),
  )


def _depth(channels):
  """Channels of a step."""
  return next(one for one in (16, 32, 64) if one >= min(channels, 64))


def terms(w_shape: tuple[int, ...]) -> int:
  """Products that a pixel of y takes, those with zeros too."""
  *taps, channels, _ = w_shape
  depth = _depth(channels)
  return math.prod(taps) * -(-channels // depth) * depth


def folded_shape(
  w_shape: tuple[int, ...], strides: tuple[int, int], lows: tuple[int, int]
) -> tuple[int, ...]:
  """Of folded's w."""
  *taps, channels, filters = w_shape
  taps = (
    -(-(tap + -low % stride) // stride)
    for tap, low, stride in zip(taps, lows, strides, strict=True)
  )
  return *taps, channels * math.prod(strides), filters


def folded(
  x: jax.Array, w: jax.Array, strides: tuple[int, int], lows: tuple[int, int]
) -> tuple[jax.Array, jax.Array, tuple[int, int]]:
  """(x, w, lows) of the same convolution with strides as channels."""
  rows, columns = strides
  height, width = (
    -(-size // stride)
    for size, stride in zip(x.shape[1:3], strides, strict=True)
  )
  x = padded(x, (0, height * rows, width * columns, 0))
  x = x.reshape(-1, height, rows, width, columns, x.shape[3])
  x = x.transpose(0, 1, 3, 2, 4, 5).reshape(len(x), height, width, -1)
  i, j, *_ = shape = folded_shape(w.shape, strides, lows)
  top, left = (
    (-low % stride, 0) for low, stride in zip(lows, strides, strict=True)
  )
  w = padded(
    jnp.pad(w, (top, left, (0, 0), (0, 0))), (i * rows, j * columns, 0, 0)
  )
  w = w.reshape(i, rows, j, columns, *w.shape[2:])
  w = w.transpose(0, 2, 1, 3, 4, 5).reshape(shape)
  fronts = (
    -(-low // stride) for low, stride in zip(lows, strides, strict=True)
  )
  return x, w, tuple(fronts)


def parted(x: jax.Array, plan: Plan) -> jax.Array:
  """x [N, H/s, s, W/t, t, C] of strides s, t: a view, but for odd sizes."""
  (rows, columns), (top, left) = plan.strides, plan.fronts
  if plan.interpret:
    x = jnp.pad(x, ((0, 0), (top * rows, 0), (left * columns, 0), (0, 0)))
  _, height, width, channels = x.shape
  height, width = -(-height // rows), -(-width // columns)
  x = padded(x, (0, height * rows, width * columns, -(-channels // 8) * 8))
  return x.reshape(len(x), height, rows, width, columns, -1)


def flattened(w: jax.Array, plan: Plan) -> jax.Array:
  """w [I * J * C, F] of whole steps and tiles."""
  sizes = (plan.depth * plan.channel_steps, plan.width * plan.column_tiles)
  return padded(w, (0, 0, *sizes)).reshape(-1, sizes[1])


def padded(array: jax.Array, sizes: tuple[int, ...]) -> jax.Array:
  """Zeros at the end of each axis, up to its size where that is greater."""
  pads = [
    (0, max(size - length, 0))
    for size, length in zip(sizes, array.shape, strict=True)
  ]
  return jnp.pad(array, pads) if any(map(any, pads)) else array


def pair(
  scale: jax.Array | None, shift: jax.Array | None, length: int
) -> jax.Array:
  """float32 [2, length], the scale and the shift."""
  scale = jnp.ones(length) if scale is None else scale
  shift = jnp.zeros(length) if shift is None else shift
  return jnp.stack([scale, shift]).astype(jnp.float32)


def divided(value: jax.Array, by: int) -> tuple[jax.Array, jax.Array]:
  """(value // by, value % by) in int32, of what is not negative."""
  # The index of a loop is an int64 where jax_enable_x64 is.
  value, by = value.astype(jnp.int32), np.int32(by)
  return lax.div(value, by), lax.rem(value, by)


def scratch(plan: Plan, dtype: jnp.dtype) -> dict[str, object]:
  """The kernel's shared memory and barriers, by name."""
  slots, depth, outs = plan.slots, plan.depth, (2, plan.pieces)
  copies = len(plan.windows(plan.box, (0, 0, 0)))
  found = {
    'a': _shared(plan, (slots, *plan.box), (slots, 2, ROWS, depth), dtype),
    'b': plgpu.SMEM(
      (slots, depth, plan.width), dtype, transforms=_tiled(depth)
    ),
    'out': _shared(plan, (*outs, *plan.half), (*outs, ROWS, PIECE), dtype),
    'full': plgpu.Barrier(
      num_arrivals=copies + 1 + plan.prologue, num_barriers=slots
    ),
    'empty': plgpu.Barrier(num_arrivals=2, num_barriers=slots),
  }
  if plan.prologue:
    found['in_slot'] = plgpu.SMEM((slots, 2, depth), jnp.float32)
  if plan.affine:
    found['out_affine'] = plgpu.SMEM((2, 2, plan.width), jnp.float32)
  if plan.staged:
    found['staged'] = plgpu.Barrier(num_arrivals=plan.staged, num_barriers=2)
  if plan.statistics:
    found['turn'] = plgpu.Barrier(num_barriers=2)
  return found


def _tiled(columns):
  """How wgmma wants rows of so many 16-bit numbers in shared memory."""
  tiling = plgpu.TilingTransform((8, columns))
  return tiling, plgpu.SwizzleTransform(2 * columns)


def _shared(plan, boxes, rows, dtype):
  """Shared memory as (boxes of pixels, the rows that wgmma knows).

  The same bytes, as a row is one swizzled line. The copies know the boxes: for
  the tiles of eight rows a window would have to begin at a multiple of eight.
  Interpreted, where the two would not share, there are the rows alone.
  """
  columns = rows[-1]
  rows = plgpu.SMEM(rows, dtype, transforms=_tiled(columns))
  if plan.interpret:
    return rows
  swizzle = plgpu.SwizzleTransform(2 * columns)
  boxes = plgpu.SMEM((*boxes, columns), dtype, transforms=(swizzle,))
  return plgpu.RefUnion(boxes, rows)
