"""The same 20 steps on meshes of CPU devices; what meshes cost and save."""

from collections.abc import Sequence
import dataclasses
import json
import math
import os
import re
import statistics
import sys
import time

from train import config as config_lib

DEVICES = 8
STEPS = 20
MODELS = {
  'mlp': {'name': 'mlp', 'widths': (256, 128)},
  'cnn': {'name': 'cnn', 'widths': (32, 64)},
  'resnet': {'name': 'resnet', 'variant': 'cifar20', 'depth': (1, 1, 1)},
  'vit': {
    'name': 'vit',
    'variant': 'Ti/16',
    'patch_size': 2,
    'width': 64,
    'depth': 2,
    'num_heads': 8,
    'attention': 'softmax',  # jax.nn's own is in float32 whatever the dtype.
  },
  'lstm': {'name': 'lstm', 'widths': (128,)},
  'autoencoder': {
    'name': 'autoencoder',
    'variant': 'dense',
    'widths': (256, 64),
    'code_size': 8,
  },
}
# In place of these arguments where memory is measured.
LARGER = {
  'mlp': {'widths': (1024, 1024)},
  'cnn': {'widths': (128, 256), 'head_widths': (512,)},
  'resnet': {'variant': '18'},
  'vit': {'width': 256},
  'lstm': {'widths': (512, 512)},
  'autoencoder': {'widths': (1024, 512)},
}
# How long data, fsdp and tensor are.
MESHES = (
  (2, 1, 1),
  (4, 1, 1),
  (8, 1, 1),
  (1, 8, 1),
  (1, 1, 4),
  (4, 2, 1),
  (2, 2, 2),
)


_COLLECTIVE = re.compile(
  r'\s+(?:ROOT )?%\S+ = (.*?) (all-gather|all-reduce|all-to-all|'
  r'reduce-scatter|collective-permute)(?:-start)?\('
)


def main(cases: Sequence[str], rounds: int):
  """Prints a model and mesh a line, then memory, then overhead.

  In processes of their own, whose CPU is eight devices.
  """
  for dtype in ('float64', 'float32'):
    _in_process('losses', dtype, *(cases or MODELS))
  _in_process('memory', *(cases or MODELS))
  _in_process('overhead', str(rounds), *(cases or MODELS))


def _in_process(*words: str):
  import subprocess

  # One device where times are taken.
  devices = 1 if words[0] == 'overhead' else DEVICES
  subprocess.run(
    [sys.executable, '-m', 'experiments.benchmarks.meshes', *words],
    check=True,
    env=os.environ
    | {
      'JAX_PLATFORMS': 'cpu',
      'JAX_ENABLE_X64': '1' if 'float64' in words else '0',
      'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}',
    },
  )


def config(
  name: str,
  dtype: str = 'float64',
  lengths: Sequence[int] = (1, 1, 1),
  **fields,
) -> config_lib.Config:
  """A small model of that family on digits."""
  model = MODELS[name]
  return config_lib.Config(
    total_steps=STEPS,
    log_every=1,
    task='reconstruction' if name == 'autoencoder' else 'classification',
    data=config_lib.Data(
      batch_size=64,
      normalize='unit' if name == 'autoencoder' else 'mean_std',
    ),
    model=model,
    schedule={'name': 'constant_schedule', 'value': 1e-3},
    mesh=config_lib.Mesh(
      **dict(zip(('data', 'fsdp', 'tensor'), lengths, strict=True))
    ),
    dtype=dtype,
    **fields,
  )


def program(config: config_lib.Config):
  """Of the first devices, as many as config.mesh takes."""
  import jax

  from train import program as program_lib

  count = math.prod(dataclasses.asdict(config.mesh).values())
  return program_lib.create(config, devices=jax.devices()[:count])


