"""DenseNet against table 1 of its paper, and against NumPy."""

import re

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from models import densenet
from tests.models import reference


def shaped(**kwargs):
  kwargs = {'image_shape': (224, 224, 3)} | kwargs
  return nnx.eval_shape(
    lambda: models.create('densenet', **kwargs, rngs=nnx.Rngs(0))
  )


@pytest.mark.parametrize('variant', densenet.VARIANTS)
def test_a_variant_has_as_many_layers_as_its_name_says(variant):
  # The stem, three transitions, the head, and two a layer.
  layers = sum(densenet.VARIANTS[variant]['depth'])
  assert 1 + 3 + 1 + 2 * layers == int(variant)


def test_blocks_grow_as_in_table_1():
  # Huang et al. (2017): 6, 12, 24 and 16 layers on 56, 28, 14 and 7 pixels. 64
  # channels first, 32 more with each layer, half of them after a transition.
  model = shaped(variant='121')
  modules = (*model.blocks, model.transitions)
  shapes = reference.shapes_of(model, modules, (224, 224, 3))
  expected, channels = [], 64
  for side, layers in ((56, 6), (28, 12), (14, 24), (7, 16)):
    if side < 56:
      channels //= 2
      expected.append((side, side, channels))
    for _ in range(layers):
      channels += 32
      expected.append((side, side, channels))
  assert shapes == expected
  assert channels == 1024


@pytest.mark.parametrize('stem', ['7x7', '3x3'])
def test_it_is_what_numpy_computes_in_float64(stem):
  with jax.enable_x64(True):
    shape = (13, 10, 3)
    model = reference.filled(
      shaped(
        image_shape=shape, num_classes=5, depth=(2, 3), growth_rate=4,
        stem=stem, param_dtype=jnp.float64,
      )
    )  # fmt: skip
    image = reference.images(2, *shape)
    strides, border = (2, 3) if stem == '7x7' else (1, 1)
    x = reference.convolve(image, model.embed.conv, strides, border)
    x = reference.relu(reference.batch_norm(x, model.embed.norm))
    if stem == '7x7':
      x = reference.max_pool(x, 3, 2, 1)

    def normed(x, norm, conv, border):
      x = reference.relu(reference.batch_norm(x, norm))
      return reference.convolve(x, conv, 1, border)

    for i, block in enumerate(model.blocks):
      if i > 0:
        transition = model.transitions[i - 1]
        x = normed(x, transition.norm, transition.conv, 0)
        x = reference.average_pool(x)
      for layer in block:
        new = normed(x, layer.norms[0], layer.convs[0], 0)
        assert new.shape[-1] == 4 * 4
        new = normed(new, layer.norms[1], layer.convs[1], 1)
        x = np.concatenate([x, new], -1)
    x = reference.relu(reference.batch_norm(x, model.norm))
    expected = reference.dense(x.mean((1, 2)), model.head)
    found = jax.jit(lambda image: model(image))(jnp.asarray(image))
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


def test_dropout_takes_of_the_new_channels_in_training_alone():
  model = shaped(
    image_shape=(8, 8, 3), depth=(1,), growth_rate=4, stem='3x3', dropout=0.5
  )
  layer = reference.filled(model).blocks[0][0]
  x = jnp.asarray(reference.images(2, 8, 8, 8), 'float32')

  @jax.jit
  def outputs(x):
    rngs = nnx.Rngs(dropout=0)
    clone = nnx.clone(layer)
    return clone(x, train=True, rngs=rngs), layer(x, train=False, rngs=rngs)

  trained, evaluated = outputs(x)
  assert np.array_equal(trained[..., :8], x)
  # Of 512 numbers half, give or take five standard deviations.
  assert abs((trained[..., 8:] == 0).mean() - 0.5) < 0.11
  assert np.array_equal(evaluated[..., :8], x)
  assert np.all(evaluated[..., 8:] != 0)


def test_an_image_as_small_as_its_blocks_allow_is_made():
  for side, stem in ((29, '7x7'), (8, '3x3')):
    model = shaped(
      image_shape=(side, side, 1), stem=stem, depth=(1, 1, 1, 1), growth_rate=2
    )
    outputs = reference.outputs_of(model, (side, side, 1))
    assert outputs.shape == (1, 1000)


@pytest.mark.parametrize(
  ('kwargs', 'message'),
  [
    ({'variant': '161'}, "variant '161' is unknown; there are 121, 169, 201"),
    (
      {'image_shape': (224, 28, 1)},
      "image_shape (224, 28, 1) is too small for stem '7x7' and 4 blocks, "
      "between which it is halved; stem='3x3' keeps it",
    ),
    (
      {'image_shape': (7, 8, 1), 'stem': '3x3'},
      "image_shape (7, 8, 1) is too small for stem '3x3' and 4 blocks",
    ),
    ({'stem': '5x5'}, "stem '5x5' is unknown; there are 7x7, 3x3"),
    ({'depth': 121}, 'depth is 121; it takes the blocks of each stage'),
    ({'growth_rate': 0}, 'growth_rate is 0; it takes whole numbers'),
    ({'dropout': -1}, 'dropout is -1; it takes a share from 0 to 1'),
    (
      {'image_shape': (224, 224)},
      'image_shape (224, 224) is not (height, width, channels)',
    ),
  ],
)
def test_what_cannot_be_made_is_said_in_one_line(kwargs, message):
  with pytest.raises(ValueError, match=re.escape(message)) as caught:
    shaped(**kwargs)
  assert '\n' not in str(caught.value)
