"""Saving that fails is heard of at once, and leaves what was there whole.

The disks here are really full, or not to be written; nothing of ours is
replaced.
"""

import contextlib
import gc
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests import conftest
from tests import runs
from train import checkpoint
from train import commit
from train import loop
from train import manifest
from train import program as program_lib
from train import workdir as workdir_lib
from train import writer


@contextlib.contextmanager
def limited(folder):
  """No file may grow beyond 4 KiB, as under a quota."""
  del folder
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def full(folder):
  """A file takes all that is left on the disk."""
  file = folder / 'filler'
  with file.open('wb', buffering=0) as filler, contextlib.suppress(OSError):
    while filler.write(bytes(4096)):
      pass
  try:
    yield
  finally:
    file.unlink()


@contextlib.contextmanager
def read_only(folder):
  """The disk is mounted to be read."""
  subprocess.run(['mount', '-o', 'remount,ro', folder], check=True)
  try:
    yield
  finally:
    subprocess.run(['mount', '-o', 'remount,rw', folder], check=True)


@pytest.fixture(params=[limited, full, read_only], ids=lambda f: f.__name__)
def trouble(request, tmp_path):
  """A context manager that lets no checkpoint be saved in its block."""
  folder = tmp_path / 'run' / 'checkpoints'
  folder.mkdir(parents=True)
  if request.param is limited:
    yield lambda: limited(folder)
    return
  mounted = (
    shutil.which('mount')
    and not subprocess.run(
      ['mount', '-t', 'tmpfs', '-o', 'size=1m', 'taishan', folder],
      capture_output=True,
    ).returncode
  )
  if not mounted:
    pytest.skip('a disk of its own can be mounted by root alone')
  yield lambda: request.param(folder)
  subprocess.run(['umount', '-l', folder], check=True)


@pytest.fixture
def at(monkeypatch):
  """at[step] is called after that step, once no save is going on."""
  calls, opened = {}, []
  init, stepped = checkpoint.Checkpoints.__init__, writer.Writer.stepped

  def watch(self, *args, **kwargs):
    init(self, *args, **kwargs)
    opened.append(self)
    calls['open'] = self

  def call(self, step, metrics):
    stepped(self, step, metrics)
    if step in calls:
      while opened[-1]._manager.is_saving_in_progress():
        time.sleep(0.01)
      calls[step]()

  monkeypatch.setattr(checkpoint.Checkpoints, '__init__', watch)
  monkeypatch.setattr(writer.Writer, 'stepped', call)
  return calls


@pytest.fixture(scope='module')
def program():
  return program_lib.create(runs.config(keep_best=0))


def names(workdir) -> set[str]:
  return {path.name for path in (workdir / 'checkpoints').iterdir()}


def test_a_run_goes_on_without_room_and_saves_when_there_is_room_again(
  program, tmp_path, trouble, at, capsys
):
  workdir = tmp_path / 'run'
  heard = {}
  with contextlib.ExitStack() as stack:
    at[7] = lambda: stack.enter_context(trouble())
    # The save at 8 has failed by the end of step 9: after it, all hear of it.
    at[9] = lambda: None
    at[10] = lambda: (
      at['open']._remove(),
      heard.update(said=capsys.readouterr().out, names=names(workdir)),
      stack.close(),
    )
    with pytest.raises(workdir_lib.SaveError, match='finished, but') as error:
      loop.run(program, workdir)
  assert error.value.exit_code == 74
  assert heard['said'].count('a checkpoint could not be saved: ') == 1
  assert heard['names'] - {'filler'} == {'4'}  # Nothing half written.
  assert names(workdir) == {'12'}
  manifest.verify(workdir / 'checkpoints' / '12')
  at.clear()
  loop.run(program, tmp_path / 'other')
  assert runs.digest(workdir) == runs.digest(tmp_path / 'other')


def test_a_run_that_is_to_stop_does_at_the_next_step(tmp_path, trouble, at):
  workdir = tmp_path / 'run'
  program = program_lib.create(runs.config(keep_best=0, on_save_error='stop'))
  with contextlib.ExitStack() as stack:
    at[7] = lambda: stack.enter_context(trouble())
    at[9] = lambda: None
    at[10] = lambda: pytest.fail('it went on')
    with pytest.raises(workdir_lib.SaveError, match="is 'stop'") as error:
      loop.run(program, workdir)
    assert names(workdir) - {'filler'} == {'4'}
  assert error.value.exit_code == 74
  at.clear()
  loop.run(program, workdir)  # Goes on where it could be saved.
  assert names(workdir) == {'12'}


