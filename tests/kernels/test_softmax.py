"""softmax and log_softmax against float64, on every implementation."""

import functools

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import dispatch
from kernels.ops.softmax import api
from kernels.ops.softmax import shapes

GPU = pytest.param(
  'pallas_gpu_interpret',
  marks=pytest.mark.skipif(
    not hasattr(plgpu, 'InterpretGPUParams'),
    reason='jax interprets Mosaic GPU from 0.11 on',
  ),
)
IMPLEMENTATIONS = ['xla', 'pallas_tpu_interpret', GPU]
FUNCTIONS = {'softmax': api.softmax, 'log_softmax': api.log_softmax}
# Half the distance between neighbours, relative to the number.
ROUNDING = {'float32': 0, 'bfloat16': 2.0**-8, 'float16': 2.0**-11}
SIZES = (1, 7, 127, 129, 1000, 50257)
# 8320 is more than one piece of a row, and no multiple of one.
GPU_SIZES = (128, 1024, 8320)


def _expected(x, seen=True, scale=1.0, log=False):
  """float64: the definition, over what is seen; zeros where there is none."""
  z = np.asarray(x, np.float64) * scale
  seen = np.broadcast_to(seen, z.shape)
  top = np.where(seen, z, -np.inf).max(-1, keepdims=True)
  z = z - np.where(np.isneginf(top), 0, top)
  total = np.where(seen, np.exp(z), 0).sum(-1, keepdims=True)
  total = np.where(total == 0, 1, total)
  if log:
    return np.where(seen, z - np.log(total), -np.inf)
  return np.where(seen, np.exp(z) / total, 0)


def _expected_gradient(y, y_grad, scale, log):
  """float64, from _expected's y."""
  g = np.asarray(y_grad, np.float64)
  if log:
    g = np.where(np.isneginf(y), 0, g)
    x_grad = scale * (g - np.exp(y) * g.sum(-1, keepdims=True))
    return np.where(np.isneginf(y), 0, x_grad)
  return scale * y * (g - (y * g).sum(-1, keepdims=True))


def _logits(shape, dtype='float32', spread=4.0, seed=0):
  values = np.random.default_rng(seed).normal(size=shape) * spread
  return jnp.asarray(values).astype(dtype)


def _wide(x):
  return np.asarray(x, np.float64)


def _sizes(implementation):
  return GPU_SIZES if 'gpu' in implementation else SIZES


def _columns(implementation):
  return 128 if 'gpu' in implementation else 7


@pytest.mark.parametrize('dtype', ROUNDING)
@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_outputs_and_gradients_are_float64s_to_the_last_bit_or_so(
  implementation, dtype
):
  half = ROUNDING[dtype]
  for columns in _sizes(implementation):
    rows = 3 if 'gpu' in implementation else 9
    x = _logits((rows, columns), dtype)
    y_grad = _logits((rows, columns), dtype, spread=1, seed=1)
    for name, function in FUNCTIONS.items():
      y, pull = jax.vjp(
        functools.partial(function, scale=-0.7, implementation=implementation),
        x,
      )
      (x_grad,) = pull(y_grad)
      log = name == 'log_softmax'
      expected = _expected(x, scale=-0.7, log=log)
      assert y.dtype == x_grad.dtype == x.dtype
      bound = 4e-7 * np.maximum(1, np.abs(expected)) + half * np.abs(expected)
      assert (np.abs(_wide(y) - expected) <= bound).all(), (name, columns)

      expected_grad = _expected_gradient(expected, y_grad, -0.7, log)
      error = np.abs(_wide(x_grad) - expected_grad)
      # It comes from the rounded output, and is rounded itself.
      g = np.abs(_wide(y_grad))
      if log:
        off = (4e-7 + half) * (1 + np.abs(expected)) * np.exp(expected)
        bound = off * np.abs(_wide(y_grad).sum(-1, keepdims=True))
        bound += 4e-7 * (1 + np.exp(expected) * g.sum(-1, keepdims=True))
      else:
        total = (expected * g).sum(-1, keepdims=True)
        bound = 2 * (4e-7 + half) * expected * (g + total) + 4e-7
      bound = 1.1 * bound + half * np.abs(expected_grad)
      assert (error <= bound).all(), (name, columns)


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_the_longest_rows_are_float64s(implementation):
  # Many pieces a row and one that is shorter; two blocks of a TPU's rows.
  rows = 2 if 'gpu' in implementation else 9
  x = _logits((rows, shapes.LONGEST - 128), 'bfloat16')
  y, pull = jax.vjp(
    functools.partial(api.softmax, implementation=implementation), x
  )
  expected = _expected(x)
  half = ROUNDING['bfloat16']
  assert (np.abs(_wide(y) - expected) <= 4e-7 + half * expected).all()
  y_grad = _logits(x.shape, 'bfloat16', spread=1, seed=1)
  expected_grad = _expected_gradient(expected, y_grad, 1.0, log=False)
  error = np.abs(_wide(pull(y_grad)[0]) - expected_grad)
  assert error.max() <= 4 * half * np.abs(expected_grad).max()


