"""The mesh, and what lies where on it; no devices but their number."""

import contextlib
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import runs
from train import config as config_lib
from train import mesh as mesh_lib
from train import partition
from train import program as program_lib

F32 = jnp.float32


def _mesh(data, fsdp, tensor):
  return jax.sharding.AbstractMesh(
    (data, fsdp, tensor),
    mesh_lib.AXES,
    axis_types=(jax.sharding.AxisType.Auto,) * 3,
  )


def _array(*shape):
  return jax.ShapeDtypeStruct(shape, F32)


PARAMS = {
  'embed': {'kernel': _array(4, 4, 3, 128), 'bias': _array(128)},
  'blocks': {
    0: {
      'qkv': {'kernel': _array(128, 384), 'bias': _array(384)},
      'project': {'kernel': _array(128, 128), 'bias': _array(128)},
      'norm': {'scale': _array(128)},
    },
    1: {'kernel': _array(64, 512), 'recurrent_kernel': _array(128, 512)},
  },
  'head': {'kernel': _array(128, 10), 'bias': _array(10)},
}


def _specs(mesh, state=None):
  shardings = partition.state_shardings(mesh, state or PARAMS, PARAMS)
  return jax.tree.map(lambda s: tuple(s.spec), shardings)


@pytest.mark.parametrize(
  ('wanted', 'devices', 'lengths'),
  [
    ((-1, 1, 1), 8, (8, 1, 1)),
    ((-1, 2, 2), 8, (2, 2, 2)),
    ((2, -1, 1), 8, (2, 4, 1)),
    ((1, 1, 1), 1, (1, 1, 1)),
    ((-1, 1, 1), 1, (1, 1, 1)),
  ],
)
def test_what_is_left_goes_to_the_axis_of_minus_one(wanted, devices, lengths):
  assert mesh_lib._lengths(_wanted(wanted), devices) == lengths


def _wanted(lengths):
  return config_lib.Mesh(
    **dict(zip(('data', 'fsdp', 'tensor'), lengths, strict=True))
  )


@pytest.mark.parametrize(
  ('wanted', 'devices', 'named'),
  [
    ((3, 1, 1), 8, 'takes 3 devices; there are 8'),
    ((-1, 3, 1), 8, 'takes a multiple of 3 devices; there are 8'),
    ((-1, 1, 16), 8, 'takes a multiple of 16 devices; there are 8'),
    ((2, 1, 1), 1, 'takes 2 devices; there is 1'),
    ((4, 4, 4), 8, 'takes 64 devices; there are 8'),
  ],
)
def test_a_mesh_that_does_not_multiply_to_the_devices_names_the_nearest(
  wanted, devices, named
):
  with pytest.raises(config_lib.UserError) as caught:
    mesh_lib.make_mesh(_wanted(wanted), [None] * devices)
  line = str(caught.value)
  assert 'config.mesh is data' in line
  assert named in line
  assert '\n' not in line
  _, _, offered = line.partition('the nearest is ')
  lengths = [int(part.split()[1]) for part in offered.split(', ')]
  assert math.prod(lengths) == devices


def test_an_axis_of_length_one_divides_nothing():
  for spec in jax.tree.leaves(
    _specs(_mesh(8, 1, 1)), is_leaf=lambda x: isinstance(x, tuple)
  ):
    assert spec == ()


def test_fsdp_takes_the_largest_dimension_that_it_divides():
  specs = _specs(_mesh(1, 8, 1))
  block = specs['blocks'][0]
  assert block['qkv']['kernel'] == (None, 'fsdp')
  assert specs['blocks'][1]['kernel'] == (None, 'fsdp')
  assert specs['head']['kernel'] == ()  # 1,280 numbers.
  assert block['norm']['scale'] == ()


def test_tensor_divides_widths_and_the_ends_of_branches_by_what_they_take_in():
  specs = _specs(_mesh(1, 1, 2))
  block = specs['blocks'][0]
  assert block['qkv']['kernel'] == (None, 'tensor')
  assert block['qkv']['bias'] == ('tensor',)
  assert block['project']['kernel'] == ('tensor',)
  assert block['project']['bias'] == ()
  assert block['norm']['scale'] == ()
  assert specs['embed']['kernel'] == ()
  assert specs['head']['kernel'] == ('tensor',)


