"""Augmentations against Pillow, NumPy, SciPy and what was drawn by hand."""

import colorsys
import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import PIL.ImageEnhance
import PIL.ImageOps
import pytest
import scipy.ndimage
import scipy.stats

from tests import conftest
from train import config as config_lib
from train.data import augment as augment_lib
from train.data import randaugment

SIDE = 16
PHOTO = scipy.ndimage.gaussian_filter(
  np.random.default_rng(0).normal(size=(SIDE, SIDE, 3)), (2, 2, 0)
) * 300 + [90, 120, 150]
# Of another height than width, with 0 but without 255.
PHOTO = np.clip(PHOTO, 0, 240).astype('uint8')[:12]
# Each one with arguments that make it do nothing.
NOTHING = {
  'pad_crop': {'padding': 0},
  'flip': {'probability': 0},
  'translate': {'fraction': 0},
  'rotate': {'degrees': 0},
  'stretch': {'min_area': 1, 'max_area': 1, 'max_aspect': 1},
  'colour': {'brightness': 0, 'contrast': 0, 'saturation': 0, 'hue': 0},
  'noise': {'std': 0},
  'cutout': {'size': 0},
  'mixup': {'probability': 0},
  'cutmix': {'probability': 0},
  'randaugment': {'num_ops': 0},
}


def keys(n, seed=0):
  return jax.random.split(jax.random.key(seed), n)


def images(n, shape=(6, 9, 3)):
  rng = np.random.default_rng(0)
  return rng.integers(0, 256, (n, *shape)).astype('uint8')


@functools.cache  # Compiling is what takes the time.
def compiled(arguments, key, shape):
  blocks = augment_lib.resolve((dict(arguments),), 'toy', key, shape)
  return jax.jit(augment_lib.create(blocks, key))


def augmented(block, inputs, n=None, seed=0):
  """The batch after one augmentation; of n times the same where n is given."""
  if n is not None:
    inputs = np.repeat(inputs[None], n, 0)
  key = 'image' if inputs.ndim == 4 else 'features'
  if isinstance(block, str):
    block = {'name': block}
  augment = compiled(tuple(block.items()), key, inputs.shape[1:])
  batch = {key: inputs, 'label': np.arange(len(inputs)) * 10}
  batch = augment(keys(len(inputs), seed), batch)
  return jax.tree.map(np.asarray, batch)


def changed(block, inputs, n=None, seed=0):
  batch = augmented(block, inputs, n, seed)
  return batch['image' if 'image' in batch else 'features']


def uniform(values, low, high):
  """Whether values look as if they were drawn uniformly."""
  law = scipy.stats.uniform(low, high - low)
  return scipy.stats.kstest(values, law.cdf).pvalue > 1e-3


# ---------------------------------------------------------------- all of them


@pytest.mark.parametrize('name', augment_lib.AUGMENTATIONS)
@pytest.mark.parametrize('shape', [(8, 8, 1), (6, 9, 3)])
def test_the_result_has_the_shape_and_range_of_the_images(name, shape):
  result = changed(name, images(16, shape))
  assert result.shape == (16, *shape)
  assert result.dtype == np.float32
  assert result.min() >= 0
  assert result.max() <= 255
  assert (result != images(16, shape)).any()


@pytest.mark.parametrize('name', augment_lib.AUGMENTATIONS)
@pytest.mark.parametrize('channels', [1, 3])
def test_without_strength_it_gives_back_the_same_bits(name, channels):
  arguments = NOTHING[name]
  if channels == 1:
    arguments = {k: v for k, v in arguments.items() if k != 'hue'}
  inputs = images(8, (9, 7, channels))
  batch = augmented({'name': name, **arguments}, inputs)
  assert (batch['image'] == inputs).all()
  assert not batch.get('other_share', np.zeros(8)).any()


@pytest.mark.parametrize('name', augment_lib.AUGMENTATIONS)
def test_an_example_depends_on_its_own_key_and_place_alone(name):
  inputs = images(16)
  whole = changed(name, inputs)
  inputs[5:] = 7
  # Where two are mixed, the other of place 4 is another now.
  alone = changed(name, inputs)[:4]
  np.testing.assert_allclose(alone, whole[:4], atol=1e-4)


