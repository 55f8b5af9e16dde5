"""A run begun on some devices goes on, and is evaluated, on others."""

import json
import subprocess
import sys

import numpy as np
import pytest

from tests import conftest
from train import writer

WORDS = (
  '--config=digits_mlp',
  '--config.model.dropout=0.3',
  '--config.log_every=1',
  '--config.eval_every=100',
  '--config.schedule.name=constant_schedule',
  '--config.schedule.value=1e-3',
)


def _devices(count):
  return {
    'XLA_FLAGS': f'--xla_force_host_platform_device_count={count}',
    'JAX_PLATFORMS': 'cpu',
  }


def _losses(workdir):
  lines = writer.read(workdir / 'metrics.jsonl')
  return [line['train/loss'] for line in lines if 'train/loss' in line]


@pytest.mark.slow
def test_a_run_goes_on_on_fewer_devices_and_another_mesh(run, tmp_path):
  """And is evaluated on any number, of which three do not share a batch."""

  def launch(name, devices, steps, *words):
    ran = run(
      'launch', *WORDS, *words, f'--config.total_steps={steps}',
      f'--workdir={tmp_path / name}', env=_devices(devices),
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    return ran.stdout

  launch('whole', 1, 30)
  launch('moved', 8, 10, '--config.mesh.fsdp=8')
  for devices, steps, *words in (
    (4, 20, '--config.mesh.fsdp=2', '--config.mesh.tensor=2'),
    (1, 30),
  ):
    said = launch('moved', devices, steps, *words)
    assert 'resuming with config.mesh.fsdp' in said
    assert f'resuming from step {steps - 10}' in said
  # The same examples and masks, or the losses would be others.
  np.testing.assert_allclose(
    _losses(tmp_path / 'moved'), _losses(tmp_path / 'whole'), rtol=2e-4
  )
  on_one = tmp_path / 'moved' / 'evaluations' / 'test-30.json'
  tested = on_one.read_text()  # Which the next writes anew.
  ran = run('evaluate', f'--workdir={tmp_path / "moved"}', env=_devices(3))
  assert ran.returncode == 0, ran.stderr
  assert json.loads(ran.stdout)['count'] == 360
  found = [json.loads(text)['accuracy'] for text in (ran.stdout, tested)]
  assert found[0] == found[1]


_RESTORE = """
import sys, jax, pathlib
from tests import runs
for count in (8, 4, 1):
  print(runs.digest(pathlib.Path(sys.argv[1]), jax.devices()[:count]))
"""


@pytest.mark.slow
def test_a_restored_state_is_equal_on_any_mesh(run, tmp_path):
  ran = run(
    'launch', *WORDS, '--config.total_steps=5', '--config.mesh.fsdp=8',
    f'--workdir={tmp_path / "run"}', env=_devices(8),
  )  # fmt: skip
  assert ran.returncode == 0, ran.stderr
  ran = subprocess.run(
    [sys.executable, '-c', _RESTORE, str(tmp_path / 'run')],
    capture_output=True,
    text=True,
    cwd=conftest.REPOSITORY,
    env=conftest.environment(**_devices(8)),
  )
  assert ran.returncode == 0, ran.stderr
  digests = [line for line in ran.stdout.splitlines() if len(line) == 64]
  assert len(digests) == 3
  assert len(set(digests)) == 1
