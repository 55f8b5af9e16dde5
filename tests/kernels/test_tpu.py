"""Every TPU kernel through libtpu's compiler, with no TPU."""

import importlib.metadata

import pytest

from kernels import chips
from kernels import compile as compile_lib

try:
  importlib.metadata.version('libtpu')
  MISSING = False
except importlib.metadata.PackageNotFoundError:
  MISSING = True

pytestmark = [
  pytest.mark.tpu,
  pytest.mark.skipif(MISSING, reason="libtpu: pip install 'jax[tpu]'"),
]

# name -> (op, dtype, columns, gradient, settings), on one device.
ALONE = {
  'softmax': ('softmax', 'bfloat16', 1024, True, {}),
  'softmax f32, ragged, causal': (
    'softmax',
    'float32',
    1000,
    False,
    {'causal': True},
  ),
  'softmax of long rows': ('softmax', 'bfloat16', 32768, False, {}),
  'log_softmax': ('log_softmax', 'float32', 1000, True, {}),
  'cross-entropy': ('softmax_cross_entropy', 'bfloat16', 8192, True, {}),
  'cross-entropy f32, ragged, smoothed': (
    'softmax_cross_entropy',
    'float32',
    10001,
    True,
    {'label_smoothing': 0.1, 'z_loss': 1e-4, 'ignore_index': -1},
  ),
  'linear cross-entropy': (
    'linear_softmax_cross_entropy',
    'bfloat16',
    8192,
    True,
    {},
  ),
}
BEFORE = {'given': ['in_scale', 'in_shift'], 'activation': 'relu'}
BEHIND = {'given': ['scale', 'shift', 'residual'], 'activation': 'relu'}
# name -> (op, dtype, x, w, the rest of programs.convolution's), kernels.
CONVOLUTIONS = {
  'conv2d': (
    ('conv2d', 'bfloat16', (16, 14, 14, 256), (3, 3, 256, 256), {}),
    1,
  ),
  'conv2d, what follows': (
    ('conv2d', 'bfloat16', (16, 14, 14, 256), (3, 3, 256, 256), BEHIND),
    1,
  ),
  'conv2d, strides': (
    (
      'conv2d',
      'bfloat16',
      (16, 14, 14, 256),
      (3, 3, 256, 256),
      {'strides': 2},
    ),
    1,
  ),
  'conv2d f32, gradient': (
    (
      'conv2d',
      'float32',
      (16, 14, 14, 64),
      (3, 3, 64, 64),
      BEHIND | {'gradient': True},
    ),
    2,
  ),
  'conv2d of a few channels': (
    ('conv2d', 'bfloat16', (16, 33, 33, 3), (7, 7, 3, 64), {'strides': 2}),
    1,
  ),
  'conv2d_stats 1x1, gradient': (
    (
      'conv2d_stats',
      'bfloat16',
      (16, 14, 14, 256),
      (1, 1, 256, 128),
      BEFORE | {'gradient': True},
    ),
    2,
  ),
  'conv2d_stats 3x3': (
    ('conv2d_stats', 'bfloat16', (16, 14, 14, 128), (3, 3, 128, 128), BEFORE),
    1,
  ),
}
# Ops whose loss a step on a mesh takes.
ON_A_MESH = ('softmax', 'softmax_cross_entropy', 'linear_softmax_cross_entropy')


@pytest.fixture(scope='module', params=chips.CHIPS)
def compiled(request):
  """name or op -> what compiling it for one chip gave; all in one process."""
  names = ('op', 'dtype', 'columns', 'gradient', 'settings')
  requests = {
    name: compile_lib.Request(
      'tests.kernels.programs:one_device',
      dict(zip(names, arguments, strict=True)),
    )
    for name, arguments in ALONE.items()
  }
  for name, ((op, dtype, x, w, rest), _) in CONVOLUTIONS.items():
    requests[name] = compile_lib.Request(
      'tests.kernels.programs:convolution',
      {'op': op, 'dtype': dtype, 'x': x, 'w': w, **rest},
    )
  for op in ON_A_MESH:
    requests[f'mesh {op}'] = compile_lib.Request(
      'tests.kernels.programs:four_devices', {'op': op}
    )
  results = compile_lib.for_tpu(list(requests.values()), request.param)
  return dict(zip(requests, results, strict=True))


@pytest.mark.parametrize('name', ALONE)
def test_a_kernel_compiles_and_is_in_the_program(compiled, name):
  program = compiled[name]
  assert isinstance(program, compile_lib.Program), program
  assert program.kernels
  assert not program.collectives


# Their cycles are not asked for: of a program of blocks libtpu says 0.
@pytest.mark.parametrize('name', CONVOLUTIONS)
def test_a_convolution_compiles_and_is_in_the_program(compiled, name):
  program = compiled[name]
  assert isinstance(program, compile_lib.Program), program
  assert len(program.kernels) == CONVOLUTIONS[name][1]
  assert not program.collectives


@pytest.mark.parametrize('name', ALONE)
def test_the_static_profile_knows_every_operation(compiled, name):
  program = compiled[name]
  assert isinstance(program, compile_lib.Program), program
  assert program.unknown == ()
  assert program.cycles > 0


@pytest.mark.parametrize('op', ON_A_MESH)
def test_a_step_on_a_mesh_gathers_no_rows(compiled, op):
  program = compiled[f'mesh {op}']
  assert isinstance(program, compile_lib.Program), program
  assert program.kernels
  # The weights' gradients are summed over the devices, and nothing else moves.
  assert program.collectives == {'all-reduce'}


def test_what_cannot_be_compiled_is_one_line_and_the_rest_goes_on():
  known = dict(op='softmax', dtype='bfloat16', columns=128, gradient=False)
  entry = 'tests.kernels.programs:one_device'
  wrong, right = compile_lib.for_tpu(
    [
      compile_lib.Request(entry, known | {'dtype': 'int8', 'settings': {}}),
      compile_lib.Request(entry, known | {'settings': {}}),
    ],
    'v5e',
  )
  assert isinstance(wrong, compile_lib.Failure)
  assert wrong.reason.startswith('TypeError: ')
  assert '\n' not in wrong.reason
  assert isinstance(right, compile_lib.Program)
