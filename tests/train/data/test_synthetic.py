"""Synthetic sequences keep the rule that they are made by."""

import numpy as np
import pytest
import scipy.integrate

from train import config as config_lib
from train.data import sources
from train.data import synthetic


@pytest.mark.parametrize('name', synthetic.DATASETS)
def test_a_synthetic_dataset_is_the_same_each_time(name):
  once, again = sources.load(name), sources.load(name)
  for split in ('train', 'test'):
    for key, array in once.splits[split].arrays.items():
      assert np.array_equal(array, again.splits[split].arrays[key])


def test_the_label_of_adding_is_the_sum_of_the_two_marked_numbers():
  arrays = sources.load('adding', sequence_length=20).splits['test'].arrays
  assert arrays['features'].shape == (2_000, 20, 2)
  for features, label in zip(arrays['features'], arrays['label'], strict=True):
    numbers, marks = features.T
    assert set(marks) == {0, 1}
    assert marks[:10].sum() == marks[10:].sum() == 1
    assert label == pytest.approx(numbers[marks == 1].sum(), abs=1e-6)
  # The sum of two uniform numbers: mean 1, variance 1/6.
  assert np.square(arrays['label'] - 1).mean() == pytest.approx(1 / 6, abs=0.01)


def test_no_test_sequence_of_adding_is_in_training():
  splits = sources.load('adding', sequence_length=4).splits
  train, test = (
    {row.tobytes() for row in splits[name].arrays['features']}
    for name in ('train', 'test')
  )
  assert not train & test


def test_reversal_asks_for_the_word_backwards():
  dataset = sources.load('reversal', sequence_length=7)
  arrays = dataset.splits['test'].arrays
  assert set(arrays['lengths']) == set(range(1, 8))
  for row in range(200):
    n = arrays['lengths'][row]
    word = arrays['tokens'][row][:n].tolist()
    assert min(word) >= 2
    assert max(word) < len(dataset.vocabulary) == 18
    assert arrays['tokens'][row][n:].tolist() == [0] * (7 - n)
    assert arrays['targets'][row].tolist() == word[::-1] + [-1] * (7 - n)
    shifted = [synthetic.START, *word[::-1][:-1]]
    assert arrays['decoder_tokens'][row].tolist() == shifted + [0] * (7 - n)


def test_mackey_glass_follows_its_equation():
  values = synthetic._mackey_glass(35)
  # x(t - 17) is 1.2 until t = 17, so that x' = c - 0.1 x.
  c = 0.2 * 1.2 / (1 + 1.2**10)

  def first(t):
    return 10 * c + (1.2 - 10 * c) * np.exp(-0.1 * t)

  t = np.arange(18)
  np.testing.assert_allclose(values[:18], first(t), rtol=1e-9)

  def slope(t, x):
    late = first(t - 17)
    return 0.2 * late / (1 + late**10) - 0.1 * x

  found = scipy.integrate.solve_ivp(
    slope, (17, 34), [first(17)], t_eval=np.arange(17, 35), rtol=1e-10,
    atol=1e-12,
  )  # fmt: skip
  # Between two steps of 0.1 the late value is interpolated.
  np.testing.assert_allclose(values[17:35], found.y[0], rtol=2e-5)


def test_a_window_of_the_series_ends_six_steps_before_its_label():
  arrays = sources.load('mackey_glass', sequence_length=9).splits['test'].arrays
  # The label of a window is the last value of the window six further on.
  np.testing.assert_array_equal(
    arrays['label'][:-6], arrays['features'][6:, -1, 0]
  )


@pytest.mark.parametrize(
  ('name', 'length', 'takes'),
  [('adding', 1, '2 to 1000'), ('reversal', 101, '1 to 100')],
)
def test_a_length_that_cannot_be_is_refused(name, length, takes):
  with pytest.raises(config_lib.UserError) as error:
    sources.load(name, sequence_length=length)
  assert str(error.value) == (
    f'config.data.sequence_length is {length}; {name} takes {takes}'
  )


def test_sequences_have_no_image_size():
  with pytest.raises(config_lib.UserError, match='image_size is 32; adding'):
    sources.load('adding', image_size=32)
