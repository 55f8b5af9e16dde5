"""What tests ask of a finished run, and a small config for them."""

import hashlib
import pathlib

import jax
import numpy as np

from train import checkpoint
from train import config as config_lib
from train import program as program_lib
from train import workdir as workdir_lib


def config(**fields) -> config_lib.Config:
  """digits_mlp's config shrunk to 12 steps; fields replace its own."""
  return config_lib.Config(
    **{
      'total_steps': 12,
      'log_every': 4,
      'eval_every': 4,
      'checkpoint_every': 4,
      'data': config_lib.Data(name='digits', batch_size=64),
      'model': {'name': 'mlp', 'widths': (32,), 'dropout': 0.3},
      'optimizer': {'name': 'adamw'},
      'schedule': {'name': 'cosine_decay_schedule', 'init_value': 3e-3},
      **fields,
    }
  )


def digest(workdir: pathlib.Path, devices=None) -> str:
  """Of every byte of the newest state: parameters, moments, statistics."""
  config = workdir_lib.read_config(workdir)
  program = program_lib.create(config, training=False, devices=devices)
  with checkpoint.Checkpoints(
    workdir, program.config, {}, say=print, read_only=True
  ) as checkpoints:
    state, _ = checkpoints.restore_newest(program)
  total = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(state):
    total.update(jax.tree_util.keystr(path).encode())
    total.update(np.asarray(leaf).tobytes())
  return total.hexdigest()
