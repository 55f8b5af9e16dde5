"""Kernels on a mesh of eight devices: the same values, and no gathering."""

import json
import math
import re
import subprocess
import sys

import pytest

from tests import conftest

pytestmark = pytest.mark.slow  # What they look at takes 15 s to make.


@pytest.fixture(scope='module')
def results():
  """tests/kernels/on_devices.py's, on eight virtual devices."""
  ran = subprocess.run(
    [sys.executable, '-m', 'tests.kernels.on_devices'],
    capture_output=True,
    text=True,
    cwd=conftest.REPOSITORY,
    env=conftest.environment(
      XLA_FLAGS='--xla_force_host_platform_device_count=8', JAX_PLATFORMS='cpu'
    ),
    timeout=300,
  )
  assert ran.returncode == 0, ran.stderr[-3000:]
  return json.loads(ran.stdout)


@pytest.mark.parametrize(
  'mesh', ['data', 'fsdp', 'tensor', 'explicit', 'explicit queries']
)
def test_devices_share_the_rows_and_tell_each_other_nothing(results, mesh):
  functions = ['grad', 'remat', 'scan', 'vmap']
  # What is divided by hand is no explicit axis any more.
  functions += [] if 'explicit' in mesh else ['shard_map']
  for function in functions:
    case = results['cases'][f'{function} on {mesh}']
    assert case['error'] < 2e-6, function
    assert case['collectives'] == [], function
    whole = 8 * 4 * 16 * 128
    devices = 2 if mesh == 'tensor' else 8
    assert math.prod(case['held']) == whole / devices, function


@pytest.mark.parametrize('mesh', ['data', 'fsdp'])
@pytest.mark.parametrize('op', ['conv2d', 'conv2d_stats'])
def test_a_convolutions_images_stay_and_only_sums_are_told(results, op, mesh):
  case = results['cases'][f'{op} on {mesh}']
  assert 'raised' not in case, case['raised']
  assert case['error'] < 1e-5
  # Of the weights' gradients, and of the statistics.
  assert case['collectives'] == ['all-reduce']
  assert case['held'] == [16 // 8, 5, 4, 6]


def test_the_gradient_by_what_every_device_has_is_summed(results):
  assert results['weights'] < 1e-5


@pytest.mark.parametrize(
  ('case', 'words'),
  [
    ('seven', r'8 devices cannot share 7 of \(7, 128\)'),
    ('one row', r'8 devices cannot share 1 of \(1, 128\)'),
    ('columns', 'divides the last dimension'),
  ],
)
def test_what_devices_cannot_share_is_refused(results, case, words):
  assert re.search(words, results['refusals'][case])
