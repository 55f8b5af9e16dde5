"""Datasets by name: the embedded ones, and any that TFDS has prepared.

dataset = sources.load('digits')
dataset.splits['train'].arrays['image']      # uint8 [1437, 8, 8, 1]
"""

from collections.abc import Callable
import dataclasses
import functools
import hashlib
import pathlib
import re

import numpy as np

from train import config as config_lib
from train import progress
from train.data import cache
from train.data import faults as faults_lib
from train.data import layout
from train.data import prepare
from train.data import records
from train.data import synthetic
from train.data import text

# What is larger when it is decoded stays in its files, and is decoded as it is
# read. Below, decoding once costs less than the first epoch.
CACHED_BYTES = 16 * 2**30
_CHUNK = 256  # Records decoded at once into the cache.
_NAME = re.compile(r'[a-z0-9_]+(/[\w.+-]+)?(:\d+\.\d+\.\d+)?')
# The keys of one example that the models read: pixels or numbers, and tokens.
INPUTS = ('image', 'features', 'tokens')
# What else a model is given, by these names, where the data has it: the length
# of each sequence, and what a decoder reads.
EXTRAS = ('lengths', 'decoder_tokens')
WINDOW = 128  # Characters of a text, unless config.data.sequence_length.


@dataclasses.dataclass(frozen=True)
class Split:
  """Examples key -> [m, ...], of which `rows` (None: all) belong to the split.

  `rows` keeps a held-out part from copying the memory map. `faults` (None:
  nothing) are damaged; in their places are the next ones that are whole. Of a
  `stand_in` the shapes and the sizes are right, and the values are not.
  """

  arrays: dict[str, np.ndarray]
  rows: np.ndarray | None = None
  faults: faults_lib.Faults | None = None
  stand_in: bool = False

  def __len__(self) -> int:
    if self.rows is not None:
      return len(self.rows)
    return len(next(iter(self.arrays.values())))

  @property
  def specs(self) -> dict[str, records.Spec]:
    """Key -> shape and dtype of one example's value."""
    return {
      key: records.Spec(array.shape[1:], array.dtype)
      for key, array in self.arrays.items()
    }

  @property
  def nbytes(self) -> int:
    """The size of all examples."""
    return len(self) * sum(spec.nbytes for spec in self.specs.values())

  def part(self, places: np.ndarray) -> 'Split':
    """The examples at `places` as a split of their own."""
    rows = places if self.rows is None else self.rows[places]
    return dataclasses.replace(self, rows=rows)

  def take(self, places: np.ndarray) -> dict[str, np.ndarray]:
    """The examples at `places`, each from 0 to len(self) - 1, in memory."""
    if self.faults is not None:
      places = self.faults.mend(self.rows, places)
    rows = places if self.rows is None else self.rows[places]
    return {key: array[rows] for key, array in self.arrays.items()}


@dataclasses.dataclass(frozen=True)
class Dataset:
  """A dataset's splits, and what a model needs to know of it.

  A split is a Split, or records.Records where the set is larger than
  CACHED_BYTES: both have len, specs, nbytes, faults, part and take.
  """

  name: str
  splits: dict[str, Split | records.Records]
  # Of 'label', or of each of 'targets'; None: they are numbers.
  classes: tuple[str, ...] | None = None
  vocabulary: tuple[str, ...] | None = None  # What the tokens stand for.
  sequence_length: int | None = None  # Where it can be chosen.

  @property
  def input_key(self) -> str:
    """'image', 'features' for rows of numbers, or 'tokens'."""
    specs = self.splits['train'].specs
    return next(key for key in INPUTS if key in specs)

  @property
  def input_shape(self) -> tuple[int, ...]:
    """The shape of one input: (H, W, C), (D,), or (T,) of tokens."""
    return self.splits['train'].specs[self.input_key].shape

  def say_damage(self, say: Callable[[str], None]):
    """How much was passed over, if any; to be called by all processes."""
    faults_lib.say_sum(self.splits.values(), say)

  def divided(self, held: np.ndarray, kept: np.ndarray) -> 'Dataset':
    """With these places of train as validation, and as train.

    Its own validation split becomes test if it has none, and else gives way.
    """
    train = self.splits['train']
    parts = {'validation': train.part(held), 'train': train.part(kept)}
    if 'test' not in self.splits:
      parts['test'] = self.splits['validation']
    return dataclasses.replace(self, splits=self.splits | parts)