@pytest.mark.parametrize('name', augment_lib.AUGMENTATIONS)
def test_equal_keys_give_equal_results_and_others_do_not(name):
  inputs = images(16)
  assert (changed(name, inputs) == changed(name, inputs)).all()
  assert (changed(name, inputs) != changed(name, inputs, seed=1)).any()


def test_each_place_in_the_list_has_a_stream_of_its_own():
  inputs = images(64)
  first = changed('flip', inputs)
  blocks = augment_lib.resolve(
    ({'name': 'noise', 'std': 0}, 'flip'), 'toy', 'image', (6, 9, 3)
  )
  batch = {'image': inputs, 'label': np.arange(64)}
  second = jax.jit(augment_lib.create(blocks, 'image'))(keys(64), batch)
  second = second['image']
  same = (first == np.asarray(second)).all((1, 2, 3)).mean()
  assert 0.2 < same < 0.8


def test_they_apply_in_the_order_of_the_list():
  # Cut out and then made noisy, or noisy and then cut out.
  batch = {'image': images(8), 'label': np.arange(8)}
  zeros = {}
  for words in ('cutout,noise', 'noise,cutout'):
    blocks = augment_lib.resolve(words, 'toy', 'image', (6, 9, 3))
    augment = jax.jit(augment_lib.create(blocks, 'image'))
    result = augment(keys(8), batch)['image']
    zeros[words] = int((result == 0).all(-1).sum())
  assert zeros['noise,cutout'] > 2 * zeros['cutout,noise']


def test_no_augmentation_changes_no_value():
  batch = {'image': images(4), 'label': np.arange(4)}
  result = augment_lib.create((), 'image')(keys(4), batch)
  assert (np.asarray(result['image']) == batch['image']).all()
  assert set(result) == {'image', 'label'}


_SHARDED = """
import jax
import numpy as np
from train import mesh as mesh_lib
from train import partition
from train.data import augment

assert jax.device_count() == 8
images = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 3))
batch = {'image': images.astype('uint8'), 'label': np.arange(16)}
keys = jax.random.split(jax.random.key(0), 16)
# The other mix takes its share and its other as this one does.
names = [name for name in augment.AUGMENTATIONS if name != 'mixup']
blocks = augment.resolve(','.join(names), 'toy', 'image', (8, 8, 3))
function = jax.jit(augment.create(blocks, 'image'))
one = function(keys, batch)
sharding = partition.batched(mesh_lib.make_mesh())
eight = function(*jax.device_put((keys, batch), sharding))
assert len(eight['image'].sharding.device_set) == 8
for key in one:
  difference = np.abs(np.asarray(one[key]) - np.asarray(eight[key]))
  print(key, difference.max())
  # Where a number is rounded, the last bit can decide.
  assert (difference > 1e-3).mean() < 1e-3, (key, difference.max())
"""


@pytest.mark.slow
def test_eight_devices_augment_as_one_does():
  ran = subprocess.run(
    [sys.executable, '-c', _SHARDED],
    capture_output=True, text=True, cwd=conftest.REPOSITORY,
    env=conftest.environment(
      XLA_FLAGS='--xla_force_host_platform_device_count=8', JAX_PLATFORMS='cpu'
    ),
  )  # fmt: skip
  assert ran.returncode == 0, ran.stderr


# ------------------------------------------------------------------- geometry


def test_pad_crop_takes_every_window_of_the_padded_image_as_often():
  image = np.arange(1, 37).reshape(6, 6, 1).astype('uint8')
  padded = np.pad(image, ((2, 2), (2, 2), (0, 0)))
  windows = {
    padded[i : i + 6, j : j + 6].astype('float32').tobytes(): (i, j)
    for i in range(5)
    for j in range(5)
  }
  results = changed({'name': 'pad_crop', 'padding': 2}, image, 2000)
  counts = np.zeros((5, 5))
  for result in results:
    counts[windows[result.tobytes()]] += 1
  assert scipy.stats.chisquare(counts.ravel()).pvalue > 1e-3


