"""Two real processes of four devices each: alike, killed, stopped, resumed."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from experiments import local
from tests import conftest
from tests import process as process_lib
from tests.experiments import test_signals
from train import config as config_lib

MLP = (
  '--config=digits_mlp', '--config.total_steps=300', '--config.log_every=20',
  '--config.eval_every=100', '--config.checkpoint_every=50',
  '--config.model.widths=32,', '--config.schedule.name=linear_schedule',
  '--config.schedule.init_value=0.01', '--config.schedule.end_value=0.0',
  '--config.dtype=float64',  # Sums in another order differ by 1e-16 alone.
)  # fmt: skip
GONE = (
  'launch: process {} of 2 has gone without a word; the same command resumes '
  'from the newest checkpoint\n'
)


@pytest.fixture(autouse=True)
def devices(monkeypatch):
  """Each process has four, on the CPU."""
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
  monkeypatch.setenv('JAX_NUM_CPU_DEVICES', '4')
  monkeypatch.setenv('JAX_ENABLE_X64', '1')


def lines(workdir):
  text = (workdir / 'metrics.jsonl').read_text()
  return [json.loads(line) for line in text.splitlines()]


def finish(workdir, *words):
  """The command to its end, in two processes."""
  ran = subprocess.run(
    [
      sys.executable, '-m', 'experiments.launch', *MLP, '--processes=2',
      f'--workdir={workdir}', *words,
    ],
    capture_output=True, text=True, timeout=240, cwd=conftest.REPOSITORY,
    env=conftest.environment(),
  )  # fmt: skip
  assert (ran.returncode, ran.stderr) == (0, '')
  return ran.stdout


def children(process):
  """Process ids of a parent's children, in the order of processes."""
  pid = process.pid
  found = {}
  for child in pathlib.Path(f'/proc/{pid}/task/{pid}/children').read_text(
  ).split():  # fmt: skip
    words = pathlib.Path(f'/proc/{child}/cmdline').read_text().split('\0')
    for word in words:
      if word.startswith('--process_id='):
        found[int(word.partition('=')[2])] = int(child)
  return [found[i] for i in sorted(found)]


def is_alive(pid):
  try:
    text = pathlib.Path(f'/proc/{pid}/stat').read_text()
  except OSError:
    return False
  return text.rpartition(')')[2].split()[0] != 'Z'


def check_alike(these, those):
  assert [sorted(line) for line in these] == [sorted(line) for line in those]
  for one, other in zip(these, those, strict=True):
    for key in one:
      np.testing.assert_allclose(
        one[key], other[key], rtol=1e-9, atol=1e-9, err_msg=key
      )


@pytest.fixture(scope='module')
def alone(tmp_path_factory):
  """The workdir of MLP in one process of eight devices."""
  workdir = tmp_path_factory.mktemp('alone') / 'run'
  ran = subprocess.run(
    [sys.executable, '-m', 'experiments.launch', *MLP, f'--workdir={workdir}'],
    capture_output=True, text=True, timeout=240, cwd=conftest.REPOSITORY,
    env=conftest.environment(
      JAX_PLATFORMS='cpu', JAX_NUM_CPU_DEVICES='8', JAX_ENABLE_X64='1'
    ),
  )  # fmt: skip
  assert (ran.returncode, ran.stderr) == (0, '')
  return workdir


@pytest.mark.slow
def test_two_processes_of_four_train_as_one_of_eight(alone, tmp_path):
  workdir = tmp_path / 'run'
  out = finish(workdir)
  assert out.count('step 300/300  test/loss') == 1  # One alone speaks.
  check_alike(lines(workdir), lines(alone))
  assert sorted(p.name for p in workdir.iterdir()) == sorted(
    p.name for p in alone.iterdir()
  )


@pytest.mark.slow
@pytest.mark.parametrize('victim', [pytest.param(0, marks=pytest.mark.long), 1])
def test_where_one_is_killed_the_other_says_so_and_all_resume(
  alone, tmp_path, victim
):
  workdir = tmp_path / 'run'
  words = (*MLP, '--processes=2', f'--workdir={workdir}')
  with process_lib.Process('launch', *words) as process:
    process.wait_for(r'^step +120/300 ')
    pids = children(process)
    os.kill(pids[victim], signal.SIGKILL)
    start = time.monotonic()
    assert process.end() == 1
    assert time.monotonic() - start < 30
  other = 1 - victim
  prefix = f'process {other}: ' if other else ''
  assert sorted(process.errors.splitlines(keepends=True)) == sorted([
    prefix + GONE.format(victim),
    f'launch: process {victim} of 2 was ended by SIGKILL\n',
  ])  # fmt: skip
  assert not any(map(is_alive, pids))
  steps = test_signals.saved(workdir)
  assert steps
  if victim:  # Slow: one of them shows that they resume.
    return
  out = finish(workdir)
  assert f'resuming from step {steps[-1]}\n' in out
  check_alike(lines(workdir), lines(alone))


