"""Activations, norms and pools that models name in their arguments.

Shapes: B batch, H W C image.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import functools
from typing import Any
from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp

import kernels
from kernels.ops.convolution import activations
from kernels.ops.convolution import plain


def identity(x: jax.Array) -> jax.Array:
  """x, for activation 'identity' and pool None."""
  return x


def gelu(x: jax.Array) -> jax.Array:
  """x Phi(x), Phi the normal distribution's share below x; any shape.

  The exact form of Hendrycks & Gimpel (2016), not the one with tanh. Through
  erf, which XLA computes on a CPU in half the time of jax.nn.gelu's erfc.
  """
  # Below float32 the sum of 1 and erf would lose the left tail.
  wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  share = 0.5 + 0.5 * jax.lax.erf(wide * 0.5**0.5)
  return (wide * share).astype(x.dtype)


# tanh(x) = 2 sigmoid(2x) - 1; leaky_relu has slope 0.01 below zero.
ACTIVATIONS = {
  'identity': identity,
  'sigmoid': jax.nn.sigmoid,
  'tanh': jnp.tanh,
  'relu': jax.nn.relu,
  'leaky_relu': jax.nn.leaky_relu,
  'gelu': gelu,
  'softmax': jax.nn.softmax,
}


def lookup(argument: str, name: Any, table: Mapping[Any, Any]) -> Any:
  """table[name], or a ValueError that lists what `argument` takes."""
  if name not in table:
    names = ', '.join(map(str, table))
    raise ValueError(f'{argument} {name!r} is unknown; there are {names}')
  return table[name]


def activation(name: str):
  """The function of that name, or a ValueError that lists the names."""
  return lookup('activation', name, ACTIVATIONS)


# [B, H, W, C] -> [B, H', W', F], with a gradient that is fast on a CPU.
Conv = functools.partial(
  nnx.Conv, conv_general_dilated=plain.conv_general_dilated
)


class Affine(NamedTuple):
  """What a batch norm multiplies by and adds, float32 [C] each."""

  scale: jax.Array
  shift: jax.Array


def conv2d(
  conv: nnx.Conv,
  x: jax.Array,
  norm: 'Norm | None' = None,
  *,
  residual: jax.Array | None = None,
  activation: str | None = None,
) -> jax.Array:
  """activation(norm(conv(x)) + residual) in one pass: [B, H, W, C] -> [..., F].

  By kernels.conv2d, as the loop's field `kernels` says. Not in training, where
  a batch norm is of the batch; then without `norm`.
  """
  x, w, numbers = _operands(conv, x)
  scale, shift = None, None if conv.bias is None else conv.bias[...]
  if norm is not None and norm.name == 'batch':
    scale, folded = fold_batch_norm(norm.norm)
    shift = folded if shift is None else folded + scale * shift
  elif norm is not None and norm.name is not None:
    y = norm(kernels.conv2d(x, w, shift=shift, **numbers))
    y = y if residual is None else y + residual
    return activations.activate(activation, y)
  return kernels.conv2d(
    x,
    w,
    scale=scale,
    shift=shift,
    residual=residual,
    activation=activation,
    **numbers,
  )


def conv2d_stats(
  conv: nnx.Conv,
  norm: 'Norm',
  x: jax.Array,
  before: Affine | None = None,
  activation: str | None = None,
) -> tuple[jax.Array, Affine]:
  """A convolution in training and what its batch norm is to do afterwards.

  Args:
    conv: without a bias.
    norm: 'batch'; its running statistics are updated.
    x: [B, H, W, C].
    before: what the norm before is to do still, with its activation.
    activation: in kernels' ACTIVATIONS.

  Returns:
    [B, H', W', F], and its affine, for apply_affine or the next convolution.
  """
  x, w, numbers = _operands(conv, x)
  scale, shift = before or (None, None)
  y, total, squares = kernels.conv2d_stats(
    x, w, in_scale=scale, in_shift=shift, in_activation=activation, **numbers
  )
  count = y.size // y.shape[-1]
  mean, var = norm.norm.over_devices(total / count, squares / count)
  return y, norm.norm.affine(mean, var)


def apply_affine(x: jax.Array, affine: Affine) -> jax.Array:
  """x [..., C] times its scale plus its shift, in float32, of x's dtype."""
  wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  return (wide * affine.scale + affine.shift).astype(x.dtype)


