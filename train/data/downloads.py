"""The original files of a dataset, downloaded once or put there by hand.

A file is looked for, by its published name, in the cache's
downloads/<dataset>, then in <folder>/<dataset> and <folder>, where the folder
is config.data.data_dir and then TFDS_DATA_DIR. What is in none of them is
downloaded into the first. No file is used whose SHA-256 is not the published
one.
"""

from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import dataclasses
import hashlib
import http.client
import os
import pathlib
import time
import urllib.error
import urllib.parse
import urllib.request

import filelock

from train import config as config_lib
from train import signals
from train.data import cache

_CHUNK = 1 << 16
_TIMEOUT_SECONDS = 20
_REPORT_SECONDS = 5
_DELAYS = (1, 3, 10)  # Seconds before the second, third and fourth try.
_STOPPED = 'stopped before training began; nothing to save'


@dataclasses.dataclass(frozen=True)
class File:
  """A file as its authors publish it."""

  url: str
  size: int
  sha256: str

  @property
  def name(self) -> str:
    """The last part of its URL."""
    return self.url.rpartition('/')[2]


_MNIST = 'https://storage.googleapis.com/cvdf-datasets/mnist/'
_FASHION = 'http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/'
_CIFAR = 'https://www.cs.toronto.edu/~kriz/'
_KARPATHY = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/'

# URLs, sizes and digests are those that TFDS 4.9.10 lists (url_checksums/ and
# datasets/tiny_shakespeare/checksums.tsv).
FILES = {
  'mnist': (
    File(
      _MNIST + 'train-images-idx3-ubyte.gz',
      9_912_422,
      '440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609',
    ),
    File(
      _MNIST + 'train-labels-idx1-ubyte.gz',
      28_881,
      '3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c',
    ),
    File(
      _MNIST + 't10k-images-idx3-ubyte.gz',
      1_648_877,
      '8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6',
    ),
    File(
      _MNIST + 't10k-labels-idx1-ubyte.gz',
      4_542,
      'f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6',
    ),
  ),
  'fashion_mnist': (
    File(
      _FASHION + 'train-images-idx3-ubyte.gz',
      26_421_880,
      '3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84',
    ),
    File(
      _FASHION + 'train-labels-idx1-ubyte.gz',
      29_515,
      'a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845',
    ),
    File(
      _FASHION + 't10k-images-idx3-ubyte.gz',
      4_422_102,
      '346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073',
    ),
    File(
      _FASHION + 't10k-labels-idx1-ubyte.gz',
      5_148,
      '67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5',
    ),
  ),
  'cifar10': (
    File(
      _CIFAR + 'cifar-10-binary.tar.gz',
      170_052_171,
      'c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd',
    ),
  ),
  'cifar100': (
    File(
      _CIFAR + 'cifar-100-binary.tar.gz',
      168_513_733,
      '58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec',
    ),
  ),
  'tiny_shakespeare': (
    File(
      _KARPATHY + 'tinyshakespeare/input.txt',
      1_115_394,
      '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed',
    ),
  ),
}


def fetch(
  name: str, data_dir: str | None, say: Callable[[str], None]
) -> dict[str, pathlib.Path]:
  """The dataset's original files, file name -> path, with the right SHA-256.

  Args:
    name: a key of FILES.
    data_dir: a folder that may hold them, looked at before TFDS_DATA_DIR.
    say: takes lines for the user.

  Raises:
    UserError: a file is not the original one, or cannot be downloaded.
    Stopped: a signal came. What has arrived stays, and the next call goes on.
  """
  files = FILES[name]
  folder = cache.root() / 'downloads' / name
  places = [folder]
  for root in (data_dir, os.environ.get('TFDS_DATA_DIR')):
    if root:
      places.append(pathlib.Path(root).expanduser() / name)
      places.append(pathlib.Path(root).expanduser())
  try:
    with hold(folder, name, say):
      found = {file.name: _find(name, file, places) for file in files}
      missing = [file for file in files if found[file.name] is None]
      if missing:
        folder.mkdir(mode=0o700, exist_ok=True)
        hosts = {urllib.parse.urlsplit(file.url).netloc for file in missing}
        say(
          f'downloading {name}: {_sizes(missing)} from {", ".join(hosts)} into '
          f'{folder}'
        )
      for file in missing:
        found[file.name] = _download(name, file, missing, folder, say)
  except OSError as error:
    raise config_lib.UserError(
      f'the files of {name} cannot be read or written: {error}; set '
      'TAISHAN_CACHE to a folder of your own with room for them'
    ) from None
  return found


@contextlib.contextmanager
def hold(
  path: pathlib.Path, name: str, say: Callable[[str], None]
) -> Iterator[None]:
  """cache.locked(path), waited for so that Ctrl-C ends the wait."""
  lock = cache.locked(path)
  began, said = time.monotonic(), False
  while True:
    try:
      lock.acquire(timeout=0.2)
      break
    except filelock.Timeout:
      signals.check(_STOPPED)
      if not said and time.monotonic() - began > _REPORT_SECONDS:
        said = True
        say(f'waiting for another process that prepares {name}')
  try:
    yield
  finally:
    lock.release()


