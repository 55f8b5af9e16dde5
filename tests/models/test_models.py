"""Linear models, MLP, CNN and their layers against the course's figures."""

import math
import re

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from models import layers


def numbers_in(model, kind):
  """All of the model's `kind` of variables, one after the other."""
  leaves = jax.tree.leaves(nnx.state(model, kind))
  return np.concatenate([leaf.ravel() for leaf in leaves])


def shaped(name, **kwargs):
  """A model without numbers: its structure, shapes and dtypes."""
  return nnx.eval_shape(lambda: models.create(name, **kwargs, rngs=nnx.Rngs(0)))


def filled(name, **kwargs):
  """A model whose parameters are NumPy's, which takes no compiling."""
  model = shaped(name, **kwargs)
  random = np.random.default_rng(0)

  def numbers(leaf):
    return jnp.asarray(random.normal(size=leaf.shape) ** 2, leaf.dtype)

  nnx.update(model, jax.tree.map(numbers, nnx.state(model)))
  return model


# ---------------------------------------------------------------- parameters


@pytest.mark.parametrize(
  ('name', 'kwargs', 'count'),
  [
    # W1: 784-256-128-10, and one neuron on 784 inputs.
    ('mlp', {'image_shape': (28, 28, 1), 'widths': (256, 128)}, 235_146),
    ('linear', {'image_shape': (28, 28, 1), 'num_classes': 1}, 785),
    # W2: 3-4-2, 20 weights and 6 biases.
    ('mlp', {'image_shape': (3,), 'widths': (4,), 'num_classes': 2}, 26),
    # (64 + 1) * 10 for the digits' softmax regression.
    ('linear', {'image_shape': (8, 8, 1)}, 650),
    ('linear', {'image_shape': (30,), 'num_classes': 1}, 31),
  ],
)
def test_a_model_has_as_many_parameters_as_the_course_says(name, kwargs, count):
  assert models.count_parameters(shaped(name, **kwargs)) == count


def test_the_two_layer_network_has_20_weights_and_6_biases():
  model = shaped('mlp', image_shape=(3,), widths=(4,), num_classes=2)
  dense = (*model.blocks, model.head)
  assert sum(layer.kernel.size for layer in dense) == 20
  assert sum(layer.bias.size for layer in dense) == 6


# W9: (height * width * channels + 1) * kernels.
@pytest.mark.parametrize(
  ('channels', 'features', 'count'), [(1, 32, 320), (3, 64, 1_792)]
)
def test_a_convolution_has_as_many_parameters_as_the_formula(
  channels, features, count
):
  model = shaped(
    'cnn', image_shape=(8, 8, channels), widths=(features,), norm=None
  )
  assert models.count_parameters(model.blocks[0]) == count
  # The head sees a 4x4 image of that many channels.
  head = (4 * 4 * features + 1) * 10
  assert models.count_parameters(model) == count + head


def test_running_statistics_are_not_parameters():
  model = shaped('cnn', image_shape=(8, 8, 3), widths=(64,), norm='batch')
  # The norm's scale and shift stand in for the convolution's bias.
  assert models.count_parameters(model.blocks[0]) == 3 * 3 * 3 * 64
  assert models.count_parameters(model.norms[0]) == 2 * 64
  statistics = jax.tree.leaves(nnx.state(model, nnx.BatchStat))
  assert [leaf.shape for leaf in statistics] == [(64,), (64,)]


# ------------------------------------------------------------- figures by hand


def set_dense(layer, kernel, bias):
  """Gives a dense layer the rows of weights that a lecture prints, [out, in].

  The shapes stay the layer's own, so that a wrong one cannot hide.
  """
  kernel = np.asarray(kernel, 'float32').T
  assert layer.kernel.shape == kernel.shape
  layer.kernel[...] = jnp.asarray(kernel)
  layer.bias[...] = jnp.asarray(bias, 'float32')