def test_one_column_more_is_refused_by_name_and_left_to_xla():
  x = jnp.zeros((1, shapes.LONGEST + 128))
  for name in ('pallas_tpu', 'pallas_gpu'):
    with pytest.raises(ValueError, match=f'{name}.*262272 columns.*262144'):
      api.softmax(x, implementation=name)
  assert dispatch.explain(api.softmax, x)[0].implementation == 'xla'


def test_the_courses_value():
  expected = [0.09003057, 0.24472847, 0.66524096]
  for name in ('xla', 'pallas_tpu_interpret'):
    y = api.softmax([1.0, 2.0, 3.0], implementation=name)
    np.testing.assert_allclose(y, expected, atol=5e-8)


@pytest.mark.parametrize('name', ['xla', 'pallas_tpu_interpret'])
def test_of_two_it_is_the_sigmoid_of_the_difference(name):
  s = np.linspace(-20, 20, 81)
  x = jnp.stack([jnp.asarray(s, jnp.float32), jnp.zeros(81)], -1)
  y = api.softmax(x, implementation=name)
  expected = 1 / (1 + np.exp(-_wide(x[:, 0])))
  np.testing.assert_allclose(y[:, 0], expected, atol=4e-7)


def test_float64_is_computed_in_float64():
  with jax.enable_x64(True):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 9)) * 30)
    for name, function in FUNCTIONS.items():
      y = function(x, scale=1.3)
      expected = _expected(x, scale=1.3, log=name == 'log_softmax')
      assert y.dtype == np.float64
      np.testing.assert_allclose(y, expected, rtol=1e-13, atol=1e-13)
    with pytest.raises(ValueError, match='pallas_tpu.*float64 is for xla'):
      api.softmax(x, implementation='pallas_tpu')


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
@pytest.mark.parametrize('name', FUNCTIONS)
def test_the_gradient_is_the_quotient_of_small_differences(
  implementation, name
):
  columns = _columns(implementation)
  x = _logits((2, columns), spread=1)
  y_grad = _logits((2, columns), spread=1, seed=1)
  seen = np.random.default_rng(2).random((2, columns)) < 0.7
  seen[0, :2], log = True, name == 'log_softmax'

  def loss(x):
    y = _expected(x, seen, 0.7, log)
    return (
      np.where(seen, y * _wide(y_grad), 0).sum()
      if log
      else (y * _wide(y_grad)).sum()
    )

  expected = np.zeros(x.shape)
  for place in np.ndindex(x.shape):
    step = np.zeros(x.shape)
    step[place] = 1e-6
    expected[place] = (loss(_wide(x) + step) - loss(_wide(x) - step)) / 2e-6
  _, pull = jax.vjp(
    lambda x: FUNCTIONS[name](
      x, where=seen, scale=0.7, implementation=implementation
    ),
    x,
  )
  np.testing.assert_allclose(pull(y_grad)[0], expected, atol=3e-6)


