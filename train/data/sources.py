"""Datasets by name: the embedded ones, and any that TFDS has prepared.

dataset = sources.load('digits')
dataset.splits['train'].arrays['image']      # uint8 [1437, 8, 8, 1]
"""

from collections.abc import Callable
import dataclasses
import hashlib
import pathlib
import re

import numpy as np

from train import config as config_lib
from train import progress
from train.data import cache
from train.data import prepare

_NAME = re.compile(r'[a-z0-9_]+(/[\w.+-]+)?(:\d+\.\d+\.\d+)?')
# The keys of one example that the models read.
INPUTS = ('image', 'features')


@dataclasses.dataclass(frozen=True)
class Split:
  """Examples key -> [m, ...], of which `rows` (None: all) belong to the split.

  `rows` keeps a held-out part from copying the memory map.
  """

  arrays: dict[str, np.ndarray]
  rows: np.ndarray | None = None

  def __len__(self) -> int:
    if self.rows is not None:
      return len(self.rows)
    return len(next(iter(self.arrays.values())))

  def take(self, places: np.ndarray) -> dict[str, np.ndarray]:
    """The examples at `places`, each from 0 to len(self) - 1, in memory."""
    rows = places if self.rows is None else self.rows[places]
    return {key: array[rows] for key, array in self.arrays.items()}


@dataclasses.dataclass(frozen=True)
class Dataset:
  """A dataset's splits, and what a model needs to know of it."""

  name: str
  splits: dict[str, Split]
  classes: tuple[str, ...] | None = None  # None: the label is a number.

  @property
  def input_key(self) -> str:
    """'image', or 'features' for rows of numbers."""
    arrays = self.splits['train'].arrays
    return next(key for key in INPUTS if key in arrays)

  @property
  def input_shape(self) -> tuple[int, ...]:
    """The shape of one input: (H, W, C) or (D,)."""
    return self.splits['train'].arrays[self.input_key].shape[1:]


def load(
  name: str,
  data_dir: str | None = None,
  *,
  say: Callable[[str], None] = progress.say,
) -> Dataset:
  """The dataset of that name, decoded on first use.

  Args:
    name: an embedded dataset, or TFDS's 'name', 'name/config', 'name:1.2.3'.
    data_dir: where TFDS has prepared it; None is TFDS_DATA_DIR, then TFDS's
      own folder. Embedded datasets are prepared in the cache, or here.
    say: takes lines for the user.

  Raises:
    UserError: no such dataset, it is not prepared, or it holds something else
      than images or rows of numbers with a label.
  """
  if not _NAME.fullmatch(name):
    raise config_lib.UserError(
      f'config.data.name is {name!r}; it takes a name as digits, mnist or '
      'mnist:3.0.1'
    )
  builder = prepare.find_or_prepare(name, data_dir, say)
  input_key, classes = _layout(name, builder.info.features)
  info = pathlib.Path(builder.data_path) / 'dataset_info.json'
  # Two folders may hold the same version from different files.
  print_ = hashlib.sha256(info.read_bytes()).hexdigest()[:8]
  folder = cache.root() / 'decoded' / builder.info.full_name / print_
  splits = {}
  for split in ('train', 'validation', 'test'):
    if split in builder.info.splits:
      arrays = cache.open_or_decode(
        folder / split, lambda s=split: _decode(builder, s, input_key), say
      )
      splits[split] = Split(arrays)
  if 'train' not in splits or len(splits) < 2:
    raise config_lib.UserError(
      f'config.data.name is {name!r}, which has the splits '
      f'{", ".join(builder.info.splits)}; training needs train, and test or '
      'validation'
    )
  return Dataset(name, splits, classes)


def hold_out(dataset: Dataset, fraction: float) -> Dataset:
  """The dataset with `fraction` of train as validation, by a fixed key.

  A validation split of the dataset's own becomes test where there is no test
  split, and else gives way.

  The key is not the run's seed: runs with other seeds are compared on the same
  validation examples.
  """
  if not fraction:
    return dataset
  train = dataset.splits['train']
  held = round(fraction * len(train))
  if not 0 < held < len(train):
    raise config_lib.UserError(
      f'config.data.validation_fraction is {fraction}, which holds out {held} '
      f'of {len(train)} training examples; both parts must have some'
    )
  order = np.random.default_rng(0).permutation(len(train))
  parts = {
    'validation': Split(train.arrays, np.sort(order[:held])),
    'train': Split(train.arrays, np.sort(order[held:])),
  }
  if 'test' not in dataset.splits:
    parts['test'] = dataset.splits['validation']
  return Dataset(dataset.name, dataset.splits | parts, dataset.classes)


def _layout(name: str, features) -> tuple[str, tuple[str, ...] | None]:
  """The input's key and the classes' names, None where the label is a number.

  Raises:
    UserError: the examples are of another form.
  """
  import tensorflow_datasets as tfds

  for key in INPUTS:
    if key in features and 'label' in features:
      shape = features[key].shape
      if not isinstance(shape, tuple) or not shape or None in shape:
        raise config_lib.UserError(
          f'config.data.name is {name!r}, whose {key} has the shape {shape}; '
          'training needs one shape for all examples, (H, W, C) or (D,)'
        )
      label = features['label']
      if (
        label.shape != () or not _numbers(label) or not _numbers(features[key])
      ):
        raise config_lib.UserError(
          f'config.data.name is {name!r}, whose {key} is {features[key]} and '
          f'whose label is {label}; training needs numbers, one a label'
        )
      if isinstance(label, tfds.features.ClassLabel):
        return key, tuple(label.names)
      return key, None
  raise config_lib.UserError(
    f'config.data.name is {name!r}, whose examples hold '
    f'{", ".join(features)}; training needs image or features, and label'
  )


def _numbers(feature) -> bool:
  """Whether TFDS gives numbers for this feature."""
  return np.issubdtype(np.dtype(feature.np_dtype), np.number)


def _decode(builder, split: str, input_key: str):
  """The number of examples, and an iterator over {input_key, 'label'}."""
  try:
    source = builder.as_data_source(split)
  except NotImplementedError:
    raise config_lib.UserError(
      f'config.data.name is {builder.name!r}, whose files at '
      f'{builder.data_path} are {builder.info.file_format}, which needs '
      'TensorFlow; prepare it with file_format="array_record"'
    ) from None

  def examples():
    for example in source:
      inputs, label = np.asarray(example[input_key]), example['label']
      if inputs.dtype != np.uint8:
        inputs = inputs.astype(np.float32)
      whole = np.issubdtype(np.asarray(label).dtype, np.integer)
      yield {
        input_key: inputs,
        'label': np.asarray(label, np.int32 if whole else np.float32),
      }

  return len(source), examples()
