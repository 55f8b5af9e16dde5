"""Recurrent networks: Elman's RNN, the GRU and the LSTM, of any depth.

One answer for a sequence (many to one), or one for each step (many to many): a
tagger, or a language model of characters. cells.py has the equations.

Shapes: B batch, T time, F features, D width, K classes, V vocabulary.
"""

from collections.abc import Callable
from collections.abc import Sequence
import functools

from flax import nnx
import jax
import jax.numpy as jnp

from models import cells
from models import layers

# Whether there is an output for each step: many to one, and many to many.
HEADS = {'last': False, 'every': True}

# Of each layer, of each direction, what a cell remembers.
States = tuple[tuple[cells.State, ...], ...]


class Recurrent(nnx.Module):
  """Recurrent layers and a head: [B, T, ...] -> [B, K] or [B, T, K].

  Reads numbers [B, T, ...], each step as a row of F (an image row by row), or
  tokens, int [B, T]: exactly one of num_features and vocab_size is given.

  Args:
    cell: of each layer, (features, width, ...) -> cells.Cell.
    num_features: F.
    num_classes: K.
    vocab_size: V.
    widths: D of each layer, of each direction.
    bidirectional: every layer reads both ways (Schuster & Paliwal 1997).
    head: 'last' reads the state after a sequence's last step (of both
      directions: after its first step, for the one that goes back); 'every'
      reads the output of each step.
    dropout: share dropped between layers and before the head, never from step
      to step (Zaremba et al. 2014).
    embed_width: numbers that a token becomes; None for the first of `widths`.
  """

  def __init__(
    self,
    cell: Callable[..., cells.Cell],
    num_features: int | None,
    num_classes: int,
    *,
    vocab_size: int | None,
    widths: Sequence[int],
    bidirectional: bool,
    head: str,
    dropout: float,
    embed_width: int | None,
    dtype,
    param_dtype,
    rngs: nnx.Rngs,
  ):
    check_widths(widths)
    if (num_features is None) == (vocab_size is None):
      raise ValueError(
        f'num_features is {num_features} and vocab_size is {vocab_size}; one '
        'of them is needed: num_features for numbers, vocab_size for tokens'
      )
    kwargs = {'dtype': dtype, 'param_dtype': param_dtype, 'rngs': rngs}
    if vocab_size is None:
      if embed_width is not None:
        raise ValueError(
          f'embed_width is {embed_width}, but numbers are not embedded; only '
          'the tokens of a vocab_size are'
        )
      layers.check_sizes(num_features=num_features, num_classes=num_classes)
      self.embed = None
    else:
      num_features = widths[0] if embed_width is None else embed_width
      layers.check_sizes(
        vocab_size=vocab_size, num_classes=num_classes, embed_width=num_features
      )
      self.embed = nnx.Embed(vocab_size, num_features, **kwargs)
    self.blocks = cells.stack(
      cell, num_features, widths, bidirectional=bidirectional, **kwargs
    )
    directions = 2 if bidirectional else 1
    self.head = nnx.Linear(directions * widths[-1], num_classes, **kwargs)
    self.dropout = layers.dropout(dropout)
    self.every = layers.lookup('head', head, HEADS)
    self.bidirectional = bidirectional
    self.num_features = num_features

  def __call__(
    self, inputs: jax.Array, *, lengths=None, train=False, rngs=None
  ) -> jax.Array:
    """[B, K], or [B, T, K] where the head is 'every'.

    Args:
      inputs: numbers [B, T, ...] or int tokens [B, T].
      lengths: int [B], steps of each sequence; what comes after is not read,
        and the outputs there mean nothing. None: all are T.
      train: with dropout, whose key is rngs.dropout().
      rngs: for training.
    """
    return self._run(inputs, None, lengths, train, rngs)[0]

  def step(
    self, inputs: jax.Array, states: States | None = None
  ) -> tuple[jax.Array, States]:
    """Goes on from `states`: (outputs [B, T, K], the states after).

    Reading a sequence in parts so gives what reading it at once does.

    Raises:
      ValueError: the head is 'last', or the model reads both ways.
    """
    if self.bidirectional or not self.every:
      raise ValueError(
        'a model that goes on from a state needs bidirectional=False and '
        "head='every'"
      )
    return self._run(inputs, states, None, False, None)

  def _run(self, inputs, states, lengths, train, rngs):
    dropout = functools.partial(
      self.dropout, deterministic=not train, rngs=rngs
    )
    x = self._features(inputs)
    mask = cells.inside(lengths, len(x))
    x, states = cells.run(self.blocks, x, states, mask, between=dropout)
    if self.every:
      x = x.swapaxes(0, 1)
    else:
      ends = [state[0] for state in states[-1]]
      x = jnp.concatenate(ends, axis=-1).astype(x.dtype)
    return self.head(dropout(x)), states

  def _features(self, inputs):
    """What the first layer reads: [T, B, F]."""
    if self.embed is not None:
      check_tokens('inputs', inputs)
      return self.embed(inputs.swapaxes(0, 1))
    if inputs.ndim < 2:
      raise ValueError(f'inputs of shape {inputs.shape} are not [B, T, ...]')
    x = inputs.reshape(*inputs.shape[:2], -1)
    if x.shape[-1] != self.num_features:
      raise ValueError(
        f'num_features is {self.num_features}; inputs of shape {inputs.shape} '
        f'have {x.shape[-1]} numbers a step'
      )
    return x.swapaxes(0, 1)


