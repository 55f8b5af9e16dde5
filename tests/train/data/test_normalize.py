"""Normalization against float64 NumPy on the training split."""

import numpy as np
import pytest

from train import config as config_lib
from train import step
from train.data import normalize
from train.data import sources

# More than the 128 examples that are read at a time, and far from 0: plain
# sums of squares, or of float32, would not give five digits.
N = 5000
FEATURES = (
  np.random.default_rng(0).normal([1e4, 0, -3], [1, 5, 0.01], (N, 3))
).astype('float32')
PIXELS = (
  np.random.default_rng(1)
  .integers([0, 30, 100], [256, 40, 101], (N, 2, 4, 3))
  .astype('uint8')
)


def dataset(inputs, rows=None):
  key = 'image' if inputs.ndim == 4 else 'features'
  arrays = {key: inputs, 'label': np.zeros(len(inputs), 'int32')}
  return sources.Dataset('toy', {'train': sources.Split(arrays, rows)})


def resolved(kind, inputs, rows=None):
  """The mean and the std as arrays, once their form is checked."""
  found = normalize.resolve(kind, dataset(inputs, rows))
  assert set(found) == {'mean', 'std'}
  for values in found.values():
    assert isinstance(values, tuple)
    assert all(type(value) is float for value in values)
  return np.array(found['mean']), np.array(found['std'])


@pytest.mark.parametrize('inputs', [FEATURES, PIXELS], ids=['rows', 'images'])
def test_mean_std_is_that_of_each_channel_in_float64(inputs):
  mean, std = resolved('mean_std', inputs)
  channels = inputs.astype('float64').reshape(-1, 3)
  np.testing.assert_allclose(mean, channels.mean(0), rtol=1e-12)
  # The last channel of the pixels is 100 everywhere.
  expected = channels.std(0)
  expected[expected == 0] = 1
  np.testing.assert_allclose(std, expected, rtol=1e-9)


def test_mean_std_leaves_the_validation_part_out():
  inputs = FEATURES[:40].copy()
  whole = dataset(inputs)
  whole.splits['test'] = whole.splits['train']
  held_out = sources.hold_out(whole, 0.25)
  rows = held_out.splits['train'].rows
  assert len(rows) == 30
  found = normalize.resolve('mean_std', held_out)
  kept = inputs[rows].astype('float64')
  np.testing.assert_allclose(found['mean'], kept.mean(0), rtol=1e-12)
  np.testing.assert_allclose(found['std'], kept.std(0), rtol=1e-9)
  assert not np.allclose(found['mean'], inputs.mean(0), rtol=1e-6)


@pytest.mark.parametrize('kind', ['unit', 'symmetric'])
def test_the_range_leaves_the_validation_part_out(kind):
  inputs = np.array([[0.0], [1], [100], [-100]], 'float32')
  mean, std = resolved(kind, inputs, rows=np.array([0, 1]))
  low = 0 if kind == 'unit' else -1
  assert ((inputs[:2] - mean) / std).ravel().tolist() == [low, 1]


@pytest.mark.parametrize(
  ('kind', 'mean', 'std'), [('unit', 0, 255), ('symmetric', 127.5, 127.5)]
)
def test_pixels_are_scaled_by_what_they_can_be(kind, mean, std):
  # Whatever they are in this dataset.
  found = resolved(kind, PIXELS)
  assert found[0].tolist() == [mean] * 3
  assert found[1].tolist() == [std] * 3


@pytest.mark.parametrize(('kind', 'low'), [('unit', 0), ('symmetric', -1)])
def test_features_are_scaled_by_what_they_are_in_training(kind, low):
  mean, std = resolved(kind, FEATURES)
  scaled = (FEATURES.astype('float64') - mean) / std
  np.testing.assert_allclose(scaled.min(0), low, atol=1e-9)
  np.testing.assert_allclose(scaled.max(0), 1, atol=1e-9)


@pytest.mark.parametrize('kind', ['mean_std', 'unit', 'symmetric'])
@pytest.mark.parametrize('value', [0, 0.1, 1e6 / 3, -7])
def test_a_constant_feature_becomes_0_and_its_std_is_1(kind, value):
  inputs = np.full((N, 1), value, 'float32')
  mean, std = resolved(kind, inputs)
  assert std.tolist() == [1]
  np.testing.assert_allclose(mean, inputs[0], rtol=1e-7)


def test_none_leaves_the_inputs_as_they_are():
  assert normalize.resolve(None, dataset(FEATURES)) is None


@pytest.mark.parametrize('inputs', [FEATURES, PIXELS], ids=['rows', 'images'])
def test_a_mean_and_a_std_that_are_given_are_taken(inputs):
  given = {'mean': (1, 2.5, -3.0), 'std': (1, 0.5, 2.0)}
  assert normalize.resolve(given, dataset(inputs)) == given


@pytest.mark.parametrize('name', ['digits', 'breast_cancer', 'diabetes'])
def test_a_dataset_that_is_normalized_has_mean_0_and_std_1(name):
  loaded = sources.load(name, say=lambda line: None)
  found = normalize.resolve('mean_std', loaded)
  prepare = step.make_prepare(loaded.input_key, found)
  inputs = np.asarray(
    prepare(dict(loaded.splits['train'].arrays))['input'], 'float64'
  ).reshape(-1, loaded.input_shape[-1])
  np.testing.assert_allclose(inputs.mean(0), 0, atol=1e-5)
  np.testing.assert_allclose(inputs.std(0), 1, atol=1e-5)


@pytest.mark.parametrize(
  ('key', 'values', 'takes'),
  [
    ('mean', (0.0,), '3 numbers'),
    ('mean', (0.0,) * 4, '3 numbers'),
    ('mean', 0.0, '3 numbers'),
    ('mean', ('a', 'b', 'c'), '3 numbers'),
    ('mean', (0.0, None, 0.0), '3 numbers'),
    ('std', (1.0, 1.0), '3 numbers, each above 0'),
    ('std', (1.0, 0.0, 1.0), '3 numbers, each above 0'),
    ('std', (1.0, -1.0, 1.0), '3 numbers, each above 0'),
  ],
)
def test_a_mean_or_a_std_that_does_not_fit_is_refused(key, values, takes):
  given = {'mean': (0.0,) * 3, 'std': (1.0,) * 3} | {key: values}
  with pytest.raises(config_lib.UserError) as caught:
    normalize.resolve(given, dataset(FEATURES))
  line = str(caught.value)
  assert line.startswith(f'config.data.normalize has {key} {values}; ')
  assert line.endswith(f'toy needs {takes}')
