"""The life of a sweep: trials begin, are watched, judged, and told.

A trial is a point; it has a run for each seed and fold. What is known of it
lies in the study's journal and in its runs' workdirs, so that a sweep that was
killed goes on: finished runs stay, others resume from their checkpoints.
"""

from collections.abc import Callable
from collections.abc import Mapping
import dataclasses
import pathlib
import shlex
import statistics
import time

from experiments import command
from experiments.search import devices
from experiments.search import launchers
from experiments.search import study as study_lib
from experiments.search import trials as trials_lib
from train import metrics
from train import signals
from train import state as state_lib

_POLL_SECONDS = 0.1
_STOPPING_SECONDS = 60  # For runs to save, after a signal.
_USER_ERROR = 2  # Its input is wrong: trying again gives the same.
_TAIL_BYTES = 20_000
_ENDED = {
  study_lib.State.COMPLETE: trials_lib.FINISHED,
  study_lib.State.PRUNED: trials_lib.PRUNED,
  study_lib.State.FAIL: trials_lib.FAILED,
}


@dataclasses.dataclass(eq=False)
class _Active:
  """A run in a slot."""

  trial: trials_lib.Trial
  run: trials_lib.Run
  slot: devices.Slot
  job: launchers.Job


class Engine:
  """Keeps every slot busy until the study has its trials."""

  def __init__(
    self,
    plan: trials_lib.Plan,
    study: study_lib.Study,
    launcher: launchers.Launcher,
    *,
    say: Callable[[str], None],
    changed: Callable[['Engine'], None],
  ):
    """Reads what the journal knows.

    Args:
      plan: what trials have in common.
      study: opened.
      launcher: where runs are started.
      say: takes a line for each thing that happens.
      changed: called as trials move on, and every so often.
    """
    self.plan, self._study, self._launcher = plan, study, launcher
    self._say, self._changed = say, changed
    self._active: list[_Active] = []
    self.trials: list[trials_lib.Trial] = []
    for frozen in study.trials:
      self._add(frozen)
    ended = [t for t in study.trials if t.state.is_finished()]
    ended.sort(key=lambda t: t.datetime_complete)
    for place, frozen in enumerate(ended):
      self.trials[frozen.number].place = place
    for trial in self.trials:
      self._conclude(trial)  # A kill may have come in between.

  # ------------------------------------------------------------------ state

  @property
  def best(self) -> trials_lib.Trial | None:
    """The finished trial with the best value, the earlier of equals."""
    done = [t for t in self.trials if t.state == trials_lib.FINISHED]
    sign = self.plan.sign
    return max(done, key=lambda t: (sign * t.value, -t.number), default=None)

  @property
  def failed(self) -> list[trials_lib.Trial]:
    """The trials that failed."""
    return [t for t in self.trials if t.state == trials_lib.FAILED]

  @property
  def slots(self) -> int:
    """How many runs there can be side by side."""
    return len(self._launcher.slots)

  def seconds_left(self) -> float | None:
    """A guess from the runs that finished; None before the first."""
    took = [
      r.seconds for t in self.trials for r in t.runs if r.seconds is not None
    ]
    if not took or self.plan.trials is None:
      return None
    mean = statistics.fmean(took)
    each = self.plan.seeds * (self.plan.folds or 1)
    counted = [t for t in self.trials if t.state != trials_lib.FAILED]
    to_begin = max(0, self.plan.trials - len(counted)) * each
    waiting = [
      r for t in counted if t.state == trials_lib.RUNNING
      for r in t.runs if r.state == trials_lib.WAITING
    ]  # fmt: skip
    now = time.monotonic()
    begun = sum(max(0.0, mean - (now - a.run.began)) for a in self._active)
    return ((to_begin + len(waiting)) * mean + begun) / self.slots

  # -------------------------------------------------------------------- run

  def run(self):
    """Until all trials have ended.

    Raises:
      Stopped: a signal came; runs have saved, and the same command goes on.
    """
    try:
      while self._fill() or self._active:
        signals.check('stopped, saved; the same command goes on')
        for active in list(self._active):
          if active in self._active:  # Else its trial has just ended.
            self._look(active)
        self._changed(self)
        time.sleep(_POLL_SECONDS)
    except signals.Stopped:
      self._stop()
      raise
    finally:
      for active in self._active:
        active.job.kill()
      self._launcher.close()
      self._changed(self)

  def _fill(self) -> bool:
    """Starts a run in each free slot; whether there was one to start."""
    started = False
    for slot in self._launcher.slots:
      if any(active.slot is slot for active in self._active):
        continue
      following = self._next()
      if following is None:
        break
      trial, run = following
      words = trials_lib.words(self.plan, trial, run)
      run.state, run.slot = trials_lib.RUNNING, slot.name
      run.began = time.monotonic()
      run.command = shlex.join(
        [*slot.prefix, command.python(), '-m', 'experiments.launch', *words]
      )
      job = self._launcher.start(words, run.log, slot)
      self._active.append(_Active(trial, run, slot, job))
      self._say(f'{trials_lib.name(trial, run)} on {slot.name}: {run.command}')
      started = True
    return started

  def _next(self) -> tuple[trials_lib.Trial, trials_lib.Run] | None:
    """The next run: of a trial that has begun, or of a new one."""
    for trial in self.trials:
      if trial.state != trials_lib.RUNNING:
        continue
      for run in trial.runs:
        # Where trials are pruned, the first run decides about the others.
        if (
          self._study.prunes
          and trial.runs[0].state != trials_lib.FINISHED
          and run.index
        ):
          break
        if run.state == trials_lib.WAITING:
          return trial, run
    counted = sum(t.state != trials_lib.FAILED for t in self.trials)
    if self.plan.trials is not None and counted >= self.plan.trials:
      return None
    if len(self.failed) > (self.plan.trials or len(self.trials)):
      return None  # As many have failed as were wanted: so will the next.
    frozen = self._study.begin()
    if frozen is None:
      return None
    trial = self._add(frozen)
    return trial, trial.runs[0]

  def _look(self, active: _Active):
    """Reads what a run has written; judges it, and settles it at its end."""
    trial, run = active.trial, active.run
    code = active.job.poll()
    if run.read(self.plan.metric) and run.index == 0:
      # Also of a run that was quick to finish: the numbers decide, not the
      # clock.
      counted = self._study.report(trial.number, _in_order(run.scores))
      if counted is not None:
        self._end(trial, trials_lib.PRUNED, f'after {counted} evaluations')
        return
    if code is not None:
      self._active.remove(active)
      self._settle(active, code)

  def _settle(self, active: _Active, code: int):
    """A run has ended with this code."""
    trial, run = active.trial, active.run
    tail = _tail(run.log)
    if code == 0 and run.scores:
      best = metrics.best_first(self.plan.metric, run.scores, run.scores)[0]
      run.state = trials_lib.FINISHED
      run.value, run.step = run.scores[best], best
      run.seconds = time.monotonic() - run.began
      self._study.keep_run(trial.number, run.index, run.record())
    elif state_lib.NON_FINITE in tail:
      run.state, run.why = trials_lib.PRUNED, tail
      self._study.keep_run(trial.number, run.index, run.record())
    else:
      run.attempts += 1
      how = f'exit code {code}' if code >= 0 else f'signal {-code}'
      run.why = f'{how}: {tail}' if tail else how
      again = code != _USER_ERROR and run.attempts <= self.plan.retries
      run.state = trials_lib.WAITING if again else trials_lib.FAILED
      self._study.keep_run(trial.number, run.index, run.record())
      self._say(
        f'{trials_lib.name(trial, run)} failed with {run.why}; '
        + ('it is tried again; ' if again else '')
        + f'log: {run.log}'
      )
    self._conclude(trial)

  def _conclude(self, trial: trials_lib.Trial):
    """Ends a trial whose runs have all finished, or one of which cannot."""
    if trial.state != trials_lib.RUNNING:
      return
    states = [run.state for run in trial.runs]
    for state in (trials_lib.FAILED, trials_lib.PRUNED):
      if state in states:
        self._end(trial, state, trial.runs[states.index(state)].why or '')
        return
    if set(states) == {trials_lib.FINISHED}:
      self._end(trial, trials_lib.FINISHED)

  def _end(self, trial: trials_lib.Trial, state: str, why: str = ''):
    """The trial has ended; runs of it that have not, end too."""
    trial.state = state
    for active in [a for a in self._active if a.trial is trial]:
      active.job.kill()
      self._active.remove(active)
    for run in trial.runs:
      if run.state in (trials_lib.RUNNING, trials_lib.WAITING):
        run.state = state
    trial.place = sum(t.place is not None for t in self.trials)
    kept = next(k for k, v in _ENDED.items() if v == state)
    self._study.tell(trial.number, kept, trial.value)
    words = [f'trial {trial.number} {state}']
    if trial.value is not None:
      words.append(f'{self.plan.metric} {trial.value:.4g}')
      if trial.deviation is not None:
        words.append(f'deviation {trial.deviation:.2g}')
      words.append(f'best so far {self.best.value:.4g} (trial '
                   f'{self.best.number})')  # fmt: skip
    elif why:
      words.append(why)
    self._say(', '.join(words))

  def _stop(self):
    """All runs save and end."""
    for active in self._active:
      active.job.stop()
    end = time.monotonic() + _STOPPING_SECONDS
    while self._active and time.monotonic() < end:
      self._active = [a for a in self._active if a.job.poll() is None]
      time.sleep(_POLL_SECONDS)

  # ----------------------------------------------------------------- trials

  def _add(self, frozen) -> trials_lib.Trial:
    trial = trials_lib.Trial(
      frozen.number,
      self._study.point(frozen),
      trials_lib.runs(self.plan, frozen.number),
    )
    trial.state = _ENDED.get(frozen.state, trials_lib.RUNNING)
    kept = self._study.runs(trial.number)
    for run in trial.runs:
      for name, value in kept.get(run.index, {}).items():
        setattr(run, name, value)
      if trial.state != trials_lib.RUNNING:
        run.read(self.plan.metric)
        if run.state == trials_lib.WAITING:  # It was ended with its trial.
          run.state = trial.state
    self.trials.append(trial)
    return trial


def _in_order(scores: Mapping[int, float]) -> list[float]:
  return [scores[step] for step in sorted(scores)]


def _tail(log: pathlib.Path) -> str:
  """The last line of a log."""
  try:
    with log.open('rb') as file:
      file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
      lines = file.read().decode('utf-8', 'replace').split('\n')
  except OSError:
    return ''
  lines = [line.strip() for line in lines if line.strip()]
  return lines[-1] if lines else ''
