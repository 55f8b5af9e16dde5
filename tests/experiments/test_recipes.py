"""Configs after published recipes, against what was published.

big_vision: google-research/big_vision, configs/vit_s16_i1k.py, with optax.py
and utils.py, which say how its numbers work together.
"""

import dataclasses
import math

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import command
from train import optim
from train import paths
from train import program as program_lib
from train.data import sources

# ImageNet's training images, of which big_vision trains on 99 %.
IMAGES = 1_281_167
STEPS = round(90 * (IMAGES - 12_812) / 1024)


@pytest.fixture(scope='module')
def program():
  """imagenet_vit_s16 on as many images, all of them the same bytes."""

  def split(size):
    return sources.Split(
      {
        'image': np.broadcast_to(np.uint8(0), (size, 224, 224, 3)),
        'label': np.broadcast_to(np.int32(0), (size,)),
      }
    )

  config, _, _ = command.load_config('imagenet_vit_s16', [])
  dataset = sources.Dataset(
    'imagenet2012',
    {'train': split(IMAGES), 'validation': split(50_000)},
    classes=tuple(map(str, range(1000))),
  )
  return program_lib.create(config, dataset)


def published_rate(step):
  """big_vision's create_learning_rate_schedule: cosine, 10,000 of warm-up."""
  progress = min(max((step - 10_000) / (STEPS - 10_000), 0), 1)
  decay = 0.5 * (1 + math.cos(math.pi * progress))
  return 1e-3 * decay * min(1, step / 10_000)


def test_the_vit_recipe_has_the_published_numbers(program):
  config = program.config
  fields = dataclasses.asdict(config)
  assert fields['total_steps'] == STEPS == 111_477
  assert fields['seed'] == 0
  assert fields['task'] == 'classification'
  assert fields['loss'] == 'softmax_cross_entropy_with_integer_labels'
  assert fields['grad_clip_norm'] == 1.0
  assert fields['weight_decay_mask']
  for unused in ('label_smoothing', 'l1', 'l2', 'rate_multipliers'):
    assert not fields[unused]
  for unused in ('grad_clip_value', 'ema_decay', 'init_from'):
    assert fields[unused] is None
  assert fields['accumulate'] == 1
  data = config.data
  assert (data.name, data.batch_size) == ('imagenet2012', 1024)
  assert data.image_size == 224
  # value_range(-1, 1) of what is 0 to 255.
  np.testing.assert_allclose(data.normalize['mean'], 127.5)
  np.testing.assert_allclose(data.normalize['std'], 127.5)
  sizes = {name: len(split) for name, split in program.dataset.splits.items()}
  assert sizes == {
    'train': IMAGES - 12_812,
    'validation': 12_812,
    'test': 50_000,
  }


def test_the_vit_recipe_augments_as_published(program):
  crop, flip, randaugment, mixup = program.config.data.augment
  # decode_jpeg_and_inception_crop: 5 to 100 % of the area, aspect 3/4 to 4/3.
  assert crop == {
    'name': 'stretch',
    'min_area': 0.05,
    'max_area': 1.0,
    'max_aspect': pytest.approx(4 / 3),
  }
  assert flip == {'name': 'flip', 'probability': 0.5}
  # randaug(2,10), on a scale whose 10 is rotation by 30 degrees.
  assert randaugment == {'name': 'randaugment', 'num_ops': 2, 'magnitude': 30}
  assert mixup == {'name': 'mixup', 'alpha': 0.2, 'probability': 1.0}


def test_the_vit_recipe_trains_the_published_model(program):
  model = program.model
  assert len(model.blocks) == 12
  assert model.blocks[0].attention.num_heads == 6
  assert model.embed.kernel.shape == (16, 16, 3, 384)
  assert model.blocks[0].mlp.expand.kernel.shape == (384, 1536)
  # rep_size=True, pool_type='gap', posemb='sincos2d'; no dropout.
  assert model.pre_logits.kernel.shape == (384, 384)
  assert model.positions is None
  assert model.class_token is None
  assert not model.draws
  # wd_mults: what is decayed are all kernels and nothing else.
  params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  decayed = optim.has_many_dimensions(params)
  for path, decays in paths.flatten(decayed).items():
    assert decays == (path[-1] == 'kernel'), path


def test_the_vit_recipe_has_the_published_rates(program):
  for step in (0, 1, 100, 5_000, 9_999, 10_000, 10_001, 35_000, 60_738.5,
               90_000, STEPS - 1, STEPS):  # fmt: skip
    assert float(program.schedule(step)) == pytest.approx(
      published_rate(step), rel=1e-4, abs=1e-11
    )
  # By hand: half of the ramp, the peak, and half of the cosine.
  halfway = (10_000 + STEPS) / 2
  for step, rate in [(5_000, 5e-4), (10_000, 1e-3), (halfway, 5e-4)]:
    assert float(program.schedule(step)) == pytest.approx(rate, rel=1e-4)


def test_the_vit_recipe_updates_as_big_vision_chains_its_steps(program):
  """Clipping, Adam, rate, decay of kernels, and then the schedule."""
  random = np.random.default_rng(0)
  shapes = {'kernel': (5, 4), 'bias': (4,)}
  params = {name: random.normal(size=shape) for name, shape in shapes.items()}
  tx = optim.create(program.config, program.schedule)
  ours = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
  state = tx.init(ours)
  mu = {name: np.zeros(shape) for name, shape in shapes.items()}
  nu = {name: np.zeros(shape) for name, shape in shapes.items()}
  for step in range(4):
    # The first two are longer than 1, the others shorter.
    size = 3 if step < 2 else 0.05
    grads = {n: size * random.normal(size=s) for n, s in shapes.items()}
    norm = math.sqrt(sum((g**2).sum() for g in grads.values()))
    assert (norm > 1) == (step < 2)
    updates, state = tx.update(
      jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), grads), state, ours
    )
    for name, grad in grads.items():
      grad = grad / max(norm, 1)
      first = 0.9 * mu[name] + 0.1 * grad
      nu[name] = 0.999 * nu[name] + 0.001 * grad**2
      adam = (first / (1 - 0.9 ** (step + 1))) / (
        np.sqrt(nu[name] / (1 - 0.999 ** (step + 1))) + 1e-8
      )
      mu[name] = first
      decay = 1e-4 * params[name] if name == 'kernel' else 0
      expected = -(published_rate(step) / 1e-3) * (1e-3 * adam + decay)
      # First moments in bfloat16 are good to a half of a percent.
      np.testing.assert_allclose(
        updates[name], expected, rtol=0, atol=1e-2 * np.abs(expected).max()
      )
      params[name] = params[name] + expected
    ours = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
  dtypes = {leaf.dtype for leaf in jax.tree.leaves(state) if leaf.ndim}
  assert dtypes == {jnp.dtype('bfloat16'), jnp.dtype('float32')}