class RNN(Recurrent):
  """The plain recurrent network of Elman (1990): [B, T, ...] -> [B, K].

  Its gradients vanish or explode over long sequences (Bengio et al. 1994).

  Args:
    activation: 'tanh', or 'relu', which starts from identity matrices (Le et
      al. 2015).
    num_features, num_classes, vocab_size, widths, bidirectional, head, dropout,
      embed_width: as of Recurrent.
  """

  def __init__(
    self,
    num_features: int | None = None,
    num_classes: int = 10,
    *,
    vocab_size: int | None = None,
    widths: Sequence[int] = (128,),
    activation: str = 'tanh',
    bidirectional: bool = False,
    head: str = 'last',
    dropout: float = 0.0,
    embed_width: int | None = None,
    dtype=None,
    param_dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    super().__init__(
      functools.partial(cells.RNNCell, activation=activation),
      num_features,
      num_classes,
      vocab_size=vocab_size,
      widths=widths,
      bidirectional=bidirectional,
      head=head,
      dropout=dropout,
      embed_width=embed_width,
      dtype=dtype,
      param_dtype=param_dtype,
      rngs=rngs,
    )


class GRU(Recurrent):
  """Gated recurrent units (Cho et al. 2014): [B, T, ...] -> [B, K].

  Args:
    reset_after: the form of PyTorch and cuDNN, in place of the papers'; see
      cells.GRUCell.
    num_features, num_classes, vocab_size, widths, bidirectional, head, dropout,
      embed_width: as of Recurrent.
  """

  def __init__(
    self,
    num_features: int | None = None,
    num_classes: int = 10,
    *,
    vocab_size: int | None = None,
    widths: Sequence[int] = (128,),
    reset_after: bool = False,
    bidirectional: bool = False,
    head: str = 'last',
    dropout: float = 0.0,
    embed_width: int | None = None,
    dtype=None,
    param_dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    super().__init__(
      functools.partial(cells.GRUCell, reset_after=reset_after),
      num_features,
      num_classes,
      vocab_size=vocab_size,
      widths=widths,
      bidirectional=bidirectional,
      head=head,
      dropout=dropout,
      embed_width=embed_width,
      dtype=dtype,
      param_dtype=param_dtype,
      rngs=rngs,
    )


class LSTM(Recurrent):
  """Long short-term memory (Hochreiter & Schmidhuber 1997): -> [B, K].

  Args:
    num_features, num_classes, vocab_size, widths, bidirectional, head, dropout,
      embed_width: as of Recurrent.
  """

  def __init__(
    self,
    num_features: int | None = None,
    num_classes: int = 10,
    *,
    vocab_size: int | None = None,
    widths: Sequence[int] = (128,),
    bidirectional: bool = False,
    head: str = 'last',
    dropout: float = 0.0,
    embed_width: int | None = None,
    dtype=None,
    param_dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    super().__init__(
      cells.LSTMCell,
      num_features,
      num_classes,
      vocab_size=vocab_size,
      widths=widths,
      bidirectional=bidirectional,
      head=head,
      dropout=dropout,
      embed_width=embed_width,
      dtype=dtype,
      param_dtype=param_dtype,
      rngs=rngs,
    )


def check_widths(widths: Sequence[int]):
  """Raises a ValueError unless `widths` is a tuple of one or more sizes."""
  if not isinstance(widths, tuple | list) or not widths:
    raise ValueError(
      f'widths is {widths!r}; it takes the width of each layer, as (128, 128)'
    )
  layers.check_sizes(widths=widths)


def check_tokens(name: str, tokens: jax.Array):
  """Raises a ValueError unless `tokens` is int [B, T]."""
  if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
    raise ValueError(
      f'{name} of shape {tokens.shape} and {tokens.dtype} are no tokens, whole '
      'numbers [B, T]'
    )
