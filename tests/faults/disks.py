"""Disks that are full, read-only, unmounted or broken while a run goes on.

Nothing of ours is replaced: the disks are small tmpfs, which only root can
mount, the errors those of system calls. A library loaded before libc makes some
of them fail (broken_disk.c), in a process of its own.
"""

import atexit
from collections.abc import Callable
from collections.abc import Iterator
from concurrent.futures import thread as futures_thread
import contextlib
import dataclasses
import functools
import io
import itertools
import os
import pathlib
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from unittest import mock

from experiments import command
from tests import conftest
from tests import runs
from train import checkpoint
from train import loop
from train import manifest
from train import program as program_lib
from train import writer

WHAT = 'a disk full, read-only, gone or broken at a save, or for metrics.jsonl'
_PAGE = 4096
_SAVES = (4, 8, 12)  # The steps of the run's saves.
_LAST = 'the save'  # Moments that are no steps: once the last save is done,
_END = 'the end'  # and once the run has ended, before its pictures.

# ------------------------------------------------------------------- the runs

_quiet = functools.cache(command.quiet)


@functools.cache
def _program(policy: str, *, long: bool = False) -> program_lib.Program:
  """Of 12 steps; or of 40 with a line for each, of more bytes than a page."""
  if policy == 'stop':  # Compiled once for both.
    program = _program('continue', long=long)
    config = dataclasses.replace(program.config, on_save_error=policy)
    return dataclasses.replace(program, config=config)
  _quiet()
  more = {'total_steps': 40, 'log_every': 1} if long else {}
  return program_lib.create(runs.config(keep_best=0, **more))


