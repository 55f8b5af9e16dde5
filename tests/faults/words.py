"""Wrong flags and values, each typed in a process of its own.

A mistake is one line on standard error that names it, exit code 2, soon, and
nothing written. Odd names, locales and homes are no mistakes: they work.
"""

import atexit
from collections.abc import Iterator
import contextlib
import functools
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import threading

from tests import conftest
from tests.experiments import test_bad_input
from tests.faults import disks

WHAT = 'wrong flags and values, odd paths, locales and homes'
# Seconds of CPU time: where the config alone decides, and where jax is asked.
_ALONE, _ASKED = 2, 15
_TIMEOUT_SECONDS = 300
_TINY = (
  '--config=diabetes_linear', '--config.total_steps=2',
  '--config.data.batch_size=100',
)  # fmt: skip

# ----------------------------------------------------------------- the trials

_BACKSLASH = 'a\\b'  # tensorstore takes it for a slash.
# Of the tables of tests/experiments/test_bad_input.py, by what is typed.
_ALONE_ROWS = (
  'sed=1', 'data.batchsize=8', 'totl_steps=8', 'zzz=1', 'data.zzz=1',
  'seed.a=1', '__class__=1', 'data.__dict__=1', 'data=x', 'seed=-1',
  'seed=1099511627776', 'seed=1.5', 'seed=abc', 'seed=', 'total_steps=0',
  'total_steps=many', 'total_steps=2147483648', 'total_epochs=nan',
  'log_every=1.5', 'eval_every=nane', 'keep_best=-1',
  'on_save_error=x', 'data.batch_size=none',
  'data.validation_fraction=nan', 'label_smoothing=nan', 'mesh.data=0',
  'mesh.tensor=1099511627776', 'partition=pmap', 'remat=all', 'kernels=cuda',
  'dtype=float16', 'grad_clip_norm=inf', 'accumulate=0', 'ema_decay=1.5',
  'optimizer.learning_rate=0.1', 'data.num_workers=-1',
  'total_steps=7 --config.total_epochs=2.5',  # Which exclude each other.
  'early_stopping.patience=3 --config.keep_best=0',
)  # fmt: skip
_ASKED_ROWS = (
  'model.name=__builtins__', 'optimizer.name=__import__', 'schedule.name=eval',
  'data.name=__builtins__', 'data.name=../digits', 'loss=os.system',
  'model.widths=wide', 'model.dropout=nan', 'optimizer.b1=nan',
  'schedule.init_value=nan', 'data.data_dir=/proc/nowhere',
  'data.batch_size=100000000', 'data.batch_size=1099511627776',
  'total_epochs=1e300', 'init_from=nosuch',
)  # fmt: skip
# Command, words, what the line names, seconds of CPU. RUN is a finished run's
# workdir, FILE a file, FIXED a folder that cannot be written.
_FLAGS = [
  ('launch', ('--config=digits_mlp', 'stray'), ('stray',), _ALONE),
  ('launch', ('--confg=digits_mlp',), ('confg', '--config'), _ALONE),
  ('launch', ('--config=no such',), ('--config', 'no such'), _ALONE),
  ('launch', ('--config=.',), ('--config',), _ALONE),
  ('launch', ('--config=digits_mlp', '--workdir='), ('--workdir',), _ALONE),
  ('launch', (*_TINY, '--processes=0'), ('processes', '0'), _ALONE),
  ('launch', (*_TINY, '--process_id=x'), ('process_id', 'x'), _ALONE),
  ('launch', (*_TINY, '--process_timeout=nan'), ('process_timeout',), _ALONE),
  ('launch', (*_TINY, '--coordinator=a'), ('num_processes',), _ALONE),
  (
    'launch',
    (*_TINY, '--processes=2', '--process_id=0'),
    ('--processes', '--process_id'),
    _ALONE,
  ),
  ('launch', (*_TINY, '--workdir=FILE'), ('workdir', 'FILE'), _ASKED),
  ('launch', (*_TINY, '--workdir=FIXED/run'), ('workdir', 'FIXED'), _ASKED),
  ('evaluate', (), ('--workdir',), _ALONE),
  ('evaluate', ('--workdir=nosuch',), ('workdir', 'nosuch'), _ALONE),
  ('evaluate', ('--workdir=x', '--step=weird'), ('--step', 'weird'), _ALONE),
  ('evaluate', ('--workdir=x', '--params=y'), ('params', 'y'), _ALONE),
  ('evaluate', ('--config.seed=1',), ('--config.seed', 'workdir'), _ALONE),
  ('evaluate', ('--workdir=RUN', '--step=99'), ('--step', '99'), _ASKED),
  ('evaluate', ('--workdir=RUN', '--split=y'), ('--split', 'y'), _ASKED),
  ('sample', ('--workdir=nosuch',), ('workdir', 'nosuch'), _ALONE),
  ('sample', ('--workdir=x', '--length=0'), ('length', '0'), _ALONE),
  ('sample', ('--workdir=x', '--temperature=nan'), ('temperature',), _ALONE),
  ('sample', ('--workdir=x', '--temperature=-1'), ('temperature',), _ALONE),
  ('sample', ('--workdir=x', '--seed=1.5'), ('seed', '1.5'), _ALONE),
  ('sample', ('--workdir=x', '--prompt='), ('--prompt',), _ALONE),
  ('sample', ('--workdir=RUN',), ('--workdir', 'regression'), _ASKED),
  ('checkpoints', (), ('--workdir',), _ALONE),
  ('checkpoints', ('--workdir=nosuch',), ('workdir', 'nosuch'), _ALONE),
  ('checkpoints', ('--workdir=x', '--step=y'), ('--step', 'y'), _ALONE),
  ('checkpoints', ('--workdir=RUN', '--step=99'), ('--step', '99'), _ASKED),
  (
    'launch',
    (*_TINY, f'--workdir={_BACKSLASH}'),
    ('workdir', 'backslash'),
    _ASKED,
  ),
  *(
    (command, (f'--workdir={_BACKSLASH}',), ('workdir', 'backslash'), _ALONE)
    for command in ('evaluate', 'sample', 'checkpoints')
  ),
  ('benchmark', (), ('--suite',), _ALONE),
  ('benchmark', ('--suite=all',), ('suite', 'all'), _ALONE),
  ('benchmark', ('--suite=loop', '--rounds=0'), ('rounds',), _ALONE),
  ('benchmark', ('--suite=memory', '--steps=nan'), ('steps', 'nan'), _ALONE),
  (
    'benchmark',
    ('--suite=results', '--configs=nosuch'),
    ('nosuch',),
    _ALONE,
  ),
]
_ODD = 'a b\'"$(x); %s {y}\n*ü漢'
_LATIN = {
  'LC_ALL': 'C', 'PYTHONUTF8': '0', 'PYTHONCOERCECLOCALE': '0',
}  # fmt: skip
# Command, words, environment; ODD is a folder with that name, HOME one that
# cannot be written.
_WORKING = [
  ('launch', (*_TINY, '--workdir=ODD/new'), {}),
  ('launch', (*_TINY[1:], '--config=ODD/odd name.py'), {}),
  ('launch', _TINY, {'TAISHAN_CACHE': 'ODD/cache'}),
  ('evaluate', ('--workdir=ODD/run',), {}),
  ('checkpoints', ('--workdir=ODD/run',), {}),
  ('launch', (*_TINY, '--workdir=new'), _LATIN),
  ('evaluate', ('--workdir=RUN',), _LATIN),
  ('launch', (*_TINY, '--workdir=new'), {'HOME': 'HOME'}),
  ('evaluate', ('--workdir=RUN',), {'HOME': 'HOME'}),
]
# A name that cannot be shown, a locale in which one is none, and no folder to
# write in.
_EITHER = [
  ('launch', (*_TINY, '--config.init_from=ODD/run:latest'), {}, 'init_from'),
  ('launch', (*_TINY, '--workdir=ODD/new'), _LATIN, 'workdir'),
  ('checkpoints', ('--workdir=ODD/run',), _LATIN, 'workdir'),
  ('evaluate', ('--workdir=ODD/run',), _LATIN, 'workdir'),
  ('launch', _TINY, {'HOME': 'HOME', 'TAISHAN_CACHE': ''}, 'TAISHAN_CACHE'),
]


