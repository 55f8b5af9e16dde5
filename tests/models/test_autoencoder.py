"""The autoencoders against PCA, formulas in float64, and the papers."""

import functools
import re

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.datasets
import sklearn.decomposition

import models
from models import autoencoder

# Variant -> arguments that make a small one, on images [8, 8, 2].
CASES = {
  'linear': {},
  'dense': {'widths': (7, 5)},
  'conv': {'widths': (4, 6)},
  'variational': {'widths': (7,)},
}
IMAGE_SHAPE = (8, 8, 2)
CODE_SIZE = 3

every_variant = pytest.mark.parametrize('variant', CASES)


def shaped(**kwargs):
  """A model without numbers: its structure, shapes and dtypes."""
  return nnx.eval_shape(
    lambda: models.create('autoencoder', **kwargs, rngs=nnx.Rngs(0))
  )


def filled(**kwargs):
  """A model whose parameters are NumPy's, which takes no compiling."""
  model = shaped(**kwargs)
  random = np.random.default_rng(0)

  def numbers(leaf):
    return jnp.asarray(random.normal(size=leaf.shape) / 4, leaf.dtype)

  nnx.update(model, jax.tree.map(numbers, nnx.state(model)))
  return model


def make(variant, **kwargs):
  """The small model of that variant in CASES."""
  fixed = {'image_shape': IMAGE_SHAPE, 'code_size': CODE_SIZE}
  return filled(variant=variant, **fixed | CASES[variant] | kwargs)


def images(count=3, seed=0, shape=IMAGE_SHAPE):
  random = np.random.default_rng(seed)
  return jnp.asarray(random.normal(size=(count, *shape)), 'float32')


def rngs(seed=0):
  return nnx.Rngs(dropout=seed)


def outputs(model, *args, **kwargs):
  """The model's outputs, without the penalty."""
  found = model(*args, **kwargs)
  return found[0] if isinstance(found, tuple) else found


def set_layer(layer, kernel, bias):
  """Gives a layer its numbers; their shapes must be the layer's own."""
  kernel, bias = np.asarray(kernel), np.asarray(bias)
  assert (layer.kernel.shape, layer.bias.shape) == (kernel.shape, bias.shape)
  layer.kernel[...] = jnp.asarray(kernel, layer.kernel.dtype)
  layer.bias[...] = jnp.asarray(bias, layer.bias.dtype)


# ------------------------------------------------------------------- shapes


def test_every_variant_is_covered_here():
  assert set(CASES) == set(autoencoder.VARIANTS)


@every_variant
def test_an_image_becomes_a_code_and_the_code_an_image(variant):
  model = make(variant)
  code = model.encode(images())
  assert code.shape == (3, CODE_SIZE)
  assert model.decode(code).shape == (3, *IMAGE_SHAPE)
  np.testing.assert_allclose(
    outputs(model, images()), model.decode(code), rtol=1e-6
  )


@pytest.mark.parametrize('variant', ['linear', 'dense', 'variational'])
def test_a_row_of_features_is_coded_too(variant):
  model = make(variant, image_shape=(30,))
  assert outputs(model, images(shape=(30,))).shape == (3, 30)


@pytest.mark.parametrize(
  ('image_shape', 'widths', 'flat'),
  [
    ((28, 28, 1), (32, 64), 7 * 7 * 64),
    ((32, 32, 3), (8, 8, 8, 8, 8), 1 * 1 * 8),
    ((8, 8, 1), (4,), 4 * 4 * 4),
    ((4, 8, 1), (2, 3), 1 * 2 * 3),
  ],
)
def test_a_convolutional_code_sees_an_image_halved_at_each_width(
  image_shape, widths, flat
):
  kwargs = {'image_shape': image_shape, 'widths': widths, 'code_size': 5}
  model = shaped(variant='conv', **kwargs)
  assert model.code.kernel.shape == (flat, 5)
  found = jax.eval_shape(
    lambda x: models.create(
      'autoencoder', variant='conv', **kwargs, rngs=nnx.Rngs(0)
    )(x),
    jax.ShapeDtypeStruct((2, *image_shape), jnp.float32),
  )
  assert found.shape == (2, *image_shape)


