"""What digests and verification cost, on the state of cifar10_resnet18.

The model is the config's, on images of one channel, which need no download:
parameters, running statistics and momentum, 89 MB. Saved and restored with and
without digests, in turn; without them is Orbax alone. What a save costs more is
given as a share of 100 training steps too; CIFAR-10's
images are 16 times as large, and so the share a small part of that.
"""

from collections.abc import Callable
import contextlib
import json
import pathlib
import statistics
import tempfile
import time
from typing import Any

import jax

from experiments import command
from train import checkpoint
from train import config as config_lib
from train import program as program_lib
from train.data import pipeline


def main(rounds: int):
  """Prints a line for saving, and one for restoring."""
  config, _, _ = command.load_config('cifar10_resnet18', [])
  data = config_lib.Data(name='digits', batch_size=128)
  config = config_lib.replace(config, 'data', data)
  program = program_lib.create(config, training=False)
  # After some steps no moment is zero, which would take no place on the disk.
  state, step_seconds = _trained(program)
  size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
  ocp = checkpoint.ocp
  with (
    tempfile.TemporaryDirectory() as folder,
    checkpoint.Checkpoints(
      pathlib.Path(folder) / 'ours', program.config, {}, say=print
    ) as ours,
    ocp.CheckpointManager(
      pathlib.Path(folder) / 'orbax',
      options=ocp.CheckpointManagerOptions(max_to_keep=1),
    ) as orbax,
  ):

    def save_ours(step):
      ours.save(state, step)
      yield
      ours.require(step)

    def save_orbax(step):
      orbax.save(
        step, args=ocp.args.Composite(state=ocp.args.StandardSave(state))
      )
      yield
      orbax.wait_until_finished()

    def restore_ours(step):
      yield
      jax.block_until_ready(ours.restore(program, step))

    def restore_orbax(step):
      yield
      args = ocp.args.StandardRestore(program.state_shape)
      restored = orbax.restore(step, args=ocp.args.Composite(state=args))
      jax.block_until_ready(restored['state'])

    for what, plain, full in (
      ('save', save_orbax, save_ours),
      ('restore', restore_orbax, restore_ours),
    ):
      rows = {'without': [], 'with': []}
      for step in range(rounds + 1):
        at = step if what == 'save' else rounds
        for name, act in (('without', plain), ('with', full)):
          rows[name].append(_seconds(act, at))
      row = {'what': what, 'MB': round(size / 1e6, 1)} | _row(rows)
      if what == 'save':
        share = row['cpu_seconds_extra'] / (100 * step_seconds)
        row['percent_of_100_steps'] = round(100 * share, 2)
      print(json.dumps(row))


def _trained(program: program_lib.Program) -> tuple[Any, float]:
  """The state after six steps, and the median CPU seconds of five."""
  config = program.config
  batches = pipeline.train_batches(
    program.dataset.splits['train'],
    seed=config.seed,
    batch_size=config.data.batch_size,
    first_step=0,
    mesh=program.mesh,
  )
  state, found = program.init(), []
  with contextlib.closing(batches):
    for _ in range(6):
      start = time.process_time()
      state, metrics = program.train_step(state, next(batches))
      jax.block_until_ready(metrics)
      found.append(time.process_time() - start)
  return state, statistics.median(found[1:])  # The first compiles.


def _seconds(act: Callable, step: int) -> tuple[float, float, float]:
  """CPU seconds of all threads, wall seconds, and those before the yield."""
  cpu, start = time.process_time(), time.perf_counter()
  parts = act(step)
  next(parts)
  blocked = time.perf_counter() - start
  for _ in parts:
    pass
  return time.process_time() - cpu, time.perf_counter() - start, blocked


def _row(rows: dict[str, list]) -> dict[str, float]:
  """Medians, without the first round, which warms up."""
  found = {}
  for i, kind in enumerate(('cpu', 'wall', 'blocking')):
    for name, values in rows.items():
      median = statistics.median(value[i] for value in values[1:])
      found[f'{kind}_seconds_{name}'] = round(median, 3)
    pairs = zip(rows['with'][1:], rows['without'][1:], strict=True)
    extra = statistics.median(a[i] - b[i] for a, b in pairs)
    found[f'{kind}_seconds_extra'] = round(extra, 3)
  return found