# ------------------------------------------------------------------- one trial


def _refused(folder, command, words, named, seconds) -> str:
  with _place(folder, filled=seconds == _ASKED) as place:
    before = test_bad_input.snapshot(folder)
    code, _, errors, spent = _run(place, command, words, {})
    what = f'{command} {" ".join(words)}: {errors}'
    assert code == 2, f'exit code {code}: {what}'
    assert errors.count('\n') == 1, f'not one line: {what}'
    assert errors.startswith(f'{command}: '), what
    test_bad_input.names(errors, [place.fill(word) for word in named])
    after = test_bad_input.snapshot(folder)
    assert after == before, f'{what}; written: {after.keys() ^ before.keys()}'
    assert spent < seconds, f'{spent:.1f} s of CPU time: {what}'
  return 'alone' if seconds == _ALONE else 'asked'


def _works(folder, command, words, environment) -> str:
  with _place(folder) as place:
    code, out, errors, _ = _run(place, command, words, environment)
    what = f'{command} {" ".join(words)}: {errors}'
    assert code == 0, f'exit code {code}: {what}'
    assert not errors, f'on standard error: {what}'
    assert out
  return 'works'


def _works_or_is_refused(folder, command, words, environment, named) -> str:
  with _place(folder) as place:
    code, _, errors, _ = _run(place, command, words, environment)
    what = f'{command} {" ".join(words)}: {errors}'
    assert code in (0, 2), f'exit code {code}: {what}'
    if code == 2:
      assert errors.count('\n') == 1, f'not one line: {what}'
      assert named in errors, what
    else:
      assert not errors, what
  return 'refused' if code else 'works'


