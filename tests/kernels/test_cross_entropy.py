"""softmax_cross_entropy, every implementation, against float64 and optax."""

import functools
import json
import subprocess
import sys

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kernels import dispatch
from kernels.ops.cross_entropy import api
from tests import conftest

INTERPRETS_GPU = hasattr(plgpu, 'InterpretGPUParams')
IMPLEMENTATIONS = [
  'xla',
  'pallas_tpu_interpret',
  pytest.param(
    'pallas_gpu_interpret',
    marks=pytest.mark.skipif(not INTERPRETS_GPU, reason='jax is before 0.11'),
  ),
]
every_implementation = pytest.mark.parametrize(
  'implementation', IMPLEMENTATIONS
)
# Half a unit in the last place of 1.
ROUNDING = {'float32': 2.0**-24, 'bfloat16': 2.0**-9, 'float16': 2.0**-11}
IGNORE = -100
VARIANTS = {
  'plain': {},
  'all': {'ignore_index': IGNORE, 'label_smoothing': 0.1, 'z_loss': 0.01},
}


def _logits(shape, dtype='float32', spread=5):
  x = np.random.default_rng(0).normal(size=shape) * spread
  return jnp.asarray(x, dtype)


def _labels(shape, columns):
  return np.random.default_rng(1).integers(0, columns, shape, np.int32)


def _expected(
  logits, labels, ignore_index=None, label_smoothing=0.0, z_loss=0.0
):
  """(loss, the gradient of its sum), by the formula in float64."""
  x = np.asarray(logits, np.float64)
  highest = x.max(-1, keepdims=True)
  exponentials = np.exp(x - highest)
  total = exponentials.sum(-1, keepdims=True)
  lse = highest + np.log(total)
  at_label = np.arange(x.shape[-1]) == labels[..., None]
  target = (1 - label_smoothing) * at_label + label_smoothing / x.shape[-1]
  with np.errstate(invalid='ignore'):
    each = np.where(target > 0, target * (x - highest), 0)
  loss = np.log(total)[..., 0] - each.sum(-1) + z_loss * lse[..., 0] ** 2
  grad = exponentials / total * (1 + 2 * z_loss * lse) - target
  ignored = labels == (np.nan if ignore_index is None else ignore_index)
  return np.where(ignored, 0, loss), np.where(ignored[..., None], 0, grad)


def _value_and_gradient(function, logits, labels):
  @jax.jit
  def both(logits, labels):
    loss, pull = jax.vjp(lambda x: function(x, labels), logits)
    return loss, pull(jnp.ones_like(loss))[0]

  return both(logits, labels)


@every_implementation
@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.parametrize(
  ('columns', 'dtype'),
  [
    *((columns, 'float32') for columns in (1, 7, 127, 129, 1000, 50257)),
    (1000, 'bfloat16'),
    (4224, 'bfloat16'),
    (129, 'float16'),
  ],
)
def test_losses_and_gradients_are_float64s(
  implementation, variant, columns, dtype
):
  options = VARIANTS[variant]
  # More than one group of a TPU's rows, where that takes no time.
  rows = 3 if columns > 1000 or 'gpu' in implementation else 37
  logits, labels = _logits((rows, columns), dtype), _labels(rows, columns)
  if options:
    labels[1] = IGNORE
  loss, grad = _value_and_gradient(
    functools.partial(
      api.softmax_cross_entropy, implementation=implementation, **options
    ),
    logits,
    labels,
  )
  assert loss.dtype == jnp.float32
  assert grad.dtype == logits.dtype
  expected, expected_grad = _expected(logits, labels, **options)
  np.testing.assert_allclose(loss, expected, rtol=2e-6, atol=2e-6)
  np.testing.assert_allclose(
    np.asarray(grad, np.float64),
    expected_grad,
    # A probability is as exact as exp of a float32 log-sum-exp of 20.
    rtol=2 * ROUNDING[dtype] + 4e-6,
    atol=1e-6,
  )


