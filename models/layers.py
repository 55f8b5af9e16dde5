"""Activations, norms and pools that models name in their arguments.

Shapes: B batch, H W C image.
"""

from collections.abc import Mapping
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp


def identity(x: jax.Array) -> jax.Array:
  """x, for activation 'identity' and pool None."""
  return x


# tanh(x) = 2 sigmoid(2x) - 1; leaky_relu has slope 0.01 below zero.
ACTIVATIONS = {
  'identity': identity,
  'sigmoid': jax.nn.sigmoid,
  'tanh': jnp.tanh,
  'relu': jax.nn.relu,
  'leaky_relu': jax.nn.leaky_relu,
  'gelu': jax.nn.gelu,
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


def max_pool(image: jax.Array, window: int = 2, stride: int = 2) -> jax.Array:
  """[B, H, W, C] -> [B, H', W', C], H' = (H - window) // stride + 1."""
  return nnx.max_pool(image, (window, window), (stride, stride))


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
    raise ValueError(f'stochastic_depth is {rate}; it takes a share from 0 to 1')
  return nnx.Dropout(rate, broadcast_dims=tuple(range(1, ndim)))


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
      self.norm = nnx.BatchNorm(features, momentum=0.9, **kwargs)
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
