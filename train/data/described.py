"""Datasets by their shapes and sizes alone: enough to plan with, not to train.

What is embedded, made by a rule, or a text that is there, is loaded; of all
others nothing is read, downloaded or decoded.
"""

from collections.abc import Callable

import numpy as np

from train import config as config_lib
from train import progress
from train.data import embedded
from train.data import layout
from train.data import prepare
from train.data import records
from train.data import sources
from train.data import synthetic
from train.data import text

# How many examples a split has, where it is not prepared and cannot be asked:
# tensorflow.org/datasets/catalog. ImageNet's test split has no labels.
EXAMPLES = {
  'mnist': {'train': 60_000, 'test': 10_000},
  'fashion_mnist': {'train': 60_000, 'test': 10_000},
  'cifar10': {'train': 50_000, 'test': 10_000},
  'cifar100': {'train': 50_000, 'test': 10_000},
  'imagenet2012': {'train': 1_281_167, 'validation': 50_000},
}
# Of tiny_shakespeare: characters of each split, and the different ones.
_SHAKESPEARE = {'train': 1_003_854, 'validation': 55_770, 'test': 55_770}
_CHARACTERS = 65


def describe(
  data: config_lib.Data, say: Callable[[str], None] = progress.say
) -> sources.Dataset:
  """The dataset that config.data names, with stand-ins for splits.

  Raises:
    UserError: as sources.load does, but that it need not be prepared where its
      sizes are known.
  """
  sources.check_name(data.name)
  if data.name in embedded.BUILDERS or data.name in synthetic.DATASETS:
    return _loaded(data, say)
  builder, prepared = prepare.find(data.name, data.data_dir)
  name = data.name.partition(':')[0]
  if set(builder.info.features) == {'text'}:
    if not prepared and name == 'tiny_shakespeare':
      return _shakespeare(data)
    return _loaded(data, say)
  sizes = EXAMPLES.get(name)
  if prepared:
    sizes = {
      split: builder.info.splits[split].num_examples
      for split in ('train', 'validation', 'test')
      if split in builder.info.splits
    }
  if sizes is None:
    raise prepare.not_prepared(data.name, builder)
  specs, classes = layout.read(
    data.name, builder.info.features, data.image_size, data.sequence_length
  )
  splits = {
    split: _stand_in(data, split, count, specs, classes)
    for split, count in sizes.items()
  }
  if sum(s.nbytes for s in splits.values()) <= sources.CACHED_BYTES:
    splits = {
      split: sources.Split(_arrays(specs, sizes[split], classes), stand_in=True)
      for split in splits
    }
  return sources.Dataset(data.name, splits, classes)


def _loaded(data: config_lib.Data, say) -> sources.Dataset:
  return sources.load(
    data.name,
    data.data_dir,
    image_size=data.image_size,
    sequence_length=data.sequence_length,
    say=say,
  )


def _stand_in(data, split, count, specs, classes) -> records.Records:
  return records.Records(
    data.name,
    split,
    range(count),
    specs,
    classes,
    data.image_size,
    stand_in=True,
  )


def _arrays(specs, count, classes) -> dict[str, np.ndarray]:
  """Arrays of that many examples that take no memory; classes in turn."""
  arrays = {
    key: np.broadcast_to(np.zeros((), spec.dtype), (count, *spec.shape))
    for key, spec in specs.items()
  }
  if classes:
    arrays['label'] = np.arange(count, dtype=np.int32) % len(classes)
  return arrays


def _shakespeare(data: config_lib.Data) -> sources.Dataset:
  sources.refuse_image_size(data.name, data.image_size)
  length = data.sequence_length or sources.WINDOW
  vocabulary = tuple(map(chr, range(_CHARACTERS)))
  splits = {}
  for split, characters in _SHAKESPEARE.items():
    tokens = np.broadcast_to(np.zeros((), np.uint8), (characters,))
    splits[split] = sources.Split(text.windows(tokens, length), stand_in=True)
  return sources.Dataset(
    data.name,
    splits,
    classes=vocabulary,
    vocabulary=vocabulary,
    sequence_length=length,
  )