@every_implementation
def test_the_longest_rows_are_float64s(implementation):
  logits, labels = _logits((2, 262144), 'bfloat16'), _labels(2, 262144)
  loss = api.softmax_cross_entropy(
    logits, labels, label_smoothing=0.1, implementation=implementation
  )
  expected, _ = _expected(logits, labels, label_smoothing=0.1)
  np.testing.assert_allclose(loss, expected, rtol=2e-6)


@every_implementation
def test_large_logits_lose_nothing(implementation):
  apart = _logits((4, 300), spread=1e4).clip(-3e4, 3e4)
  level = _logits((4, 300), spread=1) + jnp.float32(3e4)
  for logits in (apart, level, level - jnp.float32(6e4)):
    labels = _labels(4, 300)
    for smoothing in (0.0, 0.1):
      loss, grad = _value_and_gradient(
        functools.partial(
          api.softmax_cross_entropy,
          label_smoothing=smoothing,
          implementation=implementation,
        ),
        logits,
        labels,
      )
      expected, expected_grad = _expected(
        logits, labels, label_smoothing=smoothing
      )
      np.testing.assert_allclose(loss, expected, rtol=2e-6)
      # What float32 holds of a log-sum-exp of 3e4: half of 1 / 512.
      np.testing.assert_allclose(grad, expected_grad, rtol=1e-3, atol=1e-6)


