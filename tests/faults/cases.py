"""Short runs of every family, and of all that a state remembers.

Each lasts a second or two of training, evaluates, and saves several times.
"""

import dataclasses
import os
import pathlib

import filelock

from tests import process as process_lib
from tests import runs
from train import workdir as workdir_lib

EVERY = 20  # Steps from one checkpoint to the next.
LOGGED = 5  # And from one line of metrics.jsonl to the next.
STEPS = 120
_CADENCES = {
  'total_steps': STEPS,
  'log_every': LOGGED,
  'eval_every': 2 * EVERY,
  'checkpoint_every': EVERY,
}


@dataclasses.dataclass(frozen=True)
class Case:
  """A command: launch with these words, in so many processes and devices."""

  config: str
  fields: dict = dataclasses.field(default_factory=dict)
  processes: int = 1
  devices: int = 1

  def words(self, workdir) -> list[str]:
    """Of the command."""
    fields = (_CADENCES | self.fields).items()
    return [
      f'--config={self.config}',
      *(f'--config.{path}={value}' for path, value in fields),
      f'--workdir={workdir}',
      *([f'--processes={self.processes}'] if self.processes > 1 else []),
    ]

  def environment(self) -> dict[str, str]:
    """Of the command."""
    return {
      'JAX_PLATFORMS': 'cpu',
      'JAX_NUM_CPU_DEVICES': str(self.devices // self.processes),
      'XLA_FLAGS': '',
    }

  def start(self, workdir, **environment) -> process_lib.Process:
    """The command, to be used as a context manager."""
    environment |= self.environment()
    return process_lib.Process('launch', *self.words(workdir), **environment)

  def finish(self, workdir, **environment) -> process_lib.Process:
    """The command to its end, which must be a good one."""
    with self.start(workdir, **environment) as process:
      code = process.end(300)
    assert (code, process.errors) == (0, ''), process.errors
    return process


CASES = {
  'mlp': Case('digits_mlp', {'model.dropout': 0.3}),
  'cnn': Case(
    'digits_cnn',
    {
      'data.augment': "('pad_crop',)", 'ema_decay': 0.99,
      'model.widths': '8,16',
    },
  ),
  'resnet': Case(
    'digits_cnn',
    {
      'model.name': 'resnet', 'model.variant': '18', 'model.stem': '3x3',
      'model.width': 8, 'optimizer.name': 'sgd', 'optimizer.momentum': 0.9,
    },
  ),
  'vit': Case(
    'digits_vit',
    {'model.width': 32, 'model.depth': 2, 'dtype': 'bfloat16',
     'model.dropout': 0.1},
  ),
  'lstm': Case('digits_lstm', {'model.widths': '32,'}),
  'autoencoder': Case('digits_autoencoder', {'model.widths': '64,32'}),
  'accumulated': Case(
    'digits_mlp', {'accumulate': 4, 'data.augment': "('mixup',)"}
  ),
  'eight devices': Case(
    'digits_cnn', {'mesh.fsdp': 2, 'mesh.tensor': 2, 'model.widths': '8,16'},
    devices=8,
  ),
  'two processes': Case(
    'digits_mlp', {'mesh.fsdp': 2, 'model.dropout': 0.3}, processes=2,
    devices=4,
  ),
}  # fmt: skip


def unbroken(name: str, folder: pathlib.Path) -> tuple[bytes, str]:
  """metrics.jsonl and the digest of the last state of a run never stopped.

  It is run once, in `folder`.
  """
  folder.mkdir(parents=True, exist_ok=True)
  workdir = folder / name.replace(' ', '_')
  with filelock.FileLock(f'{workdir}.lock'):
    if not (workdir / 'whole').exists():
      CASES[name].finish(workdir)
      (workdir / 'whole').write_text(runs.digest(workdir))
  return metrics(workdir), (workdir / 'whole').read_text()


def metrics(workdir) -> bytes:
  """What was measured."""
  return (workdir / 'metrics.jsonl').read_bytes()


def check_equal(name: str, workdir: pathlib.Path, folder: pathlib.Path):
  """No byte of what was measured or learned tells the run from `unbroken`."""
  measured, learned = unbroken(name, folder)
  assert metrics(workdir) == measured, 'metrics.jsonl differs'
  assert runs.digest(workdir) == learned, 'the last state differs'


def saved(workdir: pathlib.Path) -> int:
  """The newest step that is a checkpoint, or 0."""
  folder = workdir / workdir_lib.CHECKPOINTS
  names = os.listdir(folder) if folder.exists() else []
  return max((int(name) for name in names if name.isdecimal()), default=0)
