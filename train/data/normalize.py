"""How inputs are scaled: one mean and one std a channel, (x - mean) / std."""

from collections.abc import Iterator

import numpy as np

from train import config as config_lib
from train import signals
from train.data import records
from train.data import sources

# Of Records, whose examples cost milliseconds each, only so many are looked at.
# The mean of as many photographs is known to a hundredth of their std.
_MOST_RECORDS = 8192
_CHUNK = 128  # Photographs of which are 150 MB as float64.


def resolve(
  normalize: str | config_lib.Block | None, dataset: sources.Dataset
) -> config_lib.Block | None:
  """{'mean': (...), 'std': (...)} for (x - mean) / std, one number a channel.

  'mean_std' takes the training split's own; 'unit' and 'symmetric' map a
  pixel's range 0..255, or a feature's range in the training split, to [0, 1]
  and [-1, 1]. Where a channel is constant, std is 1.

  Of a stand-in, which has no values, any numbers: they make the same program.
  Of records.Records, 8,192 examples chosen evenly stand for all: an estimate.
  Tokens are not numbers, and None for every word.

  Raises:
    UserError: a mean or std of another length than the channels, or a std of 0.
  """
  channels = dataset.input_shape[-1]
  tokens = dataset.input_key == 'tokens'
  if tokens and isinstance(normalize, dict):
    raise config_lib.UserError(
      f'config.data.normalize is {normalize}; {dataset.name} holds tokens, '
      'which are not scaled'
    )
  if normalize is None or tokens:
    return None
  if isinstance(normalize, dict):
    for key, values in normalize.items():
      if (
        not isinstance(values, tuple)
        or len(values) != channels
        or not all(isinstance(v, int | float) for v in values)
        or (key == 'std' and not all(v > 0 for v in values))
      ):
        raise config_lib.UserError(
          f'config.data.normalize has {key} {values}; {dataset.name} needs '
          f'{channels} numbers{", each above 0" if key == "std" else ""}'
        )
    return normalize
  train = dataset.splits['train']
  pixels = train.specs[dataset.input_key].dtype == np.uint8
  if train.stand_in and (normalize == 'mean_std' or not pixels):
    mean, std = np.full(channels, 1.0), np.full(channels, 3.0)
  elif normalize == 'mean_std':
    mean, std = _mean_std(train, dataset.input_key)
  else:
    if pixels:
      low, high = np.zeros(channels), np.full(channels, 255.0)
    else:
      low, high = _range(train, dataset.input_key)
    mean, std = low, high - low
    if normalize == 'symmetric':
      mean, std = (low + high) / 2, (high - low) / 2
  if not (np.isfinite(mean).all() and np.isfinite(std).all()):
    raise config_lib.UserError(
      f'config.data.name is {dataset.name!r}, whose {dataset.input_key} hold '
      'nan or infinite values'
    )
  std = np.where(std > 0, std, 1.0)
  return {'mean': tuple(mean.tolist()), 'std': tuple(std.tolist())}


def _chunks(split, key: str) -> Iterator[np.ndarray]:
  """The split's inputs, 128 at a time, as float64 [m, C]."""
  places = np.arange(len(split))
  if isinstance(split, records.Records) and len(split) > _MOST_RECORDS:
    places = np.arange(_MOST_RECORDS) * len(split) // _MOST_RECORDS
  for start in range(0, len(places), _CHUNK):
    signals.check('stopped before training began; nothing to save')
    inputs = split.take(places[start : start + _CHUNK])[key]
    yield inputs.reshape(-1, inputs.shape[-1]).astype(np.float64)


def _mean_std(split, key: str) -> tuple[np.ndarray, np.ndarray]:
  """Both from one look at the inputs (Chan, Golub & LeVeque 1979)."""
  count, mean, squares = 0, 0.0, 0.0
  for chunk in _chunks(split, key):
    its_mean = chunk.mean(0)
    apart = its_mean - mean
    total = count + len(chunk)
    squares += ((chunk - its_mean) ** 2).sum(0)
    squares += apart**2 * (count * len(chunk) / total)
    mean += apart * (len(chunk) / total)
    count = total
  return mean, np.sqrt(squares / count)


def _range(split, key: str) -> tuple[np.ndarray, np.ndarray]:
  chunks = [(c.min(0), c.max(0)) for c in _chunks(split, key)]
  lows, highs = zip(*chunks, strict=True)
  return np.min(lows, 0), np.max(highs, 0)
