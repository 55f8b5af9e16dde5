"""The whole loop against a bare step, on mnist_mlp and mnist_cnn."""

import dataclasses
import json
import pathlib
import statistics
import tempfile
import time

from experiments import command
from experiments.benchmarks import silence
from train import config as config_lib

# Config -> timed steps of a round.
CASES = {'mnist_cnn': 80, 'mnist_mlp': 2_000}


def main(configs: list[str], rounds: int):
  """Prints each case's steps a second, ratio, and share of time waiting.

  The bare step is what one would write by hand: one jitted step of the same
  model, optimizer and metrics, on one batch that lies on the device.
  """
  for name in configs or CASES:
    steps = CASES[name]
    config = _timed(command.load_config(name, [])[0], steps)
    measured = []
    for _ in range(rounds):  # In turn: what slows one slows the other.
      bare = _bare_steps_per_second(config, steps)
      measured.append((*_loop_steps_per_second(config, steps), bare))
    ratios = [ours / bare for ours, _, bare in measured]
    row = {
      'config': name,
      'steps': steps,
      'loop_steps_per_second': statistics.median(m[0] for m in measured),
      'bare_steps_per_second': statistics.median(m[2] for m in measured),
      'ratio_median': statistics.median(ratios),
      'ratio_min': min(ratios),
      'ratio_max': max(ratios),
      'waiting_share': statistics.median(m[1] for m in measured),
      'rounds': rounds,
    }
    print(json.dumps(row), flush=True)


def _timed(config: config_lib.Config, steps: int) -> config_lib.Config:
  """The config with its logging: one step that compiles, `steps` timed ones."""
  return dataclasses.replace(
    config,
    total_steps=steps + 1,
    total_epochs=None,
    log_every=100,
    eval_every=100_000,
    checkpoint_every=100_000,
    keep_best=0,
  )


def _loop_steps_per_second(config, steps: int) -> tuple[float, float]:
  """By the loop's own account: timing.jsonl leaves the first step out."""
  from train import loop as loop_lib
  from train import workdir
  from train import writer

  with tempfile.TemporaryDirectory() as folder:
    with silence.silence():
      loop_lib.train_and_evaluate(config, folder)
    lines = writer.read(pathlib.Path(folder) / workdir.TIMING)
  assert sum(line['steps'] for line in lines) == steps
  seconds = sum(line['seconds'] for line in lines)
  waited = sum(line['waiting_share'] * line['seconds'] for line in lines)
  return steps / seconds, waited / seconds


def _bare_steps_per_second(config, steps: int) -> float:
  """One jitted step, one batch, a for loop."""
  from flax import nnx
  import jax
  import jax.numpy as jnp
  import numpy as np
  import optax

  import models
  from train.data import sources

  arguments = {k: v for k, v in config.model.items() if k != 'name'}
  model = models.create(config.model['name'], **arguments, rngs=nnx.Rngs(0))
  graphdef, params, batch_stats = nnx.split(model, nnx.Param, nnx.BatchStat)
  params, batch_stats = map(nnx.to_pure_dict, (params, batch_stats))
  assert config.optimizer == {'name': 'adam'}
  tx = optax.adam(optax.cosine_decay_schedule(1e-3, steps))

  def step(params, batch_stats, opt_state, image, label):
    def compute_loss(params):
      model = nnx.merge(graphdef, params, batch_stats, copy=True)
      logits = model(image.astype(jnp.float32) / 255, train=True)
      loss = optax.losses.softmax_cross_entropy_with_integer_labels(
        logits, label
      ).mean()
      stats = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
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
  dataset = sources.load(config.data.name, config.data.data_dir)
  batch = dataset.splits['train'].take(np.arange(config.data.batch_size))
  batch = jax.device_put(batch)
  carry = params, batch_stats, tx.init(params)
  *carry, metrics = step(*carry, batch['image'], batch['label'])
  jax.block_until_ready(carry)
  start = time.perf_counter()
  for _ in range(steps):
    *carry, metrics = step(*carry, batch['image'], batch['label'])
  jax.block_until_ready((carry, metrics))
  return steps / (time.perf_counter() - start)
