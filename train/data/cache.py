"""Decoded examples on disk: one .npy a key, memory-mapped.

Decoding a record costs a hundred times more than reading it, so every split is
decoded once. A split is written beside its place and renamed into it, under a
lock: another process sees all of it or nothing, and a killed one leaves only a
folder that the next removes.
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
import json
import os
import pathlib
import shutil
import stat
import tempfile
import time

import filelock
import numpy as np
import platformdirs

from train import config as config_lib
from train import signals

_INDEX = 'index.json'
_DAMAGED = 'damaged'  # In the index: row -> what is wrong with its record.
_REPORT_SECONDS = 5


def root() -> pathlib.Path:
  """TAISHAN_CACHE, or the user's cache folder; private to the user.

  Raises:
    UserError: it cannot be made, or belongs to somebody else.
  """
  named = os.environ.get('TAISHAN_CACHE')
  path = pathlib.Path(named or platformdirs.user_cache_path('taishan'))
  try:
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = path.stat()
  except OSError as error:
    raise config_lib.UserError(
      f'the cache folder {path} cannot be made ({error.strerror}); set '
      'TAISHAN_CACHE to a folder of your own'
    ) from None
  if hasattr(os, 'getuid') and status.st_uid != os.getuid():
    raise config_lib.UserError(
      f'the cache folder {path} belongs to another user; set TAISHAN_CACHE to '
      'a folder of your own'
    )
  if not os.access(path, os.W_OK | os.X_OK):
    raise config_lib.UserError(
      f'the cache folder {path} cannot be written; set TAISHAN_CACHE to a '
      'folder of your own'
    )
  if stat.S_IMODE(status.st_mode) & 0o077 and not named:
    path.chmod(0o700)
  return path


def locked(path: pathlib.Path) -> filelock.BaseFileLock:
  """Held by one process at a time; free again when that process dies."""
  path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
  return filelock.FileLock(f'{path}.lock', mode=0o600)


def open_or_decode(
  path: pathlib.Path,
  decode: Callable[[], tuple[int, Iterator[Mapping[str, np.ndarray] | str]]],
  say: Callable[[str], None],
) -> dict[str, np.ndarray]:
  """The split at `path`, key -> read-only memory map [n, ...].

  Args:
    path: the split's folder, made by this function alone.
    decode: gives the number of examples and an iterator over them, where a
      damaged one is a word on what is wrong; called only where the folder is
      missing or damaged.
    say: takes a line for the user.
  """
  if (arrays := _open(path, say)) is not None:
    return arrays
  with locked(path):
    if (arrays := _open(path, lambda line: None)) is not None:
      return arrays  # Another process made it while this one waited.
    shutil.rmtree(path, ignore_errors=True)
    for leftover in path.parent.glob(f'.{path.name}.*'):
      shutil.rmtree(leftover, ignore_errors=True)
    _write(path, *decode(), say)
  arrays = _open(path, say)
  if arrays is None:
    raise OSError(f'{path} could not be read back after it was written')
  return arrays


def damaged(path: pathlib.Path) -> dict[int, str]:
  """Row -> what was wrong with its record when that split was decoded."""
  index = json.loads((path / _INDEX).read_text())
  return {int(row): why for row, why in index.get(_DAMAGED, {}).items()}


def remove(path: pathlib.Path):
  """Removes a split, so that it is decoded anew."""
  with locked(path):
    shutil.rmtree(path, ignore_errors=True)


def _open(path: pathlib.Path, say) -> dict[str, np.ndarray] | None:
  """The arrays, or None where they are missing or not as long as they were."""
  index = path / _INDEX
  if not index.exists():
    return None
  try:
    arrays = {}
    sizes = json.loads(index.read_text())
    sizes = {key: size for key, size in sizes.items() if key != _DAMAGED}
    if not sizes:
      raise ValueError('it names no file')
    for key, size in sizes.items():
      file = path / f'{key}.npy'
      if file.stat().st_size != size:
        raise ValueError(
          f'{file.name} has {file.stat().st_size:,} bytes of {size:,}'
        )
      arrays[key] = np.load(file, mmap_mode='r', allow_pickle=False)
    return arrays
  except (OSError, ValueError, AttributeError) as error:
    say(f'the data cache {path} is damaged ({error}); it is made again')
    return None


def _write(path: pathlib.Path, length: int, examples, say):
  """Decodes into a folder beside `path`, then renames it into place."""
  folder = pathlib.Path(
    tempfile.mkdtemp(prefix=f'.{path.name}.', dir=path.parent)
  )
  try:
    arrays, wrong, row = {}, {}, -1
    reported = time.monotonic()
    for row, example in enumerate(examples):
      if isinstance(example, str):
        wrong[row], example = example, {}  # Zeros stay in its place.
      for key, value in example.items():
        if key not in arrays:
          arrays[key] = np.lib.format.open_memmap(
            folder / f'{key}.npy',
            mode='w+',
            dtype=value.dtype,
            shape=(length, *value.shape),
          )
        arrays[key][row] = value
      signals.check('stopped before training began; nothing to save')
      if time.monotonic() - reported > _REPORT_SECONDS:
        reported = time.monotonic()
        say(f'decoding {path.name}: {row + 1:,} of {length:,} examples')
    if not arrays or row + 1 != length:
      raise OSError(f'{path.name} gave {row + 1} examples of {length}')
    for array in arrays.values():
      array.flush()
    index = {key: (folder / f'{key}.npy').stat().st_size for key in arrays}
    if wrong:
      index[_DAMAGED] = wrong
    (folder / _INDEX).write_text(json.dumps(index))
    folder.rename(path)
  except BaseException:
    shutil.rmtree(folder, ignore_errors=True)
    raise