@pytest.mark.parametrize('probability', [0.5, 0.1, 1.0])
def test_flip_mirrors_the_columns_as_often_as_it_says(probability):
  results = changed({'name': 'flip', 'probability': probability}, PHOTO, 2000)
  mirrored = (results == PHOTO[:, ::-1]).all((1, 2, 3))
  assert (mirrored ^ (results == PHOTO).all((1, 2, 3))).all()
  share = scipy.stats.binomtest(int(mirrored.sum()), 2000, probability)
  assert share.pvalue > 1e-3


def sources(block, n, shape):
  """The [2, 3] matrix of each warp, from what it does to two ramps.

  Each takes (y, x, 1) of a pixel, from the centre, to where it was.
  """
  height, width = shape
  y, x = np.mgrid[:height, :width]
  ramps = np.stack([4 * y, 4 * x, 0 * y + 200], -1).astype('uint8')
  matrices = []
  for result in changed(block, ramps, n).astype('float64'):
    at = result[..., :2] / 4
    # Not where there was nothing, nor where the border was repeated.
    here = (result[..., 2] > 199).ravel()
    here &= ((at > 0.01) & (at < [height - 1.01, width - 1.01])).all(-1).ravel()
    middle = [(height - 1) / 2, (width - 1) / 2]
    places = np.stack([y.ravel(), x.ravel()], -1) - middle
    places = np.concatenate([places, np.ones((len(places), 1))], -1)[here]
    found, residual, rank, _ = np.linalg.lstsq(
      places, (at - middle).reshape(-1, 2)[here]
    )
    assert rank == 3
    assert (residual < 1e-4).all()
    matrices.append(found.T)
  return np.array(matrices)


def test_translate_moves_by_a_uniform_part_of_each_side():
  matrices = sources({'name': 'translate', 'fraction': 0.25}, 500, (20, 32))
  np.testing.assert_allclose(
    matrices[:, :, :2], np.tile(np.eye(2), (500, 1, 1)), atol=1e-4
  )
  assert uniform(matrices[:, 0, 2], -5, 5)
  assert uniform(matrices[:, 1, 2], -8, 8)
  assert abs(np.corrcoef(matrices[:, :, 2].T)[0, 1]) < 0.15


def test_rotate_turns_about_the_centre_by_a_uniform_angle():
  matrices = sources({'name': 'rotate', 'degrees': 30}, 500, (21, 32))
  angles = np.arctan2(matrices[:, 0, 1], matrices[:, 0, 0])
  turns = [[[np.cos(a), np.sin(a)], [-np.sin(a), np.cos(a)]] for a in angles]
  np.testing.assert_allclose(matrices[:, :, :2], turns, atol=1e-4)
  np.testing.assert_allclose(matrices[:, :, 2], 0, atol=1e-3)
  assert uniform(np.rad2deg(angles), -30, 30)


def test_stretch_shows_a_box_of_uniform_area_within_the_image():
  block = {'name': 'stretch', 'min_area': 0.2, 'max_area': 0.7, 'max_aspect': 2}
  # 0.7 of the area in a shape of 2 to 1 would be longer than the image.
  matrices = sources(block, 500, (30, 40))
  np.testing.assert_allclose(matrices[:, 0, 1], 0, atol=1e-4)
  np.testing.assert_allclose(matrices[:, 1, 0], 0, atol=1e-4)
  sides = np.stack([matrices[:, 0, 0], matrices[:, 1, 1]], -1)
  areas, aspects = sides.prod(-1), sides[:, 1] / sides[:, 0]
  clipped = (sides > 0.9999).any(-1)
  assert 0 < clipped.mean() < 0.2
  assert sides.max() < 1.0001
  assert areas.min() > 0.2 - 1e-3
  assert areas.max() < 0.7 + 1e-3
  # Shapes that fit, whatever the area is, are not clipped.
  fits = areas < 0.5
  assert uniform(areas[fits], 0.2, 0.5)
  assert uniform(np.log(aspects[fits]), -np.log(2), np.log(2))
  centres = matrices[:, :, 2] / [30, 40]
  room = (1 - sides) / 2
  assert (abs(centres) <= room + 1e-3).all()
  within = (centres[~clipped] / room[~clipped]).T
  assert uniform(within[0], -1, 1)
  assert uniform(within[1], -1, 1)


