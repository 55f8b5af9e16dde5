"""A configurable convolutional network: conv, norm, activation, pool, repeat.

The plain stack of the lectures, after LeCun et al. (1989), with the batch norm
of Ioffe & Szegedy (2015).

Shapes: B batch, H W C image, K classes.
"""

from collections.abc import Sequence

from flax import nnx
import jax
import jax.numpy as jnp

from models import layers


class CNN(nnx.Module):
  """Blocks that halve the image, then a dense head: [B, H, W, C] -> [B, K].

  One block per entry of `widths`: a convolution with SAME padding to that many
  channels (with a bias only where there is no norm, which has its own), `norm`,
  `activation`, and a 2x2 `pool` of stride 2 (None for no pool). Then one hidden
  dense layer per entry of `head_widths`, each followed by `dropout`.
  """

  def __init__(
    self,
    image_shape: Sequence[int] = (28, 28, 1),
    num_classes: int = 10,
    *,
    widths: Sequence[int] = (32, 64),
    head_widths: Sequence[int] = (),
    kernel_size: int = 3,
    norm: str | None = 'batch',
    activation: str = 'relu',
    pool: str | None = 'max',
    dropout: float = 0.0,
    dtype=None,
    param_dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    layers.check_sizes(
      image_shape=image_shape,
      num_classes=num_classes,
      widths=widths,
      head_widths=head_widths,
      kernel_size=kernel_size,
    )
    layers.check_image_shape(image_shape)
    self.pool = layers.lookup('pool', pool, layers.POOLS)
    height, width, channels = image_shape
    kwargs = {'dtype': dtype, 'param_dtype': param_dtype, 'rngs': rngs}
    blocks, norms = [], []
    for features in widths:
      blocks.append(
        layers.Conv(
          channels,
          features,
          (kernel_size, kernel_size),
          use_bias=norm is None,
          **kwargs,
        )
      )
      norms.append(layers.Norm(norm, features, **kwargs))
      channels = features
      if pool is not None:
        height, width = height // 2, width // 2
    if min(height, width) < 1:
      raise ValueError(
        f'image_shape {tuple(image_shape)} is too small for '
        f'{len(widths)} blocks that each halve it; give fewer widths or '
        'pool=None'
      )
    sizes = (height * width * channels, *head_widths)
    self.blocks = nnx.List(blocks)
    self.norms = nnx.List(norms)
    self.hidden = nnx.List(
      [
        nnx.Linear(size_in, size_out, **kwargs)
        for size_in, size_out in zip(sizes[:-1], sizes[1:], strict=True)
      ]
    )
    self.head = nnx.Linear(sizes[-1], num_classes, **kwargs)
    self.activation = layers.activation(activation)
    self.dropout = layers.dropout(dropout)

  def __call__(self, image: jax.Array, *, train=False, rngs=None) -> jax.Array:
    x = image
    for block, norm in zip(self.blocks, self.norms, strict=True):
      if train and norm.name == 'batch':
        x = layers.apply_affine(*layers.conv2d_stats(block, norm, x))
      elif train:
        x = norm(layers.conv2d(block, x))
      else:
        x = layers.conv2d(block, x, norm)
      x = self.pool(self.activation(x))
    x = x.reshape(x.shape[0], -1)
    for hidden in self.hidden:
      x = self.activation(hidden(x))
      x = self.dropout(x, deterministic=not train, rngs=rngs)
    return self.head(x)
