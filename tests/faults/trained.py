"""A short real run, whose checkpoints are damaged; shared by parts.

A CNN with batch norms, dropout, Adam's moments and a running mean, on the
digits: a state of every kind that there is, in small files and in some of more
than a megabyte.
"""

import atexit
import contextlib
import dataclasses
import functools
import io
import pathlib
import shutil
import tempfile
from typing import Any

import jax
import numpy as np

from tests import runs
from train import checkpoint
from train import loop
from train import program as program_lib
from train import state as state_lib

OLD, NEW = 4, 8  # The steps that are saved.
CHECKPOINTS = 'checkpoints'


@functools.cache
def program() -> program_lib.Program:
  """The run's: compiled once for all trials."""
  return program_lib.create(
    runs.config(
      total_steps=NEW,
      keep_best=2,
      model={'name': 'cnn', 'widths': (64, 512), 'dropout': 0.2},
      ema_decay=0.9,
    )
  )


@functools.cache
def run() -> tuple[pathlib.Path, dict[int, Any]]:
  """Its workdir, and the states after OLD and NEW as training had them."""
  folder = pathlib.Path(tempfile.mkdtemp(prefix='taishan-faults-'))
  atexit.register(shutil.rmtree, folder, ignore_errors=True)
  states = {}

  def train_step(state, batch):
    state, metrics = program().train_step(state, batch)
    with jax.transfer_guard('allow'):
      step = int(state.step)
      if step in (OLD, NEW):
        states[step] = jax.tree.map(np.array, state)
    return state, metrics

  watched = dataclasses.replace(program(), train_step=train_step)
  with contextlib.redirect_stdout(io.StringIO()):
    loop.run(watched, folder / 'run')
  return folder / 'run', states


def files(step: int) -> list[pathlib.Path]:
  """Those of a checkpoint, below its folder, in order."""
  folder = run()[0] / CHECKPOINTS / f'{step}'
  return sorted(
    path.relative_to(folder) for path in folder.rglob('*') if path.is_file()
  )


def copy(folder: pathlib.Path, *steps: int) -> pathlib.Path:
  """A workdir in `folder` with copies of these checkpoints."""
  for step in steps:
    name = f'{CHECKPOINTS}/{step}'
    shutil.copytree(run()[0] / name, folder / name)
  return folder


def opened(
  workdir: pathlib.Path, said: list[str] | None = None
) -> checkpoint.Checkpoints:
  """The checkpoints there, as a run opens them."""
  say = [].append if said is None else said.append
  return checkpoint.Checkpoints(
    workdir.absolute(), program().config, {}, say=say
  )


def equal(state: state_lib.TrainState, step: int) -> bool:
  """Whether every array is, to the byte, what training had at that step."""
  same = jax.tree.map(
    lambda a, b: (
      a.dtype == b.dtype
      and a.shape == b.shape
      and np.asarray(a).tobytes() == b.tobytes()
    ),
    state,
    run()[1][step],
  )
  return jax.tree.all(same)
