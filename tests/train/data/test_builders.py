"""Builders of ours: TFDS's own datasets from the original files."""

import gzip
import hashlib
import io
import os
import pathlib
import signal
import struct
import subprocess
import sys
import tarfile

import numpy as np
from PIL import Image
import pytest
import tensorflow_datasets as tfds

from tests import conftest
from train import config as config_lib
from train import signals
from train.data import builders
from train.data import downloads
from train.data import embedded
from train.data import prepare

RNG = np.random.default_rng(0)


def idx(array, magic=None):
  """LeCun's format: 0, 0, 8 for bytes, the rank; the shape; the bytes."""
  magic = 0x800 + array.ndim if magic is None else magic
  header = struct.pack(f'>{1 + array.ndim}I', magic, *array.shape)
  return header + array.tobytes()


def mnist_files(train=7, test=4):
  """Random MNIST: the files, and split -> (images, labels)."""
  files, splits = {}, {}
  for split, stem, n in (('train', 'train', train), ('test', 't10k', test)):
    images = RNG.integers(0, 256, (n, 28, 28)).astype(np.uint8)
    labels = (np.arange(n) % 10).astype(np.uint8)
    files[f'{stem}-images-idx3-ubyte.gz'] = gzip.compress(idx(images))
    files[f'{stem}-labels-idx1-ubyte.gz'] = gzip.compress(idx(labels))
    splits[split] = images[..., None], labels
  return files, splits


def tar(members):
  """A .tar.gz of name -> bytes, or a TarInfo of what is no file."""
  out = io.BytesIO()
  with tarfile.open(fileobj=out, mode='w:gz') as archive:
    for name, content in members.items():
      info = content
      if isinstance(content, bytes):
        info = tarfile.TarInfo(name)
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
      else:
        archive.addfile(info)
  return out.getvalue()


CIFAR10_NAMES = [f'thing{i}' for i in range(10)]


def cifar10_members(count=2):
  """The members of CIFAR-10's archive, and split -> (images, labels)."""
  members = {
    'cifar-10-batches-bin/batches.meta.txt': (
      '\n'.join(CIFAR10_NAMES) + '\n\n'
    ).encode(),
    'cifar-10-batches-bin/readme.html': b'<html>',
  }
  splits = {'train': [], 'test': []}
  for file in [*(f'data_batch_{i}' for i in range(1, 6)), 'test_batch']:
    content = b''
    for _ in range(count):
      label = int(RNG.integers(10))
      image = RNG.integers(0, 256, (32, 32, 3)).astype(np.uint8)
      # One byte of label, then the red, the green, the blue plane.
      content += bytes([label])
      content += b''.join(image[:, :, c].tobytes() for c in range(3))
      splits['test' if file == 'test_batch' else 'train'].append((image, label))
    members[f'cifar-10-batches-bin/{file}.bin'] = content
  return members, splits


@pytest.fixture
def folders(tmp_path, monkeypatch):
  """The cache, and no other folder that TFDS might look in."""
  monkeypatch.setenv('TAISHAN_CACHE', str(tmp_path / 'cache'))
  monkeypatch.delenv('TFDS_DATA_DIR', raising=False)
  monkeypatch.setattr(tfds.core.constants, 'DATA_DIR', str(tmp_path / 'no'))
  return tmp_path / 'cache'


@pytest.fixture
def put(folders, monkeypatch):
  """put(name, files) lays the files there as if they had been downloaded."""

  def put(name, files):
    folder = folders / 'downloads' / name
    folder.mkdir(parents=True, exist_ok=True)
    table = []
    for file, content in files.items():
      (folder / file).write_bytes(content)
      digest = hashlib.sha256(content).hexdigest()
      url = f'http://127.0.0.1:9/{file}'  # Nobody answers there.
      table.append(downloads.File(url, len(content), digest))
    monkeypatch.setitem(downloads.FILES, name, tuple(table))

  return put


def load(name):
  """split -> the examples, from files that are read anew."""
  prepare.find_or_prepare(name, None, lambda line: None)
  builder = prepare.find_or_prepare(name, None, pytest.fail)
  return {
    split: list(builder.as_data_source(split)) for split in builder.info.splits
  }, builder


def pairs(images, labels):
  return sorted(
    (np.asarray(i).tobytes(), int(k))
    for i, k in zip(images, labels, strict=True)
  )


def check_images(examples, images, labels, key='label'):
  assert {e['image'].shape for e in examples} == {images[0].shape}
  assert {e['image'].dtype for e in examples} == {np.dtype('uint8')}
  found = pairs([e['image'] for e in examples], [e[key] for e in examples])
  assert found == pairs(images, labels)


