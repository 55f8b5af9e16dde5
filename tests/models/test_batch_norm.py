"""Convolutions with a batch norm: beside it in training, else folded."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import dispatch
import models
from models import layers

MODELS = {
  'cnn': ('cnn', {'widths': (8, 12)}, (9, 8, 3)),
  'cnn, gelu and a bias': (
    'cnn',
    {'widths': (8,), 'norm': 'layer', 'activation': 'gelu'},
    (9, 9, 1),
  ),
  'resnet of basic blocks': (
    'resnet',
    {'variant': '18', 'depth': (1, 1), 'width': 4},
    (9, 9, 3),
  ),
  'resnet of bottlenecks': (
    'resnet',
    {'variant': '50', 'depth': (1,), 'width': 4},
    (9, 9, 3),
  ),
  'resnet of CIFAR': (
    'resnet',
    {'variant': 'cifar20', 'depth': (1, 1)},
    (8, 8, 3),
  ),
}


# Compiles in a third of the time.
QUICKLY = functools.partial(
  jax.jit, compiler_options={'xla_backend_optimization_level': 0}
)


def created(name, dtype=jnp.float32):
  """A model whose norms have seen images, and images."""
  kind, kwargs, shape = MODELS[name]
  model = models.create(
    kind, image_shape=shape, num_classes=5, **kwargs, rngs=nnx.Rngs(0)
  )
  random = np.random.default_rng(0)

  def filled(path, variable):
    # As after training: no statistic and no scale is 0 or 1.
    values = random.uniform(0.5, 1.5, variable.shape)
    return variable.replace(jnp.asarray(values, dtype))

  state = nnx.state(model, (nnx.BatchStat,))
  nnx.update(model, nnx.map_state(filled, state))
  images = jnp.asarray(random.normal(size=(6, *shape)), dtype)
  return model, images


def unfolded(conv, x, norm=None, *, residual=None, activation=None):
  """layers.conv2d, layer by layer."""
  y = conv(x)
  y = y if norm is None else norm(y)
  y = y if residual is None else y + residual
  return {None: lambda y: y, 'relu': jax.nn.relu}[activation](y)


def one_by_one(conv, norm, x, before=None, activation=None):
  """layers.conv2d_stats with flax's own layers, its affine done already."""
  assert activation in (None, 'relu')
  x = jax.nn.relu(x) if activation else x
  y = norm(conv(x), train=True)
  channels = jnp.ones(y.shape[-1], jnp.float32)
  return y, layers.Affine(channels, 0 * channels)


@pytest.mark.slow
@pytest.mark.parametrize('name', MODELS)
def test_folded_norms_put_out_the_same(name, monkeypatch):
  model, images = created(name)
  folded = model(images)
  monkeypatch.setattr(layers, 'conv2d', unfolded)
  expected = model(images)
  scale = np.abs(expected).max()
  np.testing.assert_allclose(folded, expected, rtol=1e-5, atol=1e-5 * scale)


ONE_IN_CI = [
  pytest.param(name, marks=pytest.mark.long if i else ())
  for i, name in enumerate(MODELS)
]


def trained(model, images):
  """Outputs, gradients and running statistics of a training pass."""
  graphdef, params, rest = nnx.split(model, nnx.Param, ...)

  def loss(params, images):
    model = nnx.merge(graphdef, params, rest, copy=True)
    y = model(images, train=True, rngs=nnx.Rngs(dropout=0))
    statistics = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
    return jnp.sum(jnp.sin(y)), (y, statistics)

  return QUICKLY(jax.grad(loss, has_aux=True))(params, images)


@pytest.mark.slow
@pytest.mark.parametrize('name', ONE_IN_CI)
def test_training_is_as_with_the_layers_one_by_one(name, monkeypatch):
  with jax.enable_x64(True):
    model, images = created(name, jnp.float64)
    found = trained(model, images)
    monkeypatch.setattr(layers, 'conv2d', unfolded)
    monkeypatch.setattr(layers, 'conv2d_stats', one_by_one)
    expected = trained(model, images)
    compare = lambda a, b: np.testing.assert_allclose(  # noqa: E731
      a, b, rtol=1e-4, atol=1e-5 * max(1, np.abs(b).max())
    )
    jax.tree.map(compare, found, expected)


@pytest.mark.slow
@pytest.mark.parametrize(
  'name',
  [
    pytest.param('resnet of CIFAR', marks=pytest.mark.long),
    pytest.param('cnn', marks=pytest.mark.long),
    'cnn, gelu and a bias',
  ],
)
def test_through_the_kernel_outputs_and_gradients_are_the_same(name):
  model, images = created(name)
  images = images[:3]
  expected = model(images), trained(model, images)
  with dispatch.default('pallas_tpu_interpret'):
    found = model(images), trained(model, images)
    choices = dispatch.explain(model, images)
  assert {one.op for one in choices} == {'conv2d'}
  assert {one.implementation for one in choices} == {'pallas_tpu_interpret'}
  compare = lambda a, b: np.testing.assert_allclose(  # noqa: E731
    a, b, rtol=2e-3, atol=2e-4 * max(1, np.abs(b).max())
  )
  jax.tree.map(compare, found, expected)


def test_a_mean_of_many_deviations_leaves_the_variance():
  # Of squares alone float32 would leave nothing: (1000 s)^2 eps is 0.1 s^2.
  conv = layers.Conv(
    1, 1, (1, 1), use_bias=False, kernel_init=nnx.initializers.ones,
    rngs=nnx.Rngs(0),
  )  # fmt: skip
  norm = layers.Norm('batch', 1, rngs=nnx.Rngs(0))
  x = np.random.default_rng(0).normal(1000, 1, (8, 16, 16, 1))
  y, affine = layers.conv2d_stats(conv, norm, jnp.asarray(x, jnp.float32))
  found = np.asarray(affine.scale)
  assert found == pytest.approx(1 / np.sqrt(x.var() + 1e-5), rel=1e-4)
  assert np.asarray(layers.apply_affine(y, affine)).std() == pytest.approx(
    1, rel=1e-3
  )
