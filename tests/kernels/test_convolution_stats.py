"""conv2d_stats against NumPy in float64, on every implementation."""

import functools

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import dispatch
from kernels.ops.convolution import shapes
from kernels.ops.convolution import stats
from tests.kernels import numpy_convolution as expected
from tests.kernels.test_convolution import lowered_calls

NO_GPU = pytest.mark.skipif(
  not hasattr(plgpu, 'InterpretGPUParams'),
  reason='jax interprets Mosaic GPU from 0.11 on',
)
GPU = pytest.param('pallas_gpu_interpret', marks=NO_GPU)
IMPLEMENTATIONS = ['xla', 'pallas_tpu_interpret', GPU]
ROUNDING = {'float32': 0, 'float64': 0, 'bfloat16': 2.0**-8}
BOTH = ('in_scale', 'in_shift')
# name -> x, w, in_scale and in_shift where they are given, the rest. Batches
# that fill no block of 8 or 16 images, and some that do.
CASES = {
  'one image': ((1, 5, 4, 3), (3, 3, 3, 5), BOTH, {'in_activation': 'relu'}),
  'five, 1x1': ((5, 6, 5, 7), (1, 1, 7, 4), BOTH, {'in_activation': 'relu'}),
  'seventeen': ((17, 4, 4, 2), (2, 2, 2, 3), BOTH, {'in_activation': 'gelu'}),
  'twenty': ((20, 3, 5, 4), (1, 3, 4, 2), BOTH, {'in_activation': 'silu'}),
  'eight, 1x1': ((8, 4, 5, 3), (1, 1, 3, 130), (), {}),
  'strides': (
    (5, 7, 6, 3),
    (3, 2, 3, 4),
    BOTH,
    {'in_activation': 'relu', 'strides': 2},
  ),
  'strides, 1x1': (
    (17, 5, 4, 3),
    (1, 1, 3, 4),
    ('in_shift',),
    {'strides': (2, 1)},
  ),
  'uneven padding': (
    (9, 4, 3, 130),
    (2, 2, 130, 3),
    ('in_scale',),
    {'padding': ((2, 0), (0, 1))},
  ),
  'activation alone': (
    (3, 4, 5, 128),
    (2, 1, 128, 3),
    (),
    {'in_activation': 'gelu', 'padding': 'VALID'},
  ),
  'one pixel': ((1, 1, 1, 4), (1, 1, 4, 3), BOTH, {'in_activation': 'silu'}),
}
ON_A_GPU = ('one image', 'five, 1x1', 'strides', 'uneven padding', 'twenty')


def _compiled(function):
  """The compiler's time is most of it: without optimisation."""
  return jax.jit(
    function, compiler_options={'xla_backend_optimization_level': 0}
  )


def _array(generator, shape, dtype, deviation=1.0, mean=0.0):
  values = mean + generator.normal(size=shape) * deviation
  return jax.device_put(values.astype(jnp.dtype(dtype)))


def _operands(case, dtype, seed=0):
  x, w, given, numbers = case
  generator = np.random.default_rng(seed)
  wide = 'float64' if dtype == 'float64' else 'float32'
  arrays = {
    'x': _array(generator, x, dtype),
    'w': _array(generator, w, dtype, np.prod(w[:3]) ** -0.5),
  }
  for name in given:
    # A shift that a border's zeros would show.
    arrays[name] = _array(generator, x[3:], wide, 0.5, 1)
  return arrays, numbers


def _run(arrays, implementation, **numbers):
  return _compiled(
    lambda arrays: stats.conv2d_stats(
      **arrays, implementation=implementation, **numbers
    )
  )(arrays)


