"""conv2d: arguments, choice of implementation, gradient."""

from collections.abc import Sequence
import functools
import math
import operator
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels import dispatch
from kernels import sharding
from kernels.ops.convolution import activations
from kernels.ops.convolution import pallas_gpu
from kernels.ops.convolution import pallas_tpu
from kernels.ops.convolution import plain
from kernels.ops.convolution import reference
from kernels.ops.convolution import shapes

DTYPES = ('float16', 'bfloat16', 'float32', 'float64')
Padding = str | Sequence[tuple[int, int]]


def conv2d(
  x: jax.Array,
  w: jax.Array,
  *,
  scale: jax.Array | None = None,
  shift: jax.Array | None = None,
  residual: jax.Array | None = None,
  activation: str | None = None,
  strides: int | tuple[int, int] = 1,
  padding: Padding = 'SAME',
  dilation: int | tuple[int, int] = 1,
  groups: int = 1,
  implementation: str | None = None,
) -> jax.Array:
  """activation(scale conv(x, w) + shift + residual): a cross-correlation.

  On XLA the scale is folded into the weights. Differentiable by jax.grad with
  respect to all five arrays.

  Args:
    x: [N, H, W, C], float16, bfloat16, float32 or float64 (on XLA alone).
    w: [I, J, C / groups, F], of x's dtype.
    scale, shift: broadcast to [F]; of a floating dtype.
    residual: broadcasts to the result.
    activation: None, 'relu', 'gelu' (by erf) or 'silu'.
    strides: down and across.
    padding: 'SAME', 'VALID', or zeros ((above, below), (left, right)).
    dilation: of w's places, down and across; not in the kernels.
    groups: that the channels divide into; in the kernels one.
    implementation: in dispatch.IMPLEMENTATIONS; None for the best measured.

  Returns:
    [N, H', W', F] of x's dtype; the kernels round to it once, at the end.

  Raises:
    TypeError: a dtype or an argument's kind does not fit.
    ValueError: a shape does not fit, there is no such activation or padding, or
      the named implementation cannot take these.
  """
  x, w, numbers = checked('conv2d', x, w, strides, padding, dilation, groups)
  check_activation('conv2d', 'activation', activation)
  shape = _output_shape(x, w, numbers)
  scale = broadcast('conv2d', 'scale', scale, shape[-1:])
  shift = broadcast('conv2d', 'shift', shift, shape[-1:])
  residual = broadcast('conv2d', 'residual', residual, shape)
  name = choose('conv2d', implementation, x, w, numbers)
  if name == 'xla':
    return reference.forward(
      x, w, scale, shift, residual, activation=activation, **numbers
    )
  settings = Settings(name, numbers['strides'], numbers['padding'], activation)
  return _fused(settings, x, w, scale, shift, residual)


class Settings(NamedTuple):
  """What is known while tracing."""

  implementation: str
  strides: tuple[int, int]
  padding: tuple[tuple[int, int], tuple[int, int]]
  activation: str | None  # conv2d's last, conv2d_stats' first


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(settings, x, w, scale, shift, residual):
  return _kernel(settings, x, w, scale, shift, residual)


def _forward(settings, x, w, scale, shift, residual):
  # The derivative of relu is seen in what comes out of it, others' is not.
  smooth = settings.activation in ('gelu', 'silu')
  inner = settings._replace(activation=None) if smooth else settings
  y = _kernel(inner, x, w, scale, shift, residual)
  kept = x, w, scale, shift, residual, y
  return (
    reference.prologue(y, None, None, settings.activation) if smooth else y
  ), kept


def _backward(settings, kept, y_grad):
  x, w, scale, shift, residual, y = kept
  grad = y_grad.astype(jnp.float32)
  if settings.activation is not None:
    activate = functools.partial(activations.activate, settings.activation)
    (grad,) = jax.vjp(activate, y.astype(jnp.float32))[1](grad)
  shift_grad = None if shift is None else grad.sum((0, 1, 2))
  residual_grad = None if residual is None else grad.astype(residual.dtype)
  grad = grad.astype(x.dtype)
  x_grad = input_grad(settings, x, reference.fold(w, scale), grad)
  w_grad = plain.kernel_grad(x, w, grad, settings.strides, settings.padding)
  scale_grad = None
  if scale is not None:
    # Nothing is divided by a scale, which may be 0.
    wide = w_grad.astype(jnp.float32)
    scale_grad = (wide * w).sum((0, 1, 2)).astype(scale.dtype)
    w_grad = (wide * scale).astype(w.dtype)
  if shift is not None:
    shift_grad = shift_grad.astype(shift.dtype)
  return x_grad, w_grad, scale_grad, shift_grad, residual_grad