@pytest.mark.parametrize(
  ('kwargs', 'sizes'),
  [
    ({'widths': (256,), 'code_size': 32}, (784, 256, 32, 256, 784)),
    # The published one is 784-1000-500-250-30 and back.
    ({'code_size': 30}, (784, 1000, 500, 250, 30, 250, 500, 1000, 784)),
    ({'variant': 'linear', 'code_size': 8}, (784, 8, 784)),
    ({'variant': 'linear', 'code_size': 2, 'image_shape': (9,)}, (9, 2, 9)),
  ],
)
def test_a_dense_one_has_the_parameters_of_its_sizes(kwargs, sizes):
  # Each layer has a weight for each input and one bias, per output.
  expected = sum((i + 1) * o for i, o in zip(sizes, sizes[1:], strict=False))
  assert models.count_parameters(shaped(**kwargs)) == expected


def test_the_variational_one_has_a_mean_and_a_variance_for_each_code():
  # Kingma & Welling's 500 hidden units, 20 codes.
  expected = 785 * 500 + 501 * 2 * 20 + 21 * 500 + 501 * 784
  model = shaped(variant='variational', code_size=20)
  assert models.count_parameters(model) == expected == 815_824


def test_a_convolutional_one_has_the_parameters_of_the_formula():
  # (height * width * channels + 1) * kernels, and two dense layers.
  encoder = (9 * 1 + 1) * 32 + (9 * 32 + 1) * 64 + (7 * 7 * 64 + 1) * 10
  decoder = (10 + 1) * 7 * 7 * 64 + (9 * 64 + 1) * 32 + (9 * 32 + 1) * 1
  model = shaped(variant='conv', code_size=10)
  assert models.count_parameters(model) == encoder + decoder


# ------------------------------------------------------------------ figures


def test_a_linear_one_with_pcas_components_is_pca():
  data = sklearn.datasets.load_digits().data / 16
  pca = sklearn.decomposition.PCA(8, svd_solver='full').fit(data)
  with jax.enable_x64(True):
    model = filled(
      variant='linear',
      image_shape=(8, 8, 1),
      code_size=8,
      param_dtype=jnp.float64,
    )
    set_layer(model.code, pca.components_.T, -pca.mean_ @ pca.components_.T)
    set_layer(model.head, pca.components_, pca.mean_)
    image = jnp.asarray(data.reshape(-1, 8, 8, 1))
    code, reconstruction = model.encode(image), model(image)
  expected = pca.transform(data)
  np.testing.assert_allclose(code, expected, rtol=1e-10, atol=1e-12)
  np.testing.assert_allclose(
    reconstruction.reshape(-1, 64),
    pca.inverse_transform(expected),
    rtol=1e-10,
    atol=1e-12,
  )


def test_a_dense_one_is_its_formula():
  # A linear code, and outputs without activation.
  model = make('dense', activation='tanh')
  x = np.asarray(images(), 'float64').reshape(3, -1)

  def affine(layer, x):
    kernel, bias = (np.asarray(p[...], 'float64') for p in (
      layer.kernel, layer.bias
    ))  # fmt: skip
    return x @ kernel + bias

  for block in model.blocks:
    x = np.tanh(affine(block, x))
  code = x = affine(model.code, x)
  np.testing.assert_allclose(model.encode(images()), code, rtol=1e-5)
  for layer in model.decoder:
    x = np.tanh(affine(layer, x))
  x = affine(model.head, x).reshape(3, *IMAGE_SHAPE)
  np.testing.assert_allclose(model(images()), x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
  ('image', 'code', 'pixel'),
  [
    # The greatest pixel m, 2 m + 1, and 3 (2 m + 1) - 1.
    ([[1, 2], [4, 3]], 9, 26),
    # Nothing is left of negative pixels but the bias.
    ([[-1, -2], [-4, -3]], 1, 2),
  ],
)
def test_a_convolutional_one_convolves_pools_and_doubles(image, code, pixel):
  model = filled(
    variant='conv', image_shape=(2, 2, 1), widths=(1,), code_size=1
  )
  middle = np.zeros((3, 3, 1, 1))
  middle[1, 1] = 1
  set_layer(model.blocks[0], middle, [0])
  set_layer(model.code, [[2]], [1])
  set_layer(model.decoder[0], [[1]], [0])
  set_layer(model.head, 3 * middle, [-1])
  image = jnp.asarray(image, 'float32').reshape(1, 2, 2, 1)
  assert model.encode(image).tolist() == [[code]]
  assert model(image).tolist() == np.full((1, 2, 2, 1), pixel).tolist()