def _find(name: str, file: File, places: list) -> pathlib.Path | None:
  """The first of the places that holds the file, None where none does."""
  for place in places:
    path = place / file.name
    if not path.is_file():
      continue
    found = _digest(path)
    if found == file.sha256:
      return path
    # MNIST and Fashion-MNIST call their files the same; and outside a folder
    # of the dataset's own, a file of that name may be anything.
    others = {f.sha256 for files in FILES.values() for f in files}
    if found in others or place.name != name:
      continue
    raise config_lib.UserError(
      f'{path} is not the original file of {name}: its SHA-256 is '
      f'{found[:12]}..., expected {file.sha256[:12]}...; remove it, or replace '
      f'it by {file.url}'
    )
  return None


class _BrokenOffError(Exception):
  """A transfer ended early; `again`: another try may help."""

  def __init__(self, reason: str, again: bool = True):
    super().__init__(reason)
    self.again = again


def _download(name, file: File, missing, folder, say) -> pathlib.Path:
  """One whole file in the folder; `missing` are all that it still lacks."""
  path = folder / file.name
  partial = folder / f'{file.name}.partial'
  delays = list(_DELAYS)
  while True:
    there = partial.stat().st_size if partial.exists() else 0
    try:
      if there < file.size:
        there = _transfer(file, partial, there, say)
    except _BrokenOffError as error:
      if not (error.again and delays):
        raise config_lib.UserError(
          f'config.data.name is {name!r}, whose {file.name} cannot be '
          f'downloaded from {file.url}: {error}; try again, or put the missing '
          f'{_sizes(missing)} ({", ".join(f.url for f in missing)}) into '
          f'{folder} by hand, or set config.data.data_dir to a folder that '
          'holds them'
        ) from None
      say(f'{file.name}: {error}; trying again in {delays[0]} s')
      _pause(delays.pop(0))
      continue
    found = _digest(partial)
    if found == file.sha256:
      os.replace(partial, path)
      return path
    partial.unlink()
    if not there:
      raise config_lib.UserError(
        f'{file.name} of {name}, as {file.url} gives it, has the SHA-256 '
        f'{found[:12]}..., expected {file.sha256[:12]}...; it was removed: try '
        f'again later, or put the original file into {folder} by hand'
      )
    say(f'{file.name}: the part that was there does not fit; starting again')


def _transfer(file: File, partial: pathlib.Path, there: int, say) -> int:
  """Adds to the `there` bytes what is missing; what was kept of them: all or 0.

  Raises:
    _BrokenOffError: the network failed, or the server has another file.
  """
  request = urllib.request.Request(file.url, headers={'User-Agent': 'taishan'})
  if there:
    request.add_header('Range', f'bytes={there}-')
  try:
    response = urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS)
  except urllib.error.HTTPError as error:
    error.close()
    if there and error.code == 416:  # The server's file ends before that.
      partial.unlink()
      return _transfer(file, partial, 0, say)
    again = error.code >= 500 or error.code in (408, 429)
    raise _BrokenOffError(f'HTTP {error.code} {error.reason}', again) from None
  except (OSError, http.client.HTTPException) as error:
    reason = getattr(error, 'reason', error)
    raise _BrokenOffError(config_lib.first_line(reason)) from None
  with response:
    if there and response.status != 206:
      there = 0  # The server ignores ranges and sends everything.
    length = response.headers.get('Content-Length', '')
    if length.isdecimal() and there + int(length) != file.size:
      partial.unlink(missing_ok=True)
      if there:
        return _transfer(file, partial, 0, say)
      raise _BrokenOffError(
        f'the server has {int(length):,} bytes where the original has '
        f'{file.size:,}',
        again=False,
      )
    _receive(file, response, partial, there, say)
  return there


def _receive(file: File, response, partial: pathlib.Path, there: int, say):
  """Writes the response behind the first `there` bytes."""
  done, reported = there, time.monotonic()
  with partial.open('ab' if there else 'wb') as out:
    while done < file.size:
      try:
        chunk = response.read1(min(_CHUNK, file.size - done))
      except (OSError, http.client.HTTPException) as error:
        raise _BrokenOffError(config_lib.first_line(error)) from None
      if not chunk:
        raise _BrokenOffError(
          f'it broke off after {done:,} of {file.size:,} bytes'
        )
      out.write(chunk)
      done += len(chunk)
      signals.check(_STOPPED)
      if time.monotonic() - reported > _REPORT_SECONDS:
        reported = time.monotonic()
        say(
          f'downloading {file.name}: {done / 1e6:.1f} of '
          f'{file.size / 1e6:.1f} MB'
        )
    out.flush()
    os.fsync(out.fileno())  # Its final name is to mean that it is whole.


def _pause(seconds: float):
  end = time.monotonic() + seconds
  while time.monotonic() < end:
    signals.check(_STOPPED)
    time.sleep(min(0.1, seconds))


def _digest(path: pathlib.Path) -> str:
  with path.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def _sizes(files) -> str:
  """'4 files, 11.6 MB'."""
  plural = '' if len(files) == 1 else 's'
  return f'{len(files)} file{plural}, {sum(f.size for f in files) / 1e6:.1f} MB'