def test_stretch_to_more_than_the_area_shows_the_whole_image_smaller():
  block = {'name': 'stretch', 'min_area': 4, 'max_area': 4, 'max_aspect': 1}
  white = np.full((12, 12, 1), 255, 'uint8')
  for result in changed(block, white, 20):
    shown = result[..., 0] > 254.9
    assert shown.any(0).sum() == 6
    assert shown.any(1).sum() == 6
    assert (result[~shown] == 0).all()


@pytest.mark.parametrize('fill', [0, 128])
def test_a_warp_is_that_of_pillow(fill):
  height, width, _ = PHOTO.shape
  rng = np.random.default_rng(0)
  for _ in range(20):
    matrix = rng.normal(size=(2, 3)) * 0.3 + np.eye(2, 3)
    matrix[:, 2] *= 5
    (a, b, c), (d, e, f) = matrix
    # Pillow counts x before y, and from the corner of the first pixel.
    middle = np.array([height / 2, width / 2])
    start = middle - matrix[:, :2] @ middle
    terms = (e, d, f + start[1], b, a, c + start[0])
    moved = randaugment.warp(PHOTO.astype('float32'), matrix, fill)
    for channel in range(3):
      plane = PIL.Image.fromarray(PHOTO[..., channel].astype('float32'))
      expected = plane.transform(
        (width, height),
        PIL.Image.Transform.AFFINE,
        terms,
        PIL.Image.Resampling.BILINEAR,
        fillcolor=fill,
      )
      np.testing.assert_allclose(moved[..., channel], expected, atol=0.02)


@pytest.mark.parametrize(('down', 'right'), [(0, 0), (2, 0), (-3, 1), (0, -12)])
def test_a_shift_by_whole_pixels_is_exact(down, right):
  matrix = ((1, 0, -down), (0, 1, -right))
  moved = randaugment.warp(PHOTO.astype('float32'), matrix, 0)
  expected = scipy.ndimage.shift(PHOTO, (down, right, 0), order=0)
  assert (np.asarray(moved) == expected).all()


# --------------------------------------------------------------------- values


@pytest.mark.parametrize(
  ('kind', 'enhance'),
  [
    ('brightness', PIL.ImageEnhance.Brightness),
    ('contrast', PIL.ImageEnhance.Contrast),
    ('saturation', PIL.ImageEnhance.Color),
  ],
)
def test_colour_enhances_as_pillow_by_a_uniform_factor(kind, enhance):
  picture = PIL.Image.fromarray(PHOTO // 2 + 40)  # Nothing is clipped.
  nothing = NOTHING['colour'] | {kind: 0.5}
  results = changed({'name': 'colour', **nothing}, np.asarray(picture), 300)
  plain, image = np.asarray(enhance(picture).enhance(0.0), float), picture
  away = np.asarray(image, float) - plain
  factors = ((results - plain) * away).sum((1, 2, 3)) / (away**2).sum()
  assert uniform(factors, 0.5, 1.5)
  for factor, result in zip(factors[:50], results, strict=False):
    expected = enhance(picture).enhance(factor)
    np.testing.assert_allclose(result, expected, atol=1.6)


@pytest.mark.parametrize('turn', [0, 0.1, -0.25, 0.5, 1])
def test_the_hue_turns_as_that_of_colorsys(turn):
  corners = np.array(np.meshgrid(*[[0, 128, 255]] * 3)).reshape(3, -1).T
  pixels = np.concatenate([corners, PHOTO.reshape(-1, 3)])
  expected = []
  for pixel in pixels / 255:
    hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
    expected.append(colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value))
  result = randaugment.turn_hue(jnp.asarray(pixels[None], jnp.float32), turn)
  np.testing.assert_allclose(
    result[0], 255 * np.array(expected), atol=2e-3, rtol=0
  )


def test_colour_turns_the_hue_by_a_uniform_part_of_the_circle():
  red = np.full((2, 2, 3), [200, 50, 50], 'uint8')
  block = {'name': 'colour', **NOTHING['colour'], 'hue': 0.2}
  results = changed(block, red, 500)[:, 0, 0] / 255
  hues = np.array([colorsys.rgb_to_hsv(*pixel)[0] for pixel in results])
  assert uniform((hues + 0.5) % 1 - 0.5, -0.2, 0.2)


