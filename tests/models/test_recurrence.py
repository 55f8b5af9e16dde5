"""The recurrence against a loop in NumPy, and its gradient against jax.grad."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import recurrence

STEPS, BATCH, FEATURES, WIDTH = 5, 3, 4, 2
LENGTHS = np.array([5, 2, 0])
MASK = (np.arange(STEPS)[:, None] < LENGTHS)[..., None]


def rnn(a, state):
  del state  # All that is remembered comes in by the product.
  return (jnp.tanh(a),)


def leaky(a, state):
  z, n = jnp.split(a, 2, axis=-1)
  z = jax.nn.sigmoid(z)
  return ((1 - z) * jnp.tanh(n) + z * state[0],)


def lstm(a, state):
  i, f, g, o = jnp.split(a, 4, axis=-1)
  c = jax.nn.sigmoid(f) * state[1] + jax.nn.sigmoid(i) * jnp.tanh(g)
  return jax.nn.sigmoid(o) * jnp.tanh(c), c


# Of each cell: its gates, their number, and that of its states.
CELLS = {'rnn': (rnn, 1, 1), 'leaky': (leaky, 2, 1), 'lstm': (lstm, 4, 2)}

each_way = pytest.mark.parametrize('reverse', [False, True])


def operands(gates, states, dtype='float64'):
  """x, kernel, recurrent_kernel, bias and state, of random numbers."""
  random = np.random.default_rng(0)
  columns = gates * WIDTH
  shapes = [(STEPS, BATCH, FEATURES), (FEATURES, columns), (WIDTH, columns)]
  shapes += [(columns,)] + [(BATCH, WIDTH)] * states
  arrays = [jnp.asarray(random.normal(size=shape), dtype) for shape in shapes]
  return *arrays[:4], tuple(arrays[4:])


def plain(gates, x, kernel, recurrent_kernel, bias, state, mask, reverse):
  """What run computes, as a loop that jax.grad follows by itself."""
  hs = [None] * STEPS
  for t in reversed(range(STEPS)) if reverse else range(STEPS):
    new = gates(x[t] @ kernel + state[0] @ recurrent_kernel + bias, state)
    if mask is not None:
      new = tuple(
        jnp.where(mask[t], n, old) for n, old in zip(new, state, strict=True)
      )
    state, hs[t] = new, new[0]
  return jnp.stack(hs), state


def gradients(total):
  """The value of total(*operands) and its gradient in each of them."""
  return jax.jit(jax.value_and_grad(total, range(5)))


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def test_an_lstm_is_what_numpy_computes():
  with jax.enable_x64(True):
    args = operands(4, 2)
    hs, state = recurrence.run(lstm, *args)
  x, kernel, recurrent_kernel, bias, (h, c) = jax.tree.map(np.asarray, args)
  for t in range(STEPS):
    a = x[t] @ kernel + h @ recurrent_kernel + bias
    i, f, g, o = np.split(a, 4, axis=1)
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    h = sigmoid(o) * np.tanh(c)
    np.testing.assert_allclose(hs[t], h, rtol=1e-12)
  np.testing.assert_allclose(state, (h, c), rtol=1e-12)


@pytest.mark.parametrize('cell', CELLS)
@pytest.mark.parametrize(('reverse', 'mask'), [(False, None), (True, MASK)])
def test_outputs_and_gradients_are_those_of_the_plain_loop(cell, reverse, mask):
  gates, *sizes = CELLS[cell]
  with jax.enable_x64(True):
    args = operands(*sizes)
    # Each output and each last state weighs something else.
    outputs, states = recurrence.run(gates, *args, mask, reverse=reverse)
    weights = jax.tree.map(
      lambda o: jnp.cos(jnp.arange(o.size, dtype=o.dtype)).reshape(o.shape),
      (outputs, states),
    )

    def total(run, *args):
      found = jax.tree.map(jnp.vdot, run(gates, *args), weights)
      return jax.tree.reduce(jnp.add, found)

    ours = functools.partial(recurrence.run, mask=mask, reverse=reverse)
    theirs = functools.partial(plain, mask=mask, reverse=reverse)
    found, expected = (
      gradients(functools.partial(total, run))(*args) for run in (ours, theirs)
    )
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-13),
    found,
    expected,
  )


@each_way
def test_a_masked_step_leaves_the_state_and_has_no_gradient(reverse):
  x, *others = operands(4, 2, 'float32')

  @functools.partial(jax.value_and_grad, has_aux=True)
  def total(x):
    hs, state = recurrence.run(lstm, x, *others, MASK, reverse=reverse)
    return (hs**2).sum(), state

  (_, state), grad = jax.jit(total)(x)
  # The third sequence is empty.
  np.testing.assert_array_equal(state[0][2], others[-1][0][2])
  np.testing.assert_array_equal(state[1][2], others[-1][1][2])
  np.testing.assert_array_equal((np.asarray(grad) != 0).all(-1), MASK[..., 0])


def test_products_are_of_the_inputs_dtype_and_states_of_their_own():
  exact = operands(4, 2, 'float32')
  x, kernel, recurrent_kernel, bias, state = exact
  low = [v.astype('bfloat16') for v in (x, kernel, recurrent_kernel, bias)]

  def total(*args):
    hs, last = recurrence.run(lstm, *args)
    return (hs**2).sum() + sum((s**2).sum() for s in last)

  hs, last = jax.eval_shape(
    functools.partial(recurrence.run, lstm), *low, state
  )
  assert {hs.dtype, *(s.dtype for s in last)} == {jnp.dtype('float32')}
  grads = gradients(total)(*low, state)[1]
  jax.tree.map(
    lambda grad, arg: np.testing.assert_equal(grad.dtype, arg.dtype),
    grads,
    (*low, state),
  )
  expected = gradients(total)(*exact)[1]
  for found, wanted in zip(
    jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True
  ):
    difference = np.linalg.norm(np.asarray(found, 'float32') - wanted)
    assert difference < 0.03 * np.linalg.norm(wanted)


def test_a_gradient_can_be_differentiated_and_mapped():
  x, *others = operands(4, 2, 'float32')

  def slope(run, x):
    return jax.grad(lambda x: (run(lstm, x, *others)[0] ** 2).sum())(x)

  def bend(run, x):
    return jax.grad(lambda x: (slope(run, x) ** 2).sum())(x)

  theirs = functools.partial(plain, mask=None, reverse=False)
  np.testing.assert_allclose(
    jax.jit(functools.partial(bend, recurrence.run))(x),
    jax.jit(functools.partial(bend, theirs))(x),
    rtol=1e-4,
    atol=1e-5,
  )
  many = jnp.stack([x, 2 * x])
  ours = jax.jit(functools.partial(slope, recurrence.run))
  np.testing.assert_allclose(
    jax.vmap(ours)(many), [ours(x) for x in many], rtol=1e-4, atol=1e-6
  )