def test_the_toy_network_of_the_lecture_gives_its_figures():
  # W3: every stage of 2-2-2-2 with sigmoids, on [1, -1].
  model = filled(
    'mlp',
    image_shape=(2,),
    num_classes=2,
    widths=(2, 2),
    activation='sigmoid',
  )
  x = jnp.array([[1.0, -1.0]])
  set_dense(model.blocks[0], [[1, -2], [-1, 1]], [1, 0])
  set_dense(model.blocks[1], [[2, -1], [-2, -1]], [0, 0])
  set_dense(model.head, [[1, 0], [0, 1]], [0, 0])
  first = model.blocks[0](x)
  np.testing.assert_allclose(first, [[4, -2]])
  np.testing.assert_allclose(
    jax.nn.sigmoid(first), [[0.98201379, 0.11920292]], rtol=1e-6
  )
  # With the identity as head the network shows its second stage.
  np.testing.assert_allclose(model(x), [[0.86351831, 0.11073744]], rtol=1e-6)
  set_dense(model.head, [[3, -1], [-1, 4]], [-2, 2])
  np.testing.assert_allclose(
    jax.nn.sigmoid(model(x)), [[0.61770478, 0.82912398]], rtol=1e-6
  )


def test_the_perceptron_of_the_lecture_gives_its_figures():
  # W11: two neurons on (6, 4, 5).
  model = filled('linear', image_shape=(3,), num_classes=2)
  set_dense(model.head, [[-2, 2, 1], [0.5, -3, 1]], [2, 2])
  assert model(jnp.array([[6.0, 4.0, 5.0]])).tolist() == [[3, -2]]


@pytest.mark.parametrize(
  ('name', 'kwargs'), [('linear', {}), ('mlp', {'widths': ()})]
)
def test_an_image_is_read_row_by_row_channels_last(name, kwargs):
  model = filled(name, image_shape=(2, 2, 2), num_classes=1, **kwargs)
  # The places that the weights give the pixels are octal digits.
  set_dense(model.head, 8.0 ** np.arange(8)[None], [0])
  image = jnp.arange(8.0).reshape(1, 2, 2, 2)
  assert oct(int(model(image).item())) == '0o76543210'


def test_a_convolution_of_a_cnn_keeps_the_size_and_a_pool_halves_it():
  # 28x28 through three pools is 14, 7, 3: the odd row is left out.
  model = shaped('cnn', widths=(2, 2, 2))
  assert model.head.kernel.shape == (3 * 3 * 2, 10)
  model = shaped('cnn', widths=(2, 2, 2), pool=None, head_widths=(9,))
  assert model.hidden[0].kernel.shape == (28 * 28 * 2, 9)
  assert model.head.kernel.shape == (9, 10)


def test_a_cnn_convolves_activates_and_then_pools():
  # By hand: relu(-[1, -2, -3, 4]) = [0, 2, 3, 0], whose average is 1.25; the
  # other way round it would be 0.
  model = filled(
    'cnn',
    image_shape=(2, 2, 1),
    num_classes=1,
    widths=(1,),
    kernel_size=1,
    norm=None,
    pool='average',
  )
  model.blocks[0].kernel[...] = jnp.full((1, 1, 1, 1), -1.0)
  model.blocks[0].bias[...] = jnp.zeros(1)
  set_dense(model.head, [[1]], [0])
  image = jnp.array([1.0, -2, -3, 4]).reshape(1, 2, 2, 1)
  assert model(image).item() == 1.25


# -------------------------------------------------------------------- layers

# W10, and the same image as [B, H, W, C].
POOLED = jnp.array(
  [[1.0, 3, 5, 3], [4, 2, 3, 1], [3, 1, 1, 3], [0, 1, 0, 4]]
).reshape(1, 4, 4, 1)


@pytest.mark.parametrize(
  ('name', 'expected'),
  [('max', [[4, 5], [3, 4]]), ('average', [[2.5, 3], [1.25, 2]])],
)
def test_a_pool_gives_the_figures_of_the_lecture(name, expected):
  pooled = layers.POOLS[name](POOLED)
  assert pooled.shape == (1, 2, 2, 1)
  assert pooled[0, :, :, 0].tolist() == expected


