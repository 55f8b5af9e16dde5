"""The ViT against the papers' equations in float64, Pillow, and itself."""

import re

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest
import scipy.special

import models
from models import position
from models import vit
from train import flops

# A small one: a grid of 3x2 patches, 3 blocks.
SMALL = {
  'image_shape': (12, 8, 3),
  'num_classes': 5,
  'patch_size': 4,
  'width': 16,
  'depth': 3,
  'num_heads': 2,
}


def shaped(**kwargs):
  """A model without numbers: its structure, shapes and dtypes."""
  return nnx.eval_shape(
    lambda: models.create('vit', **kwargs, rngs=nnx.Rngs(0))
  )


def small(**kwargs):
  """The small model, its parameters NumPy's, which takes no compiling."""
  model = shaped(**SMALL | kwargs)
  random = np.random.default_rng(0)

  def numbers(leaf):
    return jnp.asarray(random.normal(size=leaf.shape) / 3, leaf.dtype)

  nnx.update(model, jax.tree.map(numbers, nnx.state(model)))
  return model


def outputs(model, image=None, **kwargs):
  """What the model gives, compiled as a whole: [B, 5]."""
  graphdef, params = nnx.split(model)
  image = images() if image is None else image
  return jax.jit(lambda p, x: nnx.merge(graphdef, p)(x, **kwargs))(
    params, image
  )


def images(count=3, seed=0):
  random = np.random.default_rng(seed)
  shape = (count, *SMALL['image_shape'])
  return jnp.asarray(random.normal(size=shape), 'float32')


def rngs(seed=0):
  return nnx.Rngs(dropout=seed)


# ---------------------------------------------------------------- parameters


# Zhai et al. (2022), table 2, in millions; the head is not of the body.
@pytest.mark.parametrize(
  ('variant', 'millions'), [('g/14', 1011), ('G/14', 1843)]
)
def test_the_giants_have_as_many_parameters_as_the_paper_says(
  variant, millions
):
  model = shaped(variant=variant)
  body = models.count_parameters(model) - models.count_parameters(model.head)
  assert round(body / 1e6) == millions


def test_a_mean_needs_no_token_and_patches_can_be_smaller():
  # B/8, and S/16-gap-norep, of google-research/vision_transformer.
  b8 = shaped(variant='B/16', patch_size=8)
  assert models.count_parameters(b8) == 86_576_872
  s16 = shaped(variant='S/16', pool='mean')
  assert models.count_parameters(s16) == 22_049_896


def test_width_depth_heads_and_mlp_of_a_variant_can_be_others():
  model = shaped(
    variant='G/14', image_shape=(28, 28, 3), width=8, depth=2, num_heads=2
  )
  # Patches, 5 tokens, blocks of 12 D^2 + 13 D, norm, head.
  count = (14 * 14 * 3 + 1) * 8 + (5 + 1) * 8 + 2 * (12 * 64 + 13 * 8) + 16
  assert models.count_parameters(model) == count + 9 * 1000
  assert len(model.blocks) == 2
  wide = shaped(variant='Ti/16', mlp_width=5, num_heads=64)
  assert wide.blocks[0].mlp.expand.kernel.shape == (192, 5)
  assert wide.blocks[0].attention.num_heads == 64


@pytest.mark.parametrize('scan', [False, True])
def test_every_block_has_a_path_of_its_own_and_biases_one_dimension(scan):
  leaves = dict(nnx.to_flat_state(nnx.state(shaped(**SMALL, scan=scan))))
  assert leaves['blocks', 2, 'attention', 'qkv', 'kernel'].shape == (16, 48)
  for path, leaf in leaves.items():
    if path[-1] != 'kernel' and path != ('positions',):
      assert leaf.ndim == 1, path


# ------------------------------------------------------------------- forward


def as_numpy(model):
  """The parameters as nested dicts of float64."""
  return jax.tree.map(
    lambda leaf: np.asarray(leaf, np.float64),
    nnx.to_pure_dict(nnx.state(model, nnx.Param)),
  )


def patches(image, side):
  """The patches of [H, W, C], row by row, each laid out flat: [N, P P C]."""
  height, width, _ = image.shape
  return np.stack([
    image[y : y + side, x : x + side].ravel()
    for y in range(0, height, side)
    for x in range(0, width, side)
  ])  # fmt: skip


