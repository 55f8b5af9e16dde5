"""Recurrent networks against the course's figures and a loop in NumPy."""

import re

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from models import cells
from models import sampling
from tests.models import recurrences

NAMES = ('rnn', 'gru', 'lstm')
# Every kind of cell: what makes its model.
KINDS = {
  'rnn': {'name': 'rnn'},
  'rnn relu': {'name': 'rnn', 'activation': 'relu'},
  'gru': {'name': 'gru'},
  'gru reset after': {'name': 'gru', 'reset_after': True},
  'lstm': {'name': 'lstm'},
}
every_kind = pytest.mark.parametrize('kind', KINDS)
every_name = pytest.mark.parametrize('name', NAMES)


@pytest.fixture
def float64():
  with jax.enable_x64(True):
    yield


def shaped(name, **kwargs):
  return nnx.eval_shape(lambda: models.create(name, **kwargs, rngs=nnx.Rngs(0)))


def filled(name='lstm', *, num_features=3, scale=0.5, **kwargs):
  """A model whose parameters are NumPy's."""
  if 'vocab_size' in kwargs:
    num_features = None
  dtype = jnp.float64 if jax.config.jax_enable_x64 else jnp.float32
  kwargs = {'num_classes': 2, 'param_dtype': dtype} | kwargs
  model = shaped(name, num_features=num_features, **kwargs)
  random = np.random.default_rng(0)

  def numbers(leaf):
    return jnp.asarray(scale * random.normal(size=leaf.shape), leaf.dtype)

  nnx.update(model, jax.tree.map(numbers, nnx.state(model)))
  return model


def make(kind, **kwargs):
  return filled(**KINDS[kind] | kwargs)


def sequences(batch=3, steps=5, features=3, seed=1):
  random = np.random.default_rng(seed)
  return jnp.asarray(random.normal(size=(batch, steps, features)))


def outputs_of(model):
  """Makes the head of one layer's model give out the states themselves."""
  width = model.head.kernel.shape[0]
  model.head = nnx.Linear(
    width, width, param_dtype=model.head.param_dtype, rngs=nnx.Rngs(0)
  )
  model.head.kernel[...] = jnp.eye(width)
  return model


# --------------------------------------------------------------- the equations


# Of the three sequences; what comes after is not read, be it nan.
LENGTHS = np.array([5, 2, 4])


@every_kind
@pytest.mark.parametrize('bidirectional', [False, True])
def test_each_sequence_gives_what_its_own_unrolled_loop_does(
  float64, kind, bidirectional
):
  kwargs = {'widths': (4, 5), 'bidirectional': bidirectional}
  every = make(kind, **kwargs, head='every')
  last = make(kind, **kwargs, head='last')
  x = np.asarray(sequences())
  inside = np.arange(5) < LENGTHS[:, None]
  padded = jnp.asarray(np.where(inside[..., None], x, np.nan))

  @jax.jit
  def both(x):
    return every(x, lengths=LENGTHS), last(x, lengths=LENGTHS)

  for one, length, each, end in zip(x, LENGTHS, *both(padded), strict=True):
    hs = recurrences.layers(every.blocks, one[:length])
    np.testing.assert_allclose(
      each[:length], recurrences.dense(every.head, hs), rtol=1e-10
    )
    # Going back, the last state is the one at the first step.
    states = np.concatenate([hs[-1, :5], hs[0, 5:]])
    np.testing.assert_allclose(
      end, recurrences.dense(last.head, states), rtol=1e-10
    )


@pytest.mark.parametrize(
  ('kind', 'expected'),
  [
    # W29, and W30 in both conventions.
    ('lstm', [0.1742697187, 0.5008593805, 0.7700232952]),
    ('gru', [0.2876491366, 0.6790387451, 0.9094604062]),
    ('gru reset after', [0.1744680206, 0.3290781119, 0.4242780370]),
  ],
)
def test_a_cell_of_halves_gives_the_figures_of_the_course(
  float64, kind, expected
):
  model = make(kind, num_features=1, num_classes=1, widths=(1,), head='every')

  def halves(path, leaf):
    value = 0 if 'bias' in jax.tree_util.keystr(path) else 0.5
    return jnp.full_like(leaf, value)

  state = nnx.state(model)
  nnx.update(model, jax.tree_util.tree_map_with_path(halves, state))
  found = outputs_of(model)(jnp.array([[1.0, 2.0, 3.0]]))
  np.testing.assert_allclose(found.ravel(), expected, rtol=0, atol=5e-11)


