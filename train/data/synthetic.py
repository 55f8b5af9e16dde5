"""Sequences that are made by a rule, the same on every machine.

Each function gives the splits, split -> key -> [n, ...], and the vocabulary of
the tokens (None where the inputs are numbers).

Shapes: n examples, T time.
"""

from collections.abc import Callable

import numpy as np

Arrays = dict[str, np.ndarray]

PADDING, START = 0, 1  # Tokens of `reversal`.
_SYMBOLS = tuple('abcdefghijklmnop')


def adding(length: int) -> tuple[dict[str, Arrays], None]:
  """The adding problem: the sum of the two numbers that are marked.

  Hochreiter & Schmidhuber (1997, section 5.4), in the form of Le, Jaitly &
  Hinton (2015, section 4.1): 'features' float32 [n, T, 2] are numbers from 0 to
  1 and marks, one in each half; 'label' float32 [n] is the sum. Always saying 1
  has a mean squared error of 1/6.
  """

  def split(seed: int, n: int) -> Arrays:
    random = np.random.default_rng([5, seed])
    numbers = random.random((n, length), np.float32)
    half = length // 2
    places = np.stack(
      [random.integers(0, half, n), random.integers(half, length, n)], axis=1
    )
    rows = np.arange(n)[:, None]
    marks = np.zeros_like(numbers)
    marks[rows, places] = 1
    return {
      'features': np.stack([numbers, marks], axis=-1),
      'label': numbers[rows, places].sum(1),
    }

  return {'train': split(0, 50_000), 'test': split(1, 2_000)}, None


def reversal(length: int) -> tuple[dict[str, Arrays], tuple[str, ...]]:
  """Words of 1 to T letters, and the same backwards, for sequence to sequence.

  'tokens' int32 [n, T] end in PADDING after 'lengths' int32 [n]; 'targets' is
  the word reversed, -1 after its end; 'decoder_tokens' is START and then
  all targets but the last.
  """

  def split(seed: int, n: int) -> Arrays:
    random = np.random.default_rng([6, seed])
    lengths = random.integers(1, length + 1, n).astype(np.int32)
    letters = random.integers(2, 2 + len(_SYMBOLS), (n, length))
    place = np.arange(length)
    inside = place < lengths[:, None]
    backwards = np.where(inside, lengths[:, None] - 1 - place, place)
    reverse = np.take_along_axis(letters, backwards, axis=1)
    shifted = np.concatenate([np.full((n, 1), START), reverse[:, :-1]], axis=1)
    return {
      'tokens': np.where(inside, letters, PADDING).astype(np.int32),
      'lengths': lengths,
      'targets': np.where(inside, reverse, -1).astype(np.int32),
      'decoder_tokens': np.where(inside, shifted, PADDING).astype(np.int32),
    }

  vocabulary = ('<padding>', '<start>', *_SYMBOLS)
  return {'train': split(0, 20_000), 'test': split(1, 2_000)}, vocabulary


def mackey_glass(length: int) -> tuple[dict[str, Arrays], None]:
  """A chaotic time series: T values, and the one 6 steps after the last.

  x' = 0.2 x(t - 17) / (1 + x(t - 17)^10) - 0.1 x of Mackey & Glass (1977), at
  whole t, by Runge-Kutta with steps of 0.1 from x = 1.2, the first 500 values
  left out; 6 ahead as Jang (1993, section V). 'features' float32 [n, T, 1],
  'label' float32 [n]. No value is in both splits: test is the later part.
  """
  series = _mackey_glass(500 + 5_000)[500:]
  ahead = 6

  def split(values: np.ndarray) -> Arrays:
    starts = np.arange(len(values) - length - ahead + 1)
    places = starts[:, None] + np.arange(length)
    return {
      'features': values[places][..., None].astype(np.float32),
      'label': values[starts + length - 1 + ahead].astype(np.float32),
    }

  return {'train': split(series[:4_000]), 'test': split(series[4_000:])}, None


def _mackey_glass(count: int) -> np.ndarray:
  """x at t = 0, 1, ..., count - 1, float64; x is 1.2 before 0."""
  per_step, delay = 10, 17 * 10
  h = 1 / per_step

  def slope(x: float, late: float) -> float:
    return 0.2 * late / (1 + late**10) - 0.1 * x

  values = [1.2] * (delay + 1)
  for _ in range((count - 1) * per_step):
    x, late, later = values[-1], values[-1 - delay], values[-delay]
    middle = (late + later) / 2
    k1 = slope(x, late)
    k2 = slope(x + h / 2 * k1, middle)
    k3 = slope(x + h / 2 * k2, middle)
    k4 = slope(x + h * k3, later)
    values.append(x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4))
  return np.array(values[delay::per_step])


# name -> (what makes it, the default of config.data.sequence_length, the least
# and the most).
DATASETS: dict[str, tuple[Callable, int, int, int]] = {
  'adding': (adding, 100, 2, 1_000),
  'reversal': (reversal, 10, 1, 100),
  'mackey_glass': (mackey_glass, 32, 1, 500),
}