def test_noise_is_normal_and_each_value_has_its_own():
  image = np.full((32, 32, 3), 128, 'uint8')
  results = changed({'name': 'noise', 'std': 10}, image, 8)
  found = scipy.stats.kstest(results.ravel(), scipy.stats.norm(128, 10).cdf)
  assert found.pvalue > 1e-3
  assert len(np.unique(results)) > 0.9 * results.size
  rows = np.full((500, 7), -1e3, 'float32')
  found = changed({'name': 'noise', 'std': 0.5}, rows)
  found = scipy.stats.kstest(found.ravel(), scipy.stats.norm(-1e3, 0.5).cdf)
  assert found.pvalue > 1e-3


@pytest.mark.parametrize('size', [3, 4, 8])
def test_cutout_blanks_a_square_around_any_pixel(size):
  white = np.full((8, 8, 3), 255, 'uint8')
  results = changed({'name': 'cutout', 'size': size}, white, 1000)
  assert set(np.unique(results)) == {0, 255}
  expected = {}
  for i in range(8):
    for j in range(8):
      image = np.full((8, 8, 3), 255, 'float32')
      top, left = i - size // 2, j - size // 2
      image[max(top, 0) : top + size, max(left, 0) : left + size] = 0
      expected.setdefault(image.tobytes(), []).append((i, j))
  counts = dict.fromkeys(expected, 0)
  for result in results:
    counts[result.tobytes()] += 1
  likely = [len(pixels) * 1000 / 64 for pixels in expected.values()]
  assert scipy.stats.chisquare(list(counts.values()), likely).pvalue > 1e-3


# --------------------------------------------------------------------- mixing


@pytest.mark.parametrize('name', augment_lib.MIXES)
def test_the_other_of_each_place_is_the_next_and_of_the_last_the_first(name):
  batch = augmented(name, images(16))
  assert batch['label'].tolist() == [*range(0, 160, 10)]
  assert batch['other_label'].tolist() == [*range(10, 160, 10), 0]
  assert batch['other_share'].dtype == np.float32
  assert batch['other_share'].shape == (16,)


@pytest.mark.parametrize(
  ('rows', 'alpha'), [(False, 0.2), (False, 1.0), (True, 4.0)]
)
def test_mixup_takes_a_share_of_the_beta_distribution(rows, alpha):
  n = 2000
  numbers = np.random.default_rng(0).permutation(n) % 200
  inputs = np.tile(numbers[:, None], (1, 2)).astype('float32')
  if not rows:
    inputs = np.tile(numbers[:, None, None, None], (1, 2, 2, 1)).astype('uint8')
  batch = augmented({'name': 'mixup', 'alpha': alpha}, inputs)
  share = batch['other_share']
  result = batch['features' if rows else 'image']
  expected = numbers + share * (np.roll(numbers, -1) - numbers)
  np.testing.assert_allclose(
    result.reshape(n, -1), np.tile(expected[:, None], result[0].size), atol=1e-3
  )
  law = scipy.stats.beta(alpha, alpha)
  assert scipy.stats.kstest(share, law.cdf).pvalue > 1e-3
  np.testing.assert_allclose(share.mean(), 0.5, atol=0.04)
  np.testing.assert_allclose(share.var(), law.var(), rtol=0.1)


def test_cutmix_says_the_share_of_the_pixels_that_it_replaced():
  inputs = np.zeros((1000, 10, 14, 1), 'uint8')
  inputs[1::2] = 255
  batch = augmented('cutmix', inputs)
  replaced = (batch['image'] != inputs)[..., 0]
  np.testing.assert_allclose(
    batch['other_share'], replaced.mean((1, 2)), rtol=1e-6
  )
  for box in replaced:
    rows, columns = box.any(1), box.any(0)
    assert (box == rows[:, None] & columns).all()
    assert (np.diff(np.flatnonzero(rows)) == 1).all()
    assert (np.diff(np.flatnonzero(columns)) == 1).all()


