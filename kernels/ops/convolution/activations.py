"""What a convolution may end with, or begin with, in float32."""

import jax
import jax.numpy as jnp

ACTIVATIONS = (None, 'relu', 'gelu', 'silu')


def activate(name: str | None, x: jax.Array) -> jax.Array:
  """The activation of that name, of any shape; gelu is x Phi(x), by erf."""
  if name == 'relu':
    # Not jax.nn's, whose own derivative jax 0.10 does not lower in a kernel; so
    # written that it is 0 at 0, and that a NaN stays.
    return jnp.where(x <= 0, 0, x)
  if name == 'gelu':
    return 0.5 * x * (1 + jax.lax.erf(x * 0.5**0.5))
  if name == 'silu':
    return x / (1 + jnp.exp(-x))
  return x
