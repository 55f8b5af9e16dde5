"""kill -9 at named points: files, checkpoints, their collection, computing."""

import pathlib
import signal
import socket

from tests import process as process_lib
from tests.faults import cases
from tests.faults import kills

WHAT = 'kill -9 at a named point'
_PARTS = 'between the parts of two processes'
# The points at which a run is killed one after the other, each time it resumes.
SEQUENCES = (
  ('before the rename to config.json', 'after the rename to config.json'),
  ('within a line of metrics.jsonl',),
  (
    'after a step',
    'before metrics.jsonl is cut back',
    'after metrics.jsonl was cut back',
  ),
  ("before Orbax's rename",),
  ('before manifest.json is written',),
  ('before the rename to a checkpoint',),
  ('after the rename to a checkpoint',),
  ('before an old checkpoint is renamed',),
  ('within the removal of an old checkpoint',),
  ('while evaluating',),
  ('while compiling', 'while compiling'),
  ('while importing', 'while initialising', 'after the first step'),
  ('while saving', 'after the first step'),
  ('before the test', 'before an evaluation is written'),
  (_PARTS,),
)
TRIALS = len(SEQUENCES)
SHORT = SLOW = (5,)  # The rename that makes a checkpoint.


def trial(i: int, folder: pathlib.Path) -> str:
  """Kills a run at each of a sequence's points, and finishes it."""
  name = 'two processes' if _PARTS in SEQUENCES[i] else 'mlp'
  case, workdir = cases.CASES[name], folder / 'run'
  words = ['']
  for point in SEQUENCES[i]:
    if point == _PARTS:
      _kill_one_of_two(case, workdir)
    else:
      with process_lib.Process(
        'victim', point, str(int(signal.SIGKILL)), *case.words(workdir),
        package='tests.faults', **case.environment(),
      ) as process:  # fmt: skip
        code = process.end()
      said = process.out + process.errors
      assert code == -signal.SIGKILL, f'{point} was not reached: {said}'
    words.append(kills.lost(workdir))
  kills.finish(name, workdir, folder.parent)
  return max(words, key=('', 'within an interval', 'more').index)


def _kill_one_of_two(case: cases.Case, workdir: pathlib.Path):
  """Process 1 is killed once process 0 has written its part."""
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    port = probe.getsockname()[1]
  words = [word for word in case.words(workdir) if '--processes' not in word]
  words += [f'--coordinator=127.0.0.1:{port}', '--num_processes=2']
  with (
    process_lib.Process(
      'launch', *words, '--process_id=0', **case.environment()
    ) as other,
    process_lib.Process(
      'victim', _PARTS, str(int(signal.SIGKILL)), *words, '--process_id=1',
      package='tests.faults', **case.environment(),
    ) as victim,
  ):  # fmt: skip
    code = victim.end()
    assert code == -signal.SIGKILL, victim.out + victim.errors
    assert other.end() == 1
  assert 'process 1 of 2 has gone' in other.errors, other.errors
