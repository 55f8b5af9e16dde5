"""LeNet-5 against figure 2 of its paper, and against NumPy."""

import re

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from models import layers
from tests.models import reference


def shaped(**kwargs):
  return nnx.eval_shape(
    lambda: models.create('lenet', **kwargs, rngs=nnx.Rngs(0))
  )


def test_its_layers_are_as_large_as_in_figure_2(monkeypatch):
  # LeCun et al. (1998): C1 6@28x28, S2 6@14x14, C3 16@10x10, S4 16@5x5, C5
  # 120, F6 84, 10 outputs.
  model = shaped()
  shapes, conv2d = [], layers.conv2d

  def noted(*args):
    y = conv2d(*args)
    shapes.append(y.shape[1:])
    return y

  monkeypatch.setattr(layers, 'conv2d', noted)
  shapes += reference.shapes_of(model, [model.hidden], (28, 28, 1))
  assert shapes == [(28, 28, 6), (10, 10, 16), (120,), (84,)]
  model = shaped()  # The first one's layers are replaced by now.
  assert model.blocks[1].kernel.shape == (5, 5, 6, 16)
  assert model.hidden[0].kernel.shape == (16 * 5 * 5, 120)
  assert model.head.kernel.shape == (84, 10)


# An image of 32x32 is taken as it is; 37 pixels are 33, 16, 12, 6 on their way.
@pytest.mark.parametrize('sides', [(28, 28), (9, 32), (37, 40)])
def test_it_is_what_numpy_computes_in_float64(sides):
  with jax.enable_x64(True):
    model = reference.filled(
      shaped(image_shape=(*sides, 3), param_dtype=jnp.float64), 0.2
    )
    image = reference.images(2, *sides, 3)
    high, wide = (max(32, side) for side in sides)
    top, left = (high - sides[0]) // 2, (wide - sides[1]) // 2
    x = np.zeros((2, high, wide, 3))
    x[:, top : top + sides[0], left : left + sides[1]] = image
    for block in model.blocks:
      x = reference.average_pool(np.tanh(reference.convolve(x, block)))
    x = x.reshape(2, -1)
    for hidden in model.hidden:
      x = np.tanh(reference.dense(x, hidden))
    found = jax.jit(lambda image: model(image))(jnp.asarray(image))
    expected = reference.dense(x, model.head)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


def test_a_smaller_image_makes_no_other_network():
  digits, padded = (
    jax.tree.map(jnp.shape, nnx.state(shaped(image_shape=(side, side, 1))))
    for side in (8, 32)
  )
  assert digits == padded


@pytest.mark.parametrize(
  ('kwargs', 'message'),
  [
    (
      {'image_shape': (28, 28)},
      'image_shape (28, 28) is not (height, width, channels)',
    ),
    ({'image_shape': (28, 0, 1)}, 'image_shape is (28, 0, 1); it takes whole'),
    ({'num_classes': 0}, 'num_classes is 0; it takes whole numbers'),
  ],
)
def test_what_cannot_be_made_is_said_in_one_line(kwargs, message):
  with pytest.raises(ValueError, match=re.escape(message)) as caught:
    shaped(**kwargs)
  assert '\n' not in str(caught.value)
