"""Cross-entropy of rows on a GPU, in Mosaic GPU.

One warpgroup a row. It loads straight into registers: every element is used by
one thread and once, so that shared memory would only be a detour.
"""

import functools

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from kernels.ops.cross_entropy import reference
from kernels.ops.cross_entropy import shapes

_LOG2_E = 1.4426950408889634
# Under every finite logit, and a difference from it is a number still.
_LOWEST = float(jnp.finfo(jnp.float32).min)


def forward(
  logits: jax.Array,
  targets: jax.Array,
  label_smoothing: float,
  z_loss: float,
  *,
  interpret: bool,
) -> tuple[jax.Array, jax.Array]:
  """reference.forward of logits [R, K] and targets [R]."""
  rows, columns = logits.shape
  padding = shapes.gpu_columns(columns) - columns
  if padding:
    logits = jnp.pad(logits, ((0, 0), (0, padding)), constant_values=-jnp.inf)
  statistics = jax.ShapeDtypeStruct((rows,), jnp.float32)
  options = {'interpret': plgpu.InterpretGPUParams()} if interpret else {}
  return plgpu.kernel(
    functools.partial(
      _kernel,
      columns=columns,
      label_smoothing=label_smoothing,
      z_loss=z_loss,
    ),
    out_type=(statistics, statistics),
    grid=(rows,),
    grid_names=('row',),
    **options,
  )(logits, targets)


def _kernel(logits, targets, losses, lses, *, columns, label_smoothing, z_loss):
  row = jax.lax.axis_index('row')
  itemsize = jnp.dtype(logits.dtype).itemsize
  runs = [
    _run(logits, row, start, width, count, columns, bool(label_smoothing))
    for start, width, count in shapes.gpu_tiles(logits.shape[1], itemsize)
  ]
  highest = functools.reduce(jnp.maximum, [jnp.max(run[0]) for run in runs])
  total = drop = 0.0
  for high, low, below, counts in runs:
    total += jnp.sum(low * _exp(high - highest))
    if label_smoothing:
      drop += jnp.sum(below + counts * (highest - high))
  target = targets[row]
  picked = logits[row, jnp.maximum(target, 0)].astype(jnp.float32)
  log_sum = jnp.log(total)
  lse = highest + log_sum
  loss = log_sum + (1 - label_smoothing) * (highest - picked)
  if label_smoothing:
    loss += label_smoothing / columns * drop
  if z_loss:
    loss += z_loss * lse * lse
  loss = jnp.where(target == reference.OUTSIDE, jnp.nan, loss)
  losses[row] = jnp.where(target == reference.IGNORED, 0.0, loss)
  lses[row] = lse


def _run(logits, row, start, width, count, columns, smoothing):
  """Statistics of `count` tiles, each [width], one for each place in a tile.

  Returns:
    the highest; the sum of exponentials below it; the sum of the distances
    from it, and how many they are.
  """
  layout = plgpu.Layout.WG_STRIDED(
    (width,), vec_size=width // shapes.GPU_THREADS
  )

  def load(tile):
    place = pl.ds(start + tile * width, width)
    x = plgpu.layout_cast(logits[row, place], layout)
    return x.astype(jnp.float32)

  def full(value):
    return plgpu.layout_cast(jnp.full((width,), value, jnp.float32), layout)

  def step(first, tiles, carry):
    before, low, below = carry
    xs = [load(first + tile) for tile in range(tiles)]
    high = functools.reduce(jnp.maximum, xs, before)
    low *= _exp(before - high)
    for x in xs:
      low += _exp(x - high)
    if smoothing:
      seen = jnp.float32(first)
      below += seen * (high - before)
      for tile, x in enumerate(xs):
        below += inside(first + tile, high - x)
    return high, low, below

  def inside(tile, value):
    if start + count * width <= columns:
      return value
    place = plgpu.broadcasted_iota(jnp.int32, (width,), 0, layout=layout)
    return jnp.where(place < columns - start - tile * width, value, 0.0)

  together = max(shapes.GPU_LOADS * shapes.GPU_THREADS // width, 1)
  carry = jnp.maximum(load(0), _LOWEST), full(0.0), full(0.0)
  carry = jax.lax.fori_loop(
    0,
    count // together,
    lambda group, carry: step(group * together, together, carry),
    carry,
  )
  rest = count % together
  if rest:
    carry = step(count - rest, rest, carry)
  counts = (count - 1) + inside(count - 1, full(1.0))
  return *carry, counts


def _exp(x):
  return jnp.exp2(x * _LOG2_E)
