"""conv2d against NumPy in float64, on every implementation."""

import functools
import random
import sys

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import dispatch
from kernels.ops.convolution import api
from kernels.ops.convolution import shapes
from tests.kernels import numpy_convolution as expected

NO_GPU = pytest.mark.skipif(
  not hasattr(plgpu, 'InterpretGPUParams'),
  reason='jax interprets Mosaic GPU from 0.11 on',
)
GPU = pytest.param('pallas_gpu_interpret', marks=NO_GPU)
IMPLEMENTATIONS = ['xla', 'pallas_tpu_interpret', GPU]
ACTIVATIONS = (None, 'relu', 'gelu', 'silu')
# Half the distance between neighbours, relative to the number.
ROUNDING = {'float32': 0, 'float64': 0, 'bfloat16': 2.0**-8}
# Of the largest result, or of 1: operands are drawn so that it is about 1.
EXACT = {'float32': 1e-5, 'float64': 1e-13, 'bfloat16': 1e-5}


def _draw(seed, dtype, kernel=False):
  """A case: what conv2d takes, by name; with `kernel` what all kernels take."""
  pick = random.Random(f'{seed} {kernel}')
  taps = pick.randint(1, 5), pick.randint(1, 5)
  if pick.random() < 0.35:
    taps = pick.choice([(1, 1), (3, 3), (2, 2)])
  strides = pick.choice([(1, 1), (1, 1), (2, 2), (1, 2), (2, 1), (3, 2)])
  plain = kernel or pick.random() < 0.6
  dilation = (1, 1) if plain else pick.choice([(2, 2), (1, 2), (3, 1), (1, 1)])
  groups = 1 if plain else pick.choice([1, 2, 3, 5])
  reach = [
    (tap - 1) * apart + 1 for tap, apart in zip(taps, dilation, strict=True)
  ]
  padding = pick.choice(['SAME', 'VALID', 'explicit', 'uneven', 'beyond'])
  if padding == 'explicit':
    padding = ((reach[0] // 2,) * 2, (reach[1] // 2,) * 2)
  elif padding == 'uneven':
    padding = tuple((pick.randint(0, r), pick.randint(0, r)) for r in reach)
  elif padding == 'beyond':
    # Some outputs see nothing of the image.
    padding = tuple((pick.randint(0, r + 1), r + 1) for r in reach)
  size = [pick.randint(1, 9), pick.randint(1, 9)]
  if padding == 'VALID':
    size = [max(one, r) for one, r in zip(size, reach, strict=True)]
  elif not isinstance(padding, str):
    size = [
      max(one, r - sum(pad))
      for one, r, pad in zip(size, reach, padding, strict=True)
    ]
  channels = pick.choice([1, 2, 3, 5, 8, 17, 64, 127, 128, 130])
  features = pick.choice([1, 2, 3, 7, 16, 65, 128, 129])
  channels, features = max(channels // groups, 1), max(features // groups, 1)
  case = {
    'x': (pick.choice([1, 1, 2, 3, 4, 5, 9, 17]), *size, channels * groups),
    'w': (*taps, channels, features * groups),
    'strides': strides,
    'padding': padding,
    'activation': pick.choice(ACTIVATIONS),
    'dtype': dtype,
    'given': [n for n in ('scale', 'shift', 'residual') if pick.random() < 0.5],
  }
  return case | ({} if kernel else {'dilation': dilation, 'groups': groups})


def _numbers(case):
  names = ('strides', 'padding', 'dilation', 'groups')
  return {name: case[name] for name in names if name in case}


def _products(case):
  """About how many there are in the TPU kernel, which compiles each."""
  around = expected.pads(
    case['padding'], case['x'][1:3], case['w'][:2], case['strides']
  )
  total = 1
  for size, taps, stride, (low, high) in zip(
    case['x'][1:3], case['w'][:2], case['strides'], around, strict=True
  ):
    met = {
      tuple(k for k in range(taps) if 0 <= first + k < size)
      for first in range(-low, size + high - taps + 1, stride)
    }
    total *= sum(map(len, met)) + 1
  return total


def _steps(case):
  """About how many the GPU's kernel makes, each of which is interpreted."""
  sizes = expected.output_shape(case['x'], case['w'], **_numbers(case))
  *taps, channels, features = case['w']
  tiles = -(-np.prod(sizes[:3]) // 256) * -(-features // 128)
  return np.prod(taps) * -(-channels // 64) * tiles


def _name(case):
  sizes = ['x'.join(map(str, case[name])) for name in 'xw']
  words = [*sizes, 's{}{}'.format(*case['strides'])]
  padding = case['padding']
  words.append(padding if isinstance(padding, str) else 'p' + str(padding))
  if case.get('groups', 1) > 1:
    words.append(f'g{case["groups"]}')
  if case.get('dilation', (1, 1)) != (1, 1):
    words.append('d{}{}'.format(*case['dilation']))
  words += [case['activation'] or 'linear', *case['given'], case['dtype']]
  return ' '.join(words).replace(', ', ',')


def _drawn(
  count, fits, dtype='float32', kernel=True, start=0, short=sys.maxsize
):
  """Cases that fit; of what all kernels take with `kernel`.

  Those after the first `short` are long.
  """
  found, seed = [], start
  while len(found) < count:
    case = _draw(seed, dtype, kernel)
    seed += 1
    if fits(case):
      marks = pytest.mark.long if len(found) >= short else ()
      found.append(pytest.param(case, id=_name(case), marks=marks))
  return found


XLAS = _drawn(240, lambda case: True, kernel=False, short=60)
XLAS_WIDE = _drawn(24, lambda case: True, 'float64', kernel=False, start=1000)
# Most with few borders; some with all.
TPUS = _drawn(44, lambda case: _products(case) <= 9, short=20)
TPUS += _drawn(4, lambda case: 9 < _products(case) <= 50, start=500)
TPUS_NARROW = _drawn(
  10, lambda case: _products(case) <= 9, 'bfloat16', start=700
)
GPUS = _drawn(12, lambda case: _steps(case) <= 12, 'bfloat16', start=900)


def _normal(generator, shape, dtype, deviation=1.0):
  # In NumPy, as jax would compile a program for each new shape.
  values = generator.normal(size=shape) * deviation
  return jax.device_put(values.astype(jnp.dtype(dtype)))


def _operands(case, seed=0):
  """x, w and the epilogue's arrays, such that the outputs are about 1."""
  generator = np.random.default_rng(seed)
  dtype, w = case['dtype'], case['w']
  wide = 'float64' if dtype == 'float64' else 'float32'
  sizes = expected.output_shape(case['x'], w, **_numbers(case))
  arrays = {
    'x': _normal(generator, case['x'], dtype),
    'w': _normal(generator, w, dtype, np.prod(w[:3]) ** -0.5),
  }
  for name in case['given']:
    residual = name == 'residual'
    arrays[name] = _normal(
      generator, sizes if residual else w[3:], dtype if residual else wide
    )
  return arrays


def _compiled(function):
  """The compiler's time is most of it: without optimisation."""
  return jax.jit(
    function, compiler_options={'xla_backend_optimization_level': 0}
  )


def _run(case, arrays, implementation):
  function = functools.partial(
    api.conv2d,
    implementation=implementation,
    activation=case['activation'],
    **_numbers(case),
  )
  return _compiled(lambda arrays: function(**arrays))(arrays)


def _check(case, implementation):
  arrays = _operands(case)
  y = _run(case, arrays, implementation)
  wanted = expected.conv2d(
    **arrays, activation=case['activation'], **_numbers(case)
  )
  assert y.dtype == case['dtype']
  assert y.shape == wanted.shape
  dtype = case['dtype']
  bound = EXACT[dtype] * max(1, np.abs(wanted).max())
  bound = bound + ROUNDING[dtype] * np.abs(wanted)
  assert (np.abs(expected.wide(y) - wanted) <= bound).all()


@pytest.mark.slow
@pytest.mark.parametrize('case', XLAS)
def test_xla_is_float64s(case):
  _check(case, 'xla')


@pytest.mark.parametrize('case', XLAS_WIDE)
def test_float64_is_computed_in_float64(case):
  with jax.enable_x64(True):
    _check(case, 'xla')


@pytest.mark.slow
@pytest.mark.parametrize('case', TPUS)
def test_the_tpu_kernel_is_float64s(case):
  _check(case, 'pallas_tpu_interpret')


@pytest.mark.parametrize('case', TPUS_NARROW)
def test_the_tpu_kernel_rounds_to_bfloat16_once(case):
  _check(case, 'pallas_tpu_interpret')


@NO_GPU
@pytest.mark.parametrize('case', GPUS)
def test_the_gpu_kernel_rounds_to_bfloat16_once(case):
  _check(case, 'pallas_gpu_interpret')


def _case(x, w, given=(), dtype='float32', **numbers):
  plain = {'strides': (1, 1), 'padding': 'SAME', 'activation': None}
  return {'x': x, 'w': w, 'given': given, 'dtype': dtype} | plain | numbers


ALL = ('scale', 'shift', 'residual')
# Of the sizes of shapes.py these are many blocks, and products in a loop.
BLOCKS = {
  'rows': _case((9, 13, 4, 3), (3, 3, 3, 5), ALL, activation='gelu'),
  'strides': _case((9, 25, 6, 2), (3, 2, 2, 5), ALL, strides=(2, 2)),
  'pixels': _case((3, 9, 7, 5), (1, 1, 5, 4), ALL, activation='silu'),
  'none seen': _case((1, 9, 3, 2), (2, 1, 2, 3), padding=((4, 4), (0, 0))),
}


@pytest.mark.parametrize('name', BLOCKS)
def test_a_tpu_kernel_of_many_blocks_is_float64s(name, monkeypatch):
  monkeypatch.setattr(shapes, 'TPU_BLOCK', 5 * 8 * 4 * 128)
  monkeypatch.setattr(shapes, 'TPU_ELEMENTS', 2 * 8 * 4 * 128)
  _check(BLOCKS[name], 'pallas_tpu_interpret')


GRADIENTS = {
  'all, relu': _case((3, 5, 4, 3), (3, 3, 3, 4), ALL, activation='relu'),
  'all, silu': _case((2, 4, 5, 2), (2, 2, 2, 3), ALL, activation='silu'),
  'all, gelu, 1x1': _case((5, 3, 4, 7), (1, 1, 7, 6), ALL, activation='gelu'),
  'strides': _case(
    (2, 7, 6, 3), (3, 2, 3, 4), ALL, strides=(2, 2), activation='relu'
  ),
  'uneven strides, 1x1': _case(
    (9, 5, 4, 3), (1, 1, 3, 2), ALL, strides=(2, 1), activation='gelu'
  ),
  'uneven padding': _case(
    (1, 4, 5, 2), (3, 2, 2, 3), ('shift',), padding=((2, 0), (0, 1))
  ),
  # Then the other way round there would be less than none.
  'padding beyond': _case(
    (2, 3, 3, 2), (2, 2, 2, 3), ('scale',), padding=((2, 3), (0, 2))
  ),
  'nothing else': _case((2, 4, 4, 130), (3, 1, 130, 3), padding='VALID'),
}
ON_A_GPU = ('all, relu', 'uneven strides, 1x1')


def _check_gradients(case, implementation, tolerance):
  arrays = _operands(case)
  if 'scale' in arrays:
    arrays['scale'] = arrays['scale'].at[0].set(0)
  generator = np.random.default_rng(1)

  def both(arrays, y_grad):
    function = functools.partial(
      api.conv2d,
      implementation=implementation,
      activation=case['activation'],
      **_numbers(case),
    )
    return jax.vjp(lambda arrays: function(**arrays), arrays)[1](y_grad)[0]

  settings = {'activation': case['activation'], **_numbers(case)}
  shape = expected.output_shape(case['x'], case['w'], **_numbers(case))
  y_grad = _normal(generator, shape, case['dtype'])
  found = _compiled(both)(arrays, y_grad)
  wanted = expected.conv2d_gradients(grad=y_grad, **arrays, **settings)
  assert found.keys() == wanted.keys()
  for name, value in wanted.items():
    assert found[name].dtype == arrays[name].dtype, name
    error = np.abs(expected.wide(found[name]) - value).max()
    assert error <= tolerance * max(1, np.abs(value).max()), name


@pytest.mark.parametrize('name', GRADIENTS)
@pytest.mark.parametrize('implementation', ['xla', 'pallas_tpu_interpret'])
def test_gradients_are_the_adjoints_in_float64(implementation, name):
  _check_gradients(GRADIENTS[name], implementation, 1e-5)


def test_gradients_in_float64_with_groups_and_dilation():
  case = _case(
    (2, 7, 6, 4), (3, 2, 2, 6), ALL, 'float64', strides=(2, 1), groups=2,
    dilation=(1, 2), activation='gelu',
  )  # fmt: skip
  with jax.enable_x64(True):
    _check_gradients(case, 'xla', 1e-13)


@NO_GPU
@pytest.mark.parametrize('name', ON_A_GPU)
def test_gradients_by_the_gpu_kernel_are_bfloat16s(name):
  # The output, the gradient by it, and each result are rounded.
  case = GRADIENTS[name] | {'dtype': 'bfloat16'}
  _check_gradients(case, 'pallas_gpu_interpret', 4 * ROUNDING['bfloat16'])


@pytest.mark.parametrize('implementation', ['xla', 'pallas_tpu_interpret'])
def test_what_is_broadcast_has_its_gradient_summed(implementation):
  generator = np.random.default_rng(0)
  x, w = (
    _normal(generator, s, 'float32') for s in ((3, 4, 3, 2), (1, 1, 2, 5))
  )
  sizes = {'scale': (), 'shift': (1,), 'residual': (3, 1, 1, 5)}
  more = {n: _normal(generator, s, 'float32') for n, s in sizes.items()}
  y_grad = _normal(generator, (3, 4, 3, 5), 'float32')

  def both(more, y_grad):
    y, pull = jax.vjp(
      lambda more: api.conv2d(
        x, w, **more, activation='relu', implementation=implementation
      ),
      more,
    )
    return y, pull(y_grad)[0]

  y, grads = _compiled(both)(more, y_grad)
  np.testing.assert_allclose(
    y, expected.conv2d(x, w, **more, activation='relu'), atol=1e-5
  )
  wanted = expected.conv2d_gradients(x, w, y_grad, **more, activation='relu')
  for name, grad in grads.items():
    assert grad.shape == sizes[name]
    np.testing.assert_allclose(grad, wanted[name], rtol=1e-5, atol=1e-5)


# The course's examples, whose small integers bfloat16 has too: the GPU's kernel
# refuses float32, which the tensor cores would round.
DTYPES = {
  'xla': 'float32',
  'pallas_tpu_interpret': 'float32',
  'pallas_gpu_interpret': 'bfloat16',
}


def _one_channel(image, kernel, implementation, **kwargs):
  """An image [H, W] with a kernel [I, J], in float64."""
  dtype = DTYPES[implementation]
  x = jnp.asarray(np.array(image)[None, :, :, None], dtype)
  w = jnp.asarray(np.array(kernel)[:, :, None, None], dtype)
  y = _compiled(
    lambda x, w: api.conv2d(x, w, implementation=implementation, **kwargs)
  )(x, w)
  return expected.wide(y)[0, :, :, 0]


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
@pytest.mark.parametrize(
  ('numbers', 'result'),
  [
    ({'padding': 'VALID'}, [[19, 25], [37, 43]]),
    (
      {'padding': ((1, 1), (1, 1))},
      [[0, 3, 8, 4], [9, 19, 25, 10], [21, 37, 43, 16], [6, 7, 8, 0]],
    ),
    ({'padding': ((1, 1), (1, 1)), 'strides': (3, 2)}, [[0, 8], [6, 8]]),
  ],
)
def test_the_courses_image(implementation, numbers, result):
  image, kernel = np.arange(9).reshape(3, 3), [[0, 1], [2, 3]]
  y = _one_channel(image, kernel, implementation, **numbers)
  np.testing.assert_array_equal(y, result)


LAPLACIAN = [[0, 1, 0], [1, -4, 1], [0, 1, 0]]
EDGE = [[-1, -1, -1], [-1, 8, -1], [-1, -1, -1]]
SHARPEN = [[0, -1, 0], [-1, 5, -1], [0, -1, 0]]


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_what_the_courses_filters_leave_of_constants_and_of_ramps(
  implementation,
):
  constant = np.full((5, 6), 7)
  ramp = 3 * np.arange(5)[:, None] + 2 * np.arange(6) - 4
  filtered = functools.partial(
    _one_channel, implementation=implementation, padding='VALID'
  )
  zeros, sevens = np.zeros((3, 4)), constant[1:-1, 1:-1]
  np.testing.assert_array_equal(filtered(constant, LAPLACIAN), zeros)
  np.testing.assert_array_equal(filtered(ramp, LAPLACIAN), zeros)
  np.testing.assert_array_equal(filtered(constant, EDGE), zeros)
  np.testing.assert_array_equal(filtered(constant, SHARPEN), sevens)
  # A ninth is rounded, by the GPU's to 8 bits, and so is the sum.
  half = 2**-8 if 'gpu' in implementation else 2**-22
  blurred = filtered(constant, np.full((3, 3), 1 / 9))
  np.testing.assert_allclose(blurred, sevens, rtol=2 * half)


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_a_moving_average_is_a_convolution_of_one_row(implementation):
  series = np.random.default_rng(0).integers(-9, 10, 60)
  sums = np.cumsum(np.append(0, series))
  sums = sums[10:] - sums[:-10]
  filtered = functools.partial(
    _one_channel, series[None], implementation=implementation, padding='VALID'
  )
  # Up to 90: 8 bits are enough.
  np.testing.assert_array_equal(filtered(np.ones((1, 10)))[0], sums)
  if 'gpu' not in implementation:
    average = filtered(np.full((1, 10), 0.1))[0]
    np.testing.assert_allclose(average, sums / 10, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
@pytest.mark.parametrize('spoilt', [np.nan, np.inf])
def test_a_nan_stays_in_its_image(implementation, spoilt):
  dtype = DTYPES[implementation]
  case = _case((9, 4, 4, 3), (3, 3, 3, 5), ALL, dtype, activation='relu')
  if 'gpu' not in implementation:
    case |= {'w': (2, 2, 3, 5)}
  arrays = _operands(case)
  clean = _run(case, arrays, implementation)
  arrays['x'] = arrays['x'].at[3, 1, 2, 0].set(spoilt)
  y = np.asarray(_run(case, arrays, implementation).astype('float32'))
  others = np.arange(9) != 3
  np.testing.assert_array_equal(
    y[others], np.asarray(clean.astype('float32'))[others]
  )
  with np.errstate(invalid='ignore'):
    wanted = expected.conv2d(**arrays, activation='relu')
  # Not where a border's zero would meet an infinity: there is none.
  np.testing.assert_array_equal(np.isfinite(y), np.isfinite(wanted))
  assert not np.isfinite(y[3]).all()
  # Outputs that do not see that pixel.
  assert np.isfinite(y[3, 3]).all()


NOTHING = [
  ((0, 5, 4, 3), (3, 3, 3, 2), (0, 5, 4, 2)),
  ((2, 5, 4, 3), (3, 3, 3, 0), (2, 5, 4, 0)),
]


@pytest.mark.parametrize('implementation', [None, *IMPLEMENTATIONS])
@pytest.mark.parametrize(('x', 'w', 'y'), NOTHING)
def test_nothing_comes_of_nothing(implementation, x, w, y):
  dtype = DTYPES.get(implementation, 'bfloat16')
  found = api.conv2d(
    jnp.ones(x, dtype),
    jnp.ones(w, dtype),
    activation='gelu',
    implementation=implementation,
  )
  assert found.shape == y
  assert found.dtype == dtype


@pytest.mark.parametrize('implementation', [None, *IMPLEMENTATIONS])
@pytest.mark.parametrize(('x', 'w', 'y'), NOTHING)
def test_the_gradients_of_nothing_are_zeros(implementation, x, w, y):
  dtype = DTYPES.get(implementation, 'bfloat16')
  operands = jnp.ones(x, dtype), jnp.ones(w, dtype)
  _, pull = jax.vjp(
    functools.partial(api.conv2d, implementation=implementation), *operands
  )
  for grad, one in zip(pull(jnp.ones(y, dtype)), operands, strict=True):
    assert grad.shape == one.shape
    assert not grad.any()


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
@pytest.mark.parametrize('dtype', ['float16', 'bfloat16', 'float32'])
def test_the_result_is_of_xs_dtype(implementation, dtype):
  x, w = jnp.ones((2, 3, 3, 2), dtype), jnp.ones((1, 1, 2, 3), dtype)
  call = functools.partial(
    api.conv2d,
    x,
    w,
    scale=np.ones(3, np.float32),
    residual=np.ones((2, 3, 3, 3), np.float32),
    implementation=implementation,
  )
  refused = {('pallas_tpu', 'float16'), ('pallas_gpu', 'float32')}
  if (implementation[:10], dtype) in refused:
    with pytest.raises(ValueError, match=f'{implementation} cannot.*{dtype}'):
      call()
    return
  y = call()
  assert y.dtype == dtype
  assert (y == 3).all()


def test_none_is_xla_until_something_was_measured():
  (choice,) = dispatch.explain(
    api.conv2d, jnp.zeros((2, 4, 4, 3)), jnp.zeros((3, 3, 3, 5))
  )
  assert choice.op == 'conv2d'
  assert choice.implementation == 'xla'


def test_it_runs_under_every_transformation():
  arrays = _operands(_case((4, 3, 3, 2), (1, 1, 2, 3), ALL))
  twice = jax.tree.map(lambda one: jnp.stack([one, 2 * one]), arrays)

  def loss(arrays, implementation='pallas_tpu_interpret'):
    y = api.conv2d(**arrays, activation='silu', implementation=implementation)
    return jnp.sum(jnp.sin(y))

  wanted = jax.vmap(jax.grad(functools.partial(loss, implementation='xla')))(
    twice
  )
  one = jax.grad(loss)
  for name, function in {
    'vmap of jit': jax.vmap(jax.jit(one)),
    'remat': jax.vmap(jax.grad(jax.checkpoint(loss))),
    'scan': lambda twice: jax.lax.scan(lambda c, xs: (c, one(xs)), 0, twice)[1],
  }.items():
    jax.tree.map(
      functools.partial(
        np.testing.assert_allclose, rtol=1e-5, atol=1e-5, err_msg=name
      ),
      _compiled(function)(twice),
      wanted,
    )


X, W = np.zeros((2, 5, 4, 3), np.float32), np.zeros((3, 3, 3, 6), np.float32)
KNOWN = r"'SAME', 'VALID' or \(\(above, below\), \(left, right\)\)"
# name -> the error, its words, and arguments in place of X, W and nothing.
ERRORS = {
  'integers': (
    TypeError,
    'x is int32; it can be float16, bfloat16, float32, float64',
    {'x': X.astype(int)},
  ),
  'another dtype': (
    TypeError,
    'w is bfloat16 and x float32',
    {'w': jnp.zeros(W.shape, jnp.bfloat16)},
  ),
  'one image': (
    ValueError,
    r'x \(5, 4, 3\) is \[N, H, W, C\] and w \(3, 3, 3, 6\)',
    {'x': X[0]},
  ),
  'one axis': (
    ValueError,
    r'x \(2, 5, 4, 3\) .*w \(3, 3, 6\) \[I, J, C, F\]',
    {'w': W[0]},
  ),
  'channels': (
    ValueError,
    r'x \(2, 5, 4, 3\) has 3 channels, and w \(3, 3, 2, 6\) in 1 group takes 2',
    {'w': W[:, :, :2]},
  ),
  'groups of channels': (
    ValueError,
    'has 3 channels.*in 2 groups takes 6',
    {'groups': 2},
  ),
  'groups of features': (
    ValueError,
    r'w \(3, 3, 1, 4\) has 4 features, which 3 groups do not',
    {'w': W[:, :, :1, :4], 'groups': 3},
  ),
  'no groups': (ValueError, 'groups is 0; it takes 1', {'groups': 0}),
  'half a group': (TypeError, 'groups is 1.5', {'groups': 1.5}),
  'no places': (ValueError, r'w \(0, 3, 3, 6\) has no places', {'w': W[:0]}),
  'scale too long': (
    ValueError,
    r'scale \(7,\) does not broadcast to \(6,\)',
    {'scale': np.ones(7, np.float32)},
  ),
  'scale of images': (
    ValueError,
    r'scale \(2, 1, 1, 6\) does not broadcast to \(6,\)',
    {'scale': np.ones((2, 1, 1, 6), np.float32)},
  ),
  'shift too long': (
    ValueError,
    r'shift \(3,\) does not broadcast to \(6,\)',
    {'shift': np.ones(3, np.float32)},
  ),
  'shift of integers': (
    TypeError,
    'shift is int32',
    {'shift': np.ones(6, int)},
  ),
  'residual of x': (
    ValueError,
    r'residual \(2, 5, 4, 3\) does not broadcast to \(2, 5, 4, 6\)',
    {'residual': X},
  ),
  'residual too deep': (
    ValueError,
    r'residual \(1, 2, 5, 4, 6\) does not broadcast to \(2, 5, 4, 6\)',
    {'residual': np.zeros((1, 2, 5, 4, 6), np.float32)},
  ),
  'activation': (
    ValueError,
    "activation is 'tanh'; there are None, relu, gelu, silu",
    {'activation': 'tanh'},
  ),
  'padding in small': (
    ValueError,
    f"padding is 'same'; it is {KNOWN}",
    {'padding': 'same'},
  ),
  'padding below 0': (
    ValueError,
    rf'padding is \(\(-1, 1\), \(0, 0\)\); it is {KNOWN}',
    {'padding': ((-1, 1), (0, 0))},
  ),
  'padding of three': (
    ValueError,
    f'padding is .*; it is {KNOWN}',
    {'padding': ((0, 0),) * 3},
  ),
  'padding of one': (
    ValueError,
    f'padding is 1; it is {KNOWN}',
    {'padding': 1},
  ),
  'strides of 0': (ValueError, r'strides is 0', {'strides': 0}),
  'a stride of 0': (ValueError, r'strides is 0', {'strides': (1, 0)}),
  'three strides': (
    ValueError,
    r'strides is \(1, 1, 1\); it is one number or two',
    {'strides': (1, 1, 1)},
  ),
  'half a stride': (TypeError, 'strides is 0.5', {'strides': 0.5}),
  'no dilation': (ValueError, 'dilation is 0', {'dilation': 0}),
  'a small image': (
    ValueError,
    r'w \(3, 3, 3, 6\) takes 3x3 pixels; x \(2, 2, 4, 3\) with padding',
    {'x': X[:, :2], 'padding': 'VALID'},
  ),
  'far apart': (
    ValueError,
    r'takes 7x3 pixels; x \(2, 5, 4, 3\) with padding \(\(0, 1\)',
    {'dilation': (3, 1), 'padding': ((0, 1), (0, 0))},
  ),
  'unknown': (
    ValueError,
    "'cuda'; there are xla, pallas_tpu",
    {'implementation': 'cuda'},
  ),
  'groups on a TPU': (
    ValueError,
    'conv2d: pallas_tpu cannot run here: groups is 3',
    {'w': W[:, :, :1], 'groups': 3, 'implementation': 'pallas_tpu'},
  ),
  'groups on a GPU': (
    ValueError,
    'pallas_gpu cannot.*groups is 3, and the kernel has one',
    {'w': W[:, :, :1], 'groups': 3, 'implementation': 'pallas_gpu'},
  ),
  'dilation on a TPU': (
    ValueError,
    r'pallas_tpu cannot.*dilation is \(2, 1\), and the kernel has none',
    {'dilation': (2, 1), 'implementation': 'pallas_tpu'},
  ),
  'dilation on a GPU': (
    ValueError,
    r'pallas_gpu cannot.*dilation is \(2, 1\)',
    {'dilation': (2, 1), 'implementation': 'pallas_gpu'},
  ),
  'half on a TPU': (
    ValueError,
    'pallas_tpu cannot.*float16',
    {
      'x': X.astype(np.float16),
      'w': W.astype(np.float16),
      'implementation': 'pallas_tpu',
    },
  ),
  'float32 on a GPU': (
    ValueError,
    'pallas_gpu cannot.*float32 to 10 bits',
    {'implementation': 'pallas_gpu'},
  ),
  'images too large for a TPU': (
    ValueError,
    'pallas_tpu cannot.*600x600x3 and these weights need .*64',
    {
      'x': jax.ShapeDtypeStruct((1, 600, 600, 3), jnp.float32),
      'implementation': 'pallas_tpu',
    },
  ),
}


@pytest.mark.parametrize('case', ERRORS)
def test_what_does_not_fit_is_refused(case):
  error, words, arguments = ERRORS[case]
  arguments = {'x': X, 'w': W} | arguments
  if isinstance(arguments['x'], jax.ShapeDtypeStruct):
    x = arguments.pop('x')
    with pytest.raises(error, match=f'^conv2d: .*{words}'):
      jax.eval_shape(functools.partial(api.conv2d, **arguments), x)
    return
  start = '' if case == 'unknown' else '^conv2d: .*'
  with pytest.raises(error, match=start + words.removeprefix('conv2d: ')):
    api.conv2d(**arguments)


@pytest.mark.parametrize('implementation', ['pallas_tpu', 'pallas_gpu'])
def test_float64_is_for_xla(implementation):
  with jax.enable_x64(True):
    x, w = X.astype(np.float64), W.astype(np.float64)
    with pytest.raises(ValueError, match=f'{implementation}.*float64 is for'):
      api.conv2d(x, w, implementation=implementation)


@pytest.mark.skipif(
  hasattr(plgpu, 'InterpretGPUParams'), reason='this jax has it'
)
def test_an_old_jax_says_that_it_does_not_interpret_mosaic_gpu():
  x, w = jnp.zeros(X.shape, jnp.bfloat16), jnp.zeros(W.shape, jnp.bfloat16)
  with pytest.raises(ValueError, match='from 0.11 on'):
    api.conv2d(x, w, implementation='pallas_gpu_interpret')


def test_the_padding_and_strides_may_be_written_in_every_way():
  arrays = _operands(_case((2, 5, 4, 3), (3, 3, 3, 2)))
  y = api.conv2d(**arrays, strides=2, padding='SAME')
  for strides, padding in (
    ((2, 2), [[1, 1], [0, 1]]),
    ([2, 2], ((1, 1), (0, 1))),
    (np.int64(2), ([1, 1], (np.int64(0), 1))),
  ):
    found = api.conv2d(**arrays, strides=strides, padding=padding)
    np.testing.assert_array_equal(found, y)


def test_the_padding_may_be_an_array():
  arrays = _operands(_case((2, 5, 4, 3), (3, 3, 3, 2)))
  y = api.conv2d(**arrays, padding=np.array([[1, 1], [1, 1]]))
  np.testing.assert_array_equal(y, api.conv2d(**arrays, padding='SAME'))


# name -> the case, and how many kernels: the gradient by x is one where strides
# are 1.
LOWERED = {
  '3x3': (_case((8, 14, 14, 64), (3, 3, 64, 64), ALL, activation='relu'), 2),
  '3x3, gelu': (
    _case((8, 14, 14, 64), (3, 3, 64, 64), ('shift',), activation='gelu'),
    2,
  ),
  '1x1': (_case((8, 14, 14, 64), (1, 1, 64, 128)), 2),
  'strides': (_case((8, 14, 14, 64), (3, 3, 64, 64), ALL, strides=(2, 2)), 1),
}


@pytest.mark.parametrize('name', LOWERED)
@pytest.mark.parametrize('platform', ['tpu', 'cuda'])
def test_both_ways_lower_with_no_hardware(platform, name):
  case, calls = LOWERED[name]
  case = case | {'dtype': 'bfloat16'}
  gpu = platform == 'cuda'
  arrays = jax.eval_shape(lambda a: a, _operands(case))
  settings = {'activation': case['activation'], **_numbers(case)}
  y = jax.eval_shape(lambda a: api.conv2d(**a, **settings), arrays)

  def both(arrays, y_grad):
    y, pull = jax.vjp(
      lambda arrays: api.conv2d(
        **arrays,
        **settings,
        implementation='pallas_gpu' if gpu else 'pallas_tpu',
      ),
      arrays,
    )
    return y, pull(y_grad)

  assert lowered_calls(platform, both, arrays, y) == calls


def lowered_calls(platform, function, *operands):
  """The kernels' calls in a function that is lowered for that platform."""
  gpu = platform == 'cuda'
  device = jax.sharding.AbstractDevice(
    device_kind='NVIDIA H200' if gpu else 'TPU v5 lite',
    num_cores=132 if gpu else 1,
    platform=platform,
  )
  mesh = jax.sharding.AbstractMesh(
    (1,), ('data',), (jax.sharding.AxisType.Auto,), abstract_device=device
  )
  with jax.sharding.use_abstract_mesh(mesh):
    text = jax.export.export(
      jax.jit(function),
      platforms=[platform],
      disabled_checks=[
        jax.export.DisabledSafetyCheck.custom_call('mosaic_gpu_v2')
      ],
    )(*operands).mlir_module()
  call = 'custom_call @' + ('mosaic_gpu' if gpu else 'tpu_custom_call')
  return sum(call in line for line in text.splitlines())
