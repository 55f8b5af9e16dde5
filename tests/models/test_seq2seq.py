"""Sequence to sequence against a loop in NumPy, and against itself."""

import re

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from tests.models import recurrences

KINDS = {
  'lstm': {},
  'lstm both ways': {'bidirectional': True},
  'gru both ways': {'cell': 'gru', 'bidirectional': True},
}
every_kind = pytest.mark.parametrize('kind', KINDS)
LENGTHS = np.array([5, 2, 4])
TOKENS = np.random.default_rng(0).integers(0, 7, (3, 5))
DECODER_TOKENS = np.random.default_rng(1).integers(0, 6, (3, 4))


@pytest.fixture
def float64():
  with jax.enable_x64(True):
    yield


def shaped(**kwargs):
  kwargs = {'vocab_size': 7, 'num_classes': 6, 'widths': (4, 6)} | kwargs
  return nnx.eval_shape(
    lambda: models.create('seq2seq', **kwargs, rngs=nnx.Rngs(0))
  )


def make(kind='lstm', scale=0.7, **kwargs):
  """A model whose parameters are NumPy's."""
  dtype = jnp.float64 if jax.config.jax_enable_x64 else jnp.float32
  model = shaped(**KINDS[kind] | {'param_dtype': dtype} | kwargs)
  random = np.random.default_rng(0)

  def numbers(leaf):
    return jnp.asarray(scale * random.normal(size=leaf.shape), leaf.dtype)

  nnx.update(model, jax.tree.map(numbers, nnx.state(model)))
  return model


def reference(model, tokens, decoder_tokens):
  """The logits for one pair of sequences, as the paper writes them."""
  x = np.asarray(model.embed.embedding[...])[tokens]
  states = []
  for block in model.blocks:
    cells = [(block.forward, 1)]
    if block.backward is not None:
      cells.append((block.backward, -1))
    both = [(recurrences.unrolled(c, x[::way]), way) for c, way in cells]
    x = np.concatenate([hs[::way] for (hs, _), way in both], axis=1)
    ends = zip(*(state for (_, state), _ in both), strict=True)
    states.append(tuple(np.concatenate(parts) for parts in ends))
  y = np.asarray(model.decoder_embed.embedding[...])[decoder_tokens]
  for block, state in zip(model.decoder, states, strict=True):
    y, _ = recurrences.unrolled(block.forward, y, state)
  rows = []
  for h in y:
    odds = np.exp(x @ recurrences.dense(model.score, h))
    context = odds @ x / odds.sum()
    both = np.concatenate([context, h])
    rows.append(np.tanh(recurrences.dense(model.combine, both)))
  return recurrences.dense(model.head, np.array(rows))


@every_kind
def test_each_pair_of_sequences_gives_what_its_own_loop_does(float64, kind):
  model = make(kind)
  # What comes after the end is not read, be it no token.
  inside = np.arange(5) < LENGTHS[:, None]
  found = jax.jit(model)(
    jnp.where(inside, TOKENS, 10_000),
    decoder_tokens=DECODER_TOKENS,
    lengths=LENGTHS,
  )
  for i, length in enumerate(LENGTHS):
    expected = reference(model, TOKENS[i, :length], DECODER_TOKENS[i])
    np.testing.assert_allclose(found[i], expected, rtol=1e-10)


@every_kind
def test_weights_sum_to_one_over_what_is_inside(kind):
  model = make(kind)
  random = np.random.default_rng(0)
  queries, memory = (
    jnp.asarray(random.normal(size=(3, n, 6)), 'float32') for n in (4, 5)
  )
  weights = np.asarray(model.attention(queries, memory, LENGTHS))
  assert weights.shape == (3, 4, 5)
  np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-6)
  inside = np.arange(5) < LENGTHS[:, None, None]
  assert np.all((weights > 0) == inside)


def test_an_empty_sequence_is_finite_and_so_are_its_gradients():
  graphdef, params = nnx.split(make(widths=(4,), bidirectional=True))

  def total(params):
    return nnx.merge(graphdef, params)(
      TOKENS, decoder_tokens=DECODER_TOKENS, lengths=jnp.array([0, 5, 0])
    ).sum()

  for leaf in jax.tree.leaves(jax.jit(jax.value_and_grad(total))(params)):
    assert np.all(np.isfinite(leaf))


