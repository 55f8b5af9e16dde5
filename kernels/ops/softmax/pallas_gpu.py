"""softmax and log_softmax for Mosaic GPU: a warpgroup a row.

A short row stays in registers. A long one is read three times, the second and
third from the level 2 cache, where the rows in flight fit.
"""

import functools

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np

from kernels.ops.softmax import reference
from kernels.ops.softmax import shapes


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
    x: [N, K], K a multiple of 128 and at most shapes.LONGEST.
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
  operands = [x]
  if mask is not None:
    operands.append(mask)
  if last is not None:
    operands.append(last.reshape(1))
  return _call(body, operands, interpret)


def backward(
  y: jax.Array, y_grad: jax.Array, *, scale: float, log: bool, interpret: bool
) -> jax.Array:
  """The gradient by x from the output y [N, K] and the gradient by it."""
  body = functools.partial(_backward, scale=scale, log=log)
  return _call(body, [y, y_grad], interpret)


def _call(body, operands, interpret):
  rows, _ = operands[0].shape
  return plgpu.kernel(
    body,
    out_type=jax.ShapeDtypeStruct(operands[0].shape, operands[0].dtype),
    grid=(rows,),
    grid_names=('row',),
    interpret=plgpu.InterpretGPUParams() if interpret else None,
  )(*operands)


def _forward(*refs, masked, queries, scale, log):
  x_ref, y_ref = refs[0], refs[-1]
  row = lax.axis_index('row')
  last = refs[-2][0] + row % queries if queries else None

  def load(start, size):
    """x in float32, and where it is seen."""
    x = _load(x_ref, row, start, size, x_ref.dtype)
    seen = None
    if masked:
      mask = _load(refs[1], row, start, size, x_ref.dtype)
      seen = mask.astype(jnp.int32) != 0
    if queries:
      column = plgpu.broadcasted_iota(
        jnp.int32, (size,), 0, layout=_layout(size, x_ref.dtype)
      )
      visible = column <= last - start
      seen = visible if seen is None else seen & visible
    x = x.astype(jnp.float32)
    return -x if scale < 0 else x, seen

  def hide(x, seen, value):
    return x if seen is None else jnp.where(seen, x, value)

  def difference(x):
    return (x - top) * abs(scale) if abs(scale) != 1 else x - top

  def shown(x, seen):
    return hide(x, seen, -np.inf)

  def powers(x, seen):
    return hide(jnp.exp(difference(x)), seen, 0.0)

  def output(x, seen):
    z = difference(x)
    y = z - shift if log else jnp.exp(z) * factor
    return hide(y, seen, -np.inf if log else 0.0)

  width = shapes.gpu_width(
    x_ref.shape[-1], log=log, masked=masked or bool(queries)
  )
  pieces = _Pieces(x_ref, load, width)
  top = pieces.reduce(shown, jnp.maximum, jnp.max, -np.inf)
  top = jnp.where(top == -np.inf, 0.0, top)
  total = pieces.reduce(powers, jnp.add, jnp.sum, 0.0)
  total = jnp.where(total == 0, 1.0, total)
  shift, factor = jnp.log(total), 1.0 / total
  pieces.write(output, y_ref, row)


def _backward(y_ref, y_grad_ref, x_grad_ref, *, scale, log):
  row = lax.axis_index('row')

  def load(start, size):
    y = _load(y_ref, row, start, size, y_ref.dtype)
    y_grad = _load(y_grad_ref, row, start, size, y_ref.dtype)
    return y.astype(jnp.float32), y_grad.astype(jnp.float32)

  def terms(y, y_grad):
    return reference.gradient_terms(y, y_grad, log=log, masked=True)

  def output(y, y_grad):
    return reference.gradient(
      y, y_grad, total, scale=scale, log=log, masked=True
    )

  width = shapes.gpu_width(y_ref.shape[-1], log=log, masked=False)
  pieces = _Pieces(y_ref, load, width)
  total = pieces.reduce(terms, jnp.add, jnp.sum, 0.0)
  pieces.write(output, x_grad_ref, row)


class _Pieces:
  """A row, whole in registers or piece by piece."""

  def __init__(self, ref, load, width):
    self.columns, self.dtype = ref.shape[-1], ref.dtype
    self.width = width
    self.load = load
    if self.width == self.columns:
      whole = load(0, self.columns)
      self.load = lambda start, size: whole

  def reduce(self, function, combine, total, first):
    """The scalar total of function(*piece) over the row."""
    rest = self.columns % self.width
    if self.width == self.columns:
      return total(function(*self.load(0, self.columns)))

    def step(i, running):
      piece = function(*self.load(i * self.width, self.width))
      return combine(running, piece)

    running = plgpu.layout_cast(
      jnp.full((self.width,), first, jnp.float32),
      _layout(self.width, self.dtype),
    )
    whole = self.columns // self.width
    result = total(lax.fori_loop(0, whole, step, running))
    if rest:
      piece = function(*self.load(whole * self.width, rest))
      result = combine(result, total(piece))
    return result

  def write(self, function, ref, row):
    """Stores function(*piece) in that row of ref."""

    def step(i, size=self.width):
      y = function(*self.load(i * self.width, size))
      ref[row, pl.ds(i * self.width, size)] = y.astype(ref.dtype)

    whole = self.columns // self.width
    if whole == 1:
      step(0)
    else:
      lax.fori_loop(0, whole, lambda i, _: step(i), None)
    if self.columns % self.width:
      step(whole, self.columns % self.width)


def _load(ref, row, start, size, dtype):
  """A piece of a row, spread over threads as one of that dtype is."""
  return plgpu.layout_cast(ref[row, pl.ds(start, size)], _layout(size, dtype))


def _layout(size, dtype):
  vector = 8 // jnp.dtype(dtype).itemsize
  while size % (vector * shapes.WARPGROUP):
    vector //= 2
  return plgpu.Layout.WG_STRIDED((size,), vec_size=vector)