@functools.cache
def _unbroken(*, long: bool = False) -> tuple[str, str, int]:
  """A run that nothing troubles: its digest, its metrics, a save's bytes."""
  folder = pathlib.Path(tempfile.mkdtemp(prefix='taishan-faults-'))
  atexit.register(shutil.rmtree, folder, ignore_errors=True)
  code, said = _attempt(_program('continue', long=long), folder / 'run', {})
  assert code == 0, said
  newest = max(_steps(folder / 'run'))
  saved = folder / 'run' / 'checkpoints' / f'{newest}'
  sizes = [p.stat().st_size for p in saved.rglob('*') if p.is_file()]
  room = sum(-(-size // _PAGE) * _PAGE for size in sizes)
  metrics = (folder / 'run' / 'metrics.jsonl').read_text()
  return _digest(folder / 'run'), metrics, room


def _attempt(
  program: program_lib.Program, workdir: pathlib.Path, at: dict, tail=None
) -> tuple[int, str]:
  """The exit code of a run, as of a command, and all that it said.

  Args:
    program: the run's.
    workdir: the run's.
    at: step or moment -> what is called then; after a step it is once nothing
      is being saved, or removed, any more.
    tail: called with what the run returns, as the command's last part.
  """
  init, stepped = checkpoint.Checkpoints.__init__, writer.Writer.stepped
  require = checkpoint.Checkpoints.require
  opened = []

  def watch(self, *args, **kwargs):
    init(self, *args, **kwargs)
    opened.append(self)

  def step(self, step, metrics):
    stepped(self, step, metrics)
    if step in at:
      while opened[-1]._manager.is_saving_in_progress():
        time.sleep(0.005)
      opened[-1]._remove()
      at[step]()

  def last(self, step):
    require(self, step)
    self._remove()
    at.get(_LAST, lambda: None)()

  def main(argv):
    final = loop.run(program, workdir)
    at.get(_END, lambda: None)()
    if tail is not None:
      tail(final)

  said = io.StringIO()
  with (
    mock.patch.object(checkpoint.Checkpoints, '__init__', watch),
    mock.patch.object(checkpoint.Checkpoints, 'require', last),
    mock.patch.object(writer.Writer, 'stepped', step),
    contextlib.redirect_stdout(said),
    contextlib.redirect_stderr(said),
  ):
    before = threading.enumerate()
    code = command.run('launch', main, [])
  _check_threads(before)
  return code, said.getvalue()


def _steps(workdir: pathlib.Path) -> set[int]:
  """Those saved, each of which verifies."""
  names = [p.name for p in (workdir / 'checkpoints').iterdir()]
  steps = {int(name) for name in names if name.isdecimal()}
  for step in steps:
    manifest.verify(workdir / 'checkpoints' / f'{step}')
  return steps


def _leftovers(workdir: pathlib.Path) -> set[str]:
  """What is there and is no checkpoint, nor a file that a run is to have."""
  found = {p.name for p in (workdir / 'checkpoints').iterdir()}
  found |= {p.name for p in workdir.rglob('*.partial')}
  return {n for n in found if not n.isdecimal()} - {_FILLER}


def _digest(workdir: pathlib.Path) -> str:
  with contextlib.redirect_stdout(io.StringIO()):
    return runs.digest(workdir)


def _check_threads(before: list[threading.Thread]):
  """No thread is left for which the process would wait at its end."""

  def left():
    return [
      thread
      for thread in threading.enumerate()
      if thread not in before
      and not thread.daemon
      # Those of a pool end when Python asks them to.
      and getattr(thread, '_target', None) is not futures_thread._worker
    ]

  end = time.monotonic() + 10
  while left() and time.monotonic() < end:
    time.sleep(0.01)
  assert not left(), left()


def _check_one_line(said: str):
  """The error is one line, and the last; no library's traceback is there."""
  errors = [x for x in said.splitlines() if x.startswith('launch: ')]
  assert len(errors) == 1, said
  assert said.endswith(f'{errors[0]}\n'), said
  assert 'Traceback' not in said, said


# ----------------------------------------------------------------- the faults

_FILLER = 'filler'


class NotTriedError(Exception):
  """Something that a trial needs is not here."""


def _mount(*words: str | pathlib.Path):
  if (
    shutil.which('mount') is None
    or subprocess.run(['mount', *words], capture_output=True).returncode
  ):
    raise NotTriedError('mounting takes root')


@contextlib.contextmanager
def _disk(folder: pathlib.Path) -> Iterator[Callable[[], None]]:
  """`folder` is a disk of its own of 4 MiB; gives what mounts it again."""
  place = pathlib.Path(tempfile.mkdtemp(prefix='taishan-disk-'))
  folder.mkdir(parents=True)
  try:
    _mount('-t', 'tmpfs', '-o', 'size=4m', 'taishan', place)
    try:
      _mount('--bind', place, folder)
      yield lambda: _mount('--bind', place, folder)
    finally:
      _unmount(folder)
      _unmount(place)
  finally:
    place.rmdir()


def _unmount(folder: pathlib.Path):
  subprocess.run(['umount', '-l', folder], capture_output=True)


@contextlib.contextmanager
def _full(folder: pathlib.Path, room: int = 0) -> Iterator[None]:
  """A file takes all of the disk but `room` bytes."""
  file = folder / _FILLER
  with file.open('wb', buffering=0) as filler:
    with contextlib.suppress(OSError):
      while filler.write(bytes(_PAGE)):
        pass
    size = filler.tell()
    filler.truncate(size - min(size, room))
  try:
    yield
  finally:
    file.unlink()


@contextlib.contextmanager
def _read_only(folder: pathlib.Path) -> Iterator[None]:
  _mount('-o', 'remount,bind,ro', folder)
  try:
    yield
  finally:
    _mount('-o', 'remount,bind,rw', folder)


@contextlib.contextmanager
def _limited() -> Iterator[None]:
  """No file may grow beyond a page, as under a quota."""
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (_PAGE, before[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def _unmounted(folder: pathlib.Path, mount_again) -> Iterator[None]:
  _unmount(folder)
  try:
    yield
    left = [str(path) for path in folder.rglob('*')]
  finally:
    mount_again()
  assert not left, f'written where the disk was: {left}'


@contextlib.contextmanager
def _failing(call: str) -> Iterator[None]:
  """That system call fails, in a process that has the library."""
  trigger = pathlib.Path(os.environ['FAULTS_TRIGGER'])
  trigger.symlink_to(call)
  try:
    yield
  finally:
    trigger.unlink()


# ------------------------------------------------------- at the save of a step


def _at_save(workdir: pathlib.Path, save: int, policy: str, fault) -> str:
  """The fault comes before a save and goes after it, or after the run."""
  program = _program(policy)
  digest, metrics, _ = _unbroken()
  old = {_SAVES[save - 2]} if save > 1 else set()
  step = _SAVES[save - 1]
  stays = policy == 'stop' or save == len(_SAVES)
  is_mounted = fault.func is not _unmounted
  seen = []
  with contextlib.ExitStack() as stack:

    def heal():
      if is_mounted:
        found = _steps(workdir)
        assert found == old, f'there are {found}, not {old}'
        assert not _leftovers(workdir), _leftovers(workdir)
      seen.append(step)
      stack.close()

    # What an earlier save made superfluous goes before that, or it makes room.
    at = {
      step - 2: lambda: None,
      step - 1: lambda: stack.enter_context(fault()),
    }
    if save < len(_SAVES):
      # That it failed is heard of in the step after it.
      at |= {step + 1: lambda: None, step + 2: heal}
    code, said = _attempt(program, workdir, at)
    assert code == 74, f'exit code {code}: {said}'
    _check_one_line(said)
    reason = 'a checkpoint could not be saved: '
    assert said.count(reason) == 1, said
    if stays:
      assert not seen, f'it went on: {said}'
      heal()
  if stays:
    assert _steps(workdir) == old, 'the older checkpoint is gone'
    code, said = _attempt(program, workdir, {})
    assert code == 0, f'with room again, exit code {code}: {said}'
    if old:
      assert f'resuming from step {min(old)}' in said, said
  assert _steps(workdir) == {_SAVES[-1]}, _steps(workdir)
  assert not _leftovers(workdir), _leftovers(workdir)
  assert _digest(workdir) == digest, 'other bytes than an unbroken run'
  assert (workdir / 'metrics.jsonl').read_text() == metrics
  return 'stopped' if stays else 'went on'


def _full_at_save(folder, save, policy, share) -> str:
  room = int(_unbroken()[2] * share) // _PAGE * _PAGE
  workdir = folder / 'run'
  with _disk(workdir / 'checkpoints'):
    fault = functools.partial(_full, workdir / 'checkpoints', room)
    return _at_save(workdir, save, policy, fault)


def _read_only_at_save(folder, save, policy) -> str:
  workdir = folder / 'run'
  with _disk(workdir / 'checkpoints'):
    fault = functools.partial(_read_only, workdir / 'checkpoints')
    return _at_save(workdir, save, policy, fault)


def _limited_at_save(folder, save, policy) -> str:
  (folder / 'run').mkdir()
  return _at_save(folder / 'run', save, policy, functools.partial(_limited))


def _gone_at_save(folder, save, policy) -> str:
  workdir = folder / 'run'
  with _disk(workdir / 'checkpoints') as mount_again:
    fault = functools.partial(_unmounted, workdir / 'checkpoints', mount_again)
    return _at_save(workdir, save, policy, fault)


@functools.cache
def _library() -> pathlib.Path:
  compiler = shutil.which('cc')
  if compiler is None:
    raise NotTriedError('no C compiler')
  folder = pathlib.Path(tempfile.mkdtemp(prefix='taishan-faults-'))
  atexit.register(shutil.rmtree, folder, ignore_errors=True)
  library = folder / 'broken_disk.so'
  source = pathlib.Path(__file__).with_name('broken_disk.c')
  words = [compiler, '-shared', '-fPIC', '-O1', source, '-o', library, '-ldl']
  if subprocess.run(words, capture_output=True).returncode:
    raise NotTriedError('the C compiler fails')
  return library


_CHILD = """
import functools, pathlib, sys
from tests.faults import disks
folder, save, policy, call = sys.argv[1:]
fault = functools.partial(disks._failing, call)
workdir = pathlib.Path(folder) / 'run'
print('word:', disks._at_save(workdir, int(save), policy, fault))
"""


def _broken_at_save(folder, save, policy, call) -> str:
  environment = conftest.environment(
    LD_PRELOAD=str(_library()), FAULTS_TRIGGER=str(folder / 'trigger')
  )
  done = subprocess.run(
    [sys.executable, '-c', _CHILD, folder, str(save), policy, call],
    capture_output=True, text=True, env=environment, cwd=conftest.REPOSITORY,
    timeout=120,  # Where a library's thread waits on, so does the process.
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert not done.stderr, f'besides the one line: {done.stderr}'
  return done.stdout.rpartition('word: ')[2].strip()


# -------------------------------------------------- for what is no checkpoint


def _for_files(folder, moment, name) -> str:
  """No room for metrics.jsonl and the like: they are the truth, so it stops."""
  workdir, seen = folder / 'run', []
  program = _program('continue', long=True)
  with _disk(workdir), contextlib.ExitStack() as stack:

    def fill():
      seen.append(stack.enter_context(_full(workdir)))

    if moment == 0:
      fill()
    tail = functools.partial(_draw, workdir, program)
    code, said = _attempt(program, workdir, {moment: fill}, tail)
    assert seen, f'{moment} did not come'
    assert code == 74, f'exit code {code}: {said}'
    _check_one_line(said)
    assert f'{name} could not be written: No space' in said, said
    assert not list(workdir.rglob('*.partial')), 'half a file is left'
    stack.close()
    return _goes_on(workdir, program, tail)


def _gone(folder, moment) -> str:
  """The disk of the whole workdir is unmounted."""
  workdir, name = folder / 'run', 'metrics.jsonl'
  program = _program('continue', long=True)
  with _disk(workdir) as mount_again:
    with contextlib.ExitStack() as stack:
      fault = functools.partial(_unmounted, workdir, mount_again)
      at = {moment: lambda: stack.enter_context(fault())}
      code, said = _attempt(program, workdir, at)
      assert code == 74, f'exit code {code}: {said}'
      _check_one_line(said)
      assert f'{name} could not be written: No such file' in said, said
    return _goes_on(workdir, program)


def _goes_on(workdir, program, tail=None) -> str:
  """With the disk as it was, the same command ends with the same bytes."""
  code, said = _attempt(program, workdir, {}, tail)
  assert code == 0, f'with room again, exit code {code}: {said}'
  digest, metrics, _ = _unbroken(long=True)
  assert _digest(workdir) == digest, 'other bytes than an unbroken run'
  assert (workdir / 'metrics.jsonl').read_text() == metrics
  assert not _leftovers(workdir), _leftovers(workdir)
  if tail is not None:
    assert (workdir / 'confusion.png').stat().st_size
  return 'stopped'


def _draw(workdir, program, final):
  from experiments import figures

  figures.show(workdir, program, final)


# --------------------------------------------------------------------- links


def _linked(folder, name) -> str:
  """A link in place of an older checkpoint, or of where those go, is removed.

  What it points to stays as it is.
  """
  workdir, elsewhere = folder / 'run', folder / 'elsewhere'
  elsewhere.mkdir()
  (elsewhere / 'kept').write_text('kept')

  def plant():
    place = workdir / 'checkpoints' / name
    if place.exists():
      shutil.rmtree(place)
    place.symlink_to(elsewhere)

  program = _program('continue')
  code, said = _attempt(program, workdir, {7: plant})
  assert code in (0, 74), said
  assert [p.name for p in elsewhere.iterdir()] == ['kept'], 'it was followed'
  assert (elsewhere / 'kept').read_text() == 'kept'
  assert _steps(workdir) == {_SAVES[-1]}, _steps(workdir)
  assert not _leftovers(workdir), _leftovers(workdir)
  assert _digest(workdir) == _unbroken()[0]
  return 'not followed'


# ---------------------------------------------------------------- the trials

# Of what a save needs, which is some pages more or less in each process.
_ROOM = (0, 0.1, 0.5, 0.8)
_CALLS = ('write', 'fsync', 'rename', 'mkdir')
_POLICIES = ('continue', 'stop')
_CASES = [
  *(
    (_full_at_save, *rest)
    for rest in itertools.product((1, 2, 3), _POLICIES, _ROOM)
  ),
  *(
    (kind, *rest)
    for kind in (_read_only_at_save, _gone_at_save, _limited_at_save)
    for rest in itertools.product((1, 2, 3), _POLICIES)
  ),
  *(
    (_for_files, *rest)
    for rest in (
      (0, 'config.json'),
      (1, 'metrics.jsonl'),
      (2, 'timing.jsonl'),
      (3, 'metrics.jsonl'),
      (_LAST, 'test-40.json'),
      (_END, 'curves.png'),
    )
  ),
  *((_gone, moment) for moment in (1, 2, 20, 39)),
  (_linked, '4'),
  (_linked, f'removed{checkpoint.ocp.utils.TMP_DIR_SUFFIX}'),
  *(
    (_broken_at_save, *rest)
    for rest in itertools.product((2, 3), _POLICIES, _CALLS)
  ),
]
TRIALS = len(_CASES)


def _first(*case) -> int:
  return _CASES.index(case)


SHORT = (
  _first(_full_at_save, 2, 'continue', 0.5),
  _first(_read_only_at_save, 3, 'stop'),
  _first(_gone_at_save, 2, 'continue'),
  _first(_gone_at_save, 3, 'stop'),
  _first(_linked, '4'),
  _first(_for_files, 3, 'metrics.jsonl'),
)
SLOW = SHORT[-1:]  # Which compiles another program.


def trial(i: int, folder: pathlib.Path) -> str | None:
  """One fault at one moment of a run."""
  act, *rest = _CASES[i]
  try:
    return act(folder, *rest)
  except NotTriedError as error:
    return f'not tried: {error}'