@every_kind
def test_each_greedy_token_is_the_likeliest_after_those_before(float64, kind):
  model = make(kind, scale=1.5)

  @jax.jit
  def both(tokens):
    found = model.greedy(tokens, 6, lengths=LENGTHS, start=1)
    before = jnp.pad(found[:, :-1], ((0, 0), (1, 0)), constant_values=1)
    return found, model(tokens, decoder_tokens=before, lengths=LENGTHS)

  found, logits = both(TOKENS)
  assert found.shape == (3, 6)
  assert found.dtype == jnp.int32
  assert np.array_equal(found, logits.argmax(-1))
  assert len(set(found.ravel().tolist())) > 1


def test_an_output_does_not_depend_on_later_ones():
  model = jax.jit(make())
  other = DECODER_TOKENS.copy()
  other[:, 2:] = (other[:, 2:] + 1) % 6
  one, two = (
    model(TOKENS, decoder_tokens=tokens) for tokens in (DECODER_TOKENS, other)
  )
  np.testing.assert_allclose(one[:, :2], two[:, :2], rtol=1e-6)
  assert np.all(one[:, 2:] != two[:, 2:])


def test_dropout_is_for_training_alone():
  model = make(dropout=1.0)
  kwargs = {'decoder_tokens': DECODER_TOKENS, 'rngs': nnx.Rngs(dropout=0)}
  # Of a head that reads nothing the bias stays.
  found = model(TOKENS, train=True, **kwargs)
  np.testing.assert_array_equal(found[0, 0], model.head.bias[...])
  exact = make()(TOKENS, decoder_tokens=DECODER_TOKENS)
  np.testing.assert_array_equal(model(TOKENS, **kwargs), exact)


def test_both_ways_have_half_the_width_each():
  # Of each gate (inputs + width + 1) * width, 4 of them, 2 of the halves.
  model = shaped(widths=(8,), embed_width=3, bidirectional=True)
  assert models.count_parameters(model.blocks) == 2 * 4 * 4 * (3 + 4 + 1)
  assert models.count_parameters(model.decoder) == 4 * 8 * (3 + 8 + 1)
  rest = (7 + 6) * 3 + 8 * 8 + 16 * 8 + (8 + 1) * 6
  assert models.count_parameters(model) == rest + 256 + 384


def test_bfloat16_computes_in_it_and_stores_float32():
  model = make(dtype=jnp.bfloat16)
  outputs = jax.eval_shape(
    lambda: model(TOKENS, decoder_tokens=DECODER_TOKENS, lengths=LENGTHS)
  )
  assert outputs.dtype == jnp.bfloat16
  stored = {x.dtype for x in jax.tree.leaves(nnx.state(model))}
  assert stored == {jnp.dtype('float32')}
  assert jax.eval_shape(lambda: model.greedy(TOKENS, 3)).shape == (3, 3)


@pytest.mark.parametrize(
  ('kwargs', 'message'),
  [
    ({'cell': 'rnn'}, "cell 'rnn' is unknown; there are lstm, gru"),
    ({'widths': ()}, 'widths is (); it takes the width of each layer'),
    (
      {'widths': (4, 3), 'bidirectional': True},
      'widths is (4, 3); where bidirectional is true each direction has half',
    ),
    ({'vocab_size': 0}, 'vocab_size is 0; it takes whole numbers'),
    ({'num_classes': 0}, 'num_classes is 0; it takes whole numbers'),
    ({'embed_width': 0}, 'embed_width is 0; it takes whole numbers'),
    ({'dropout': -1}, 'dropout is -1; it takes a share'),
  ],
)
def test_what_cannot_be_made_is_said_in_one_line(kwargs, message):
  with pytest.raises(ValueError, match=re.escape(message)) as caught:
    shaped(**kwargs)
  assert '\n' not in str(caught.value)


def test_numbers_are_no_tokens():
  with pytest.raises(ValueError, match='^tokens of shape .* are no tokens'):
    make()(np.ones((3, 5)), decoder_tokens=DECODER_TOKENS)
  with pytest.raises(ValueError, match='^decoder_tokens of shape'):
    make()(TOKENS, decoder_tokens=np.ones((3, 4, 1), int))