@pytest.mark.parametrize('kind', ['rnn', 'lstm'])
def test_reversing_the_input_swaps_the_halves(float64, kind):
  # W31, where both directions have the same weights.
  model = make(kind, widths=(4,), bidirectional=True, head='every')
  model = outputs_of(model)
  nnx.update(model.blocks[0].backward, nnx.state(model.blocks[0].forward))
  x = sequences()
  forth, back = np.split(np.asarray(model(x)), 2, axis=-1)
  reversed_forth, reversed_back = np.split(
    np.asarray(model(x[:, ::-1]))[:, ::-1], 2, axis=-1
  )
  np.testing.assert_allclose(forth, reversed_back, rtol=1e-12)
  np.testing.assert_allclose(back, reversed_forth, rtol=1e-12)
  assert not np.allclose(forth, back)


@pytest.mark.parametrize('activation', ['tanh', 'relu'])
def test_gradients_vanish_or_explode_with_the_spectral_radius(
  float64, activation
):
  # W32. Where both activations have slope 1, a step back multiplies by U: of a
  # rotation (for ReLU, which must stay above 0, a permutation) times a radius
  # the norm is radius^t exactly.
  model = filled('rnn', activation=activation, widths=(4,), num_features=4)
  cell = model.blocks[0].forward
  turn = np.linalg.qr(np.random.default_rng(0).normal(size=(4, 4)))[0]
  if activation == 'relu':
    turn = np.roll(np.eye(4), 1, axis=0)
  cell.kernel[...] = jnp.eye(4)
  cell.bias[...] = jnp.zeros(4)
  graphdef, params = nnx.split(model)
  x = jnp.full((1, 20, 4), 1.0 if activation == 'relu' else 0.0)
  grad = jax.jit(jax.grad(lambda x, p: nnx.merge(graphdef, p)(x).sum()))
  for radius in (0.5, 1.0, 2.0):
    cell.recurrent_kernel[...] = radius * jnp.asarray(turn)
    norms = np.linalg.norm(grad(x, nnx.state(model))[0], axis=-1)
    np.testing.assert_allclose(
      norms / norms[-1], radius ** np.arange(19.0, -1, -1), rtol=1e-9
    )


# ---------------------------------------------------------------- parameters


@pytest.mark.parametrize(
  ('name', 'kwargs', 'count'),
  [
    # Of each gate (features + width) * width weights and one bias.
    ('lstm', {}, 394_240),
    ('gru', {}, 3 * 256 * (128 + 256 + 1)),
    ('gru', {'reset_after': True}, 3 * 256 * (128 + 256 + 1) + 256),
    ('rnn', {}, 256 * (128 + 256 + 1)),
    ('lstm', {'bidirectional': True}, 2 * 394_240),
    ('lstm', {'widths': (256, 64)}, 394_240 + 4 * 64 * (256 + 64 + 1)),
    (
      'lstm',
      {'widths': (256, 64), 'bidirectional': True},
      2 * (394_240 + 4 * 64 * (512 + 64 + 1)),
    ),
  ],
)
def test_the_layers_have_as_many_parameters_as_the_formula(name, kwargs, count):
  model = shaped(name, num_features=128, **{'widths': (256,)} | kwargs)
  assert models.count_parameters(model.blocks) == count


def test_tokens_are_embedded_as_wide_as_the_first_layer_or_as_told():
  model = shaped('lstm', vocab_size=65, widths=(32, 16))
  assert model.embed.embedding.shape == (65, 32)
  assert model.blocks[0].forward.kernel.shape == (32, 4 * 32)
  model = shaped('lstm', vocab_size=65, widths=(32, 16), embed_width=8)
  assert model.embed.embedding.shape == (65, 8)
  assert model.blocks[0].forward.kernel.shape == (8, 4 * 32)


