"""Whether a long run grows: resident memory and open files over its steps.

The whole loop on a tiny model, with its logging, evaluations and checkpoints:
what leaks a little at each of them shows after many.
"""

import contextlib
import dataclasses
import gc
import json
import os
import pathlib
import re
import tempfile
import time

from train import config as config_lib

_CONFIG = config_lib.Config(
  log_every=100,
  eval_every=500,
  checkpoint_every=1_000,
  data=config_lib.Data(name='digits', batch_size=32),
  model={'name': 'mlp', 'widths': (16,), 'dropout': 0.1},
  ema_decay=0.99,
)
_QUIET_SECONDS = 1  # After which nothing is being saved in the background.


def main(steps: int):
  """Prints a line at each tenth, then how far the last is over the first."""
  rows = measure(steps)
  print('\n'.join(table(rows)))
  first, last = rows[0], rows[-1]
  row = {
    'steps': last['step'],
    'MiB_over_first_tenth': round(last['MiB'] - first['MiB'], 2),
    'most_MiB_over_first_tenth': round(
      max(row['MiB'] for row in rows) - first['MiB'], 2
    ),
    'files_over_first_tenth': last['files'] - first['files'],
    'seconds': round(last['seconds'], 1),
  }
  print(json.dumps(row), flush=True)


def measure(steps: int) -> list[dict[str, float]]:
  """What this process holds after each tenth of a run of so many steps."""
  from train import loop
  from train import program as program_lib

  config = dataclasses.replace(_CONFIG, total_steps=steps)
  program = program_lib.create(config)
  rows, done = [], 0
  start = time.perf_counter()

  def train_step(state, batch):
    nonlocal done
    result = program.train_step(state, batch)
    done += 1
    if done % (steps // 10) == 0:
      rows.append(_row(done, time.perf_counter() - start))
    return result

  watched = dataclasses.replace(program, train_step=train_step)
  with (
    tempfile.TemporaryDirectory() as folder,
    open(os.devnull, 'w') as nowhere,
    contextlib.redirect_stdout(nowhere),
  ):
    loop.run(watched, folder)
  return rows


def table(rows: list[dict[str, float]]) -> list[str]:
  """The rows as lines of one width."""
  head = f'{"step":>9} {"MiB":>8} {"open files":>10} {"threads":>8}'
  return [head] + [
    f'{r["step"]:9} {r["MiB"]:8.2f} {r["files"]:10} {r["threads"]:8}'
    for r in rows
  ]


def _row(step: int, seconds: float) -> dict[str, float]:
  time.sleep(_QUIET_SECONDS)
  gc.collect()  # What waits to be collected is no leak.
  status = pathlib.Path('/proc/self/status').read_text()
  return {
    'step': step,
    'MiB': int(re.search(r'VmRSS:\s+(\d+) kB', status)[1]) / 1024,
    'files': len(os.listdir('/proc/self/fd')),
    'threads': int(re.search(r'Threads:\s+(\d+)', status)[1]),
    'seconds': seconds,
  }
