"""kill -9 at a random instant between a run's start and its end."""

import json
import os
import pathlib
import random
import signal
import time

from tests.faults import cases

WHAT = 'kill -9 at a random instant'
TRIALS = 200
SHORT = SLOW = (0,)


def trial(i: int, folder: pathlib.Path) -> str:
  """Kills one run, sometimes again while it resumes, and finishes it."""
  chance = random.Random(i)
  name = list(cases.CASES)[i % len(cases.CASES)]
  case, workdir = cases.CASES[name], folder / 'run'
  # Compiled once for all trials, which would else wait for that most of all;
  # the run that is never stopped compiles by itself.
  compiled = {
    'JAX_COMPILATION_CACHE_DIR': str(folder.parent / 'compiled'),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
  }
  words = []
  for _ in range(chance.choice((1, 1, 2))):
    with case.start(workdir, **compiled) as process:
      # Half of a run is Python's imports and the compiler, half is training.
      if chance.random() < 0.7:
        process.wait_for(r'^(workdir: |resuming from )')
      time.sleep(chance.uniform(0, 4))
      process.send(signal.SIGKILL)
      process.end()
    words.append(lost(workdir))
  finish(name, workdir, folder.parent, **compiled)
  return max(words, key=('', 'within an interval', 'more').index)


def lost(workdir: pathlib.Path) -> str:
  """How many steps of those in metrics.jsonl no checkpoint has.

  An interval and the steps that are trained while a checkpoint is written: the
  next one waits for it.
  """
  try:
    lines = (workdir / 'metrics.jsonl').read_bytes().split(b'\n')[:-1]
  except FileNotFoundError:
    return ''
  step = max((json.loads(line)['step'] for line in lines), default=0)
  gone = step - cases.saved(workdir)
  assert gone <= 2 * cases.EVERY, f'step {step} with {cases.saved(workdir)}'
  return 'within an interval' if gone <= cases.EVERY else 'more'


def finish(name: str, workdir: pathlib.Path, shared: pathlib.Path, **compiled):
  """The same command again: from the newest checkpoint, to the same bytes."""
  newest = cases.saved(workdir)
  ended = os.path.exists(workdir / 'curves.png') or newest == cases.STEPS
  process = cases.CASES[name].finish(workdir, **compiled)
  if newest and not ended:
    assert f'resuming from step {newest}\n' in process.out, process.out
  cases.check_equal(name, workdir, shared / 'unbroken')
