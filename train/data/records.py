"""Examples read record by record, for sets too large to keep decoded.

A record is decoded whenever it is taken: some milliseconds for a photograph,
where the decoded cache needs microseconds, but no second copy on the disk. The
cache is filled through here too, so that both give the same examples.
"""

import concurrent.futures
import dataclasses
import functools
import io
import math
import os
from typing import Any

import numpy as np
from PIL import Image

from train import config as config_lib

# Pillow's names for the channels that TFDS encodes images with.
_MODES = {1: 'L', 3: 'RGB', 4: 'RGBA'}
_MOST_THREADS = 16


@dataclasses.dataclass(frozen=True)
class Spec:
  """The shape and the dtype of one example's value."""

  shape: tuple[int, ...]
  dtype: np.dtype

  @property
  def nbytes(self) -> int:
    """The size of one value, decoded."""
    return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Records:
  """A split that is decoded as it is read; has what sources.Split has.

  Worker processes get it pickled; files are opened where they are first read.

  Attributes:
    name: of the dataset, for messages.
    split: TFDS's name of the split, for messages.
    source: TFDS's data source, which gives records as bytes.
    specs: key -> Spec of one example: the input, and 'label'.
    classes: the classes' names, or None where the label is a number.
    image_size: S, where images are resized and cropped to [S, S, C].
    rows: which of the source's records belong to the split; None: all.
    threads: how many decode at once; None: one a core.
  """

  name: str
  split: str
  source: Any
  specs: dict[str, Spec]
  classes: tuple[str, ...] | None = None
  image_size: int | None = None
  rows: np.ndarray | None = None
  threads: int | None = None

  def __len__(self) -> int:
    return len(self.source) if self.rows is None else len(self.rows)

  @property
  def nbytes(self) -> int:
    """The size of all examples, decoded."""
    return len(self) * sum(spec.nbytes for spec in self.specs.values())

  def part(self, places: np.ndarray) -> 'Records':
    """The examples at `places` as a split of their own."""
    rows = places if self.rows is None else self.rows[places]
    return dataclasses.replace(self, rows=rows)

  def has_labels(self) -> bool:
    """Whether the first record's label is not -1, which is TFDS's for none."""
    record = self._read(np.zeros(1, int))[0]
    return not self.classes or self._parse(record, 0)[1] != -1

  def take(self, places: np.ndarray) -> dict[str, np.ndarray]:
    """The examples at `places` [m], decoded: key -> [m, ...].

    Raises:
      UserError: a record cannot be read or decoded, or its label is no class.
    """
    rows = places if self.rows is None else self.rows[places]
    read = self._read(rows)
    batch = {
      key: np.empty((len(rows), *spec.shape), spec.dtype)
      for key, spec in self.specs.items()
    }

    def decode(slots: np.ndarray):
      for i in slots:
        value, label = self._decode(read[i], rows[i])
        batch[self._key][i], batch['label'][i] = value, label

    threads = self.threads or min(os.cpu_count() or 1, _MOST_THREADS)
    # Pillow leaves the interpreter to other threads while it decodes.
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
      list(pool.map(decode, np.array_split(np.arange(len(rows)), threads)))
    return batch

  @property
  def _key(self) -> str:
    """The input's key."""
    return next(iter(self.specs))

  @functools.cached_property
  def _decoders(self) -> dict | None:
    """What tells TFDS to leave images to decode_image, which is faster."""
    import tensorflow_datasets as tfds

    if not is_image(self.source.dataset_info.features[self._key]):
      return None
    return {self._key: tfds.decode.SkipDecoding()}

  def _read(self, rows: np.ndarray) -> list[bytes]:
    """The records, all at once: twenty times the speed of one by one."""
    try:
      return self.source.__getitems__(rows.tolist())
    except Exception as error:  # Whatever array_record finds in its files.
      raise config_lib.UserError(
        f'config.data.name is {self.name!r}, whose split {self.split} cannot '
        f'be read: {config_lib.first_line(error)}'
      ) from None

  def _where(self, row: int) -> str:
    return (
      f'config.data.name is {self.name!r}, whose record {row} of split '
      f'{self.split}'
    )

  def _parse(self, record: bytes, row: int) -> tuple[Any, int | float]:
    """The input, images still encoded, and the label."""
    try:
      example = self.source.dataset_info.features.deserialize_example_np(
        record, decoders=self._decoders
      )
      return example[self._key], example['label']
    except Exception as error:  # Protobuf's, or a key that is not there.
      raise config_lib.UserError(
        f'{self._where(row)} cannot be read: {config_lib.first_line(error)}'
      ) from None

  def _decode(self, record: bytes, row: int) -> tuple[np.ndarray, int | float]:
    """The input and the label, checked."""
    value, label = self._parse(record, row)
    spec = self.specs[self._key]
    if self._decoders:
      try:
        value = decode_image(value, spec.shape[-1], self.image_size)
      except Exception as error:  # Pillow alone raises six kinds.
        raise config_lib.UserError(
          f'{self._where(row)} cannot be decoded: '
          f'{config_lib.first_line(error)}'
        ) from None
    if np.shape(value) != spec.shape:
      raise config_lib.UserError(
        f'{self._where(row)} holds {self._key} of the shape '
        f'{np.shape(value)}; the others have {spec.shape}'
      )
    if self.classes and not 0 <= label < len(self.classes):
      raise config_lib.UserError(
        f'{self._where(row)} has the label {label}; its {len(self.classes)} '
        f'classes are 0 to {len(self.classes) - 1}, {_shortened(self.classes)}'
      )
    return value, label


def is_image(feature) -> bool:
  """Whether a TFDS feature is an encoded image of bytes."""
  import tensorflow_datasets as tfds  # Takes a third of a second.

  return isinstance(feature, tfds.features.Image) and (
    np.dtype(feature.np_dtype) == np.uint8
  )


def decode_image(
  encoded: bytes, channels: int, image_size: int | None
) -> np.ndarray:
  """An encoded image as uint8 [H, W, C].

  With an image_size S the shorter side becomes S, and of the longer one the
  middle stays: uint8 [S, S, C].

  Args:
    encoded: JPEG, PNG or whatever else Pillow reads.
    channels: C, which is 1, 3 or 4; other images are converted.
    image_size: S, or None.
  """
  with Image.open(io.BytesIO(encoded)) as image:
    mode = _MODES[channels]
    if image.mode != mode:
      image = image.convert(mode)
    if image_size:
      # As torchvision's Resize and CenterCrop, to the pixel.
      shorter = min(image.size)
      width, height = (image_size * side // shorter for side in image.size)
      image = image.resize((width, height), Image.Resampling.BILINEAR)
      left = round((width - image_size) / 2)
      top = round((height - image_size) / 2)
      image = image.crop((left, top, left + image_size, top + image_size))
    pixels = np.asarray(image)
  return pixels.reshape(*pixels.shape[:2], -1)


def _shortened(classes: tuple[str, ...]) -> str:
  """'even, odd', or 'tench, ..., toilet tissue' where there are many."""
  if len(classes) > 5:
    classes = (*classes[:2], '...', classes[-1])
  return ', '.join(classes)