def test_an_lstm_starts_orthogonal_and_by_remembering():
  cell = jax.jit(lambda: nnx.state(cells.LSTMCell(3, 6, rngs=nnx.Rngs(0))))()
  gates = np.split(np.asarray(cell['recurrent_kernel'][...]), 4, axis=1)
  for gate in gates:
    np.testing.assert_allclose(gate @ gate.T, np.eye(6), atol=1e-5)
  assert len({gate[0, 0] for gate in gates}) == 4
  # Of i, f, g and o only the forget gate has a bias.
  biases = np.split(np.asarray(cell['bias'][...]), 4)
  assert [set(bias.tolist()) for bias in biases] == [{0}, {1}, {0}, {0}]


def test_a_recurrent_kernel_with_relu_starts_as_the_identity():
  cell = cells.RNNCell(3, 6, activation='relu', rngs=nnx.Rngs(0))
  assert np.array_equal(cell.recurrent_kernel[...], np.eye(6))


# -------------------------------------------------------------------- inputs


def test_an_image_is_read_row_by_row(float64):
  model = filled(num_features=6)
  rows = sequences(features=6)
  image = rows.reshape(3, 5, 2, 3)
  np.testing.assert_array_equal(model(image), model(rows))


def test_a_row_of_numbers_is_read_one_by_one(float64):
  model = filled(num_features=1)
  row = sequences(features=1)[..., 0]
  np.testing.assert_array_equal(model(row), model(row[..., None]))


def test_tokens_are_rows_of_the_embedding(float64):
  model = filled(vocab_size=7, widths=(3,))
  other = filled(num_features=3, widths=(3,))
  nnx.update(other.blocks, nnx.state(model.blocks))
  nnx.update(other.head, nnx.state(model.head))
  tokens = np.random.default_rng(0).integers(0, 7, (3, 5))
  rows = model.embed.embedding[...][tokens]
  np.testing.assert_allclose(model(jnp.asarray(tokens)), other(rows))


# ------------------------------------------------------------------- lengths


@pytest.mark.parametrize('name', ['gru', 'lstm'])
def test_padding_leaves_the_gradient_as_it_is(float64, name):
  graphdef, params = nnx.split(filled(name, widths=(4,), bidirectional=True))
  x = sequences()
  padded = x.at[:, 3:].set(np.nan)

  def loss(params, x, lengths):
    return (nnx.merge(graphdef, params)(x, lengths=lengths) ** 2).sum()

  @jax.jit
  def both(params, padded, x):
    grad = jax.grad(loss, argnums=(0, 1))
    return grad(params, padded, jnp.full(3, 3)), grad(params, x, None)

  (found, found_x), expected = both(params, padded, x[:, :3])
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-14),
    (found, found_x[:, :3]),
    expected,
  )
  assert not np.any(found_x[:, 3:])


def test_outputs_are_finite_where_nothing_is_read():
  model = filled(head='every', bidirectional=True)
  x = sequences().at[:, 2:].set(np.nan)
  found = jax.jit(model)(x, lengths=jnp.array([2, 1, 0]))
  assert np.all(np.isfinite(found))


def test_lengths_of_all_steps_change_nothing():
  model = filled(bidirectional=True)
  x = sequences()

  @jax.jit
  def both(x):
    return model(x, lengths=jnp.full(3, 5)), model(x)

  np.testing.assert_allclose(*both(x), rtol=1e-5)


# ------------------------------------------------------------------- dropout


def test_dropout_is_between_layers_and_before_the_head():
  model = filled(widths=(4, 4), dropout=0.5)
  x, rngs = sequences(), nnx.Rngs(dropout=0)
  assert not np.allclose(model(x, train=True, rngs=rngs), model(x))
  assert np.array_equal(model(x), model(x, train=False, rngs=rngs))
  # Of a head that reads nothing the bias stays.
  model.dropout = nnx.Dropout(1.0)
  np.testing.assert_array_equal(
    model(x, train=True, rngs=rngs), jnp.tile(model.head.bias[...], (3, 1))
  )


