"""One training step against backpropagation by hand, in float64."""

import dataclasses

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


def _program(**fields) -> program_lib.Program:
  split = sources.Split({'features': IMAGE, 'label': LABEL})
  dataset = sources.Dataset(
    'hand', {'train': split, 'test': split}, ('a', 'b', 'c')
  )
  config = runs.config(
    data=config_lib.Data(batch_size=16, normalize=None),
    optimizer={'name': 'sgd', 'momentum': 0.9},
    schedule={'name': 'constant_schedule', 'value': 0.1},
    **fields,
  )
  return program_lib.create(config, dataset)


def _steps(program, count: int):
  """The state and the metrics after `count` steps, and the batches' places."""
  batches = pipeline.train_batches(
    program.dataset.splits['train'],
    seed=0,
    batch_size=16,
    first_step=0,
    mesh=program.mesh,
  )
  state, trace = program.init(), []
  for _ in range(count):
    state, metrics = program.train_step(state, next(batches))
    trace.append({k: float(v) for k, v in metrics.items()})
  return state, trace


def _softmax(logits):
  powers = np.exp(logits - logits.max(-1, keepdims=True))
  return powers / powers.sum(-1, keepdims=True)


def test_three_steps_of_a_two_layer_network_are_backpropagation_by_hand():
  program = _program(model={'name': 'mlp', 'widths': (4,)})
  params = jax.tree.map(np.float64, jax.device_get(program.init().params))
  w1, b1 = params['blocks'][0]['kernel'], params['blocks'][0]['bias']
  w2, b2 = params['head']['kernel'], params['head']['bias']
  state, trace = _steps(program, 3)
  weights = [w1, b1, w2, b2]
  moments = [np.zeros_like(w) for w in weights]
  # The whole set is one batch, so that its order is all the same.
  x, y = np.float64(IMAGE), np.eye(3)[LABEL]
  for step in range(3):
    w1, b1, w2, b2 = weights
    hidden = np.maximum(x @ w1 + b1, 0)
    p = _softmax(hidden @ w2 + b2)
    d_logits = (p - y) / len(x)
    d_hidden = (d_logits @ w2.T) * (hidden > 0)
    grads = [x.T @ d_hidden, d_hidden.sum(0), hidden.T @ d_logits,
             d_logits.sum(0)]  # fmt: skip
    expected = {
      'loss': -np.log(p[y > 0]).mean(),
      'accuracy': (p.argmax(-1) == LABEL).mean(),
      'grad_norm': np.sqrt(sum((g**2).sum() for g in grads)),
      'param_norm': np.sqrt(sum((w**2).sum() for w in weights)),
      'learning_rate': 0.1,
    }
    assert trace[step] == pytest.approx(expected, rel=1e-5)
    # v = 0.9 v + g; w = w - 0.1 v
    moments = [0.9 * v + g for v, g in zip(moments, grads, strict=True)]
    weights = [w - 0.1 * v for w, v in zip(weights, moments, strict=True)]
  found = jax.device_get(state.params)
  for name, value in zip(
    (('blocks', 0, 'kernel'), ('blocks', 0, 'bias'), ('head', 'kernel'),
     ('head', 'bias')),
    weights, strict=True,
  ):  # fmt: skip
    leaf = found
    for key in name:
      leaf = leaf[key]
    np.testing.assert_allclose(leaf, value, rtol=1e-5, atol=1e-6)
  assert int(state.step) == 3


def test_dropout_is_a_function_of_seed_and_step():
  """The same step draws the same mask; another step or seed another one."""
  batch = {'features': IMAGE, 'label': LABEL}

  def loss(seed, step):
    program = _program(
      model={'name': 'mlp', 'widths': (64,), 'dropout': 0.5}, seed=seed
    )
    # The parameters of seed 0, so that nothing but the masks may differ.
    params = _program(model=program.config.model).init().params
    state = dataclasses.replace(
      program.init(), params=params, step=jax.numpy.int32(step)
    )
    return float(program.train_step(state, batch)[1]['loss'])

  found = {(0, 0): loss(0, 0), (0, 1): loss(0, 1), (1, 0): loss(1, 0)}
  assert len(set(found.values())) == 3
  assert loss(0, 0) == found[0, 0]
  assert loss(0, 1) == found[0, 1]


def test_the_first_step_that_is_not_finite_is_remembered():
  program = _program(model={'name': 'linear'})
  state = program.init()
  assert int(state.control['nonfinite_step']) == -1
  bad = jax.tree.map(lambda leaf: leaf * np.nan, state.params)
  state = dataclasses.replace(state, params=bad)
  batches = pipeline.train_batches(
    program.dataset.splits['train'],
    seed=0,
    batch_size=16,
    first_step=0,
    mesh=program.mesh,
  )
  for _ in range(3):
    state, _ = program.train_step(state, next(batches))
  assert int(state.control['nonfinite_step']) == 1


def test_every_optimizer_that_wants_the_loss_function_gets_it():
  """L-BFGS searches along a line, for which it needs value_fn."""
  split = sources.Split({'features': IMAGE, 'label': LABEL})
  dataset = sources.Dataset(
    'hand', {'train': split, 'test': split}, ('a', 'b', 'c')
  )
  config = runs.config(
    data=config_lib.Data(batch_size=16, normalize=None),
    model={'name': 'linear'},
    optimizer={'name': 'lbfgs'},
    schedule={'name': 'constant_schedule', 'value': 1.0},
  )
  program = program_lib.create(config, dataset)
  _, trace = _steps(program, 10)
  assert trace[-1]['loss'] < trace[0]['loss'] / 2


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
