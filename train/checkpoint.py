"""Checkpoints by Orbax, verified: the newest, and the best by a metric."""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
import contextlib
import pathlib
import sys
import threading
from typing import Any

import jax
import orbax.checkpoint as ocp

from train import commit
from train import config as config_lib
from train import manifest
from train import metrics
from train import processes
from train import program as program_lib
from train import state as state_lib
from train import workdir as workdir_lib

_UNREADABLE = (OSError, ValueError, KeyError, TypeError, config_lib.UserError)


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
    self._read_only = read_only
    self._is_saving = False
    self._cannot_meet = False
    self.failed: Exception | None = None
    self._folder = workdir / workdir_lib.CHECKPOINTS
    if not read_only:
      if processes.is_main():
        workdir_lib.remove(self._folder, commit.LEFTOVERS)
      processes.barrier('checkpoints')
    self._remover: threading.Thread | None = None
    self._manager = self._open()
    self._disk = None if read_only else self._folder.stat().st_dev

  def _open(self) -> ocp.CheckpointManager:
    meet = self._meet if processes.count() > 1 else None
    return commit.manager(self._folder, self, meet, read_only=self._read_only)

  def __enter__(self):
    return self

  def __exit__(self, *exception):
    try:
      self.wait()
    except (workdir_lib.SaveError, commit.NonFiniteError):
      if exception == (None, None, None):
        raise  # Else the block ends with an error already.
    finally:
      self._remove()
    # Closing waits for the other processes, which may not come after an error.
    if exception == (None, None, None) or processes.count() == 1:
      self._manager.close()

  def _meet(self, *, key: str, timeout_ms: int):
    """Where Orbax's threads wait for those of the other processes.

    A thread on its way out with an error comes here too, while the others wait
    for it elsewhere: it goes on, and its process's end tells them.
    """
    error = sys.exc_info()[1]
    is_saving = threading.current_thread() is not threading.main_thread()
    if is_saving and error is not None:
      self._cannot_meet = True
      raise workdir_lib.SaveError(_not_saved(error)) from None
    processes.barrier(key, timeout_ms / 1000)

  # ------------------------------------------------------------------ which

  def steps(self) -> list[int]:
    """Every step that is saved, in order."""
    return sorted(self._manager.all_steps())

  def find(self, word: str) -> list[int]:
    """The saved steps that 'latest', 'best' or a number names.

    The first is the one; those after it are for where it is damaged.

    Raises:
      UserError: there is none.
    """
    steps = self.steps()
    if not steps:
      raise config_lib.UserError('there is no checkpoint yet')
    if word == 'latest':
      return steps[::-1]
    if word == 'best':
      if best := self._best_first(steps):
        return best
      raise config_lib.UserError('no saved step was evaluated yet')
    by_word = {str(step): step for step in steps}
    if word not in by_word:
      raise config_lib.UserError(
        f'step {word} is not saved; there are {", ".join(by_word)}'
      )
    return [by_word[word]]

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
    return metrics.best_first(self._config.best_metric, self._scores, steps)

  # ------------------------------------------------------------------- save

  def save(self, state: state_lib.TrainState, step: int):
    """Starts saving, unless it is saved; a failure is said and kept.

    Raises:
      SaveError: that failure, where config.on_save_error is 'stop' or there are
        several processes.
      NonFiniteError: the state of the save before was not finite.
    """
    if step in self._manager.all_steps():
      return
    self.wait()  # Or there would be copies of two states.
    self._remove()
    self._is_saving = True
    self._guarded(lambda: self._start(state, step))

  def _start(self, state: state_lib.TrainState, step: int):
    if not self._is_mounted():
      raise OSError(f'{self._folder} is no longer on the disk that it was on')
    self._manager.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(state),
        **{commit.ITEM: commit.digests(state, step, self._config)},
      ),
      force=True,  # Whether to save is the loop's decision alone.
    )

  def _is_mounted(self) -> bool:
    """What an unmounted disk leaves may be a folder too, on another one."""
    with contextlib.suppress(OSError):
      return self._folder.stat().st_dev == self._disk
    return False

  def poll(self):
    """Notices a save that has ended, without waiting; raises as `save`."""
    if self._is_saving and (
      self._cannot_meet or not self._manager.is_saving_in_progress()
    ):
      self.wait()

  def wait(self):
    """Until everything is written; raises as `save` does."""
    if self._is_saving:
      self._guarded(self._manager.wait_until_finished)
      if self._is_saving:
        self._is_saving = False
        self._remove(0)

  def require(self, step: int):
    """Waits, and makes sure that `step` is on the disk, as process 0 sees it.

    Raises:
      SaveError: it is not.
    """
    self.wait()
    is_saved = (self._folder / str(step)).is_dir()
    if processes.gather('saved', str(is_saved))[0] != str(True):
      raise workdir_lib.SaveError(f'step {step} was trained, but not saved')

  def _guarded(self, act: Callable):
    try:
      with jax.transfer_guard('allow'):  # Orbax reads the arrays its own way.
        act()
    except (OSError, ValueError, RuntimeError) as error:
      self.failed, self._is_saving = error, False
      if processes.count() > 1:  # The others wait for this one, inside Orbax.
        raise workdir_lib.SaveError(_not_saved(error)) from None
      self._clear()
      if self._config.on_save_error == 'stop':
        raise workdir_lib.SaveError(
          f"{_not_saved(error)}; config.on_save_error is 'stop'"
        ) from None
      self._say(_not_saved(error))
    except commit.NonFiniteError:
      self._is_saving = False
      self._clear()
      raise

  def _clear(self):
    """After a failure: nothing half written stays, and Orbax looks anew.

    It has forgotten those that it would have removed after this one.
    """
    if not self._is_mounted():
      return  # There is nothing to look at, and it would make a folder.
    with contextlib.suppress(OSError, ValueError, RuntimeError):
      self._manager.close()  # Says again what was wrong.
    self._manager = self._open()
    self._remove(1)

  def _remove(self, seconds: float | None = None):
    """Removes leftovers in the background; None waits until that is done."""
    if self._remover is not None:
      self._remover.join()
      self._remover = None
    if seconds is not None and processes.is_main() and not self._read_only:
      self._remover = threading.Thread(
        target=workdir_lib.remove,
        args=(self._folder, commit.LEFTOVERS, seconds),
      )
      self._remover.start()

  # ---------------------------------------------------------------- restore

  def restore_final(
    self, program: program_lib.Program, state: state_lib.TrainState, step: int
  ) -> tuple[state_lib.TrainState, int]:
    """What a run returns: `state`, or the best where it may stop early."""
    if program.config.early_stopping.patience is None:
      return state, step
    state, best = self.restore_named(program, 'best')
    self._say(f'the best of {program.config.best_metric} is step {best}')
    return state, best

  def restore_newest(
    self, program: program_lib.Program
  ) -> tuple[state_lib.TrainState, int] | None:
    """The newest state and its step, or None where nothing is saved."""
    if not self.steps():
      return None
    state, step = self.restore_named(program, 'latest')
    self._say(f'resuming from step {step}')
    return state, step

  def restore_named(
    self, program: program_lib.Program, word: str
  ) -> tuple[state_lib.TrainState, int]:
    """The state that `find` names, as the program has it, and its step.

    A checkpoint that does not verify is set aside for the next one; where none
    does, all stay where they are.

    Raises:
      UserError: there is none, or none that verifies, or it does not fit.
    """
    return self._first(word, lambda step: self.restore(program, step))

  def restore(
    self, program: program_lib.Program, step: int
  ) -> state_lib.TrainState:
    """The state of that step, sharded as the program has it.

    Raises:
      UserError: it cannot be read, or does not verify.
    """
    args = ocp.args.StandardRestore(program.state_shape)
    return self._restore(step, program.state_shape, args, whole=True)

  def restore_part(
    self, word: str, shapes: dict[str, Any]
  ) -> tuple[dict[str, Any], int]:
    """Some arrays of the state that `find` names, and its step.

    Args:
      word: 'latest', 'best' or a number.
      shapes: what is wanted, by the names of TrainState.

    Raises:
      UserError: as restore_named.
    """
    args = ocp.args.PyTreeRestore(
      item=shapes,
      restore_args=ocp.checkpoint_utils.construct_restore_args(shapes),
      partial_restore=True,
    )
    return self._first(
      word, lambda step: self._restore(step, shapes, args, whole=False)
    )

  def _first(self, word: str, restore: Callable[[int], Any]) -> tuple[Any, int]:
    """What `restore` gives for the first step of `find(word)` that verifies."""
    damaged = []
    steps = self.find(word)
    for step in steps:
      try:
        found = restore(step)
      except manifest.DamagedError as error:
        damaged.append((step, error))
        continue
      for one in damaged:
        self._set_aside(*one)
      if damaged and not self._read_only:
        processes.barrier('set aside')
        self._manager.close()
        self._manager = self._open()
      return found, step
    lines = '; '.join(str(error) for _, error in damaged)
    if len(steps) > 1:
      lines = f'none of {len(steps)} checkpoints can be used: {lines}'
    raise config_lib.UserError(lines)

  def _set_aside(self, step: int, error: manifest.DamagedError):
    """Makes a checkpoint none, and says so; a reader only says so."""
    if self._read_only:
      self._say(f'{error}; skipped')
      return
    if processes.is_main():
      name = workdir_lib.set_aside(self._folder / str(step))
      self._say(f'{error}; set aside as {name}')

  def _restore(self, step: int, shapes, args, *, whole: bool) -> Any:
    """Verifies the files, restores by Orbax, and verifies the arrays.

    Process 0 looks at the files; each at the arrays that it has.
    """
    folder = self._folder / str(step)
    where = f'checkpoint {folder} cannot be restored'

    def judge(act: Callable):
      """act(), and whatever process finds damage, all hear of it."""
      result, wrong = None, ''
      try:
        result = act()
      except manifest.DamagedError as error:
        wrong = str(error)
      for text in processes.gather('verified', wrong):
        if text:
          raise manifest.DamagedError(f'{where}: {text}')
      return result

    look = manifest.verify if processes.is_main() else manifest.read
    record = judge(lambda: look(folder))
    for name in record.get('others', []):
      self._say(f'checkpoint {folder} has {name!r}, which nobody saved; unread')
    items = ocp.args.Composite(state=args)
    try:
      manifest.check_shapes(shapes, record, whole=whole)
      restored = self._manager.restore(step, args=items)['state']
    except _UNREADABLE as error:
      wrong = config_lib.first_line(error)
      raise config_lib.UserError(f'{where}: {wrong}') from None
    with jax.transfer_guard('allow'):
      judge(lambda: manifest.check_arrays(restored, record))
    return restored