class _Place:
  """A working folder, and what the words in capitals stand for."""

  def __init__(self, folder: pathlib.Path):
    self.cwd = folder / 'cwd'
    self.words = {
      'FILE': folder / 'file',
      'FIXED': folder / 'fixed',
      'HOME': folder / 'fixed',
      'ODD': folder / _ODD,
      'RUN': folder / 'run',
    }
    self.cache = folder / 'cache'

  def fill(self, text: str) -> str:
    for word, path in self.words.items():
      text = text.replace(word, str(path))
    return text


@contextlib.contextmanager
def _place(folder: pathlib.Path, *, filled: bool = True) -> Iterator[_Place]:
  place = _Place(folder)
  place.cwd.mkdir()
  (folder / 'file').write_text('')
  if not filled:  # The words alone decide.
    yield place
    return
  run, cache = _finished()
  with _unwritable(place.words['FIXED']):
    shutil.copytree(cache, place.cache)
    odd = place.words['ODD']
    odd.mkdir()
    for copy in (odd / 'run', folder / 'run'):
      shutil.copytree(run, copy)
    config = conftest.REPOSITORY / 'experiments/configs/diabetes_linear.py'
    shutil.copy(config, odd / 'odd name.py')
    yield place


@contextlib.contextmanager
def _unwritable(folder: pathlib.Path) -> Iterator[None]:
  """To root every folder can be written but one on a read-only disk."""
  if os.geteuid():
    folder.mkdir(mode=0o500)
    yield
    return
  with disks._disk(folder), disks._read_only(folder):
    yield


@functools.cache
def _finished() -> tuple[pathlib.Path, pathlib.Path]:
  """The workdir of a finished run, and a cache that has the data."""
  folder = pathlib.Path(tempfile.mkdtemp(prefix='taishan-faults-'))
  atexit.register(shutil.rmtree, folder, ignore_errors=True)
  environment = conftest.environment(TAISHAN_CACHE=str(folder / 'cache'))
  for words in (
    (*_TINY, f'--workdir={folder / "run"}'),
    ('--config=digits_mlp', '--summary'),
  ):
    subprocess.run(
      [sys.executable, '-m', 'experiments.launch', *words],
      check=True, capture_output=True, cwd=folder, env=environment,
    )  # fmt: skip
  return folder / 'run', folder / 'cache'


def _run(
  place: _Place, command: str, words, environment: dict[str, str]
) -> tuple[int, str, str, float]:
  """Exit code, standard output and error, seconds of CPU time."""
  variables = {'TAISHAN_CACHE': str(place.cache)} | environment
  variables = {k: place.fill(v) for k, v in variables.items()}
  variables = conftest.environment(**variables)
  variables = {k: v for k, v in variables.items() if v}
  with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
    process = subprocess.Popen(
      [
        sys.executable, '-m', f'experiments.{command}', *map(place.fill, words)
      ],
      stdout=out, stderr=errors, cwd=place.cwd, env=variables,
    )  # fmt: skip
    timer = threading.Timer(_TIMEOUT_SECONDS, process.kill)
    timer.start()
    _, status, usage = os.wait4(process.pid, 0)
    timer.cancel()
    process.returncode = os.waitstatus_to_exitcode(status)
    for file in (out, errors):
      file.seek(0)
    texts = [file.read().decode(errors='replace') for file in (out, errors)]
  return process.returncode, *texts, usage.ru_utime + usage.ru_stime


# ------------------------------------------------------------------ the frame


@functools.cache
def _rows() -> dict[str, tuple]:
  """What is typed -> the row of the tables there, as they have it."""
  tables = (
    test_bad_input.UNKNOWN_FIELDS, test_bad_input.FIELDS,
    test_bad_input.RECIPES,
  )  # fmt: skip
  return {
    row.id.partition(' --config.')[2]: row.values
    for table in tables
    for row in reversed(table)  # The first of those typed alike.
  }


def _cases() -> list[tuple]:
  """(what to do, its arguments), one a trial."""
  found = []
  for texts, seconds in ((_ALONE_ROWS, _ALONE), (_ASKED_ROWS, _ASKED)):
    for text in texts:
      config, words, named = _rows()[text]
      words = (f'--config={config}', '--workdir=new', *words)
      found.append((_refused, 'launch', words, named, seconds))
  found += [(_refused, *case) for case in _FLAGS]
  found += [(_works, *case) for case in _WORKING]
  return found + [(_works_or_is_refused, *case) for case in _EITHER]


_CASES = _cases()
TRIALS = len(_CASES)
# One or two of each command.
SHORT = (
  0,
  _ALONE_ROWS.index('total_epochs=nan'),
  *(
    len(_ALONE_ROWS) + len(_ASKED_ROWS) + i
    for i, (command, words, *_) in enumerate(_FLAGS)
    if words in ((), ('--workdir=x', '--temperature=nan'))
  ),
)


def trial(i: int, folder: pathlib.Path) -> str | None:
  """One command; what it wrote, said and cost is looked at."""
  act, *rest = _CASES[i]
  try:
    return act(folder, *rest)
  except disks.NotTriedError as error:
    return f'not tried: {error}'
