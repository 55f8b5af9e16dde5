"""Stopped by a signal, killed, or diverged: what is left is right to go on.

tests/faults has each phase of a run, and kills at many moments.
"""

import json
import pathlib
import random
import re
import signal
import subprocess
import sys
import time
from unittest import mock

import jax
import numpy as np
import pytest

from experiments import command
from experiments import figures
from experiments import launch
from tests import process as process_lib
from tests import runs
from train import checkpoint
from train import program as program_lib
from train import workdir as workdir_lib

REPOSITORY = pathlib.Path(__file__).parents[2]
CODES = {signal.SIGINT: 130, signal.SIGTERM: 75}
ASKED = 'stopping after saving; once more stops at once\n'

# Dropout, an epoch's end within, and a line before the libraries are imported.
MLP = (
  '--config=digits_mlp', '--config.total_steps=300', '--config.log_every=20',
  '--config.eval_every=40', '--config.checkpoint_every=50',
  '--config.model.widths=32,', '--config.schedule.name=linear_schedule',
  '--config.schedule.init_value=0.01', '--config.schedule.end_value=0.0',
)  # fmt: skip


def finish(words, workdir):
  """The same command again, in this process: it must finish."""
  words = [*words, f'--workdir={workdir}']
  with mock.patch.object(figures, 'show'):  # Which takes half the time.
    assert command.run('launch', launch.main, words) == 0


def saved(workdir):
  """The steps of the checkpoints that are whole."""
  config = workdir_lib.read_config(workdir)
  with checkpoint.Checkpoints(
    workdir, config, {}, say=pytest.fail, read_only=True
  ) as checkpoints:
    return checkpoints.steps()


def metrics(workdir):
  return (workdir / 'metrics.jsonl').read_bytes()


def stopped_at(errors, total):
  """The step in the message, which must be all that standard error has."""
  found = re.fullmatch(
    rf'{ASKED}launch: stopped at step (\d+) of {total}, saved\n', errors
  )
  assert found, errors
  return int(found[1])


def check_equal(workdir, unbroken):
  """Nothing in what was measured or learned tells the two runs apart."""
  assert metrics(workdir) == metrics(unbroken)
  assert runs.digest(workdir) == runs.digest(unbroken)


@pytest.fixture(scope='module')
def unbroken(tmp_path_factory):
  """The workdir of MLP, never stopped."""
  workdir = tmp_path_factory.mktemp('unbroken') / 'run'
  finish(MLP, workdir)
  return workdir


def both(quick):
  """Both signals; the other one is left to the slow tests."""
  return pytest.mark.parametrize(
    'signum',
    [
      pytest.param(s, marks=[] if s == quick else pytest.mark.slow, id=s.name)
      for s in CODES
    ],
  )


# ------------------------------------------------------------------ signals


@pytest.mark.slow
@pytest.mark.long
def test_stopped_again_and_again_it_ends_with_the_same_bytes(
  run, unbroken, tmp_path
):
  workdir = tmp_path / 'run'
  steps = []
  for until in (20, 160, 280):
    with process_lib.Process('launch', *MLP, f'--workdir={workdir}') as process:
      process.wait_for(rf'^step +{until}/300 ')
      process.send(signal.SIGTERM)
      assert process.end() == 75
    steps.append(stopped_at(process.errors, 300))
  assert steps == sorted(set(steps))
  done = run('launch', *MLP, f'--workdir={workdir}')
  assert (done.returncode, done.stderr) == (0, '')
  assert f'resuming from step {steps[-1]}\n' in done.stdout
  check_equal(workdir, unbroken)