def test_cutmix_draws_its_boxes_as_the_paper_does():
  """Against algorithm A1 in NumPy, by the distribution of the shares."""
  side, n = 32, 4000
  rng = np.random.default_rng(0)
  half = (side * np.sqrt(1 - rng.uniform(size=n))).astype(int) // 2
  lengths = []
  for _ in range(2):
    centre = rng.integers(side, size=n)
    low, high = np.maximum(centre - half, 0), np.minimum(centre + half, side)
    lengths.append(high - low)
  expected = lengths[0] * lengths[1] / side**2
  share = augmented('cutmix', images(n, (side, side, 1)))['other_share']
  # An odd box has its whole length here, which the paper's code rounds down.
  for percent in (10, 25, 50, 75, 90):
    a, b = np.percentile(share, percent), np.percentile(expected, percent)
    np.testing.assert_allclose(a, b, atol=0.03)


@pytest.mark.parametrize('name', augment_lib.MIXES)
def test_with_a_probability_so_many_examples_are_mixed(name):
  inputs = images(2000, (4, 4, 1))
  batch = augmented({'name': name, 'probability': 0.3, 'alpha': 4}, inputs)
  mixed = int((batch['image'] != inputs).any((1, 2, 3)).sum())
  if name == 'mixup':
    assert mixed == (batch['other_share'] > 0).sum()
  assert scipy.stats.binomtest(mixed, 2000, 0.3).pvalue > 1e-3


# ---------------------------------------------------------------- randaugment


def _enhanced(kind):
  return lambda image, share: kind(image).enhance(1 + 0.9 * share)


def _moved(terms):
  def move(image, share):
    return image.transform(
      image.size,
      PIL.Image.Transform.AFFINE,
      terms(share, *image.size),
      PIL.Image.Resampling.BILINEAR,
      fillcolor=(128, 128, 128),
    )

  return move


# Of a Pillow image and the magnitude as a share of the greatest, -1 to 1.
PILLOW = {
  'identity': lambda image, share: image,
  'autocontrast': lambda image, share: PIL.ImageOps.autocontrast(image),
  'equalize': lambda image, share: PIL.ImageOps.equalize(image),
  'rotate': lambda image, share: image.rotate(
    30 * share, PIL.Image.Resampling.BILINEAR, fillcolor=(128, 128, 128)
  ),
  'solarize': lambda image, share: PIL.ImageOps.solarize(
    image, 256 - 256 * abs(share)
  ),
  'color': _enhanced(PIL.ImageEnhance.Color),
  'posterize': lambda image, share: PIL.ImageOps.posterize(
    image, 8 - round(4 * abs(share))
  ),
  'contrast': _enhanced(PIL.ImageEnhance.Contrast),
  'brightness': _enhanced(PIL.ImageEnhance.Brightness),
  'sharpness': _enhanced(PIL.ImageEnhance.Sharpness),
  'shear_x': _moved(lambda s, w, h: (1, 0.3 * s, 0, 0, 1, 0)),
  'shear_y': _moved(lambda s, w, h: (1, 0, 0, 0.3 * s, 1, 0)),
  'translate_x': _moved(lambda s, w, h: (1, 0, s * w * 150 / 331, 0, 1, 0)),
  'translate_y': _moved(lambda s, w, h: (1, 0, 0, 0, 1, s * h * 150 / 331)),
}
_apply = jax.jit(randaugment.apply)


def applied(name, image, magnitude):
  place = randaugment.OPERATIONS.index(name)
  return np.asarray(_apply(image.astype('float32'), place, float(magnitude)))


def noisy():
  """Every level, and more pixels than levels, so that equalize has work."""
  levels = np.random.default_rng(1).integers(0, 256, (40, 32, 3))
  return (levels * levels / 255).astype('uint8')


@pytest.mark.parametrize('name', randaugment.OPERATIONS)
@pytest.mark.parametrize('magnitude', [0, 9, -9, 17, 30, -30])
def test_each_operation_is_that_of_pillow(name, magnitude):
  for image in (PHOTO, noisy()):
    picture = PIL.Image.fromarray(image)
    expected = np.asarray(PILLOW[name](picture, magnitude / 30), float)
    result = applied(name, image, magnitude)
    # Pillow rounds some down.
    exact = name in ('identity', 'equalize', 'solarize', 'posterize')
    np.testing.assert_allclose(result, expected, atol=0 if exact else 1)
    assert (result == np.round(result)).all()


