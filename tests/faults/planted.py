"""Files that somebody plants in a workdir: nothing in them is executed."""

import contextlib
import io
import pathlib
import pickle
import shutil

import numpy as np

from experiments import checkpoints
from experiments import command
from experiments import evaluate
from tests.faults import trained
from train import loop

WHAT = 'code, pickles and odd names planted in a workdir'
_STEP = f'{trained.CHECKPOINTS}/{trained.NEW}'
# Where, and what: source of Python, a pickle, an array of pickled objects, or a
# line for Python's site, which runs it.
PLANTED = (
  ('config.py', 'source'),
  ('__init__.py', 'source'),
  ('sitecustomize.py', 'source'),
  ('experiments/__init__.py', 'source'),
  (f'{_STEP}/__init__.py', 'source'),
  ('config.pkl', 'pickle'),
  ('config.json', 'pickle'),
  ('metrics.jsonl', 'pickle'),
  ('running.json', 'pickle'),
  (f'{_STEP}/state/params.pkl', 'pickle'),
  (f'{_STEP}/manifest.json', 'pickle'),
  (f'{_STEP}/_CHECKPOINT_METADATA', 'pickle'),
  (f'{trained.CHECKPOINTS}/12/state/array.npy', 'objects'),
  (f'{_STEP}/state/array.npy', 'objects'),
  ('evaluations/test-8.json', 'pickle'),
  ('x.pth', 'line'),
  ("$(touch executed)'; touch executed;\n.py", 'source'),
  (f'{trained.CHECKPOINTS}/__import__("os").mkdir("executed")', 'source'),
)
TRIALS = len(PLANTED)
SHORT = tuple(range(TRIALS))


def _resume(words: list[str]):
  """As launch does, with a program that is compiled already."""
  loop.run(trained.program(), words[0].partition('=')[2])


def _spring(kind: str, trap: bytes):
  """What a reader would do that executes what it finds."""
  if kind == 'objects':
    np.load(io.BytesIO(trap), allow_pickle=True)
  elif kind == 'pickle':
    pickle.loads(trap)
  else:
    exec(trap)


class _Bomb:
  """Makes a folder when it is unpickled."""

  def __init__(self, folder: pathlib.Path):
    self._folder = folder

  def __reduce__(self):
    return pathlib.Path.mkdir, (self._folder,)


def trial(i: int, folder: pathlib.Path) -> str:
  """Plants one file, and lets every command read the workdir."""
  workdir, marker = folder / 'run', folder / 'executed'
  shutil.copytree(trained.run()[0], workdir)
  name, kind = PLANTED[i]
  file = workdir / name
  file.parent.mkdir(parents=True, exist_ok=True)
  source = f'import pathlib; pathlib.Path({str(marker)!r}).mkdir()\n'
  if kind == 'objects':
    np.save(file, np.array([_Bomb(marker)], object))
  elif kind == 'pickle':
    file.write_bytes(pickle.dumps(_Bomb(marker)))
  else:
    file.write_text(source)
  trap, codes = file.read_bytes(), []
  with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()):
    for main in (evaluate.main, checkpoints.main, _resume):
      with contextlib.redirect_stderr(io.StringIO()) as errors:
        codes.append(command.run('planted', main, [f'--workdir={workdir}']))
      assert errors.getvalue().count('\n') < 2, errors.getvalue()
  assert not marker.exists(), f'{name} was executed'
  _spring(kind, trap)
  assert marker.exists(), 'the trap is none'
  assert all(code in (0, 1, 2) for code in codes), codes
  return 'not executed'
