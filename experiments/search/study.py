"""The record of a sweep: an Optuna study in a journal file.

Every change is one line of the journal, so that a sweep killed at any instant
goes on where it was. What Optuna would suggest for a trial depends on the
search's seed, the trial's number and the results told so far, and on nothing
that a restart would lose.
"""

from collections.abc import Sequence
import logging
import pathlib
from typing import Any

import optuna

from experiments.search import space as space_lib
from train import config as config_lib
from train import workdir as workdir_lib

JOURNAL = 'journal.jsonl'
_SWEEP = 'sweep'  # The study's attribute that says what is searched.
_RUN = 'run-'  # A trial's attribute for each of its runs that has ended.
_SEARCHES = {
  'random': optuna.samplers.RandomSampler,
  # What runs now counts as bad, so that side by side trials differ.
  'tpe': lambda seed: optuna.samplers.TPESampler(seed=seed, constant_liar=True),
}
State = optuna.trial.TrialState


class _Journal(optuna.storages.journal.JournalFileBackend):
  """Optuna's, whose errors are one line for the user."""

  def __init__(self, file: str):
    self._place = pathlib.Path(file)
    with workdir_lib.writing(self._place):
      super().__init__(file)

  def append_logs(self, logs):
    with workdir_lib.writing(self._place):
      super().append_logs(logs)


class Study:
  """The trials of a sweep: asked for, told, and kept."""

  def __init__(
    self,
    folder: pathlib.Path,
    search: str,
    space: space_lib.Space,
    points: tuple[space_lib.Point, ...] | None,
    *,
    higher_is_better: bool,
    seed: int,
    pruner: Sequence | None,
  ):
    """Opens the journal in `folder`, or begins it.

    Args:
      folder: of the sweep, which nobody else has open.
      search: grid, random, tpe or list.
      space: what may be set.
      points: of a grid or a list, the trials in order.
      higher_is_better: of the metric.
      seed: of random and tpe.
      pruner: ('asha', eta, evaluations): after so many of them, and then after
        eta, eta^2, ... times as many, one trial of eta goes on (Li et al.
        2018); None where all do.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logging.getLogger('optuna').setLevel(logging.ERROR)
    file = folder / JOURNAL
    _mend(file)
    backend = _Journal(str(file))
    self._search, self._points, self._seed = search, points, seed
    self.prunes = pruner is not None
    self._distributions = _distributions(space, points)
    judge = optuna.pruners.NopPruner()
    if pruner is not None:
      judge = optuna.pruners.SuccessiveHalvingPruner(
        reduction_factor=pruner[1], min_resource=pruner[2]
      )
    try:
      self._study = optuna.create_study(
        study_name='sweep',
        storage=optuna.storages.JournalStorage(backend),
        direction='maximize' if higher_is_better else 'minimize',
        pruner=judge,
        load_if_exists=True,
      )
    except (ValueError, KeyError, TypeError) as error:
      raise config_lib.UserError(
        f'{file} is damaged: {config_lib.first_line(error)}; give another '
        'workdir'
      ) from None

  def claim(self, sweep: dict[str, Any]) -> dict[str, Any]:
    """Keeps what is searched; returns what was kept first."""
    kept = self._study.user_attrs.get(_SWEEP)
    if kept is None:
      self._study.set_user_attr(_SWEEP, sweep)
      return sweep
    return kept

  @property
  def trials(self) -> list[optuna.trial.FrozenTrial]:
    """All trials that have begun, by number."""
    return self._study.get_trials(deepcopy=False)

  def begin(self) -> optuna.trial.FrozenTrial | None:
    """Begins the next trial; None where there is no other point."""
    number = len(self.trials)
    if self._points is None:
      params = self.suggest(number)
    elif number < len(self._points):
      params = dict(self._points[number])
    else:
      return None
    self._study.add_trial(  # One line of the journal: whole, or not there.
      optuna.trial.create_trial(
        state=State.RUNNING,
        params=params,
        distributions={path: self._distributions[path] for path in params},
      )
    )
    return self.trials[number]

  def suggest(self, number: int) -> dict[str, Any]:
    """What Optuna's sampler suggests for trial `number` after these results."""
    seed = self._seed * 1_000_003 + number
    scratch = optuna.create_study(
      sampler=_SEARCHES[self._search](seed=seed % 2**32),
      direction=self._study.direction,
    )
    scratch.add_trials(self.trials)
    return scratch.ask(self._distributions).params

  def point(self, trial: optuna.trial.FrozenTrial) -> space_lib.Point:
    """What the trial sets."""
    return {
      path: value if isinstance(value, str) else repr(value)
      for path, value in trial.params.items()
    }

  # ------------------------------------------------------------------- runs

  def runs(self, number: int) -> dict[int, dict[str, Any]]:
    """What is known of the runs of a trial that were tried, by their index."""
    return {
      int(key.removeprefix(_RUN)): value
      for key, value in self.trials[number].user_attrs.items()
      if key.startswith(_RUN)
    }

  def keep_run(self, number: int, index: int, run: dict[str, Any]):
    """Keeps what became of a run."""
    self._trial(number).set_user_attr(f'{_RUN}{index}', run)

  def report(self, number: int, evaluations: list[float]) -> int | None:
    """Hands new evaluations on, in order.

    Args:
      number: the trial's.
      evaluations: all of its first run so far.

    Returns:
      After how many of them the trial is to be pruned; None if it is not.
    """
    known = self.trials[number].intermediate_values
    for count, value in enumerate(evaluations, 1):
      if count not in known:
        trial = self._trial(number)
        trial.report(value, count)
        if trial.should_prune():
          return count
    return None

  def tell(self, number: int, state: State, value: float | None = None):
    """The trial has ended."""
    self._study.tell(number, value, state=state)

  def _trial(self, number: int) -> optuna.trial.Trial:
    return optuna.trial.Trial(self._study, self.trials[number]._trial_id)


def _mend(file: pathlib.Path):
  """Cuts off what a kill left of a last line, and the lock it held.

  The sweep's own lock keeps others out.
  """
  workdir_lib.remove(file.parent, f'{file.name}.lock*')
  if not file.exists():
    return
  data = file.read_bytes()
  whole = data[: data.rfind(b'\n') + 1]
  if whole != data:
    workdir_lib.write(file, whole)


def _distributions(
  space: space_lib.Space, points: tuple[space_lib.Point, ...] | None
) -> dict[str, optuna.distributions.BaseDistribution]:
  """Of each path; choices, and all that a grid or a list has, are texts."""
  if points is not None:
    texts = {}
    for point in points:
      for path, text in point.items():
        texts.setdefault(path, {})[text] = None
    return {
      path: optuna.distributions.CategoricalDistribution(tuple(found))
      for path, found in texts.items()
    }
  made = {}
  for path, dimension in space.dimensions.items():
    if dimension.kind == 'choice':
      made[path] = optuna.distributions.CategoricalDistribution(
        dimension.values
      )
    elif dimension.kind == 'int':
      made[path] = optuna.distributions.IntDistribution(*dimension.values)
    else:
      made[path] = optuna.distributions.FloatDistribution(
        *dimension.values, log=dimension.kind == 'log'
      )
  return made
