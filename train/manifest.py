"""What Orbax does not do: digests of a checkpoint, and verifying them.

Orbax restores a flipped bit without an error. So each checkpoint has a
manifest.json: the shape, dtype and SHA-256 of every array as it was in memory,
the size and SHA-256 of every file, the config, the versions of the libraries,
and a digest of itself. commit.py writes it before the rename that makes a
checkpoint one, so there is no checkpoint without it.

An array's digest is over the bytes of the whole, in C order: the same on any
mesh. Of an array divided between processes each gives the digests of its
blocks, which are compared where a reader has the same blocks or the whole.
Files are compared first, so that no library is given damaged ones to read.
"""

from collections.abc import Iterator
import contextlib
import hashlib
import json
import os
import pathlib
import stat
from typing import Any

import jax
import numpy as np

from train import config as config_lib

NAME = 'manifest.json'
FORMAT = 1
_CHUNK = 2**16  # Numbers that are hashed and looked at while in the cache.


class DamagedError(config_lib.UserError):
  """A checkpoint is not what was saved."""


# ------------------------------------------------------------------- arrays

Block = tuple[str, np.ndarray]  # Which part, as '0:4,8:16', '' for all of it.


def arrays(tree) -> dict[str, Any]:
  """Path -> leaf, as 'params/blocks/0/kernel', of a state or a part of it."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {
    jax.tree_util.keystr(path, simple=True, separator='/'): _plain(leaf)
    for path, leaf in leaves
  }


def _plain(leaf):
  """A random key as its numbers, which some optimizers have in their state."""
  if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    return leaf
  if isinstance(leaf, jax.Array):
    return jax.random.key_data(leaf)
  return jax.eval_shape(jax.random.key_data, leaf)


def spelled(index: tuple[slice, ...], shape: tuple[int, ...]) -> str:
  """A block's place, as '0:4,8:16': from and to in each dimension."""
  ends = (s.indices(n) for s, n in zip(index, shape, strict=True))
  return ','.join(f'{start}:{stop}' for start, stop, _ in ends)


def blocks(leaf: jax.Array) -> list[Block]:
  """All that this process has of an array: the whole in one, or its shards."""
  if leaf.is_fully_replicated:
    return [('', np.asarray(leaf.addressable_data(0)))]
  if leaf.is_fully_addressable:
    return [('', np.asarray(leaf))]
  shards = {
    spelled(s.index, leaf.shape): s.data for s in leaf.addressable_shards
  }
  return [(index, np.asarray(data)) for index, data in shards.items()]


def digest(array: np.ndarray, *, finite: bool = True) -> tuple[str, bool]:
  """SHA-256 of an array's bytes; if `finite`, whether all its numbers are."""
  sha, is_finite = hashlib.sha256(), True
  flat = np.ascontiguousarray(array).reshape(-1)
  is_exact = not finite or array.dtype.kind in 'iub'
  for start in range(0, flat.size, _CHUNK):
    part = flat[start : start + _CHUNK]
    sha.update(part.view(np.uint8))
    is_finite = is_finite and (is_exact or bool(np.isfinite(part).all()))
  return sha.hexdigest(), is_finite


def check_arrays(tree, record: dict[str, Any]):
  """Raises DamagedError where a restored array is not the one saved."""
  for path, leaf in arrays(tree).items():
    expected = record['arrays'][path]['sha256']
    if isinstance(expected, str):
      expected = {'': expected}
    for index, data in blocks(leaf):
      for name, wanted in expected.items():
        if index not in ('', name):
          continue  # Of another mesh: not wholly here.
        part = data if name == index else data[_slices(name)]
        if digest(part, finite=False)[0] != wanted:
          raise DamagedError(f'{path} is not the array that was saved')


def _slices(index: str) -> tuple[slice, ...]:
  return tuple(slice(*map(int, s.split(':'))) for s in index.split(','))