@both(signal.SIGINT)
def test_a_signal_during_the_imports_stops_before_training(
  unbroken, tmp_path, signum
):
  workdir = tmp_path / 'run'
  with process_lib.Process('launch', *MLP, f'--workdir={workdir}') as process:
    process.wait_for('^config.schedule: .* drops ')  # jax comes after it.
    process.send(signum)
    assert process.end() == CODES[signum]
  assert process.errors == (
    f'{ASKED}launch: stopped before training began; nothing to save\n'
  )
  assert not re.search(r'^step', process.out, re.MULTILINE)
  assert not workdir.exists() or saved(workdir) == []
  if signum == signal.SIGTERM:  # Slow: training from the start is known.
    finish(MLP, workdir)
    check_equal(workdir, unbroken)


@pytest.mark.parametrize(
  ('first', 'second'),
  [
    (signal.SIGINT, signal.SIGINT),
    pytest.param(signal.SIGTERM, signal.SIGTERM, marks=pytest.mark.slow),
    pytest.param(signal.SIGINT, signal.SIGTERM, marks=pytest.mark.slow),
  ],
)
def test_a_second_signal_stops_at_once(tmp_path, first, second):
  with process_lib.Process(
    'launch', *MLP, f'--workdir={tmp_path / "run"}'
  ) as process:
    process.wait_for('^config.schedule: .* drops ')  # Imports take a second.
    process.send(first)
    process.wait_for('^stopping')
    start = time.monotonic()
    process.send(second)
    assert process.end() == CODES[second]
    assert time.monotonic() - start < 0.5
  assert process.errors == f'{ASKED}stopped at once\n'
  assert not (tmp_path / 'run').exists()


def test_a_second_signal_is_heard_within_a_library_too():
  # As a compiler, this holds the main thread and lets no handler of Python run.
  script = """
import hashlib
from experiments import command

def main(argv):
  print('begun', flush=True)
  hashlib.pbkdf2_hmac('sha512', b'', b'', 500_000_000)

command.start('launch', main)
"""
  with subprocess.Popen(
    [sys.executable, '-c', script], stdout=subprocess.PIPE,
    stderr=subprocess.PIPE, cwd=REPOSITORY,
  ) as process:  # fmt: skip
    assert process.stdout.readline() == b'begun\n'
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.stderr.readline() == ASKED.encode()
    start = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75
    assert time.monotonic() - start < 0.5
    assert process.stderr.read() == b'stopped at once\n'


def test_after_the_deadline_a_run_ends_wherever_it_is(tmp_path):
  words = [*MLP, f'--workdir={tmp_path / "run"}', '--stop_seconds=0.3']
  with process_lib.Process('launch', *words) as process:
    process.wait_for('^config.schedule: .* drops ')  # Imports take a second.
    process.send(signal.SIGTERM)
    start = time.monotonic()
    assert process.end() == 75
    assert 0.2 < time.monotonic() - start < 1
  assert process.errors == (
    f'{ASKED}stopped at once: not at an end 0.3 s after the signal; what was '
    'saved before stands\n'
  )


@pytest.mark.parametrize('signum', list(CODES), ids=lambda s: s.name)
def test_a_signal_while_python_ends_does_not_change_the_exit_code(signum):
  # Objects that outlive the command are deleted after Python has given the
  # signals' handlers back.
  script = f"""
import os
from experiments import command

class Late:
  def __del__(self, kill=os.kill, pid=os.getpid()):
    kill(pid, {int(signum)})

late = Late()
command.start('launch', lambda argv: None)
"""
  ran = subprocess.run(
    [sys.executable, '-c', script],
    capture_output=True,
    text=True,
    cwd=REPOSITORY,
  )
  assert (ran.returncode, ran.stderr) == (0, '')


def test_evaluate_stops_when_it_is_asked_to(unbroken):
  before = sorted((unbroken / 'evaluations').iterdir())
  with process_lib.Process(
    'evaluate', f'--workdir={unbroken}', '--split=train'
  ) as process:
    time.sleep(0.5)  # It imports, which takes seconds.
    process.send(signal.SIGINT)
    assert process.end() == 130
  assert process.out == ''
  assert 'Traceback' not in process.errors
  assert process.errors.splitlines()[-1].startswith('evaluate: ')
  assert sorted((unbroken / 'evaluations').iterdir()) == before