def test_a_library_that_fails_in_the_background_is_heard_of(
  program, tmp_path, at, monkeypatch, capsys
):
  """Even where a file of the temporary folder is taken away."""
  complete = commit._complete

  def lose(folder):
    if folder.name.startswith('8.'):
      shutil.rmtree(folder / commit.ITEM)
    complete(folder)

  monkeypatch.setattr(commit, '_complete', lose)
  said = []
  at[9] = lambda: None
  at[10] = lambda: said.append(capsys.readouterr().out)
  with pytest.raises(workdir_lib.SaveError):
    loop.run(program, tmp_path)
  assert 'a checkpoint could not be saved: ' in said[0]
  assert names(tmp_path) == {'12'}


def test_after_a_failure_the_old_ones_are_still_known_and_later_removed(
  program, tmp_path
):
  state = program.init()
  with checkpoint.Checkpoints(
    tmp_path, program.config, {}, say=print
  ) as checkpoints:
    checkpoints.save(state, 1)
    checkpoints.wait()
    with limited(tmp_path):
      checkpoints.save(state, 2)
      checkpoints.wait()
    assert checkpoints.failed
    assert checkpoints.steps() == [1]
    checkpoints._remove()
    assert names(tmp_path) == {'1'}
    checkpoints.save(state, 3)
    checkpoints.require(3)
    assert checkpoints.steps() == [3]
  assert names(tmp_path) == {'3'}


@pytest.mark.slow
def test_a_save_leaves_nothing_in_memory(program, tmp_path):
  """As tensorstore's account of what it did, which Orbax asks it for."""

  def lists():
    gc.collect()
    return sum(type(one) is list for one in gc.get_objects())

  state = program.init()
  with checkpoint.Checkpoints(
    tmp_path, program.config, {}, say=print
  ) as checkpoints:
    for step in range(1, 17):
      checkpoints.save(state, step)
      checkpoints.wait()
      if step == 6:
        before = lists()
    assert lists() - before < 10  # It left two dozen a save.


def test_polling_waits_for_nothing(program, tmp_path):
  with checkpoint.Checkpoints(
    tmp_path, program.config, {}, say=print
  ) as checkpoints:
    start = time.process_time()
    for _ in range(1000):
      checkpoints.poll()
    assert time.process_time() - start < 0.1
    checkpoints.save(program.init(), 1)
    start = time.process_time()
    for _ in range(1000):
      checkpoints.poll()
    assert time.process_time() - start < 1.0


# ------------------------------------------------------------------ kill -9

SAVES = """
import itertools, pathlib, sys
import jax.numpy as jnp
from train import checkpoint, config
c = config.Config(total_steps=10, best_metric='eval/loss')
w = {'params': {str(i): jnp.arange(20000.0) + i for i in range(8)}}
folder = pathlib.Path(sys.argv[1])
with checkpoint.Checkpoints(folder, c, {}, say=print) as checkpoints:
  for step in itertools.count((checkpoints.steps() or [0])[-1] + 1):
    checkpoints.save(w, step)
    checkpoints.poll()
    print(step, flush=True)
"""


@pytest.mark.slow
def test_a_kill_at_any_instant_leaves_only_whole_checkpoints(tmp_path):
  found = []
  leftovers = 0
  for instant in range(10):
    process = subprocess.Popen(
      [sys.executable, '-c', SAVES, tmp_path],
      stdout=subprocess.PIPE,
      cwd=conftest.REPOSITORY,
      env=conftest.environment(),
    )
    with process:
      for _ in range(3):
        assert process.stdout.readline()
      time.sleep(0.013 * instant)
      process.send_signal(signal.SIGKILL)
    entries = names(tmp_path)
    steps = [int(name) for name in entries if name.isdecimal()]
    assert steps
    for step in steps:
      manifest.verify(tmp_path / 'checkpoints' / f'{step}')
    leftovers += any('orbax-checkpoint-tmp' in name for name in entries)
    found.append(max(steps))
  assert found == sorted(set(found))  # Each went on from what was there.
  assert leftovers  # Or no kill came while one was being saved.
