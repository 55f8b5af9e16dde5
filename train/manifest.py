"""What Orbax does not do: digests of a checkpoint, and verifying them.

Orbax restores a flipped bit without an error. So each checkpoint has a
manifest.json: the shape, dtype and SHA-256 of every array as it was in memory,
the size and SHA-256 of every file, the config, the versions of the libraries,
and a digest of itself. It is written before the rename that makes a checkpoint
one, so there is no checkpoint without it. SHA-256, because processors have
instructions for it: 1.1 GB/s a core here, BLAKE2b 0.9.

An array's digest is over the bytes of the whole array, in C order, and so the
same on any mesh. Where an array is divided between processes, nobody has the
whole: each process gives the digests of its blocks, which are compared where a
reader has the same blocks or the whole; files are compared always.
"""

import asyncio
from collections.abc import Iterator
import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import pathlib
import shutil
import stat
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from train import config as config_lib
from train import processes

NAME = 'manifest.json'
ITEM = 'state_digests'  # After 'state', which Orbax so waits for first.
FORMAT = 1
_LIBRARIES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')
# Orbax asks for these at each save; of 0.1.86 each answer stays in memory.
tensorstore.experimental_collect_matching_metrics = lambda *_: []
_CHUNK = 2**18  # Numbers that are hashed and looked at while in the cache.


class DamagedError(config_lib.UserError):
  """A checkpoint is not what was saved."""


class NonFiniteError(Exception):
  """What was to be saved is not finite; it was not saved."""

  exit_code = 1


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


def _spelled(index: tuple[slice, ...], shape: tuple[int, ...]) -> str:
  ends = (s.indices(n) for s, n in zip(index, shape, strict=True))
  return ','.join(f'{start}:{stop}' for start, stop, _ in ends)


def _blocks(leaf: jax.Array) -> list[Block]:
  """All that this process has of an array: the whole in one, or its shards."""
  if leaf.is_fully_replicated:
    return [('', np.asarray(leaf.addressable_data(0)))]
  if leaf.is_fully_addressable:
    return [('', np.asarray(leaf))]
  shards = {
    _spelled(s.index, leaf.shape): s.data for s in leaf.addressable_shards
  }
  return [(index, np.asarray(data)) for index, data in shards.items()]


def _owned(leaf: jax.Array) -> list[Block]:
  """Copies of the blocks that this process is to speak for."""
  owned = {
    _spelled(s.index, leaf.shape)
    for s in leaf.addressable_shards
    if s.replica_id == 0
  }
  if processes.is_main():
    owned.add('')
  return [
    (index, np.array(data)) for index, data in _blocks(leaf) if index in owned
  ]


def _digest(array: np.ndarray, *, finite: bool = True) -> tuple[str, bool]:
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
    for index, data in _blocks(leaf):
      for name, digest in expected.items():
        if index not in ('', name):
          continue  # Of another mesh: not wholly here.
        part = data if name == index else data[_slices(name)]
        if _digest(part, finite=False)[0] != digest:
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


# ------------------------------------------------------- as a part of saving


class _Handler(ocp.AsyncCheckpointHandler):
  """Each process's digests, made while Orbax writes the arrays."""

  async def async_save(self, directory, args):
    saving = self._save(directory, args)
    return [ocp.future.CommitFutureAwaitingContractedSignals(saving, name=ITEM)]

  async def _save(self, directory, args):
    text = json.dumps(args.record())
    (directory / f'{processes.index()}.json').write_text(text)

  def save(self, directory, args):
    asyncio.run(self._save(directory, args))

  def restore(self, directory, args=None):
    raise NotImplementedError('manifest.read reads it')