@pytest.mark.parametrize('name', FUNCTIONS)
@pytest.mark.parametrize('axis', [0, 1, -1])
def test_values_and_gradients_are_jax_nns_along_any_axis(name, axis):
  x = _logits((3, 5, 7))
  theirs = getattr(jax.nn, name)
  for implementation in ('xla', 'pallas_tpu_interpret'):
    ours = functools.partial(
      FUNCTIONS[name], axis=axis, implementation=implementation
    )
    for f, g in (
      (ours, functools.partial(theirs, axis=axis)),
      (
        jax.grad(lambda x, f=ours: jnp.sum(jnp.sin(f(x)))),
        jax.grad(lambda x: jnp.sum(jnp.sin(theirs(x, axis=axis)))),
      ),
    ):
      np.testing.assert_allclose(f(x), g(x), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_large_logits_lose_nothing(implementation):
  x = _logits((4, 128), spread=1) + jnp.array([[3e4], [-3e4], [0], [1e30]])
  for scale in (1.0, 0.3, -0.3):
    for name, function in FUNCTIONS.items():
      y = function(x, scale=scale, implementation=implementation)
      expected = _expected(x, scale=scale, log=name == 'log_softmax')
      np.testing.assert_allclose(y, expected, rtol=4e-7, atol=4e-7)


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_a_masked_row_may_be_a_whole_piece_and_a_rest(implementation):
  """On a GPU 6,272 columns are 4,096 and 2,176 for the logarithm."""
  x = _logits((2, 6272))
  where = np.random.default_rng(5).random(x.shape) < 0.6
  y = api.log_softmax(x, where=where, implementation=implementation)
  wide = np.where(where, np.float64(x), -np.inf)
  top = wide.max(-1, keepdims=True)
  total = np.log(np.exp(wide - top).sum(-1, keepdims=True))
  np.testing.assert_allclose(y, wide - top - total, rtol=4e-7, atol=4e-7)


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
@pytest.mark.parametrize('queries', [1, 5, 140])
def test_masks_hide_in_both_directions(implementation, queries):
  columns = 128
  x = _logits((2, queries, columns))
  generator = np.random.default_rng(3)
  causal = np.tri(queries, columns, columns - queries, dtype=bool)
  y_grad = np.array(_logits(x.shape, spread=1, seed=1))
  masks = [(columns,), (2, 1, columns), (queries, 1), x.shape, None]
  for shape in masks if queries == 5 else masks[-2:]:
    where = None if shape is None else generator.random(shape) < 0.6
    seen = causal if where is None else causal & where
    seen = np.broadcast_to(seen, x.shape)
    # Nothing that comes from a masked entry may matter.
    dirty = jnp.where(seen, x, np.nan)
    dirty_grad = jnp.asarray(np.where(seen, y_grad, np.inf))
    for name, function in FUNCTIONS.items():
      log = name == 'log_softmax'
      y, pull = jax.vjp(
        lambda x, f=function, where=where: f(
          x, where=where, causal=True, implementation=implementation
        ),
        dirty,
      )
      expected = _expected(x, seen, log=log)
      np.testing.assert_allclose(y, expected, rtol=4e-7, atol=1e-6)
      expected = _expected_gradient(
        expected, np.where(seen, y_grad, 0), 1.0, log
      )
      (x_grad,) = pull(dirty_grad)
      np.testing.assert_allclose(x_grad, expected, atol=1e-5)
      assert not np.asarray(x_grad)[~seen].any()


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_a_row_with_nothing_is_zeros_and_a_nan_stays_in_its_row(
  implementation,
):
  x = np.array(_logits((7, 128)))
  x[1] = -np.inf
  x[2, 5] = np.nan
  x[3, 5] = np.inf
  x[4, 5:] = -np.inf
  x[5, 5:] = np.nan
  seen = np.ones(x.shape, bool)
  seen[0] = False
  seen[5, 5:] = False
  with np.errstate(invalid='ignore'):
    for name, function in FUNCTIONS.items():
      log = name == 'log_softmax'
      y, pull = jax.vjp(
        lambda x, f=function: f(x, where=seen, implementation=implementation),
        jnp.asarray(x),
      )
      (x_grad,) = pull(jnp.asarray(_logits(x.shape, spread=1)))
      expected = _expected(x, seen, log=log)
      np.testing.assert_allclose(y, expected, rtol=4e-7, atol=4e-7)
      empty = -np.inf if log else 0
      assert (np.asarray(y)[:2] == empty).all()
      assert not np.asarray(x_grad)[:2].any()
      lost = np.isnan(expected).all(-1)
      assert lost.tolist() == [False] * 2 + [True] * 2 + [False] * 3
      assert (np.isnan(x_grad).any(-1) == lost).all()


@pytest.mark.parametrize('implementation', [None, *IMPLEMENTATIONS])
@pytest.mark.parametrize('shape', [(0,), (0, 128), (3, 0), (2, 0, 128)])
def test_empty_arrays_come_back(implementation, shape):
  for function in FUNCTIONS.values():
    y, pull = jax.vjp(
      lambda x, f=function: f(x, implementation=implementation),
      jnp.zeros(shape, jnp.bfloat16),
    )
    assert y.shape == pull(y)[0].shape == shape
    assert y.dtype == jnp.bfloat16


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_it_runs_under_every_transformation(implementation):
  x = _logits((3, 2, 128))
  where = np.random.default_rng(0).random((3, 1, 128)) < 0.8

  def loss(x, where):
    y = api.softmax(
      x, where=where, causal=True, scale=2.0, implementation=implementation
    )
    return jnp.sum(jnp.sin(3 * y), axis=(-1, -2))

  def rows(x):
    y = jnp.asarray(_expected_in_jax(x, where))
    return jnp.sum(jnp.sin(3 * y), axis=(-1, -2))

  def _expected_in_jax(x, where):
    seen = where & np.tri(2, 128, 126, dtype=bool)
    return jax.nn.softmax(jnp.where(seen, 2 * x, -1e9))

  expected = jax.grad(lambda x: rows(x).sum())(x)
  one = jax.grad(loss)
  # Interpreted, Mosaic GPU has effects, which jax.checkpoint refuses.
  gpu = implementation == 'pallas_gpu_interpret'
  rematerialised = loss if gpu else jax.checkpoint(loss)
  for name, f in {
    'jit': jax.jit(jax.grad(lambda x, where: loss(x, where).sum())),
    'vmap': jax.vmap(one),
    'vmap of jit': jax.vmap(jax.jit(one)),
    'remat': jax.grad(lambda x, w: rematerialised(x, w).sum()),
    'scan': lambda x, w: jax.lax.scan(
      lambda c, xs: (c, one(*xs)), 0, (x, jnp.asarray(w))
    )[1],
  }.items():
    np.testing.assert_allclose(
      f(x, where), expected, rtol=1e-5, atol=1e-6, err_msg=name
    )


def test_on_xla_it_is_differentiable_twice():
  x = _logits((5,))
  for name, function in FUNCTIONS.items():
    ours, theirs = (
      jax.jacrev(jax.grad(lambda x, f=f: f(x)[1]))
      for f in (function, getattr(jax.nn, name))
    )
    np.testing.assert_allclose(ours(x), theirs(x), rtol=1e-5, atol=1e-6)


def test_none_is_xla_until_something_was_measured():
  (choice,) = dispatch.explain(api.softmax, jnp.zeros((2, 128)))
  assert choice.op == 'softmax'
  assert choice.implementation == 'xla'


ERRORS = {
  'integers': (TypeError, 'x is int32.*float32', {'x': np.zeros(3, int)}),
  'complex': (TypeError, 'x is complex64', {'x': np.zeros(3, np.complex64)}),
  'no such axis': (ValueError, r'axis 2 in x \(2, 128\)', {'axis': 2}),
  'none to reduce': (ValueError, r'axis -1 in x \(\)', {'x': 1.0}),
  'axis of two': (TypeError, r'axis is \(0, 1\)', {'axis': (0, 1)}),
  'mask of int': (
    TypeError,
    'where is int32.*bool',
    {'where': np.ones(128, int)},
  ),
  'mask too short': (
    ValueError,
    r'where \(2, 7\).*x \(2, 128\)',
    {'where': np.ones((2, 7), bool)},
  ),
  'mask too deep': (
    ValueError,
    r'where \(1, 2, 128\).*x \(2, 128\)',
    {'where': np.ones((1, 2, 128), bool)},
  ),
  'causal of one': (
    ValueError,
    r'\[..., T, K\].*\(128,\)',
    {'x': np.zeros(128, np.float32), 'causal': True},
  ),
  'causal across': (ValueError, 'axis 0', {'axis': 0, 'causal': True}),
  'scale of arrays': (TypeError, 'scale is a ndarray', {'scale': np.ones(2)}),
  'endless scale': (ValueError, 'scale is inf', {'scale': np.inf}),
  'unknown': (
    ValueError,
    "'cuda'; there are xla, pallas_tpu",
    {'implementation': 'cuda'},
  ),
  'odd columns': (
    ValueError,
    'softmax: pallas_gpu cannot.*100 columns.*multiple of 128',
    {'x': np.zeros((2, 100), np.float32), 'implementation': 'pallas_gpu'},
  ),
  'long and wide': (
    ValueError,
    'pallas_tpu cannot.*131200 columns.*131072 of float32',
    {'x': np.zeros((2, 131200), np.float32), 'implementation': 'pallas_tpu'},
  ),
  'half on a TPU': (
    ValueError,
    'pallas_tpu cannot.*float16',
    {'x': np.zeros((2, 128), np.float16), 'implementation': 'pallas_tpu'},
  ),
}


@pytest.mark.parametrize('case', ERRORS)
def test_what_does_not_fit_is_refused(case):
  error, words, arguments = ERRORS[case]
  arguments = {'x': np.zeros((2, 128), np.float32)} | arguments
  for function in FUNCTIONS.values():
    with pytest.raises(error, match=words):
      function(
        arguments['x'], **{k: v for k, v in arguments.items() if k != 'x'}
      )


@pytest.mark.skipif(
  hasattr(plgpu, 'InterpretGPUParams'), reason='this jax has it'
)
def test_an_old_jax_says_that_it_does_not_interpret_mosaic_gpu():
  with pytest.raises(ValueError, match='from 0.11 on'):
    api.softmax(jnp.zeros((2, 128)), implementation='pallas_gpu_interpret')


def _both_ways(name, implementation, **kwargs):
  def function(x, y_grad, *where):
    y, pull = jax.vjp(
      lambda x: FUNCTIONS[name](
        x,
        where=where[0] if where else None,
        implementation=implementation,
        **kwargs,
      ),
      x,
    )
    return y, pull(y_grad)[0]

  return function


CASES = {
  'short': ((64, 1024), {}),
  'long': ((64, 32768), {}),
  'causal': ((2, 4, 64, 1024), {'causal': True, 'scale': 0.125}),
  'masked': ((64, 1024), {}),
}


@pytest.mark.parametrize('dtype', ROUNDING)
@pytest.mark.parametrize('platform', ['tpu', 'cuda'])
@pytest.mark.parametrize('name', FUNCTIONS)
def test_both_ways_lower_with_no_hardware(name, platform, dtype):
  if platform == 'tpu' and dtype == 'float16':
    pytest.skip('Mosaic TPU loads no float16')
  gpu = platform == 'cuda'
  implementation = 'pallas_gpu' if gpu else 'pallas_tpu'
  call = 'mosaic_gpu' if gpu else 'tpu_custom_call'
  device = jax.sharding.AbstractDevice(
    device_kind='NVIDIA H200' if gpu else 'TPU v5 lite',
    num_cores=132 if gpu else 1,
    platform=platform,
  )
  mesh = jax.sharding.AbstractMesh(
    (1,), ('data',), (jax.sharding.AxisType.Auto,), abstract_device=device
  )
  for case, (shape, kwargs) in CASES.items():
    x = jax.ShapeDtypeStruct(shape, dtype)
    mask = [jax.ShapeDtypeStruct(shape, bool)] if case == 'masked' else []
    with jax.sharding.use_abstract_mesh(mesh):
      text = jax.export.export(
        jax.jit(_both_ways(name, implementation, **kwargs)),
        platforms=[platform],
        disabled_checks=[
          jax.export.DisabledSafetyCheck.custom_call('mosaic_gpu_v2')
        ],
      )(x, x, *mask).mlir_module()
    assert (
      len(
        [line for line in text.splitlines() if f'custom_call @{call}' in line]
      )
      == 2
    ), case