def _check(case, implementation, dtype):
  arrays, numbers = _operands(case, dtype)
  y, total, squares = _run(arrays, implementation, **numbers)
  wanted = expected.conv2d_stats(**arrays, **numbers)
  assert y.dtype == dtype
  assert y.shape == wanted[0].shape
  wide = 'float64' if dtype == 'float64' else 'float32'
  assert total.dtype == squares.dtype == wide
  largest, half = max(1, np.abs(wanted[0]).max()), ROUNDING[dtype]
  exact = 1e-13 if dtype == 'float64' else 1e-5
  error = np.abs(expected.wide(y) - wanted[0])
  # What is loaded is rounded behind the prologue too.
  bound = exact * largest + half * (np.abs(wanted[0]) + 2 * largest)
  assert (error <= bound).all()
  # Of y as it is, the statistics are float32's.
  pixels = y.size // y.shape[-1]
  of_y = expected.statistics(y)
  bound = exact * pixels * largest
  np.testing.assert_allclose(total, of_y[0], atol=bound, rtol=0)
  np.testing.assert_allclose(squares, of_y[1], atol=bound * largest, rtol=0)
  if not half:
    np.testing.assert_allclose(total, wanted[1], atol=bound, rtol=0)
    np.testing.assert_allclose(squares, wanted[2], atol=bound * largest, rtol=0)


@pytest.mark.parametrize('name', CASES)
@pytest.mark.parametrize('implementation', ['xla', 'pallas_tpu_interpret'])
def test_outputs_and_statistics_are_float64s(implementation, name):
  _check(CASES[name], implementation, 'float32')


@pytest.mark.parametrize('name', CASES)
def test_float64_is_computed_in_float64(name):
  with jax.enable_x64(True):
    _check(CASES[name], 'xla', 'float64')


@pytest.mark.parametrize('name', ['five, 1x1', 'seventeen', 'twenty'])
def test_a_tpus_statistics_are_of_the_rounded_bfloat16(name):
  _check(CASES[name], 'pallas_tpu_interpret', 'bfloat16')


@NO_GPU
@pytest.mark.parametrize('name', ON_A_GPU)
def test_a_gpus_statistics_are_of_the_rounded_bfloat16(name):
  _check(CASES[name], 'pallas_gpu_interpret', 'bfloat16')


def test_groups_are_xlas():
  arrays, _ = _operands(((3, 4, 5, 4), (3, 3, 2, 6), BOTH, {}), 'float32')
  numbers = {'groups': 2, 'in_activation': 'relu'}
  found = _run(arrays, 'xla', **numbers)
  for one, wanted in zip(
    found, expected.conv2d_stats(**arrays, **numbers), strict=True
  ):
    np.testing.assert_allclose(one, wanted, rtol=1e-5, atol=1e-4)


# Of the sizes of shapes.py these are many blocks of rows, the last one shorter,
# and products in a loop.
@pytest.mark.parametrize('x', [(9, 13, 4, 3), (3, 13, 4, 3)])
@pytest.mark.parametrize('w', [(3, 2, 3, 5), (1, 1, 3, 5)])
def test_statistics_of_many_blocks_are_put_together(x, w, monkeypatch):
  monkeypatch.setattr(shapes, 'TPU_BLOCK', 5 * 8 * 4 * 128)
  monkeypatch.setattr(shapes, 'TPU_ELEMENTS', 2 * 8 * 4 * 128)
  case = x, w, BOTH, {'in_activation': 'relu'}
  _check(case, 'pallas_tpu_interpret', 'float32')


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_the_border_is_zero_behind_the_prologue(implementation):
  # Each output counts the places of the image that it sees, which are 5.
  dtype = 'bfloat16' if 'gpu' in implementation else 'float32'
  x = jnp.zeros((2, 3, 3, 1), dtype)
  arrays = {
    'x': x,
    'w': jnp.ones((2, 2, 1, 1), dtype),
    'in_shift': jnp.full(1, 5, jnp.float32),
  }
  y, total, squares = _run(
    arrays, implementation, padding=((1, 1), (1, 1)), in_activation='relu'
  )
  once = np.array([1, 2, 2, 1])
  wanted = 5 * np.stack([np.outer(once, once)] * 2)
  np.testing.assert_array_equal(expected.wide(y)[..., 0], wanted)
  np.testing.assert_array_equal(total, [wanted.sum()])
  deviations = np.square(wanted - wanted.mean()).sum()
  np.testing.assert_allclose(squares, [deviations], rtol=1e-6)


