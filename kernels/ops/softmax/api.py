"""softmax and log_softmax: arguments, choice of implementation, gradient."""

import functools
import math
import numbers
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np

from kernels import dispatch
from kernels import sharding
from kernels.ops.softmax import pallas_gpu
from kernels.ops.softmax import pallas_tpu
from kernels.ops.softmax import reference
from kernels.ops.softmax import shapes

DTYPES = ('float16', 'bfloat16', 'float32', 'float64')


def softmax(
  x: jax.Array,
  *,
  axis: int = -1,
  where: jax.Array | None = None,
  causal: bool = False,
  scale: float = 1.0,
  implementation: str | None = None,
) -> jax.Array:
  """exp(scale x) / sum exp(scale x) over the entries that are seen.

  What is not seen is 0, and so is a whole row of which nothing is seen, or
  which is -inf throughout. Their gradient is 0, under a mask even where what
  comes back is not finite.
  Differentiable by jax.grad, but not by jax.jvp; twice on XLA alone.

  Args:
    x: float16, bfloat16, float32 or float64 (on XLA alone); the arithmetic is
      in float32 or float64.
    axis: the one that sums to 1.
    where: bool, broadcastable to x; False: not seen.
    causal: x is [..., T, K], and of query t the keys up to t + K - T are seen.
    scale: a number, not an array: multiplies x.
    implementation: in dispatch.IMPLEMENTATIONS; None for the best measured.

  Returns:
    x's shape and dtype.

  Raises:
    TypeError: x is not floating, where not bool, axis or scale no number.
    ValueError: axis, where or scale does not fit x; or the named
      implementation cannot take it.
  """
  return _apply('softmax', x, axis, where, causal, scale, implementation)


def log_softmax(
  x: jax.Array,
  *,
  axis: int = -1,
  where: jax.Array | None = None,
  causal: bool = False,
  scale: float = 1.0,
  implementation: str | None = None,
) -> jax.Array:
  """log softmax: scale x - log sum exp(scale x). Not seen is -inf.

  An entry of -inf takes no part in the gradient. Arguments, result and errors
  are softmax's.
  """
  return _apply('log_softmax', x, axis, where, causal, scale, implementation)


class _Settings(NamedTuple):
  """What is known while tracing; axis is not -1 on XLA alone."""

  implementation: str
  log: bool
  scale: float
  axis: int
  masked: bool
  causal: bool


