"""Cross-entropy of rows on a TPU, in Mosaic TPU.

A row's columns come block by block. Each of the 128 lanes keeps statistics of
its own columns, and the lanes come together once, after the last block.
"""

import functools

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from kernels.ops.cross_entropy import reference
from kernels.ops.cross_entropy import shapes

# Under every finite logit, and a difference from it is a number still.
_LOWEST = float(jnp.finfo(jnp.float32).min)
_BESIDE_BLOCKS = 8 * 2**20


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
  block = shapes.tpu_block(rows, columns, logits.dtype)
  statistics = jax.ShapeDtypeStruct((rows, 1), jnp.float32)
  of_rows = pl.BlockSpec((block[0], 1), lambda row, column: (row, 0))
  lanes = pltpu.VMEM((block[0], shapes.LANES), jnp.float32)
  loss, lse = pl.pallas_call(
    functools.partial(
      _kernel,
      columns=columns,
      label_smoothing=label_smoothing,
      z_loss=z_loss,
    ),
    out_shape=(statistics, statistics),
    grid=(pl.cdiv(rows, block[0]), pl.cdiv(columns, block[1])),
    in_specs=[of_rows, pl.BlockSpec(block, lambda row, column: (row, column))],
    out_specs=(of_rows, of_rows),
    scratch_shapes=[lanes] * (4 if label_smoothing else 3),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'arbitrary'),
      # One block is read while the other is added up; beside them are the
      # statistics and what the compiler needs.
      vmem_limit_bytes=2 * block[0] * block[1] * logits.dtype.itemsize
      + _BESIDE_BLOCKS,
    ),
    cost_estimate=pl.CostEstimate(
      flops=6 * logits.size,
      bytes_accessed=logits.size * logits.dtype.itemsize + 12 * rows,
      transcendentals=logits.size,
    ),
    interpret=interpret,
    name='cross_entropy',
  )(targets[:, None], logits)
  return loss[:, 0], lse[:, 0]


def _kernel(
  targets_ref, logits_ref, loss_ref, lse_ref, high_ref, low_ref, picked_ref,
  *below_ref, columns, label_smoothing, z_loss,
):  # fmt: skip
  """One block; *_ref of the scratch are running statistics [rows, lanes].

  high: the highest; low: the sum of exponentials below it; picked: the
  target's logit, in its lane; below: the sum of the distances from the highest.
  """
  block = pl.program_id(1)
  rows, width = logits_ref.shape
  at_once = min(rows, shapes.TPU_ROWS_AT_ONCE)
  last = pl.num_programs(1) - 1
  lane = jax.lax.broadcasted_iota(jnp.int32, (at_once, shapes.LANES), 1)
  statistics = (high_ref, low_ref, picked_ref, *below_ref)

  @pl.when(block == 0)
  def _():
    high_ref[...] = jnp.full(high_ref.shape, _LOWEST, jnp.float32)
    for ref in statistics[1:]:
      ref[...] = jnp.zeros(ref.shape, jnp.float32)

  def each_group(function):
    @pl.loop(0, rows // at_once)
    def _(group):
      function(pl.ds(pl.multiple_of(group * at_once, at_once), at_once))

  def add(count, place):
    """The block's first `count` columns."""
    full = count // shapes.LANES
    ragged = count % shapes.LANES

    def load(tile):
      start = pl.multiple_of(tile * shapes.LANES, shapes.LANES)
      x = logits_ref[place, pl.ds(start, shapes.LANES)]
      return x.astype(jnp.float32)

    def load_last():
      return jnp.where(lane < ragged, load(full), -jnp.inf)

    # Where the target lies, counted from the lane's first column.
    ahead = targets_ref[place, :] - lane - block * width

    def pick(x, tile, picked):
      return jnp.where(ahead == tile * shapes.LANES, x, picked)

    def first_pass(tile, carry):
      high, picked = carry
      x = load(tile)
      return jnp.maximum(high, x), pick(x, tile, picked)

    before = high_ref[place, :]
    carry = _loop(full, first_pass, (before, picked_ref[place, :]))
    if ragged:
      x = load_last()
      carry = jnp.maximum(carry[0], x), pick(x, full, carry[1])
    high, picked = carry
    high_ref[place, :] = high
    picked_ref[place, :] = picked

    def second_pass(tile, carry):
      distance = load(tile) - high
      low = carry[0] + jnp.exp(distance)
      return (low, *(below - distance for below in carry[1:]))

    carry = (low_ref[place, :] * jnp.exp(before - high),)
    if label_smoothing:
      seen = (block * (width // shapes.LANES)).astype(jnp.float32)
      # The lowest is no logit, and may be too far to be a number.
      rise = jnp.where(block == 0, 0.0, seen * (high - before))
      carry += (below_ref[0][place, :] + rise,)
    carry = _loop(full, second_pass, carry)
    if ragged:
      distance = load_last() - high
      carry = (
        carry[0] + jnp.exp(distance),
        *(below - jnp.where(lane < ragged, distance, 0) for below in carry[1:]),
      )
    low_ref[place, :] = carry[0]
    if label_smoothing:
      below_ref[0][place, :] = carry[1]

  def finish(place):
    high, low = high_ref[place, :], low_ref[place, :]
    highest = jnp.max(high, axis=1, keepdims=True)
    total = jnp.sum(low * jnp.exp(high - highest), axis=1, keepdims=True)
    log_sum = jnp.log(total)
    picked = jnp.sum(picked_ref[place, :], axis=1, keepdims=True)
    lse = highest + log_sum
    loss = log_sum + (1 - label_smoothing) * (highest - picked)
    if label_smoothing:
      # Lanes beyond a short row hold no logit, and their highest is none.
      counts = columns // shapes.LANES + jnp.where(
        lane < columns % shapes.LANES, 1.0, 0.0
      )
      rise = jnp.where(counts > 0, counts * (highest - high), 0)
      drop = jnp.sum(below_ref[0][place, :] + rise, axis=1, keepdims=True)
      loss += label_smoothing / columns * drop
    if z_loss:
      loss += z_loss * lse * lse
    target = targets_ref[place, :]
    loss = jnp.where(target == reference.OUTSIDE, jnp.nan, loss)
    loss_ref[place, :] = jnp.where(target == reference.IGNORED, 0, loss)
    lse_ref[place, :] = lse

  remainder = columns % width or width
  if remainder == width:
    each_group(functools.partial(add, width))
  else:
    pl.when(block < last)(lambda: each_group(functools.partial(add, width)))
    pl.when(block == last)(
      lambda: each_group(functools.partial(add, remainder))
    )
  pl.when(block == last)(lambda: each_group(finish))


def _loop(count, step, carry):
  """step(i, carry) for i below count, eight at a time."""
  together = 8
  carry = jax.lax.fori_loop(
    0,
    count // together,
    lambda group, carry: functools.reduce(
      lambda carry, tile: step(group * together + tile, carry),
      range(together),
      carry,
    ),
    carry,
  )
  for tile in range(count // together * together, count):
    carry = step(tile, carry)
  return carry