def affine(layer, x):
  return x @ layer['kernel'].reshape(-1, layer['bias'].size) + layer['bias']


def norm(layer, x):
  centred = x - x.mean(-1, keepdims=True)
  variance = (centred**2).mean(-1, keepdims=True)
  return centred / np.sqrt(variance + 1e-6) * layer['scale'] + layer['bias']


def gelu(x):
  return x * scipy.special.ndtr(x)


def attention(layer, x, num_heads):
  """Dosovitskiy et al. (2021), appendix A, equations 5 to 8, head by head."""
  qkv = affine(layer['qkv'], x)
  width = x.shape[-1]
  size = width // num_heads
  heads = []
  for start in range(0, width, size):
    q, k, v = (
      qkv[:, part * width + start : part * width + start + size]
      for part in range(3)
    )
    heads.append(scipy.special.softmax(q @ k.T / np.sqrt(size), -1) @ v)
  return affine(layer['project'], np.concatenate(heads, -1))


def encoded(params, tokens, num_heads):
  """Equations 2 and 3, and the norm of 4, of one image: [N, D]."""
  z = tokens
  for _, block in sorted(params['blocks'].items()):
    z = z + attention(block['attention'], norm(block['norm1'], z), num_heads)
    hidden = gelu(affine(block['mlp']['expand'], norm(block['norm2'], z)))
    z = z + affine(block['mlp']['project'], hidden)
  return norm(params['norm'], z)


def close(found, expected):
  """Within what float32 loses in a few layers."""
  np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-4)


def test_the_model_is_the_papers_equations():
  model = small()
  params = as_numpy(model)
  expected = []
  for image in np.asarray(images(), np.float64):
    tokens = np.concatenate(
      [params['class_token'][None], affine(params['embed'], patches(image, 4))]
    )
    z = encoded(params, tokens + params['positions'], num_heads=2)
    expected.append(affine(params['head'], z[0]))
  close(outputs(model), expected)


def test_the_mean_is_of_the_normed_patches_and_pre_logits_end_in_tanh():
  model = small(pool='mean', position='sincos2d', pre_logits=True)
  params = as_numpy(model)
  assert set(params) == {'embed', 'blocks', 'norm', 'pre_logits', 'head'}
  # By hand, x fastest: quarters of sin x, cos x, sin y, cos y, at 4 waves.
  waves = [1, 10 ** (-4 / 3), 10 ** (-8 / 3), 1e-4]
  table = [
    [f(axis * wave) for axis in (x, y) for f in (np.sin, np.cos)
     for wave in waves]
    for y in range(3) for x in range(2)
  ]  # fmt: skip
  expected = []
  for image in np.asarray(images(), np.float64):
    tokens = affine(params['embed'], patches(image, 4)) + table
    z = encoded(params, tokens, num_heads=2).mean(0)
    expected.append(
      affine(params['head'], np.tanh(affine(params['pre_logits'], z)))
    )
  close(outputs(model), expected)


def test_a_patch_is_embedded_as_a_row_of_its_pixels():
  model = small(dtype=jnp.float32)
  embedded = np.asarray(model.embed(images())).reshape(3, 6, 16)
  layer = as_numpy(model)['embed']
  for found, image in zip(embedded, np.asarray(images()), strict=True):
    close(found, affine(layer, patches(image, 4)))


def test_fixed_positions_leave_the_class_token_where_it_was():
  model = small(position='sincos2d')
  params = as_numpy(model)
  table = position.sincos2d((3, 2), 16)
  image = np.asarray(images(1)[0], np.float64)
  patched = affine(params['embed'], patches(image, 4)) + table
  z = np.concatenate([params['class_token'][None], patched])
  expected = affine(params['head'], encoded(params, z, num_heads=2)[0])
  close(outputs(model, images(1))[0], expected)


def test_without_positions_the_order_of_patches_would_not_matter():
  model = small(pool='mean')
  swapped = images().reshape(3, 3, 4, 8, 3)[:, ::-1].reshape(images().shape)
  assert np.abs(outputs(model) - outputs(model, swapped)).max() > 0.01
  model.positions[...] = jnp.zeros_like(model.positions[...])
  close(outputs(model), outputs(model, swapped))