# ------------------------------------------------------------------- as TFDS's


@pytest.mark.parametrize('name', builders.BUILDERS)
def test_name_version_and_features_are_tfds_own(name, tmp_path):
  theirs = tfds.builder(name, data_dir=tmp_path)
  ours = builders.BUILDERS[name](data_dir=tmp_path)
  assert ours.name == theirs.name == name
  assert str(ours.version) == str(theirs.version)
  assert ours.data_path == theirs.data_path
  assert ours.info.supervised_keys == theirs.info.supervised_keys
  assert ours.info.features.to_json() == theirs.info.features.to_json()
  for key, feature in theirs.info.features.items():
    if isinstance(feature, tfds.features.ClassLabel):
      assert ours.info.features[key].names == feature.names


@pytest.mark.parametrize('name', ['mnist', 'fashion_mnist'])
def test_mnist_is_what_the_files_hold(put, name):
  files, splits = mnist_files()
  put(name, files)
  found, builder = load(name)
  assert set(found) == {'train', 'test'}
  for split, (images, labels) in splits.items():
    check_images(found[split], images, labels)
  assert builder.info.splits['train'].num_examples == 7
  expected = 'Ankle boot' if name == 'fashion_mnist' else '9'
  assert builder.info.features['label'].int2str(9) == expected


def test_cifar10_is_what_the_archive_holds(put):
  members, splits = cifar10_members()
  put('cifar10', {'cifar-10-binary.tar.gz': tar(members)})
  found, builder = load('cifar10')
  assert set(found) == {'train', 'test'}
  assert builder.info.features['label'].names == CIFAR10_NAMES
  for split, examples in splits.items():
    check_images(found[split], *zip(*examples, strict=True))
    # Ids count in the order of the archive.
    by_id = {e['id'].decode(): e for e in found[split]}
    for i, (image, label) in enumerate(examples):
      example = by_id.pop(f'{split}_{i:05d}')
      assert np.array_equal(example['image'], image)
      assert example['label'] == label
    assert not by_id


def test_cifar100_has_fine_labels_and_coarse_ones(put):
  fine = [f'fine_{i}' for i in range(100)]
  coarse = [f'coarse_{i}' for i in range(20)]
  images = RNG.integers(0, 256, (6, 32, 32, 3)).astype(np.uint8)
  # Coarse label, fine label, then the three planes.
  rows = [
    bytes([10 + i, 90 + i]) + images[i].transpose(2, 0, 1).tobytes()
    for i in range(6)
  ]
  members = {
    'train.bin': b''.join(rows[:4]),
    'test.bin': b''.join(rows[4:]),
    'fine_label_names.txt': '\n'.join(fine).encode(),
    'coarse_label_names.txt': '\n'.join(coarse).encode(),
  }
  members = {f'cifar-100-binary/{k}': v for k, v in members.items()}
  put('cifar100', {'cifar-100-binary.tar.gz': tar(members)})
  found, builder = load('cifar100')
  features = builder.info.features
  assert features['label'].names == fine
  assert features['coarse_label'].names == coarse
  for split, part in (('train', slice(0, 4)), ('test', slice(4, 6))):
    places = np.arange(6)[part]
    check_images(found[split], images[part], 90 + places)
    check_images(found[split], images[part], 10 + places, 'coarse_label')


@pytest.mark.parametrize('length', [1000, 1003, 1111])
def test_tiny_shakespeare_is_split_90_5_5_in_order(put, length):
  text = ''.join(chr(ord('é') + i % 50) for i in range(length))
  put('tiny_shakespeare', {'input.txt': text.encode()})
  found, _ = load('tiny_shakespeare')
  parts = {k: [e['text'].decode() for e in v] for k, v in found.items()}
  train = length * 9 // 10
  middle = train + (length - train) // 2
  assert parts == {
    'train': [text[:train]],
    'validation': [text[train:middle]],
    'test': [text[middle:]],
  }


def test_tfds_own_builder_reads_what_ours_prepared(put, folders):
  files, splits = mnist_files()
  put('mnist', files)
  load('mnist')
  theirs = tfds.builder('mnist', data_dir=folders / 'tfds')
  check_images(list(theirs.as_data_source('test')), *splits['test'])


@pytest.mark.parametrize('shape', [(8, 8), (5, 7, 1), (5, 7, 3)])
def test_a_png_of_ours_is_read_by_pillow(shape):
  pixels = RNG.integers(0, 256, shape).astype(np.uint8)
  image = Image.open(io.BytesIO(embedded.png(pixels)))
  assert image.mode == ('RGB' if shape[-1] == 3 else 'L')
  assert np.array_equal(np.asarray(image).reshape(shape), pixels)


