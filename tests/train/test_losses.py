"""Every loss against its formula in float64, and smoothed labels."""

import jax
import numpy as np
import pytest

from tests import runs
from train import config as config_lib
from train import losses
from train import program as program_lib
from train.data import pipeline
from train.data import sources

GENERATOR = np.random.default_rng(0)
IMAGE = GENERATOR.normal(size=(16, 6)).astype(np.float32)
LABEL = GENERATOR.integers(0, 3, 16).astype(np.int32)
X = np.linspace(-2, 2, 8).astype(np.float32)
T = np.array([0, 1, 1, 0, 1, 0, 0, 1], np.float32)
Y = 2 * T - 1
FORMULAS = {
  ('binary_classification', 'sigmoid_binary_cross_entropy'): (
    -(T * np.log(1 / (1 + np.exp(-X))) + (1 - T) * np.log(1 / (1 + np.exp(X))))
  ),
  ('binary_classification', 'hinge_loss'): np.maximum(0, 1 - Y * X),
  ('binary_classification', 'perceptron_loss'): np.maximum(0, -Y * X),
  ('regression', 'squared_error'): (X - T) ** 2,
  ('regression', 'l2_loss'): (X - T) ** 2 / 2,
  ('regression', 'absolute_error'): np.abs(X - T),
  ('regression', 'huber_loss'): np.where(
    np.abs(X - T) <= 1, (X - T) ** 2 / 2, np.abs(X - T) - 0.5
  ),
  ('regression', 'log_cosh'): np.log(np.cosh(X - T)),
}


@pytest.mark.parametrize(('task', 'loss'), FORMULAS)
def test_a_loss_of_one_output_is_its_formula(task, loss):
  found = losses.create(task, loss)(X[:, None], {'label': T.astype(np.int32)})
  np.testing.assert_allclose(found, FORMULAS[task, loss], rtol=1e-5, atol=1e-6)


LOGITS = GENERATOR.normal(size=(16, 3)).astype(np.float32)
_TRUE = LOGITS[np.arange(16), LABEL]
_OTHER = np.where(np.eye(3)[LABEL] > 0, -np.inf, LOGITS).max(-1)
CLASS_FORMULAS = {
  'softmax_cross_entropy_with_integer_labels': (
    np.log(np.exp(np.float64(LOGITS)).sum(-1)) - _TRUE
  ),
  'multiclass_hinge_loss': np.maximum(0, 1 + _OTHER - _TRUE),
  'multiclass_perceptron_loss': LOGITS.max(-1) - _TRUE,
}


@pytest.mark.parametrize('loss', CLASS_FORMULAS)
def test_a_loss_of_classes_is_its_formula(loss):
  found = losses.create('classification', loss)(LOGITS, {'label': LABEL})
  np.testing.assert_allclose(found, CLASS_FORMULAS[loss], rtol=1e-5, atol=1e-6)


def test_every_loss_of_every_task_has_a_formula_here():
  for task, spec in losses.TASKS.items():
    for loss in spec.losses:
      assert (
        (task, loss) in FORMULAS
        or loss in CLASS_FORMULAS
        or task == 'reconstruction'
      ), (task, loss)


@pytest.mark.parametrize('loss', losses.TASKS['reconstruction'].losses)
def test_reconstruction_compares_with_the_normalized_input(loss):
  """Each example's loss is the mean over its numbers."""
  outputs = GENERATOR.normal(size=(4, 6)).astype(np.float32)
  inputs = GENERATOR.uniform(size=(4, 2, 3, 1)).astype(np.float32)
  found = losses.create('reconstruction', loss)(outputs, {'input': inputs})
  task = 'regression' if loss != 'sigmoid_binary_cross_entropy' else None
  flat = inputs.reshape(4, 6)
  if task:
    each = losses.create(task, loss)
    expected = [
      np.mean(each(o[:, None], {'label': i}))
      for o, i in zip(outputs, flat, strict=True)
    ]
  else:
    p = 1 / (1 + np.exp(-outputs))
    expected = -(flat * np.log(p) + (1 - flat) * np.log(1 - p)).mean(-1)
  np.testing.assert_allclose(found, expected, rtol=1e-5)


# ------------------------------------------------------------ label smoothing

CROSS_ENTROPY = 'softmax_cross_entropy_with_integer_labels'


def _cross_entropy(logits, smoothing=0.0):
  """Szegedy et al. (2016), section 7: targets (1 - a) onehot + a / K."""
  logits = np.float64(logits)
  logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  classes = logits.shape[-1]
  targets = (1 - smoothing) * np.eye(classes)[LABEL] + smoothing / classes
  return -(targets * logs).sum(-1)


@pytest.mark.parametrize('smoothing', [0.0, 0.1, 0.5, 0.99])
def test_smoothed_labels_share_out_a_part_of_the_truth(smoothing):
  loss_fn = losses.create('classification', CROSS_ENTROPY, smoothing)
  found = loss_fn(LOGITS, {'label': LABEL})
  assert found.dtype == np.float32
  expected = _cross_entropy(LOGITS, smoothing)
  np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_smoothing_changes_the_loss():
  """Else the test above could not tell the two formulas apart."""
  difference = _cross_entropy(LOGITS, 0.1) - _cross_entropy(LOGITS)
  assert np.abs(difference).max() > 0.01


@pytest.mark.parametrize(
  ('task', 'loss'),
  [
    (task, loss)
    for task, spec in losses.TASKS.items()
    for loss in spec.losses
    if loss != CROSS_ENTROPY
  ],
)
def test_a_loss_without_classes_to_smooth_is_refused(task, loss):
  with pytest.raises(config_lib.UserError) as caught:
    losses.create(task, loss, 0.1)
  line = str(caught.value)
  assert line == (
    f'config.label_smoothing is 0.1, which needs the loss {CROSS_ENTROPY}; '
    f'config.loss is {loss}'
  )
  losses.create(task, loss, 0.0)


def test_training_smooths_labels_and_evaluation_does_not():
  split = sources.Split({'features': IMAGE, 'label': LABEL})
  dataset = sources.Dataset(
    'hand', {'train': split, 'test': split}, ('a', 'b', 'c')
  )
  config = runs.config(
    data=config_lib.Data(batch_size=16, normalize=None),
    model={'name': 'linear'},
    label_smoothing=0.3,
  )
  program = program_lib.create(config, dataset)
  state = program.init()
  head = jax.device_get(state.params)['head']
  logits = np.float64(IMAGE) @ head['kernel'] + head['bias']
  totals = program.zero_totals()
  for batch in pipeline.eval_batches(split, 16, program.mesh):
    totals = program.eval_step(state.params, {}, totals, batch)
  # Lane by lane, and the whole set is one batch.
  expected = _cross_entropy(logits)
  np.testing.assert_allclose(totals['loss'], expected, rtol=1e-5)
  batch = next(
    pipeline.train_batches(
      split, seed=0, batch_size=16, first_step=0, mesh=program.mesh
    )
  )
  _, metrics = program.train_step(state, batch)
  expected = _cross_entropy(logits, 0.3).mean()
  np.testing.assert_allclose(metrics['loss'], expected, rtol=1e-5)