# ------------------------------------------------------------- scan and remat

RANDOM = {'dropout': 0.2, 'stochastic_depth': 0.5}


def loss_and_gradients(train, **kwargs):
  graphdef, params = nnx.split(small(**RANDOM, **kwargs, depth=2))

  @jax.jit
  @jax.value_and_grad
  def loss(params):
    model = nnx.merge(graphdef, params)
    return (model(images(), train=train, rngs=rngs()) ** 2).sum()

  value, grads = loss(params)
  return {(): value} | dict(nnx.to_flat_state(grads))


@pytest.fixture(scope='module')
def plain():
  """Of training with dropout and stochastic depth, blocks one by one."""
  return loss_and_gradients(train=True)


@pytest.mark.slow
@pytest.mark.parametrize(
  'kwargs',
  [{'remat': True}, {'scan': True, 'remat': True}, {'attention': 'softmax'}],
)
def test_how_it_is_computed_changes_neither_values_nor_gradients(plain, kwargs):
  found = loss_and_gradients(train=True, **kwargs)
  for path, value in plain.items():
    np.testing.assert_allclose(
      found[path], value, rtol=1e-4, atol=1e-5 * abs(value).max()
    )


def test_scan_evaluates_as_a_loop_does():
  close(outputs(small(scan=True)), outputs(small()))


@pytest.mark.parametrize('train', [False, True])
def test_scan_compiles_one_block_however_many_there_are(train):
  def products(depth, scan):
    graphdef, params = nnx.split(shaped(**SMALL | {'depth': depth}, scan=scan))

    def forward(params):
      model = nnx.merge(graphdef, params)
      return model(images(), train=train)

    return str(jax.make_jaxpr(forward)(params)).count('dot_general[')

  assert products(2, scan=True) == products(9, scan=True) == products(1, False)
  assert products(9, scan=False) > products(2, scan=False)


def test_remat_computes_blocks_again_in_training_alone():
  def operations(train, remat):
    graphdef, params = nnx.split(shaped(**SMALL, remat=remat))

    def loss(params):
      return nnx.merge(graphdef, params)(images(), train=train).sum()

    return flops.count(jax.grad(loss), params)

  plain = operations(train=True, remat=False)
  assert operations(train=False, remat=True) == plain
  # 3 blocks of 3 images, 7 tokens, width 16: two products of attention, and all
  # kernels but the last, on whose product no gradient depends.
  again = 2 * 3 * 3 * (2 * 7 * 7 * 16 + 7 * (3 + 1 + 4) * 16 * 16)
  assert operations(train=True, remat=True) == plain + again


# ------------------------------------------------------------ stochastic depth


def test_the_share_that_skips_rises_in_even_steps():
  assert shaped(**SMALL, stochastic_depth=0.6).rates == pytest.approx(
    (0, 0.3, 0.6)
  )
  assert shaped(**SMALL | {'depth': 1}, stochastic_depth=0.6).rates == (0,)


def through_blocks(model, x):
  """What the blocks make of [B, N, D] in training."""
  graphdef, params = nnx.split(model)

  @jax.jit
  def run(params):
    model = nnx.merge(graphdef, params)
    return model._through_blocks(x, train=True, rngs=rngs())

  return np.asarray(run(params))


def branches(count, **kwargs):
  """What each block's attention adds to each example: [blocks, count].

  Every branch adds a constant vector, by its last bias, to the same image.
  """
  model = small(stochastic_depth=0.6, **kwargs)
  state = nnx.state(model)
  nnx.update(model, jax.tree.map(jnp.zeros_like, state))
  for i, block in enumerate(model.blocks):
    block.attention.project.bias[...] = jnp.zeros(16).at[i].set(1.0)
    block.mlp.project.bias[...] = jnp.zeros(16).at[8 + i].set(1.0)
  out = through_blocks(model, jnp.zeros((count, 6, 16)))
  assert np.array_equal(out, np.broadcast_to(out[:, :1], out.shape))
  return out[:, 0].T