@pytest.mark.parametrize('name', ['max', 'average'])
def test_a_pool_leaves_out_the_odd_row_and_column(name):
  padded = jnp.pad(POOLED, ((0, 0), (0, 1), (0, 1), (0, 0)), 'maximum')
  pool = layers.POOLS[name]
  assert np.array_equal(pool(padded), pool(POOLED))


def test_a_pool_takes_another_window_and_stride():
  # Windows of 3 that move by 1, by hand.
  pooled = layers.max_pool(POOLED, window=3, stride=1)[0, :, :, 0]
  assert pooled.tolist() == [[5, 5], [4, 4]]
  pooled = layers.average_pool(POOLED, window=3, stride=1)[0, :, :, 0]
  np.testing.assert_allclose(
    pooled, np.array([[23, 22], [15, 16]]) / 9, rtol=1e-6
  )


def test_no_pool_leaves_the_image():
  assert layers.POOLS[None](POOLED) is POOLED


def test_softmax_gives_the_figures_of_the_lecture():
  # W17.
  np.testing.assert_allclose(
    layers.ACTIVATIONS['softmax'](jnp.array([1.0, 2, 3])),
    [0.09003057, 0.24472847, 0.66524096],
    rtol=1e-6,
  )


def test_a_softmax_of_two_is_a_sigmoid():
  scores = jnp.linspace(-8, 8, 33)
  pairs = jnp.stack([scores, jnp.zeros(33)], -1)
  np.testing.assert_allclose(
    layers.ACTIVATIONS['softmax'](pairs)[:, 0],
    layers.ACTIVATIONS['sigmoid'](scores),
    rtol=1e-5,
  )


def test_tanh_is_a_sigmoid_stretched():
  # W18.
  x = jnp.linspace(-5, 5, 101)
  np.testing.assert_allclose(
    layers.ACTIVATIONS['tanh'](x),
    2 * layers.ACTIVATIONS['sigmoid'](2 * x) - 1,
    atol=1e-6,
  )


GRID = np.linspace(-4, 4, 41)


@pytest.mark.parametrize(
  ('name', 'expected', 'atol'),
  [
    ('identity', GRID, 0),
    ('sigmoid', 1 / (1 + np.exp(-GRID)), 1e-6),
    ('tanh', np.tanh(GRID), 1e-6),
    ('relu', np.maximum(GRID, 0), 0),
    ('leaky_relu', np.where(GRID > 0, GRID, 0.01 * GRID), 1e-7),
    # x Phi(x), not the form with tanh, which is off by as much as 5e-4.
    ('gelu', GRID * (1 + np.vectorize(math.erf)(GRID / 2**0.5)) / 2, 1e-6),
    ('softmax', np.exp(GRID) / np.exp(GRID).sum(), 1e-6),
  ],
)
def test_an_activation_is_the_function_of_its_name(name, expected, atol):
  found = layers.activation(name)(jnp.asarray(GRID, 'float32'))
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=atol)


def test_every_activation_is_one_that_the_course_names():
  assert set(layers.ACTIVATIONS) == {
    'identity',
    'sigmoid',
    'tanh',
    'relu',
    'leaky_relu',
    'gelu',
    'softmax',
  }


# [B, H, W, C] = [4, 3, 3, 16], with another mean and spread per channel.
NORMED = np.random.default_rng(1).normal(size=(4, 3, 3, 16)) * np.arange(
  1, 17
) + np.arange(16)


@pytest.mark.parametrize(
  ('name', 'grouped', 'axes'),
  [
    ('batch', (4, 3, 3, 16), (0, 1, 2)),
    ('layer', (4, 3, 3, 16), 3),
    ('instance', (4, 3, 3, 16), (1, 2)),
    # 16 channels are two groups of 8.
    ('group', (4, 3, 3, 2, 8), (1, 2, 4)),
  ],
)
def test_a_norm_has_mean_0_and_variance_1_over_its_axes(name, grouped, axes):
  x = NORMED.reshape(grouped)
  mean, var = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
  expected = ((x - mean) / np.sqrt(var)).reshape(NORMED.shape)
  norm = layers.Norm(name, 16, rngs=nnx.Rngs(0))
  found = norm(jnp.asarray(NORMED, 'float32'), train=True)
  np.testing.assert_allclose(found, expected, atol=1e-3)


