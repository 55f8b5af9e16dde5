"""Targets, the times of their links, and how plans are judged."""

import pytest

from experiments.planning import cost
from experiments.planning import search
from experiments.planning import targets
from experiments.planning import text
from kernels import chips
from train import config as config_lib


@pytest.mark.parametrize(
  ('name', 'devices', 'shape'),
  [
    ('v5e:4x4', 16, (4, 4)),
    ('v6e:8x8', 64, (8, 8)),
    ('v5p:2x2x4', 16, (2, 2, 4)),
    ('v4:4x4x4', 64, (4, 4, 4)),
    ('h200:8', 8, (1, 8)),
    ('h100:16', 16, (2, 8)),
    ('cpu:3', 3, (3,)),
  ],
)
def test_a_target_is_a_chip_and_how_many(name, devices, shape):
  target = targets.parse(name)
  assert (target.devices, target.shape) == (devices, shape)


@pytest.mark.parametrize(
  ('name', 'named'),
  [
    ('v7:4x4', 'v5e:4x4'),  # The list.
    ('', 'cpu:8'),
    ('cpu', 'cpu:8'),
    ('cpu:0', 'cpu:8'),
    ('cpu:-1', 'cpu:8'),
    ('h200:12', 'h200:16'),
    ('h200:4x4', 'h200:8'),
    ('v5e:16', 'v5e:4x4'),
    ('v5e:4x4x4', 'v5e:4x4'),
    ('v5p:4x4', 'v5p:2x2x1'),
    ('v5e:32x16', 'v5e:16x16'),
    ('cpu:99999', 'cpu:1024'),
  ],
)
def test_a_target_that_is_none_names_one_that_is(name, named):
  with pytest.raises(config_lib.UserError) as error:
    targets.parse(name)
  assert repr(name) in str(error.value)
  assert named in str(error.value)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  ('name', 'nearest'), [('v5e:3x5', '4x4'), ('v5e:8x3', '4x8')]
)
def test_of_a_slice_that_nobody_has_the_nearest_is_named(name, nearest):
  error = targets.refused(targets.parse(name), 'its compiler refuses it')
  assert f'the nearest is v5e:{nearest}' in str(error)


def test_every_named_slice_is_a_target_and_every_target_has_its_rates():
  for chip, slices in targets.SLICES.items():
    for name in slices:
      assert targets.parse(f'{chip}:{name}').devices <= chips.TPUS[chip].most
  for name in (*chips.TPUS, *chips.GPU_CHIPS):
    chip = (chips.TPUS | chips.GPU_CHIPS)[name]
    assert min(chip.memory, chip.link, chip.bandwidth, chip.flops) > 0
  assert chips.GPUS.keys() == chips.GPU_CHIPS.keys()


MIB = 2**20


def exchange(name, kind, size, members, extents):
  return targets.parse(name).exchange_seconds(kind, size, members, extents)


def test_a_ring_of_links_takes_what_its_formula_says():
  """An all-reduce is twice (n - 1) / n of its bytes over each device's links.

  16 along an axis of a v5e pod are a ring: 50 GB/s each way, 8 hops.
  """
  seconds = exchange('v5e:16x16', 'all-reduce', 64 * MIB, 16, (16, 1, 1))
  assert seconds == pytest.approx(
    2 * 64 * MIB * 15 / 16 / (2 * 50e9) + 8e-6, rel=1e-9
  )
  # 4 of them are a line, as are the 4 of a smaller slice; all-gather is half.
  for name in ('v5e:16x16', 'v5e:4x4'):
    seconds = exchange(name, 'all-gather', 64 * MIB, 4, (1, 4, 1))
    assert seconds == pytest.approx(64 * MIB * 3 / 4 / 50e9 + 4e-6, rel=1e-9)
  # Both axes at once.
  both = exchange('v5e:4x4', 'reduce-scatter', 64 * MIB, 16, (4, 4, 1))
  assert both == pytest.approx(64 * MIB * 15 / 16 / 100e9 + 8e-6, rel=1e-9)
  # A cube of v4 closes to rings of 4 in three dimensions.
  cube = exchange('v4:4x4x4', 'all-gather', 64 * MIB, 64, (4, 4, 4))
  assert cube == pytest.approx(64 * MIB * 63 / 64 / 300e9 + 6e-6, rel=1e-9)


def test_gpus_of_several_hosts_wait_for_the_network():
  within = exchange('h200:8', 'all-reduce', 800 * MIB, 8, (1, 8))
  assert within == pytest.approx(
    2 * 800 * MIB * 7 / 8 / 450e9 + 10e-6, rel=1e-9
  )
  # Eight rings, each with an eighth, through adapters of 50 GB/s.
  across = exchange('h200:16', 'all-reduce', 800 * MIB, 16, (2, 8))
  moved = 2 * 800 * MIB * 15 / 16 / 8
  assert across == pytest.approx(moved / 50e9 + 10e-6, rel=1e-9)


def test_alone_nothing_is_exchanged():
  assert exchange('v5e:1x1', 'all-reduce', MIB, 1, (1, 1, 1)) == 0


def test_a_gpus_products_of_float32_are_slower_and_a_tpus_are_not():
  gpu, tpu = targets.parse('h100:8'), targets.parse('v5e:2x2')
  assert gpu.rate('float32') == pytest.approx(
    gpu.rate('bfloat16') / 2, rel=0.01
  )
  assert tpu.rate('float32') == tpu.rate('bfloat16') == 197e12


