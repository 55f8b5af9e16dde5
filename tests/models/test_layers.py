"""The gradient of max-pool against XLA's."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from models import layers


@pytest.mark.parametrize(
  ('size', 'shape'), [(2, (3, 8, 6, 5)), (2, (2, 7, 5, 3)), (3, (2, 8, 9, 1))]
)
def test_a_max_pool_has_the_gradient_of_xla_ties_and_odd_borders_too(
  size, shape
):
  random = np.random.default_rng(0)
  # Whole numbers from 0 to 3, of which many windows hold the largest twice.
  image = jnp.asarray(random.integers(0, 4, shape), 'float32')
  pools = layers.max_pool, nnx.max_pool
  grads = []
  for pool, window in zip(pools, (size, (size, size)), strict=True):

    def total(image, pool=pool, window=window):
      pooled = pool(image, window, window)
      return jnp.vdot(
        pooled, jnp.arange(1.0, 1 + pooled.size).reshape(pooled.shape)
      )

    grads.append(jax.jit(jax.grad(total))(image))
  np.testing.assert_array_equal(*grads)


@pytest.mark.slow
def test_a_pool_after_a_norm_loses_no_gradient_to_rounding(monkeypatch):
  """Compiled as one, where what is pooled may be computed twice."""
  image = jax.random.normal(jax.random.key(0), (4, 20, 17, 3))

  def of_cnn():
    model = models.create(
      'cnn',
      image_shape=(20, 17, 3),
      num_classes=10,
      widths=(8, 16),
      rngs=nnx.Rngs(0),
    )
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    @jax.jit
    @jax.grad
    def of_parameters(params):
      model = nnx.merge(graphdef, params, rest, copy=True)
      return (model(image, train=True) ** 2).mean()

    return jax.tree.leaves(of_parameters(params))

  found = of_cnn()
  monkeypatch.setitem(
    layers.POOLS, 'max', lambda x: nnx.max_pool(x, (2, 2), (2, 2))
  )
  for ours, xlas in zip(found, of_cnn(), strict=True):
    np.testing.assert_allclose(ours, xlas, rtol=1e-3, atol=1e-5)