@pytest.mark.parametrize('name', randaugment.OPERATIONS)
def test_an_operation_leaves_an_image_of_one_level_in_its_range(name):
  for level in (0, 77, 255):
    result = applied(name, np.full((8, 8, 3), level, 'uint8'), 30)
    assert np.isfinite(result).all()
    assert result.min() >= 0
    assert result.max() <= 255
    if name in ('autocontrast', 'equalize', 'contrast', 'sharpness', 'color'):
      assert (result == level).all()


def test_grey_images_have_no_colour_to_change():
  grey = PHOTO[..., :1]
  assert (applied('color', grey, 30) == grey).all()


def test_randaugment_draws_every_operation_and_direction_as_often(monkeypatch):
  def record(image, operation, magnitude):
    place = 2 * operation + (magnitude > 0)
    assert magnitude.shape == ()
    return image * 28 + place

  monkeypatch.setattr(randaugment, 'apply', record)
  results = changed('randaugment', np.zeros((1, 1, 1), 'uint8'), 4000).ravel()
  first, second = np.divmod(results.astype(int), 28)
  for drawn in (first, second):
    counts = np.bincount(drawn, minlength=28)
    assert scipy.stats.chisquare(counts).pvalue > 1e-3
  assert abs(np.corrcoef(first, second)[0, 1]) < 0.06


def test_randaugment_applies_its_magnitude(monkeypatch):
  monkeypatch.setattr(
    randaugment, 'apply', lambda image, _, magnitude: image + abs(magnitude)
  )
  block = {'name': 'randaugment', 'num_ops': 3, 'magnitude': 12}
  assert (changed(block, np.zeros((1, 1, 1), 'uint8'), 8) == 36).all()


# -------------------------------------------------------------------- resolve


def resolve(augment, shape=(32, 32, 3)):
  key = 'image' if len(shape) == 3 else 'features'
  return augment_lib.resolve(augment, 'toy', key, shape)


@pytest.mark.parametrize(
  'augment',
  [
    'pad_crop,flip',
    ' pad_crop, flip ',
    ('pad_crop', 'flip'),
    ['pad_crop', 'flip'],
    ('pad_crop,flip',),
    ({'name': 'pad_crop', 'padding': 4}, {'name': 'flip'}),
  ],
)
def test_names_and_blocks_become_blocks_with_every_argument(augment):
  assert resolve(augment) == (
    {'name': 'pad_crop', 'padding': 4},
    {'name': 'flip', 'probability': 0.5},
  )


@pytest.mark.parametrize('augment', ['', (), []])
def test_none_at_all_is_an_empty_tuple(augment):
  assert resolve(augment) == ()


@pytest.mark.parametrize('name', augment_lib.AUGMENTATIONS)
@pytest.mark.parametrize('shape', [(8, 8, 1), (32, 32, 3), (1, 1, 2)])
def test_what_is_resolved_resolves_to_itself(name, shape):
  once = resolve(name, shape)
  assert resolve(once, shape) == once


def test_what_is_left_out_follows_the_image():
  assert resolve('pad_crop', (8, 12, 1))[0]['padding'] == 1
  assert resolve('pad_crop', (28, 28, 1))[0]['padding'] == 4
  assert resolve('pad_crop', (1, 1, 1))[0]['padding'] == 0
  assert resolve('cutout', (32, 32, 3))[0]['size'] == 16
  assert resolve('colour', (8, 8, 1))[0]['hue'] == 0
  assert resolve('colour', (8, 8, 1))[0]['contrast'] == 0.4
  assert resolve('colour', (8, 8, 3))[0]['hue'] == 0.1


def test_noise_and_mixup_fit_rows():
  blocks = resolve(({'name': 'noise', 'std': 0.1}, 'mixup'), (5,))
  assert [block['name'] for block in blocks] == ['noise', 'mixup']