@pytest.mark.parametrize('scan', [False, True])
def test_branches_skip_by_their_rates_independently(scan):
  count = 4000
  added = branches(count, scan=scan)
  for first in (0, 8):
    for i, rate in enumerate((0, 0.3, 0.6)):
      row = added[first + i]
      # What stays is scaled up, so that the mean is 1.
      values, counts = np.unique(row.round(4), return_counts=True)
      assert set(values) <= {0, np.float32(1 / (1 - rate)).round(4)}
      share = counts[values == 0].sum() / count
      assert abs(share - rate) < 4 * np.sqrt(0.25 / count)
  # Four masks, no two of which say anything about each other.
  drawn = added[[1, 2, 9, 10]] > 0
  correlation = np.corrcoef(drawn) - np.eye(4)
  assert np.abs(correlation).max() < 5 / np.sqrt(count)


@pytest.mark.slow
@pytest.mark.parametrize('scan', [False, True])
def test_every_block_drops_units_of_its_own(scan):
  model = small(dropout=0.5, scan=scan)
  nnx.update(model, jax.tree.map(jnp.zeros_like, nnx.state(model)))
  for i, block in enumerate(model.blocks):
    block.attention.project.bias[...] = jnp.full(16, 10.0**i)
  out = through_blocks(model, jnp.zeros((1, 500, 16))).ravel()
  # Each decimal digit is a block's mask: 0, or 1 / (1 - 0.5).
  digits = out.round().astype(int)[None] // 10 ** np.arange(3)[:, None] % 10
  assert set(digits.ravel()) == {0, 2}
  correlation = np.corrcoef(digits) - np.eye(3)
  assert np.abs(correlation).max() < 5 / np.sqrt(out.size)


@pytest.mark.parametrize('scan', [False, True])
def test_evaluation_draws_nothing(scan):
  expected = outputs(small(scan=scan))
  model = small(**RANDOM, scan=scan)
  assert np.array_equal(outputs(model), expected)
  assert np.array_equal(outputs(model, rngs=rngs()), expected)


@pytest.mark.parametrize('scan', [False, True])
def test_what_draws_nothing_needs_no_random_numbers(scan):
  model = small(scan=scan)
  assert np.array_equal(outputs(model, train=True), outputs(model))


# ------------------------------------------------------------------ positions


def table(grid, before=0, width=3):
  random = np.random.default_rng(0)
  rows = before + grid[0] * grid[1]
  return random.normal(size=(rows, width)).astype(np.float32)


def test_positions_of_the_same_grid_stay_as_they_are():
  old = table((4, 6), before=1)
  assert np.array_equal(position.resize_positions(old, (4, 6), (4, 6)), old)


@pytest.mark.parametrize('to_grid', [(7, 9), (3, 2), (8, 4)])
def test_positions_are_resized_as_pillow_resizes(to_grid):
  old = table((5, 6))
  found = position.resize_positions(old, (5, 6), to_grid)
  assert found.shape == (to_grid[0] * to_grid[1], 3)
  for channel in range(3):
    image = Image.fromarray(old[:, channel].reshape(5, 6))
    expected = image.resize(to_grid[::-1], Image.Resampling.BICUBIC)
    close(found[:, channel], np.asarray(expected).ravel())


def test_equal_positions_stay_equal_and_a_class_token_is_left_alone():
  old = np.full((1 + 16, 2), 3.0, np.float32)
  old[0] = [5, -7]
  new = position.resize_positions(old, (4, 4), (6, 5))
  assert new.shape == (1 + 30, 2)
  assert np.array_equal(new[0], [5, -7])
  close(new[1:], 3.0)


def test_a_model_at_another_resolution_takes_resized_positions():
  small_one = shaped(**SMALL)
  large = shaped(**SMALL | {'image_shape': (24, 24, 3)})
  old = table(small_one.grid, before=1, width=16)
  new = position.resize_positions(old, small_one.grid, large.grid)
  assert new.shape == large.positions.shape == (1 + 36, 16)


def test_a_table_smaller_than_its_grid_is_refused():
  with pytest.raises(ValueError, match='too few for a grid of 3x3'):
    position.resize_positions(table((2, 2)), (3, 3), (4, 4))


