"""Seconds from the command to --help, to the first step, and to the end."""

import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time


def main():
  """Wall seconds in new processes: --help, first step, the whole main job."""
  with tempfile.TemporaryDirectory() as folder:
    cache = pathlib.Path(folder) / 'cache'
    rows = {'help': [], 'first_step_ever': [], 'first_step': [], 'all': []}
    for attempt in range(5):
      environment = os.environ | {'TAISHAN_CACHE': f'{cache}-{attempt}'}
      rows['help'].append(_seconds(['--help'], environment)[1])
      for row in ('first_step_ever', 'first_step'):
        first, whole = _seconds(
          [
            '--config=digits_cnn',
            f'--workdir={folder}/{row}-{attempt}',
            '--config.log_every=1',
          ],
          environment,
          until='step   1/',
        )
        rows[row].append(first)
      rows['all'].append(whole)
  for row, seconds in rows.items():
    print(
      json.dumps(
        {
          'what': row,
          'best_seconds': round(min(seconds), 2),
          'median_seconds': round(statistics.median(seconds), 2),
          'runs': len(seconds),
        }
      )
    )


def _seconds(words, environment, until: str | None = None):
  """Seconds until a line that starts so, and until the end."""
  start = time.perf_counter()
  process = subprocess.Popen(
    [sys.executable, '-m', 'experiments.launch', *words],
    stdout=subprocess.PIPE,
    text=True,
    env=environment,
  )
  first = None
  for line in process.stdout:
    if first is None and until is not None and line.startswith(until):
      first = time.perf_counter() - start
  if process.wait() == 130:
    raise KeyboardInterrupt
  if process.returncode:
    raise RuntimeError(f'launch {words} exited with {process.returncode}')
  return first, time.perf_counter() - start
