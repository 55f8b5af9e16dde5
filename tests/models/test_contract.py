"""What all models keep, so that one loop trains them."""

import functools
import inspect

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models

RANDOM = np.random.default_rng(0)
B = 3


def _normal(*shape):
  return jnp.asarray(RANDOM.normal(size=(B, *shape)), 'float32')


def _tokens(length):
  return jnp.asarray(RANDOM.integers(0, 7, (B, length)), 'int32')


IMAGE = {'image_shape': (8, 8, 3), 'num_classes': 5}
IMAGES = {'inputs': _normal(8, 8, 3)}
ROWS = {'inputs': _normal(6, 4), 'lengths': jnp.array([6, 1, 4])}
STAGES = {'depth': (1, 1), 'stem': '3x3'}
# Every model: arguments that make a small one, what it is called with, and the
# shape of what it gives an example.
CASES = {
  'linear': (IMAGE, IMAGES, (5,)),
  'mlp': (IMAGE | {'widths': (6, 4), 'dropout': 0.5}, IMAGES, (5,)),
  'cnn': (
    IMAGE | {'widths': (4, 6), 'head_widths': (7,), 'dropout': 0.5},
    IMAGES,
    (5,),
  ),
  'lenet': (
    {'image_shape': (12, 12, 1), 'num_classes': 5},
    {'inputs': _normal(12, 12, 1)},
    (5,),
  ),
  'alexnet': (
    {'image_shape': (63, 63, 3), 'num_classes': 5, 'width': 2},
    {'inputs': _normal(63, 63, 3)},
    (5,),
  ),
  'resnet': (IMAGE | STAGES | {'variant': '50', 'width': 4}, IMAGES, (5,)),
  'resnext': (IMAGE | STAGES | {'width': 16}, IMAGES, (5,)),
  'densenet': (IMAGE | STAGES | {'growth_rate': 4}, IMAGES, (5,)),
  'convnext': (
    IMAGE
    | {'depth': (1, 1), 'width': 4, 'patch_size': 2, 'stochastic_depth': 0.5},
    IMAGES,
    (5,),
  ),
  'vit': (
    IMAGE
    | {
      'patch_size': 4,
      'width': 8,
      'depth': 2,
      'num_heads': 2,
      'dropout': 0.5,
      'stochastic_depth': 0.5,
    },
    IMAGES,
    (5,),
  ),
  'autoencoder': (
    {'image_shape': (8, 8, 3), 'widths': (6,), 'code_size': 2},
    IMAGES,
    (8, 8, 3),
  ),
  'rnn': (
    {'num_features': 4, 'num_classes': 5, 'widths': (6, 3), 'dropout': 0.5},
    ROWS,
    (5,),
  ),
  'gru': (
    {'num_features': 4, 'num_classes': 5, 'widths': (6,), 'head': 'every'},
    ROWS,
    (6, 5),
  ),
  'lstm': (
    {'vocab_size': 7, 'num_classes': 5, 'widths': (6,), 'bidirectional': True},
    {'inputs': _tokens(6), 'lengths': ROWS['lengths']},
    (5,),
  ),
  'seq2seq': (
    {'vocab_size': 7, 'num_classes': 7, 'widths': (6,)},
    {
      'inputs': _tokens(6),
      'lengths': ROWS['lengths'],
      'decoder_tokens': _tokens(5),
    },
    (5, 7),
  ),
}

every_model = pytest.mark.parametrize('name', CASES)


def shaped(name, **kwargs):
  """A small model without numbers: its structure, shapes and dtypes."""
  kwargs = CASES[name][0] | kwargs
  return nnx.eval_shape(lambda: models.create(name, **kwargs, rngs=nnx.Rngs(0)))


def make(name, **kwargs):
  """A small model whose parameters are NumPy's, which takes no compiling."""
  model = shaped(name, **kwargs)
  random = np.random.default_rng(0)

  def numbers(leaf):
    return jnp.asarray(random.normal(size=leaf.shape) ** 2 / 16, leaf.dtype)

  nnx.update(model, jax.tree.map(numbers, nnx.state(model)))
  return model


def call(model, given, **kwargs):
  """The model's outputs; its first argument has a name of the model's own."""
  given = dict(given)
  return model(given.pop('inputs'), **given, **kwargs)


def test_every_model_is_covered_here():
  assert set(CASES) == set(models.MODELS)


@every_model
def test_a_model_gives_the_outputs_that_its_docstring_says(name):
  _, given, shape = CASES[name]
  outputs = jax.eval_shape(lambda: call(make(name), given))
  assert outputs.shape == (B, *shape)