@pytest.mark.slow
def test_a_signal_at_any_moment_ends_in_order(unbroken, tmp_path):
  workdir = tmp_path / 'run'
  codes = []
  for i, signum in enumerate([*CODES, *CODES]):
    moment = 2.4 * i  # Seconds: imports to end.
    with process_lib.Process('launch', *MLP, f'--workdir={workdir}') as process:
      process.wait_until_it_listens()
      time.sleep(moment)
      process.send(signum)
      codes.append(process.end())
    assert codes[-1] in (0, CODES[signum]), (moment, process.errors)
    assert 'Traceback' not in process.errors, (moment, process.errors)
    if codes[-1] == 0:
      break
  assert set(CODES.values()) <= set(codes)  # Both came while it ran.
  finish(MLP, workdir)
  check_equal(workdir, unbroken)


# -------------------------------------------------------------------- kills


def kill_and_finish(workdir, unbroken, after, seconds):
  """kill -9 some seconds after a line, then the same command again."""
  with process_lib.Process('launch', *MLP, f'--workdir={workdir}') as process:
    process.wait_for(after)
    time.sleep(seconds)
    process.send(signal.SIGKILL)
    assert process.end() in (-signal.SIGKILL, 0)
  said = f'killed {seconds:.3f} s after {after!r}: {process.out}'
  finish(MLP, workdir)
  assert metrics(workdir) == metrics(unbroken), said
  assert runs.digest(workdir) == runs.digest(unbroken), said


@pytest.mark.parametrize(
  'after',
  ['^workdir: ', pytest.param(r'^step +100/300 ', marks=pytest.mark.slow)],
)
def test_a_run_that_is_killed_goes_on_as_if_it_had_not_been(
  unbroken, tmp_path, after
):
  most = 3 if after.startswith('^workdir') else 0.5
  kill_and_finish(
    tmp_path / 'run', unbroken, after, random.SystemRandom().uniform(0, most)
  )


# ---------------------------------------------------------------- divergence

DIVERGING = (
  '--config=diabetes_linear', '--config.optimizer.name=sgd',
  '--config.schedule.name=constant_schedule', '--config.schedule.value=1e30',
)  # fmt: skip


# The first step moves the weights by 1e32. Their squares, in the loss of the
# second step and of an evaluation after the first, are beyond float32.
@pytest.mark.parametrize(
  ('cadence', 'at'),
  [
    ((), 2),
    (('--config.log_every=1',), 2),
    (('--config.eval_every=1',), 1),
    (('--config.checkpoint_every=1',), 2),
  ],
  ids=['as the config has it', 'log', 'evaluation', 'checkpoint'],
)
def test_a_run_that_diverges_says_where_and_keeps_no_nan(
  tmp_path, capsys, cadence, at
):
  words = [*DIVERGING, *cadence, f'--workdir={tmp_path / "run"}']
  assert command.run('launch', launch.main, words) == 1
  errors = capsys.readouterr().err
  assert errors.count('\n') == 1
  assert re.search(rf'\bstep {at}\b', errors)
  assert 'config.schedule' in errors

  program = program_lib.create(workdir_lib.read_config(tmp_path / 'run'))
  steps = saved(tmp_path / 'run')
  with checkpoint.Checkpoints(
    tmp_path / 'run', program.config, {}, say=print, read_only=True
  ) as checkpoints:
    for step in steps:
      for leaf in jax.tree.leaves(checkpoints.restore(program, step)):
        assert np.isfinite(leaf).all()
  assert 2 not in steps
  if any('checkpoint_every' in word for word in cadence):
    assert steps == [1]

  before = metrics(tmp_path / 'run')
  assert command.run('launch', launch.main, words) == 1
  again = capsys.readouterr().err
  assert again == errors
  assert metrics(tmp_path / 'run') == before
  for line in before.decode().splitlines():
    json.loads(line, parse_constant=pytest.fail)  # NaN is no JSON.
