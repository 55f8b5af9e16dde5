"""Tokens: their losses and metrics, and what a model is given beside them."""

import json

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from tests import runs
from train import config as config_lib
from train import evaluate
from train import losses
from train import metrics
from train import program as program_lib
from train import step as step_lib
from train.data import sources

RANDOM = np.random.default_rng(0)
LOGITS = RANDOM.normal(size=(3, 4, 5)).astype(np.float32)
TARGETS = np.array([[0, 1, 2, 3], [4, 4, -1, -1], [-1, -1, -1, -1]], np.int32)
CROSS_ENTROPY = 'softmax_cross_entropy_with_integer_labels'


def surprise(row: int, place: int) -> float:
  """-log softmax of the target, in float64."""
  logits = np.float64(LOGITS[row, place])
  return np.log(np.exp(logits).sum()) - logits[TARGETS[row, place]]


def test_the_loss_of_a_sequence_is_the_mean_over_what_is_asked():
  loss = losses.create('token_classification', CROSS_ENTROPY)
  found = loss(LOGITS, {'targets': TARGETS})
  expected = [
    np.mean([surprise(0, i) for i in range(4)]),
    np.mean([surprise(1, i) for i in range(2)]),
    0.0,
  ]
  np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_what_is_not_asked_has_no_gradient_even_where_it_is_nan():
  loss = losses.create('token_classification', CROSS_ENTROPY)

  def total(logits):
    return loss(logits, {'targets': TARGETS}).sum()

  grads = jax.grad(total)(LOGITS)
  assert not np.any(grads[1, 2:])
  assert np.any(grads[1, :2])


@pytest.mark.slow
def test_labels_of_sequences_are_smoothed_like_those_of_images():
  loss = losses.create('token_classification', CROSS_ENTROPY, 0.1)
  whole = losses.create('classification', CROSS_ENTROPY, 0.1)
  found = loss(LOGITS[:1], {'targets': TARGETS[:1]})
  each = whole(LOGITS[0], {'label': TARGETS[0]})
  np.testing.assert_allclose(found[0], each.mean(), rtol=1e-6)


def test_a_sequence_is_right_where_every_token_is():
  answers = np.array([[0, 1, 2, 3], [4, 0, 1, 1], [2, 2, 2, 2]])
  measure = metrics.create('sequence_to_sequence')
  found = measure(jax.nn.one_hot(answers, 5), {'targets': TARGETS})
  np.testing.assert_array_equal(found['accuracy'], [1, 0.5, 0])
  np.testing.assert_array_equal(found['sequence_accuracy'], [1, 0, 1])
  assert metrics.names('sequence_to_sequence', 5) == (
    'loss', 'accuracy', 'sequence_accuracy',
  )  # fmt: skip
  assert metrics.names('token_classification', 5) == ('loss', 'accuracy')


# ---------------------------------------------------------------- the program


class Recorder(nnx.Module):
  """Adds up what it is given, so that a test sees that it came."""

  def __init__(
    self, num_classes: int = 3, *, vocab_size: int = 3, dtype=None,
    param_dtype=jnp.float32, rngs: nnx.Rngs,
  ):  # fmt: skip
    self.head = nnx.Embed(
      vocab_size, num_classes, dtype=dtype, param_dtype=param_dtype, rngs=rngs
    )

  def __call__(
    self, tokens, *, lengths, decoder_tokens, train=False, rngs=None
  ):
    assert tokens.dtype == jnp.int32
    x = self.head(tokens) + self.head(decoder_tokens)
    return x, 1.0 * lengths  # A penalty that a test can foresee.


def words() -> sources.Dataset:
  tokens = RANDOM.integers(0, 3, (8, 4)).astype(np.uint8)
  split = sources.Split(
    {
      'tokens': tokens,
      'targets': tokens.astype(np.int32),
      'lengths': np.arange(8, dtype=np.int32),
      'decoder_tokens': tokens,
    }
  )
  names = ('a', 'b', 'c')
  return sources.Dataset('words', {'train': split, 'test': split}, names, names)


def sequence_config(**fields):
  return runs.config(
    **{
      'task': 'token_classification',
      'data': config_lib.Data(batch_size=8),
      'model': {'name': 'recorder'},
      **fields,
    }
  )


@pytest.fixture
def recorder(monkeypatch):
  monkeypatch.setitem(models.MODELS, 'recorder', Recorder)


