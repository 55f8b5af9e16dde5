"""What the autoencoders' configs reach, and what their codes are good for."""

import dataclasses
import functools
import os

from flax import nnx
import jax
import numpy as np
import optax
import pytest
import sklearn.decomposition
import sklearn.metrics
import sklearn.neighbors

from experiments import command
from experiments import restore
from tests import runs
from train import config as config_lib
from train import evaluate
from train import loop
from train import paths
from train import program as program_lib
from train import writer
from train.data import sources

needs_mnist = pytest.mark.skipif(
  'TFDS_DATA_DIR' not in os.environ,
  reason='TFDS_DATA_DIR does not say where MNIST is',
)


@pytest.fixture(scope='session')
def trained(tmp_path_factory):
  """trained(config) -> (program, state) at the end of its run, run once."""

  @functools.cache
  def run(key):
    config = configs[key]
    workdir = tmp_path_factory.mktemp('run')
    loop.train_and_evaluate(config, workdir)
    program = program_lib.create(config)
    return program, restore.restore(workdir, program, 'latest')[0]

  configs = {}

  def trained(config):
    configs[repr(config)] = config
    return run(repr(config))

  return trained


def load(name, *, data=None, model=None):
  """A config of that name, with fields of its data and model replaced."""
  config, _, _ = command.load_config(name, [])
  return dataclasses.replace(
    config,
    data=dataclasses.replace(config.data, **data or {}),
    model=config.model | (model or {}),
  )


def small(**model):
  """A few steps of an autoencoder on digits."""
  return runs.config(
    task='reconstruction',
    data=config_lib.Data(name='digits', batch_size=64, normalize='unit'),
    model={'name': 'autoencoder', 'code_size': 3, **model},
  )


def arrays(name, split):
  """Images [n, H, W, C] from 0 to 1, and labels."""
  found = (
    sources.load(name)
    .splits[split]
    .take(np.arange(len(sources.load(name).splits[split])))
  )
  return (found['image'] / 255).astype('float32'), found['label']


def error(program, state, split):
  return evaluate.evaluate(program, state, split)['mean_squared_error']


