"""conv2d_stats: a convolution between two batch norms, as training has it."""

import functools

import jax
import jax.numpy as jnp

from kernels import sharding
from kernels.ops.convolution import api
from kernels.ops.convolution import plain
from kernels.ops.convolution import reference


def conv2d_stats(
  x: jax.Array,
  w: jax.Array,
  *,
  in_scale: jax.Array | None = None,
  in_shift: jax.Array | None = None,
  in_activation: str | None = None,
  strides: int | tuple[int, int] = 1,
  padding: api.Padding = 'SAME',
  groups: int = 1,
  implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """conv(in_activation(x in_scale + in_shift), w), and its statistics.

  What is before is a batch norm's affine and its activation, applied while x is
  loaded; the statistics are what the next one's affine comes from, taken before
  the result has left the chip. So of a chain of convolution, norm and
  activation each array is written once and read once. The border is 0 behind
  the activation, as between separate layers.

  Args:
    x: [N, H, W, C], float16, bfloat16, float32 or float64 (on XLA alone).
    w: [I, J, C / groups, F], of x's dtype.
    in_scale, in_shift: broadcast to [C]; of a floating dtype.
    in_activation: None, 'relu', 'gelu' (by erf) or 'silu'.
    strides, padding, groups, implementation: as of conv2d.

  Returns:
    y [N, H', W', F] of x's dtype; its sum [F]; the sum [F] of its squares about
    its mean, and not about 0, where a mean of many deviations would leave
    nothing of them. Both are of y as it is rounded, in float32 (float64), over
    all images: on a mesh over all devices' too, inside shard_map the device's.

  Raises:
    TypeError, ValueError: as conv2d.
  """
  op = 'conv2d_stats'
  x, w, numbers = api.checked(op, x, w, strides, padding, 1, groups)
  api.check_activation(op, 'in_activation', in_activation)
  in_scale = api.broadcast(op, 'in_scale', in_scale, x.shape[-1:])
  in_shift = api.broadcast(op, 'in_shift', in_shift, x.shape[-1:])
  if not x.size or not w.size:
    raise ValueError(f'{op}: x {x.shape} and w {w.shape} leave nothing to sum')
  name = api.choose(op, implementation, x, w, numbers)
  if name == 'xla':
    x = reference.prologue(x, in_scale, in_shift, in_activation)
    y = reference.convolve(x, w, **numbers)
    return y, *reference.statistics(y)
  settings = api.Settings(
    name, numbers['strides'], numbers['padding'], in_activation
  )
  return _fused(settings, x, w, in_scale, in_shift)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(settings, x, w, in_scale, in_shift):
  return _kernel(settings, x, w, in_scale, in_shift)


def _forward(settings, x, w, in_scale, in_shift):
  y, total, squares = _kernel(settings, x, w, in_scale, in_shift)
  return (y, total, squares), (x, w, in_scale, in_shift, y, total)


def _backward(settings, kept, grads):
  x, w, in_scale, in_shift, y, total = kept
  y_grad, *of_statistics = grads
  grad = y_grad.astype(jnp.float32) + reference.statistics_grad(
    y, total, *of_statistics
  )
  grad = grad.astype(y.dtype)
  loaded, back = jax.vjp(
    lambda *args: reference.prologue(*args, settings.activation),
    x,
    in_scale,
    in_shift,
  )
  w_grad = plain.kernel_grad(
    loaded, w, grad, settings.strides, settings.padding
  )
  x_grad, *of_affine = back(api.input_grad(settings, loaded, w, grad))
  return x_grad, w_grad, *of_affine


_fused.defvjp(_forward, _backward)


def _kernel(settings, x, w, in_scale, in_shift):
  present = [one is not None for one in (in_scale, in_shift)]

  def local(x, w, *others):
    others = list(others)
    scale_here, shift_here = (others.pop(0) if p else None for p in present)
    return api.kernels_of(settings.implementation).forward(
      x,
      w,
      strides=settings.strides,
      padding=settings.padding,
      in_scale=scale_here,
      in_shift=shift_here,
      in_activation=settings.activation,
      scale=None,
      shift=None,
      residual=None,
      activation=None,
      statistics=True,
      interpret=settings.implementation.endswith('interpret'),
    )

  affine = [
    one.astype(jnp.float32) for one in (in_scale, in_shift) if one is not None
  ]
  # Of tiles, divided over devices as the images are: XLA sums over all.
  y, counts, sums, squares = sharding.over_rows(local, [x], [w, *affine])
  return y, *reference.combine(counts, sums, squares)