def test_the_image_that_is_decoded_keeps_its_places():
  # Where a code is an image of 1x2 pixels, each becomes 2x2 of the result.
  model = filled(
    variant='conv', image_shape=(2, 4, 1), widths=(1,), code_size=2
  )
  middle = np.zeros((3, 3, 1, 1))
  middle[1, 1] = 1
  set_layer(model.decoder[0], np.eye(2), [0, 0])
  set_layer(model.head, middle, [0])
  decoded = model.decode(jnp.array([[1.0, 2.0]]))
  assert decoded[0, :, :, 0].tolist() == [[1, 1, 2, 2], [1, 1, 2, 2]]


@pytest.mark.parametrize(
  ('variant', 'classifier', 'kwargs'),
  [
    ('dense', 'mlp', {}),
    ('variational', 'mlp', {}),
    ('conv', 'cnn', {'norm': None}),
  ],
)
def test_a_classifier_of_the_same_widths_has_the_same_blocks(
  variant, classifier, kwargs
):
  def blocks(model):
    return nnx.to_pure_dict(nnx.state(model.blocks))

  ours = make(variant, widths=(4, 6))
  theirs = nnx.eval_shape(
    lambda: models.create(
      classifier,
      image_shape=IMAGE_SHAPE,
      widths=(4, 6),
      **kwargs,
      rngs=nnx.Rngs(0),
    )
  )
  shapes = jax.tree.map(lambda x: (x.shape, x.dtype), blocks(theirs))
  assert jax.tree.map(lambda x: (x.shape, x.dtype), blocks(ours)) == shapes
  # The classifier's head reads what our code does.
  nnx.update(theirs.blocks, nnx.state(ours.blocks))
  theirs.head = ours.code
  code = theirs(images())[:, :CODE_SIZE]
  np.testing.assert_allclose(ours.encode(images()), code, rtol=1e-5)


# ---------------------------------------------------------------- variational

MEAN = np.array([0.0, 0.7, -2.0])
LOG_VARIANCE = np.array([0.0, -1.5, 0.8])


def coding(mean=MEAN, log_variance=LOG_VARIANCE, **kwargs):
  """A variational model that codes every image so, and shows the code."""
  size = len(mean)
  model = filled(
    variant='variational',
    image_shape=(size,),
    code_size=size,
    widths=(),
    **kwargs,
  )
  set_layer(
    model.code, np.zeros((size, 2 * size)), np.append(mean, log_variance)
  )
  set_layer(model.head, np.eye(size), np.zeros(size))
  return model


def test_the_divergence_is_its_integral():
  # Of q log(q / p) over a grid, one code after the other.
  z = np.linspace(-30, 30, 600_001)

  def log_normal(z, mean, variance):
    return -((z - mean) ** 2 / variance + np.log(2 * np.pi * variance)) / 2

  expected = 0
  for mean, variance in zip(MEAN, np.exp(LOG_VARIANCE), strict=True):
    log_q, log_p = log_normal(z, mean, variance), log_normal(z, 0, 1)
    expected += np.trapezoid(np.exp(log_q) * (log_q - log_p), z)
  found = autoencoder.kl_divergence(
    jnp.asarray([MEAN], 'float32'), jnp.asarray([LOG_VARIANCE], 'float32')
  )
  np.testing.assert_allclose(found, [expected], rtol=1e-6)


def test_a_standard_normal_code_has_no_divergence():
  assert autoencoder.kl_divergence(
    jnp.zeros((2, 5)), jnp.zeros((2, 5))
  ).tolist() == [0, 0]


