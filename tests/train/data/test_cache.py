"""The decoded cache: whole or not there, private, and never executed."""

import json
import os
import pathlib
import signal
import stat
import subprocess
import sys

import numpy as np
import pytest

from train import config as config_lib
from train.data import cache

REPOSITORY = pathlib.Path(__file__).parents[3]
IMAGES = np.arange(24, dtype='uint8').reshape(6, 2, 2, 1)
LABELS = np.arange(6, dtype='int32')


class Decoder:
  """Gives the six examples, and counts how often it is asked."""

  def __init__(self):
    self.calls = 0

  def __call__(self):
    self.calls += 1
    examples = (
      {'image': image, 'label': label}
      for image, label in zip(IMAGES, LABELS, strict=True)
    )
    return len(LABELS), examples


@pytest.fixture
def path(tmp_path):
  return tmp_path / 'dataset' / 'train'


@pytest.fixture
def decode():
  return Decoder()


def check(arrays):
  """They are what was decoded."""
  assert set(arrays) == {'image', 'label'}
  assert arrays['image'].dtype == IMAGES.dtype
  assert arrays['label'].dtype == LABELS.dtype
  assert np.array_equal(arrays['image'], IMAGES)
  assert np.array_equal(arrays['label'], LABELS)


def names(folder):
  """What lies in a folder but for locks, hidden files too."""
  return sorted(p.name for p in folder.iterdir() if p.suffix != '.lock')


# -------------------------------------------------------------------- arrays


def test_a_split_is_decoded_once(path, decode):
  lines = []
  check(cache.open_or_decode(path, decode, lines.append))
  check(cache.open_or_decode(path, decode, lines.append))
  assert decode.calls == 1
  assert lines == []


def test_arrays_are_memory_maps_that_cannot_be_written(path, decode):
  for _ in range(2):  # As they were made, and as they are found.
    arrays = cache.open_or_decode(path, decode, print)
    for array in arrays.values():
      assert isinstance(array, np.memmap)
      assert not array.flags.writeable
      with pytest.raises(ValueError, match='read-only'):
        array[0] = 1
  assert names(path.parent) == ['train']
  assert names(path) == ['image.npy', 'index.json', 'label.npy']


@pytest.mark.parametrize('change', ['shorter', 'longer', 'empty', 'missing'])
@pytest.mark.parametrize('key', ['image', 'label'])
def test_a_file_of_another_length_is_made_again_and_said(
  path, decode, key, change
):
  cache.open_or_decode(path, decode, print)
  file = path / f'{key}.npy'
  whole = file.read_bytes()
  if change == 'missing':
    file.unlink()
  else:
    file.write_bytes(
      {'shorter': whole[:-1], 'longer': whole + b'x', 'empty': b''}[change]
    )
  lines = []
  check(cache.open_or_decode(path, decode, lines.append))
  assert decode.calls == 2
  assert len(lines) == 1
  assert '\n' not in lines[0]
  assert str(path) in lines[0]
  assert f'{key}.npy' in lines[0]
  # And then it is whole again.
  check(cache.open_or_decode(path, decode, lines.append))
  assert decode.calls == 2
  assert len(lines) == 1


@pytest.mark.parametrize(
  'text', ['', '{', '[]', '3', 'null', '{"image": "x"}', '{"../../x": 1}']
)
def test_an_index_that_cannot_be_read_is_made_again(path, decode, text):
  cache.open_or_decode(path, decode, print)
  (path / 'index.json').write_text(text)
  lines = []
  check(cache.open_or_decode(path, decode, lines.append))
  assert decode.calls == 2
  assert len(lines) == 1


class Trap:
  """Whoever unpickles this makes the folder that it names."""

  def __init__(self, folder):
    self.folder = folder

  def __reduce__(self):
    return os.mkdir, (self.folder,)


def test_a_pickle_in_the_place_of_an_array_is_never_loaded(
  path, decode, tmp_path
):
  cache.open_or_decode(path, decode, print)
  sprung = tmp_path / 'sprung'
  file = path / 'image.npy'
  trap = np.empty(1, object)
  trap[0] = Trap(str(sprung))
  np.save(file, trap, allow_pickle=True)
  # The index agrees with it, as an attacker would see to.
  index = json.loads((path / 'index.json').read_text())
  index['image'] = file.stat().st_size
  (path / 'index.json').write_text(json.dumps(index))
  lines = []
  check(cache.open_or_decode(path, decode, lines.append))
  assert len(lines) == 1
  assert not sprung.exists()
  # The trap does work.
  np.save(file, trap, allow_pickle=True)
  np.load(file, allow_pickle=True)
  assert sprung.exists()


# ----------------------------------------------------- failures and processes


def test_a_decoder_that_fails_leaves_nothing(path, decode):
  def fails():
    def examples():
      yield {'image': IMAGES[0], 'label': LABELS[0]}
      raise RuntimeError('a bad record')

    return 6, examples()

  with pytest.raises(RuntimeError, match='a bad record'):
    cache.open_or_decode(path, fails, print)
  assert names(path.parent) == []
  check(cache.open_or_decode(path, decode, print))


