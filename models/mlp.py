"""Multi-layer perceptron, after Rumelhart, Hinton & Williams (1986).

Shapes: B batch, D = prod(image_shape) inputs, K classes.
"""

from collections.abc import Sequence
import math

from flax import nnx
import jax
import jax.numpy as jnp

from models import layers


class MLP(nnx.Module):
  """Dense layers with one activation between: [B, *image_shape] -> [B, K].

  `image_shape` is the shape of one example; a row of D features is (D,).
  `dropout` is the share of hidden units that is dropped, not the share kept.
  """

  def __init__(
    self,
    image_shape: Sequence[int] = (28, 28, 1),
    num_classes: int = 10,
    *,
    widths: Sequence[int] = (256, 128),
    activation: str = 'relu',
    dropout: float = 0.0,
    dtype=None,
    param_dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    layers.check_sizes(
      image_shape=image_shape, num_classes=num_classes, widths=widths
    )
    sizes = (math.prod(image_shape), *widths, num_classes)
    *blocks, head = (
      nnx.Linear(
        size_in, size_out, dtype=dtype, param_dtype=param_dtype, rngs=rngs
      )
      for size_in, size_out in zip(sizes[:-1], sizes[1:], strict=True)
    )
    self.blocks = nnx.List(blocks)
    self.head = head
    self.activation = layers.activation(activation)
    self.dropout = layers.dropout(dropout)

  def __call__(self, image: jax.Array, *, train=False, rngs=None) -> jax.Array:
    x = image.reshape(image.shape[0], -1)
    for block in self.blocks:
      x = self.activation(block(x))
      x = self.dropout(x, deterministic=not train, rngs=rngs)
    return self.head(x)
