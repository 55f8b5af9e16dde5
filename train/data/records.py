"""Examples read record by record, for sets too large to keep decoded.

A record is decoded whenever it is taken: some milliseconds for a photograph,
where the decoded cache needs microseconds, but no second copy on the disk. The
cache is filled through here too, so that both give the same examples.
"""

from collections.abc import Iterator
from collections.abc import Sequence
import concurrent.futures
import contextlib
import dataclasses
import functools
import io
import math
import os
from typing import Any

import numpy as np
from PIL import Image

from train import config as config_lib
from train.data import faults as faults_lib

# Pillow's names for the channels that TFDS encodes images with.
_MODES = {1: 'L', 3: 'RGB', 4: 'RGBA'}
_MOST_THREADS = 16
# What array_record raises where its files are damaged or gone.
_READ_ERRORS = (RuntimeError, OSError, ValueError, IndexError)


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
    faults: what is damaged, which is then passed over; None: it is an error.
    stand_in: whether there is nothing to read: sizes and shapes alone.
  """

  name: str
  split: str
  source: Any
  specs: dict[str, Spec]
  classes: tuple[str, ...] | None = None
  image_size: int | None = None
  rows: np.ndarray | None = None
  threads: int | None = None
  faults: faults_lib.Faults | None = None
  stand_in: bool = False

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
    for row in range(len(self)):
      read, found = self._read(np.array([row]))
      try:
        if not found:
          return not self.classes or self._parse(read[0])[1] != -1
      except faults_lib.Fault as fault:
        found = {row: str(fault)}
      self._note(found)
    return False

  def take(self, places: np.ndarray) -> dict[str, np.ndarray]:
    """The examples at `places` [m], decoded: key -> [m, ...].

    In the place of a damaged one, where `faults` allows it, is the next one.

    Raises:
      UserError: a record cannot be read or decoded, or its label is no class.
    """
    batch = self._empty(len(places))
    slots = np.arange(len(places))
    while len(slots):
      if self.faults is not None:
        places = self.faults.mend(self.rows, places)
      rows = (places if self.rows is None else self.rows[places])[slots]
      found = self._fill(batch, slots, rows)
      self._note(found)
      slots = slots[[row in found for row in rows.tolist()]] if found else ()
    return batch

  def find_damaged(self, rows: Sequence[int]) -> set[int]:
    """Which of the source's `rows` are damaged, or an error as in take."""
    found = set()
    for row in rows:
      batch = self._empty(1)
      fault = self._fill(batch, np.zeros(1, int), np.array([row]))
      self._note(fault)
      found |= set(fault)
    return found

  def check_files(self):
    """Notes the files that are missing, before a step meets one of them.

    Raises:
      UserError: one is, and that is an error.
    """
    import tensorflow_datasets as tfds

    for file, rows in self._files():
      if not tfds.core.Path(file).exists():
        if self.faults is None:
          raise config_lib.UserError(
            f'config.data.name is {self.name!r}, whose file {file} with the '
            f'records {rows[0]} to {rows[-1]} of split {self.split} is '
            f'missing; {faults_lib.HINT}'
          )
        self.faults.add(rows, f'cannot be read: {file} is missing')

  def _files(self) -> Iterator[tuple[str, range]]:
    """The split's files, and the rows that each holds."""
    start = 0
    split = self.source.dataset_info.splits[self.split]
    for file in split.file_instructions:
      yield file.filename, range(start, start + file.take)
      start += file.take

  def _note(self, found: dict[int, str]):
    """Adds to the faults, or raises the first of them."""
    for row, why in found.items():
      if self.faults is None:
        raise config_lib.UserError(
          f'config.data.name is {self.name!r}, whose record {row} of split '
          f'{self.split} {why}; {faults_lib.HINT}'
        )
      if row not in self.faults.why:
        self.faults.add(self._alike(row, why), why)

  def _alike(self, row: int, why: str) -> Sequence[int]:
    """The rows of a file of which nothing can be read, or this row alone."""
    rows = next(rows for _, rows in self._files() if row in rows)
    for other in (rows[0], rows[-1]):
      # What is wrong with one record is said with its place in the file.
      if self._read(np.array([other]))[1].get(other) != why:
        return [row]
    return rows

  def _empty(self, count: int) -> dict[str, np.ndarray]:
    return {
      key: np.empty((count, *spec.shape), spec.dtype)
      for key, spec in self.specs.items()
    }

  def _fill(
    self, batch: dict[str, np.ndarray], slots: np.ndarray, rows: np.ndarray
  ) -> dict[int, str]:
    """Decodes `rows` into these slots of a batch; returns row -> its fault."""
    read, found = self._read(rows)

    def decode(which: np.ndarray):
      for i in which:
        if read[i] is None:
          continue
        try:
          value, label = self._decode(read[i])
          batch[self._key][slots[i]], batch['label'][slots[i]] = value, label
        except faults_lib.Fault as fault:
          found[int(rows[i])] = str(fault)

    threads = self.threads or min(os.cpu_count() or 1, _MOST_THREADS)
    # Pillow leaves the interpreter to other threads while it decodes.
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
      list(pool.map(decode, np.array_split(np.arange(len(rows)), threads)))
    return dict(sorted(found.items()))

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

  def _read(
    self, rows: np.ndarray
  ) -> tuple[list[bytes | None], dict[int, str]]:
    """The records, None for each that cannot be read, and why it cannot."""
    rows = rows.tolist()
    # All at once: twenty times the speed of one by one.
    with contextlib.suppress(*_READ_ERRORS):
      return self.source.__getitems__(rows), {}
    read, found = [], {}
    for row in rows:  # array_record does not say which it was.
      try:
        read.append(self.source[row])
      except _READ_ERRORS as error:
        read.append(None)
        found[row] = f'cannot be read: {config_lib.first_line(error)}'
    return read, found

  def _parse(self, record: bytes) -> tuple[Any, int | float]:
    """The input, images still encoded, and the label."""
    try:
      example = self.source.dataset_info.features.deserialize_example_np(
        record, decoders=self._decoders
      )
      return example[self._key], example['label']
    except MemoryError:  # No fault of the record's, here and below.
      raise
    except Exception as error:  # Protobuf's, or a key that is not there.
      raise faults_lib.Fault(
        f'cannot be read: {config_lib.first_line(error)}'
      ) from None

  def _decode(self, record: bytes) -> tuple[np.ndarray, int | float]:
    """The input and the label, checked."""
    value, label = self._parse(record)
    spec = self.specs[self._key]
    if self._decoders:
      try:
        value = decode_image(value, spec.shape[-1], self.image_size)
      except MemoryError:
        raise
      except Exception as error:  # Pillow alone raises six kinds.
        raise faults_lib.Fault(
          f'cannot be decoded: {config_lib.first_line(error)}'
        ) from None
    if np.shape(value) != spec.shape:
      raise faults_lib.Fault(
        f'holds {self._key} of the shape {np.shape(value)}; the others have '
        f'{spec.shape}'
      )
    if self.classes and not 0 <= label < len(self.classes):
      raise faults_lib.Fault(
        f'has the label {label}; its {len(self.classes)} classes are 0 to '
        f'{len(self.classes) - 1}, {_shortened(self.classes)}'
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
