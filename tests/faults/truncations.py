"""Every file of the newest checkpoint cut short, emptied, zeroed or deleted."""

import pathlib
import random

from tests.faults import trained
from train import manifest

WHAT = 'a file of the newest checkpoint cut short, zeroed in part or deleted'
_ZEROS = 4096


def _zeroed(data: bytes, draw: random.Random) -> bytes:
  """Zeros over a part that holds something else."""
  there = [i for i, byte in enumerate(data) if byte]
  if not there:
    return data
  start = max(0, draw.choice(there) - draw.randrange(_ZEROS))
  part = data[start : start + _ZEROS]
  return data[:start] + bytes(len(part)) + data[start + len(part) :]


DAMAGE = {
  'deleted': lambda data, draw: None,
  'emptied': lambda data, draw: b'',
  'a quarter': lambda data, draw: data[: len(data) // 4],
  'half': lambda data, draw: data[: len(data) // 2],
  'a byte less': lambda data, draw: data[:-1],
  'zeroed': _zeroed,
}
# Orbax divides what it writes into files as it likes, some fifteen to twenty:
# each has a turn, and some have two.
_FILES = 24
TRIALS = _FILES * len(DAMAGE)
SHORT = (0, 13, 26, 33)
_ENDS = {
  ' is missing': 'missing',
  'has no manifest.json': 'missing',
  ' bytes and not ': 'size',
  ' has SHA-256 ': 'digest',
  'manifest.json is damaged': 'manifest',
}


def trial(i: int, folder: pathlib.Path) -> str | None:
  """One kind of damage to one file; the run is to resume from the older one."""
  where, kind = divmod(i, len(DAMAGE))
  files = trained.files(trained.NEW)
  assert len(files) <= _FILES
  name = files[where % len(files)]
  trained.copy(folder, trained.OLD, trained.NEW)
  file = folder / trained.CHECKPOINTS / f'{trained.NEW}' / name
  before = file.read_bytes()
  after = [*DAMAGE.values()][kind](before, random.Random(i))
  assert after != before, f'{name} has nothing to damage: {before[:20]}'
  if after is None:
    file.unlink()
  else:
    file.write_bytes(after)
  said = []
  with trained.opened(folder, said) as checkpoints:
    state, step = checkpoints.restore_newest(trained.program())
  what = f'{name} {[*DAMAGE][kind]}'
  assert step == trained.OLD, f'{what}: step {step} was restored'
  assert trained.equal(state, step), f'{what}: other arrays'
  _check_lines(said, file, what)
  left = sorted(p.name for p in (folder / trained.CHECKPOINTS).iterdir())
  assert left == [f'{trained.OLD}', f'{trained.NEW}.damaged'], left
  kept = folder / trained.CHECKPOINTS / f'{trained.NEW}.damaged' / name
  there = kept.read_bytes() if kept.exists() else None
  assert there == after, f'{what}: what was set aside has changed'
  manifest.verify(folder / trained.CHECKPOINTS / f'{trained.OLD}')
  return next(word for text, word in _ENDS.items() if text in said[0])


def _check_lines(said: list[str], file: pathlib.Path, what: str):
  """One says what is wrong with which step, one from where it goes on."""
  assert len(said) == 2, f'{what}: {said}'
  assert '\n' not in said[0], said[0]
  for word in (f'/{trained.NEW} ', file.name, f'{trained.NEW}.damaged'):
    assert word in said[0], f'{what}: {word!r} is not in {said[0]!r}'
  assert said[1] == f'resuming from step {trained.OLD}', said
