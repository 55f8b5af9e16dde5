"""Residual networks against NumPy, and against the tables of their papers."""

import functools
import re
import time

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from models import resnet
from tests.models import reference


def shaped(name='resnet', **kwargs):
  kwargs = {'image_shape': (8, 8, 3), 'num_classes': 5} | kwargs
  return nnx.eval_shape(lambda: models.create(name, **kwargs, rngs=nnx.Rngs(0)))


def filled(name='resnet', **kwargs):
  return reference.filled(shaped(name, **kwargs))


# ------------------------------------------------------------ against NumPy


def stem(x, model, norm=True):
  """The 7x7 stem: pads 3, stride 2, and a pool of 3x3 that pads 1."""
  x = reference.convolve(x, model.embed.conv, 2, 3)
  if norm:
    x = reference.relu(reference.batch_norm(x, model.embed.norm))
  return reference.max_pool(x, 3, 2, 1)


def small_stem(x, model, norm=True):
  x = reference.convolve(x, model.embed.conv, 1, 1)
  if norm:
    x = reference.relu(reference.batch_norm(x, model.embed.norm))
  return x


def block(x, block, strides, groups=1):
  """Conv, norm, ReLU, ..., conv, norm; shortcut; ReLU. The 3x3 has the stride.

  He et al. (2016a), figure 5, and figure 2 for the place of the last ReLU.
  """
  y = x
  bottleneck = len(block.convs) == 3
  for i, (conv, norm) in enumerate(zip(block.convs, block.norms, strict=True)):
    of_three = (1, strides, 1)[i] if bottleneck else (strides, 1)[i]
    size = conv.kernel.shape[0]
    y = reference.convolve(
      y, conv, of_three, size // 2, groups if size == 3 else 1
    )
    y = reference.batch_norm(y, norm)
    if i < len(block.convs) - 1:
      y = reference.relu(y)
  if x.shape != y.shape and block.shortcut is not None:
    x = reference.convolve(x, block.shortcut, strides)
    x = reference.batch_norm(x, block.shortcut_norm)
  elif x.shape != y.shape:
    # Every other pixel, and channels of 0 behind.
    wide = np.zeros(y.shape)
    wide[..., : x.shape[-1]] = x[:, ::strides, ::strides]
    x = wide
  return reference.relu(x + y)