@ocp.args.register_with_handler(_Handler, for_save=True, for_restore=True)
@dataclasses.dataclass
class Digests(ocp.args.CheckpointArgs):
  """What of a state is hashed in the background: its copy on this host.

  The step that follows takes over the memory of the state itself.
  """

  step: int
  config: dict[str, Any]
  leaves: list[tuple[str, tuple, str, list[Block]]]

  def record(self) -> dict[str, Any]:
    """This process's part of the manifest. Each copy goes once it is hashed.

    Raises:
      NonFiniteError: a number is nan or infinite.
    """
    entries = {}
    while self.leaves:
      path, shape, dtype, blocks = self.leaves.pop()
      digests = {}
      # An optimizer's scalars may begin at infinity, as a least loss does.
      may_be_infinite = not shape and path.startswith('opt_state/')
      for index, data in blocks:
        digests[index], is_finite = _digest(data)
        if not (is_finite or may_be_infinite):
          raise NonFiniteError(
            f'step {self.step} is not saved: {path} has become nan or infinite'
          )
      if digests:
        entries[path] = {
          'shape': list(shape),
          'dtype': dtype,
          'sha256': digests.get('', digests),
        }
    return {
      'format': FORMAT,
      'step': self.step,
      'arrays': entries,
      'config': self.config,
      'versions': {
        name: importlib.metadata.version(name) for name in _LIBRARIES
      },
    }


def digests(state, step: int, config: config_lib.Config) -> Digests:
  """Copies the state to this host; the rest is done in the background."""
  leaves = [
    (path, leaf.shape, str(leaf.dtype), _owned(leaf))
    for path, leaf in arrays(state).items()
  ]
  return Digests(step, dataclasses.asdict(config), leaves[::-1])


class Temporary(ocp.path.atomicity.AtomicRenameTemporaryPath):
  """Orbax's temporary folder, which has its manifest before its last rename.

  Orbax writes two files of its own just before it renames. So what it renames
  to is a temporary name too, and the folder becomes a checkpoint here. Its
  items have such folders within, which need nothing more.
  """

  @classmethod
  def from_final(cls, final_path, **options):
    """As Orbax's, for what will be `final_path`."""
    whole = final_path
    if ocp.utils.TMP_DIR_SUFFIX not in final_path.parent.name:
      name = f'{final_path.name}{ocp.utils.TMP_DIR_SUFFIX}-whole'
      whole = final_path.with_name(name)
    made = super().from_final(whole, **options)
    made._whole, made._committed = whole, final_path
    return made

  def get_final(self):
    """Where it will be."""
    return self._committed

  async def finalize(self):
    """Process 0 comes here, after all have written everything."""
    await super().finalize()
    if self._whole != self._committed:
      await asyncio.to_thread(_complete, pathlib.Path(self._whole))
      os.rename(self._whole, self._committed)


def _complete(folder: pathlib.Path):
  """Writes the manifest from the digests and the files in `folder`."""
  files = sorted((folder / ITEM).glob('*.json'))
  parts = [json.loads(file.read_text()) for file in files]
  shutil.rmtree(folder / ITEM)
  record = parts[0]
  for part in parts[1:]:
    for path, entry in part['arrays'].items():
      if path in record['arrays']:
        record['arrays'][path]['sha256'] |= entry['sha256']
      else:
        record['arrays'][path] = entry
  record['files'] = {
    name: {'bytes': size, 'sha256': _file_digest(folder / name)}
    for name, size in sorted(_list(folder)[0].items())
  }
  with (folder / NAME).open('wb') as file:
    file.write(_render(record))
    file.flush()
    os.fsync(file.fileno())


# ---------------------------------------------------- reading, without Orbax


def _render(record: dict[str, Any]) -> bytes:
  """A manifest's bytes; its own digest is its last entry."""
  text = json.dumps(record, indent=1)
  digest = hashlib.sha256(text.encode()).hexdigest()
  return (json.dumps(record | {'sha256': digest}, indent=1) + '\n').encode()


def _list(folder: pathlib.Path) -> tuple[dict[str, int], list[str]]:
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


def _file_digest(path: pathlib.Path) -> str:
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
  if not isinstance(record, dict) or _render(record) != data:
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
    files, odd = _list(folder)
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
      digest = _file_digest(folder / name)
    if digest != expected['sha256']:
      raise DamagedError(
        f'{name} has SHA-256 {digest[:8]} and not {expected["sha256"][:8]}'
      )
  return record | {'others': sorted({*odd, *files} - record['files'].keys())}