def _apply(op, x, axis, where, causal, scale, implementation):
  x, axis, where, scale = _checked(op, x, axis, where, causal, scale)

  def refusal(name):
    reason = shapes.refusal(
      name, x.shape[axis], x.dtype, masked=where is not None
    )
    return reason or sharding.refusal(_rows(x, axis))

  name = dispatch.choose(
    op, implementation, refusal, dtype=x.dtype, columns=x.shape[axis]
  )
  if not x.size:
    return x
  settings = _Settings(
    name, op == 'log_softmax', scale, axis, where is not None, causal
  )
  if name == 'xla':
    return _differentiable(settings, x, _seen(x.shape, where, causal))
  rows = _rows(x, axis)
  operands = [rows]
  if where is not None:
    mask = jnp.broadcast_to(where, x.shape).astype(jnp.int8)
    operands.append(_shared_as(rows, _rows(mask, axis)))
  if causal:
    # The last key that a row's query sees, and not its number in its block:
    # a mesh may divide the queries.
    last = np.arange(x.shape[-2], dtype=np.int32) + x.shape[-1] - x.shape[-2]
    last = jnp.broadcast_to(jnp.asarray(last), x.shape[:-1])
    operands.append(_shared_as(rows, last))
  y = _differentiable(settings._replace(axis=-1), *operands)
  return jnp.moveaxis(y, -1, axis) if x.ndim > 1 else y[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _differentiable(settings, x, *masks):
  return _forward(settings, x, *masks)[0]


def _forward(settings, x, *masks):
  if settings.implementation == 'xla':
    y = reference.forward(
      x, *masks, axis=settings.axis, scale=settings.scale, log=settings.log
    )
  else:
    y = sharding.over_rows(
      functools.partial(_kernel_forward, settings), [x, *masks]
    )
  return y, y


def _backward(settings, y, y_grad):
  if settings.implementation == 'xla':
    x_grad = reference.backward(
      y,
      y_grad,
      axis=settings.axis,
      scale=settings.scale,
      log=settings.log,
      masked=settings.masked or settings.causal,
    )
    return x_grad, None
  # Shared here and not by the derivative of shard_map, which sums over devices
  # that have computed the same rows.
  x_grad = sharding.over_rows(
    functools.partial(_kernel_backward, settings), [y, y_grad]
  )
  return x_grad, *(None,) * (settings.masked + settings.causal)


_differentiable.defvjp(_forward, _backward)


def _kernel_forward(settings, x, *masks):
  columns, masks = x.shape[-1], list(masks)
  mask = masks.pop(0).reshape(-1, columns) if settings.masked else None
  last = masks.pop(0).reshape(-1)[0] if settings.causal else None
  y = _kernels(settings).forward(
    x.reshape(-1, columns),
    mask,
    last,
    queries=x.shape[-2],
    scale=settings.scale,
    log=settings.log,
    interpret=settings.implementation.endswith('interpret'),
  )
  return y.reshape(x.shape)


def _kernel_backward(settings, y, y_grad):
  columns = y.shape[-1]
  x_grad = _kernels(settings).backward(
    y.reshape(-1, columns),
    y_grad.reshape(-1, columns),
    scale=settings.scale,
    log=settings.log,
    interpret=settings.implementation.endswith('interpret'),
  )
  return x_grad.reshape(y.shape)


def _kernels(settings):
  tpu = settings.implementation.startswith('pallas_tpu')
  return pallas_tpu if tpu else pallas_gpu


def _rows(x, axis):
  """x with the axis last, and at least one before it."""
  x = jnp.moveaxis(x, axis, -1)
  return x if x.ndim > 1 else x[None]


def _shared_as(x, mask):
  """The mask, on explicit axes of a mesh divided as x is."""
  spec = jax.typeof(x).sharding.spec[: mask.ndim]
  if not any(spec):
    return mask
  return jax.sharding.reshard(mask, PartitionSpec(*spec))


def _seen(shape, where, causal):
  """What XLA masks with: bool, broadcastable to shape; None for no mask."""
  if not causal:
    return where
  queries, keys = shape[-2:]
  seen = (
    jnp.arange(queries)[:, None] + (keys - queries) >= jnp.arange(keys)[None]
  )
  return seen if where is None else where & seen


def _checked(op, x, axis, where, causal, scale):
  x = jnp.asarray(x)
  if x.dtype.name not in DTYPES:
    raise TypeError(f'{op}: x is {x.dtype}; it can be {", ".join(DTYPES)}')
  try:
    axis = operator.index(axis)
  except TypeError:
    raise TypeError(f'{op}: axis is {axis!r}; it is one integer') from None
  if not -x.ndim <= axis < x.ndim:
    raise ValueError(f'{op}: there is no axis {axis} in x {x.shape}')
  axis %= x.ndim
  if where is not None:
    where = jnp.asarray(where)
    if where.dtype != bool:
      raise TypeError(f'{op}: where is {where.dtype}; it is bool')
    if where.ndim > x.ndim or any(
      size not in (1, full)
      for size, full in zip(where.shape[::-1], x.shape[::-1], strict=False)
    ):
      raise ValueError(
        f'{op}: where {where.shape} does not broadcast to x {x.shape}'
      )
  if causal and (x.ndim < 2 or axis != x.ndim - 1):
    raise ValueError(
      f'{op}: causal needs x [..., T, K] and its last axis, and has'
      f' {x.shape} and axis {axis}'
    )
  if not isinstance(scale, numbers.Real):
    raise TypeError(
      f'{op}: scale is a {type(scale).__name__}; it is a number (multiply x'
      ' by an array before)'
    )
  scale = float(scale)
  if not math.isfinite(scale):
    raise ValueError(f'{op}: scale is {scale}; it is finite')
  return x, axis, where, scale
