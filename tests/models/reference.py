"""Layers in NumPy, from the parameters of ours, for tests in float64.

Shapes: B batch, H W C image.
"""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np


def filled(model, scale=0.5):
  """`model`, made by nnx.eval_shape, with numbers of NumPy's in it."""
  random = np.random.default_rng(0)

  def numbers(leaf):
    values = scale * random.normal(size=leaf.shape)
    return jnp.asarray(values, leaf.dtype)

  nnx.update(model, jax.tree.map(numbers, nnx.state(model, nnx.Param)))
  for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.BatchStat)):
    low = 0.5 if path[-1] == 'var' else -0.5
    values = random.uniform(low, low + 1, leaf.shape)
    nnx.update(model, nnx.from_flat_state([(path, jnp.asarray(values))]))
  return model


def images(*shape, seed=0):
  """[B, H, W, C], float64."""
  return np.random.default_rng(seed).normal(size=shape)


def windows(x, size, strides, padding, value=0.0):
  """[B, H', W', size, size, C]: what a kernel sees at each of its places."""
  sides = ((0, 0), (padding, padding), (padding, padding), (0, 0))
  padded = np.pad(x, sides, constant_values=value)
  seen = np.lib.stride_tricks.sliding_window_view(padded, (size, size), (1, 2))
  return np.moveaxis(seen[:, ::strides, ::strides], 3, -1)


def convolve(x, layer, strides=1, padding=0, groups=1):
  """The cross-correlation of x with a layer's kernel, [H, W, in, out]."""
  kernel = np.asarray(layer.kernel[...], np.float64)
  x = windows(x, kernel.shape[0], strides, padding)
  parts = [
    np.tensordot(part, kernel_part, 3)
    for part, kernel_part in zip(
      np.split(x, groups, -1), np.split(kernel, groups, -1), strict=True
    )
  ]
  bias = 0 if layer.bias is None else np.asarray(layer.bias[...])
  return np.concatenate(parts, -1) + bias


def max_pool(x, size, strides, padding=0):
  """The largest of each window."""
  return windows(x, size, strides, padding, -np.inf).max((3, 4))


def average_pool(x):
  """The mean of each 2x2."""
  return windows(x, 2, 2, 0).mean((3, 4))


def batch_norm(x, layer):
  """With the running statistics, and an epsilon of 1e-5."""
  norm = {
    key: np.asarray(getattr(layer.norm, key)[...], np.float64)
    for key in ('mean', 'var', 'scale', 'bias')
  }
  x = (x - norm['mean']) / np.sqrt(norm['var'] + 1e-5)
  return x * norm['scale'] + norm['bias']


def layer_norm(x, layer):
  """Over the channels of each place, with an epsilon of 1e-6."""
  mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
  x = (x - mean) / np.sqrt(var + 1e-6)
  return x * np.asarray(layer.scale[...]) + np.asarray(layer.bias[...])


def dense(x, layer):
  """x W + b."""
  return x @ np.asarray(layer.kernel[...]) + np.asarray(layer.bias[...])


def relu(x):
  """max(x, 0)."""
  return np.maximum(x, 0)


def shapes_of(model, modules, image_shape):
  """[H, W, C] of what each of some lists of modules puts out, in order."""
  shapes = []

  class Noted(nnx.Module):
    def __init__(self, inner):
      self.inner = inner

    def __call__(self, *args, **kwargs):
      outputs = self.inner(*args, **kwargs)
      shapes.append(outputs.shape[1:])
      return outputs

  for listed in modules:
    for i, module in enumerate(listed):
      listed[i] = Noted(module)
  outputs_of(model, image_shape)
  return shapes


def outputs_of(model, image_shape):
  """The shape and dtype that a model, or a part of one, puts out for one."""
  image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
  return jax.eval_shape(lambda model, image: model(image), model, image)


def check_bfloat16(make, image_shape=(8, 8, 3)):
  """Fails unless make(bfloat16) computes in it, near what make(None) does."""
  image = jnp.asarray(images(2, *image_shape), 'float32')
  wide, narrow = (filled(make(dtype), 0.1) for dtype in (None, jnp.bfloat16))
  found, expected = jax.jit(lambda x: (narrow(x), wide(x)))(image)
  assert found.dtype == jnp.bfloat16
  atol = 0.03 * np.abs(expected).max()
  np.testing.assert_allclose(found.astype(float), expected, atol=atol)
