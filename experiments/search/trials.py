"""What a sweep is made of: its plan, trials, and their runs.

A trial is a point; it has a run for each seed and fold, each of them a launch
with a workdir of its own.
"""

import dataclasses
import itertools
import pathlib
import statistics
from typing import Any

from experiments.search import results
from experiments.search import space as space_lib
from train import config as config_lib
from train import metrics
from train import workdir as workdir_lib
from train import writer

TRIALS = 'trials'

WAITING, RUNNING, FINISHED, PRUNED, FAILED = results.STATES


@dataclasses.dataclass(frozen=True)
class Plan:
  """What every trial has in common.

  Attributes:
    folder: of the sweep.
    config: --config, as given.
    fixed: what is set in every run.
    metric: that judges, as 'eval/accuracy'.
    seeds: each point is trained with so many.
    first_seed: of them.
    folds: each is trained on so many parts of the data; None for the whole.
    trials: to finish or prune; None for every point.
    retries: of a run that failed.
  """

  folder: pathlib.Path
  config: str
  fixed: space_lib.Point
  metric: str
  seeds: int
  first_seed: int
  folds: int | None
  trials: int | None
  retries: int

  @property
  def sign(self) -> float:
    """With it the best is the greatest."""
    return 1.0 if metrics.higher_is_better(self.metric) else -1.0


@dataclasses.dataclass
class Run:
  """A launch: one seed and fold of a trial.

  Attributes:
    index: among the runs of its trial.
    seed: where the trial has several, else None.
    fold: likewise.
    set: what this run alone sets.
    workdir: of the launch.
    log: its output.
    state: waiting, running, finished, pruned or failed.
    attempts: how often it has been started and has failed.
    value: the best of its evaluations.
    step: of that one.
    why: the last line of one that failed.
    seconds: that it took when it finished.
    command: what a person types to repeat it in the same place.
    slot: where it runs.
    began: when, by the clock that only goes on.
    scores: step -> value of its evaluations.
    newest: the step of the last line of metrics.jsonl.
    seen: the file as it was read last.
  """

  index: int
  seed: int | None
  fold: int | None
  set: space_lib.Point
  workdir: pathlib.Path
  log: pathlib.Path
  state: str = WAITING
  attempts: int = 0
  value: float | None = None
  step: int | None = None
  why: str | None = None
  seconds: float | None = None
  command: str | None = None
  slot: str | None = None
  began: float | None = None
  scores: dict[int, float] = dataclasses.field(default_factory=dict)
  newest: int = 0
  seen: tuple | None = None

  def read(self, metric: str) -> bool:
    """Takes over what is new in metrics.jsonl; whether there was something."""
    file = self.workdir / workdir_lib.METRICS
    try:
      status = file.stat()
      seen = (status.st_ino, status.st_size)
      if seen == self.seen:
        return False
      lines = writer.read(file)
    except (OSError, config_lib.UserError):
      return False  # Not there yet, or gone: its exit code will tell.
    self.seen = seen
    self.scores = {x['step']: x[metric] for x in lines if metric in x}
    self.newest = lines[-1]['step'] if lines else 0
    return True

  def record(self) -> dict[str, Any]:
    """What the journal keeps."""
    names = (
      'state', 'attempts', 'value', 'step', 'why', 'seconds', 'command',
    )  # fmt: skip
    return {name: getattr(self, name) for name in names}


@dataclasses.dataclass
class Trial:
  """A point and its runs."""

  number: int
  point: space_lib.Point
  runs: list[Run]
  state: str = RUNNING
  place: int | None = None  # In the order of ending.

  @property
  def value(self) -> float | None:
    """The mean over its runs, once all have finished."""
    if self.state == FINISHED:
      return statistics.fmean(run.value for run in self.runs)
    return None

  @property
  def deviation(self) -> float | None:
    """The sample's standard deviation over several runs."""
    if self.state == FINISHED and len(self.runs) > 1:
      return statistics.stdev(run.value for run in self.runs)
    return None


def runs(plan: Plan, number: int) -> list[Run]:
  """The runs of trial `number`, for each seed and fold."""
  first, made = plan.first_seed, []
  seeds = [None] if plan.seeds == 1 else range(first, first + plan.seeds)
  folds = [None] if plan.folds is None else range(plan.folds)
  for index, (seed, fold) in enumerate(itertools.product(seeds, folds)):
    own, name = {}, f'{number:03}'
    if seed is not None:
      own['seed'] = str(seed)
      name += f'-seed{seed}'
    if fold is not None:
      own |= {'data.folds': str(plan.folds), 'data.fold': str(fold)}
      name += f'-fold{fold}'
    workdir = plan.folder / TRIALS / name
    log = workdir.with_name(f'{name}.log')
    made.append(Run(index, seed, fold, own, workdir, log))
  return made


def words(plan: Plan, trial: Trial, run: Run) -> list[str]:
  """The flags of a run's launch."""
  return [
    f'--config={plan.config}',
    f'--workdir={run.workdir}',
    *space_lib.words(plan.fixed | trial.point | run.set),
  ]


def name(trial: Trial, run: Run) -> str:
  """'trial 3' or 'trial 3 (seed 1, fold 2)'."""
  which = {'seed': run.seed, 'fold': run.fold}
  of = ', '.join(f'{k} {v}' for k, v in which.items() if v is not None)
  return f'trial {trial.number} ({of})' if of else f'trial {trial.number}'
