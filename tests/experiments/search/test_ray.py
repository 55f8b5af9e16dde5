"""The same trials on a Ray instance of this machine: start, finish, kill."""

import json
import signal
import socket
import time

import pytest

from tests import process as process_lib
from tests.experiments import test_sweep

pytestmark = [pytest.mark.ray, pytest.mark.slow]
pytest.importorskip('ray')


@pytest.fixture
def words(tmp_path, monkeypatch):
  """The command; two points, on one CPU each."""
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
  file = tmp_path / 'mine.py'
  space = {'schedule.value': ('choice', 1e-3, 1e-2)}
  file.write_text(test_sweep.CONFIG + f'\ndef sweep():\n  return {space!r}\n')
  return [f'--config={file}', '--search=grid', '--launcher=ray', '--workers=1']


def test_it_starts_finishes_and_resumes_what_was_killed(words, tmp_path):
  """Killed while the first trial trains; its metrics go on, and none is lost.

  Against a sweep on this machine without Ray, with as many threads: on jax
  0.10.2 convolutions' bits depend on these, a dense network's do not.
  """
  folder = tmp_path / 'sweep'
  words = [*words, f'--workdir={folder}']
  metrics = folder / 'trials' / '000' / 'metrics.jsonl'
  with process_lib.Process('sweep', *words) as process:
    end = time.monotonic() + 200
    while not metrics.exists() or 'eval' not in metrics.read_text():
      assert time.monotonic() < end, process.errors
      time.sleep(0.05)
    process.send(signal.SIGKILL)
    process.end()
  end = time.monotonic() + 60
  while left := test_sweep.children(folder):
    assert time.monotonic() < end, left
    time.sleep(0.1)
  with process_lib.Process('sweep', *words) as process:
    assert process.end(400) == 0, process.errors
    assert process.errors == ''
    assert process.out.count('finished, eval/accuracy') == 2
  found = test_sweep.results(folder)
  assert [t['state'] for t in found['trials']] == ['finished'] * 2
  for trial in found['trials']:
    file = folder / trial['runs'][0]['workdir'] / 'metrics.jsonl'
    lines = [json.loads(line) for line in file.open()]
    steps = [line['step'] for line in lines if 'eval/accuracy' in line]
    assert steps == [10, 20, 30, 40, 50, 60]
    assert trial['value'] == max(
      line['eval/accuracy'] for line in lines if 'eval/accuracy' in line
    )


def test_an_unreachable_cluster_is_one_line(words, run, tmp_path):
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    address = f'127.0.0.1:{probe.getsockname()[1]}'
  folder = tmp_path / 'sweep'
  for given, says in (
    (address, f'--ray_address is {address}, where no Ray cluster answers'),
    ('here', '--ray_address is here; it takes HOST:PORT, or auto'),
  ):
    ran = run('sweep', *words, f'--workdir={folder}', f'--ray_address={given}')
    assert (ran.returncode, ran.stderr.count('\n')) == (2, 1)
    assert ran.stderr.startswith(f'sweep: {says}')
    assert not folder.exists()


def test_more_devices_than_a_machine_has_are_refused(words, run, tmp_path):
  folder = tmp_path / 'sweep'
  ran = run('sweep', *words, f'--workdir={folder}', '--devices_per_trial=999')
  assert ran.returncode == 2, ran.stderr
  assert '--devices_per_trial is 999; no machine of this Ray' in ran.stderr
  assert not folder.exists()
