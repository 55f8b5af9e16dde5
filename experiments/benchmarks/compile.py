"""Seconds to compile a training step of ViT-L/16, blocks scanned or not."""

import json
import time

from train import config as config_lib

BATCH_SIZE = 8
CASES = {
  'unrolled': {'scan': False},
  'scanned': {'scan': True},
  'scanned, rematerialised': {'scan': True, 'remat': True},
}


def main(variant: str = 'L/16'):
  """Prints a case a line; nothing is run, no parameter is made."""
  for name, options in CASES.items():
    print(json.dumps(measure(name, variant, options)), flush=True)


def measure(name: str, variant: str, options: dict) -> dict:
  """Seconds of tracing and of compiling, and bytes that the step works in."""
  import jax

  from train import program as program_lib

  program = program_lib.create(_config(variant, options), _dataset())
  batch = {
    key: jax.ShapeDtypeStruct((BATCH_SIZE, *spec.shape), spec.dtype)
    for key, spec in program.dataset.splits['train'].specs.items()
  }
  start = time.perf_counter()
  lowered = program.train_step.lower(program.state_shape, batch)
  traced = time.perf_counter()
  compiled = lowered.compile()
  end = time.perf_counter()
  return {
    'case': name,
    'variant': variant,
    'trace_seconds': round(traced - start, 1),
    'compile_seconds': round(end - traced, 1),
    'temporary_mib': compiled.memory_analysis().temp_size_in_bytes >> 20,
  }


def _config(variant: str, options: dict) -> config_lib.Config:
  return config_lib.Config(
    total_steps=1,
    data=config_lib.Data(batch_size=BATCH_SIZE, normalize='unit'),
    model={'name': 'vit', 'variant': variant, **options},
    optimizer={'name': 'adamw'},
    schedule={'name': 'constant_schedule', 'value': 1e-3},
  )


def _dataset():
  """Black images of 224x224, as many as a batch."""
  import numpy as np

  from train.data import sources

  split = sources.Split(
    {
      'image': np.zeros((BATCH_SIZE, 224, 224, 3), np.uint8),
      'label': np.zeros(BATCH_SIZE, np.int32),
    }
  )
  classes = tuple(map(str, range(1000)))
  return sources.Dataset('black', {'train': split, 'test': split}, classes)
