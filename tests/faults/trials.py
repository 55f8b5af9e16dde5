"""The parts of the table, and one trial of one of them."""

import importlib
import pathlib
import time

from experiments import command

FOLDER = pathlib.Path(__file__).parent


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