@pytest.mark.parametrize('beta', [1.0, 4.0, 0])
def test_the_penalty_is_beta_times_the_divergence_for_each_number(beta):
  _, penalty = coding(beta=beta)(jnp.zeros((2, 3)))
  closed = (MEAN**2 + np.exp(LOG_VARIANCE) - 1 - LOG_VARIANCE).sum() / 2
  np.testing.assert_allclose(penalty, [beta * closed / 3] * 2, rtol=1e-6)


def test_only_the_variational_one_has_a_penalty():
  for variant in CASES:
    found = make(variant)(images())
    assert isinstance(found, tuple) == (variant == 'variational')


# Of 40,000 codes the mean spreads by std / 200, and the std by std / 280: the
# bounds are five times that.
def test_training_draws_codes_of_that_mean_and_variance():
  codes, penalty = coding()(jnp.zeros((40_000, 3)), train=True, rngs=rngs())
  codes, std = np.asarray(codes, 'float64'), np.exp(LOG_VARIANCE / 2)
  assert np.all(np.abs(codes.mean(0) - MEAN) < std / 40)
  assert np.all(np.abs(codes.std(0) / std - 1) < 1 / 56)
  # A code is as likely whatever the others are.
  assert np.all(np.abs(np.corrcoef(codes.T) - np.eye(3)) < 1 / 40)
  # The penalty is that of evaluation: it is no matter of what was drawn.
  np.testing.assert_allclose(penalty, coding()(jnp.zeros((1, 3)))[1][0])


def test_gradients_reach_the_mean_and_the_variance_through_the_draw():
  # code = mean + exp(log_variance / 2) noise.
  def code(bias):
    model = coding(np.zeros(1), np.zeros(1))
    model.code.bias[...] = bias
    return model(jnp.zeros((1, 1)), train=True, rngs=rngs())[0].sum()

  bias = jnp.array([0.4, 0.6])
  found, grads = jax.value_and_grad(code)(bias)
  np.testing.assert_allclose(grads, [1, (found - 0.4) / 2], rtol=1e-6)


def test_another_key_draws_another_code():
  def code(seed):
    return outputs(coding(), jnp.zeros((2, 3)), train=True, rngs=rngs(seed))

  assert np.array_equal(code(0), code(0))
  assert np.all(code(0) != code(1))
  assert np.all(code(0)[0] != code(0)[1])


def test_evaluation_codes_the_mean():
  model = coding()
  code, _ = model(jnp.zeros((1, 3)), rngs=rngs())
  np.testing.assert_allclose(code, [MEAN], rtol=1e-6)
  np.testing.assert_allclose(model.encode(jnp.zeros((1, 3))), [MEAN], rtol=1e-6)


# ------------------------------------------------------------------- denoising

PIXELS = 1000


def copying(corruption):
  """A model that gives back what it is given, but for corruption."""
  model = filled(
    variant='linear',
    image_shape=(PIXELS,),
    code_size=PIXELS,
    corruption=corruption,
  )
  for layer in (model.code, model.head):
    set_layer(layer, np.eye(PIXELS), np.zeros(PIXELS))
  return model


# Of 20,000 pixels the share spreads by 0.0035 at most: five times that.
@pytest.mark.parametrize('corruption', [0.1, 0.5])
def test_training_sets_that_share_to_zero_and_leaves_the_rest(corruption):
  image = images(20, shape=(PIXELS,))
  found = copying(corruption)(image, train=True, rngs=rngs())
  assert abs((found == 0).mean() - corruption) < 0.0175
  # Unlike dropout's, what is kept is not scaled.
  assert np.array_equal(found[found != 0], image[found != 0])
  other = copying(corruption)(image, train=True, rngs=rngs(1))
  assert not np.array_equal(found == 0, other == 0)
  assert not np.array_equal(found[0] == 0, found[1] == 0)


def test_evaluation_corrupts_nothing():
  image = images(20, shape=(PIXELS,))
  assert np.array_equal(copying(0.5)(image), image)
  assert np.array_equal(copying(0.5)(image, rngs=rngs()), image)


