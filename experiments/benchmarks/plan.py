"""What experiments.plan predicts on this CPU against what is measured."""

from collections.abc import Sequence
import ctypes
import dataclasses
import gc
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

from experiments.benchmarks import models as models_suite
from train import config as config_lib

_MEMORY = ('cifar10_resnet18', 'cifar10_vit')
_SECONDS = 1.0  # Of each measurement, at least.
_WIDTH = 512  # Of the calibration's layers, and its batch.


def main(cases: Sequence[str], rounds: int):
  """Prints the machine's rates, then memory, then steps, a JSON line each.

  Raises:
    UserError: there is no such case.
  """
  for name in cases:
    if name not in models_suite.CASES:
      raise config_lib.UserError(
        f'--cases is {name!r}; there are {", ".join(models_suite.CASES)}'
      )
  rates = calibrate()
  print(json.dumps(rates), flush=True)
  for name in () if cases else _MEMORY:
    _in_process('memory', name)
  rows = []
  for name in cases or models_suite.CASES:
    rows.append(measure_step(name, rounds, rates))
    print(json.dumps(rows[-1]), flush=True)
  error = statistics.median(abs(row['error']) for row in rows)
  print(f'median error of a step: {error:.0%}')


def _in_process(*words: str):
  subprocess.run(
    [sys.executable, '-m', 'experiments.benchmarks.plan', *words],
    check=True,
    env=os.environ | {'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': '1'},
  )


# -------------------------------------------------------------- calibration


def calibrate() -> dict[str, float]:
  """This CPU's row in targets.py, of programs that are none of the cases."""
  import jax
  import jax.numpy as jnp

  def rate(count):
    """Bytes a second of y = a x + b, of so many numbers."""
    x = jnp.ones(count, jnp.float32)
    function = jax.jit(lambda x: 1.5 * x + 1)
    return 2 * 4 * count / _seconds(lambda: function(x))

  return {
    'flops': _training_rate(),
    'bandwidth': rate(2**26),
    'cache_bandwidth': rate(2**20),
  }


def _training_rate() -> float:
  """Operations a second of a training step of three dense layers."""
  from experiments.planning import compiling
  from train import program as program_lib

  config = config_lib.Config(
    total_steps=1,
    data=config_lib.Data(name='noise', batch_size=_WIDTH, normalize='unit'),
    model={'name': 'mlp', 'widths': (_WIDTH,) * 3},
    optimizer={'name': 'sgd'},
    schedule={'name': 'constant_schedule', 'value': 1e-3},
  )
  case = dataclasses.replace(models_suite.CASES['mlp'], batch_size=_WIDTH)
  program = program_lib.create(config, models_suite.noise(case))
  account = compiling.account(program, compiled=False)
  return account['flops'] / _step_seconds(program)


def _seconds(function) -> float:
  """Of one call, the median of many."""
  import jax

  times, start = [], time.perf_counter()
  while time.perf_counter() - start < _SECONDS or len(times) < 5:
    begun = time.perf_counter()
    jax.block_until_ready(function())
    times.append(time.perf_counter() - begun)
  return statistics.median(times[1:])


def _step_seconds(program) -> float:
  state, batch = program.init(), _batch(program)

  def step():
    nonlocal state
    state, metrics = program.train_step(state, batch)
    return metrics['loss']

  return _seconds(step)


def _batch(program):
  from train.data import pipeline

  return next(
    pipeline.train_batches(
      program.dataset.splits['train'],
      seed=0,
      batch_size=program.config.data.batch_size,
      first_step=0,
      mesh=program.mesh,
    )
  )


# -------------------------------------------------------------------- steps


def measure_step(name: str, rounds: int, rates) -> dict[str, float]:
  """Milliseconds of a step of models_suite.CASES, predicted and measured."""
  from experiments.planning import compiling
  from experiments.planning import cost
  from experiments.planning import targets

  program = models_suite.create_program(models_suite.CASES[name], 1)
  account = compiling.account(program)
  plan = cost.plan(targets.calibrated(**rates), account)
  seconds = statistics.median(_step_seconds(program) for _ in range(rounds))
  return {
    'case': name,
    'predicted_ms': round(1e3 * plan.step, 2),
    'measured_ms': round(1e3 * seconds, 2),
    'error': round(plan.step / seconds - 1, 2),
    'bound': plan.bound,
    'rounds': rounds,
  }


# ------------------------------------------------------------------- memory


def measure_memory(name: str) -> dict[str, float]:
  """MiB of a config's training: predicted, and by how much a process grows."""
  import jax
  import numpy as np

  from experiments import command
  from experiments.planning import compiling
  from train import program as program_lib
  from train.data import described

  config, _, _ = command.load_config(name, [])
  dataset = described.describe(config.data)
  # Examples that are there, as many as a device would hold.
  dataset = dataclasses.replace(
    dataset,
    splits={
      key: dataclasses.replace(
        split,
        arrays={k: np.array(a) for k, a in split.arrays.items()},
        stand_in=False,
      )
      for key, split in dataset.splits.items()
    },
  )
  program = program_lib.create(config, dataset)
  account = compiling.account(program)
  batch, held = compiling.batch_shapes(program)
  compiled = program.train_step.lower(program.state_shape, batch).compile()
  init = jax.jit(
    program.init,
    out_shardings=jax.tree.map(lambda s: s.sharding, program.state_shape),
  )
  init = init.lower().compile()
  del held
  gc.collect()
  ctypes.CDLL(None).malloc_trim(0)
  before = _resident('VmRSS')
  state, batch = init(), _batch(program)
  jax.block_until_ready((state, batch))
  pathlib.Path('/proc/self/clear_refs').write_text('5')  # The peak, anew.
  for _ in range(3):
    state, metrics = compiled(state, batch)
    metrics['loss'].block_until_ready()
  grown = _resident('VmHWM') - before
  needed = sum(account['memory'].values()) + account['ahead']
  return {
    'config': name,
    'predicted_mib': round(needed / 2**20, 1),
    'measured_mib': round(grown / 2**20, 1),
    'error': round(needed / grown - 1, 3),
  }


def _resident(name: str) -> int:
  status = pathlib.Path('/proc/self/status').read_text()
  return 1024 * int(status.partition(f'{name}:')[2].split()[0])


if __name__ == '__main__':
  from experiments import command

  command.quiet()
  print(json.dumps(measure_memory(sys.argv[2])), flush=True)
