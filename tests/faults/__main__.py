"""Tries faults on real runs and says what held: python -m tests.faults.

Each part of this folder is tried in its long form, a few trials at a time. A
trial that has a result in --results is not tried again, so that the whole can
be stopped, and goes on.
"""

import collections
from collections.abc import Sequence
import concurrent.futures
import json
import multiprocessing
import pathlib
import sys
import tempfile

from absl import flags

from experiments import command
from tests.faults import trials
from train import config as config_lib

FLAGS = flags.FlagValues()
flags.DEFINE_list(
  'parts', None, 'of the table; all if left out', flag_values=FLAGS
)
flags.DEFINE_integer(
  'trials', None, 'at most so many of each part', lower_bound=1,
  flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_integer(
  'jobs', 2, 'trials at a time', lower_bound=1, flag_values=FLAGS
)
flags.DEFINE_string(
  'results', 'runs/faults.jsonl', 'where results are kept', flag_values=FLAGS
)


def main(argv: Sequence[str]):
  """Tries what has no result yet, and prints the table."""
  command.parse(FLAGS, argv, __doc__)
  known = trials.parts()
  chosen = FLAGS.parts or list(known)
  for name in chosen:
    if name not in known:
      raise config_lib.UserError(
        f'--parts has {name!r}; there are {", ".join(known)}'
      )
  file = pathlib.Path(FLAGS.results)
  file.parent.mkdir(parents=True, exist_ok=True)
  results = {(r['part'], r['trial']): r for r in _read(file)}
  todo = [
    (name, i)
    for name in chosen
    for i in range(min(known[name].TRIALS, FLAGS.trials or sys.maxsize))
    if (name, i) not in results
  ]
  with (
    tempfile.TemporaryDirectory() as folder,
    file.open('a') as out,
    concurrent.futures.ProcessPoolExecutor(
      FLAGS.jobs, mp_context=multiprocessing.get_context('spawn')
    ) as pool,
  ):
    waiting = [pool.submit(trials.attempt, *which, folder) for which in todo]
    for n, future in enumerate(concurrent.futures.as_completed(waiting), 1):
      result = future.result()
      results[result['part'], result['trial']] = result
      out.write(json.dumps(result) + '\n')
      out.flush()
      if not result['held'] or n % 20 == 0 or n == len(todo):
        held = 'held' if result['held'] else f'BROKEN: {result["word"]}'
        print(
          f'{n}/{len(todo)} {result["part"]} {result["trial"]}: {held}',
          flush=True,
        )
  print(table({k: r for k, r in results.items() if k[0] in chosen}, known))
  if not all(result['held'] for result in results.values()):
    sys.exit(1)


def _read(file: pathlib.Path) -> list[dict]:
  lines = file.read_text().splitlines() if file.exists() else []
  return [json.loads(line) for line in lines if line.endswith('}')]


def table(results: dict, known: dict) -> str:
  """A row a part: what, tried, held, and how often each word came."""
  lines = ['| what | tried | held | of these |', '|---|---|---|---|']
  for name in dict.fromkeys(part for part, _ in results):
    own = [r for (part, _), r in results.items() if part == name]
    held = [r for r in own if r['held']]
    words = collections.Counter(r['word'] for r in held if r['word'])
    listed = ', '.join(f'{n} {word}' for word, n in words.most_common())
    lines.append(
      f'| {known[name].WHAT} | {len(own)} | {len(held)} | {listed} |'
    )
  return '\n'.join(lines)


if __name__ == '__main__':
  command.start('faults', main)