@every_variant
def test_every_variant_can_denoise(variant):
  def trained(image, corruption):
    model = make(variant, corruption=corruption, activation='tanh')
    return outputs(model, image, train=True, rngs=rngs())

  # Of wholly corrupted images the model sees the same.
  one, other = trained(images(), 1.0), trained(images(seed=1), 1.0)
  assert np.array_equal(one, other)
  assert not np.array_equal(one, trained(images(), 0.5))


@pytest.mark.parametrize('variant', ['linear', 'dense', 'conv'])
def test_what_draws_nothing_needs_no_random_numbers(variant):
  model = make(variant)
  assert np.array_equal(model(images(), train=True), model(images()))


# --------------------------------------------------------------------- dtypes


@every_variant
def test_bfloat16_computes_in_it_and_stores_float32(variant):
  model = make(variant, dtype=jnp.bfloat16, corruption=0.5)

  def run(train):
    return model(images(), train=train, rngs=rngs())

  for train in (False, True):
    found = jax.eval_shape(functools.partial(run, train))
    if variant == 'variational':
      found, penalty = found
      assert penalty.dtype == jnp.float32
    assert found.dtype == jnp.bfloat16
  stored = {x.dtype for x in jax.tree.leaves(nnx.state(model))}
  assert stored == {jnp.dtype('float32')}
  # Eight bits of each number, seven layers or fewer.
  exact = outputs(make(variant), images())
  found = outputs(model, images()).astype(jnp.float32)
  assert np.abs(found - exact).max() < 0.1 * np.abs(exact).max()


@every_variant
def test_every_parameter_has_a_gradient_in_training(variant):
  graphdef, params = nnx.split(make(variant, activation='tanh'))

  def loss(params):
    model = nnx.merge(graphdef, params)
    found = model(images(), train=True, rngs=rngs())
    return sum((x**2).sum() for x in jax.tree.leaves(found))

  for path, grad in jax.tree.leaves_with_path(jax.jit(jax.grad(loss))(params)):
    assert np.any(grad != 0), jax.tree_util.keystr(path)


# ------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
  ('kwargs', 'message'),
  [
    (
      {'variant': 'denoising'},
      "variant 'denoising' is unknown; there are linear, dense, conv, "
      'variational',
    ),
    ({'code_size': 0}, 'code_size is 0; it takes whole numbers of at least 1'),
    ({'widths': (8, -1)}, 'widths is (8, -1); it takes whole numbers'),
    ({'widths': 8}, 'widths is 8; it takes a tuple, as 64,128'),
    ({'image_shape': (8, 0)}, 'image_shape is (8, 0); it takes whole numbers'),
    (
      {'variant': 'linear', 'widths': (8,)},
      "widths is (8,); variant 'linear' has no hidden layers",
    ),
    ({'variant': 'conv', 'widths': ()}, "variant 'conv' needs one or more"),
    (
      {'variant': 'conv', 'image_shape': (30,)},
      'image_shape (30,) is not (height, width, channels)',
    ),
    (
      {'variant': 'conv', 'widths': (4, 4, 4)},
      'image_shape (28, 28, 1) cannot be halved 3 times, once for each of '
      'widths (4, 4, 4): height and width must be multiples of 8',
    ),
    (
      {'variant': 'conv', 'image_shape': (28, 30, 3)},
      'image_shape (28, 30, 3) cannot be halved 2 times',
    ),
    (
      {'variant': 'conv', 'image_shape': (7, 8, 1), 'widths': (4,)},
      'image_shape (7, 8, 1) cannot be halved 1 times',
    ),
    ({'activation': 'rleu'}, "activation 'rleu' is unknown; there are"),
    ({'corruption': 1.5}, 'corruption is 1.5; it takes a share from 0 to 1'),
    ({'corruption': -0.1}, 'corruption is -0.1; it takes a share from 0 to 1'),
    ({'corruption': None}, 'corruption is None; it takes a share'),
    ({'corruption': True}, 'corruption is True; it takes a share'),
    ({'beta': -1}, 'beta is -1; it takes a number of at least 0'),
  ],
)
def test_what_cannot_be_made_is_said_in_one_line(kwargs, message):
  with pytest.raises(ValueError, match=re.escape(message)) as caught:
    shaped(**kwargs)
  assert '\n' not in str(caught.value)
