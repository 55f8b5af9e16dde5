r"""Measures what the README claims; prints a JSON line a case.

  python -m experiments.benchmark --suite=loop       # about 5 minutes
  python -m experiments.benchmark --suite=results    # about 5 minutes
  python -m experiments.benchmark --suite=startup    # about 3 minutes

loop: steps a second of the whole loop against a hand-written jitted step of the
same model, optimizer and metrics on one batch that lies on the device: rounds
of the two in turn, and the median of the rounds' ratios.
results: every digits, cancer and diabetes config over five seeds, and
scikit-learn's estimator on the same split.
startup: seconds from the command to --help and to the first step.
"""

from collections.abc import Sequence
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

from absl import flags

from experiments import command
from train import config as config_lib

FLAGS = flags.FlagValues()
flags.DEFINE_enum(
  'suite',
  None,
  ['loop', 'results', 'startup'],
  'what to measure',
  flag_values=FLAGS,
)
flags.DEFINE_integer(
  'rounds', 9, 'rounds of loop', lower_bound=1, flag_values=FLAGS
)
flags.DEFINE_integer(
  'seeds', 5, 'seeds of results', lower_bound=1, flag_values=FLAGS
)


def main(argv: Sequence[str]):
  """Parses the flags and runs one suite."""
  command.parse(FLAGS, argv, __doc__)
  if FLAGS.suite is None:
    raise config_lib.UserError('--suite is missing; it takes loop, results, '
                               'startup')  # fmt: skip
  command.quiet()
  print(conditions(), flush=True)
  SUITES[FLAGS.suite]()


def conditions() -> str:
  """One line: processor, cores, versions."""
  versions = ', '.join(
    f'{name} {importlib.metadata.version(name)}'
    for name in ('jax', 'flax', 'optax')
  )
  cores = len(os.sched_getaffinity(0))
  return (
    f'{_processor()}, {cores} cores, Python {platform.python_version()}, '
    f'{versions}'
  )


def _processor() -> str:
  try:
    text = pathlib.Path('/proc/cpuinfo').read_text()
    return text.split('model name\t: ')[1].partition('\n')[0]
  except (OSError, IndexError):
    return platform.processor() or platform.machine()


# --------------------------------------------------------------------- loop


def loop():
  """The whole loop against a bare step, for a CNN and an MLP."""
  import numpy as np

  from train.data import sources

  generator = np.random.default_rng(0)

  def split(n: int) -> sources.Split:
    return sources.Split(
      {
        'image': generator.integers(0, 256, (n, 28, 28, 1), dtype=np.uint8),
        'label': generator.integers(0, 10, n).astype(np.int32),
      }
    )

  dataset = sources.Dataset(
    'mnist-shaped noise',
    {'train': split(60_000), 'test': split(1_000)},
    tuple('0123456789'),
  )
  cases = {
    'cnn 32-64': ({'name': 'cnn', 'widths': (32, 64)}, 80),
    'mlp 784-256-128-10': ({'name': 'mlp', 'widths': (256, 128)}, 2_000),
  }
  for name, (model, steps) in cases.items():
    rounds = []
    for _ in range(FLAGS.rounds):
      bare = _bare_steps_per_second(model, dataset, steps)
      rounds.append((_loop_steps_per_second(model, dataset, steps), bare))
    ratios = [ours / bare for ours, bare in rounds]
    print(
      json.dumps(
        {
          'case': name,
          'steps': steps,
          'loop_steps_per_second': statistics.median(r[0] for r in rounds),
          'bare_steps_per_second': statistics.median(r[1] for r in rounds),
          'ratio_median': statistics.median(ratios),
          'ratio_min': min(ratios),
          'ratio_max': max(ratios),
          'rounds': len(rounds),
        }
      ),
      flush=True,
    )


