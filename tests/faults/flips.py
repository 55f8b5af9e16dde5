"""A single bit of the newest checkpoint flipped, anywhere in any file."""

import pathlib
import random

from tests.faults import trained
from train import config as config_lib

WHAT = 'one bit of the newest checkpoint flipped, in any file'
TRIALS = 1_000
SHORT = (0, 1, 2, 3, 4, 5, 6, 7)


def trial(i: int, folder: pathlib.Path) -> str | None:
  """One flip; raises where other arrays are restored and nothing is said."""
  draw = random.Random(i)
  trained.copy(folder, trained.NEW)
  checkpoint = folder / trained.CHECKPOINTS / f'{trained.NEW}'
  data = {n: (checkpoint / n).read_bytes() for n in trained.files(trained.NEW)}
  # Half by size, as a disk would; half in any file, or the small ones, which
  # say what the arrays mean, would have no share.
  sizes = [len(text) for text in data.values()] if i % 2 else None
  ((name, text),) = draw.choices([*data.items()], sizes)
  at, bit = draw.randrange(len(text)), draw.randrange(8)
  flipped = bytearray(text)
  flipped[at] ^= 1 << bit
  (checkpoint / name).write_bytes(flipped)
  with trained.opened(folder) as checkpoints:
    try:
      state = checkpoints.restore(trained.program(), trained.NEW)
    except config_lib.UserError as error:
      line = str(error)
      assert '\n' not in line, line
      assert name.name in line, f'{name} is not named: {line}'
      return 'detected'
  assert trained.equal(state, trained.NEW), (
    f'silent: bit {bit} of byte {at} of {name}'
  )
  return 'harmless'
