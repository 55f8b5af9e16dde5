"""Drawing tokens from a language model.

Shapes: B batch, T time.
"""

from flax import nnx
import jax
import jax.numpy as jnp

from models import layers


def sample(
  model: nnx.Module,
  prompt: jax.Array,
  num_tokens: int,
  key: jax.Array,
  temperature: float = 1.0,
) -> jax.Array:
  """Goes on from a prompt: int [B, T] -> int32 [B, num_tokens].

  Each token is drawn from softmax(logits / temperature) and read in turn; the
  prompt is read once.

  Args:
    model: with step(tokens [B, T], states) -> (logits [B, T, V], states), as
      rnn.Recurrent has it.
    prompt: T of at least 1.
    num_tokens: to draw.
    key: for the draws.
    temperature: 0 takes the likeliest token always.

  Raises:
    ValueError: the model cannot go on from a state, or an argument is wrong.
  """
  layers.check_sizes(num_tokens=num_tokens)
  if not temperature >= 0:
    raise ValueError(f'temperature is {temperature}; it takes at least 0')
  if prompt.shape[1] < 1:
    raise ValueError('the prompt is empty; it takes at least one token')

  def draw(logits, key):
    if temperature == 0:
      return logits.argmax(-1).astype(jnp.int32)
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    return jax.random.categorical(key, logits / temperature).astype(jnp.int32)

  def body(carry, key):
    logits, states = carry
    token = draw(logits, key)
    logits, states = model.step(token[:, None], states)
    return (logits[:, -1], states), token

  logits, states = model.step(prompt)
  keys = jax.random.split(key, num_tokens)
  _, tokens = jax.lax.scan(body, (logits[:, -1], states), keys)
  return tokens.T
