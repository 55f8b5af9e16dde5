"""What experiments.plan predicts on this CPU against what is measured."""

from collections.abc import Callable
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
from typing import Any

from experiments.benchmarks import models as models_suite
from train import config as config_lib

_MEMORY = ('cifar10_resnet18', 'cifar10_vit')
_SECONDS = 1.0  # Of each measurement, at least.
_WIDTH = 256  # Of the calibration's layers, and its batch: in a cache.


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
  for name in () if cases else _MEMORY:
    _in_process('memory', name)
  rates, rows = measure_steps(cases or tuple(models_suite.CASES), rounds)
  print(json.dumps(rates))
  for row in rows:
    print(json.dumps(row))
  error = statistics.median(abs(row['error']) for row in rows)
  print(f'median error of a step: {error:.0%}')


def _in_process(*words: str):
  subprocess.run(
    [sys.executable, '-m', 'experiments.benchmarks.plan', *words],
    check=True,
    env=os.environ | {'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': '1'},
  )


# -------------------------------------------------------------------- steps


def measure_steps(
  cases: Sequence[str], rounds: int
) -> tuple[dict[str, float], list[dict[str, Any]]]:
  """This CPU's rates, and milliseconds of a step, predicted and measured.

  The rates are measured with programs that are none of the cases, in turn with
  these, so that what slows one slows the other; medians of the rounds count.

  Args:
    cases: of models_suite.CASES.
    rounds: how often each is measured.
  """
  from experiments.planning import compiling
  from experiments.planning import cost
  from experiments.planning import targets

  programs = {
    name: models_suite.create_program(models_suite.CASES[name], 1)
    for name in cases
  }
  accounts = {name: compiling.account(p) for name, p in programs.items()}
  timers = {name: _step(program) for name, program in programs.items()}
  calibrations = _calibrations()
  timers |= {name: timer for name, (_, timer) in calibrations.items()}
  seconds = {name: [] for name in timers}
  for _ in range(rounds):
    for name, timer in timers.items():
      seconds[name].append(_seconds(timer))
  medians = {
    name: statistics.median(values) for name, values in seconds.items()
  }
  rates = {name: work / medians[name] for name, (work, _) in
           calibrations.items()}  # fmt: skip
  rows = []
  for name in cases:
    plan = cost.plan(targets.calibrated(**rates), accounts[name])
    rows.append(
      {
        'case': name,
        'predicted_ms': round(1e3 * plan.step, 2),
        'measured_ms': round(1e3 * medians[name], 2),
        'least_ms': round(1e3 * min(seconds[name]), 2),
        'most_ms': round(1e3 * max(seconds[name]), 2),
        'error': round(plan.step / medians[name] - 1, 2),
        'bound': plan.bound,
        'rounds': rounds,
      }
    )
  return rates, rows


def _calibrations() -> dict[str, tuple[float, Callable]]:
  """Operations or bytes, and what takes them, of a row in targets.py."""
  import jax
  import jax.numpy as jnp

  from experiments.planning import compiling

  def line(count):
    """y = a x + b, of so many numbers."""
    x = jnp.ones(count, jnp.float32)
    function = jax.jit(lambda x: 1.5 * x + 1)
    return 2 * 4 * count, lambda: function(x)

  program = _dense_program()
  account = compiling.account(program, compiled=False)
  return {
    'flops': (account['flops'], _step(program)),
    'bandwidth': line(2**23),
    'cache_bandwidth': line(2**20),
  }


def _dense_program():
  """Three dense layers, whose products are most of a step."""
  from train import program as program_lib

  config = config_lib.Config(
    total_steps=1,
    data=config_lib.Data(name='noise', batch_size=_WIDTH, normalize='unit'),
    model={'name': 'mlp', 'widths': (_WIDTH,) * 3},
    optimizer={'name': 'sgd'},
    schedule={'name': 'constant_schedule', 'value': 1e-3},
  )
  case = dataclasses.replace(models_suite.CASES['mlp'], batch_size=_WIDTH)
  return program_lib.create(config, models_suite.noise(case))


def _step(program) -> Callable:
  """A training step, ready to be called again and again."""
  state, batch = program.init(), _batch(program)

  def step():
    nonlocal state
    state, metrics = program.train_step(state, batch)
    return metrics['loss']

  return step


def _seconds(function: Callable) -> float:
  """Of one call, the median of as many as take a second."""
  import jax

  jax.block_until_ready(function())
  times, start = [], time.perf_counter()
  while time.perf_counter() - start < _SECONDS or len(times) < 3:
    begun = time.perf_counter()
    jax.block_until_ready(function())
    times.append(time.perf_counter() - begun)
  return statistics.median(times)


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
