"""Each trial is given devices of its own, and never more than there are."""

import os

import pytest

from experiments.search import devices
from experiments.search import launchers
from train import config as config_lib


@pytest.fixture
def machine(monkeypatch):
  """machine('gpu', 4): what is found there."""

  def machine(kind, count):
    ids = [str(i) for i in range(count)]
    monkeypatch.setattr(devices, 'find', lambda: (kind, ids))

  return machine


def test_gpus_are_dealt_out_once_each(machine):
  machine('gpu', 8)
  slots = devices.slots(3, None)
  assert [s.environment for s in slots] == [
    {'CUDA_VISIBLE_DEVICES': '0,1,2'},
    {'CUDA_VISIBLE_DEVICES': '3,4,5'},
  ]
  assert slots[0].prefix == ('CUDA_VISIBLE_DEVICES=0,1,2',)


@pytest.mark.parametrize(
  ('each', 'bounds'), [(1, '1,1,1'), (2, '1,2,1'), (4, '2,2,1'), (8, '2,4,1')]
)
def test_tpu_chips_have_bounds_and_a_port_each(machine, each, bounds):
  machine('tpu', 8)
  found = [slot.environment for slot in devices.slots(each, None)]
  chips = [e['TPU_VISIBLE_CHIPS'].split(',') for e in found]
  assert sum(chips, []) == [str(i) for i in range(8)]
  assert {len(c) for c in chips} == {each}
  assert {e['TPU_CHIPS_PER_PROCESS_BOUNDS'] for e in found} == {bounds}
  assert {e['TPU_PROCESS_BOUNDS'] for e in found} == {'1,1,1'}
  assert len({e['TPU_PROCESS_PORT'] for e in found}) == 8 // each


def test_cores_may_be_shared_where_that_is_asked_for(machine):
  machine('cpu', 4)
  assert [s.cores for s in devices.slots(2, None)] == [(0, 1), (2, 3)]
  assert [s.cores for s in devices.slots(3, 3)] == [
    (0, 1, 2), (3, 0, 1), (2, 3, 0),
  ]  # fmt: skip
  assert devices.slots(2, None)[1].prefix == ('taskset', '-c', '2,3')


@pytest.mark.parametrize(
  ('kind', 'count', 'each', 'workers', 'says'),
  [
    ('gpu', 4, 5, None, '--devices_per_trial is 5; this machine has 4 GPUs'),
    ('gpu', 1, 2, None, '--devices_per_trial is 2; this machine has 1 GPU'),
    ('cpu', 2, 3, None, '--devices_per_trial is 3; this machine has 2 CPU cor'),
    ('gpu', 4, 2, 3, '--workers is 3, with 2 a trial; this machine has 4 GPUs'),
    ('tpu', 4, 3, None, '--devices_per_trial is 3; of TPU chips a process tak'),
  ],
)
def test_more_than_there_are_is_refused(
  machine, kind, count, each, workers, says
):
  machine(kind, count)
  with pytest.raises(config_lib.UserError) as error:
    devices.slots(each, workers)
  assert str(error.value).startswith(says)


def test_what_a_machine_has_is_what_jax_would_take(monkeypatch):
  monkeypatch.delenv('JAX_PLATFORMS', raising=False)
  monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '2, 5')
  assert devices.find() == ('gpu', ['2', '5'])
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
  cores = sorted(os.sched_getaffinity(0))
  assert devices.find() == ('cpu', [str(core) for core in cores])
  assert len(devices.slots(1, None)) == len(cores)


def test_runs_share_what_was_compiled_for_as_many_cores():
  one = devices.Slot('cpu 0', cores=(0,))
  two = devices.Slot('cpu 0,1', cores=(0, 1))
  gpu = devices.Slot('gpu 3', {'CUDA_VISIBLE_DEVICES': '3'})
  made = [launchers.environment({'A': 'b'}, slot) for slot in (one, two, gpu)]
  folders = [found['JAX_COMPILATION_CACHE_DIR'] for found in made]
  assert folders[0] != folders[1]
  assert all(f.startswith(os.environ['TAISHAN_CACHE']) for f in folders)
  assert made[2]['CUDA_VISIBLE_DEVICES'] == '3'
  assert made[2]['A'] == 'b'
  own = launchers.environment({'JAX_COMPILATION_CACHE_DIR': 'mine'}, one)
  assert own['JAX_COMPILATION_CACHE_DIR'] == 'mine'
  assert 'JAX_COMPILATION_CACHE_MAX_SIZE' not in own
