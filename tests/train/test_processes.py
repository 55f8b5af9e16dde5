"""Several processes: who is there, what they agree on, how they end.

The connection between them is tried here without jax; runs in processes of
their own are in tests/experiments/test_local.py.
"""

import concurrent.futures
import random
import re
import socket
import subprocess
import sys
import time

import jax
import pytest

from experiments import command
from experiments import launch
from tests import conftest
from train import config as config_lib
from train import hub as hub_lib
from train import link as link_lib
from train import processes

ASKED = 15


class Link(link_lib.Link):
  """One that never ends the process that it is in, which is pytest's."""

  def _fall(self, line, code=1):
    pass


def links(count, seconds=20.0):
  """The ends of a hub's connections, all in this process."""
  server = hub_lib.listen('127.0.0.1', 0)
  hub = hub_lib.Hub(server, count, seconds)
  connections = [hub.start()]
  port = server.getsockname()[1]
  connections += [
    link_lib.connect('127.0.0.1', port, seconds, lambda: None)
    for _ in range(1, count)
  ]
  return [
    Link(c, i, count, seconds=seconds, name='test')
    for i, c in enumerate(connections)
  ]


def everywhere(act, these):
  """act(link) of each, at once; the results, or the errors."""
  with concurrent.futures.ThreadPoolExecutor(len(these)) as pool:
    futures = [pool.submit(act, link) for link in these]
    return [f.exception() or f.result() for f in futures]


def test_all_hear_what_each_says_in_the_order_of_processes():
  these = links(4)
  for round_ in range(3):  # The same name again, as at each checkpoint.
    heard = everywhere(
      lambda link, r=round_: link.gather('name', f'{r}.{link.index}'), these
    )
    assert heard == [[f'{round_}.{i}' for i in range(4)]] * 4


def test_who_does_not_come_in_time_is_named():
  these = links(4, seconds=0.3)
  start = time.monotonic()
  errors = everywhere(lambda link: link.gather('saved', ''), these[:2])
  assert time.monotonic() - start < 3
  for error in errors:
    assert isinstance(error, link_lib.ProcessError)
    assert error.exit_code == 1
    assert str(error).startswith(
      "processes 2 and 3 of 4 did not come within 0.3 s to 'saved'"
    )


@pytest.mark.parametrize('seed', range(5))
def test_a_signal_to_one_stops_all_at_the_same_call(seed):
  chance = random.Random(seed)
  these = links(3)
  asked = {chance.randrange(3): chance.randrange(50), 0: 40}  # Maybe of two.
  pauses = [chance.uniform(0, 3e-3) for _ in these]

  def run(link):
    for call in range(1000):
      time.sleep(pauses[link.index])
      signum = None
      if call >= asked.get(link.index, 1000):
        signum = ASKED + link.index
      if stop := link.agree_to_stop(signum):
        return call, stop
    return None

  calls = everywhere(run, these)
  assert calls[0] is not None
  assert calls == [calls[0]] * 3


@pytest.fixture
def pair():
  """pair(*SCRIPTS): two processes without jax that have joined and run them."""
  begun = []

  def pair(*scripts):
    with socket.socket() as probe:
      probe.bind(('127.0.0.1', 0))
      port = probe.getsockname()[1]
    for index, script in enumerate(scripts):
      connection = (
        f"hub_lib.Hub(hub_lib.listen('127.0.0.1', {port}), 2, 10).start()"
        if index == 0
        else f"link_lib.connect('127.0.0.1', {port}, 10, lambda: None)"
      )
      text = f"""
import time
from train import hub as hub_lib
from train import link as link_lib
link = link_lib.Link({connection}, {index}, 2, seconds=10, name='launch')
link.gather('start', '')
print('here', flush=True)
{script}
"""
      begun.append(
        subprocess.Popen(
          [sys.executable, '-c', text],
          stdout=subprocess.PIPE,
          stderr=subprocess.PIPE,
          text=True,
          env=conftest.environment(),
          cwd=conftest.REPOSITORY,
        )
      )
    for process in begun:
      assert process.stdout.readline() == 'here\n'
    return begun

  yield pair
  for process in begun:
    process.kill()
    process.communicate()


