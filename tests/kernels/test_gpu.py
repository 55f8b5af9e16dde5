"""Every GPU kernel through XLA's and Mosaic GPU's compilers, with no GPU."""

import importlib.metadata

import pytest

from kernels import compile as compile_lib
from kernels import compile_gpu

try:
  importlib.metadata.version('jax-cuda13-plugin')
  MISSING = False
except importlib.metadata.PackageNotFoundError:
  MISSING = True

pytestmark = [
  pytest.mark.cuda,
  pytest.mark.skipif(MISSING, reason="the plugin: pip install 'jax[cuda13]'"),
]

# name -> (op, dtype, columns, gradient, masked, settings), on one device. Rows
# of 8192 are the longest that a warpgroup holds.
ALONE = {
  'softmax': ('softmax', 'bfloat16', 1024, True, False, {}),
  'softmax of whole rows': ('softmax', 'float32', 8192, True, False, {}),
  'softmax of long rows': ('softmax', 'bfloat16', 32768, True, False, {}),
  'softmax, masked': ('softmax', 'float32', 8192, False, True, {}),
  'softmax, causal': (
    'softmax',
    'bfloat16',
    8192,
    False,
    False,
    {'causal': True},
  ),
  'log_softmax': ('log_softmax', 'bfloat16', 8192, True, False, {}),
  'log_softmax, masked': (
    'log_softmax',
    'float32',
    6144,
    False,
    True,
    {'scale': -0.5},
  ),
  # Held whole, it spilled.
  'log_softmax of long rows, masked': (
    'log_softmax',
    'bfloat16',
    8192,
    False,
    True,
    {'scale': -0.5},
  ),
  'cross-entropy': (
    'softmax_cross_entropy',
    'bfloat16',
    32000,
    True,
    False,
    {},
  ),
  'cross-entropy f32, ragged, smoothed': (
    'softmax_cross_entropy',
    'float32',
    10001,
    True,
    False,
    {'label_smoothing': 0.1, 'z_loss': 1e-4, 'ignore_index': -1},
  ),
  'linear cross-entropy': (
    'linear_softmax_cross_entropy',
    'bfloat16',
    8192,
    True,
    False,
    {},
  ),
}
BEFORE = {'given': ['in_scale', 'in_shift'], 'activation': 'relu'}
BEHIND = {'given': ['scale', 'shift', 'residual'], 'activation': 'gelu'}
# name -> (op, x, w, the rest of programs.convolution's), in bfloat16.
CONVOLUTIONS = {
  '1x1': ('conv2d', (8, 14, 14, 256), (1, 1, 256, 128), {}),
  '3x3': ('conv2d', (8, 14, 14, 64), (3, 3, 64, 64), {}),
  'what follows': ('conv2d', (8, 14, 14, 64), (3, 3, 64, 128), BEHIND),
  'strides': ('conv2d', (8, 14, 14, 64), (3, 3, 64, 64), {'strides': 2}),
  'a few channels': ('conv2d', (8, 33, 33, 3), (7, 7, 3, 64), {'strides': 2}),
  'what is before, statistics': (
    'conv2d_stats',
    (8, 14, 14, 128),
    (3, 3, 128, 128),
    BEFORE,
  ),
}
ON_A_MESH = ('softmax', 'softmax_cross_entropy', 'linear_softmax_cross_entropy')
PROGRAMS = 'tests.kernels.programs'


def _compiled(entry, arguments):
  request = compile_lib.Request(f'{PROGRAMS}:{entry}', arguments)
  (result,) = compile_gpu.for_gpu([request], 'h200')
  return result


@pytest.mark.parametrize('name', ALONE)
def test_a_kernel_compiles_and_keeps_to_the_registers(name):
  names = ('op', 'dtype', 'columns', 'gradient', 'masked', 'settings')
  program = _compiled('one_device', dict(zip(names, ALONE[name], strict=True)))
  assert isinstance(program, compile_gpu.Program), program
  op, *_, gradient, _, _ = ALONE[name]
  # The gradient of a cross-entropy is XLA's.
  backward = gradient and op in ('softmax', 'log_softmax')
  assert len(program.kernels) == 1 + backward
  assert [kernel.spilled for kernel in program.kernels] == [0] * (1 + backward)
  assert not program.collectives


@pytest.mark.parametrize('name', CONVOLUTIONS)
def test_a_convolution_compiles_and_keeps_to_the_registers(name):
  op, x, w, rest = CONVOLUTIONS[name]
  known = {'op': op, 'dtype': 'bfloat16', 'x': x, 'w': w}
  program = _compiled('convolution', known | rest)
  assert isinstance(program, compile_gpu.Program), program
  assert [kernel.spilled for kernel in program.kernels] == [0]
  assert not program.collectives


@pytest.mark.parametrize('op', ON_A_MESH)
def test_a_step_on_a_mesh_gathers_no_rows(op):
  program = _compiled('four_devices', {'op': op})
  assert isinstance(program, compile_gpu.Program), program
  assert program.kernels
  # The weights' gradients are summed over the devices, and nothing else moves.
  assert program.collectives == {'all-reduce'}


def test_what_cannot_be_compiled_is_one_line():
  wrong = _compiled(
    'one_device',
    dict(op='softmax', dtype='int8', columns=128, gradient=False, settings={}),
  )
  assert isinstance(wrong, compile_lib.Failure)
  assert wrong.reason.startswith('TypeError: ')
  assert '\n' not in wrong.reason
