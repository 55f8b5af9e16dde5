"""One affine map: the perceptron and its relatives.

The loss makes the difference: perceptron loss gives Rosenblatt's perceptron
(1958), cross-entropy logistic regression, hinge loss with weight decay the
linear support vector machine (Cortes & Vapnik 1995), squared error linear
regression.

Shapes: B batch, D = prod(image_shape) inputs, K outputs.
"""

from collections.abc import Sequence
import math

from flax import nnx
import jax
import jax.numpy as jnp

from models import layers


class Linear(nnx.Module):
  """W x + b: [B, *image_shape] -> [B, K].

  `image_shape` is the shape of one example; a row of D features is (D,).
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
    self.head = nnx.Linear(
      math.prod(image_shape),
      num_classes,
      dtype=dtype,
      param_dtype=param_dtype,
      rngs=rngs,
    )

  def __call__(self, image: jax.Array, *, train=False, rngs=None) -> jax.Array:
    del train, rngs  # Same call as every model; nothing here is random.
    return self.head(image.reshape(image.shape[0], -1))