@pytest.mark.parametrize('victim', [0, 1])
def test_one_line_says_at_once_that_a_process_has_gone(pair, victim):
  these = pair('time.sleep(60)', 'time.sleep(60)')
  start = time.monotonic()
  these[victim].kill()
  _, errors = these[1 - victim].communicate(timeout=10)
  assert time.monotonic() - start < 5
  assert these[1 - victim].returncode == 1
  assert errors == (
    f'launch: process {victim} of 2 has gone without a word; the same command '
    'resumes from the newest checkpoint\n'
  )


def test_an_error_in_one_ends_another_that_hangs_with_the_same_code(pair):
  hangs, fails = pair('time.sleep(60)', "link.end(74, 'disk full', 1)")
  _, errors = hangs.communicate(timeout=20)
  assert (hangs.returncode, errors) == (
    74, 'launch: process 1 ended: disk full\n'
  )  # fmt: skip


def test_a_process_that_ended_in_order_is_not_missed(pair):
  ends, stays = pair('time.sleep(0.5)', "link.end(0, '', 0); time.sleep(0.1)")
  for process in (stays, ends):
    process.communicate(timeout=10)
  assert ends.wait() == stays.wait() == 0


# ------------------------------------------------------------------- joining


def started(*words):
  """A launch command that never comes so far as to import jax."""
  return subprocess.Popen(
    [sys.executable, '-m', 'experiments.launch', '--config=digits_linear',
     *words],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    env=conftest.environment(),
    cwd=conftest.REPOSITORY,
  )  # fmt: skip


def joining(count, indices, seconds):
  """Processes that wait for each other: their exit codes and errors."""
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    port = probe.getsockname()[1]
  these = [
    started(
      f'--coordinator=127.0.0.1:{port}',
      f'--num_processes={count}',
      f'--process_id={index}',
      f'--process_timeout={seconds}',
    )
    for index in indices
  ]
  try:
    ends = [process.communicate(timeout=60) for process in these]
  finally:
    for process in these:
      process.kill()
      process.communicate()
  for out, _ in ends:
    assert out == ''
  return [(p.returncode, e) for p, (_, e) in zip(these, ends, strict=True)]


def test_a_process_that_never_comes_is_named_by_all_who_wait():
  ends = joining(3, [0, 2], seconds=3)
  line = (
    'launch: process 1 of 3 did not come within 3 s; --process_timeout says '
    'how long to wait\n'
  )
  assert ends == [(1, line)] * 2


def test_waiting_for_the_others_does_not_move_the_step_they_stop_at(
  monkeypatch,
):
  # Found by chance, as a run that hung: the first to come had looked for a
  # signal more often than the last, and so they stopped at different steps.
  monkeypatch.setattr(processes, '_link', None)
  monkeypatch.setattr(processes, '_has_begun', False)
  monkeypatch.setattr(link_lib, 'Link', Link)
  monkeypatch.setattr(processes, '_mute_gloo', lambda: None)
  monkeypatch.setattr(jax.distributed, 'initialize', lambda *_, **__: None)
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    port = probe.getsockname()[1]
  looked = []

  def look():
    looked.append(processes.agree_to_stop(None))

  def come_later():
    time.sleep(1)
    connection = link_lib.connect('127.0.0.1', port, 10, lambda: None)
    other = Link(connection, 1, 2, seconds=10, name='test')
    other.gather('start', '')
    return other

  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    other = pool.submit(come_later)
    place = processes.Place(f'127.0.0.1:{port}', 2, 0)
    processes._join(place, 10, 'test', look)
  other = other.result()
  assert len(looked) > 2
  calls = everywhere(
    lambda link: [link.agree_to_stop(ASKED) for _ in range(3)],
    [processes._link, other],
  )
  assert calls[0] == calls[1]
  assert ASKED in calls[0]


