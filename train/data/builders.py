"""MNIST, Fashion-MNIST, CIFAR and Tiny Shakespeare as TFDS builders of ours.

Names, versions, features, splits and the order of the records are TFDS's own,
so that a folder that either prepared serves both. TFDS's builders need
TensorFlow to unpack the original files and to encode images; these do not.
"""

from collections.abc import Callable
from collections.abc import Collection
from collections.abc import Iterator
import gzip
import pathlib
import struct
import tarfile
import time
import zlib

import numpy as np
import tensorflow_datasets as tfds

from train import config as config_lib
from train import signals
from train.data import embedded

_REPORT_SECONDS = 5
# A split: how many examples, and what makes the i-th of them.
_Split = tuple[int, Callable[[int], dict]]


class _Original(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """Yields what `_read` makes of the original files.

  Attributes:
    files: file name -> path, as downloads.fetch gives them; set to prepare.
    say: takes lines for the user.
  """

  files: dict[str, pathlib.Path]
  say: Callable[[str], None] = staticmethod(lambda line: None)
  homepage: str
  supervised_keys: tuple[str, str] | None = ('image', 'label')

  def _features(self) -> dict:
    raise NotImplementedError

  def _read(self) -> dict[str, _Split]:
    """The splits; every check is made here, before anything is written."""
    raise NotImplementedError

  def _info(self):
    return tfds.core.DatasetInfo(
      builder=self,
      description=self.__doc__,
      features=tfds.features.FeaturesDict(self._features()),
      supervised_keys=self.supervised_keys,
      homepage=self.homepage,
    )

  def _split_generators(self, dl_manager):
    del dl_manager  # The files are there.
    return {
      split: self._examples(split, count, example)
      for split, (count, example) in self._read().items()
    }

  def _examples(self, split: str, count: int, example) -> Iterator:
    reported = time.monotonic()
    for i in range(count):
      # TFDS orders the records by a hash of this key: i, as in its own builder.
      yield i, example(i)
      signals.check('stopped before training began; nothing to save')
      if time.monotonic() - reported > _REPORT_SECONDS:
        reported = time.monotonic()
        self.say(f'preparing {self.name} {split}: {i + 1:,} of {count:,}')

  def _generate_examples(self):
    raise NotImplementedError('_split_generators yields the examples itself')


class Mnist(_Original, skip_registration=True):
  """70,000 handwritten digits, 28x28 (LeCun et al. 1998)."""

  name = 'mnist'
  VERSION = tfds.core.Version('3.0.1')
  homepage = 'http://yann.lecun.com/exdb/mnist/'

  def _label(self):
    return tfds.features.ClassLabel(num_classes=10)

  def _features(self):
    return {
      'image': tfds.features.Image(shape=(28, 28, 1)),
      'label': self._label(),
    }

  def _read(self):
    splits = {}
    for split, stem in (('train', 'train'), ('test', 't10k')):
      image_file = self.files[f'{stem}-images-idx3-ubyte.gz']
      label_file = self.files[f'{stem}-labels-idx1-ubyte.gz']
      images, labels = _idx(image_file, 3), _idx(label_file, 1)
      if images.shape[1:] != (28, 28) or not len(images):
        raise _damaged(
          image_file,
          f'it has the shape {images.shape}, where {self.name} has (n, 28, 28)',
        )
      if len(labels) != len(images):
        raise _damaged(
          label_file, f'it has {len(labels):,} labels of {len(images):,} images'
        )
      _check_labels(label_file, labels, 10)
      splits[split] = _images({'label': labels}, images)
    return splits


class FashionMnist(Mnist, skip_registration=True):
  """70,000 pictures of clothes, 28x28 (Xiao et al. 2017)."""

  name = 'fashion_mnist'
  homepage = 'https://github.com/zalandoresearch/fashion-mnist'

  def _label(self):
    return tfds.features.ClassLabel(
      names=[
        'T-shirt/top', 'Trouser', 'Pullover', 'Dress', 'Coat', 'Sandal',
        'Shirt', 'Sneaker', 'Bag', 'Ankle boot',
      ]
    )  # fmt: skip


class Cifar10(_Original, skip_registration=True):
  """60,000 photographs of 10 classes, 32x32 (Krizhevsky 2009)."""

  name = 'cifar10'
  VERSION = tfds.core.Version('3.0.2')
  homepage = 'https://www.cs.toronto.edu/~kriz/cifar.html'
  archive = 'cifar-10-binary.tar.gz'
  folder = 'cifar-10-batches-bin'
  members = {
    'train': tuple(f'data_batch_{i}.bin' for i in range(1, 6)),
    'test': ('test_batch.bin',),
  }
  # As the bytes before an image: key, number of classes, file of their names.
  labels = (('label', 10, 'batches.meta.txt'),)

  def _features(self):
    return {
      'id': tfds.features.Text(),
      'image': tfds.features.Image(shape=(32, 32, 3)),
    } | {
      key: tfds.features.ClassLabel(num_classes=count)
      for key, count, _ in self.labels
    }

  def _read(self):
    path = self.files[self.archive]
    wanted = [file for _, _, file in self.labels]
    wanted += [file for files in self.members.values() for file in files]
    found = _unpack(path, {f'{self.folder}/{file}' for file in wanted})
    for key, count, file in self.labels:
      names = found[f'{self.folder}/{file}'].decode('utf-8', 'replace').split()
      if len(set(names)) != count or len(names) != count:
        raise _damaged(path, f'{file} has {len(set(names))} names of {count}')
      self.info.features[key].names = names
    return {
      split: self._split(path, split, files, found)
      for split, files in self.members.items()
    }

  def _split(self, path, split: str, files, found) -> _Split:
    width = len(self.labels) + 32 * 32 * 3
    for file in files:
      size = len(found[f'{self.folder}/{file}'])
      if not size or size % width:
        raise _damaged(
          path, f'{file} has {size:,} bytes, which is not a multiple of {width}'
        )
    data = b''.join(found[f'{self.folder}/{file}'] for file in files)
    rows = np.frombuffer(data, np.uint8).reshape(-1, width)
    labels = {}
    for column, (key, count, _) in enumerate(self.labels):
      labels[key] = rows[:, column]
      _check_labels(path, labels[key], count)
    pixels = rows[:, len(self.labels) :].reshape(-1, 3, 32, 32)
    return _images(labels, pixels.transpose(0, 2, 3, 1), f'{split}_')


class Cifar100(Cifar10, skip_registration=True):
  """60,000 photographs of 100 classes in 20 groups, 32x32 (Krizhevsky 2009)."""

  name = 'cifar100'
  archive = 'cifar-100-binary.tar.gz'
  folder = 'cifar-100-binary'
  members = {'train': ('train.bin',), 'test': ('test.bin',)}
  labels = (
    ('coarse_label', 20, 'coarse_label_names.txt'),
    ('label', 100, 'fine_label_names.txt'),
  )


class TinyShakespeare(_Original, skip_registration=True):
  """40,000 lines of Shakespeare in one text (Karpathy 2015)."""

  name = 'tiny_shakespeare'
  VERSION = tfds.core.Version('1.0.0')
  homepage = 'https://github.com/karpathy/char-rnn'
  supervised_keys = None

  def _features(self):
    return {'text': tfds.features.Text()}

  def _read(self):
    path = self.files['input.txt']
    try:
      text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
      raise _damaged(path, error) from None
    rest = text[int(len(text) * 0.9) :]
    parts = {
      'train': text[: len(text) - len(rest)],
      'validation': rest[: len(rest) // 2],
      'test': rest[len(rest) // 2 :],
    }
    if not all(parts.values()):
      raise _damaged(path, f'it has {len(text)} characters')
    return {
      split: (1, lambda _, part=part: {'text': part})
      for split, part in parts.items()
    }


BUILDERS = {
  b.name: b for b in (Mnist, FashionMnist, Cifar10, Cifar100, TinyShakespeare)
}


def find(name: str) -> type[_Original] | None:
  """The builder of 'name' or 'name:version', if it is one of these."""
  name, _, version = name.partition(':')
  builder = BUILDERS.get(name)
  if builder is None or version not in ('', str(builder.VERSION)):
    return None
  return builder


def _images(labels, images: np.ndarray, prefix: str | None = None) -> _Split:
  """Encoded images with their labels, and with ids that begin with `prefix`."""

  def example(i: int) -> dict:
    values = {key: int(column[i]) for key, column in labels.items()}
    if prefix is not None:
      values['id'] = f'{prefix}{i:05d}'
    return values | {'image': embedded.png(images[i])}

  return len(images), example


def _damaged(path: pathlib.Path, why) -> config_lib.UserError:
  return config_lib.UserError(
    f'{path} is damaged: {why}; remove it, or replace it by the original file'
  )


def _check_labels(path: pathlib.Path, labels: np.ndarray, count: int):
  if labels.max() >= count:
    raise _damaged(
      path, f'a label is {labels.max()}, where there are {count} classes'
    )


def _idx(path: pathlib.Path, rank: int) -> np.ndarray:
  """The bytes of an IDX file (LeCun's format), gzipped, in their shape."""
  try:
    with gzip.open(path) as file:
      magic, *shape = struct.unpack(f'>{rank + 1}I', file.read(4 * rank + 4))
      data = file.read()
  except (OSError, EOFError, zlib.error, struct.error) as error:
    raise _damaged(path, config_lib.first_line(error)) from None
  if magic != 0x800 + rank:  # 8: unsigned bytes.
    raise _damaged(
      path, f'it begins with {magic:#010x}, expected {0x800 + rank:#010x}'
    )
  size = int(np.prod(shape, dtype=object))
  if len(data) != size:
    raise _damaged(path, f'it has {len(data):,} bytes of {size:,}')
  return np.frombuffer(data, np.uint8).reshape(shape)


def _unpack(path: pathlib.Path, wanted: Collection[str]) -> dict[str, bytes]:
  """The members of a .tar.gz by name, read in one pass; nothing is extracted.

  Raises:
    UserError: it cannot be read, lacks a member, or has what no archive of
      these datasets has: a link, a device, a path outside of its folder.
  """
  found = {}
  try:
    with (
      gzip.open(path) as file,
      tarfile.open(fileobj=file, mode='r|') as archive,
    ):
      for member in archive:
        name = pathlib.PurePosixPath(member.name)
        if name.is_absolute() or '..' in name.parts:
          raise _damaged(path, f'{member.name} lies outside of its folder')
        if not (member.isfile() or member.isdir()):
          raise _damaged(path, f'{member.name} is neither a file nor a folder')
        if member.isfile() and member.name in wanted:
          found[member.name] = archive.extractfile(member).read()
      while file.read(1 << 20):  # gzip compares its checksum at the end.
        pass
  except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
    raise _damaged(path, config_lib.first_line(error)) from None
  if missing := sorted(set(wanted) - found.keys()):
    raise _damaged(path, f'{missing[0]} is missing')
  return found
