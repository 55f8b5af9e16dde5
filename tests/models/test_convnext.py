"""ConvNeXt against its paper, and against NumPy."""

import math
import re

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from tests.models import reference

erf = np.vectorize(math.erf)


def shaped(**kwargs):
  kwargs = {'image_shape': (8, 8, 3), 'patch_size': 1} | kwargs
  return nnx.eval_shape(
    lambda: models.create('convnext', **kwargs, rngs=nnx.Rngs(0))
  )


def block(x, module):
  """x + scale * (D, 4D, D of the norm of a 7x7 convolution of each channel)."""
  conv, groups = module.conv, x.shape[-1]
  y = reference.layer_norm(
    reference.convolve(x, conv, 1, 3, groups), module.norm
  )
  y = reference.dense(y, module.expand)
  assert y.shape[-1] == 4 * groups
  # The exact GELU: x times the normal distribution's share below x.
  y = y * (1 + erf(y / 2**0.5)) / 2
  y = reference.dense(y, module.project)
  return x + np.asarray(module.layer_scale[...]) * y


def test_it_is_what_numpy_computes_in_float64():
  with jax.enable_x64(True):
    shape = (12, 8, 3)
    model = reference.filled(
      shaped(
        image_shape=shape, num_classes=5, patch_size=2, depth=(1, 2), width=4,
        param_dtype=jnp.float64,
      )
    )  # fmt: skip
    image = reference.images(2, *shape)
    x = reference.convolve(image, model.embed.conv, 2)
    x = reference.layer_norm(x, model.embed.norm)
    for i, stage in enumerate(model.blocks):
      if i > 0:
        downsample = model.downsamples[i - 1]
        x = reference.layer_norm(x, downsample.norm)
        x = reference.convolve(x, downsample.conv, 2)
      for module in stage:
        x = block(x, module)
    x = reference.layer_norm(x.mean((1, 2)), model.norm)
    expected = reference.dense(x, model.head)
    found = jax.jit(lambda image: model(image))(jnp.asarray(image))
    # XLA's erf is as good as this.
    np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(
  ('variant', 'depth', 'width'),
  [
    ('T', (3, 3, 9, 3), 96),
    ('L', (3, 3, 27, 3), 192),
  ],
)
def test_stages_are_as_in_section_3(variant, depth, width):
  # Liu et al. (2022): C = (96, 192, 384, 768), B = (3, 3, 9, 3) and so on, on
  # 56, 28, 14 and 7 pixels, as Swin's.
  shape = (224, 224, 3)
  model = shaped(variant=variant, image_shape=shape, patch_size=4)
  shapes = reference.shapes_of(model, model.blocks, shape)
  assert shapes == [
    (56 // 2**i, 56 // 2**i, width * 2**i)
    for i, count in enumerate(depth)
    for _ in range(count)
  ]


def test_it_starts_with_small_steps_from_the_identity():
  # Touvron et al. (2021): a scale of 1e-6. Kernels of 0.02 (Liu et al., A.1).
  @jax.jit
  def started():
    model = models.create(
      'convnext', image_shape=(4, 4, 3), num_classes=7, depth=(1,), width=64,
      rngs=nnx.Rngs(0),
    )  # fmt: skip
    module = model.blocks[0][0]
    return module.layer_scale[...], [
      module.conv.kernel[...],
      module.expand.kernel[...],
      model.head.kernel[...],
    ]

  scale, kernels = started()
  np.testing.assert_allclose(scale, np.full(64, 1e-6), rtol=1e-6)
  for kernel in kernels:
    # Five standard deviations of an estimate from so many numbers.
    rtol = 5 / np.sqrt(2 * kernel.size)
    np.testing.assert_allclose(kernel.std(), 0.02, rtol=rtol)


def test_stochastic_depth_grows_from_0_at_the_first_block():
  # Huang et al. (2016), equation 4, as timm counts the blocks.
  model = shaped(depth=(2, 3), stochastic_depth=0.4)
  rates = [module.stochastic_depth.rate for stage in model.blocks
           for module in stage]  # fmt: skip
  np.testing.assert_allclose(rates, [0, 0.1, 0.2, 0.3, 0.4])


def test_stochastic_depth_skips_blocks_by_example_in_training_alone():
  model = reference.filled(shaped(depth=(2,), width=4, stochastic_depth=0.5))
  module = model.blocks[0][1]
  x = jnp.asarray(reference.images(200, 2, 2, 4), 'float32')

  @jax.jit
  def outputs(x):
    rngs = nnx.Rngs(dropout=0)
    return module(x, train=True, rngs=rngs), module(x, train=False, rngs=rngs)

  trained, evaluated = outputs(x)
  np.testing.assert_allclose(
    evaluated, block(np.asarray(x, float), module), rtol=1e-4, atol=1e-5
  )
  skipped = np.all(trained == x, (1, 2, 3))
  # Of 200 examples half, give or take five standard deviations.
  assert abs(skipped.mean() - 0.5) < 0.18
  # What stays is doubled, so that the mean is that of evaluation.
  np.testing.assert_allclose(
    (trained - x)[~skipped], 2 * (evaluated - x)[~skipped], rtol=1e-3, atol=1e-4
  )


def test_bfloat16_gives_nearly_what_float32_does():
  kwargs = {'depth': (1, 1), 'width': 8, 'num_classes': 5}
  reference.check_bfloat16(lambda dtype: shaped(dtype=dtype, **kwargs))


def test_an_image_as_small_as_its_stages_allow_is_made():
  for side, patch_size in ((32, 4), (8, 1)):
    model = shaped(image_shape=(side, side, 1), patch_size=patch_size, width=2)
    outputs = reference.outputs_of(model, (side, side, 1))
    assert outputs.shape == (1, 1000)


@pytest.mark.parametrize(
  ('kwargs', 'message'),
  [
    ({'variant': 'XL'}, "variant 'XL' is unknown; there are T, S, B, L"),
    (
      {'image_shape': (32, 30, 3), 'patch_size': 4},
      'image_shape (32, 30, 3) does not divide into patches of patch_size 4',
    ),
    (
      {'image_shape': (32, 28, 3), 'patch_size': 4},
      'image_shape (32, 28, 3) is too small for patch_size 4 and 4 stages',
    ),
    ({'patch_size': 0}, 'patch_size is 0; it takes whole numbers'),
    ({'depth': 9}, 'depth is 9; it takes the blocks of each stage'),
    ({'width': -4}, 'width is -4; it takes whole numbers'),
    ({'stochastic_depth': 1.5}, 'stochastic_depth is 1.5; it takes a share'),
    ({'stochastic_depth': 'a'}, 'stochastic_depth is a; it takes a share'),
    (
      {'image_shape': (8, 8)},
      'image_shape (8, 8) is not (height, width, channels)',
    ),
  ],
)
def test_what_cannot_be_made_is_said_in_one_line(kwargs, message):
  with pytest.raises(ValueError, match=re.escape(message)) as caught:
    shaped(**kwargs)
  assert '\n' not in str(caught.value)