def fold_batch_norm(norm: 'BatchNorm') -> Affine:
  """A batch norm as inference has it, from its running statistics."""
  mean, var = norm.mean[...], norm.var[...]
  scale = jax.lax.rsqrt(var + norm.epsilon) * norm.scale[...]
  return Affine(scale, norm.bias[...] - mean * scale)


def _operands(conv, x):
  """x and the kernel in the dtype to compute in, and the other numbers."""
  dtype = conv.dtype or jnp.result_type(x, conv.kernel[...])
  padding = conv.padding
  if isinstance(padding, int):
    padding = ((padding, padding), (padding, padding))
  numbers = {
    'strides': conv.strides,
    'padding': padding,
    'groups': conv.feature_group_count,
  }
  return x.astype(dtype), conv.kernel[...].astype(dtype), numbers


def max_pool(image: jax.Array, window: int = 2, stride: int = 2) -> jax.Array:
  """[B, H, W, C] -> [B, H', W', C], H' = (H - window) // stride + 1."""
  if window == stride:
    return _max_of_blocks(image, window)
  return nnx.max_pool(image, (window, window), (stride, stride))


# Where windows do not overlap, each pixel's gradient is its own window's or 0.
# XLA's search and scatter in place of that takes half of a small CNN's step on
# a CPU.
@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _max_of_blocks(image, size):
  return nnx.max_pool(image, (size, size), (size, size))


