"""A convolution whose kernel's gradient is fast on a CPU.

XLA computes that gradient on a CPU as one convolution with a kernel as large as
the image, at a third of the forward pass's rate, and at a fiftieth inside a
loop. As matrix products, some images at a time so that all of it stays in the
cache, it takes a third to all of XLA's time. TPU and GPU keep XLA's own.

Shapes: B batch, H W C image, F features, I J kernel's height and width.
"""

from collections.abc import Sequence
import functools
from typing import Any

import jax
import jax.numpy as jnp

from kernels import sharding

DIMENSIONS = ('NHWC', 'HWIO', 'NHWC')
# Pixels of what goes into one product: 2,048 of 64 channels and 3x3 places are
# 4.7 MB, about the cores' caches; half takes a fifth longer there and as long
# with more channels, four times takes twice as long.
PIXELS = 2048


def conv_general_dilated(
  image: jax.Array,
  kernel: jax.Array,
  strides: Sequence[int],
  padding: str | Sequence[tuple[int, int]],
  *,
  feature_group_count: int = 1,
  dimension_numbers: Any = DIMENSIONS,
  **kwargs,
) -> jax.Array:
  """[B, H, W, C] and [I, J, C, F] -> [B, H', W', F], as jax.lax's of that name.

  Also for nnx.Conv's argument of that name. Groups, dilation and other numbers
  of axes get jax.lax's own gradient.
  """
  numbers = jax.lax.conv_dimension_numbers(
    image.shape, kernel.shape, dimension_numbers
  )
  usual = image.ndim == 4 and numbers == jax.lax.conv_dimension_numbers(
    image.shape, kernel.shape, DIMENSIONS
  )
  plain = all(
    value is None or (name.endswith('dilation') and set(value) == {1})
    for name, value in kwargs.items()
  )
  if not usual or not plain or feature_group_count != 1:
    convolve = functools.partial(
      jax.lax.conv_general_dilated,
      window_strides=strides,
      padding=padding,
      feature_group_count=feature_group_count,
      dimension_numbers=dimension_numbers,
      **kwargs,
    )
    # Left to the compiler, the gradients of one with groups gather the images.
    if sharding.row_devices() > 1 and sharding.refusal(image) is None:
      return sharding.over_rows(convolve, (image,), (kernel,), pallas=False)
    return convolve(image, kernel)
  strides = tuple(strides)
  if isinstance(padding, str):
    padding = jax.lax.padtype_to_pads(
      image.shape[1:3], kernel.shape[:2], strides, padding
    )
  return _convolve(image, kernel, strides, tuple(map(tuple, padding)))


def _plain(image, kernel, strides, padding):
  return jax.lax.conv_general_dilated(
    image, kernel, strides, padding, dimension_numbers=DIMENSIONS
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _convolve(image, kernel, strides, padding):
  return _plain(image, kernel, strides, padding)


def _forward(image, kernel, strides, padding):
  return _plain(image, kernel, strides, padding), (image, kernel)


def _backward(strides, padding, kept, grad):
  image, kernel = kept
  return (
    input_grad(image, kernel, grad, strides, padding),
    kernel_grad(image, kernel, grad, strides, padding),
  )


_convolve.defvjp(_forward, _backward)


def input_grad(
  image: jax.Array, kernel: jax.Array, grad: jax.Array, strides, padding
) -> jax.Array:
  """The gradient by the image, given that by the outputs [B, H', W', F]."""

  def of_xla(image, kernel, grad):
    def outputs(image):
      return _plain(image, kernel, strides, padding)

    return jax.linear_transpose(outputs, image)(grad)[0]

  def turned(image, kernel, grad):
    # What XLA has here too, but for the kernel turned round by hand: in a loop
    # that is twice as fast.
    borders = [
      (size - 1 - low, full - 1 + low - (steps - 1) * stride)
      for size, (low, _), full, steps, stride in zip(
        kernel.shape[:2],
        padding,
        image.shape[1:3],
        grad.shape[1:3],
        strides,
        strict=True,
      )
    ]
    return jax.lax.conv_general_dilated(
      grad,
      kernel[::-1, ::-1].swapaxes(2, 3),
      (1, 1),
      borders,
      lhs_dilation=strides,
      dimension_numbers=DIMENSIONS,
    )

  return jax.lax.platform_dependent(
    image, kernel, grad, cpu=turned, default=of_xla
  )


def kernel_grad(
  image: jax.Array, kernel: jax.Array, grad: jax.Array, strides, padding
) -> jax.Array:
  """The gradient by the kernel, given that by the outputs [B, H', W', F]."""

  def of_xla(image, kernel, grad):
    def outputs(kernel):
      return _plain(image, kernel, strides, padding)

    return jax.linear_transpose(outputs, kernel)(grad)[0]

  if not image.size or not grad.size:
    return jnp.zeros_like(kernel)

  def by_products(image, kernel, grad):
    total = _products(image, grad, kernel.shape[:2], strides, padding)
    return total.astype(kernel.dtype)

  return jax.lax.platform_dependent(
    image, kernel, grad, cpu=by_products, default=of_xla
  )


def _products(image, grad, size, strides, padding):
  """[I, J, C, F] of [B, H, W, C] and of the output's [B, H', W', F]."""
  image = jnp.pad(image, ((0, 0), *padding, (0, 0)))
  sum_products = functools.partial(_sum_products, size=size, strides=strides)
  devices = sharding.row_devices()
  if devices == 1 or image.shape[0] % devices:
    total = sum_products(image, grad)
  else:  # Each device of a mesh adds up its own images.
    image, grad = (x.reshape(devices, -1, *x.shape[1:]) for x in (image, grad))
    total = jax.vmap(sum_products)(image, grad).sum(0)
  features = grad.shape[-1]
  return total.reshape(features, *size, -1).transpose(1, 2, 3, 0)


def _sum_products(image, grad, size, strides):
  """[F, I J C] of images with their borders and of the outputs' gradient."""
  batch, height, width, features = grad.shape
  # The largest number of images that divides the batch and fits.
  fits = max(1, PIXELS // (height * width))
  group = max(n for n in range(1, batch + 1) if batch % n == 0 and n <= fits)

  def add(total, inputs):
    image, grad = inputs
    seen = [
      image[
        :,
        i : i + (height - 1) * strides[0] + 1 : strides[0],
        j : j + (width - 1) * strides[1] + 1 : strides[1],
      ]
      for i in range(size[0])
      for j in range(size[1])
    ]
    seen = jnp.concatenate(seen, axis=-1).reshape(-1, total.shape[1])
    grad = grad.reshape(-1, features)
    # This way round, as the left side is the narrower: twice as fast.
    return total + jnp.dot(
      grad.T, seen, preferred_element_type=total.dtype
    ), None

  total = jnp.zeros(
    (features, size[0] * size[1] * image.shape[-1]),
    jnp.promote_types(grad.dtype, jnp.float32),
  )
  image, grad = (x.reshape(-1, group, *x.shape[1:]) for x in (image, grad))
  return jax.lax.scan(add, total, (image, grad))[0]
