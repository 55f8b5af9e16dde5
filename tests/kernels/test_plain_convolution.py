"""The gradients of a convolution on a CPU against XLA's, in float64."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.ops.convolution import plain as convolution


def gradients(conv, image, kernel, **kwargs):
  """The outputs, and the gradients of both operands of a weighted sum."""

  def total(image, kernel):
    outputs = conv(image, kernel, **kwargs)
    weights = np.cos(np.arange(outputs.size)).reshape(outputs.shape)
    return jnp.vdot(outputs, weights.astype(outputs.dtype)), outputs

  grad = jax.value_and_grad(total, (0, 1), has_aux=True)
  return jax.jit(grad)(image, kernel)


def operands(batch, height, width, channels, features, size):
  random = np.random.default_rng(0)
  image = random.normal(size=(batch, height, width, channels))
  kernel = random.normal(size=(*size, channels, features))
  return jnp.asarray(image), jnp.asarray(kernel)


plain = functools.partial(
  jax.lax.conv_general_dilated, dimension_numbers=convolution.DIMENSIONS
)


@pytest.mark.parametrize(
  ('size', 'strides', 'padding'),
  [
    ((3, 3), (1, 1), 'SAME'),
    ((3, 3), (2, 2), 'SAME'),
    ((3, 3), (2, 2), [(1, 1), (1, 1)]),
    ((1, 1), (2, 2), 'VALID'),
    ((2, 2), (2, 2), 'VALID'),
    ((5, 3), (1, 2), [(2, 0), (0, 1)]),
    ((7, 7), (2, 2), [(3, 3), (3, 3)]),
  ],
)
# All images in one product, and one product for each.
@pytest.mark.parametrize('pixels', [1024, 1])
def test_the_gradients_are_those_of_xla(
  size, strides, padding, pixels, monkeypatch
):
  monkeypatch.setattr(convolution, 'PIXELS', pixels)
  with jax.enable_x64(True):
    # An odd width: a stride of 2 does not reach the last column.
    args = operands(6, 8, 9, 3, 4, size)
    kwargs = {'window_strides': strides, 'padding': padding}
    expected = gradients(plain, *args, **kwargs)
    kwargs = {'strides': strides, 'padding': padding}
    found = gradients(convolution.conv_general_dilated, *args, **kwargs)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12),
    found,
    expected,
  )


@pytest.mark.parametrize(
  ('kwargs', 'channels'),
  [
    ({'feature_group_count': 2}, 4),
    ({'kernel_dilation': 2}, 4),
    ({'strides': 2, 'padding': 1}, 4),
    ({'kernel_size': (3,)}, 4),
  ],
)
def test_a_layer_has_the_gradient_of_jax_lax(kwargs, channels):
  kwargs = {'kernel_size': (3, 3)} | kwargs

  def grads(**more):
    layer = nnx.Conv(channels, 6, **kwargs, **more, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(layer)
    x = jnp.cos(jnp.arange(2.0 * 5 ** len(kwargs['kernel_size']) * channels))
    x = x.reshape(2, *[5] * len(kwargs['kernel_size']), channels)

    def total(state, x):
      return (nnx.merge(graphdef, state)(x) ** 2).sum()

    return jax.jit(jax.grad(total, (0, 1)))(state, x)

  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4),
    grads(conv_general_dilated=convolution.conv_general_dilated),
    grads(),
  )


def test_bfloat16_gives_bfloat16_gradients_summed_in_float32():
  image, kernel = operands(32, 8, 8, 2, 3, (3, 3))
  kwargs = {'strides': (1, 1), 'padding': 'SAME'}
  conv = convolution.conv_general_dilated
  low = image.astype('bfloat16'), kernel.astype('bfloat16')
  _, found = gradients(conv, *low, **kwargs)
  _, expected = gradients(conv, image, kernel, **kwargs)
  for grad, wanted in zip(found, expected, strict=True):
    assert grad.dtype == jnp.bfloat16
    difference = np.linalg.norm(np.asarray(grad, 'float32') - wanted)
    assert difference < 0.01 * np.linalg.norm(wanted)
