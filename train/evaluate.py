"""Evaluation: the same function for the loop and for the evaluation job."""

from collections.abc import Callable
import contextlib
import json
import pathlib
from typing import Any

import jax

from train import mesh as mesh_lib
from train import metrics
from train import partition
from train import processes
from train import program as program_lib
from train import state as state_lib
from train import workdir as workdir_lib
from train.data import pipeline


def evaluate(
  program: program_lib.Program,
  state: state_lib.TrainState,
  split: str,
  *,
  params: str = 'ema',
  between: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
  """Every metric over every example of `split`, each counted once.

  Args:
    program: the experiment.
    state: at the step to evaluate; left as it is.
    split: 'train', 'validation' or 'test'.
    params: 'raw' for those that are trained, in place of their running mean
      where the config has one.
    between: called after each batch; may raise to stop.

  Returns:
    `loss` and the task's metrics as means, `count`, and for classes
    `per_class` and `confusion`.
  """
  with jax.transfer_guard('allow'):  # Which the loop forbids.
    totals = program.zero_totals()
    params = state.params if params == 'raw' else program.eval_params(state)
  batches = pipeline.eval_batches(
    program.dataset.splits[split],
    program.eval_batch_size,
    program.mesh,
    num_workers=program.config.data.num_workers,
  )
  with contextlib.closing(batches):  # Worker processes end with it.
    for i, batch in enumerate(batches, start=1):
      totals = program.eval_step(params, state.batch_stats, totals, batch)
      if i % mesh_lib.steps_in_flight(program.mesh) == 0:
        jax.block_until_ready(totals)
      between()
  totals = partition.get(totals, program.mesh)
  return metrics.summarize(totals, program.dataset.classes)


def scalars(results: dict[str, Any], prefix: str) -> dict[str, float]:
  """The numbers of a result that belong in metrics.jsonl, as 'eval/loss'."""
  return {
    f'{prefix}/{key}': value
    for key, value in sorted(results.items(), key=lambda kv: kv[0] != 'loss')
    if isinstance(value, float)
  }


def to_json(split: str, step: int, results: dict[str, Any]) -> str:
  """A result as text, with the split and the step it belongs to."""
  return json.dumps({'split': split, 'step': step, **results}, indent=2) + '\n'


def write(
  workdir: pathlib.Path,
  split: str,
  step: int,
  results: dict[str, Any],
  *,
  params: str = 'ema',
) -> pathlib.Path:
  """Keeps a result as evaluations/SPLIT-STEP.json, whole or not at all.

  That of raw parameters is SPLIT-STEP-raw.json.

  Raises:
    SaveError: not at all.
  """
  raw = '-raw' if params == 'raw' else ''
  path = workdir / 'evaluations' / f'{split}-{step}{raw}.json'
  if not processes.is_main():
    return path
  with workdir_lib.writing(path):
    path.parent.mkdir(exist_ok=True)
  workdir_lib.write(path, to_json(split, step, results))
  return path