_fused.defvjp(_forward, _backward)


def input_grad(
  settings: Settings, x: jax.Array, w: jax.Array, grad: jax.Array
) -> jax.Array:
  """The gradient by x of conv(x, w), given that by the result.

  Where strides are 1 it is a convolution of the same kind, by the same kernel;
  else XLA's.
  """
  around = tuple(
    (taps - 1 - low, size - 1 + low - (steps - 1))
    for taps, (low, _), size, steps in zip(
      w.shape[:2],
      settings.padding,
      x.shape[1:3],
      grad.shape[1:3],
      strict=True,
    )
  )
  turned = w[::-1, ::-1].swapaxes(2, 3)
  numbers = {'strides': (1, 1), 'padding': around}
  if (
    settings.strides != (1, 1)
    or min(map(min, around)) < 0
    or _refusal(settings.implementation, grad, turned, numbers)
  ):
    return plain.input_grad(x, w, grad, settings.strides, settings.padding)
  return _kernel(
    Settings(settings.implementation, **numbers, activation=None),
    grad, turned, None, None, None,
  )  # fmt: skip


def _kernel(settings, x, w, scale, shift, residual):
  present = [one is not None for one in (scale, shift)]

  def local(x, *others):
    others = list(others)
    residual_here = others.pop(0) if residual is not None else None
    w_here = others.pop(0)
    scale_here, shift_here = (others.pop(0) if p else None for p in present)
    return kernels_of(settings.implementation).forward(
      x,
      w_here,
      strides=settings.strides,
      padding=settings.padding,
      in_scale=None,
      in_shift=None,
      in_activation=None,
      scale=scale_here,
      shift=shift_here,
      residual=residual_here,
      activation=settings.activation,
      statistics=False,
      interpret=settings.implementation.endswith('interpret'),
    )

  rows = [x] if residual is None else [x, residual.astype(x.dtype)]
  whole = [
    w, *(one.astype(jnp.float32) for one in (scale, shift) if one is not None)
  ]  # fmt: skip
  return sharding.over_rows(local, rows, whole)


def kernels_of(implementation: str):
  """The module of that kernel."""
  return pallas_tpu if implementation.startswith('pallas_tpu') else pallas_gpu


def choose(
  op: str, implementation: str | None, x: jax.Array, w: jax.Array, numbers
) -> str:
  """dispatch.choose's; a kernel's name only where there is what to compute."""
  name = dispatch.choose(
    op,
    implementation,
    lambda name: _refusal(name, x, w, numbers),
    dtype=x.dtype,
    # What the products sum over.
    columns=math.prod(w.shape[:3]),
  )
  return name if x.size and w.size else 'xla'


