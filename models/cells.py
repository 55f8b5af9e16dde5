"""Recurrent layers: a cell's scan over time, one way or both.

Time is the first axis in here, as a scan walks over the first. A state is a
tuple of arrays [B, D], what the cell gives out first.

Shapes: T time, B batch, F features, D width, G gates.
"""

from collections.abc import Callable
from collections.abc import Sequence

from flax import nnx
import jax
import jax.numpy as jnp

from kernels import sharding
from models import layers
from models import recurrence

State = tuple[jax.Array, ...]

# The state after, of a = W x + U h + b [B, D] and the one before.
_RNN_STATES = {
  'tanh': lambda a, state: (jnp.tanh(a),),
  'relu': lambda a, state: (jax.nn.relu(a),),
}


class Cell(nnx.Module):
  """One direction of one layer: [T, B, F] -> [T, B, D].

  Of `kernel` [F, G D], `recurrent_kernel` [D, G D] and `bias` [G D] each gate
  has D columns. There is one bias where PyTorch and cuDNN add two. The kernel
  starts as LeCun et al. (1998) say, the recurrent one orthogonal, gate by gate
  (Saxe et al. 2014), and the bias at 0.

  States are float32 or wider: below it, small changes would be forgotten.
  """

  gates = 1
  states = 1

  def __init__(
    self,
    features: int,
    width: int,
    *,
    dtype=None,
    param_dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    shape = (features, self.gates * width)
    kernel = nnx.initializers.lecun_normal()(rngs.params(), shape, param_dtype)
    self.kernel = nnx.Param(kernel)
    recurrent = self.recurrent_init(rngs.params(), width)
    recurrent = recurrent.swapaxes(0, 1).reshape(width, -1)
    self.recurrent_kernel = nnx.Param(recurrent.astype(param_dtype))
    self.bias = nnx.Param(self.bias_init(width).astype(param_dtype))
    self.width, self.dtype = width, dtype

  def recurrent_init(self, key: jax.Array, width: int) -> jax.Array:
    """The first recurrent kernel of each gate: [G, D, D]."""
    return jax.random.orthogonal(key, width, (self.gates,))

  def bias_init(self, width: int) -> jax.Array:
    """The first bias: [G D]."""
    return jnp.zeros(self.gates * width)

  def scan(self, x, kernel, recurrent_kernel, bias, state, mask, reverse):
    """The outputs [T, B, D] and the last state."""
    return recurrence.run(
      self.next_state,
      x,
      kernel,
      recurrent_kernel,
      bias,
      state,
      mask,
      reverse=reverse,
    )

  def __call__(
    self,
    x: jax.Array,
    state: State | None = None,
    mask: jax.Array | None = None,
    *,
    reverse: bool = False,
  ) -> tuple[jax.Array, State]:
    """The outputs and the last state.

    Args:
      x: [T, B, F].
      state: before the first step; None for zeros.
      mask: bool [T, B, 1]; where it is False the state stays as it is.
      reverse: from the last step to the first.
    """
    x, kernel, recurrent, bias = nnx.nn.dtypes.promote_dtype(
      (x, self.kernel[...], self.recurrent_kernel[...], self.bias[...]),
      dtype=self.dtype,
    )
    if state is None:
      dtype = jnp.promote_types(x.dtype, jnp.float32)
      zeros = jnp.zeros((x.shape[1], self.width), dtype)
      state = (sharding.by_rows(zeros),) * self.states
    hs, state = self.scan(x, kernel, recurrent, bias, state, mask, reverse)
    return hs.astype(x.dtype), state


class RNNCell(Cell):
  """h' = a(W x + U h + b) of Elman (1990), a being tanh or ReLU.

  With ReLU the recurrent kernel starts as the identity (Le, Jaitly & Hinton
  2015).
  """

  def __init__(
    self,
    features: int,
    width: int,
    *,
    activation: str = 'tanh',
    dtype=None,
    param_dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    self.activation = activation
    self.next_state = layers.lookup('activation', activation, _RNN_STATES)
    super().__init__(
      features, width, dtype=dtype, param_dtype=param_dtype, rngs=rngs
    )

  def recurrent_init(self, key, width):
    if self.activation == 'relu':
      return jnp.eye(width)[None]
    return super().recurrent_init(key, width)


class GRUCell(Cell):
  """The gated recurrent unit, gates r (reset), z (update) and n (new).

  h' = (1 - z) h + z n and n = tanh(W x + U (r h) + b), as Chung et al. (2014,
  section 3.2) write what Cho et al. (2014) introduced with z and 1 - z
  changed over. With `reset_after` h' = (1 - z) n + z h and
  n = tanh(W x + b + r (U h + c)), as PyTorch and cuDNN compute it; c is
  `recurrent_bias` [D]. These are two networks: neither becomes the other by
  other weights.
  """

  gates = 3

  def __init__(
    self,
    features: int,
    width: int,
    *,
    reset_after: bool = False,
    dtype=None,
    param_dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    super().__init__(
      features, width, dtype=dtype, param_dtype=param_dtype, rngs=rngs
    )
    self.recurrent_bias = (
      nnx.Param(jnp.zeros((width,), param_dtype)) if reset_after else None
    )

  def scan(self, x, kernel, recurrent_kernel, bias, state, mask, reverse):
    x = x @ kernel + bias
    if self.recurrent_bias is None:
      return _gru(x, recurrent_kernel, state, mask, reverse)
    bias = self.recurrent_bias[...].astype(x.dtype)
    return _gru_reset_after(x, recurrent_kernel, bias, state, mask, reverse)


class LSTMCell(Cell):
  """Long short-term memory, gates i, f, g and o; its state is (h, c).

  c' = f c + i g and h' = o tanh(c') (Hochreiter & Schmidhuber 1997, with the
  forget gate of Gers et al. 2000 and no peepholes). g, the candidate, is a
  tanh; some lectures write a sigmoid there, which could only ever add. The bias
  of f starts at 1 (Gers et al. 2000; Jozefowicz et al. 2015).
  """

  gates = 4
  states = 2

  def bias_init(self, width):
    return jnp.zeros(4 * width).at[width : 2 * width].set(1)

  @staticmethod
  def next_state(a: jax.Array, state: State) -> State:
    """The state after, of a = W x + U h + b [B, 4 D] and the one before."""
    i, f, g, o = jnp.split(a, 4, axis=-1)
    c = jax.nn.sigmoid(f) * state[1] + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o) * jnp.tanh(c), c


# ----------------------------------------------------------------- recurrences


def _gru(x, kernel, state, mask, reverse):
  gates, new = jnp.split(kernel, [2 * kernel.shape[0]], axis=1)

  def step(x, state):
    h = state[0]
    x_gates, x_new = jnp.split(x, [2 * h.shape[1]], axis=1)
    r, z = jnp.split(jax.nn.sigmoid(x_gates + _product(h, gates)), 2, axis=1)
    n = jnp.tanh(x_new + _product(r * h, new))
    return ((1 - z) * h + z * n,)

  return _scan(step, x, state, mask, reverse)


def _gru_reset_after(x, kernel, bias, state, mask, reverse):
  def step(x, state):
    h = state[0]
    x_r, x_z, x_n = jnp.split(x, 3, axis=1)
    h_r, h_z, h_n = jnp.split(_product(h, kernel), 3, axis=1)
    r, z = jax.nn.sigmoid(x_r + h_r), jax.nn.sigmoid(x_z + h_z)
    n = jnp.tanh(x_n + r * (h_n + bias))
    return ((1 - z) * n + z * h,)

  return _scan(step, x, state, mask, reverse)


def _product(h, kernel):
  return h.astype(kernel.dtype) @ kernel


def _scan(
  step: Callable[[jax.Array, State], State],
  x: jax.Array,
  state: State,
  mask: jax.Array | None,
  reverse: bool,
) -> tuple[jax.Array, State]:
  """The outputs [T, B, D] and the last state of step(x[t], state) -> state."""

  def body(state, inputs):
    x, inside = inputs
    new = tuple(
      s.astype(old.dtype) for s, old in zip(step(x, state), state, strict=True)
    )
    if inside is not None:
      new = jax.tree.map(lambda n, old: jnp.where(inside, n, old), new, state)
    return new, new[0]

  state, hs = jax.lax.scan(body, state, (x, mask), reverse=reverse)
  return hs, state


# ---------------------------------------------------------------------- layers


class Layer(nnx.Module):
  """A cell, or one each way side by side: [T, B, F] -> [T, B, D or 2 D].

  Args:
    cell: (features, width, **kwargs) -> Cell.
    features: F.
    width: D, of each direction.
    bidirectional: Schuster & Paliwal (1997); the backward cell begins at each
      sequence's own end.
    **kwargs: of both cells.
  """

  def __init__(
    self,
    cell: Callable[..., Cell],
    features: int,
    width: int,
    *,
    bidirectional: bool,
    **kwargs,
  ):
    self.forward = cell(features, width, **kwargs)
    self.backward = cell(features, width, **kwargs) if bidirectional else None

  def __call__(
    self,
    x: jax.Array,
    states: Sequence[State] | None = None,
    mask: jax.Array | None = None,
  ) -> tuple[jax.Array, tuple[State, ...]]:
    """The outputs, and the last state of each direction."""
    first = states[0] if states is not None else None
    hs, state = self.forward(x, first, mask)
    if self.backward is None:
      return hs, (state,)
    first = states[1] if states is not None else None
    back, back_state = self.backward(x, first, mask, reverse=True)
    return jnp.concatenate([hs, back], axis=-1), (state, back_state)


def stack(
  cell: Callable[..., Cell],
  features: int,
  widths: Sequence[int],
  *,
  bidirectional: bool = False,
  **kwargs,
) -> nnx.List:
  """One layer for each of `widths`, each fed by the one before."""
  blocks = []
  for width in widths:
    blocks.append(
      Layer(cell, features, width, bidirectional=bidirectional, **kwargs)
    )
    features = 2 * width if bidirectional else width
  return nnx.List(blocks)


def run(
  blocks: Sequence[Layer],
  x: jax.Array,
  states: Sequence[Sequence[State]] | None = None,
  mask: jax.Array | None = None,
  *,
  between: Callable[[jax.Array], jax.Array] = layers.identity,
) -> tuple[jax.Array, tuple[tuple[State, ...], ...]]:
  """Layer after layer: [T, B, F] -> [T, B, D], and the last states of each.

  Args:
    blocks: as `stack` makes them.
    x: [T, B, F].
    states: of each layer, as this gives them; None for zeros.
    mask: bool [T, B, 1]; what is beyond it is not read, be it nan.
    between: of what one layer gives to the next.
  """
  if mask is not None:
    x = jnp.where(mask, x, 0)
  last = []
  for i, block in enumerate(blocks):
    if i > 0:
      x = between(x)
    x, state = block(x, None if states is None else states[i], mask)
    last.append(state)
  return x, tuple(last)


def inside(lengths: jax.Array | None, steps: int) -> jax.Array | None:
  """bool [T, B, 1], True up to each length [B]; None for None."""
  if lengths is None:
    return None
  return (jnp.arange(steps)[:, None] < lengths)[..., None]
