"""softmax and log_softmax in plain JAX: what XLA runs.

With z = scale x over the entries that are seen: softmax is exp(z) / sum exp(z),
log_softmax z - log sum exp(z). A row with nothing seen, or nothing above -inf,
is zeros, its logarithm -inf, where the formula and jax.nn say NaN.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np


@functools.partial(jax.jit, static_argnames=('axis', 'scale', 'log'))
def forward(
  x: jax.Array, seen: jax.Array | None, *, axis: int, scale: float, log: bool
) -> jax.Array:
  """The output, shaped as x and of its dtype.

  Args:
    x: of a floating dtype; the arithmetic is in float32, float64's in its own.
    seen: bool, broadcastable to x; where it is False the output is 0 (-inf).
    axis: the reduced one.
    scale: multiplies x.
    log: log_softmax.
  """
  wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  if scale < 0:
    wide, scale = -wide, -scale
  shown = wide if seen is None else jnp.where(seen, wide, -np.inf)
  top = jnp.max(shown, axis, keepdims=True)
  # Both bounds are met but by a row with nothing: some power is exp(0). A
  # comparison instead, one a number, XLA on a CPU would not fuse.
  top = jnp.maximum(top, jnp.finfo(wide.dtype).min)
  # The difference first: where x is large, scale x has lost its low bits.
  z = wide - top
  z = z * scale if scale != 1 else z
  powers = jnp.exp(z)
  total = jnp.maximum(jnp.sum(powers, axis, keepdims=True, where=seen), 1)
  y = z - jnp.log(total) if log else powers / total
  if seen is not None:
    y = jnp.where(seen, y, -np.inf if log else 0)
  return y.astype(x.dtype)


@functools.partial(jax.jit, static_argnames=('axis', 'scale', 'log', 'masked'))
def backward(
  y: jax.Array,
  y_grad: jax.Array,
  *,
  axis: int,
  scale: float,
  log: bool,
  masked: bool,
) -> jax.Array:
  """The gradient by x, from the output alone.

  Masked entries are known by their output, 0 (-inf): there the gradient is 0,
  and y_grad is not looked at.

  Args:
    y: forward's output.
    y_grad: the gradient by it.
    axis: the reduced one.
    scale: multiplied x.
    log: log_softmax.
    masked: there were masks. Without, an infinite y_grad is looked at
      everywhere.
  """
  wide = jnp.promote_types(y.dtype, jnp.float32)
  p, g = y.astype(wide), y_grad.astype(wide)
  terms = gradient_terms(p, g, log=log, masked=masked)
  total = jnp.sum(terms, axis, keepdims=True)
  x_grad = gradient(p, g, total, scale=scale, log=log, masked=masked)
  return x_grad.astype(y.dtype)


def gradient_terms(
  y: jax.Array, y_grad: jax.Array, *, log: bool, masked: bool
) -> jax.Array:
  """What is summed over the row for every entry's gradient."""
  terms = y_grad if log else y * y_grad
  if not masked:
    return terms
  return jnp.where(y == (-np.inf if log else 0), 0.0, terms)


def gradient(
  y: jax.Array,
  y_grad: jax.Array,
  total: jax.Array,
  *,
  scale: float,
  log: bool,
  masked: bool,
) -> jax.Array:
  """backward's arithmetic, in the dtype of y and y_grad, given the total."""
  x_grad = y_grad - jnp.exp(y) * total if log else y * (y_grad - total)
  x_grad = x_grad * scale if scale != 1 else x_grad
  if log:
    return jnp.where(y == -np.inf, 0.0, x_grad)
  return jnp.where(y == 0, 0.0, x_grad) if masked else x_grad