def _max_of_blocks_forward(image, size):
  # The place is kept, and not looked for on the way back by its value: in
  # another fusion XLA may round the same image in another way.
  pooled, *others = (
    image[:, i : i + h * size : size, j : j + w * size : size]
    for h, w in [(image.shape[1] // size, image.shape[2] // size)]
    for i in range(size)
    for j in range(size)
  )
  place = jnp.zeros(pooled.shape, jnp.uint8)
  # Of equal ones the first has all of the gradient, as XLA gives it.
  for k, other in enumerate(others, 1):
    larger = (other > pooled) | jnp.isnan(other)
    pooled = jnp.where(larger, other, pooled)
    place = jnp.where(larger, jnp.uint8(k), place)
  return pooled, (place, image[:0])


def _max_of_blocks_backward(size, kept, grad):
  place, image = kept
  rows = [
    jnp.stack(
      [jnp.where(place == i * size + j, grad, 0) for j in range(size)], axis=3
    )
    for i in range(size)
  ]
  batch, height, width, channels = place.shape
  inner = jnp.stack(rows, axis=2).reshape(
    batch, height * size, width * size, channels
  )
  beyond = [
    (0, there - seen)
    for there, seen in zip(image.shape[1:], inner.shape[1:], strict=True)
  ]
  return (jnp.pad(inner, [(0, 0), *beyond]),)


_max_of_blocks.defvjp(_max_of_blocks_forward, _max_of_blocks_backward)


def average_pool(
  image: jax.Array, window: int = 2, stride: int = 2
) -> jax.Array:
  """[B, H, W, C] -> [B, H', W', C], H' = (H - window) // stride + 1."""
  return nnx.avg_pool(image, (window, window), (stride, stride))


POOLS = {'max': max_pool, 'average': average_pool, None: identity}


def check_sizes(**sizes):
  """Raises a ValueError unless each is a whole number, or some, from 1 up."""
  for name, value in sizes.items():
    for size in value if isinstance(value, tuple | list) else (value,):
      if type(size) is not int or size < 1:
        raise ValueError(
          f'{name} is {value!r}; it takes whole numbers of at least 1'
        )


def check_image_shape(image_shape: Sequence[int]):
  """Raises a ValueError unless it is (H, W, C)."""
  check_sizes(image_shape=image_shape)
  if len(image_shape) != 3:
    raise ValueError(
      f'image_shape {tuple(image_shape)} is not (height, width, channels)'
    )


def dropout(rate: float) -> nnx.Dropout:
  """Drops a share of `rate`; the key comes with each call, not from here."""
  if not isinstance(rate, int | float) or not 0 <= rate <= 1:
    raise ValueError(f'dropout is {rate}; it takes a share from 0 to 1')
  return nnx.Dropout(rate)


def stochastic_depth(rate: float, ndim: int) -> nnx.Dropout:
  """Drops a residual branch [B, ...] of `ndim` axes for a share of examples.

  What stays is divided by 1 - rate (Huang et al. 2016, as timm scales it).
  """
  if not isinstance(rate, int | float) or not 0 <= rate < 1:
    raise ValueError(
      f'stochastic_depth is {rate}; it takes a share from 0 to below 1'
    )
  return nnx.Dropout(rate, broadcast_dims=tuple(range(1, ndim)))


class Keys:
  """Stands in for nnx.Rngs, with a count that is no array.

  At each count flax 0.12.8 on jax 0.10.2 looks through all that was traced
  before: tracing 1,001 layers took 160 s, and takes 4.
  """

  def __init__(self, rngs: nnx.Rngs):
    self.key, self.count = rngs.params(), 0

  def params(self) -> jax.Array:
    """A new key at each call."""
    self.count += 1
    return jax.random.fold_in(self.key, self.count)


class BatchNorm(nnx.BatchNorm):
  """Ioffe & Szegedy (2015): [..., C] -> [..., C].

  nnx's own, but for how it keeps the running statistics: written as arrays are,
  on jax 0.10.2 those of 1,001 layers took ten minutes to trace.
  """

  def __call__(self, x: jax.Array, *, use_running_average: bool) -> jax.Array:
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean, var = self.mean[...], self.var[...]
    if not use_running_average:
      axes = tuple(range(x.ndim - 1))
      mean = wide.mean(axes)
      # Rounding can make the difference negative.
      var = jnp.maximum(jnp.square(wide).mean(axes) - jnp.square(mean), 0)
      mean, var = self.over_devices(mean, var)
      self._update(mean, var)
    scale = jax.lax.rsqrt(var + self.epsilon) * self.scale[...]
    dtype = self.dtype or jnp.result_type(x, self.scale[...], self.bias[...])
    return ((wide - mean) * scale + self.bias[...]).astype(dtype)

  def over_devices(
    self, mean: jax.Array, var: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """A device's statistics [C] to those of all along nnx's `axis_name`."""
    if self.axis_name is None:
      return mean, var
    whole = jax.lax.pmean(mean, self.axis_name)
    var += jnp.square(mean - whole)  # Chan, Golub & LeVeque (1979).
    return whole, jax.lax.pmean(var, self.axis_name)

  def affine(self, mean: jax.Array, var: jax.Array) -> Affine:
    """In training: the batch's statistics [C] to what is done with them."""
    self._update(mean, var)
    scale = jax.lax.rsqrt(var + self.epsilon) * self.scale[...]
    return Affine(scale, self.bias[...] - mean * scale)

  def _update(self, mean, var):
    for kept, new in ((self.mean, mean), (self.var, var)):
      old = kept[...]
      new = self.momentum * old + (1 - self.momentum) * new
      kept.set_value(new.astype(old.dtype))


class Norm(nnx.Module):
  """'batch', 'layer', 'group', 'instance' norm, or None for no norm.

  [B, ..., C] -> [B, ..., C]. Group norm uses groups of 8 channels (all of them
  in one group where 8 does not divide C). Batch norm keeps the biased variance
  as its running statistic, where PyTorch keeps the unbiased one.
  """

  NAMES = ('batch', 'layer', 'group', 'instance', None)

  def __init__(
    self,
    name: str | None,
    features: int,
    *,
    dtype=None,
    param_dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    kwargs = {'dtype': dtype, 'param_dtype': param_dtype, 'rngs': rngs}
    self.name = name
    if name == 'batch':
      self.norm = BatchNorm(features, momentum=0.9, **kwargs)
    elif name == 'layer':
      self.norm = nnx.LayerNorm(features, **kwargs)
    elif name == 'group':
      groups = features // 8 if features % 8 == 0 else 1
      self.norm = nnx.GroupNorm(features, num_groups=groups, **kwargs)
    elif name == 'instance':
      self.norm = nnx.InstanceNorm(features, **kwargs)
    else:
      lookup('norm', name, dict.fromkeys(self.NAMES))

  def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
    if self.name is None:
      return x
    if self.name == 'batch':
      return self.norm(x, use_running_average=not train)
    return self.norm(x)
