"""A training step with augmentation against one with none, for cifar10_cnn."""

import dataclasses
import json
import statistics
import time

from experiments import command
from train import config as config_lib

# What is timed; the last three are recipes.
CASES = (
  'pad_crop', 'flip', 'translate', 'rotate', 'stretch', 'colour', 'noise',
  'cutout', 'mixup', 'cutmix', 'randaugment', 'pad_crop,flip',
  'pad_crop,flip,cutout', 'pad_crop,flip,mixup',
)  # fmt: skip
STEPS = 15


def main(rounds: int):
  """Prints the extra time of each case, as a share of the plain step's.

  In each round the plain step and all others take their turns, so that what
  slows one slows all; the median of the rounds' ratios counts.
  """
  config, _, _ = command.load_config('cifar10_cnn', [])
  dataset = _noise()
  timers = {'none': _timer(config, dataset)}
  for case in CASES:
    data = dataclasses.replace(config.data, augment=tuple(case.split(',')))
    timers[case] = _timer(dataclasses.replace(config, data=data), dataset)
  seconds = {case: [] for case in timers}
  for _ in range(rounds):
    for case, timer in timers.items():
      seconds[case].append(timer())
  for case, measured in seconds.items():
    ratios = [
      s / plain for s, plain in zip(measured, seconds['none'], strict=True)
    ]
    row = {
      'augment': case,
      'milliseconds': round(1000 * statistics.median(measured), 2),
      'cost': round(statistics.median(ratios) - 1, 3),
      'rounds': rounds,
    }
    print(json.dumps(row), flush=True)


def _noise():
  """A dataset of CIFAR-10's shape: what the pixels are changes no time."""
  import numpy as np

  from train.data import sources

  generator = np.random.default_rng(0)
  arrays = {
    'image': generator.integers(0, 256, (4096, 32, 32, 3), dtype=np.uint8),
    'label': generator.integers(0, 10, 4096).astype(np.int32),
  }
  split = sources.Split(arrays)
  classes = tuple('0123456789')
  return sources.Dataset('noise', {'train': split, 'test': split}, classes)


def _timer(config: config_lib.Config, dataset):
  """() -> seconds a step, of a program that is compiled by then."""
  import jax

  from train import program as program_lib
  from train.data import pipeline

  program = program_lib.create(config, dataset)
  batches = pipeline.train_batches(
    program.dataset.splits['train'],
    seed=config.seed,
    batch_size=config.data.batch_size,
    first_step=0,
    mesh=program.mesh,
  )
  batch = next(batches)  # All of a resident split; the step picks from it.
  state, _ = program.train_step(program.init(), batch)
  states = [jax.block_until_ready(state)]

  def run() -> float:
    start = time.perf_counter()
    for _ in range(STEPS):
      states[0], _ = program.train_step(states[0], batch)
    jax.block_until_ready(states[0])
    return (time.perf_counter() - start) / STEPS

  return run