def test_a_long_preparation_says_how_far_it_is(put, monkeypatch, capsys):
  # print, as a person sees it: TFDS's own lines on stdout are kept back.
  monkeypatch.setattr(builders, '_REPORT_SECONDS', 0)
  put('mnist', mnist_files()[0])
  prepare.find_or_prepare('mnist', None, print)
  lines = capsys.readouterr().out.splitlines()
  assert 'preparing mnist train: 3 of 7' in lines
  assert all(line.startswith('preparing mnist ') for line in lines)


def test_nothing_imports_tensorflow(put, folders, tmp_path):
  # Wherever it is looked for there is one, which leaves a trace if it is run.
  put('mnist', mnist_files()[0])
  put('cifar10', {'cifar-10-binary.tar.gz': tar(cifar10_members()[0])})
  put('tiny_shakespeare', {'input.txt': b'to be or not to be ' * 9})
  stub = tmp_path / 'stub' / 'tensorflow'
  stub.mkdir(parents=True)
  (stub / '__init__.py').write_text(
    f'open({str(tmp_path / "trace")!r}, "w").close()\nraise ImportError\n'
  )
  names = ('mnist', 'cifar10', 'tiny_shakespeare')
  code = (
    'import sys\n'
    'from train.data import downloads, prepare\n'
    'File = downloads.File\n'
    f'downloads.FILES.update({ {n: downloads.FILES[n] for n in names} })\n'
    f'for name in {names}:\n'
    '  b = prepare.find_or_prepare(name, None, print)\n'
    '  print(name, len(list(b.as_data_source("train"))))\n'
    'print("tensorflow" in sys.modules)\n'
  )
  path = os.pathsep.join((str(tmp_path / 'stub'), str(conftest.REPOSITORY)))
  done = subprocess.run(
    [sys.executable, '-c', code],
    env=os.environ | {'PYTHONPATH': path, 'TFDS_DATA_DIR': str(tmp_path)},
    cwd=tmp_path,
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert done.returncode == 0, done.stderr
  lines = done.stdout.splitlines()
  assert {'mnist 7', 'cifar10 10', 'tiny_shakespeare 1'} <= set(lines)
  assert lines[-1] == 'False'
  assert not (tmp_path / 'trace').exists()


# --------------------------------------------------------------------- damaged


def refused(name, folders, *words):
  """The one line about a damaged file, after which nothing is left."""
  before = tree(folders / 'downloads')
  with pytest.raises(config_lib.UserError) as caught:
    prepare.find_or_prepare(name, None, lambda line: None)
  line = str(caught.value)
  assert '\n' not in line
  assert line.startswith(str(folders / 'downloads' / name))
  assert 'is damaged' in line
  for word in words:
    assert str(word) in line
  assert tree(folders / 'downloads') == before
  assert not tree(folders / 'tfds')


def tree(folder):
  """Every file and folder below, but for locks."""
  return {
    path: path.read_bytes() if path.is_file() else None
    for path in folder.rglob('*')
    if path.suffix != '.lock'
  }


TRAIN_IMAGES = 'train-images-idx3-ubyte.gz'
TEST_LABELS = 't10k-labels-idx1-ubyte.gz'
IMAGES = np.zeros((7, 28, 28), np.uint8)
BAD_MNIST = {
  'no gzip': (TRAIN_IMAGES, idx(IMAGES), 'gzip'),
  'cut gzip': (TRAIN_IMAGES, gzip.compress(idx(IMAGES))[:-9], 'end'),
  'bad bytes': (
    TRAIN_IMAGES,
    gzip.compress(b'')[:10] + b'\xff' * 50,
    'invalid',
  ),
  'bad sum': (TRAIN_IMAGES, gzip.compress(idx(IMAGES))[:-8] + bytes(8), 'CRC'),
  'empty': (TRAIN_IMAGES, gzip.compress(b''), 'bytes'),
  'magic': (TRAIN_IMAGES, gzip.compress(idx(IMAGES, 0x801)), '0x00000803'),
  'cut': (TRAIN_IMAGES, gzip.compress(idx(IMAGES)[:-1]), '5,488'),
  'long': (TRAIN_IMAGES, gzip.compress(idx(IMAGES) + b'x'), '5,488'),
  'vast': (
    TRAIN_IMAGES,
    gzip.compress(struct.pack('>4I', 0x803, *[2**32 - 1] * 3)),
    '0 bytes of',
  ),
  'none': (TRAIN_IMAGES, gzip.compress(idx(IMAGES[:0])), '(0, 28, 28)'),
  'shape': (TRAIN_IMAGES, gzip.compress(idx(IMAGES[:, :8])), '(7, 8, 28)'),
  'few labels': (
    TEST_LABELS,
    gzip.compress(idx(np.zeros(3, np.uint8))),
    '3 labels of 4 images',
  ),
  'label': (
    TEST_LABELS,
    gzip.compress(idx(np.full(4, 10, np.uint8))),
    'a label is 10',
  ),
}


@pytest.mark.parametrize('case', BAD_MNIST)
def test_a_damaged_idx_file_is_one_line_and_leaves_nothing(put, folders, case):
  file, content, word = BAD_MNIST[case]
  put('mnist', mnist_files()[0] | {file: content})
  refused('mnist', folders, file, word)


def link(name, target, kind):
  info = tarfile.TarInfo(name)
  info.type, info.linkname = kind, target
  return info


BATCH = 'cifar-10-batches-bin/data_batch_3.bin'
NAMES = 'cifar-10-batches-bin/batches.meta.txt'
BAD_CIFAR = {
  'missing': ({BATCH: None}, 'data_batch_3.bin is missing'),
  'length': ({BATCH: bytes(3072)}, '3,072 bytes'),
  'empty': ({BATCH: b''}, '0 bytes'),
  'label': ({BATCH: b'\x0a' + bytes(3072)}, 'a label is 10'),
  'names': ({NAMES: b'cat\ndog\n'}, '2 names of 10'),
  'twice': ({NAMES: b'cat\n' * 10}, '1 names of 10'),
  'outside': ({'../../outside': b'x'}, '../../outside lies outside'),
  'inside out': ({'a/../../b': b'x'}, 'a/../../b lies outside'),
  'absolute': ({'/outside': b'x'}, '/outside lies outside'),
  'symlink': ({BATCH: link(BATCH, '/etc/passwd', tarfile.SYMTYPE)}, 'neither'),
  'hardlink': ({BATCH: link(BATCH, NAMES, tarfile.LNKTYPE)}, 'neither'),
  'device': ({'null': link('null', '', tarfile.CHRTYPE)}, 'neither'),
}


@pytest.mark.parametrize('case', BAD_CIFAR)
def test_a_wrong_archive_is_one_line_and_leaves_nothing(put, folders, case):
  changes, word = BAD_CIFAR[case]
  members = cifar10_members()[0] | changes
  members = {k: v for k, v in members.items() if v is not None}
  put('cifar10', {'cifar-10-binary.tar.gz': tar(members)})
  refused('cifar10', folders, word)
  assert not pathlib.Path('/outside').exists()


@pytest.mark.parametrize('size', [0, 5, 5000, -20])
def test_an_archive_that_was_cut_is_one_line_and_leaves_nothing(
  put, folders, size
):
  whole = tar(cifar10_members()[0])
  put('cifar10', {'cifar-10-binary.tar.gz': whole[:size]})
  refused('cifar10', folders)


def test_an_archive_with_a_flipped_byte_is_one_line_and_leaves_nothing(
  put, folders
):
  whole = bytearray(tar(cifar10_members()[0]))
  whole[len(whole) // 2] ^= 0xFF
  put('cifar10', {'cifar-10-binary.tar.gz': bytes(whole)})
  refused('cifar10', folders)


@pytest.mark.parametrize('text', [b'\xff\xfe', b'', b'ab'])
def test_a_text_that_is_none_is_one_line_and_leaves_nothing(put, folders, text):
  put('tiny_shakespeare', {'input.txt': text})
  refused('tiny_shakespeare', folders, 'input.txt')


# --------------------------------------------------------------------- stopped


def test_a_signal_leaves_nothing_and_the_next_run_prepares(
  put, folders, monkeypatch
):
  files, splits = mnist_files()
  put('mnist', files)
  monkeypatch.setattr(signals, '_received', signal.SIGTERM)
  with pytest.raises(signals.Stopped):
    prepare.find_or_prepare('mnist', None, print)
  assert not tree(folders / 'tfds')
  monkeypatch.setattr(signals, '_received', None)
  check_images(load('mnist')[0]['train'], *splits['train'])


def test_what_a_killed_preparation_left_is_removed(put, folders):
  left = folders / 'tfds' / 'mnist' / 'incomplete.ABCDEF_3.0.1'
  left.mkdir(parents=True)
  (left / 'mnist-train.array_record-00000-of-00001').write_bytes(b'half')
  put('mnist', mnist_files()[0])
  load('mnist')
  assert [p.name for p in (folders / 'tfds' / 'mnist').iterdir()] == ['3.0.1']
