"""linear_softmax_cross_entropy: float64's values, and the memory it takes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import dispatch
from kernels.ops.linear_cross_entropy import api
from kernels.ops.linear_cross_entropy import reference
from kernels.ops.linear_cross_entropy import shapes
from tests.kernels import test_cross_entropy

every_implementation = test_cross_entropy.every_implementation
ROUNDING = test_cross_entropy.ROUNDING


@pytest.fixture
def few_at_once(monkeypatch):
  """Logits of 8 rows of 40 classes at once."""
  monkeypatch.setattr(shapes, 'ELEMENTS', 8 * 40)


def _operands(rows, dtype='float32', width=6, classes=40):
  generator = np.random.default_rng(0)
  h = jnp.asarray(generator.normal(size=(*rows, width)), dtype)
  w = jnp.asarray(generator.normal(size=(width, classes)), dtype)
  return h, w, generator.integers(0, classes, rows, np.int32)


def _expected(h, w, labels, weights):
  """(loss, gradients of h and w) of the weighted losses, in float64."""
  h, w, weights = (np.asarray(a, np.float64) for a in (h, w, weights))
  logits = h @ w
  logits -= logits.max(-1, keepdims=True)
  exponentials = np.exp(logits)
  total = exponentials.sum(-1, keepdims=True)
  at_label = np.arange(w.shape[1]) == labels[..., None]
  grad = (exponentials / total - at_label) * weights[..., None]
  loss = np.log(total)[..., 0] - (logits * at_label).sum(-1)
  w_grad = h.reshape(-1, w.shape[0]).T @ grad.reshape(-1, w.shape[1])
  return loss, grad @ w.T, w_grad


@every_implementation
@pytest.mark.parametrize(
  ('rows', 'dtype'),
  [
    *((rows, 'float32') for rows in ((16,), (2, 15), (13,), (0,), ())),
    ((2, 15), 'bfloat16'),
    ((2, 15), 'float16'),
  ],
)
def test_values_and_gradients_are_float64s(
  implementation, rows, dtype, few_at_once
):
  h, w, labels = _operands(rows, dtype)
  weights = np.random.default_rng(2).normal(size=rows)

  @jax.jit
  def both(h, w):
    loss, pull = jax.vjp(
      lambda h, w: api.linear_softmax_cross_entropy(
        h, w, labels, implementation=implementation
      ),
      h,
      w,
    )
    return loss, *pull(jnp.asarray(weights, jnp.float32))

  found = both(h, w)
  assert [a.dtype.name for a in found] == ['float32', dtype, dtype]
  expected = _expected(h, w, labels, weights)
  np.testing.assert_allclose(found[0], expected[0], rtol=2e-6, atol=4e-6)
  # The gradient of the logits is rounded for the products.
  tolerance = 4 * ROUNDING[dtype] + 4e-6
  for ours, theirs in zip(found[1:], expected[1:], strict=True):
    size = np.abs(theirs).max(initial=0)
    np.testing.assert_allclose(
      np.asarray(ours, np.float64), theirs, atol=tolerance * size, rtol=0.01
    )


def test_gradients_are_as_differences_say(monkeypatch):
  monkeypatch.setattr(shapes, 'ELEMENTS', 4 * 7)
  with jax.enable_x64(True):
    h, w, labels = _operands((11,), 'float64', width=3, classes=7)
    weights = jnp.arange(1.0, 12)

    @jax.jit
    def total(h, w):
      return (api.linear_softmax_cross_entropy(h, w, labels) * weights).sum()

    grads = jax.jit(jax.grad(total, argnums=(0, 1)))(h, w)
    step = 1e-5
    for which, grad in enumerate(grads):
      for place in np.ndindex(grad.shape):
        up, down = (
          total(
            *(
              operand.at[place].add(s) if i == which else operand
              for i, operand in enumerate((h, w))
            )
          )
          for s in (step, -step)
        )
        np.testing.assert_allclose(
          grad[place], (up - down) / (2 * step), rtol=1e-6, atol=1e-7
        )


@every_implementation
def test_it_runs_under_every_transformation(implementation, few_at_once):
  h, w, labels = _operands((2, 16))
  weights = np.ones((2, 16))
  expected = _expected(h, w, labels, weights)
  function = functools.partial(
    api.linear_softmax_cross_entropy, implementation=implementation
  )
  ways = {
    'vmap': jax.vmap(function, in_axes=(0, None, 0)),
    'scan': lambda h, w, labels: jax.lax.scan(
      lambda _, row: (None, function(row[0], w, row[1])), None, (h, labels)
    )[1],
  }
  if implementation != 'pallas_gpu_interpret':
    # That interpreter calls Python, which remat does not allow.
    ways['remat'] = jax.checkpoint(function)
  for name, way in ways.items():
    found, pull = jax.vjp(lambda h, w, f=way: f(h, w, labels), h, w)
    found = found, *pull(jnp.ones_like(found))
    for ours, theirs in zip(found, expected, strict=True):
      np.testing.assert_allclose(
        ours, theirs, rtol=1e-4, atol=1e-5, err_msg=name
      )


def _temporary(function, rows, dtype='float32'):
  """The bytes that the value and both gradients take beside the results."""
  program = jax.jit(
    jax.value_and_grad(
      lambda h, w, labels: function(h, w, labels).mean(), argnums=(0, 1)
    )
  ).lower(
    jax.ShapeDtypeStruct((rows, 64), dtype),
    jax.ShapeDtypeStruct((64, 32768), dtype),
    jax.ShapeDtypeStruct((rows,), jnp.int32),
  )
  return program.compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_memory_is_that_of_a_chunk_however_many_rows(dtype):
  function = api.linear_softmax_cross_entropy
  few, many = (_temporary(function, rows, dtype) for rows in (4096, 65536))
  plain = _temporary(reference.loss, 4096, dtype)
  assert few < 0.1 * plain
  # A few numbers a row: the losses, what is kept of each and comes back. A CPU
  # multiplies in float32, and may convert the whole of h before the loop.
  a_row = 32 if dtype == 'float32' else 32 + 64 * 4
  assert many - few <= (65536 - 4096) * a_row


def test_chunks_hold_all_rows_and_few_more():
  for rows in (0, 1, 7, 128, 8192, 8191, 100_003):
    for width, classes in ((64, 32768), (4096, 131072), (8, 10), (2, 262144)):
      count, each = shapes.chunks(rows, width, classes)
      assert rows <= count * each < rows + count
      assert each * classes <= max(2**24, width * classes // 4)
  assert shapes.chunks(8192, 64, 32768) == (16, 512)


FLOATS, INTEGERS = np.zeros((2, 3), np.float32), np.zeros(2, np.int32)
KERNEL = np.zeros((3, 5), np.float32)
ERRORS = {
  'integer h': (TypeError, 'h is int32', INTEGERS, KERNEL, INTEGERS, {}),
  'another dtype': (
    TypeError, 'float32 and w float16', FLOATS, KERNEL.astype(np.float16),
    INTEGERS, {},
  ),
  'float labels': (
    TypeError, 'float32.*integers', FLOATS, KERNEL, FLOATS[:, 0], {},
  ),
  'another width': (
    ValueError, r'\(2, 3\) and w \(5, 3\)', FLOATS, KERNEL.T, INTEGERS, {},
  ),
  'other rows': (
    ValueError, r'\(2, 3\) and labels \(1,\)', FLOATS, KERNEL, INTEGERS[:1],
    {},
  ),
  'no classes': (ValueError, 'no class', FLOATS, KERNEL[:, :0], INTEGERS, {}),
  'implementation': (
    ValueError, "'fast'.*xla", FLOATS, KERNEL, INTEGERS,
    {'implementation': 'fast'},
  ),
}  # fmt: skip


@pytest.mark.parametrize('case', ERRORS)
def test_what_does_not_fit_is_refused(case):
  error, words, h, w, labels, options = ERRORS[case]
  with pytest.raises(error, match=words):
    api.linear_softmax_cross_entropy(h, w, labels, **options)


def test_none_is_xla_until_something_was_measured():
  (choice,) = dispatch.explain(
    api.linear_softmax_cross_entropy, FLOATS, KERNEL, INTEGERS
  )
  assert choice.op == 'linear_softmax_cross_entropy'
  assert choice.implementation == 'xla'


@pytest.mark.parametrize('platform', ['tpu', 'cuda'])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_both_ways_lower_with_no_hardware(platform, dtype):
  name = 'pallas_tpu' if platform == 'tpu' else 'pallas_gpu'

  def total(h, w, labels):
    return api.linear_softmax_cross_entropy(
      h, w, labels, implementation=name
    ).sum()

  text = test_cross_entropy.lowered(
    jax.value_and_grad(total, argnums=(0, 1)),
    platform,
    jax.ShapeDtypeStruct((2048, 64), dtype),
    jax.ShapeDtypeStruct((64, 32768), dtype),
    jax.ShapeDtypeStruct((2048,), jnp.int32),
  )
  assert test_cross_entropy.CALLS[platform] in text


ON_A_MESH = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from kernels.ops.linear_cross_entropy import api, shapes

shapes.ELEMENTS = 8 * 40
generator = np.random.default_rng(0)
h, w = (generator.normal(size=s).astype('float32') for s in ((64, 6), (6, 40)))
labels = generator.integers(0, 40, 64, 'int32')
found = []
for name in sys.argv[1:]:
  mesh = jax.make_mesh((4,), ('data',), (jax.sharding.AxisType.Auto,))
  rows = jax.NamedSharding(mesh, jax.sharding.PartitionSpec('data'))
  whole = jax.NamedSharding(mesh, jax.sharding.PartitionSpec())

  def total(h, w, labels):
    return api.linear_softmax_cross_entropy(
      h, w, labels, implementation=name
    ).sum()

  operands = jax.device_put((h, w, labels), (rows, whole, rows))
  with jax.set_mesh(mesh):
    program = jax.jit(jax.grad(total, argnums=(0, 1))).lower(*operands)
    program = program.compile()
    grads = program(*operands)
  found.append((
    [np.asarray(grad).tolist() for grad in grads],
    'all-gather' in program.as_text(),
  ))
print(json.dumps(found))
"""


@pytest.mark.slow
def test_each_device_computes_its_own_rows():
  generator = np.random.default_rng(0)
  h, w = (
    generator.normal(size=s).astype('float32') for s in ((64, 6), (6, 40))
  )
  labels = generator.integers(0, 40, 64, 'int32')
  _, *expected = _expected(h, w, labels, np.ones(64))
  for grads, gathers in test_cross_entropy.on_four_devices(
    ON_A_MESH, 'xla', 'pallas_tpu_interpret'
  ):
    for ours, theirs in zip(grads, expected, strict=True):
      np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    assert not gathers
