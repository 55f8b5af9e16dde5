"""conv2d and conv2d_stats in plain JAX: what XLA runs.

Shapes: N images, H W C image, I J kernel's height and width, F features.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from kernels.ops.convolution import activations
from kernels.ops.convolution import plain


def forward(
  x: jax.Array,
  w: jax.Array,
  scale: jax.Array | None,
  shift: jax.Array | None,
  residual: jax.Array | None,
  *,
  activation: str | None,
  **numbers,
) -> jax.Array:
  """activation(scale conv(x, w) + shift + residual), [N, H', W', F].

  The scale goes into the weights and all else is of x's dtype, so that a GPU
  gets one call of cuDNN.

  Args:
    x: [N, H, W, C].
    w: [I, J, C, F], of x's dtype.
    scale, shift: [F] or None.
    residual: [N, H', W', F] or None.
    activation: in activations.ACTIVATIONS.
    **numbers: of convolve.
  """
  y = convolve(x, fold(w, scale), **numbers)
  if shift is not None:
    y = y + shift.astype(y.dtype)
  if residual is not None:
    y = y + residual.astype(y.dtype)
  return _activated(activation, y)


def convolve(
  x: jax.Array,
  w: jax.Array,
  *,
  strides: Sequence[int],
  padding: Sequence[tuple[int, int]],
  dilation: Sequence[int] = (1, 1),
  groups: int = 1,
) -> jax.Array:
  """The convolution alone, as jax.lax's."""
  return plain.conv_general_dilated(
    x,
    w,
    strides,
    padding,
    rhs_dilation=tuple(dilation),
    feature_group_count=groups,
  )


def fold(w: jax.Array, scale: jax.Array | None) -> jax.Array:
  """The weights [I, J, C, F] times the scale [F], of w's dtype."""
  if scale is None:
    return w
  wide = jnp.promote_types(w.dtype, jnp.float32)
  return (w.astype(wide) * scale.astype(wide)).astype(w.dtype)


def prologue(
  x: jax.Array,
  scale: jax.Array | None,
  shift: jax.Array | None,
  activation: str | None,
) -> jax.Array:
  """activation(x scale + shift), of x's dtype, by way of float32."""
  wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  if scale is not None:
    wide = wide * scale.astype(wide.dtype)
  if shift is not None:
    wide = wide + shift.astype(wide.dtype)
  return activations.activate(activation, wide).astype(x.dtype)


@jax.custom_vjp
def statistics(y: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Each channel's sum, and its squares' sum about the mean: [..., F] -> [F].

  float32, or float64. Gone over once: of each image the sums are taken about
  its first pixel, which is as good as its mean, and then put together (Chan,
  Golub & LeVeque 1979).
  """
  images = y.reshape(y.shape[0], -1, y.shape[-1])
  images = images.astype(jnp.promote_types(y.dtype, jnp.float32))
  first, pixels = images[:, 0], images.shape[1]
  centered = images - first[:, None]
  sums, squares = centered.sum(1), jnp.square(centered).sum(1)
  return combine(
    jnp.full(len(images), pixels, images.dtype),
    sums + pixels * first,
    jnp.maximum(squares - jnp.square(sums) / pixels, 0),
  )


def _statistics_forward(y):
  total, squares = statistics(y)
  return (total, squares), (y, total)


def _statistics_backward(kept, grads):
  y, total = kept
  return (statistics_grad(y, total, *grads).astype(y.dtype),)


statistics.defvjp(_statistics_forward, _statistics_backward)


def statistics_grad(
  y: jax.Array, total: jax.Array, total_grad: jax.Array, squares_grad: jax.Array
) -> jax.Array:
  """The gradient of statistics by y [..., F], float32 or float64."""
  mean = total / (y.size // y.shape[-1])
  return total_grad + 2 * squares_grad * (y.astype(total.dtype) - mean)


def combine(
  counts: jax.Array, sums: jax.Array, squares: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Statistics [F] of tiles' together.

  Args:
    counts: pixels of each tile [T].
    sums: [T, F].
    squares: about each tile's own mean [T, F].
  """
  total = sums.sum(0)
  mean = total / counts.sum()
  # An empty tile's mean does not count.
  apart = jnp.square(sums / jnp.maximum(counts, 1)[:, None] - mean)
  return total, squares.sum(0) + (counts[:, None] * apart).sum(0)


def _activated(name, y):
  if name in (None, 'relu'):
    return activations.activate(name, y)
  wide = y.astype(jnp.promote_types(y.dtype, jnp.float32))
  return activations.activate(name, wide).astype(y.dtype)