@every_implementation
def test_classes_that_cannot_be_take_no_part(implementation):
  logits = _logits((3, 200)).at[:, ::2].set(-jnp.inf)
  labels = np.array([1, 3, 199], np.int32)
  loss, grad = _value_and_gradient(
    functools.partial(api.softmax_cross_entropy, implementation=implementation),
    logits,
    labels,
  )
  expected, _ = _expected(logits[:, 1::2], labels // 2)
  np.testing.assert_allclose(loss, expected, rtol=2e-6)
  assert (np.asarray(grad)[:, ::2] == 0).all()
  impossible = api.softmax_cross_entropy(
    logits, labels - 1, implementation=implementation
  )
  assert (impossible == np.inf).all()


@every_implementation
def test_what_is_ignored_is_zero_and_a_bad_row_stays_alone(implementation):
  logits = np.array(_logits((6, 130)))
  logits[0], logits[1, 5], logits[2] = np.nan, np.inf, -np.inf
  logits[3, 7] = np.nan
  labels = np.array([IGNORE, IGNORE, IGNORE, 7, 130, 9], np.int32)
  function = functools.partial(
    api.softmax_cross_entropy,
    ignore_index=IGNORE,
    label_smoothing=0.1,
    z_loss=0.1,
    implementation=implementation,
  )
  loss, grad = _value_and_gradient(function, jnp.asarray(logits), labels)
  assert (loss[:3] == 0).all()
  assert (grad[:3] == 0).all()
  assert np.isnan(loss[3:5]).all()
  assert np.isnan(grad[3:5]).all()
  expected, expected_grad = _expected(
    logits[5:], labels[5:], label_smoothing=0.1, z_loss=0.1
  )
  np.testing.assert_allclose(loss[5:], expected, rtol=2e-6)
  np.testing.assert_allclose(grad[5:], expected_grad, rtol=4e-6, atol=1e-6)


def test_labels_of_any_integer_dtype_are_what_they_say():
  logits = _logits((4, 200))
  expected, _ = _expected(logits, np.array([0, 156, 199, 5]))
  labels = np.array([0, 156, 199, 5], np.uint8)
  # -100 is 156 in eight bits.
  loss = api.softmax_cross_entropy(logits, labels, ignore_index=-100)
  np.testing.assert_allclose(loss, expected, rtol=2e-6)
  loss = api.softmax_cross_entropy(logits, labels, ignore_index=156)
  assert loss[1] == 0
  with jax.enable_x64(True):
    labels = np.array([0, 2**32, -(2**32) + 3, 5])
    loss = api.softmax_cross_entropy(logits, labels)
  assert np.isnan(loss).tolist() == [False, True, True, False]
  one = api.softmax_cross_entropy(logits[0], 0)
  assert one.shape == ()
  np.testing.assert_allclose(one, expected[0], rtol=2e-6)


@pytest.mark.parametrize('smoothing', [0.0, 0.1])
def test_float64_is_computed_in_float64_and_as_differences_say(smoothing):
  with jax.enable_x64(True):
    logits = jnp.asarray(_logits((3, 9)), jnp.float64) + 0.123456789
    labels = _labels(3, 9)

    def total(x):
      loss = api.softmax_cross_entropy(
        x, labels, label_smoothing=smoothing, z_loss=0.1
      )
      return (loss * jnp.arange(1.0, 4)).sum()

    loss = api.softmax_cross_entropy(logits, labels)
    assert loss.dtype == jnp.float64
    np.testing.assert_allclose(loss, _expected(logits, labels)[0], rtol=1e-14)
    total = jax.jit(total)
    grad = jax.jit(jax.grad(total))(logits)
    step = 1e-5
    for place in np.ndindex(3, 9):
      up, down = (total(logits.at[place].add(s)) for s in (step, -step))
      np.testing.assert_allclose(
        grad[place], (up - down) / (2 * step), rtol=1e-6, atol=1e-8
      )


@every_implementation
def test_it_is_optaxs(implementation):
  logits, labels = _logits((5, 2, 40)), _labels((5, 2), 40)
  weights = _logits((5, 2))

  def theirs(logits, labels):
    return optax.losses.softmax_cross_entropy(
      logits, optax.losses.smooth_labels(jax.nn.one_hot(labels, 40), 0.1)
    )

  def ours(logits, labels):
    return api.softmax_cross_entropy(
      logits, labels, label_smoothing=0.1, implementation=implementation
    )

  results = []
  for function in (ours, theirs):

    def weighted(x, function=function):
      loss = function(x, labels)
      return (loss * weights).sum(), loss

    (_, loss), grad = jax.jit(jax.value_and_grad(weighted, has_aux=True))(
      logits
    )
    results.append((loss, grad))
  np.testing.assert_allclose(results[0][0], results[1][0], rtol=2e-6)
  np.testing.assert_allclose(results[0][1], results[1][1], rtol=4e-6, atol=1e-6)


@every_implementation
def test_what_is_kept_is_the_logits_and_one_number_a_row(implementation):
  logits, labels = _logits((6, 40), 'bfloat16'), _labels(6, 40)
  _, pull = jax.vjp(
    lambda x: api.softmax_cross_entropy(
      x, labels, implementation=implementation
    ),
    logits,
  )
  kept = sorted(
    (leaf.shape, leaf.dtype.name)
    for leaf in jax.tree.leaves(pull)
    if leaf.shape
  )
  assert kept == [
    ((6,), 'float32'), ((6,), 'int32'), ((6, 40), 'bfloat16'),
  ]  # fmt: skip


@every_implementation
def test_it_runs_under_every_transformation(implementation):
  logits, labels = _logits((2, 3, 40)), _labels((2, 3), 40)
  expected, expected_grad = _expected(logits, labels)
  function = functools.partial(
    api.softmax_cross_entropy, implementation=implementation
  )
  transformed = {
    'jit': jax.jit(function),
    'vmap': jax.vmap(function),
    'twice': jax.vmap(jax.vmap(function)),
    'across': jax.vmap(function, in_axes=1, out_axes=1),
    'scan': lambda x, l: jax.lax.scan(
      lambda _, row: (None, function(*row)), None, (x, l)
    )[1],
  }
  if implementation != 'pallas_gpu_interpret':
    # That interpreter calls Python, which remat does not allow.
    transformed['remat'] = jax.checkpoint(function)
  for name, way in transformed.items():
    loss, grad = _value_and_gradient(way, logits, labels)
    np.testing.assert_allclose(loss, expected, rtol=2e-6, err_msg=name)
    np.testing.assert_allclose(grad, expected_grad, atol=1e-6, err_msg=name)
  # The same logits under several labels.
  several = jax.vmap(function, in_axes=(None, 0))(logits[0], labels)
  for loss, label in zip(several, labels, strict=True):
    np.testing.assert_allclose(loss, _expected(logits[0], label)[0], rtol=2e-6)


@every_implementation
def test_no_rows_have_no_losses(implementation):
  loss, grad = _value_and_gradient(
    functools.partial(api.softmax_cross_entropy, implementation=implementation),
    jnp.zeros((2, 0, 5)),
    np.zeros((2, 0), np.int32),
  )
  assert loss.shape == (2, 0)
  assert grad.shape == (2, 0, 5)


FLOATS, INTEGERS = np.zeros((2, 3), np.float32), np.zeros(2, np.int32)
ERRORS = {
  'integer logits': (TypeError, 'int32.*floating', INTEGERS, INTEGERS, {}),
  'float labels': (
    TypeError, 'float32.*integers', FLOATS, np.zeros(2, np.float32), {},
  ),
  'other rows': (
    ValueError, r'\(2, 3\).*\(3,\)', FLOATS, np.zeros(3, np.int32), {},
  ),
  'one hot': (
    ValueError, r'\(2, 3\).*\(2, 3\)', FLOATS, FLOATS.astype(np.int32), {},
  ),
  'no classes': (ValueError, 'no class', FLOATS[:, :0], INTEGERS, {}),
  'smoothing': (
    ValueError, r'1\.5.*\[0, 1\]', FLOATS, INTEGERS, {'label_smoothing': 1.5},
  ),
  'no number': (
    TypeError, 'z_loss.*number', FLOATS, INTEGERS, {'z_loss': '1'},
  ),
  'ignored': (
    TypeError, 'ignore_index.*int', FLOATS, INTEGERS, {'ignore_index': 0.5},
  ),
  'implementation': (
    ValueError, "'fast'.*xla", FLOATS, INTEGERS, {'implementation': 'fast'},
  ),
  'float16 on a TPU': (
    ValueError, 'pallas_tpu.*float16.*bfloat16', FLOATS.astype(np.float16),
    INTEGERS, {'implementation': 'pallas_tpu'},
  ),
}  # fmt: skip


@pytest.mark.parametrize('case', ERRORS)
def test_what_does_not_fit_is_refused(case):
  error, words, logits, labels, options = ERRORS[case]
  with pytest.raises(error, match=words):
    api.softmax_cross_entropy(logits, labels, **options)


def test_float64_is_refused_by_every_kernel():
  with jax.enable_x64(True):
    logits = jnp.zeros((2, 3), jnp.float64)
    for name in set(dispatch.IMPLEMENTATIONS) - {'xla'}:
      with pytest.raises(ValueError, match=f'{name}.*float64.*float32'):
        api.softmax_cross_entropy(logits, INTEGERS, implementation=name)


@pytest.mark.skipif(INTERPRETS_GPU, reason='this jax interprets it')
def test_an_old_jax_says_that_it_does_not_interpret_mosaic_gpu():
  with pytest.raises(ValueError, match=r'0\.11'):
    api.softmax_cross_entropy(
      FLOATS, INTEGERS, implementation='pallas_gpu_interpret'
    )


def test_none_is_xla_until_something_was_measured():
  (choice,) = dispatch.explain(api.softmax_cross_entropy, FLOATS, INTEGERS)
  assert choice.op == 'softmax_cross_entropy'
  assert choice.implementation == 'xla'


def lowered(function, platform, *operands):
  """The text of function(*operands), exported for a chip that is not here."""
  gpu = platform == 'cuda'
  device = jax.sharding.AbstractDevice(
    device_kind='NVIDIA H200' if gpu else 'TPU v5 lite',
    num_cores=132 if gpu else 1,
    platform=platform,
  )
  mesh = jax.sharding.AbstractMesh(
    (1,), ('data',), (jax.sharding.AxisType.Auto,), abstract_device=device
  )
  check = jax.export.DisabledSafetyCheck.custom_call('mosaic_gpu_v2')
  with jax.sharding.use_abstract_mesh(mesh):
    return jax.export.export(
      jax.jit(function), platforms=[platform], disabled_checks=[check]
    )(*operands).mlir_module()


CALLS = {'tpu': 'tpu_custom_call', 'cuda': 'mosaic_gpu'}


@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.parametrize(
  ('platform', 'dtype'),
  [
    ('tpu', 'float32'),
    ('tpu', 'bfloat16'),
    ('cuda', 'float32'),
    ('cuda', 'bfloat16'),
    ('cuda', 'float16'),
  ],
)
def test_both_ways_lower_with_no_hardware(platform, dtype, variant):
  name = 'pallas_tpu' if platform == 'tpu' else 'pallas_gpu'

  def total(logits, labels):
    return api.softmax_cross_entropy(
      logits, labels, implementation=name, **VARIANTS[variant]
    ).sum()

  for shape in ((8, 10), (300, 1000), (64, 50257), (16, 262144)):
    text = lowered(
      jax.value_and_grad(total),
      platform,
      jax.ShapeDtypeStruct(shape, dtype),
      jax.ShapeDtypeStruct(shape[:1], jnp.int32),
    )
    assert CALLS[platform] in text, shape


ON_A_MESH = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from kernels.ops.cross_entropy import api

logits = np.random.default_rng(0).normal(size=(8, 2, 33)).astype('float32')
labels = np.random.default_rng(1).integers(0, 33, (8, 2), 'int32')
found = []
for name in sys.argv[1:]:
  for kind in (jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit):
    mesh = jax.make_mesh((4,), ('data',), (kind,))
    held = jax.NamedSharding(mesh, jax.sharding.PartitionSpec('data'))
    operands = jax.device_put(logits, held), jax.device_put(labels, held)

    def total(logits, labels):
      return jnp.sum(
        jax.checkpoint(
          lambda x, l: api.softmax_cross_entropy(x, l, implementation=name)
        )(logits, labels)
      )

    with jax.set_mesh(mesh):
      program = jax.jit(jax.value_and_grad(total)).lower(*operands).compile()
      loss, grad = program(*operands)
      refused = ''
      try:
        api.softmax_cross_entropy(
          logits[:3], labels[:3], implementation='pallas_tpu'
        )
      except ValueError as error:
        refused = str(error)
    found.append((
      float(loss), np.asarray(grad).tolist(), 'all-gather' in program.as_text(),
      refused if kind == jax.sharding.AxisType.Auto else '4 devices',
    ))
print(json.dumps(found))
"""


def on_four_devices(script, *arguments):
  """What it prints as JSON, in a new process."""
  ran = subprocess.run(
    [sys.executable, '-c', script, *arguments],
    capture_output=True,
    text=True,
    env=conftest.environment(
      XLA_FLAGS='--xla_force_host_platform_device_count=4',
      JAX_PLATFORMS='cpu',
    ),
    cwd=conftest.REPOSITORY,
  )
  assert ran.returncode == 0, ran.stderr
  return json.loads(ran.stdout)


def test_each_device_computes_its_own_rows():
  logits = np.random.default_rng(0).normal(size=(8, 2, 33)).astype('float32')
  labels = np.random.default_rng(1).integers(0, 33, (8, 2), 'int32')
  expected, expected_grad = _expected(logits, labels)
  for loss, grad, gathers, refused in on_four_devices(
    ON_A_MESH, 'xla', 'pallas_tpu_interpret'
  ):
    np.testing.assert_allclose(loss, expected.sum(), rtol=2e-6)
    np.testing.assert_allclose(grad, expected_grad, atol=1e-6)
    assert not gathers
    assert '4 devices' in refused