def test_a_recurrence_is_not_divided_by_tensor():
  cell = _specs(_mesh(1, 1, 2))['blocks'][1]
  assert cell == {'kernel': (), 'recurrent_kernel': ()}


def test_fsdp_and_tensor_take_different_dimensions():
  block = _specs(_mesh(1, 2, 2))['blocks'][0]
  assert block['qkv']['kernel'] == ('fsdp', 'tensor')
  assert block['project']['kernel'] == ('tensor', 'fsdp')


def test_moments_lie_as_their_parameters_and_others_by_their_size():
  state = {
    'opt_state': ({'mu': PARAMS, 'count': _array()},),
    'ema_params': PARAMS,
    # As Adafactor keeps of a kernel: under its path, of another shape.
    'rows': {'blocks': {0: {'qkv': {'kernel': _array(2**15)}}}},
  }
  specs = _specs(_mesh(1, 2, 2), state)
  own = _specs(_mesh(1, 2, 2))
  assert specs['opt_state'][0]['mu'] == own
  assert specs['ema_params'] == own
  assert specs['opt_state'][0]['count'] == ()
  assert specs['rows']['blocks'][0]['qkv']['kernel'] == ('fsdp',)


def test_a_width_that_nothing_divides_is_refused_with_the_nearest():
  with pytest.raises(config_lib.UserError) as caught:
    partition.check_tensor('vit', PARAMS, _mesh(1, 1, 7))
  line = str(caught.value)
  assert 'config.mesh.tensor is 7, which divides no width of vit' in line
  assert '(128, 384)' in line
  assert line.endswith('the nearest that does is 6')
  partition.check_tensor('vit', PARAMS, _mesh(1, 1, 8))


@pytest.mark.parametrize('axis', ['fsdp', 'tensor'])
def test_shard_map_divides_examples_alone(axis):
  config = config_lib.Config(partition='shard_map')
  lengths = {'data': 2, 'fsdp': 1, 'tensor': 1} | {axis: 2}
  with pytest.raises(config_lib.UserError) as caught:
    mesh_lib.check(config, _mesh(**lengths))
  line = str(caught.value)
  assert f'config.mesh.{axis} is 2' in line
  assert 'shard_map' in line


def test_all_rows_are_this_process_s_where_there_is_one():
  mesh = mesh_lib.make_mesh(devices=jax.devices()[:1])
  np.testing.assert_array_equal(partition.rows(mesh, 6), np.arange(6))
  batch = {'x': np.arange(12).reshape(6, 2)}
  put = partition.put_rows(batch, mesh, 6)
  np.testing.assert_array_equal(put['x'], batch['x'])


# -------------------------------------------------------------- determinism


def test_a_cpu_needs_nothing_for_equal_bytes_and_a_gpu_a_flag():
  options, words = mesh_lib.determinism(mesh_lib.make_mesh())
  assert options == {}
  assert 'on CPUs it costs nothing' in words

  gpu = types.SimpleNamespace(platform='gpu')
  devices = types.SimpleNamespace(devices=np.array([[[gpu]]]))
  options, words = mesh_lib.determinism(devices)
  assert options == {'xla_gpu_deterministic_ops': True}
  assert 'longer' in words


@pytest.mark.parametrize('wanted', [False, True])
def test_the_compiler_is_told_where_it_is_asked_for(monkeypatch, wanted):
  def unknown(mesh):
    return {'xla_no_such_flag': True}, ''

  monkeypatch.setattr(mesh_lib, 'determinism', unknown)
  program = program_lib.create(runs.config(deterministic=wanted))
  refused = pytest.raises(Exception, match='xla_no_such_flag')
  with refused if wanted else contextlib.nullcontext():
    batch = program_lib._batch_shape(64, program.dataset)
    program.train_step.lower(program.state_shape, batch).compile()
