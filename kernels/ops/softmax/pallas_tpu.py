"""softmax and log_softmax for Mosaic TPU: a block holds whole rows.

The block of a long row is gone over in pieces, three times; it is read from
memory once.
"""

import functools

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import numpy as np

from kernels.ops.softmax import reference
from kernels.ops.softmax import shapes

# For what the compiler puts beside the blocks.
_SPARE_VMEM = 16 * 2**20


def forward(
  x: jax.Array,
  mask: jax.Array | None,
  last: jax.Array | None,
  *,
  queries: int,
  scale: float,
  log: bool,
  interpret: bool,
) -> jax.Array:
  """The output, shaped as x and of its dtype.

  Args:
    x: [N, K], of at most shapes.LONGEST columns.
    mask: int8 [N, K], 0 where an entry is not seen.
    last: int32, the last column that row 0 sees, row 1 one more, and after
      `queries` rows from there again. It may be negative.
    queries: see last.
    scale: multiplies x.
    log: log_softmax.
    interpret: on any platform, slowly.
  """
  body = functools.partial(
    _forward,
    masked=mask is not None,
    queries=queries if last is not None else 0,
    scale=scale,
    log=log,
  )
  scalars = () if last is None else (last.reshape(1),)
  blocks = (x,) if mask is None else (x, mask)
  return _call(body, scalars, blocks, f'{_name(log)}_forward', interpret)


def backward(
  y: jax.Array, y_grad: jax.Array, *, scale: float, log: bool, interpret: bool
) -> jax.Array:
  """The gradient by x from the output y [N, K] and the gradient by it."""
  body = functools.partial(_backward, scale=scale, log=log)
  return _call(body, (), (y, y_grad), f'{_name(log)}_backward', interpret)


def _call(body, scalars, blocks, name, interpret):
  rows, columns = blocks[0].shape
  dtype = blocks[0].dtype
  masked = any(block.dtype == jnp.int8 for block in blocks)
  held = shapes.tpu_rows(rows, columns, dtype, masked)
  spec = pl.BlockSpec((held, columns), lambda i, *_: (i, 0))
  sizes = [block.dtype.itemsize for block in (*blocks, blocks[0])]
  return pl.pallas_call(
    body,
    out_shape=jax.ShapeDtypeStruct((rows, columns), dtype),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=len(scalars),
      grid=(pl.cdiv(rows, held),),
      in_specs=[spec] * len(blocks),
      out_specs=spec,
    ),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel',),
      # Two of each block: one is worked on while the other is copied.
      vmem_limit_bytes=2 * held * columns * sum(sizes) + _SPARE_VMEM,
    ),
    cost_estimate=pl.CostEstimate(
      flops=6 * rows * columns,
      bytes_accessed=rows * columns * sum(sizes),
      transcendentals=rows * columns,
    ),
    interpret=interpret,
    name=name,
  )(*scalars, *blocks)


def _forward(*refs, masked, queries, scale, log):
  refs = list(refs)
  last_ref = refs.pop(0) if queries else None
  x_ref, y_ref = refs[0], refs[-1]
  rows, columns = x_ref.shape
  sign = -1 if scale < 0 else 1
  if queries:
    first = pl.program_id(0) * rows
    row = first + lax.broadcasted_iota(jnp.int32, (rows, 1), 0)
    last = last_ref[0] + row % queries

  def load(start, size):
    """x in float32, and where it is seen."""
    piece = pl.ds(start, size)
    x = x_ref[:, piece].astype(jnp.float32)
    seen = None
    if masked:
      seen = refs[1][:, piece].astype(jnp.int32) != 0
    if queries:
      column = start + lax.broadcasted_iota(jnp.int32, (rows, size), 1)
      visible = column <= last
      seen = visible if seen is None else seen & visible
    return sign * x if sign < 0 else x, seen

  def hide(x, seen, value):
    return x if seen is None else jnp.where(seen, x, value)

  def maximum(start, size, top):
    x, seen = load(start, size)
    piece = jnp.max(hide(x, seen, -np.inf), -1, keepdims=True)
    return jnp.maximum(top, piece)

  def difference(x, top):
    return (x - top) * abs(scale) if abs(scale) != 1 else x - top

  def add(start, size, total):
    x, seen = load(start, size)
    powers = hide(jnp.exp(difference(x, top)), seen, 0)
    return total + jnp.sum(powers, -1, keepdims=True)

  def write(start, size, carry):
    x, seen = load(start, size)
    z = difference(x, top)
    y = z - shift if log else jnp.exp(z) * factor
    y = hide(y, seen, -np.inf if log else 0)
    y_ref[:, pl.ds(start, size)] = y.astype(y_ref.dtype)
    return carry

  def over(body, carry):
    return _over(rows, columns, body, carry)

  top = over(maximum, jnp.full((rows, 1), -np.inf, jnp.float32))
  top = jnp.where(top == -np.inf, 0, top)
  total = over(add, jnp.zeros((rows, 1), jnp.float32))
  total = jnp.where(total == 0, 1, total)
  shift, factor = jnp.log(total), 1 / total
  over(write, 0)


def _backward(y_ref, y_grad_ref, x_grad_ref, *, scale, log):
  rows, columns = y_ref.shape

  def load(start, size):
    piece = pl.ds(start, size)
    y, g = y_ref[:, piece], y_grad_ref[:, piece]
    return y.astype(jnp.float32), g.astype(jnp.float32)

  def add(start, size, total):
    terms = reference.gradient_terms(*load(start, size), log=log, masked=True)
    return total + jnp.sum(terms, -1, keepdims=True)

  def write(start, size, carry):
    x_grad = reference.gradient(
      *load(start, size), total, scale=scale, log=log, masked=True
    )
    x_grad_ref[:, pl.ds(start, size)] = x_grad.astype(x_grad_ref.dtype)
    return carry

  zero = jnp.zeros((rows, 1), jnp.float32)
  total = _over(rows, columns, add, zero)
  _over(rows, columns, write, 0)


def _over(rows, columns, body, carry):
  """body(start, size, carry) over pieces of the columns."""
  width = shapes.tpu_width(rows, columns)
  if width == columns:
    return body(0, columns, carry)
  whole = columns // width

  def step(i, carry):
    return body(pl.multiple_of(i * width, 128), width, carry)

  carry = lax.fori_loop(0, whole, step, carry)
  if columns % width:
    carry = body(whole * width, columns % width, carry)
  return carry


def _name(log):
  return 'log_softmax' if log else 'softmax'
