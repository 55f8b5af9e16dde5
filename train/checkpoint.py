"""Checkpoints by Orbax: the newest, and the best by a metric."""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
import dataclasses
import pathlib
import shutil
import sys
import threading
from typing import Any

import jax
import orbax.checkpoint as ocp

from train import config as config_lib
from train import metrics
from train import processes
from train import program as program_lib
from train import state as state_lib
from train import workdir as workdir_lib


class SaveError(Exception):
  """A checkpoint could not be saved; what is said before tells why."""

  exit_code = 74


def _meet(*, key: str, timeout_ms: int):
  """Where Orbax's threads wait for those of the other processes.

  A thread on its way out with an error comes here too, while the others wait
  for it elsewhere: it goes on, and its process's end tells them.
  """
  error = sys.exc_info()[1]
  is_saving = threading.current_thread() is not threading.main_thread()
  if is_saving and error is not None:
    raise SaveError(_not_saved(error)) from None
  processes.barrier(key, timeout_ms / 1000)


def _not_saved(error: Exception) -> str:
  return f'a checkpoint could not be saved: {config_lib.first_line(error)}'


class Checkpoints:
  """Saves in the background; keeps the newest and the best few.

  A step's score is looked up when it is needed: metrics.jsonl is the truth, and
  a step may be scored after it was saved.
  """

  def __init__(
    self,
    workdir: pathlib.Path,
    config: config_lib.Config,
    scores: Mapping[int, float],
    *,
    say: Callable[[str], None],
    read_only: bool = False,
  ):
    """Opens workdir/checkpoints.

    Args:
      workdir: of the experiment.
      config: resolved; it goes into each checkpoint too.
      scores: step -> the value of config.best_metric.
      say: takes a line for the user.
      read_only: for looking into a run that may be alive.
    """
    self._config = config
    self._scores = scores
    self._say = say
    self.failed: Exception | None = None
    folder = workdir / workdir_lib.CHECKPOINTS
    if not read_only:
      if processes.is_main():
        # What a kill left half written. Orbax would do this in a thread that
        # may outlive us; rmtree follows no link.
        for leftover in folder.glob(f'*{ocp.utils.TMP_DIR_SUFFIX}*'):
          shutil.rmtree(leftover, ignore_errors=True)
      processes.barrier('checkpoints')
    self._manager = ocp.CheckpointManager(
      folder,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=self,
        read_only=read_only,
        async_options=ocp.AsyncOptions(barrier_sync_fn=_meet)
        if processes.count() > 1
        else None,
      ),
    )

  def __enter__(self):
    return self

  def __exit__(self, *exception):
    self.wait()
    # Closing waits for the other processes, which may not come after an error.
    if exception == (None, None, None) or processes.count() == 1:
      self._manager.close()

  # ------------------------------------------------------------------ which

  def steps(self) -> list[int]:
    """Every step that is saved, in order."""
    return sorted(self._manager.all_steps())

  def best_step(self) -> int | None:
    """The saved step with the best score, the earlier of equals."""
    return next(iter(self._best_first(self.steps())), None)

  def find(self, word: str) -> int:
    """The saved step that 'latest', 'best' or a number names.

    Raises:
      UserError: there is none.
    """
    steps = self.steps()
    if not steps:
      raise config_lib.UserError('there is no checkpoint yet')
    if word == 'latest':
      return steps[-1]
    if word == 'best':
      best = self.best_step()
      if best is None:
        raise config_lib.UserError('no saved step was evaluated yet')
      return best
    by_word = {str(step): step for step in steps}
    if word not in by_word:
      raise config_lib.UserError(
        f'step {word} is not saved; there are {", ".join(by_word)}'
      )
    return by_word[word]

  def is_best(self, step: int) -> bool:
    """Whether `step` is scored and would stay for its score."""
    if step not in self._scores:
      return False
    best = self._best_first({*self.steps(), step})
    return step in best[: self._config.keep_best]

  def should_preserve(self, checkpoints, *, context) -> list[bool]:
    """Orbax's question: which of these may stay?"""
    del context
    steps = [info.step for info in checkpoints]
    best = self._best_first(steps)[: self._config.keep_best]
    return [step == max(steps) or step in best for step in steps]

  def _best_first(self, steps: Iterable[int]) -> list[int]:
    sign = -1 if metrics.higher_is_better(self._config.best_metric) else 1
    scored = [step for step in steps if step in self._scores]
    return sorted(scored, key=lambda s: (sign * self._scores[s], s))

  # ------------------------------------------------------- save and restore

  def save(self, state: state_lib.TrainState, step: int):
    """Starts saving, unless it is saved; a failure is said and kept.

    Raises:
      SaveError: that failure, where there are several processes.
    """
    if step in self._manager.all_steps():
      return
    self._guarded(
      lambda: self._manager.save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardSave(state),
          config=ocp.args.JsonSave(dataclasses.asdict(self._config)),
        ),
        force=True,  # Whether to save is the loop's decision alone.
      )
    )

  def wait(self):
    """Until everything is written; a failure is said and kept."""
    self._guarded(self._manager.wait_until_finished)

  def require(self, step: int):
    """Waits, and makes sure that `step` is on the disk, as process 0 sees it.

    Raises:
      SaveError: it is not.
    """
    self.wait()
    is_saved = (self._manager.directory / str(step)).is_dir()
    if processes.gather('saved', str(is_saved))[0] != str(True):
      raise SaveError(f'step {step} was trained, but not saved')

  def _guarded(self, act: Callable):
    try:
      with jax.transfer_guard('allow'):  # Orbax reads the arrays its own way.
        act()
    except (OSError, ValueError, RuntimeError) as error:
      self.failed = error
      if processes.count() > 1:  # The others wait for this one, inside Orbax.
        raise SaveError(_not_saved(error)) from None
      self._say(_not_saved(error))

  def restore_final(
    self, program: program_lib.Program, state: state_lib.TrainState, step: int
  ) -> tuple[state_lib.TrainState, int]:
    """What a run returns: `state`, or the best where it may stop early."""
    if program.config.early_stopping.patience is None:
      return state, step
    best = self.best_step()
    self._say(f'the best of {program.config.best_metric} is step {best}')
    return self.restore(program, best), best

  def restore_newest(
    self, program: program_lib.Program
  ) -> tuple[state_lib.TrainState, int] | None:
    """The newest state and its step, or None where nothing is saved."""
    if not self.steps():
      return None
    step = self.steps()[-1]
    self._say(f'resuming from step {step}')
    return self.restore(program, step), step

  def restore(
    self, program: program_lib.Program, step: int
  ) -> state_lib.TrainState:
    """The state of that step, sharded as the program has it.

    Raises:
      UserError: it cannot be read.
    """
    return self._restore(step, ocp.args.StandardRestore(program.state_shape))

  def restore_part(self, step: int, shapes: dict[str, Any]) -> dict[str, Any]:
    """Some arrays of that step's state, by the names of TrainState.

    Raises:
      UserError: they cannot be read.
    """
    return self._restore(
      step,
      ocp.args.PyTreeRestore(
        item=shapes,
        restore_args=ocp.checkpoint_utils.construct_restore_args(shapes),
        partial_restore=True,
      ),
    )

  def _restore(self, step: int, args) -> Any:
    try:
      return self._manager.restore(step, args=ocp.args.Composite(state=args))[
        'state'
      ]
    except (OSError, ValueError, KeyError, TypeError) as error:
      raise config_lib.UserError(
        f'checkpoint {self._manager.directory / str(step)} cannot be restored: '
        f'{config_lib.first_line(error)}'
      ) from None