class Step:
  """A program's training step, compiled for batches of rows."""

  def __init__(self, program):
    self.program = program
    self.compiled = program.train_step.lower(
      program.state_shape, next(self.batches())
    ).compile()

  def batches(self):
    """From the first step on."""
    from train.data import pipeline

    return pipeline.train_batches(
      self.program.dataset.splits['train'],
      seed=self.program.config.seed,
      batch_size=self.program.config.data.batch_size,
      first_step=0,
      mesh=self.program.mesh,
      resident_bytes=0,
    )

  def losses(self, state=None) -> list[float]:
    """Of STEPS steps from `state`, or from the config's first."""
    import jax

    if state is None:
      state = self.program.init()
    else:  # It is taken over by the first step.
      shardings = jax.tree.map(lambda x: x.sharding, self.program.state_shape)
      state = jax.device_put(jax.device_get(state), shardings)
    losses = []
    for _, batch in zip(range(STEPS), self.batches(), strict=False):
      state, metrics = self.compiled(state, batch)
      losses.append(float(metrics['loss']))
    return losses

  def collectives(self) -> list[tuple[str, tuple[int, ...]]]:
    """(kind, shape) of each array that the devices exchange."""
    found = []
    for line in self.compiled.as_text().splitlines():
      if match := _COLLECTIVE.match(line):
        for shape in re.findall(r'\w+\[([\d,]*)\]', match[1]):
          sizes = tuple(int(n) for n in shape.split(',') if n)
          found.append((match[2], sizes))
    return found

  def argument_bytes(self) -> int:
    """Of one device: the state and a batch."""
    return self.compiled.memory_analysis().argument_size_in_bytes


def _print_memory(*names: str):
  """Of larger models, which what is never divided would hide."""
  for name in names:
    found = {}
    for lengths in ((8, 1, 1), (1, 8, 1)):
      here = config(name, 'float32', lengths)
      here.model = here.model | LARGER[name]
      found[lengths] = Step(program(here)).argument_bytes()
    row = {
      'model': name,
      'replicated_mib': found[8, 1, 1] / 2**20,
      'fsdp_8_mib': found[1, 8, 1] / 2**20,
      'ratio': found[8, 1, 1] / found[1, 8, 1],
    }
    print(json.dumps(row), flush=True)


def _print_losses(dtype: str, *names: str):
  for name in names:
    one = program(config(name, dtype))
    first = one.init()
    alone = Step(one).losses(first)
    for partition, meshes in (
      ('jit', MESHES),
      ('shard_map', [m for m in MESHES if m[1:] == (1, 1)]),
    ):
      for lengths in meshes:
        here = config(name, dtype, lengths, partition=partition)
        losses = Step(program(here)).losses(first)
        row = {
          'model': name,
          'dtype': dtype,
          'partition': partition,
          'mesh': lengths,
          'largest_difference': max(
            abs(a - b) for a, b in zip(losses, alone, strict=True)
          ),
        }
        print(json.dumps(row), flush=True)


def _print_overhead(rounds: str, *names: str):
  """A step on a mesh of one device against the same one without a mesh."""
  import jax

  for name in names:
    with_mesh = program(config(name, 'float32'))
    batch = next(Step(with_mesh).batches())
    # The function within partition.ambient: no mesh, no shardings.
    function = with_mesh.train_step.__wrapped__.__wrapped__
    bare = jax.jit(function, donate_argnums=0)
    seconds = {'mesh': [], 'bare': []}
    for _ in range(int(rounds)):  # In turn: what slows one slows the other.
      here = with_mesh.init(), batch
      seconds['mesh'].append(_seconds_a_step(with_mesh.train_step, *here))
      here = jax.device_put((with_mesh.init(), batch), jax.devices()[0])
      seconds['bare'].append(_seconds_a_step(bare, *here))
    ratios = [
      a / b for a, b in zip(seconds['mesh'], seconds['bare'], strict=True)
    ]
    row = {
      'model': name,
      'mesh_ms': 1e3 * statistics.median(seconds['mesh']),
      'bare_ms': 1e3 * statistics.median(seconds['bare']),
      'ratio_median': statistics.median(ratios),
      'ratio_min': min(ratios),
      'ratio_max': max(ratios),
      'rounds': int(rounds),
    }
    print(json.dumps(row), flush=True)


def _seconds_a_step(step, state, batch) -> float:
  state, metrics = step(state, batch)
  metrics['loss'].block_until_ready()
  count, start = 0, time.perf_counter()
  while time.perf_counter() - start < 0.5 or count < 5:
    state, metrics = step(state, batch)
    metrics['loss'].block_until_ready()
    count += 1
  return (time.perf_counter() - start) / count


if __name__ == '__main__':
  from experiments import command

  command.quiet()
  measures = {
    'losses': _print_losses,
    'memory': _print_memory,
    'overhead': _print_overhead,
  }
  measures[sys.argv[1]](*sys.argv[2:])