def test_dropout_spares_the_step_from_state_to_state():
  # One layer: with dropout, each output is the state's, or scaled, never a
  # consequence of an earlier drop.
  model = filled('rnn', widths=(50,), dropout=0.5, head='every')
  model = outputs_of(model)
  x = sequences()
  kept = model(x, train=True, rngs=nnx.Rngs(dropout=0))
  exact = np.asarray(model(x))
  dropped = np.asarray(kept == 0)
  np.testing.assert_allclose(kept, np.where(dropped, 0, 2 * exact), rtol=1e-5)
  # Of 750 the share spreads by 0.018: five times that.
  assert abs(dropped.mean() - 0.5) < 0.09


# -------------------------------------------------------------------- dtypes


def test_bfloat16_computes_in_it_and_remembers_in_float32():
  kwargs = {'vocab_size': 7, 'widths': (8, 8), 'head': 'every'}
  model, exact = (filled(dtype=d, **kwargs) for d in (jnp.bfloat16, None))
  tokens = jnp.arange(14).reshape(2, 7) % 7
  outputs, states = jax.jit(model.step)(tokens)
  assert outputs.dtype == jnp.bfloat16
  assert {s.dtype for s in jax.tree.leaves(states)} == {jnp.dtype('float32')}
  exact = jax.jit(exact)(tokens)
  error = np.abs(outputs.astype(jnp.float32) - exact).max()
  assert error < 0.05 * np.abs(exact).max()


# ------------------------------------------------------- states and sampling


@every_name
def test_reading_in_parts_is_reading_at_once(float64, name):
  model = filled(name, vocab_size=7, widths=(4, 3), head='every')
  tokens = jnp.asarray(np.random.default_rng(0).integers(0, 7, (3, 6)))

  @jax.jit
  def both(tokens):
    first, states = model.step(tokens[:, :2])
    second, states = model.step(tokens[:, 2:3], states)
    third, _ = model.step(tokens[:, 3:], states)
    return jnp.concatenate([first, second, third], axis=1), model(tokens)

  np.testing.assert_allclose(*both(tokens), rtol=1e-12)


def test_the_likeliest_tokens_are_those_of_the_whole_forward_pass(float64):
  model = filled(
    vocab_size=7, num_classes=7, widths=(4, 3), head='every', scale=2
  )
  prompt = jnp.asarray(np.random.default_rng(0).integers(0, 7, (3, 2)))
  found = sampling.sample(model, prompt, 5, jax.random.key(0), temperature=0)
  assert found.shape == (3, 5)
  assert found.dtype == jnp.int32
  text = jnp.concatenate([prompt, found], axis=1)
  assert np.array_equal(model(text).argmax(-1)[:, 1:-1], found)


@pytest.mark.parametrize('temperature', [0.5, 2.0])
def test_tokens_are_drawn_from_the_softmax_at_that_temperature(temperature):
  model = filled(
    vocab_size=4, num_classes=4, widths=(3,), head='every',
  )  # fmt: skip
  n = 20_000
  prompt = jnp.tile(jnp.array([[0, 3]]), (n, 1))

  @jax.jit
  def draw(seed):
    key = jax.random.key(seed)
    return sampling.sample(model, prompt, 2, key, temperature)

  found = draw(0)
  # The second token follows each first that may be drawn.
  texts = jnp.array([[0, 3, token] for token in range(4)])
  odds = np.exp(np.float64(model(texts)[:, 1:]) / temperature)
  shares = odds / odds.sum(-1, keepdims=True)
  expected = shares[0, 0, :, None] * shares[:, 1]
  pairs = np.bincount(4 * found[:, 0] + found[:, 1], minlength=16)
  # Five times the spread of a share.
  bound = 5 * np.sqrt(expected * (1 - expected) / n)
  assert np.all(np.abs(pairs.reshape(4, 4) / n - expected) < bound)
  assert not np.array_equal(draw(1), found)