def _loop_config(model: config_lib.Block, steps: int) -> config_lib.Config:
  """Training with its logging: one step that compiles, `steps` timed ones."""
  return config_lib.Config(
    total_steps=steps + 1,
    log_every=100,
    eval_every=100_000,
    checkpoint_every=100_000,
    keep_best=0,
    data=config_lib.Data(batch_size=128, normalize='unit'),
    model=model,
    optimizer={'name': 'adam'},
    schedule={'name': 'constant_schedule', 'value': 1e-3},
  )


def _loop_steps_per_second(model, dataset, steps: int) -> float:
  """By the loop's own account: timing.jsonl leaves the first step out."""
  from train import loop as loop_lib
  from train import workdir
  from train import writer

  with (
    tempfile.TemporaryDirectory() as folder,
    _silent(),
  ):
    loop_lib.train_and_evaluate(
      _loop_config(model, steps), folder, dataset=dataset
    )
    lines = writer.read(pathlib.Path(folder) / workdir.TIMING)
  assert sum(line['steps'] for line in lines) == steps
  return steps / sum(line['seconds'] for line in lines)


def _bare_steps_per_second(model, dataset, steps: int) -> float:
  """What one would write by hand: one jitted step, one batch, a for loop."""
  from flax import nnx
  import jax
  import jax.numpy as jnp
  import optax

  import models

  kwargs = {k: v for k, v in model.items() if k != 'name'}
  network = models.create(model['name'], **kwargs, rngs=nnx.Rngs(0))
  graphdef, params, batch_stats = nnx.split(network, nnx.Param, nnx.BatchStat)
  params, batch_stats = map(nnx.to_pure_dict, (params, batch_stats))
  tx = optax.adam(1e-3)

  def step(params, batch_stats, opt_state, image, label):
    def compute_loss(params):
      network = nnx.merge(graphdef, params, batch_stats, copy=True)
      logits = network(image.astype(jnp.float32) / 255, train=True)
      loss = optax.losses.softmax_cross_entropy_with_integer_labels(
        logits, label
      ).mean()
      stats = nnx.to_pure_dict(nnx.state(network, nnx.BatchStat))
      return loss, (logits, stats)

    (loss, (logits, stats)), grads = jax.value_and_grad(
      compute_loss, has_aux=True
    )(params)
    updates, opt_state = tx.update(grads, opt_state, params)
    metrics = {
      'loss': loss,
      'accuracy': (logits.argmax(-1) == label).mean(),
      'grad_norm': optax.tree.norm(grads),
      'param_norm': optax.tree.norm(params),
    }
    return optax.apply_updates(params, updates), stats, opt_state, metrics

  step = jax.jit(step, donate_argnums=(0, 1, 2))
  batch = jax.device_put(
    {k: v[:128] for k, v in dataset.splits['train'].arrays.items()}
  )
  carry = params, batch_stats, tx.init(params)
  *carry, metrics = step(*carry, batch['image'], batch['label'])
  jax.block_until_ready(carry)
  start = time.perf_counter()
  for _ in range(steps):
    *carry, metrics = step(*carry, batch['image'], batch['label'])
  jax.block_until_ready((carry, metrics))
  return steps / (time.perf_counter() - start)


def _silent():
  import contextlib
  import io

  return contextlib.redirect_stdout(io.StringIO())


# ------------------------------------------------------------------ results


def results():
  """Each config over seeds: mean and range, beside scikit-learn's."""
  references = scikit_learn(FLAGS.seeds)
  for name in command.config_names():
    if name.startswith(('digits', 'cancer', 'diabetes')):
      row = result(name, FLAGS.seeds)
      row['scikit_learn'] = references.get(name)
      print(json.dumps(row), flush=True)


def result(name: str, seeds: int) -> dict[str, Any]:
  """A config's metric on test, over seeds 0 to `seeds` - 1."""
  from train import loop as loop_lib

  values, seconds = [], []
  for seed in range(seeds):
    config, _, _ = command.load_config(name, [('seed', str(seed))])
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, _silent():
      final = loop_lib.train_and_evaluate(config, folder)
    seconds.append(time.perf_counter() - start)
    error = 'test/mean_squared_error'
    key = 'test/accuracy' if 'test/accuracy' in final else error
    values.append(final[key])
  return {
    'config': name,
    'metric': key,
    'mean': statistics.mean(values),
    'min': min(values),
    'max': max(values),
    'seeds': seeds,
    'median_seconds': round(statistics.median(seconds), 1),
  }