def load(
  name: str,
  data_dir: str | None = None,
  *,
  image_size: int | None = None,
  sequence_length: int | None = None,
  on_error: str = 'raise',
  say: Callable[[str], None] = progress.say,
) -> Dataset:
  """The dataset of that name, decoded on first use, or as it is read.

  Args:
    name: an embedded dataset, or TFDS's 'name', 'name/config', 'name:1.2.3'.
    data_dir: where TFDS has prepared it; None is TFDS_DATA_DIR, then TFDS's
      own folder. Embedded datasets are prepared in the cache, or here.
    image_size: S: each image's shorter side is resized to S and the middle
      taken, uint8 [S, S, C]. None: images stay as they are.
    sequence_length: T: of the windows of a text, or of synthetic sequences.
    on_error: what a damaged record is: 'raise', an error; or 'skip', passed
      over, by the rule of faults.py.
    say: takes lines for the user.

  Raises:
    UserError: no such dataset, it is not prepared, or it holds something else
      than a text, or images or rows of numbers with a label; or image_size is
      missing, or given where there are no images; or sequence_length is given
      where it has no meaning, or too long; or, while records are decoded, one
      that is broken or has a label that is no class.
  """
  check_name(name)
  if name in synthetic.DATASETS:
    return _synthetic(name, image_size, sequence_length)
  builder = prepare.find_or_prepare(name, data_dir, say)
  if set(builder.info.features) == {'text'}:
    return _text(name, builder, image_size, sequence_length)
  specs, classes = layout.read(
    name, builder.info.features, image_size, sequence_length
  )
  info = pathlib.Path(builder.data_path) / 'dataset_info.json'
  # Two folders may hold the same version from different files.
  fingerprint = hashlib.sha256(info.read_bytes()).hexdigest()[:8]
  if image_size:
    fingerprint += f'-{image_size}'
  folder = cache.root() / 'decoded' / builder.info.full_name / fingerprint
  sizes = {
    split: builder.info.splits[split].num_examples
    for split in ('train', 'validation', 'test')
    if split in builder.info.splits
  }
  if 'train' not in sizes or len(sizes) < 2:
    raise config_lib.UserError(
      f'config.data.name is {name!r}, which has the splits '
      f'{", ".join(builder.info.splits)}; training needs train, and test or '
      'validation'
    )
  example_bytes = sum(spec.nbytes for spec in specs.values())
  cached = sum(sizes.values()) * example_bytes <= CACHED_BYTES

  def open_records(split: str, say=None) -> records.Records:
    faults = None
    if on_error == 'skip':
      faults = faults_lib.Faults(name, split, sizes[split], say)
    source = _source(name, builder, split)
    opened = records.Records(
      name, split, source, specs, classes, image_size, faults=faults
    )
    opened.check_files()
    return opened

  splits = {}
  for split in sizes:
    # ImageNet's test split has none: a run must not end in its error.
    may_lack_labels = split == 'test' and 'validation' in sizes
    if may_lack_labels and not open_records(split).has_labels():
      say(f'the test split of {name} has no labels and is left out')
      continue
    if cached:
      faults = faults_lib.Faults(name, split, sizes[split], say)
      read = functools.partial(open_records, split)
      splits[split] = _open_cached(folder / split, read, faults, say)
    else:
      splits[split] = open_records(split, say)
  return Dataset(name, splits, classes)


def check_name(name: str):
  """Raises UserError where no dataset can have that name."""
  if not _NAME.fullmatch(name):
    raise config_lib.UserError(
      f'config.data.name is {name!r}; it takes a name as digits, mnist or '
      'mnist:3.0.1'
    )


