"""RNN, GRU and LSTM against torch.nn: every layer, direction and length."""

import itertools

from flax import nnx
import jax
import numpy as np
import pytest

from models import cells
from models import convert
from models import rnn
from tests.parity import weights

torch = pytest.importorskip('torch')
pytestmark = pytest.mark.parity

LENGTHS = np.array([5, 9, 1, 3])
# Name -> our class, theirs, and what both are made with.
KINDS = {
  'tanh': (rnn.RNN, 'RNN', {'activation': 'tanh'}, {'nonlinearity': 'tanh'}),
  'relu': (rnn.RNN, 'RNN', {'activation': 'relu'}, {'nonlinearity': 'relu'}),
  'gru': (rnn.GRU, 'GRU', {'reset_after': True}, {}),
  'lstm': (rnn.LSTM, 'LSTM', {}, {}),
}


def _make(kind, layers, bidirectional, head='every', bias=True):
  """(ours with the weights of theirs, theirs); both read 6 numbers a step."""
  ours, name, kwargs, their_kwargs = KINDS[kind]
  torch.manual_seed(0)
  theirs = getattr(torch.nn, name)(
    6, 8, layers, bias=bias, bidirectional=bidirectional, batch_first=True,
    **their_kwargs,
  )  # fmt: skip
  model = ours(
    6, 3, widths=(8,) * layers, bidirectional=bidirectional, head=head,
    rngs=nnx.Rngs(0), **kwargs,
  )  # fmt: skip
  report = convert.from_torch(model, theirs.state_dict(), layout='torch')
  assert not report.unused
  assert report.missing == ('head/bias', 'head/kernel')
  return model, theirs


def _inputs():
  rng = np.random.default_rng(0)
  return rng.normal(size=(4, 9, 6)).astype(np.float32)


def _before_the_head(model, inputs, lengths):
  """(outputs [B, T, D], states of each layer and direction)."""
  graphdef, state = nnx.split(model)

  @jax.jit
  def run(state):
    mask = cells.inside(lengths, inputs.shape[1])
    blocks = nnx.merge(graphdef, state).blocks
    return cells.run(blocks, inputs.swapaxes(0, 1), None, mask)

  outputs, states = run(state)
  return outputs.swapaxes(0, 1), states


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('lengths', [None, LENGTHS], ids=['whole', 'lengths'])
@pytest.mark.parametrize(('layers', 'bidirectional'), [(1, False), (3, True)])
def test_outputs_and_last_states_agree(kind, layers, bidirectional, lengths):
  ours, theirs = _make(kind, layers, bidirectional)
  inputs = torch.from_numpy(_inputs())
  if lengths is None:
    with torch.no_grad():
      expected, last = theirs(inputs)
  else:
    packed = torch.nn.utils.rnn.pack_padded_sequence(
      inputs, lengths, batch_first=True, enforce_sorted=False
    )
    with torch.no_grad():
      expected, last = theirs(packed)
    expected, _ = torch.nn.utils.rnn.pad_packed_sequence(
      expected, batch_first=True, total_length=9
    )
  found, states = _before_the_head(ours, _inputs(), lengths)
  steps = np.arange(9) < (9 if lengths is None else lengths[:, None])
  weights.assert_close(
    np.where(steps[..., None], found, 0),
    np.where(steps[..., None], expected, 0),
  )
  flat = [*itertools.chain(*states)]  # Layer by layer, forward then backward.
  last = last if kind == 'lstm' else (last,)
  assert len(flat) == len(last[0])
  for number, state in enumerate(flat):
    assert len(state) == len(last)
    for array, wanted in zip(state, last, strict=True):
      weights.assert_close(array, wanted[number])


@pytest.mark.parametrize('kind', KINDS)
def test_layers_without_biases_agree(kind):
  ours, theirs = _make(kind, 2, True, bias=False)
  with torch.no_grad():
    expected, _ = theirs(torch.from_numpy(_inputs()))
  found, _ = _before_the_head(ours, _inputs(), None)
  weights.assert_close(found, expected)


@pytest.mark.parametrize('kind', KINDS)
def test_many_to_one_reads_their_last_state(kind):
  ours, theirs = _make(kind, 2, True, head='last')
  packed = torch.nn.utils.rnn.pack_padded_sequence(
    torch.from_numpy(_inputs()), LENGTHS, batch_first=True, enforce_sorted=False
  )
  with torch.no_grad():
    _, last = theirs(packed)
  last = last[0] if kind == 'lstm' else last
  state = np.concatenate([last[-2], last[-1]], axis=1)
  expected = state @ np.asarray(ours.head.kernel) + np.asarray(ours.head.bias)
  found, _ = weights.forward(ours, _inputs(), lengths=LENGTHS)
  weights.assert_close(found, expected)


@pytest.mark.parametrize('kind', KINDS)
def test_gradients_agree(kind):
  ours, theirs = _make(kind, 2, True)
  graphdef, state = nnx.split(ours)

  @jax.jit
  @jax.grad
  def grad(state):
    blocks = nnx.merge(graphdef, state, copy=True).blocks
    mask = cells.inside(LENGTHS, 9)
    _, states = cells.run(blocks, _inputs().swapaxes(0, 1), None, mask)
    return sum((state[0] ** 2).sum() for pair in states for state in pair)

  packed = torch.nn.utils.rnn.pack_padded_sequence(
    torch.from_numpy(_inputs()), LENGTHS, batch_first=True, enforce_sorted=False
  )
  _, last = theirs(packed)
  ((last[0] if kind == 'lstm' else last) ** 2).sum().backward()
  # A sum's gradient is that of either term: theirs of one bias is dropped,
  # but where the GRU keeps it.
  grads = {}
  for name, parameter in theirs.named_parameters():
    grads[name] = parameter.grad.numpy().copy()
    if name.startswith('bias_hh'):
      grads[name][: 16 if kind == 'gru' else None] = 0
  model = nnx.eval_shape(lambda: ours)
  expected, _ = convert.converted(model, grads, layout='torch')
  found = dict(nnx.to_flat_state(grad(state)))
  assert len(expected) == len(found) - 2  # Without the head.
  for path, array in expected.items():
    weights.assert_close(found[path][...], array, path)
