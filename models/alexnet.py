"""AlexNet in one tower: Krizhevsky et al. (2012), Krizhevsky (2014).

Shapes: B batch, H W C image, K classes.
"""

from collections.abc import Sequence

from flax import nnx
import jax
import jax.numpy as jnp

from models import layers

# Kernel, stride, border, channels as multiples of the first's, and whether a
# pool follows: one tower as torchvision has it, after Krizhevsky (2014).
_CONVOLUTIONS = (
  (11, 4, 2, 1, True),
  (5, 1, 2, 3, True),
  (3, 1, 1, 6, False),
  (3, 1, 1, 4, False),
  (3, 1, 1, 4, True),
)
_HIDDEN = 64  # Units of each hidden dense layer, in the same multiples.


class AlexNet(nnx.Module):
  """Five convolutions and three dense layers: [B, H, W, C] -> [B, K].

  ReLU after each but the last, 3x3 max pools of stride 2 that overlap, no
  response normalisation.

  Args:
    image_shape: (H, W, C), from 63x63 up; 224x224 in the paper.
    num_classes: K.
    width: channels of the first convolution, to which all others are in
      proportion: 64, 192, 384, 256, 256, and 4096 units twice.
    dropout: share dropped before each of the two hidden dense layers.
  """

  def __init__(
    self,
    image_shape: Sequence[int] = (224, 224, 3),
    num_classes: int = 1000,
    *,
    width: int = 64,
    dropout: float = 0.5,
    dtype=None,
    param_dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    layers.check_sizes(
      image_shape=image_shape, num_classes=num_classes, width=width
    )
    layers.check_image_shape(image_shape)
    *sides, channels = image_shape
    kwargs = {'dtype': dtype, 'param_dtype': param_dtype, 'rngs': rngs}
    blocks = []
    for size, strides, border, multiple, pooled in _CONVOLUTIONS:
      blocks.append(
        layers.Conv(
          channels,
          multiple * width,
          (size, size),
          strides,
          padding=border,
          **kwargs,
        )
      )
      channels = multiple * width
      sides = [(side + 2 * border - size) // strides + 1 for side in sides]
      if pooled:
        sides = [(side - 3) // 2 + 1 for side in sides]
    if min(sides) < 1:
      raise ValueError(
        f'image_shape {tuple(image_shape)} is too small; AlexNet takes images '
        'from 63x63 up'
      )
    self.blocks = nnx.List(blocks)
    units = _HIDDEN * width
    self.hidden = nnx.List(
      [
        nnx.Linear(sides[0] * sides[1] * channels, units, **kwargs),
        nnx.Linear(units, units, **kwargs),
      ]
    )
    self.head = nnx.Linear(units, num_classes, **kwargs)
    self.dropout = layers.dropout(dropout)

  def __call__(self, image: jax.Array, *, train=False, rngs=None) -> jax.Array:
    x = image
    for block, (*_, pooled) in zip(self.blocks, _CONVOLUTIONS, strict=True):
      x = jax.nn.relu(block(x))
      if pooled:
        x = layers.max_pool(x, window=3, stride=2)
    x = x.reshape(x.shape[0], -1)
    for hidden in self.hidden:
      x = self.dropout(x, deterministic=not train, rngs=rngs)
      x = jax.nn.relu(hidden(x))
    return self.head(x)