def in_parts(function, images):
  """function(images), computed a thousand at a time."""
  function = jax.jit(function)
  parts = [function(part) for part in np.split(images, len(images) // 1000)]
  return np.concatenate(parts)


def pca_errors(name, codes):
  """scikit-learn's mean squared errors of train and test."""
  train, test = (
    arrays(name, split)[0].astype('float64') for split in ('train', 'test')
  )
  train, test = train.reshape(len(train), -1), test.reshape(len(test), -1)
  pca = sklearn.decomposition.PCA(codes, svd_solver='full').fit(train)
  return tuple(
    np.square(pca.inverse_transform(pca.transform(x)) - x).mean()
    for x in (train, test)
  )


# ----------------------------------------------------------------- the loop


def test_the_loss_of_the_variational_one_is_the_negative_elbo():
  config = dataclasses.replace(
    small(variant='variational', widths=(16,)),
    loss='sigmoid_binary_cross_entropy',
  )
  program = program_lib.create(config)
  state = program.init()
  results = evaluate.evaluate(program, state, 'test')
  model = program.merge(state)
  x = arrays('digits', 'test')[0]
  mean, log_variance = (
    np.asarray(a, 'float64') for a in model.gaussian_code(x)
  )
  p = 1 / (1 + np.exp(-np.asarray(model.decode(mean), 'float64')))
  likelihood = (x * np.log(p) + (1 - x) * np.log(1 - p)).sum((1, 2, 3))
  divergence = mean**2 + np.exp(log_variance) - 1 - log_variance
  divergence = divergence.sum(-1) / 2
  np.testing.assert_allclose(
    64 * results['penalty'], divergence.mean(), rtol=1e-5
  )
  np.testing.assert_allclose(
    64 * results['loss'], (divergence - likelihood).mean(), rtol=1e-5
  )


@pytest.mark.parametrize(
  ('model', 'dtype'),
  [
    ({'variant': 'variational', 'corruption': 0.2}, 'bfloat16'),
    ({'variant': 'conv', 'widths': (4,)}, 'float32'),
  ],
)
def test_a_variant_trains_on_the_loop(model, dtype, tmp_path):
  config = dataclasses.replace(small(**{'widths': (16,)} | model), dtype=dtype)
  loop.train_and_evaluate(config, tmp_path)
  losses = [
    line['eval/loss']
    for line in writer.read(tmp_path / 'metrics.jsonl')
    if 'eval/loss' in line
  ]
  assert len(losses) == 3
  assert losses[0] > losses[1] > losses[2]


@pytest.mark.slow
def test_the_launcher_draws_reconstructions_in_its_own_workdir(run, tmp_path):
  words = ('--config=digits_pca', '--config.total_epochs=1')
  done = run('launch', *words, cwd=tmp_path)
  assert (done.returncode, done.stderr) == (0, '')
  (picture,) = tmp_path.glob('runs/digits_pca-*/reconstructions.png')
  assert picture.stat().st_size > 1000


@pytest.mark.slow
def test_a_classifier_takes_the_encoders_blocks(tmp_path, capsys):
  source = dataclasses.replace(small(widths=(32, 16)), total_steps=2)
  loop.train_and_evaluate(source, tmp_path / 'source')
  program = program_lib.create(source)
  theirs, _ = restore.restore(tmp_path / 'source', program, 'latest')
  config = runs.config(
    data=source.data,
    model={'name': 'mlp', 'widths': (32, 16)},
    total_steps=1,
    init_from=f'{tmp_path}/source:latest',
    rate_multipliers={'blocks': 0.0},
  )
  loop.train_and_evaluate(config, tmp_path / 'classifier')
  assert 'new: head/bias, head/kernel' in capsys.readouterr().out
  program = program_lib.create(config)
  ours, _ = restore.restore(tmp_path / 'classifier', program, 'latest')
  ours, theirs = (paths.flatten(s.params['blocks']) for s in (ours, theirs))
  assert len(ours) == 4
  for path, leaf in ours.items():
    np.testing.assert_array_equal(leaf, theirs[path])


@pytest.mark.parametrize(
  ('model', 'message'),
  [
    ({'variant': 'vae'}, "variant 'vae' is unknown; there are linear, dense"),
    ({'variant': 'conv', 'widths': (2, 2, 2, 2)}, 'cannot be halved 4 times'),
    ({'widths': 8}, 'widths is 8; it takes a tuple'),
  ],
)
def test_a_mistake_is_one_line(model, message):
  with pytest.raises(config_lib.UserError) as caught:
    program_lib.create(small(**model))
  assert message in str(caught.value)
  assert '\n' not in str(caught.value)


# ------------------------------------------------------------------ learning


@pytest.mark.slow
def test_the_linear_one_learns_pca(trained):
  program, state = trained(load('digits_pca'))
  train, test = pca_errors('digits', 8)
  assert train == pytest.approx(0.0237406, rel=1e-5)
  # No other eight directions can be better, but for rounding.
  assert train * (1 - 1e-6) < error(program, state, 'train') < 1.03 * train
  assert error(program, state, 'test') == pytest.approx(test, rel=0.01)


@pytest.mark.slow
def test_the_dense_one_is_better_than_pca_at_as_many_codes(trained):
  program, state = trained(load('digits_autoencoder'))
  train, test = pca_errors('digits', 8)
  assert error(program, state, 'train') < 0.35 * train
  assert error(program, state, 'test') < 0.55 * test


@pytest.mark.slow
def test_the_nearest_code_is_an_image_of_the_same_digit(trained):
  program, state = trained(load('digits_autoencoder'))
  model = program.merge(state)
  (train, labels), (test, expected) = (
    arrays('digits', split) for split in ('train', 'test')
  )
  nearest = sklearn.neighbors.KNeighborsClassifier(1)
  nearest.fit(model.encode(train), labels)
  assert nearest.score(model.encode(test), expected) > 0.95
  # Eight numbers find it nearly as often as sixty-four pixels.
  nearest.fit(train.reshape(-1, 64), labels)
  assert nearest.score(test.reshape(-1, 64), expected) < 0.99


@pytest.mark.slow
def test_what_was_never_seen_is_reconstructed_badly(trained):
  # Trained on 0 to 4, the error tells 5 to 9.
  config = load('digits_autoencoder', data={'classes': (0, 1, 2, 3, 4)})
  program, state = trained(config)
  x, label = arrays('digits', 'test')
  errors = np.square(program.merge(state)(x) - x).mean((1, 2, 3))
  assert sklearn.metrics.roc_auc_score(label > 4, errors) > 0.97


@needs_mnist
@pytest.mark.slow
def test_the_dense_one_is_far_better_than_pca_on_mnist(trained):
  program, state = trained(load('mnist_autoencoder'))
  _, test = pca_errors('mnist', 32)
  assert test == pytest.approx(0.01683, rel=1e-3)
  assert error(program, state, 'test') < 0.5 * test


@needs_mnist
@pytest.mark.slow
def test_the_denoising_one_restores_images_better_than_the_plain_one(trained):
  x, _ = arrays('mnist', 'test')
  kept = np.random.default_rng(0).random(x.shape) < 0.5
  errors = {}
  for corruption in (0.5, 0.0):
    config = load('mnist_denoising', model={'corruption': corruption})
    program, state = trained(config)
    restored = in_parts(program.merge(state), np.where(kept, x, 0))
    errors[corruption] = np.square(restored - x).mean()
  assert np.square(np.where(kept, 0, x)).mean() > 0.05
  assert errors[0.5] < 0.014
  assert errors[0.5] < errors[0.0] / 2


@needs_mnist
@pytest.mark.slow
def test_the_variational_one_reaches_its_elbo(trained):
  program, state = trained(load('mnist_vae'))
  model = program.merge(state)
  x, _ = arrays('mnist', 'test')

  def negative_elbo(x):
    # Training draws the code, as the ELBO asks.
    rngs = nnx.Rngs(dropout=0)
    logits, penalty = model(x, train=True, rngs=rngs)
    entropy = optax.losses.sigmoid_binary_cross_entropy(logits, x)
    return entropy.sum((1, 2, 3)) + 784 * penalty

  assert in_parts(negative_elbo, x).mean() < 104
  # What is drawn from the prior looks like a digit: most pixels are black or
  # white, and about as many white as in the data.
  code = jax.random.normal(jax.random.key(1), (1000, 20))
  drawn = jax.nn.sigmoid(model.decode(code))
  assert abs(drawn.mean() - x.mean()) < 0.02
  assert (np.minimum(drawn, 1 - drawn) < 0.1).mean() > 0.8
