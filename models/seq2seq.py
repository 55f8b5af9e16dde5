"""Sequence to sequence with attention, after Luong, Pham & Manning (2015).

An encoder reads the whole input; a decoder that starts from its last state
writes the output, and at each step looks where in the input to read.

Shapes: B batch, T input steps, U output steps, D width, K classes (the
vocabulary of the output), V vocabulary of the input.
"""

from collections.abc import Sequence
import functools

from flax import nnx
import jax
import jax.numpy as jnp

from models import cells
from models import layers
from models import rnn

CELLS = {'lstm': cells.LSTMCell, 'gru': cells.GRUCell}


class Seq2Seq(nnx.Module):
  """Encoder, decoder, attention: int [B, T] and int [B, U] -> [B, U, K].

  Global attention with the score 'general' (section 3.1 of the paper), without
  input feeding, so that all output steps of training are one product.

  Args:
    vocab_size: V.
    num_classes: K.
    cell: 'lstm' or 'gru', of encoder and decoder.
    widths: D of each layer of the encoder, and of the decoder.
    bidirectional: the encoder reads both ways, half the width each, so that
      both last states together are the decoder's first (Klein et al. 2017).
    dropout: share dropped between layers and before the head.
    embed_width: numbers that a token becomes; None for the first of `widths`.
  """

  def __init__(
    self,
    vocab_size: int,
    num_classes: int,
    *,
    cell: str = 'lstm',
    widths: Sequence[int] = (128,),
    bidirectional: bool = False,
    dropout: float = 0.0,
    embed_width: int | None = None,
    dtype=None,
    param_dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    rnn.check_widths(widths)
    embed_width = widths[0] if embed_width is None else embed_width
    layers.check_sizes(
      vocab_size=vocab_size, num_classes=num_classes, embed_width=embed_width
    )
    if bidirectional and any(width % 2 for width in widths):
      raise ValueError(
        f'widths is {tuple(widths)}; where bidirectional is true each '
        'direction has half, so they must be even'
      )
    cell = layers.lookup('cell', cell, CELLS)
    kwargs = {'dtype': dtype, 'param_dtype': param_dtype, 'rngs': rngs}
    self.embed = nnx.Embed(vocab_size, embed_width, **kwargs)
    halves = [width // 2 for width in widths] if bidirectional else widths
    self.blocks = cells.stack(
      cell, embed_width, halves, bidirectional=bidirectional, **kwargs
    )
    self.decoder_embed = nnx.Embed(num_classes, embed_width, **kwargs)
    self.decoder = cells.stack(cell, embed_width, widths, **kwargs)
    width = widths[-1]
    self.score = nnx.Linear(width, width, use_bias=False, **kwargs)
    self.combine = nnx.Linear(2 * width, width, use_bias=False, **kwargs)
    self.head = nnx.Linear(width, num_classes, **kwargs)
    self.dropout = layers.dropout(dropout)

  def __call__(
    self,
    tokens: jax.Array,
    *,
    decoder_tokens: jax.Array,
    lengths: jax.Array | None = None,
    train=False,
    rngs=None,
  ) -> jax.Array:
    """The logits of each output token, given the right ones before it.

    Args:
      tokens: int [B, T].
      decoder_tokens: int [B, U], a start token and all outputs but the last
        (teacher forcing).
      lengths: int [B], of the inputs; what comes after is not read. None: T.
      train: with dropout, whose key is rngs.dropout().
      rngs: for training.
    """
    rnn.check_tokens('decoder_tokens', decoder_tokens)
    dropout = functools.partial(
      self.dropout, deterministic=not train, rngs=rngs
    )
    memory, states = self.encode(tokens, lengths, dropout)
    return self.decode(decoder_tokens, memory, states, lengths, dropout)[0]

  def encode(self, tokens, lengths=None, dropout=layers.identity):
    """The memory [B, T, D], and the decoder's first states."""
    rnn.check_tokens('tokens', tokens)
    x = self.embed(tokens.swapaxes(0, 1))
    mask = cells.inside(lengths, len(x))
    memory, states = cells.run(self.blocks, x, None, mask, between=dropout)
    # Of both directions as one: their widths add up to the decoder's.
    states = tuple(
      (tuple(jnp.concatenate(parts, -1) for parts in zip(*both, strict=True)),)
      for both in states
    )
    return memory.swapaxes(0, 1), states

  def decode(
    self, tokens, memory, states, lengths=None, dropout=layers.identity
  ):
    """The logits [B, U, K] after each of `tokens` [B, U], and the states."""
    x = self.decoder_embed(tokens.swapaxes(0, 1))
    x, states = cells.run(self.decoder, x, states, between=dropout)
    x = x.swapaxes(0, 1)
    context = self.attention(x, memory, lengths) @ memory
    x = jnp.tanh(self.combine(jnp.concatenate([context, x], axis=-1)))
    return self.head(dropout(x)), states

  def attention(self, queries, memory, lengths=None) -> jax.Array:
    """Where each output step looks: [B, U, D], [B, T, D] -> [B, U, T].

    Weights of at least 0, 0 past the end, whose sum is 1 (equation 7).
    """
    scores = jnp.einsum('bud,btd->but', self.score(queries), memory)
    # A softmax in bfloat16 would not sum to 1.
    wide = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
    if lengths is not None:
      inside = jnp.arange(memory.shape[1]) < lengths[:, None]
      # The least number, not -inf: an empty sequence must not be nan.
      wide = jnp.where(inside[:, None], wide, jnp.finfo(wide.dtype).min)
    return jax.nn.softmax(wide, axis=-1).astype(scores.dtype)

  def greedy(
    self, tokens: jax.Array, length: int, *, lengths=None, start: int = 1
  ) -> jax.Array:
    """The likeliest token at each step, given those before: int32 [B, length].

    Args:
      tokens: int [B, T].
      length: of the output.
      lengths: int [B], of the inputs; None: T.
      start: the decoder's first token.
    """
    memory, states = self.encode(tokens, lengths)

    def body(carry, _):
      token, states = carry
      logits, states = self.decode(token[:, None], memory, states, lengths)
      token = logits[:, 0].argmax(-1).astype(jnp.int32)
      return (token, states), token

    first = jnp.full(len(tokens), start, jnp.int32)
    _, outputs = jax.lax.scan(body, (first, states), length=length)
    return outputs.T