def preactivated(x, block, strides):
  """Norm, ReLU, conv, ...; nothing behind the sum. He et al. (2016b), fig. 4e.

  Where the shape changes the shortcut starts behind the first ReLU.
  """
  first = reference.relu(reference.batch_norm(x, block.norms[0]))
  y = first
  for i, conv in enumerate(block.convs):
    if i > 0:
      y = reference.relu(reference.batch_norm(y, block.norms[i]))
    size = conv.kernel.shape[0]
    halves = size == 3 and all(c.kernel.shape[0] < 3 for c in block.convs[:i])
    y = reference.convolve(y, conv, strides if halves else 1, size // 2)
  if x.shape != y.shape:
    x = reference.convolve(first, block.shortcut, strides)
  return x + y


FORMS = {
  'basic': ({'variant': '18', 'depth': (1, 2)}, stem, block),
  'bottleneck': ({'variant': '50', 'depth': (2, 1)}, stem, block),
  'wide bottleneck': (
    {'variant': 'wide50_2', 'depth': (1, 1), 'stem': '3x3'},
    small_stem,
    block,
  ),
  'cifar': ({'variant': 'cifar20', 'depth': (1, 2)}, small_stem, block),
  'preactivated': (
    {'variant': '18', 'depth': (1, 2), 'preactivation': True},
    stem,
    preactivated,
  ),
  'preactivated bottleneck': (
    {'variant': 'cifar164', 'depth': (2, 1)},
    small_stem,
    preactivated,
  ),
  'wide': ({'variant': 'wrn16_4', 'depth': (1, 2)}, small_stem, preactivated),
}


@pytest.mark.parametrize('form', FORMS)
def test_a_network_is_what_numpy_computes_in_float64(form):
  kwargs, stem, block = FORMS[form]
  with jax.enable_x64(True):
    model = filled(width=4, param_dtype=jnp.float64, **kwargs)
    # Of an odd side SAME padding would agree, of an even one it would not.
    image = reference.images(2, 16, 9, 3)
    v2 = block is preactivated
    x = stem(image, model, norm=not v2)
    for i, stage in enumerate(model.blocks):
      for j, module in enumerate(stage):
        x = block(x, module, 2 if i > 0 and j == 0 else 1)
    if v2:
      x = reference.relu(reference.batch_norm(x, model.norm))
    expected = reference.dense(x.mean((1, 2)), model.head)
    found = jax.jit(lambda x: model(x))(jnp.asarray(image))
    assert found.dtype == jnp.float64
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


def test_a_grouped_block_is_the_sum_of_its_paths():
  # Xie et al. (2017), equation 2 and figure 3a: x + sum_i T_i(x), each T_i
  # being 1x1, 3x3, 1x1 on 2 channels of its own.
  with jax.enable_x64(True):
    model = filled(
      'resnext', variant='50_32x4d', width=32, depth=(2,), stem='3x3',
      param_dtype=jnp.float64,
    )  # fmt: skip
    module = model.blocks[0][1]
    x = reference.images(2, 5, 5, 128)
    inner = 64
    assert module.convs[1].kernel.shape == (3, 3, 2, inner)

    def affine(x, norm, picked):
      """A batch norm of some of its channels."""
      mean, var, scale, bias = (
        np.asarray(getattr(norm.norm, key)[...], np.float64)[picked]
        for key in ('mean', 'var', 'scale', 'bias')
      )
      return (x - mean) / np.sqrt(var + 1e-5) * scale + bias

    down, middle, up = (np.asarray(c.kernel[...]) for c in module.convs)
    total = 0.0
    for path in range(32):
      own = slice(2 * path, 2 * path + 2)
      y = x @ down[0, 0][:, own]
      y = reference.relu(affine(y, module.norms[0], own))
      seen = reference.windows(y, 3, 1, 1)
      y = np.tensordot(seen, middle[..., own], 3)
      y = reference.relu(affine(y, module.norms[1], own))
      total = total + y @ up[0, 0][own]
    expected = reference.relu(x + reference.batch_norm(total, module.norms[2]))
    found = module(jnp.asarray(x), train=False, rngs=None)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


# ------------------------------------------------------ the papers' tables


@pytest.mark.parametrize(
  ('variant', 'channels'),
  [
    ('18', (64, 128, 256, 512)),
    ('50', (256, 512, 1024, 2048)),
  ],
)
def test_stages_halve_the_image_as_in_table_1(variant, channels):
  # He et al. (2016a): 112 after the first convolution, 56, 28, 14, 7.
  model = shaped(variant=variant, image_shape=(224, 224, 3))
  blocks = resnet.VARIANTS[variant]['depth']
  first = reference.outputs_of(model.embed.conv, (224, 224, 3))
  assert first.shape == (1, 112, 112, 64)
  shapes = reference.shapes_of(model, model.blocks, (224, 224, 3))
  expected = [
    (side, side, width)
    for side, width, count in zip(
      (56, 28, 14, 7), channels, blocks, strict=True
    )
    for _ in range(count)
  ]
  assert shapes == expected


def test_stages_for_cifar_are_of_32_16_and_8_pixels():
  # He et al. (2016a), section 4.2.
  model = shaped(variant='cifar20', image_shape=(32, 32, 3))
  shapes = reference.shapes_of(model, model.blocks, (32, 32, 3))
  assert shapes == [(32, 32, 16)] * 3 + [(16, 16, 32)] * 3 + [(8, 8, 64)] * 3


def test_the_small_stem_keeps_the_image():
  model = shaped(variant='18', stem='3x3', image_shape=(32, 32, 3))
  shapes = reference.shapes_of(model, model.blocks, (32, 32, 3))
  assert [side for side, _, _ in shapes[::2]] == [32, 16, 8, 4]


def test_the_stride_of_a_bottleneck_is_on_its_3x3():
  first = shaped(variant='50', depth=(1, 1)).blocks[1][0]
  assert [conv.strides for conv in first.convs] == [1, 2, 1]


@pytest.mark.parametrize('variant', resnet.VARIANTS)
def test_a_variant_has_as_many_layers_as_its_name_says(variant):
  entry = resnet.VARIANTS[variant]
  # The stem and the head; of a wide one for CIFAR the convolutions alone,
  # those of its three shortcuts too.
  layers = sum(entry['depth']) * len(entry['kernels'])
  layers += 1 + 3 if variant.startswith('wrn') else 2
  assert layers == int(re.match(r'[a-z]*(\d+)', variant)[1])


def test_a_wide_network_for_cifar_has_the_widths_of_table_1():
  # Zagoruyko & Komodakis (2016): 16, then 16k, 32k, 64k.
  model = shaped(variant='wrn28_10', image_shape=(32, 32, 3))
  assert model.embed.conv.kernel.shape[-1] == 16
  widths = [stage[-1].convs[-1].kernel.shape[-1] for stage in model.blocks]
  assert widths == [160, 320, 640]


@pytest.mark.parametrize(
  ('variant', 'groups', 'width'),
  [('50_32x4d', 32, 4), ('101_32x8d', 32, 8), ('101_64x4d', 64, 4)],
)
def test_a_resnext_has_as_many_groups_as_its_name_says(variant, groups, width):
  model = shaped('resnext', variant=variant, depth=(1, 1))
  for i, stage in enumerate(model.blocks):
    grouped = stage[0].convs[1]
    assert grouped.kernel.shape[2] == width * 2**i
    assert grouped.kernel.shape[3] == width * 2**i * groups


# ----------------------------------------------------------------- options


def test_depth_and_width_take_the_place_of_the_variants():
  model = shaped(variant='50', depth=(1, 2, 1), width=8)
  assert [len(stage) for stage in model.blocks] == [1, 2, 1]
  assert model.head.kernel.shape == (4 * 8 * 4, 5)


@pytest.mark.parametrize('image_shape', [(28, 28, 1), (1, 1, 1), (7, 5, 3)])
def test_an_image_may_be_as_small_as_it_likes(image_shape):
  model = shaped(image_shape=image_shape)
  assert reference.outputs_of(model, image_shape).shape == (1, 5)


def test_with_zero_init_a_block_starts_as_its_shortcut():
  # Goyal et al. (2017), section 5.1.
  x = jnp.asarray(reference.images(2, 8, 8, 4), 'float32')

  @jax.jit
  def started(x):
    model = models.create(
      'resnet', variant='cifar20', depth=(1,), width=4, zero_init=True,
      rngs=nnx.Rngs(0),
    )  # fmt: skip
    block = model.blocks[0][0]
    scales = [norm.norm.scale[...] for norm in block.norms]
    return scales, block(x, train=True, rngs=None)

  (first, last), outputs = started(x)
  assert np.array_equal(first, np.ones(4))
  assert np.array_equal(last, np.zeros(4))
  assert np.array_equal(outputs, np.maximum(x, 0))


def test_convolutions_start_as_he_et_al_say():
  # (2015), equation 14: variance 2 / (k * k * out), and no bias.
  conv = resnet.convolution(3, 64, 128, rngs=nnx.Rngs(0))
  assert conv.bias is None
  std = np.sqrt(2 / (3 * 3 * 128))
  np.testing.assert_allclose(conv.kernel[...].std(), std, rtol=0.02)


def test_dropout_is_between_the_convolutions_and_in_training_alone():
  model = filled(variant='wrn16_4', depth=(1,), width=4, dropout=0.5)
  image = jnp.asarray(reference.images(2, 8, 8, 3), 'float32')

  @functools.partial(jax.jit, static_argnums=2)
  def outputs(factor, key, train):
    module = nnx.clone(model)
    second = module.blocks[0][0].convs[1].kernel
    second[...] = factor * second[...]
    return module(image, train=train, rngs=nnx.Rngs(dropout=key))

  def differ(factor, train):
    one, other = (
      outputs(factor, jax.random.key(seed), train) for seed in (0, 1)
    )
    return not np.array_equal(one, other)

  assert differ(1, True)
  assert not differ(1, False)
  # Nothing of it comes through a second convolution of zeros.
  assert not differ(0, True)


def test_bfloat16_gives_nearly_what_float32_does():
  kwargs = {'depth': (1, 1), 'width': 8, 'stem': '3x3'}
  reference.check_bfloat16(lambda dtype: shaped(dtype=dtype, **kwargs))


# --------------------------------------------------------------- very deep


@pytest.mark.slow
def test_a_network_of_1001_layers_builds_and_traces_in_reasonable_time():
  # W33. On two cores of a Xeon 4 s to build and 2 s to trace; without Keys 160.
  # pytorchcv has the count, and He et al. (2016b), table 4, 10.2 million.
  start = time.process_time()
  model = shaped(variant='cifar1001', image_shape=(32, 32, 3), num_classes=10)
  assert models.count_parameters(model) == 10_327_706
  assert reference.outputs_of(model, (32, 32, 3)).shape == (1, 10)
  assert time.process_time() - start < 60


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
  ('name', 'kwargs', 'message'),
  [
    ('resnet', {'variant': '19'}, "variant '19' is unknown; there are 18, 34,"),
    ('resnet', {'variant': '50_32x4d'}, "variant '50_32x4d' is unknown"),
    (
      'resnext',
      {'variant': '50'},
      "variant '50' is unknown; there are 50_32x4d, 101_32x4d",
    ),
    ('resnet', {'stem': '5x5'}, "stem '5x5' is unknown; there are 7x7, 3x3"),
    ('resnet', {'depth': 20}, 'depth is 20; it takes the blocks of each stage'),
    ('resnet', {'depth': (2, 0)}, 'depth is (2, 0); it takes whole numbers'),
    ('resnet', {'width': 0}, 'width is 0; it takes whole numbers'),
    (
      'resnext',
      {'width': 40},
      'width is 40, which makes convolutions of 80 channels; they must divide '
      'into 32 groups',
    ),
    ('resnet', {'preactivation': 2}, 'preactivation is 2; it takes true or'),
    (
      'resnet',
      {'preactivation': True, 'zero_init': True},
      'zero_init is true, but with preactivation no norm ends a block',
    ),
    ('resnet', {'dropout': 1.5}, 'dropout is 1.5; it takes a share'),
    (
      'resnet',
      {'image_shape': (28, 28)},
      'image_shape (28, 28) is not (height, width, channels)',
    ),
  ],
)
def test_what_cannot_be_made_is_said_in_one_line(name, kwargs, message):
  with pytest.raises(ValueError, match=re.escape(message)) as caught:
    shaped(name, **kwargs)
  assert '\n' not in str(caught.value)