@pytest.mark.parametrize('batch', [1, 5, 17, 20])
@pytest.mark.parametrize('by', ['channel', 'in_shift'])
@pytest.mark.parametrize('implementation', ['xla', 'pallas_tpu_interpret'])
def test_a_mean_of_a_thousand_deviations_leaves_the_variance(
  implementation, by, batch
):
  generator = np.random.default_rng(0)
  x = np.array(_array(generator, (batch, 6, 5, 3), 'float32'))
  w = np.zeros((1, 1, 3, 4), np.float32)
  w[0, 0, :2] = generator.normal(size=(2, 4))
  w[0, 0, 2] = 1000 * np.linalg.norm(w[0, 0, :2], axis=0)
  arrays = {'x': x, 'w': w}
  if by == 'channel':
    x[..., 2] = 1
  else:
    x[..., 2] = 0
    arrays['in_shift'] = np.array([0, 0, 1], np.float32)
  _, total, squares = _run(arrays, implementation)
  y, *wanted = expected.conv2d_stats(**arrays)
  deviation = np.sqrt(wanted[1] / (y.size // 4))
  assert (np.abs(y.mean((0, 1, 2))) > 600 * deviation).all()
  np.testing.assert_allclose(total, wanted[0], rtol=1e-6)
  np.testing.assert_allclose(squares, wanted[1], rtol=1e-3)


@NO_GPU
@pytest.mark.parametrize('batch', [1, 5, 17, 20])
def test_so_it_does_on_a_gpu_where_float16_has_the_numbers(batch):
  # The kernel refuses float32, and bfloat16 has only 8 bits. Float16 has 1024,
  # 1025 and 1026, and so the result is not rounded.
  generator = np.random.default_rng(0)
  x = generator.integers(0, 3, (batch, 6, 5, 2)).astype(np.float16)
  x[..., 1] = 1
  w = np.array([1, 1024], np.float16)[None, None, :, None]
  arrays = {'x': x, 'w': w}
  _, total, squares = _run(arrays, 'pallas_gpu_interpret')
  _, *wanted = expected.conv2d_stats(**arrays)
  np.testing.assert_allclose(total, wanted[0], rtol=1e-6)
  np.testing.assert_allclose(squares, wanted[1], rtol=1e-3)


GENERATOR = np.random.default_rng(3)
# Two convolutions and the norm between them; then something of all results.
CHAIN = {
  'x': GENERATOR.normal(size=(5, 5, 4, 3)),
  'first': GENERATOR.normal(size=(2, 2, 3, 4)) / 3,
  'second': GENERATOR.normal(size=(1, 1, 4, 5)) / 2,
  'gain': GENERATOR.normal(size=4),
  'offset': GENERATOR.normal(size=4),
}
WEIGHTS = GENERATOR.normal(size=(5, 5, 4, 5))
OF_SUMS, OF_SQUARES = GENERATOR.normal(size=(2, 5)) / 100


def _loss(y, total, squares):
  return (
    (y * WEIGHTS.astype(y.dtype)).sum()
    + (total * OF_SUMS.astype(total.dtype)).sum()
    + (squares * OF_SQUARES.astype(squares.dtype)).sum()
  )


def _chained(parts, implementation):
  y, total, squares = stats.conv2d_stats(
    parts['x'], parts['first'], implementation=implementation
  )
  pixels = y.size // y.shape[-1]
  mean = total / pixels
  scale = parts['gain'] * jax.lax.rsqrt(squares / pixels + 1e-3)
  y, total, squares = stats.conv2d_stats(
    y,
    parts['second'],
    in_scale=scale,
    in_shift=parts['offset'] - mean * scale,
    in_activation='relu',
    implementation=implementation,
  )
  wide = [one.astype(total.dtype) for one in (y, total, squares)]
  return _loss(*wide)


def _written_out(parts):
  def conv(x, w):
    return jax.lax.conv_general_dilated(
      x, w, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )

  y = conv(parts['x'], parts['first'])
  y = (y - y.mean((0, 1, 2))) / jnp.sqrt(y.var((0, 1, 2)) + 1e-3)
  y = conv(jnp.maximum(y * parts['gain'] + parts['offset'], 0), parts['second'])
  apart = jnp.square(y - y.mean((0, 1, 2)))
  return _loss(y, y.sum((0, 1, 2)), apart.sum((0, 1, 2)))


@pytest.fixture(scope='module')
def chain():
  """The chain's loss and gradients as jax has them, in float64."""
  with jax.enable_x64(True):
    parts = jax.tree.map(jnp.asarray, CHAIN)
    found = _compiled(jax.value_and_grad(_written_out))(parts)
    return jax.tree.map(np.asarray, found)


@pytest.mark.parametrize(
  ('implementation', 'dtype', 'tolerance'),
  [
    ('xla', 'float64', 1e-12),
    ('xla', 'float32', 1e-5),
    ('pallas_tpu_interpret', 'float32', 1e-5),
    pytest.param('pallas_gpu_interpret', 'bfloat16', 0.03, marks=NO_GPU),
  ],
)
def test_gradients_through_a_norm_are_float64s(
  chain, implementation, dtype, tolerance
):
  wide = 'float64' if dtype == 'float64' else 'float32'
  with jax.enable_x64(dtype == 'float64'):
    parts = {
      name: jnp.asarray(
        value.astype(jnp.dtype(wide if name in ('gain', 'offset') else dtype))
      )
      for name, value in CHAIN.items()
    }
    value, grads = _compiled(
      jax.value_and_grad(
        functools.partial(_chained, implementation=implementation)
      )
    )(parts)
  wanted, wanted_grads = chain
  largest = np.abs(WEIGHTS).sum() if 'gpu' in implementation else 1
  assert abs(float(value) - wanted) <= tolerance * max(largest, abs(wanted))
  for name, grad in grads.items():
    assert grad.dtype == parts[name].dtype
    other = wanted_grads[name]
    error = expected.wide(grad) - other
    if 'gpu' in implementation:
      # Where relu bends, rounding decides: not each, but all together.
      assert np.linalg.norm(error) <= tolerance * np.linalg.norm(other), name
    else:
      bound = tolerance * max(1, np.abs(other).max())
      assert np.abs(error).max() <= bound, name


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_a_nan_is_in_its_image_and_in_the_statistics(implementation):
  dtype = 'bfloat16' if 'gpu' in implementation else 'float32'
  arrays, _ = _operands(((9, 4, 4, 3), (2, 2, 3, 4), BOTH, {}), dtype)
  clean, *_ = _run(arrays, implementation, in_activation='relu')
  arrays['x'] = arrays['x'].at[3, 1, 2, 0].set(np.nan)
  y, total, squares = _run(arrays, implementation, in_activation='relu')
  others = np.arange(9) != 3
  y, clean = expected.wide(y), expected.wide(clean)
  np.testing.assert_array_equal(y[others], clean[others])
  assert np.isnan(y[3, 1, 2]).all()
  assert np.isnan(total).all()
  assert np.isnan(squares).all()


@pytest.mark.parametrize('implementation', [None, *IMPLEMENTATIONS])
@pytest.mark.parametrize(
  ('x', 'w'), [((0, 5, 4, 3), (3, 3, 3, 2)), ((2, 5, 4, 3), (3, 3, 3, 0))]
)
def test_of_nothing_there_are_no_statistics(implementation, x, w):
  with pytest.raises(ValueError, match='conv2d_stats: x .* leave nothing to'):
    stats.conv2d_stats(
      jnp.zeros(x, 'bfloat16'),
      jnp.zeros(w, 'bfloat16'),
      implementation=implementation,
    )


def test_none_is_xla_until_something_was_measured():
  (choice,) = dispatch.explain(
    stats.conv2d_stats, jnp.zeros((2, 4, 4, 3)), jnp.zeros((3, 3, 3, 5))
  )
  assert choice.op == 'conv2d_stats'
  assert choice.implementation == 'xla'


X, W = np.zeros((2, 5, 4, 3), np.float32), np.zeros((3, 3, 3, 6), np.float32)
ERRORS = {
  'integers': (TypeError, 'x is int32', {'x': X.astype(int)}),
  'another dtype': (
    TypeError,
    'w is bfloat16 and x float32',
    {'w': jnp.zeros(W.shape, jnp.bfloat16)},
  ),
  'channels': (
    ValueError,
    r'x \(2, 5, 4, 3\) has 3 channels, and w \(3, 3, 2, 6\).*takes 2',
    {'w': W[:, :, :2]},
  ),
  'in_scale of features': (
    ValueError,
    r'in_scale \(6,\) does not broadcast to \(3,\)',
    {'in_scale': np.ones(6, np.float32)},
  ),
  'in_shift of an image': (
    ValueError,
    r'in_shift \(2, 1, 1, 3\) does not broadcast to \(3,\)',
    {'in_shift': np.ones((2, 1, 1, 3), np.float32)},
  ),
  'in_shift of integers': (
    TypeError,
    'in_shift is int32',
    {'in_shift': np.ones(3, int)},
  ),
  'activation': (
    ValueError,
    "in_activation is 'tanh'; there are None, relu",
    {'in_activation': 'tanh'},
  ),
  'padding': (ValueError, "padding is 'same'", {'padding': 'same'}),
  'strides': (ValueError, 'strides is 0', {'strides': 0}),
  'a small image': (
    ValueError,
    r'w \(3, 3, 3, 6\) takes 3x3 pixels; x \(2, 2, 4, 3\)',
    {'x': X[:, :2], 'padding': 'VALID'},
  ),
  'groups on a TPU': (
    ValueError,
    'pallas_tpu cannot.*groups is 3',
    {'w': W[:, :, :1], 'groups': 3, 'implementation': 'pallas_tpu'},
  ),
  'float32 on a GPU': (
    ValueError,
    'pallas_gpu cannot.*float32',
    {'implementation': 'pallas_gpu'},
  ),
}


@pytest.mark.parametrize('case', ERRORS)
def test_what_does_not_fit_is_refused(case):
  error, words, arguments = ERRORS[case]
  with pytest.raises(error, match=f'^conv2d_stats: .*{words}'):
    stats.conv2d_stats(**{'x': X, 'w': W} | arguments)


@pytest.mark.parametrize('strides', [1, 2])
@pytest.mark.parametrize('taps', [1, 3])
@pytest.mark.parametrize('platform', ['tpu', 'cuda'])
def test_both_ways_lower_with_no_hardware(platform, taps, strides):
  implementation = 'pallas_gpu' if platform == 'cuda' else 'pallas_tpu'
  operands = (
    jax.ShapeDtypeStruct((8, 14, 14, 64), jnp.bfloat16),
    jax.ShapeDtypeStruct((taps, taps, 64, 128), jnp.bfloat16),
    *[jax.ShapeDtypeStruct((64,), jnp.float32)] * 2,
  )

  def function(x, w, in_scale, in_shift, implementation=implementation):
    return stats.conv2d_stats(
      x,
      w,
      in_scale=in_scale,
      in_shift=in_shift,
      in_activation='relu',
      strides=strides,
      implementation=implementation,
    )

  def both(grads, *operands):
    results, pull = jax.vjp(function, *operands)
    return results, pull(grads)

  results = jax.eval_shape(
    functools.partial(function, implementation='xla'), *operands
  )
  # The gradient by x is the kernel's where strides are 1.
  calls = lowered_calls(platform, both, results, *operands)
  assert calls == (2 if strides == 1 else 1)
