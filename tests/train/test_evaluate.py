"""Evaluation counts every example once, and says what scikit-learn says."""

import dataclasses
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest
import sklearn.metrics

from tests import conftest
from tests import runs
from train import config as config_lib
from train import evaluate
from train import program as program_lib
from train.data import sources


def _dataset(n: int, classes: int = 10) -> sources.Dataset:
  generator = np.random.default_rng(0)

  def split(n):
    return sources.Split(
      {
        'features': generator.normal(size=(n, 5)).astype(np.float32),
        'label': generator.integers(0, classes, n).astype(np.int32),
      }
    )

  names = tuple(f'class {k}' for k in range(classes))
  return sources.Dataset('noise', {'train': split(64), 'test': split(n)}, names)


def _logits(state, split) -> np.ndarray:
  """The linear model in float64, by hand."""
  head = jax.tree.map(np.float64, jax.device_get(state.params['head']))
  return split.arrays['features'] @ head['kernel'] + head['bias']


LINEAR = {
  'model': {'name': 'linear'},
  'data': config_lib.Data(batch_size=64, normalize=None),
}


@pytest.mark.parametrize('n', [1, 63, 64, 65, 1000])
def test_every_example_counts_once_whatever_the_last_batch_holds(n):
  dataset = _dataset(n)
  program = program_lib.create(runs.config(**LINEAR), dataset)
  state = program.init()
  results = evaluate.evaluate(program, state, 'test')
  logits = _logits(state, dataset.splits['test'])
  labels = dataset.splits['test'].arrays['label']
  assert results['count'] == n
  assert results['accuracy'] == (logits.argmax(-1) == labels).mean()
  shifted = logits - logits.max(-1, keepdims=True)
  log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
  expected = -log_p[np.arange(n), labels].mean()
  np.testing.assert_allclose(results['loss'], expected, rtol=1e-6)


def test_confusion_precision_and_top_5_are_scikit_learns():
  dataset = _dataset(501, classes=12)
  program = program_lib.create(runs.config(**LINEAR), dataset)
  state = program.init()
  results = evaluate.evaluate(program, state, 'test')
  logits = _logits(state, dataset.splits['test'])
  labels = dataset.splits['test'].arrays['label']
  answers = logits.argmax(-1)
  np.testing.assert_array_equal(
    results['confusion'], sklearn.metrics.confusion_matrix(labels, answers)
  )
  precision, recall, _, count = sklearn.metrics.precision_recall_fscore_support(
    labels, answers, zero_division=np.nan
  )
  for k, found in enumerate(results['per_class'].values()):
    assert found['count'] == count[k]
    assert found['accuracy'] == recall[k]
    assert found['precision'] == (
      None if np.isnan(precision[k]) else precision[k]
    )
  assert results['top5_accuracy'] == pytest.approx(
    sklearn.metrics.top_k_accuracy_score(labels, logits, k=5)
  )


def test_regression_reports_scikit_learns_errors():
  dataset = _dataset(100)
  labels = dataset.splits['test'].arrays['label'].astype(np.float32)
  test = sources.Split(dataset.splits['test'].arrays | {'label': labels})
  train = sources.Split(
    {k: v.astype(np.float32) for k, v in dataset.splits['train'].arrays.items()}
  )
  dataset = sources.Dataset('noise', {'train': train, 'test': test})
  config = runs.config(**LINEAR, task='regression')
  program = program_lib.create(config, dataset)
  state = program.init()
  results = evaluate.evaluate(program, state, 'test')
  predicted = _logits(state, test)[:, 0]
  np.testing.assert_allclose(
    [results['mean_squared_error'], results['mean_absolute_error']],
    [
      sklearn.metrics.mean_squared_error(labels, predicted),
      sklearn.metrics.mean_absolute_error(labels, predicted),
    ],
    rtol=1e-6,
  )
  assert results['loss'] == results['mean_squared_error']
  assert 'confusion' not in results


def test_a_nan_in_the_padding_does_not_reach_the_sum():
  """Padding repeats the last example; here that example's loss is its own."""
  dataset = _dataset(65)
  features = dataset.splits['test'].arrays['features'].copy()
  program = program_lib.create(runs.config(**LINEAR), dataset)
  state = program.init()
  batch = {
    'features': np.full((64, 5), np.nan, np.float32),
    'label': np.zeros(64, np.int32),
    'mask': np.zeros(64, bool),
  }
  batch['features'][0], batch['mask'][0] = features[0], True
  totals = program.eval_step(
    state.params, state.batch_stats, program.zero_totals(), batch
  )
  assert np.isfinite(totals['loss']).all()
  assert totals['count'].sum() == 1
  assert totals['confusion'].sum() == 1


def test_10007_examples_on_eight_devices_count_10007():
  script = textwrap.dedent("""
    import jax
    import numpy as np
    from tests import runs
    from tests.train import test_evaluate
    from train import evaluate
    from train import program as program_lib

    assert jax.device_count() == 8
    dataset = test_evaluate._dataset(10_007)
    split = dataset.splits['test']
    for lengths in ((8, 1, 1), (1, 8, 1), (2, 4, 1)):
      config = runs.config(**test_evaluate.LINEAR)
      config.mesh.data, config.mesh.fsdp, config.mesh.tensor = lengths
      program = program_lib.create(config, dataset)
      state = program.init()
      results = evaluate.evaluate(program, state, 'test')
      answers = test_evaluate._logits(state, split).argmax(-1)
      right = (answers == split.arrays['label']).sum()
      print(results['count'], results['accuracy'] == right / 10_007)
  """)
  ran = subprocess.run(
    [sys.executable, '-c', script],
    capture_output=True,
    text=True,
    cwd=conftest.REPOSITORY,
    env=conftest.environment(
      XLA_FLAGS='--xla_force_host_platform_device_count=8'
    ),
  )
  assert ran.stdout.split() == ['10007', 'True'] * 3, ran.stderr


def test_evaluating_leaves_the_state_as_it_was():
  program = program_lib.create(runs.config())
  state = program.init()
  before = jax.tree.map(np.array, dataclasses.asdict(state))
  evaluate.evaluate(program, state, 'test')
  jax.tree.map(np.testing.assert_array_equal, before, dataclasses.asdict(state))
