"""How busy a sweep keeps its workers, start-up counted.

Perfect packing has every worker with a run from the command's first instant to
the last run's end; a run counts from when its process is started to when it has
ended, so that what the sweep's own process needs before and between is lost.
"""

import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time

_ROOT = pathlib.Path(__file__).parents[2]
_TRIALS, _WORKERS = 16, 4


def main():
  """Prints the share of 16 runs on 4 workers, and what each run took."""
  with tempfile.TemporaryDirectory() as folder:
    row = measure(pathlib.Path(folder) / 'sweep')
  print(json.dumps(row), flush=True)


def measure(folder: pathlib.Path) -> dict[str, float]:
  """A random search of `digits_mlp`: seconds, and the share of them in use."""
  words = [
    sys.executable, '-m', 'experiments.sweep', '--config=digits_mlp',
    '--search=random', f'--trials={_TRIALS}', f'--workers={_WORKERS}',
    f'--workdir={folder}', '--config.total_epochs=200.0',
  ]  # fmt: skip
  environment = os.environ | {'PYTHONPATH': str(_ROOT)}
  start = time.perf_counter()
  began, ended, begun = {}, {}, None
  process = subprocess.Popen(
    words, stdout=subprocess.PIPE, text=True, cwd=_ROOT, env=environment
  )
  for line in process.stdout:
    now = time.perf_counter() - start
    if found := re.match(r'trial (\d+) on ', line):
      began[int(found[1])] = now
      begun = now if begun is None else begun
    elif found := re.match(r'trial (\d+) finished', line):
      ended[int(found[1])] = now
  if process.wait():
    raise SystemExit(f'the sweep ended with {process.returncode}')
  total, seconds = time.perf_counter() - start, max(ended.values())
  busy = sum(ended[trial] - began[trial] for trial in ended)
  return {
    'finished': len(ended),
    'workers': _WORKERS,
    'seconds': round(seconds, 1),
    'seconds_before_the_first': round(begun, 1),
    'seconds_of_pictures': round(total - seconds, 1),
    'seconds_a_run': round(busy / len(ended), 1),
    'utilization': round(busy / (_WORKERS * seconds), 3),
  }
