"""The figures that the README gives, and the issue they answer."""

import pytest

from experiments import benchmark
from experiments import command
from experiments.benchmarks import results

# Test accuracy, the mean of five seeds.
AT_LEAST = {'digits_cnn': 0.98, 'digits_mlp': 0.965, 'digits_linear': 0.95}


@pytest.mark.slow
@pytest.mark.parametrize('name', AT_LEAST)
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
  ('words', 'named'),
  [
    ([], '--suite'),
    (['--suite=all'], 'all'),
    (['--suite=loop', '--rounds=0'], 'rounds'),
    (['--suite=results', '--seeds=0'], 'seeds'),
    (['--suite=results', '--configs=none_such'], 'none_such'),
  ],
)
def test_a_mistake_is_one_line(words, named, capsys):
  assert command.run('benchmark', benchmark.main, words) == 2
  errors = capsys.readouterr().err
  assert errors.count('\n') == 1
  assert named in errors