def check_shapes(tree, record: dict[str, Any], *, whole: bool):
  """Raises UserError where shapes that are asked for are not those saved."""
  saved = {
    path: f'{tuple(entry["shape"])} {entry["dtype"]}'
    for path, entry in record['arrays'].items()
  }
  wanted = {
    path: f'{leaf.shape} {leaf.dtype}' for path, leaf in arrays(tree).items()
  }
  for path in wanted | saved if whole else wanted:
    here, there = wanted.get(path, 'not'), saved.get(path, 'not')
    if here != there:
      raise config_lib.UserError(f'{path} is {here} here and was {there}')


# ---------------------------------------------------- reading, without Orbax


def render(record: dict[str, Any]) -> bytes:
  """A manifest's bytes; its own digest is its last entry."""
  text = json.dumps(record, indent=1)
  digest = hashlib.sha256(text.encode()).hexdigest()
  return (json.dumps(record | {'sha256': digest}, indent=1) + '\n').encode()


def list_files(folder: pathlib.Path) -> tuple[dict[str, int], list[str]]:
  """Path -> bytes of each file below, and what is neither that nor a folder.

  No link is followed.
  """
  files, odd = {}, []

  def fail(error: OSError):
    raise error

  for root, folders, names in os.walk(folder, onerror=fail):
    for name in (*folders, *names):
      path = os.path.join(root, name)
      status = os.lstat(path)
      relative = os.path.relpath(path, folder)
      if stat.S_ISREG(status.st_mode):
        files[relative] = status.st_size
      elif not stat.S_ISDIR(status.st_mode):
        odd.append(relative)
  files.pop(NAME, None)
  return files, odd


def file_digest(path: pathlib.Path) -> str:
  """SHA-256 of a file, in hexadecimal; a link is an error."""
  with _open(path) as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def _open(path: pathlib.Path):
  # A link is an error, and a pipe keeps nobody waiting.
  flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
  return open(os.open(path, flags), 'rb')


@contextlib.contextmanager
def _reading(what: str) -> Iterator[None]:
  try:
    yield
  except OSError as error:
    raise DamagedError(
      f'{what} cannot be read ({error.strerror or error})'
    ) from None


def read(folder: pathlib.Path) -> dict[str, Any]:
  """The manifest of a checkpoint, whose folder is named after its step.

  Raises:
    DamagedError: it is missing or damaged, or of another step.
  """
  if folder.is_symlink() or not folder.is_dir():
    raise DamagedError('it is no folder')
  if not os.path.lexists(folder / NAME):
    raise DamagedError(f'it has no {NAME}: damaged, or older than those are')
  with _reading(NAME), _open(folder / NAME) as file:
    data = file.read()
  record = None
  with contextlib.suppress(ValueError, RecursionError):
    record = json.loads(data)
  if isinstance(record, dict):
    record.pop('sha256', None)
  if not isinstance(record, dict) or render(record) != data:
    raise DamagedError(f'{NAME} is damaged')
  if record.get('format') != FORMAT:
    raise DamagedError(f'{NAME} is of another version of this program')
  if str(record['step']) != folder.name:
    raise DamagedError(f'{NAME} is that of step {record["step"]}')
  return record


def verify(folder: pathlib.Path) -> dict[str, Any]:
  """The manifest of a checkpoint, with which every file agrees.

  To its entries comes 'others': what else lies in the folder, which nobody
  reads.

  Raises:
    DamagedError: a file is missing or differs; it is named.
  """
  record = read(folder)
  with _reading('the folder'):
    files, odd = list_files(folder)
  for name, expected in record['files'].items():
    if name in odd:
      raise DamagedError(f'{name} is no regular file')
    if name not in files:
      raise DamagedError(f'{name} is missing')
    if files[name] != expected['bytes']:
      raise DamagedError(
        f'{name} has {files[name]} bytes and not {expected["bytes"]}'
      )
  for name, expected in record['files'].items():
    with _reading(name):
      found = file_digest(folder / name)
    if found != expected['sha256']:
      raise DamagedError(
        f'{name} has SHA-256 {found[:8]} and not {expected["sha256"][:8]}'
      )
  return record | {'others': sorted({*odd, *files} - record['files'].keys())}
