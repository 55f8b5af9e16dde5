"""The exact GELU against float64, by the error function of Python's math."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import layers


def exact(x):
  """x Phi(x) and its slope, Phi(x) + x phi(x), in float64."""
  share = (1 + np.vectorize(math.erf)(x * 0.5**0.5)) / 2
  return x * share, share + x * np.exp(-x * x / 2) / math.sqrt(2 * math.pi)


@pytest.mark.parametrize(
  ('dtype', 'rtol', 'atol'),
  [('float64', 0, 1e-14), ('float32', 3e-7, 1e-6), ('bfloat16', 5e-3, 1e-6)],
)
def test_gelu_and_its_slope_are_exact_to_the_dtype(dtype, rtol, atol):
  with jax.enable_x64(dtype == 'float64'):
    x = jnp.linspace(-9, 9, 3601).astype(dtype)
    found = jax.jit(layers.gelu)(x), jax.vmap(jax.grad(layers.gelu))(x)
    answers = exact(np.asarray(x, 'float64'))
    for values, expected in zip(found, answers, strict=True):
      assert values.dtype == x.dtype
      np.testing.assert_allclose(
        np.asarray(values, 'float64'), expected, rtol=rtol, atol=atol
      )


def test_gelu_is_differentiated_through_scan_and_remat():
  x = jnp.linspace(-3, 3, 7)

  def twice(x, gelu):
    return jax.lax.scan(lambda x, _: (gelu(x), None), x, None, 2)[0].sum()

  np.testing.assert_allclose(
    jax.grad(twice)(x, jax.checkpoint(layers.gelu)),
    jax.grad(lambda x: layers.gelu(layers.gelu(x)).sum())(x),
    rtol=1e-6,
  )
