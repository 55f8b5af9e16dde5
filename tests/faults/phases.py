"""SIGTERM in each phase of a run: what is trained is saved, nothing is lost."""

import pathlib
import re
import signal
import time

from tests import process as process_lib
from tests.faults import cases
from tests.faults import kills
from train import commit
from train import manifest
from train import workdir as workdir_lib

WHAT = 'SIGTERM in a phase of the run'
PHASES = (
  'while importing',
  'while initialising',
  'while compiling',
  'after a step',
  'while evaluating',
  'while saving',
  'while waiting for data',
  'before the test',
)
TRIALS = len(PHASES)
SHORT = SLOW = (5,)  # Saving.
_ASKED = 'stopping after saving; once more stops at once\n'


def trial(i: int, folder: pathlib.Path) -> str:
  """Stops a run, looks at what it says and has saved, and finishes it."""
  case, workdir = cases.CASES['mlp'], folder / 'run'
  start = time.monotonic()
  with process_lib.Process(
    'victim', PHASES[i], str(int(signal.SIGTERM)), *case.words(workdir),
    package='tests.faults', **case.environment(),
  ) as process:  # fmt: skip
    process.wait_for('^stopping')
    start = time.monotonic()
    code = process.end()
    seconds = time.monotonic() - start
  assert code == 75, f'exit code {code}: {process.out}{process.errors}'
  found = re.fullmatch(
    rf'{_ASKED}launch: stopped (at step (\d+) of {cases.STEPS}, saved|before '
    r'(training began; nothing to save|the test, trained, saved))\n',
    process.errors,
  )
  assert found, process.errors
  step = int(found[2] or 0)
  if found[3] and 'trained' in found[3]:
    step = cases.STEPS
  assert cases.saved(workdir) == step
  if step:
    manifest.verify(workdir / workdir_lib.CHECKPOINTS / str(step))
    assert kills.lost(workdir) == 'within an interval'
  leftovers = list((workdir / 'checkpoints').glob(commit.LEFTOVERS))
  assert not leftovers, leftovers
  kills.finish('mlp', workdir, folder.parent)
  return 'nothing to save' if not step else f'step saved in {seconds:.0f} s'
