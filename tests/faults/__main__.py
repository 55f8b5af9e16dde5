"""Tries faults on real runs and says what held: python -m tests.faults.

Each part of this folder is tried in its long form, a few trials at a time. A
trial that has a result in --results is not tried again, so that the whole can
be stopped, and goes on.
"""

import collections
from collections.abc import Sequence
import concurrent.futures
import importlib
import json
import multiprocessing
import pathlib
import sys
import tempfile
import time

from absl import flags

from experiments import command
from train import config as config_lib

FOLDER = pathlib.Path(__file__).parent

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


def parts() -> dict[str, object]:
  """Name -> module, which has WHAT, TRIALS, SHORT and trial(i, folder)."""
  names = sorted(
    file.stem
    for file in FOLDER.glob('[a-z]*.py')
    if '\ndef trial(' in file.read_text('utf-8')
  )
  return {n: importlib.import_module(f'tests.faults.{n}') for n in names}


def attempt(part: str, i: int, folder: str) -> dict:
  """Trial i of a part: what came of it, and how long it took."""
  command.quiet()
  start = time.monotonic()
  result = {'part': part, 'trial': i, 'held': True}
  own = pathlib.Path(folder) / f'{part}-{i}'
  own.mkdir()
  try:
    module = importlib.import_module(f'tests.faults.{part}')
    result['word'] = module.trial(i, own) or ''
  except Exception as error:  # A promise that does not hold, or worse.
    result |= {'held': False, 'word': f'{type(error).__name__}: {error}'}
  return result | {'seconds': round(time.monotonic() - start, 1)}


def main(argv: Sequence[str]):
  """Tries what has no result yet, and prints the table."""
  command.parse(FLAGS, argv, __doc__)
  known = parts()
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
    waiting = [pool.submit(attempt, *which, folder) for which in todo]
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
