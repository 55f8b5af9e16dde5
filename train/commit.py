"""How a checkpoint becomes one: by Orbax, with its manifest inside.

Each process hashes the arrays that it has while Orbax writes them. Process 0
makes one manifest of that, and of the files, before the last rename.
"""

import asyncio
from collections.abc import Callable
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import shutil
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from train import config as config_lib
from train import manifest
from train import processes

ITEM = 'state_digests'  # After 'state', which Orbax so waits for first.
LEFTOVERS = f'*{ocp.utils.TMP_DIR_SUFFIX}*'  # Half written, or half removed.
_LIBRARIES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')
# Orbax asks for these at each save; of 0.1.86 each answer stays in memory.
tensorstore.experimental_collect_matching_metrics = lambda *_: []


class NonFiniteError(Exception):
  """What was to be saved is not finite; it was not saved."""

  exit_code = 1


def manager(
  folder: pathlib.Path, policy: Any, meet: Callable | None, *, read_only: bool
) -> ocp.CheckpointManager:
  """Orbax's, of the checkpoints in `folder`.

  Args:
    folder: is made where it is to be written.
    policy: has should_preserve(), Orbax's question on which may stay.
    meet: where threads of several processes wait for each other.
    read_only: nothing is written.
  """
  return ocp.CheckpointManager(
    folder,
    options=ocp.CheckpointManagerOptions(
      preservation_policy=policy,
      read_only=read_only,
      lightweight_initialize=True,  # Reads no file before we have.
      temporary_path_class=Temporary,
      # What may go is renamed, or a kill would leave a half of it.
      todelete_subdir=f'removed{ocp.utils.TMP_DIR_SUFFIX}',
      async_options=ocp.AsyncOptions(
        barrier_sync_fn=meet,
        # Else threads wait 20 minutes for a folder that cannot be made.
        create_directories_asynchronously=False,
      ),
    ),
  )


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
  leaves: list[tuple[str, tuple, str, list[manifest.Block]]]

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
        digests[index], is_finite = manifest.digest(data)
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
      'format': manifest.FORMAT,
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
    for path, leaf in manifest.arrays(state).items()
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
    name: {'bytes': size, 'sha256': manifest.file_digest(folder / name)}
    for name, size in sorted(manifest.list_files(folder)[0].items())
  }
  with (folder / manifest.NAME).open('wb') as file:
    file.write(manifest.render(record))
    file.flush()
    os.fsync(file.fileno())


def _owned(leaf: jax.Array) -> list[manifest.Block]:
  """Copies of the blocks that this process is to speak for."""
  owned = {
    manifest.spelled(s.index, leaf.shape)
    for s in leaf.addressable_shards
    if s.replica_id == 0
  }
  if processes.is_main():
    owned.add('')
  blocks = manifest.blocks(leaf)
  return [(index, np.array(data)) for index, data in blocks if index in owned]