@every_model
def test_a_model_takes_train_and_rngs_by_name_alone(name):
  takes = inspect.signature(models.MODELS[name].__call__).parameters
  assert takes['train'].kind is inspect.Parameter.KEYWORD_ONLY
  assert takes['train'].default is False
  assert takes['rngs'].kind is inspect.Parameter.KEYWORD_ONLY
  assert takes['rngs'].default is None


@every_model
def test_a_model_holds_parameters_and_statistics_alone(name):
  *_, rest = nnx.split(shaped(name), nnx.Param, nnx.BatchStat, ...)
  assert not jax.tree.leaves(rest)


@functools.cache
def compiled(name):
  """(inputs, key) -> what evaluation and training give; compiled once."""
  graphdef, params, stats = nnx.split(make(name), nnx.Param, ...)

  def run(params, given, key):
    def loss(params):
      model = nnx.merge(graphdef, params, stats, copy=True)
      outputs = call(model, given)
      left = jax.tree.leaves(nnx.state(model, nnx.BatchStat))
      return (jnp.cos(outputs) ** 2).sum(), (outputs, left)

    grads, (outputs, left) = jax.grad(loss, has_aux=True)(params)
    model = nnx.merge(graphdef, params, stats, copy=True)
    trained = call(model, given, train=True, rngs=nnx.Rngs(dropout=key))
    return outputs, left, trained, grads

  run = jax.jit(run)
  return lambda given, seed=0: run(params, given, jax.random.key(seed))


@every_model
def test_evaluation_is_finite_and_leaves_no_trace(name):
  outputs, left, *_ = compiled(name)(CASES[name][1])
  assert np.all(np.isfinite(outputs))
  statistics = jax.tree.leaves(nnx.state(make(name), nnx.BatchStat))
  jax.tree.map(np.testing.assert_array_equal, statistics, left)


@every_model
def test_examples_do_not_touch_each_other_in_evaluation(name):
  given = CASES[name][1]
  # The other examples give way to the middle one.
  others = {key: x[jnp.array([1, 1, 1])] for key, x in given.items()}
  one, *_ = compiled(name)(given)
  other, *_ = compiled(name)(others)
  np.testing.assert_allclose(one[1], other[1], rtol=1e-5, atol=1e-5)


@every_model
def test_the_key_decides_what_training_draws(name):
  given, kwargs = CASES[name][1], CASES[name][0]
  outputs, again, other = (compiled(name)(given, s)[2] for s in (1, 1, 2))
  assert np.array_equal(outputs, again)
  draws = name == 'alexnet' or any(
    kwargs.get(key) for key in ('dropout', 'stochastic_depth')
  )
  assert np.array_equal(outputs, other) == (not draws)


@every_model
def test_every_parameter_has_a_gradient(name):
  *_, grads = compiled(name)(CASES[name][1])
  for path, grad in jax.tree.leaves_with_path(grads):
    assert np.any(grad != 0), jax.tree_util.keystr(path)


@every_model
def test_the_seed_decides_the_parameters(name):
  @jax.jit
  def kernel(key):  # Of one layer: the others are not compiled.
    model = models.create(name, **CASES[name][0], rngs=nnx.Rngs(key))
    layer = model.embed if name == 'vit' else model.head  # That starts at 0.
    return layer.kernel[...]

  one, again, other = (kernel(jax.random.key(seed)) for seed in (0, 0, 1))
  assert np.array_equal(one, again)
  assert np.all(one != other)


@every_model
def test_bfloat16_computes_in_it_and_stores_float32(name):
  model = make(name, dtype=jnp.bfloat16)
  outputs = jax.eval_shape(lambda: call(model, CASES[name][1]))
  assert outputs.dtype == jnp.bfloat16
  stored = {x.dtype for x in jax.tree.leaves(nnx.state(model, nnx.Param))}
  assert stored == {jnp.dtype('float32')}


@every_model
def test_param_dtype_is_what_parameters_are_stored_in(name):
  model = shaped(name, param_dtype=jnp.bfloat16)
  stored = {x.dtype for x in jax.tree.leaves(nnx.state(model, nnx.Param))}
  assert stored == {jnp.dtype('bfloat16')}


@every_model
def test_a_wrong_argument_is_a_line_that_names_it(name):
  wrong = {'num_classes': 0} if name != 'autoencoder' else {'code_size': 0}
  with pytest.raises(ValueError, match=f'{next(iter(wrong))} is 0') as error:
    shaped(name, **wrong)
  assert '\n' not in str(error.value)


def test_an_unknown_variant_lists_those_there_are():
  for name in ('resnet', 'resnext', 'densenet', 'convnext', 'vit'):
    with pytest.raises(ValueError, match="variant '19' is unknown; there are"):
      shaped(name, variant='19')


@every_model
def test_an_argument_that_a_model_does_not_take_is_refused(name):
  with pytest.raises(TypeError, match='hidden_sizes'):
    shaped(name, hidden_sizes=(3,))