# ------------------------------------------------------------------ the start


def test_parameters_start_as_in_the_authors_code():
  model = jax.jit(
    lambda: models.create(
      'vit',
      **SMALL | {'width': 96, 'depth': 1},
      pre_logits=True,
      rngs=nnx.Rngs(0),
    )
  )()
  block = model.blocks[0]
  # Glorot: uniform up to sqrt(6 / (in + out)), for q, k, v one by one.
  for layer, limit in [
    (block.attention.qkv, np.sqrt(6 / (96 + 96))),
    (block.attention.project, np.sqrt(6 / (96 + 96))),
    (block.mlp.expand, np.sqrt(6 / (96 + 4 * 96))),
    (block.mlp.project, np.sqrt(6 / (96 + 4 * 96))),
  ]:
    largest = np.abs(layer.kernel[...]).max()
    assert 0.98 * limit < largest <= limit
  assert 0 < np.abs(block.mlp.expand.bias[...]).max() < 1e-5
  assert np.std(model.positions[...]) == pytest.approx(0.02, rel=0.1)
  for zero in (model.class_token, model.head.kernel, model.head.bias):
    assert not np.any(zero[...])


# --------------------------------------------------------------------- dtypes


@pytest.mark.parametrize('scan', [False, True])
def test_bfloat16_computes_in_it_and_stores_float32(scan):
  model = small(dtype=jnp.bfloat16, scan=scan, **RANDOM)
  for train in (False, True):
    found = jax.eval_shape(
      lambda x, train=train: model(x, train=train, rngs=rngs()), images()
    )
    assert found.dtype == jnp.bfloat16
  stored = {x.dtype for x in jax.tree.leaves(nnx.state(model))}
  assert stored == {jnp.dtype('float32')}
  exact = outputs(small())
  found = outputs(model).astype(jnp.float32)
  assert np.abs(found - exact).max() < 0.1 * np.abs(exact).max()


# ------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
  ('kwargs', 'message'),
  [
    (
      {'variant': 'S/17'},
      "variant 'S/17' is unknown; there are Ti/16, S/16, S/32, B/16, B/32, "
      'L/16, L/32, H/14, g/14, G/14',
    ),
    (
      {'image_shape': (224, 220, 3)},
      'image_shape (224, 220, 3) does not divide into patches of patch_size 16',
    ),
    (
      {'image_shape': (8, 8, 3)},
      'image_shape (8, 8, 3) does not divide into patches of patch_size 16',
    ),
    ({'image_shape': (224, 224)}, 'is not (height, width, channels)'),
    ({'width': 100}, 'width is 100, which does not divide into num_heads 6'),
    ({'num_heads': 5}, 'width is 384, which does not divide into num_heads 5'),
    ({'depth': 0}, 'depth is 0; it takes whole numbers of at least 1'),
    ({'patch_size': 0}, 'patch_size is 0; it takes whole numbers'),
    ({'mlp_width': 1.5}, 'mlp_width is 1.5; it takes whole numbers'),
    ({'num_heads': -3}, 'num_heads is -3; it takes whole numbers'),
    ({'pool': 'max'}, "pool 'max' is unknown; there are cls, mean"),
    (
      {'position': 'rotary'},
      "position 'rotary' is unknown; there are learned, sincos2d",
    ),
    (
      {'position': 'sincos2d', 'width': 90},
      "width is 90; position 'sincos2d' takes multiples of 4 from 8 up",
    ),
    (
      {'attention': 'flash'},
      "attention 'flash' is unknown; there are dot_product, softmax",
    ),
    ({'dropout': 1.5}, 'dropout is 1.5; it takes a share from 0 to 1'),
    ({'stochastic_depth': 1}, 'stochastic_depth is 1; it takes a share'),
  ],
)
def test_bad_input_is_one_clear_line(kwargs, message):
  with pytest.raises(ValueError, match=re.escape(message)) as caught:
    shaped(**kwargs)
  assert '\n' not in str(caught.value)


def test_the_table_says_the_patch_in_the_name():
  for name, entry in vit.VARIANTS.items():
    assert name.endswith(f'/{entry["patch_size"]}')
    assert entry['width'] % entry['num_heads'] == 0