def test_a_model_is_given_what_the_data_has_by_name(recorder):
  program = program_lib.create(sequence_config(), words())
  assert program.config.model == {
    'name': 'recorder', 'num_classes': 3, 'vocab_size': 3,
  }  # fmt: skip
  assert program.config.data.normalize is None
  results = evaluate.evaluate(program, program.init(), 'test')
  assert results['penalty'] == pytest.approx(np.arange(8).mean())


def test_a_penalty_is_part_of_the_loss(recorder):
  program = program_lib.create(sequence_config(), words())
  state = program.init()
  results = evaluate.evaluate(program, state, 'test')
  table = np.float64(jax.device_get(state.params)['head']['embedding'])
  arrays = program.dataset.splits['test'].arrays
  logits = 2 * table[arrays['tokens']]
  surprises = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(
    logits, arrays['targets'][..., None], -1
  ).squeeze(-1)
  assert results['loss'] == pytest.approx(surprises.mean() + 3.5, rel=1e-5)


def test_outputs_without_a_penalty_report_none():
  model = models.create(
    'linear', image_shape=(2,), num_classes=3, rngs=nnx.Rngs(0)
  )
  outputs, penalty = step_lib.apply(model, {'input': jnp.ones((4, 2))})
  assert outputs.shape == (4, 3)
  assert penalty == {}


REFUSED = [
  ({'model': {'name': 'mlp'}}, "config.model.name is 'mlp', which reads no"),
  ({'task': 'classification'}, 'which needs classes; words has targets'),
  ({'task': 'reconstruction'}, 'which needs numbers as input; words has'),
  (
    {'data': config_lib.Data(batch_size=8, augment=('noise',))},
    "config.data.augment.0 is 'noise'; words holds tokens",
  ),
  (
    {
      'data': config_lib.Data(
        batch_size=8, normalize={'mean': (0.0,), 'std': (1.0,)}
      )
    },
    'words holds tokens, which are not scaled',
  ),
  (
    {'data': config_lib.Data(batch_size=8, classes=(0, 1))},
    'words has no classes',
  ),
]


@pytest.mark.parametrize(('fields', 'says'), REFUSED)
def test_what_does_not_go_with_tokens_is_one_line(recorder, fields, says):
  with pytest.raises(config_lib.UserError) as error:
    program_lib.create(sequence_config(**fields), words())
  assert says in str(error.value)
  assert '\n' not in str(error.value)


def test_a_model_of_tokens_does_not_read_images(recorder):
  config = runs.config(model={'name': 'recorder'})
  with pytest.raises(config_lib.UserError) as error:
    program_lib.create(config)
  assert str(error.value) == (
    "config.model.name is 'recorder', which reads tokens; digits has numbers "
    'of shape (8, 8, 1)'
  )


def test_logits_are_not_compared_with_inputs_beyond_0_and_1():
  config = runs.config(
    task='reconstruction', loss='sigmoid_binary_cross_entropy'
  )
  with pytest.raises(config_lib.UserError) as error:
    program_lib.create(config)
  assert str(error.value) == (
    "config.data.normalize is 'mean_std'; the loss "
    'sigmoid_binary_cross_entropy compares with inputs from 0 to 1, which '
    "'unit' gives"
  )


def test_errors_of_logits_are_those_of_their_sigmoids():
  measure = metrics.create('reconstruction', losses.OF_LOGITS)
  x = np.float32([[0.25, 1.0]])
  logits = np.log(np.float32([[1.0, 3.0]]))  # 1/2 and 3/4.
  found = measure(logits, {'input': x})
  assert found['mean_squared_error'][0] == pytest.approx(1 / 16)


def test_a_tagger_needs_a_target_for_each_position():
  config = runs.config(task='token_classification')
  with pytest.raises(config_lib.UserError, match='which needs tokens; digits'):
    program_lib.create(config)


def test_the_resolved_config_holds_the_length_of_the_sequences():
  config = runs.config(
    task='regression',
    data=config_lib.Data(name='mackey_glass', sequence_length=5),
    model={'name': 'linear'},
  )
  program = program_lib.create(config)
  resolved = json.loads(config_lib.to_json(program.config))
  assert resolved['data']['sequence_length'] == 5
  assert resolved['model']['image_shape'] == [5, 1]