def test_process_0_that_never_comes_is_named():
  [(code, error)] = joining(2, [1], seconds=1)
  assert code == 1
  assert re.fullmatch(
    r'launch: process 0 of 2 did not answer at 127\.0\.0\.1:\d+ within 1 s '
    r'\(Connection refused\); this is process 1, .*\n',
    error,
  )


def test_two_processes_of_one_number_are_told_so():
  ends = joining(3, [0, 1, 1], seconds=3)
  lines = sorted(error for _, error in ends)
  assert 'launch: another process is process 1 already\n' in lines
  assert all(code == 1 for code, _ in ends)


@pytest.mark.parametrize(
  ('words', 'line'),
  [
    (['--processes=2', '--coordinator=auto'], '--processes starts processes'),
    (['--processes=0'], 'flag --processes=0'),
    (['--coordinator=auto'], '--coordinator=auto finds no Slurm'),
    (['--coordinator=auto', '--process_id=1'], '--coordinator=auto finds out'),
    (['--num_processes=2'], '--coordinator is missing'),
    (['--coordinator=a:1', '--num_processes=2'], '--process_id is missing'),
    (
      ['--coordinator=a', '--num_processes=2', '--process_id=0'],
      "--coordinator is 'a'; it takes auto or HOST:PORT",
    ),
    (
      ['--coordinator=a:1', '--num_processes=2', '--process_id=2'],
      '--process_id is 2; with --num_processes=2 it takes 0 to 1',
    ),
  ],
  ids=lambda value: None if isinstance(value, str) else ' '.join(value),
)
def test_flags_that_do_not_go_together_are_one_line(
  words, line, capsys, tmp_path
):
  words = ['--config=digits_mlp', f'--workdir={tmp_path / "run"}', *words]
  assert command.run('launch', launch.main, words) == 2
  errors = capsys.readouterr().err
  assert errors.startswith(f'launch: {line}')
  assert errors.count('\n') == 1
  assert not (tmp_path / 'run').exists()


def test_slurm_tells_a_process_its_place(monkeypatch):
  for name, value in {
    'SLURM_JOB_ID': '5000',
    'SLURM_STEP_NODELIST': 'node[007-009],other',
    'SLURM_NTASKS': '12',
    'SLURM_PROCID': '5',
    'SLURM_LOCALID': '1',
  }.items():
    monkeypatch.setenv(name, value)
  port = 5000 % 4096 + 65536 - 4096  # As jax's documentation of Slurm has it.
  assert processes.detect() == processes.Place(f'node007:{port}', 12, 5, (1,))
  monkeypatch.setenv('JAX_LOCAL_DEVICE_IDS', '0,1,2,3')
  assert processes.detect().devices == (0, 1, 2, 3)


# ------------------------------------------------------------- one by default


def test_alone_a_process_agrees_with_itself():
  assert (processes.count(), processes.index()) == (1, 0)
  assert processes.is_main()
  assert processes.gather('name', 'text') == ['text']
  assert processes.agree('name', lambda: 5) == 5
  assert processes.agree_to_stop(None) is None
  assert processes.agree_to_stop(ASKED) == ASKED
  with pytest.raises(config_lib.UserError, match='^wrong$'):
    processes.agree('name', _wrong)


def _wrong():
  raise config_lib.UserError('wrong')


def test_what_one_process_finds_wrong_is_wrong_in_all(monkeypatch):
  monkeypatch.setattr(processes, 'gather', lambda *_: ['', 'no room', ''])
  with pytest.raises(config_lib.UserError, match='^process 1: no room$'):
    processes.agree('act', lambda: None)
  monkeypatch.setattr(processes, 'gather', lambda *_: ['a', 'b', 'a'])
  with pytest.raises(config_lib.UserError, match='process 0 and process 1$'):
    processes.check_same('what', 'a')