def scikit_learn(seeds: int) -> dict[str, float]:
  """config -> scikit-learn's test accuracy or squared error on that split.

  Estimators with their own defaults; the perceptron's depends on its seed, so
  it is the mean of as many seeds as ours.
  """
  import numpy as np
  from sklearn import linear_model
  from sklearn import preprocessing
  from sklearn import svm

  from train.data import sources

  def arrays(name: str):
    splits = sources.load(name).splits
    train, test = splits['train'].arrays, splits['test'].arrays
    flat = [a.reshape(len(a), -1).astype(float) for a in (
      train[sources.load(name).input_key], test[sources.load(name).input_key]
    )]  # fmt: skip
    scaler = preprocessing.StandardScaler().fit(flat[0])
    return (
      scaler.transform(flat[0]),
      train['label'],
      scaler.transform(flat[1]),
      test['label'],
    )

  def score(estimator, data) -> float:
    x, y, x_test, y_test = data
    return float(estimator.fit(x, y).score(x_test, y_test))

  cancer, diabetes, digits = map(
    arrays, ('breast_cancer', 'diabetes', 'digits')
  )
  x, y, x_test, y_test = diabetes
  line = linear_model.LinearRegression().fit(x, y)
  return {
    'cancer_perceptron': statistics.mean(
      score(linear_model.Perceptron(random_state=seed), cancer)
      for seed in range(seeds)
    ),
    'cancer_logistic': score(linear_model.LogisticRegression(), cancer),
    'cancer_svm': score(
      svm.LinearSVC(loss='hinge', max_iter=100_000, random_state=0), cancer
    ),
    'diabetes_linear': float(np.square(line.predict(x_test) - y_test).mean()),
    'digits_linear': score(
      linear_model.LogisticRegression(max_iter=5_000), digits
    ),
  }


# ------------------------------------------------------------------ startup


def startup():
  """Wall seconds in new processes: --help, first step, the whole main job."""
  with tempfile.TemporaryDirectory() as folder:
    cache = pathlib.Path(folder) / 'cache'
    rows = {'help': [], 'first_step_ever': [], 'first_step': [], 'all': []}
    for attempt in range(5):
      environment = os.environ | {'TAISHAN_CACHE': f'{cache}-{attempt}'}
      rows['help'].append(_seconds(['--help'], environment)[1])
      for row in ('first_step_ever', 'first_step'):
        first, whole = _seconds(
          [
            '--config=digits_cnn',
            f'--workdir={folder}/{row}-{attempt}',
            '--config.log_every=1',
          ],
          environment,
          until='step   1/',
        )
        rows[row].append(first)
      rows['all'].append(whole)
  for row, seconds in rows.items():
    print(
      json.dumps(
        {
          'what': row,
          'best_seconds': round(min(seconds), 2),
          'median_seconds': round(statistics.median(seconds), 2),
          'runs': len(seconds),
        }
      )
    )


def _seconds(words, environment, until: str | None = None):
  """Seconds until a line that starts so, and until the end."""
  start = time.perf_counter()
  process = subprocess.Popen(
    [sys.executable, '-m', 'experiments.launch', *words],
    stdout=subprocess.PIPE,
    text=True,
    env=environment,
  )
  first = None
  for line in process.stdout:
    if first is None and until is not None and line.startswith(until):
      first = time.perf_counter() - start
  if process.wait() == 130:
    raise KeyboardInterrupt
  if process.returncode:
    raise RuntimeError(f'launch {words} exited with {process.returncode}')
  return first, time.perf_counter() - start


SUITES = {'loop': loop, 'results': results, 'startup': startup}

if __name__ == '__main__':
  command.start('benchmark', main)