def test_group_norm_is_one_group_where_8_does_not_divide():
  x = NORMED[..., :6]
  axes = (1, 2, 3)
  expected = (x - x.mean(axes, keepdims=True)) / x.std(axes, keepdims=True)
  norm = layers.Norm('group', 6, rngs=nnx.Rngs(0))
  found = norm(jnp.asarray(x, 'float32'))
  np.testing.assert_allclose(found, expected, atol=1e-3)


def test_no_norm_leaves_the_image_and_has_no_parameters():
  norm = layers.Norm(None, 16, rngs=nnx.Rngs(0))
  x = jnp.asarray(NORMED)
  assert norm(x) is x
  assert models.count_parameters(norm) == 0


def test_batch_norm_moves_its_running_statistics_in_training_alone():
  norm = layers.Norm('batch', 16, rngs=nnx.Rngs(0))
  x = jnp.asarray(NORMED, 'float32')
  norm(x)
  assert np.array_equal(norm.norm.mean, np.zeros(16))
  assert np.array_equal(norm.norm.var, np.ones(16))
  norm(x, train=True)
  # One tenth of the way from (0, 1) to the batch's mean and biased variance.
  axes = (0, 1, 2)
  mean, var = 0.1 * NORMED.mean(axes), 0.9 + 0.1 * NORMED.var(axes)
  np.testing.assert_allclose(norm.norm.mean, mean, rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(norm.norm.var, var, rtol=1e-4)
  expected = (NORMED - mean) / np.sqrt(var)
  np.testing.assert_allclose(norm(x), expected, atol=1e-3)


def test_a_cnn_moves_its_running_statistics_in_training_alone():
  model = filled(
    'cnn', image_shape=(8, 8, 3), widths=(4, 6), head_widths=(7,), dropout=0.5
  )
  image = np.random.default_rng(0).normal(size=(3, 8, 8, 3))
  image = jnp.asarray(image, 'float32')
  before = numbers_in(model, nnx.BatchStat)
  model(image)
  assert np.array_equal(numbers_in(model, nnx.BatchStat), before)
  model(image, train=True, rngs=nnx.Rngs(dropout=0))
  assert np.all(numbers_in(model, nnx.BatchStat) != before)


# ------------------------------------------------------------------- dropout

UNITS = 1000


def dropping(name, rate):
  """A model whose outputs are its hidden units, all 1 but for dropout."""
  if name == 'mlp':
    kwargs = {'image_shape': (1,), 'widths': (UNITS,)}
  else:
    kwargs = {'image_shape': (1, 1, 1), 'widths': (), 'head_widths': (UNITS,)}
  model = filled(name, num_classes=UNITS, dropout=rate, **kwargs)
  hidden = model.blocks[0] if name == 'mlp' else model.hidden[0]
  hidden.kernel[...] = jnp.zeros((1, UNITS))
  hidden.bias[...] = jnp.ones(UNITS)
  model.head.kernel[...] = jnp.eye(UNITS)
  model.head.bias[...] = jnp.zeros(UNITS)
  return model, jnp.zeros((20, *kwargs['image_shape']))


with_dropout = pytest.mark.parametrize('name', ['mlp', 'cnn'])


# W25. Of 20,000 units the share that is dropped spreads by 0.0035 at most, and
# the mean by 0.008: the bounds are five times that.
@with_dropout
@pytest.mark.parametrize('rate', [0.2, 0.5])
def test_dropout_is_the_share_dropped_and_keeps_the_mean(name, rate):
  model, x = dropping(name, rate)
  units = np.asarray(model(x, train=True, rngs=nnx.Rngs(dropout=0)))
  assert abs((units == 0).mean() - rate) < 0.0175
  assert abs(units.mean() - 1) < 0.04
  np.testing.assert_allclose(units[units != 0], 1 / (1 - rate), rtol=1e-6)


@with_dropout
def test_dropout_is_off_in_evaluation(name):
  model, x = dropping(name, 0.5)
  assert np.array_equal(model(x), np.ones((20, UNITS)))
  assert np.array_equal(
    model(x, train=False, rngs=nnx.Rngs(dropout=0)), np.ones((20, UNITS))
  )


@with_dropout
def test_dropout_drops_other_units_for_other_keys_and_examples(name):
  model, x = dropping(name, 0.5)
  one = model(x, train=True, rngs=nnx.Rngs(dropout=0))
  assert np.array_equal(one, model(x, train=True, rngs=nnx.Rngs(dropout=0)))
  other = model(x, train=True, rngs=nnx.Rngs(dropout=1))
  assert not np.array_equal(one, other)
  assert not np.array_equal(one[0], one[1])


@with_dropout
def test_a_share_of_0_needs_no_random_numbers(name):
  model, x = dropping(name, 0.0)
  assert np.array_equal(model(x, train=True), np.ones((20, UNITS)))


@with_dropout
@pytest.mark.parametrize('rate', [-0.3, 1.5, None])
def test_a_share_that_is_not_from_0_to_1_is_refused(name, rate):
  with pytest.raises((ValueError, TypeError), match='dropout'):
    dropping(name, rate)


# ------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
  ('name', 'kwargs', 'message'),
  [
    ('resnext9', {}, "model 'resnext9' is unknown; there are linear, mlp, cnn"),
    ('__init__', {}, "model '__init__' is unknown"),
    ('mlp', {'activation': 'rleu'}, "'rleu' is unknown; there are identity, "),
    ('cnn', {'activation': 'rleu'}, "'rleu' is unknown; there are identity, "),
    ('cnn', {'norm': 'bach'}, "norm 'bach' is unknown; there are batch, layer"),
    ('cnn', {'pool': 'min'}, "pool 'min' is unknown; there are max, average"),
    (
      'cnn',
      {'image_shape': (7, 28, 1), 'widths': (4, 4, 4)},
      'image_shape (7, 28, 1) is too small for 3 blocks',
    ),
    (
      'cnn',
      {'image_shape': (28, 7, 1), 'widths': (4, 4, 4)},
      'image_shape (28, 7, 1) is too small for 3 blocks',
    ),
    (
      'cnn',
      {'image_shape': (30,)},
      'image_shape (30,) is not (height, width, channels)',
    ),
    (
      'cnn',
      {'image_shape': (8, 8)},
      'image_shape (8, 8) is not (height, width, channels)',
    ),
  ],
)
def test_what_cannot_be_made_is_said_in_one_line(name, kwargs, message):
  with pytest.raises(ValueError, match=re.escape(message)) as caught:
    shaped(name, **kwargs)
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
  ('name', 'key', 'value'),
  [
    ('linear', 'num_classes', 0),
    ('linear', 'image_shape', (8, 0, 1)),
    ('mlp', 'num_classes', -1),
    ('mlp', 'num_classes', True),
    ('mlp', 'image_shape', (8, 8, -1)),
    ('mlp', 'widths', (64, 0)),
    ('mlp', 'widths', (64, 2.5)),
    ('mlp', 'widths', ('a',)),
    ('mlp', 'widths', None),
    ('cnn', 'num_classes', 2.5),
    ('cnn', 'image_shape', (8, 8, 0)),
    ('cnn', 'widths', (0,)),
    ('cnn', 'head_widths', (-3,)),
    ('cnn', 'kernel_size', 0),
  ],
)
def test_a_size_that_cannot_be_is_refused_by_its_name(name, key, value):
  message = f'{key} is {value!r}; it takes whole numbers of at least 1'
  with pytest.raises(ValueError, match=re.escape(message)):
    shaped(name, **{key: value})


def test_an_image_as_small_as_its_blocks_allow_is_made():
  model = shaped('cnn', image_shape=(8, 8, 1), widths=(2, 2, 2))
  assert model.head.kernel.shape == (2, 10)