# Decodes its six examples slowly, appending a line for each to a file.
WRITER = """
import pathlib, sys, time
import numpy as np
from train.data import cache
path, log, ready, count = sys.argv[1:]
ready = pathlib.Path(ready)
(ready / str(time.perf_counter_ns())).touch()
for _ in range(3000):
  if len(list(ready.iterdir())) >= int(count): break
  time.sleep(0.01)
def examples():
  for i in range(6):
    with open(log, 'a') as file:
      file.write(f'{i}\\n')
    image = np.arange(24, dtype='uint8').reshape(6, 2, 2, 1)[i]
    yield {'image': image, 'label': np.int32(i)}
    time.sleep(0.05 if int(count) > 1 else 30 * (i == 3))
arrays = cache.open_or_decode(
  pathlib.Path(path), lambda: (6, examples()), print
)
print(arrays['image'].sum(), arrays['label'].tolist())
"""


def start(path, log, ready, count):
  ready.mkdir(exist_ok=True)
  words = map(str, (path, log, ready, count))
  return subprocess.Popen(
    [sys.executable, '-c', WRITER, *words],
    cwd=REPOSITORY,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def test_two_processes_at_once_decode_once_and_leave_one_copy(path, tmp_path):
  log = tmp_path / 'log'
  children = [start(path, log, tmp_path / 'ready', 2) for _ in range(2)]
  try:
    said = [child.communicate(timeout=60) for child in children]
  finally:
    for child in children:
      child.kill()
  assert [child.returncode for child in children] == [0, 0], said
  assert [out for out, _ in said] == [
    f'{IMAGES.sum()} {LABELS.tolist()}\n',
  ] * 2
  assert log.read_text().split() == list('012345')
  assert names(path.parent) == ['train']


def test_what_a_killed_writer_left_is_removed(path, tmp_path, decode):
  log = tmp_path / 'log'
  child = start(path, log, tmp_path / 'ready', 1)
  try:
    while len(log.read_text().split() if log.exists() else []) < 4:
      assert child.poll() is None, child.communicate()
    child.send_signal(signal.SIGKILL)
    child.communicate(timeout=60)
  finally:
    child.kill()
  left = names(path.parent)
  assert len(left) == 1
  assert left != ['train']
  # Somebody else's half-written folder of another split stays.
  (path.parent / '.test.abc').mkdir()
  lines = []
  check(cache.open_or_decode(path, decode, lines.append))
  assert names(path.parent) == ['.test.abc', 'train']
  assert lines == []


# ---------------------------------------------------------------------- root


def mode(folder):
  return stat.S_IMODE(folder.stat().st_mode)


def test_the_root_is_where_taishan_cache_says_and_private(
  tmp_path, monkeypatch
):
  folder = tmp_path / 'a' / 'b'
  monkeypatch.setenv('TAISHAN_CACHE', str(folder))
  monkeypatch.setattr(cache.platformdirs, 'user_cache_path', None)
  before = os.umask(0)
  try:
    assert cache.root() == folder
  finally:
    os.umask(before)
  assert mode(folder) == 0o700
  assert cache.root() == folder


@pytest.mark.parametrize('value', [None, ''])
def test_the_root_is_the_users_cache_folder_unless_told(
  tmp_path, monkeypatch, value
):
  if value is None:
    monkeypatch.delenv('TAISHAN_CACHE')
  else:
    monkeypatch.setenv('TAISHAN_CACHE', value)
  monkeypatch.setattr(
    cache.platformdirs, 'user_cache_path', lambda name: tmp_path / name
  )
  assert cache.root() == tmp_path / 'taishan'
  assert mode(tmp_path / 'taishan') == 0o700


def test_the_users_own_cache_folder_is_made_private(tmp_path, monkeypatch):
  monkeypatch.delenv('TAISHAN_CACHE')
  monkeypatch.setattr(
    cache.platformdirs, 'user_cache_path', lambda name: tmp_path / name
  )
  (tmp_path / 'taishan').mkdir()
  (tmp_path / 'taishan').chmod(0o755)
  cache.root()
  assert mode(tmp_path / 'taishan') == 0o700


def test_everything_in_the_cache_is_private(tmp_path, monkeypatch):
  monkeypatch.setenv('TAISHAN_CACHE', str(tmp_path / 'cache'))
  before = os.umask(0)
  try:
    path = cache.root() / 'decoded' / 'x' / 'train'
    cache.open_or_decode(path, Decoder(), print)
  finally:
    os.umask(before)
  assert mode(tmp_path / 'cache') == 0o700
  assert mode(path.parent) == 0o700
  assert mode(path) == 0o700
  locks = list(path.parent.glob('*.lock'))
  assert [mode(lock) for lock in locks] == [0o600]


@pytest.mark.parametrize('place', ['file', 'file/below'])
def test_a_root_that_cannot_be_made_is_refused(tmp_path, monkeypatch, place):
  (tmp_path / 'file').touch()
  monkeypatch.setenv('TAISHAN_CACHE', str(tmp_path / place))
  with pytest.raises(config_lib.UserError, match='TAISHAN_CACHE') as caught:
    cache.root()
  assert str(tmp_path / place) in str(caught.value)
  assert '\n' not in str(caught.value)


@pytest.mark.skipif(not hasattr(os, 'getuid'), reason='no users here')
def test_the_root_of_another_user_is_refused(tmp_path, monkeypatch):
  monkeypatch.setenv('TAISHAN_CACHE', str(tmp_path))
  monkeypatch.setattr(os, 'getuid', lambda: tmp_path.stat().st_uid + 1)
  with pytest.raises(config_lib.UserError, match='another user'):
    cache.root()