@pytest.mark.parametrize(
  ('augment', 'shape', 'begins', 'has'),
  [
    ('flp', (8, 8, 1), 'data.augment.0 is', "did you mean 'flip'?"),
    ('flip,blur', (8, 8, 1), 'data.augment.1 is', 'there are colour, cut'),
    ((3,), (8, 8, 1), 'data.augment.0 is 3', 'it takes a name'),
    (({},), (8, 8, 1), 'data.augment.0 is {}', 'it takes a name'),
    (({'name': 3},), (8, 8, 1), 'data.augment.0 is', 'it takes a name'),
    (({'name': 'flip', 2: 3},), (8, 8, 1), 'data.augment.0', 'a name'),
    ('flip,flip', (8, 8, 1), "data.augment.1 is 'flip'", 'once'),
    ('mixup,cutmix', (8, 8, 1), "data.augment.1 is 'cutmix'", "'mixup'"),
    ('flip', (5,), "data.augment.0 is 'flip'", 'toy has rows of features'),
    ('noise', (5,), 'data.augment.0.std is missing', 'units of their own'),
  ],
)
def test_what_does_not_fit_is_one_line(augment, shape, begins, has):
  refused(augment, shape, begins, has)


def refused(augment, shape, begins, has):
  with pytest.raises(config_lib.UserError) as caught:
    resolve(augment, shape)
  line = str(caught.value)
  assert line.startswith(f'config.{begins}')
  assert has in line
  assert '\n' not in line


@pytest.mark.parametrize(
  'name', sorted(set(augment_lib.AUGMENTATIONS) - set(augment_lib.OF_ROWS))
)
def test_what_needs_an_image_refuses_rows(name):
  refused(name, (5,), f'data.augment.0 is {name!r}', 'needs images')


@pytest.mark.parametrize('name', augment_lib.AUGMENTATIONS)
def test_an_argument_that_it_does_not_take_is_refused(name):
  for key in ('strength', 'key', 'image'):
    block = {'name': name, key: 1}
    refused((block,), (8, 8, 3), f'data.augment.0.{key} is no arg', 'it takes')


@pytest.mark.parametrize('name', augment_lib.AUGMENTATIONS)
def test_every_argument_has_a_range_and_a_kind(name):
  for key in resolve(name)[0]:
    if key != 'name':
      for value in (-1e-3, -1, 1e9, 1e39, float('nan'), 'much', True, None):
        block = {'name': name, key: value}
        refused((block,), (32, 32, 3), f'data.augment.0.{key} is {value!r}', '')


@pytest.mark.parametrize(
  ('block', 'shape', 'takes'),
  [
    ({'name': 'pad_crop', 'padding': 8}, (8, 12, 1), '0 to 7 on the 8x12x1 im'),
    ({'name': 'cutout', 'size': 9}, (8, 12, 1), '0 to 8 on the 8x12x1 images'),
    ({'name': 'pad_crop', 'padding': 1.5}, (8, 8, 1), 'a whole number'),
    ({'name': 'colour', 'hue': 0.1}, (8, 8, 1), '0 alone on the 8x8x1 images'),
    ({'name': 'colour', 'saturation': 1}, (8, 8, 4), '0 alone on the 8x8x4'),
    ({'name': 'stretch', 'max_area': 0.4}, (8, 8, 1), '0.5 to 4'),
    ({'name': 'randaugment', 'magnitude': 31}, (8, 8, 1), '0 to 30'),
    ({'name': 'mixup', 'alpha': 0}, (8, 8, 1), '0.01 to 100'),
  ],
)
def test_a_number_out_of_range_says_what_is_in_it(block, shape, takes):
  key = list(block)[1]
  refused((block,), shape, f'data.augment.0.{key} is {block[key]!r}', takes)


@pytest.mark.slow
def test_the_extremes_of_every_range_give_numbers():
  for block in (
    {'name': 'mixup', 'alpha': 0.01},
    {'name': 'cutmix', 'alpha': 100},
    {'name': 'stretch', 'min_area': 0.01, 'max_area': 4, 'max_aspect': 4},
    {
      'name': 'colour',
      'brightness': 1,
      'contrast': 1,
      'saturation': 1,
      'hue': 0.5,
    },
    {'name': 'rotate', 'degrees': 180},
    {'name': 'translate', 'fraction': 1},
    {'name': 'randaugment', 'num_ops': 14, 'magnitude': 30},
  ):
    result = changed(block, PHOTO, 64)
    assert np.isfinite(result).all(), block
    assert result.min() >= 0
    assert result.max() <= 255