@pytest.mark.slow
@pytest.mark.parametrize(
  ('signum', 'to'),
  [
    pytest.param(signal.SIGINT, 'parent', marks=pytest.mark.long),
    (signal.SIGTERM, 'process 1'),
  ],
)  # fmt: skip
def test_a_signal_to_any_stops_all_at_the_same_step_saved(tmp_path, signum, to):
  workdir = tmp_path / 'run'
  words = (*MLP, '--processes=2', f'--workdir={workdir}')
  with process_lib.Process('launch', *words) as process:
    process.wait_for(r'^step +60/300 ')
    pids = children(process)
    if to == 'parent':
      process.send(signum)
    else:
      os.kill(pids[1], signum)
    assert process.end() == test_signals.CODES[signum]
  said = test_signals.ASKED if to == 'parent' else ''
  found = re.fullmatch(
    rf'{said}launch: stopped at step (\d+) of 300, saved\n', process.errors
  )
  assert found, process.errors
  assert test_signals.saved(workdir)[-1] == int(found[1])
  assert not any(map(is_alive, pids))


@pytest.mark.slow
def test_a_second_signal_to_the_parent_stops_all_at_once(tmp_path):
  words = (*MLP, '--processes=2', f'--workdir={tmp_path / "run"}')
  with process_lib.Process('launch', *words) as process:
    process.wait_for('^workdir: ')  # It compiles from here.
    pids = children(process)
    process.send(signal.SIGINT)
    process.wait_for('^stopping')
    process.send(signal.SIGINT)
    assert process.end() == 130
  assert process.errors == f'{test_signals.ASKED}stopped at once\n'
  end = time.monotonic() + 5
  while any(map(is_alive, pids)):
    assert time.monotonic() < end
    time.sleep(0.05)


# What one process does when it is to save; the other waits for it, in Orbax.
NO_ROOM = """
import os
rename = os.rename
def no_room(old, new, **kwargs):
  if 'orbax-checkpoint-tmp' in os.fspath(old):
    raise OSError(28, 'No space left on device')
  return rename(old, new, **kwargs)
os.rename = no_room
"""


@pytest.mark.long
@pytest.mark.slow
def test_a_checkpoint_that_cannot_be_saved_ends_all_processes(tmp_path):
  address = f'127.0.0.1:{local._free_port()}'
  script = 'from experiments import command, launch\n'
  script += "command.start('launch', launch.main)"
  these = [
    subprocess.Popen(
      [
        sys.executable, '-c', before + script, *MLP,
        f'--workdir={tmp_path / "run"}', f'--coordinator={address}',
        '--num_processes=2', f'--process_id={i}',
      ],
      stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
      cwd=conftest.REPOSITORY, env=conftest.environment(),
    )
    for i, before in enumerate([NO_ROOM, ''])
  ]  # fmt: skip
  try:
    errors = [process.communicate(timeout=120)[1] for process in these]
  finally:
    for process in these:
      process.kill()
      process.communicate()
  line = 'a checkpoint could not be saved: [Errno 28] No space left on device\n'
  assert errors[0].endswith(f'launch: {line}')  # After Orbax's own words.
  assert errors[1] == f'launch: process 0 ended: {line}'
  assert [process.returncode for process in these] == [74, 74]


@pytest.mark.slow
def test_no_process_outlives_a_parent_that_is_killed(tmp_path):
  words = (*MLP, '--processes=2', f'--workdir={tmp_path / "run"}')
  with process_lib.Process('launch', *words) as process:
    end = time.monotonic() + 60
    while len(pids := children(process)) < 2:
      assert time.monotonic() < end
      time.sleep(0.05)
    time.sleep(1)  # They import, or wait for each other.
    process.send(signal.SIGKILL)
    process.end()
  end = time.monotonic() + 10
  while any(map(is_alive, pids)):
    assert time.monotonic() < end
    time.sleep(0.05)


@pytest.mark.slow
def test_a_workdir_in_use_ends_all_processes_with_the_same_line(tmp_path):
  import filelock

  workdir = tmp_path / 'run'
  workdir.mkdir()
  with filelock.FileLock(workdir / '.lock'):
    ran = subprocess.run(
      [sys.executable, '-m', 'experiments.launch', *MLP, '--processes=2',
       f'--workdir={workdir}'],
      capture_output=True, text=True, timeout=120, cwd=conftest.REPOSITORY,
      env=conftest.environment(),
    )  # fmt: skip
  assert ran.returncode == 2
  assert ran.stderr == (
    f'launch: workdir {workdir} is in use by another run; wait for it, or give '
    'another workdir\n'
  )


def test_gpus_are_divided_between_the_processes(monkeypatch):
  monkeypatch.delenv('JAX_PLATFORMS')
  monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '4,5,6,7')
  assert local._gpu_shares(2) == ['4,5', '6,7']
  with pytest.raises(config_lib.UserError, match='3, which cannot share 4 GPU'):
    local._gpu_shares(3)
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
  assert local._gpu_shares(3) == [None] * 3


def test_a_child_gets_the_command_without_the_number_of_processes():
  words = ['--processes', '2', '--config=a', '--processes=3', '-processes=1']
  assert local._without_processes(words) == ['--config=a']