def account(batch_size=32, temporaries=0, **more):
  """What the compiling process says, of 197 TFLOP and 819 GB a device."""
  return {
    'bytes': {'parameters': 4 * 2**30, 'batch': 2**20},
    'ahead': 2 * 2**20,
    'memory': {
      'arguments': 4 * 2**30 + 2**20,
      'outputs': 0,
      'temporaries': temporaries,
      'code': 0,
    },
    'flops': 16 * 197e12,
    'moved': 819e9 / 4,
    'collectives': [
      {
        'kind': 'all-reduce',
        'members': 16,
        'extents': [4, 4, 1],
        'sizes': [(1, 2**30), (24, 2**20)],
      }
    ],
    'dtype': 'bfloat16',
    'batch_size': batch_size,
    'total_steps': 7200,
    'mesh': {'data': 16, 'fsdp': 1, 'tensor': 1},
    'examples': 10_000,
  } | more


def test_a_step_takes_the_longest_of_three():
  plan = cost.plan(targets.parse('v5e:4x4'), account())
  assert plan.seconds['compute'] == pytest.approx(1)
  assert plan.seconds['memory'] == pytest.approx(1 / 4)
  (one,) = plan.collectives
  assert (one['count'], one['bytes']) == (25, 2**30 + 24 * 2**20)
  assert plan.seconds['interconnect'] == one['seconds']
  assert (plan.step, plan.bound) == (plan.seconds['compute'], 'compute')
  assert plan.share_of_peak == 1
  assert plan.examples == pytest.approx(32)
  assert plan.hours == pytest.approx(2)
  slow = cost.plan(targets.parse('v5e:4x4'), account(moved=4 * 819e9))
  assert (slow.step, slow.bound) == (pytest.approx(4), 'memory')
  assert slow.share_of_peak == pytest.approx(1 / 4)


def test_what_exceeds_the_memory_is_said_to_the_byte():
  target = targets.parse('v5e:4x4')
  room = int(15.75 * 2**30) - (4 * 2**30 + 3 * 2**20)
  assert cost.plan(target, account(temporaries=room)).fits
  plan = cost.plan(target, account(temporaries=room + 5))
  assert (plan.fits, plan.over) == (False, 5)


def test_what_the_compiler_refuses_has_its_numbers_and_no_times():
  over = {'used': 20 * 2**30, 'memory': 15.75 * 2**30}
  given = account(over=over, kind='TPU v5 lite', model='vit', variant='L/16',
                  data='imagenet2012', parameters=304_326_632)  # fmt: skip
  del given['memory'], given['collectives'], given['moved']
  plan = cost.plan(targets.parse('v5e:4x4'), given)
  assert (plan.fits, plan.step, plan.hours) == (False, None, None)
  assert plan.over == pytest.approx(4.25 * 2**30 + 2 * 2**20)
  said = '\n'.join(text.lines(plan))
  assert 'does not fit: 20.0 GiB a device, where there are 15.8 GiB' in said


class Compiler:
  """Answers as if memory were a base and a number of bytes an example."""

  def __init__(self, name, an_example, least_step=16):
    self.target, self.an_example = targets.parse(name), an_example
    self.asked = []

  def ask(self, config, *, compiled=True):
    size = config.data.batch_size
    if size % self.target.devices:
      raise config_lib.UserError(f'config.data.batch_size is {size}, which')
    if compiled:
      self.asked.append(size)
    return account(size, int(self.an_example * size))


@pytest.mark.parametrize('first', [16, 48, 100, 1024, 8192])
@pytest.mark.parametrize('an_example', [2**20, 3e6, 12e6, 700e6])
def test_the_largest_batch_is_found_to_a_sixteenth(first, an_example):
  compiler = Compiler('v5e:4x4', an_example)
  config = config_lib.Config(
    total_steps=1, data=config_lib.Data(batch_size=first)
  )
  tried = dict(search.batch(compiler, config))
  size = max(size for size, plan in tried.items() if plan.fits)
  room = int(15.75 * 2**30) - (4 * 2**30 + 3 * 2**20)
  exact = min(int(room / an_example), 10_000) // 16 * 16
  assert exact * 15 / 16 - 16 <= size <= exact
  assert len(compiler.asked) <= 12


def test_a_batch_that_never_fits_is_one_line():
  compiler = Compiler('v5e:4x4', 2**40)
  config = config_lib.Config(total_steps=1)
  with pytest.raises(config_lib.UserError, match='not even batches of 16'):
    list(search.batch(compiler, config))


def test_meshes_are_all_that_make_the_devices():
  assert sorted(targets.meshes(4)) == [
    (1, 1, 4), (1, 2, 2), (1, 4, 1), (2, 1, 2), (2, 2, 1), (4, 1, 1),
  ]  # fmt: skip
  assert len(targets.meshes(256)) == 45  # 2^8 into three: C(10, 2).


@pytest.mark.parametrize(
  ('bytes_', 'said'),
  [(0, '0 B'), (1023, '1023 B'), (1536, '1.50 KiB'), (2**30, '1.00 GiB')],
)
def test_bytes_are_read_by_people(bytes_, said):
  assert text.size(bytes_) == said
