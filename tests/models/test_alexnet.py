"""AlexNet in one tower: the course's figures, and NumPy."""

import math
import re

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from tests.models import reference


def shaped(**kwargs):
  return nnx.eval_shape(
    lambda: models.create('alexnet', **kwargs, rngs=nnx.Rngs(0))
  )


def test_its_layers_have_as_many_neurons_as_torchvisions():
  # W14 has 150,528 inputs and the neurons of two towers: 253,440 (a slip of
  # the paper: 55 x 55 x 96 are 290,400), 186,624, 64,896, 64,896 and 43,264.
  # One tower has 64, 192, 384, 256 and 256 channels on the same pixels, so its
  # third and its last layer are as large as there.
  assert math.prod((224, 224, 3)) == 150_528
  model = shaped()
  modules = (model.blocks, model.hidden)
  shapes = reference.shapes_of(model, modules, (224, 224, 3))
  assert shapes == [
    (55, 55, 64),
    (27, 27, 192),
    (13, 13, 384),
    (13, 13, 256),
    (13, 13, 256),
    (4096,),
    (4096,),
  ]
  assert [math.prod(shape) for shape in shapes] == [
    193_600, 139_968, 64_896, 43_264, 43_264, 4096, 4096,
  ]  # fmt: skip
  # The last pool leaves 6x6.
  assert shaped().hidden[0].kernel.shape == (6 * 6 * 256, 4096)


def test_it_is_what_numpy_computes_in_float64():
  with jax.enable_x64(True):
    shape = (63, 98, 2)
    model = reference.filled(
      shaped(
        image_shape=shape, num_classes=5, width=2, param_dtype=jnp.float64
      ),
      0.1,
    )
    image = x = reference.images(2, *shape)
    # Krizhevsky (2014), as torchvision has it: stride and border of each, and
    # a pool of 3x3 by 2 behind the first, the second and the last.
    for block, strides, border, pooled in zip(
      model.blocks, (4, 1, 1, 1, 1), (2, 2, 1, 1, 1), (1, 1, 0, 0, 1),
      strict=True,
    ):  # fmt: skip
      x = reference.relu(reference.convolve(x, block, strides, border))
      if pooled:
        x = reference.max_pool(x, 3, 2)
    x = x.reshape(2, -1)
    for hidden in model.hidden:
      x = reference.relu(reference.dense(x, hidden))
    found = jax.jit(lambda image: model(image))(jnp.asarray(image))
    expected = reference.dense(x, model.head)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


def test_width_keeps_all_layers_in_proportion():
  model = shaped(width=4)
  widths = [block.kernel.shape[-1] for block in model.blocks]
  assert widths == [4, 12, 24, 16, 16]
  assert model.head.kernel.shape == (256, 1000)


def test_dropout_is_before_both_hidden_layers_and_in_training_alone():
  shape = (63, 63, 1)
  model = reference.filled(shaped(image_shape=shape, width=2), 0.2)
  image = jnp.asarray(reference.images(1, *shape), 'float32')

  @jax.jit
  def outputs(first, second, key):
    module = nnx.clone(model)
    for layer, factor in zip(module.hidden, (first, second), strict=True):
      layer.kernel[...] = factor * layer.kernel[...]
    trained = module(image, train=True, rngs=nnx.Rngs(dropout=key))
    return trained, module(image, rngs=nnx.Rngs(dropout=key))

  def differ(first, second):
    """Whether two keys make a difference: in training, in evaluation."""
    one, other = (
      outputs(first, second, jax.random.key(seed)) for seed in (0, 1)
    )
    return [not np.array_equal(a, b) for a, b in zip(one, other, strict=True)]

  assert differ(1, 1) == [True, False]
  # The biases alone go into the second layer: only its dropout is left.
  assert differ(0, 1) == [True, False]
  assert differ(1, 0) == [False, False]


@pytest.mark.parametrize(
  ('kwargs', 'message'),
  [
    (
      {'image_shape': (62, 224, 3)},
      'image_shape (62, 224, 3) is too small; AlexNet takes images from 63x63',
    ),
    (
      {'image_shape': (28, 28, 1)},
      'image_shape (28, 28, 1) is too small; AlexNet takes images from 63x63',
    ),
    ({'image_shape': (1, 1, 1)}, 'image_shape (1, 1, 1) is too small'),
    (
      {'image_shape': (224, 224)},
      'image_shape (224, 224) is not (height, width, channels)',
    ),
    ({'width': 0}, 'width is 0; it takes whole numbers of at least 1'),
    ({'dropout': 2}, 'dropout is 2; it takes a share from 0 to 1'),
  ],
)
def test_what_cannot_be_made_is_said_in_one_line(kwargs, message):
  with pytest.raises(ValueError, match=re.escape(message)) as caught:
    shaped(**kwargs)
  assert '\n' not in str(caught.value)