def hold_out(dataset: Dataset, fraction: float) -> Dataset:
  """The dataset with `fraction` of train as validation.

  Chosen by a fixed key: runs with other seeds are compared on the same ones.
  """
  if not fraction:
    return dataset
  examples = len(dataset.splits['train'])
  held = round(fraction * examples)
  if not 0 < held < examples:
    raise config_lib.UserError(
      f'config.data.validation_fraction is {fraction}, which holds out {held} '
      f'of {examples} training examples; both parts must have some'
    )
  order = np.random.default_rng(0).permutation(examples)
  return dataset.divided(np.sort(order[:held]), np.sort(order[held:]))


def _synthetic(
  name: str, image_size: int | None, sequence_length: int | None
) -> Dataset:
  """Sequences made by a rule."""
  refuse_image_size(name, image_size)
  make, default, least, most = synthetic.DATASETS[name]
  length = default if sequence_length is None else sequence_length
  if not least <= length <= most:
    raise config_lib.UserError(
      f'config.data.sequence_length is {length}; {name} takes {least} to {most}'
    )
  splits, vocabulary = make(length)
  return Dataset(
    name,
    {split: Split(arrays) for split, arrays in splits.items()},
    classes=vocabulary,
    vocabulary=vocabulary,
    sequence_length=length,
  )


def _text(
  name: str, builder, image_size: int | None, sequence_length: int | None
) -> Dataset:
  """Windows of the text of each split; a target is the character after."""
  refuse_image_size(name, image_size)
  length = WINDOW if sequence_length is None else sequence_length
  texts = {
    split: text.read(name, builder, split)
    for split in ('train', 'validation', 'test')
    if split in builder.info.splits
  }
  least = min(map(len, texts.values()))
  if least <= length:
    raise config_lib.UserError(
      f'config.data.sequence_length is {length}; the shortest split of {name} '
      f'has {least} characters'
    )
  vocabulary = text.vocabulary(texts)
  return Dataset(
    name,
    {
      split: Split(text.windows(text.encode(whole, vocabulary), length))
      for split, whole in texts.items()
    },
    classes=vocabulary,
    vocabulary=vocabulary,
    sequence_length=length,
  )


def refuse_image_size(name: str, image_size: int | None):
  """Raises UserError where sequences are asked for in a size of images."""
  if image_size:
    raise config_lib.UserError(
      f'config.data.image_size is {image_size}; {name} holds sequences, so it '
      'must be None'
    )


def _source(name: str, builder, split: str):
  """TFDS's data source over the split's records, as bytes."""
  import tensorflow_datasets as tfds

  try:
    return builder.as_data_source(
      split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
    )
  except NotImplementedError:
    raise config_lib.UserError(
      f'config.data.name is {name!r}, whose files at {builder.data_path} are '
      f'{builder.info.file_format}, which needs TensorFlow; prepare it with '
      'file_format="array_record"'
    ) from None


def _open_cached(
  path: pathlib.Path,
  read: Callable[[], records.Records],
  faults: faults_lib.Faults,
  say: Callable[[str], None],
) -> Split:
  """The split from the cache, and what was damaged when it was decoded."""

  arrays = cache.open_or_decode(path, lambda: _decode(read()), say)
  damaged = cache.damaged(path)
  # A run that may not pass over them says so here; and whole ones may have
  # been put in their place.
  if damaged and read().find_damaged(sorted(damaged)) != set(damaged):
    say(f'the data cache {path} is made again: its files have changed')
    cache.remove(path)
    arrays = cache.open_or_decode(path, lambda: _decode(read()), say)
    damaged = cache.damaged(path)
  for rows, why in faults_lib.together(damaged):
    faults.add(rows, why)
  return Split(arrays, faults=faults if damaged else None)


def _decode(split: records.Records):
  """The number of examples, and an iterator over them, as the cache takes."""

  def examples():
    for start in range(0, len(split), _CHUNK):
      rows = np.arange(start, min(start + _CHUNK, len(split)))
      chunk = split.take(rows)
      for i, whole in enumerate(faults_lib.are_whole(split, rows)):
        if whole:
          yield {key: values[i] for key, values in chunk.items()}
        else:
          yield split.faults.why[start + i]

  return len(split), examples()
