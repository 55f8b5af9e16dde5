"""The figures that the README gives, and the issue they answer."""

import importlib.util

import pytest

from experiments import benchmark
from experiments import command
from experiments.benchmarks import memory
from experiments.benchmarks import models as models_suite
from experiments.benchmarks import results
import models

# Test accuracy, the mean of five seeds.
AT_LEAST = {'digits_cnn': 0.98, 'digits_mlp': 0.965, 'digits_linear': 0.95}


@pytest.mark.slow
@pytest.mark.parametrize(
  'name',
  [
    pytest.param('digits_cnn', marks=pytest.mark.long),
    pytest.param('digits_mlp', marks=pytest.mark.long),
    'digits_linear',
  ],
)
def test_a_digits_config_reaches_its_accuracy(name):
  assert results.result(name, seeds=5)['mean'] >= AT_LEAST[name]


@pytest.fixture(scope='module')
def scikit_learn():
  return results.scikit_learn(seeds=5)


@pytest.mark.slow
@pytest.mark.parametrize(
  'name', ['cancer_perceptron', 'cancer_logistic', 'cancer_svm']
)
def test_a_cancer_config_is_within_a_point_of_scikit_learn(name, scikit_learn):
  mean = results.result(name, seeds=5)['mean']
  assert mean == pytest.approx(scikit_learn[name], abs=0.01)


@pytest.mark.slow
def test_diabetes_is_within_a_percent_of_scikit_learns_error(scikit_learn):
  name = 'diabetes_linear'
  mean = results.result(name, seeds=5)['mean']
  assert mean == pytest.approx(scikit_learn[name], rel=0.01)


@pytest.mark.parametrize(
  'name',
  [
    pytest.param(name, marks=[pytest.mark.slow] if name != 'mlp' else [])
    for name in ('mlp', 'cnn', 'lstm')
  ],
)
def test_a_case_of_the_models_suite_is_measured(name, monkeypatch):
  monkeypatch.setattr(models_suite, 'has_torch', lambda: False)
  row = models_suite.measure(name, rounds=1, peak=1e12, steps=2)
  seconds = row['milliseconds']['ours'] / 1e3
  assert seconds > 0
  rate = row['operations'] / seconds
  assert row['mfu']['ours'] == pytest.approx(rate / 1e12, abs=1e-3)
  assert 'ratio_median' not in row
  lines = models_suite.table([row])
  assert lines[1].split()[0] == name
  assert len({len(line) for line in lines}) == 1


@pytest.mark.skipif(
  importlib.util.find_spec('torch') is None, reason='PyTorch is not installed'
)
class TestTorch:
  """What the suite compares with."""

  @pytest.mark.parametrize('name', models_suite.CASES)
  def test_its_networks_have_as_many_parameters_as_ours(self, name):
    from experiments.benchmarks import torch_models

    program = models_suite.create_program(models_suite.CASES[name], steps=1)
    ours = models.count_parameters(program.model)
    assert torch_models.count_parameters(torch_models.create(name)) == ours

  # PyTorch's counter does not know its own LSTM, nor its fused attention.
  @pytest.mark.parametrize('name', sorted(models_suite.CASES.keys() - {'lstm'}))
  def test_a_step_of_its_networks_costs_what_ours_costs(self, name):
    import torch
    from torch.nn import attention
    from torch.utils import flop_counter

    from experiments.benchmarks import torch_models

    case = models_suite.CASES[name]
    ours = models_suite.count_operations(models_suite.create_program(case, 1))
    height, width, channels = case.image_shape
    with (
      torch.device('meta'),  # Shapes alone.
      attention.sdpa_kernel(attention.SDPBackend.MATH),
      flop_counter.FlopCounterMode(display=False) as counter,
    ):
      image = torch.zeros(case.batch_size, channels, height, width)
      torch_models.create(name)(image).sum().backward()
    assert counter.get_total_flops() == ours

  @pytest.mark.slow
  @pytest.mark.parametrize('name', ['mlp', 'lstm'])  # Others compile long.
  def test_both_are_measured(self, name):
    row = models_suite.measure(name, rounds=1, peak=1e12, steps=2)
    assert row['milliseconds'].keys() >= {'ours', 'eager'}
    assert row['ratio_min'] == row['ratio_median'] == row['ratio_max'] > 0


def test_the_memory_of_a_run_is_looked_at_ten_times(monkeypatch):
  monkeypatch.setattr(memory, '_QUIET_SECONDS', 0)
  rows = memory.measure(20)
  assert [row['step'] for row in rows] == [*range(2, 21, 2)]
  assert all(row['MiB'] > 50 and row['files'] > 2 for row in rows)
  assert len({len(line) for line in memory.table(rows)}) == 1


def test_the_peak_is_that_of_a_product():
  assert models_suite.product_rate(size=64, repeats=2) > 0


@pytest.mark.parametrize(
  ('words', 'named'),
  [
    ([], '--suite'),
    (['--suite=all'], 'all'),
    (['--suite=loop', '--rounds=0'], 'rounds'),
    (['--suite=models', '--cases=none_such'], 'none_such'),
    (['--suite=results', '--seeds=0'], 'seeds'),
    (['--suite=memory', '--steps=9'], 'steps'),
    (['--suite=results', '--configs=none_such'], 'none_such'),
  ],
)
def test_a_mistake_is_one_line(words, named, capsys):
  assert command.run('benchmark', benchmark.main, words) == 2
  errors = capsys.readouterr().err
  assert errors.count('\n') == 1
  assert named in errors
