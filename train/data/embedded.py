"""Datasets that need no download: scikit-learn's, as TFDS builders.

Each is split 80/20 by scikit-learn's own train_test_split(random_state=0), so
that scikit-learn's estimators can be compared on the very same examples.
"""

import contextlib
import io
import struct
import tempfile
import zlib

import numpy as np
import sklearn.datasets
from sklearn.model_selection import train_test_split
import tensorflow_datasets as tfds


class _Embedded(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """Yields what `_load` returns, split 80/20, stratified where it says so."""

  VERSION = tfds.core.Version('1.0.0')
  RELEASE_NOTES = {'1.0.0': 'First release.'}
  input_key = 'features'
  stratified = True

  def _features(self) -> dict:
    raise NotImplementedError

  def _load(self) -> tuple[list, np.ndarray]:
    """The inputs, as TFDS encodes them, and the labels."""
    raise NotImplementedError

  def _info(self):
    return tfds.core.DatasetInfo(
      builder=self,
      description=self.__doc__,
      features=tfds.features.FeaturesDict(self._features()),
      supervised_keys=(self.input_key, 'label'),
    )

  def _split_generators(self, dl_manager):
    del dl_manager  # Nothing is downloaded.
    inputs, labels = self._load()
    train, test = train_test_split(
      np.arange(len(labels)),
      test_size=0.2,
      stratify=labels if self.stratified else None,
      random_state=0,
    )

    def examples(rows):
      for row in rows:
        yield int(row), {self.input_key: inputs[row], 'label': labels[row]}

    return {'train': examples(train), 'test': examples(test)}

  def _generate_examples(self):
    raise NotImplementedError('_split_generators yields the examples itself')


class Digits(_Embedded, skip_registration=True):
  """1,797 handwritten digits, 8x8 (Alpaydin & Kaynak 1998)."""

  name = 'digits'
  input_key = 'image'

  def _features(self):
    return {
      'image': tfds.features.Image(
        shape=(8, 8, 1), dtype=np.uint8, encoding_format='png'
      ),
      'label': tfds.features.ClassLabel(num_classes=10),
    }

  def _load(self):
    raw = sklearn.datasets.load_digits()
    pixels = np.round(raw.images * 255 / 16).astype(np.uint8)  # From 0..16.
    return [png(image) for image in pixels], raw.target


class BreastCancer(_Embedded, skip_registration=True):
  """569 tumours, 30 measurements, malignant or benign (Street et al. 1993)."""

  name = 'breast_cancer'

  def _features(self):
    return {
      'features': tfds.features.Tensor(shape=(30,), dtype=np.float64),
      'label': tfds.features.ClassLabel(names=['malignant', 'benign']),
    }

  def _load(self):
    raw = sklearn.datasets.load_breast_cancer()
    return list(raw.data), raw.target


class Diabetes(_Embedded, skip_registration=True):
  """442 patients, 10 measures, progression in a year (Efron et al. 2004)."""

  name = 'diabetes'
  stratified = False

  def _features(self):
    return {
      'features': tfds.features.Tensor(shape=(10,), dtype=np.float64),
      'label': tfds.features.Scalar(dtype=np.float64),
    }

  def _load(self):
    raw = sklearn.datasets.load_diabetes()
    return list(raw.data), raw.target


BUILDERS = {b.name: b for b in (Digits, BreastCancer, Diabetes)}


def png(image: np.ndarray) -> bytes:
  """An image [H, W] or [H, W, 1 or 3] of uint8 as a PNG file.

  TFDS takes an encoded image: an array would need TensorFlow. Pillow takes five
  times as long for a small one, all of it before and after the compression.
  """
  height, width, *_ = image.shape
  rows = image.reshape(height, -1)
  color = {width: 0, 3 * width: 2}[rows.shape[1]]  # Grey, or RGB.
  # Each row begins with the number of its filter: 0, none.
  lines = np.zeros((height, 1 + rows.shape[1]), np.uint8)
  lines[:, 1:] = rows
  header = struct.pack('>IIBBBBB', width, height, 8, color, 0, 0, 0)
  chunks = (
    (b'IHDR', header),
    (b'IDAT', zlib.compress(lines.tobytes())),
    (b'IEND', b''),
  )
  return b'\x89PNG\r\n\x1a\n' + b''.join(
    struct.pack('>I', len(data))
    + kind
    + data
    + struct.pack('>I', zlib.crc32(kind + data))
    for kind, data in chunks
  )


def prepare(builder: tfds.core.DatasetBuilder):
  """Writes the builder's files; TFDS's own bar and messages stay silent."""
  tfds.disable_progress_bar()
  # TFDS makes folders for downloads, which these builders have none of.
  with (
    tempfile.TemporaryDirectory() as unused,
    contextlib.redirect_stdout(io.StringIO()),
  ):
    builder.download_and_prepare(
      download_dir=unused,
      download_config=tfds.download.DownloadConfig(try_download_gcs=False),
    )
