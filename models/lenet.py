"""LeNet-5, after LeCun, Bottou, Bengio & Haffner (1998), figure 2.

Shapes: B batch, H W C image, K classes.
"""

from collections.abc import Sequence

from flax import nnx
import jax
import jax.numpy as jnp

from models import layers

_SIDE = 32  # Of the paper's images: digits of 28x28 in their middle.


class LeNet(nnx.Module):
  """Two convolutions, each pooled, three dense layers: [B, H, W, C] -> [B, K].

  In the form that is usual today: the second convolution sees all channels of
  the first, the pools have no parameters, and K linear outputs stand for the
  Gaussian ones. tanh and the mean of 2x2 as in the paper.

  Args:
    image_shape: (H, W, C). An image smaller than 32x32 gets a border of 0; of a
      larger one the pools leave odd rows and columns out.
    num_classes: K.
  """

  def __init__(
    self,
    image_shape: Sequence[int] = (28, 28, 1),
    num_classes: int = 10,
    *,
    dtype=None,
    param_dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    layers.check_sizes(image_shape=image_shape, num_classes=num_classes)
    layers.check_image_shape(image_shape)
    *sides, channels = image_shape
    missing = [max(0, _SIDE - side) for side in sides]
    self.border = (
      (0, 0),
      *((size // 2, size - size // 2) for size in missing),
      (0, 0),
    )
    kwargs = {'dtype': dtype, 'param_dtype': param_dtype, 'rngs': rngs}
    self.blocks = nnx.List(
      [
        layers.Conv(channels, 6, (5, 5), padding='VALID', **kwargs),
        layers.Conv(6, 16, (5, 5), padding='VALID', **kwargs),
      ]
    )
    height, width = (((max(_SIDE, side) - 4) // 2 - 4) // 2 for side in sides)
    self.hidden = nnx.List(
      [
        nnx.Linear(height * width * 16, 120, **kwargs),
        nnx.Linear(120, 84, **kwargs),
      ]
    )
    self.head = nnx.Linear(84, num_classes, **kwargs)

  def __call__(self, image: jax.Array, *, train=False, rngs=None) -> jax.Array:
    del train, rngs  # Same call as every model; nothing here is random.
    x = jnp.pad(image, self.border)
    for block in self.blocks:
      x = layers.average_pool(jnp.tanh(layers.conv2d(block, x)))
    x = x.reshape(x.shape[0], -1)
    for hidden in self.hidden:
      x = jnp.tanh(hidden(x))
    return self.head(x)