def checked(
  op: str,
  x: Any,
  w: Any,
  strides: Any,
  padding: Any,
  dilation: Any,
  groups: Any,
) -> tuple[jax.Array, jax.Array, dict[str, Any]]:
  """x, w, and the other arguments of reference.convolve; or an error."""
  x, w = jnp.asarray(x), jnp.asarray(w)
  if x.dtype.name not in DTYPES:
    raise TypeError(f'{op}: x is {x.dtype}; it can be {", ".join(DTYPES)}')
  if w.dtype != x.dtype:
    raise TypeError(f'{op}: w is {w.dtype} and x {x.dtype}; they are the same')
  if x.ndim != 4 or w.ndim != 4:
    raise ValueError(
      f'{op}: x {x.shape} is [N, H, W, C] and w {w.shape} [I, J, C, F]'
    )
  strides = _pair(op, 'strides', strides)
  dilation = _pair(op, 'dilation', dilation)
  groups = _whole(op, 'groups', groups)
  channels, features = x.shape[3], w.shape[3]
  if channels != groups * w.shape[2]:
    raise ValueError(
      f'{op}: x {x.shape} has {channels} channels, and w {w.shape} in {groups}'
      f' group{"s" * (groups > 1)} takes {groups * w.shape[2]}'
    )
  if features % groups:
    raise ValueError(
      f'{op}: w {w.shape} has {features} features, which {groups} groups do not'
      ' divide'
    )
  if not w.shape[0] or not w.shape[1]:
    raise ValueError(f'{op}: w {w.shape} has no places')
  taken = tuple(
    (taps - 1) * apart + 1
    for taps, apart in zip(w.shape[:2], dilation, strict=True)
  )
  padding = _padding(op, padding, x.shape[1:3], taken, strides)
  numbers = {'strides': strides, 'padding': padding}
  if min(shapes.output_size(x.shape[1:3], taken, strides, padding)) < 1:
    raise ValueError(
      f'{op}: w {w.shape} takes {taken[0]}x{taken[1]} pixels; x {x.shape} with'
      f' padding {padding} has fewer'
    )
  return x, w, numbers | {'dilation': dilation, 'groups': groups}


def check_activation(op: str, argument: str, name: Any):
  """Raises a ValueError unless there is such an activation."""
  if name not in activations.ACTIVATIONS:
    names = ', '.join(map(str, activations.ACTIVATIONS))
    raise ValueError(f'{op}: {argument} is {name!r}; there are {names}')


def broadcast(
  op: str, argument: str, value: Any, shape: tuple[int, ...]
) -> jax.Array | None:
  """The value in that shape, or an error; None stays."""
  if value is None:
    return None
  value = jnp.asarray(value)
  if not jnp.issubdtype(value.dtype, jnp.floating):
    raise TypeError(f'{op}: {argument} is {value.dtype}; it is floating')
  if value.ndim > len(shape) or any(
    size not in (1, full)
    for size, full in zip(value.shape[::-1], shape[::-1], strict=False)
  ):
    raise ValueError(
      f'{op}: {argument} {value.shape} does not broadcast to {shape}'
    )
  return jnp.broadcast_to(value, shape)


def _refusal(name, x, w, numbers):
  reason = shapes.refusal(
    name,
    x.shape,
    w.shape,
    x.dtype,
    **({'dilation': (1, 1), 'groups': 1} | numbers),
  )
  if reason:
    return reason
  explicit = jax.typeof(x).sharding.spec
  if any(explicit[1:3]):
    return f'{explicit} divides the image of {x.shape}'
  return sharding.refusal(x)


def _output_shape(x, w, numbers):
  taken = tuple(
    (taps - 1) * apart + 1
    for taps, apart in zip(w.shape[:2], numbers['dilation'], strict=True)
  )
  sizes = shapes.output_size(
    x.shape[1:3], taken, numbers['strides'], numbers['padding']
  )
  return (x.shape[0], *sizes, w.shape[3])


def _whole(op, argument, value):
  try:
    number = operator.index(value)
  except TypeError:
    raise TypeError(
      f'{op}: {argument} is {value!r}; it takes whole numbers'
    ) from None
  if number < 1:
    raise ValueError(f'{op}: {argument} is {value!r}; it takes 1 or more')
  return number


def _pair(op, argument, value):
  values = value if isinstance(value, tuple | list) else (value, value)
  if len(values) != 2:
    raise ValueError(f'{op}: {argument} is {value!r}; it is one number or two')
  return tuple(_whole(op, argument, one) for one in values)


def _padding(op, value, sizes, taken, strides):
  if isinstance(value, str) and value in ('SAME', 'VALID'):
    return tuple(
      map(tuple, jax.lax.padtype_to_pads(sizes, taken, strides, value))
    )
  known = "'SAME', 'VALID' or ((above, below), (left, right)), of 0 or more"
  if isinstance(value, str):
    raise ValueError(f'{op}: padding is {value!r}; it is {known}')
  try:
    pairs = tuple(
      (operator.index(low), operator.index(high)) for low, high in value
    )
  except (TypeError, ValueError):
    pairs = ()
  if len(pairs) != 2 or min(map(min, pairs)) < 0:
    raise ValueError(f'{op}: padding is {value!r}; it is {known}')
  return pairs