# ------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
  ('kwargs', 'message'),
  [
    (
      {},
      'num_features is None and vocab_size is None; one of them is needed',
    ),
    (
      {'num_features': 3, 'vocab_size': 4},
      'num_features is 3 and vocab_size is 4; one of them is needed',
    ),
    ({'num_features': 0}, 'num_features is 0; it takes whole numbers'),
    ({'vocab_size': -1}, 'vocab_size is -1; it takes whole numbers'),
    (
      {'vocab_size': 4, 'embed_width': 0},
      'embed_width is 0; it takes whole numbers',
    ),
    (
      {'num_features': 3, 'embed_width': 4},
      'embed_width is 4, but numbers are not embedded',
    ),
    (
      {'num_features': 3, 'num_classes': 0},
      'num_classes is 0; it takes whole numbers',
    ),
    (
      {'num_features': 3, 'head': 'first'},
      "head 'first' is unknown; there are last, every",
    ),
    ({'num_features': 3, 'widths': ()}, 'widths is (); it takes the width of'),
    ({'num_features': 3, 'widths': 8}, 'widths is 8; it takes the width of'),
    (
      {'num_features': 3, 'widths': (8, 0)},
      'widths is (8, 0); it takes whole numbers of at least 1',
    ),
    ({'num_features': 3, 'dropout': 2}, 'dropout is 2; it takes a share'),
  ],
)
def test_what_cannot_be_made_is_said_in_one_line(kwargs, message):
  for name in NAMES:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
      shaped(name, **kwargs)
    assert '\n' not in str(caught.value)


def test_an_unknown_activation_is_refused_with_those_there_are():
  message = "activation 'gelu' is unknown; there are tanh, relu"
  with pytest.raises(ValueError, match=re.escape(message)):
    shaped('rnn', num_features=3, activation='gelu')


@pytest.mark.parametrize(
  ('kwargs', 'shape', 'dtype', 'message'),
  [
    (
      {'num_features': 3},
      (2, 5, 4),
      'float32',
      'num_features is 3; inputs of shape (2, 5, 4) have 4 numbers a step',
    ),
    ({'num_features': 3}, (5,), 'float32', 'inputs of shape (5,) are not'),
    (
      {'vocab_size': 3},
      (2, 5),
      'float32',
      'inputs of shape (2, 5) and float32 are no tokens',
    ),
    ({'vocab_size': 3}, (2, 5, 1), 'int32', 'are no tokens'),
  ],
)
def test_inputs_that_do_not_fit_are_refused(kwargs, shape, dtype, message):
  inputs = jax.ShapeDtypeStruct(shape, dtype)
  model = shaped('lstm', **kwargs)
  with pytest.raises(ValueError, match=re.escape(message)):
    nnx.eval_shape(lambda model, x: model(x), model, inputs)


@pytest.mark.parametrize('kwargs', [{'head': 'last'}, {'bidirectional': True}])
def test_only_a_model_that_reads_forth_can_write_on(kwargs):
  model = filled(vocab_size=4, **{'head': 'every'} | kwargs)
  prompt = jnp.zeros((1, 2), int)
  with pytest.raises(ValueError, match='needs bidirectional=False and head='):
    sampling.sample(model, prompt, 3, jax.random.key(0))


@pytest.mark.parametrize(
  ('prompt', 'kwargs', 'message'),
  [
    ((1, 0), {}, 'the prompt is empty'),
    ((1, 2), {'num_tokens': 0}, 'num_tokens is 0; it takes whole numbers'),
    ((1, 2), {'temperature': -1.0}, 'temperature is -1.0; it takes at least 0'),
  ],
)
def test_what_cannot_be_drawn_is_said(prompt, kwargs, message):
  model = filled(vocab_size=4, head='every')
  kwargs = {'num_tokens': 3, 'key': jax.random.key(0)} | kwargs
  with pytest.raises(ValueError, match=re.escape(message)):
    sampling.sample(model, jnp.zeros(prompt, int), **kwargs)
