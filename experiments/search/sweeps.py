"""A sweep's folder: claimed, begun or gone on with, and shown at its end."""

from collections.abc import Sequence
import json
import os
import pathlib
from typing import Any

import filelock

from experiments.search import engine as engine_lib
from experiments.search import launchers
from experiments.search import results
from experiments.search import space as space_lib
from experiments.search import study as study_lib
from experiments.search import table as table_lib
from experiments.search import trials as trials_lib
from train import config as config_lib
from train import progress
from train import workdir as workdir_lib


class NothingFinishedError(Exception):
  """No trial has a value."""

  exit_code = 1


def run(
  folder: pathlib.Path,
  sweep: dict[str, Any],
  space: space_lib.Space,
  points: Sequence[space_lib.Point] | None,
  launcher: launchers.Launcher,
  *,
  config: str,
  fixed: space_lib.Point,
  trials: int | None,
  retries: int,
  first_seed: int,
):
  """Runs a sweep whose points were checked, until its trials have ended.

  Args:
    folder: of the sweep.
    sweep: what is searched; a folder with another is refused.
    space: what may be set.
    points: the trials in order; None where they are drawn.
    launcher: where runs are started.
    config: --config of the runs.
    fixed: what is set in every run.
    trials: that shall finish; None for every point.
    retries: of a run that failed.
    first_seed: of each point's runs.

  Raises:
    UserError: the folder cannot be used.
    NothingFinishedError: every trial failed or was pruned.
    Stopped: a signal came; the same command goes on.
  """
  sweep = json.loads(json.dumps(sweep))  # Lists for tuples, as the journal.
  higher = sweep['direction'] == 'maximize'
  with _claimed(folder), table_lib.Show(folder, sweep) as show:
    show.say(f'workdir: {folder}')
    study = study_lib.Study(
      folder,
      sweep['search'],
      space,
      points,
      higher_is_better=higher,
      seed=sweep['search_seed'],
      pruner=sweep['pruner'],
    )
    _compare(folder, study.claim(sweep), sweep)
    (folder / trials_lib.TRIALS).mkdir(exist_ok=True)
    if points is not None:
      trials = min(trials or len(points), len(points))
    plan = trials_lib.Plan(
      folder=folder,
      config=config,
      fixed=fixed,
      metric=sweep['metric'],
      seeds=sweep['seeds'],
      first_seed=first_seed,
      folds=sweep['folds'],
      trials=trials,
      retries=retries,
    )
    engine = engine_lib.Engine(
      plan, study, launcher, say=show.say, changed=show.changed
    )
    try:
      engine.run()
    finally:
      show.end(engine)
  _conclude(folder, engine)


def _claimed(folder: pathlib.Path) -> filelock.BaseFileLock:
  """The folder made and locked; another process is kept out.

  Raises:
    UserError: it cannot be written, is in use, or holds something else.
  """
  try:
    workdir_lib.check_name(folder.absolute())
    if workdir_lib.is_begun(folder):
      raise config_lib.UserError(
        f'workdir {folder} holds a run, and no sweep; give another workdir'
      )
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / study_lib.JOURNAL).exists() and any(
      path.name != '.lock' for path in folder.iterdir()
    ):
      raise config_lib.UserError(
        f'workdir {folder} is not empty and holds no sweep; give another '
        'workdir'
      )
    lock = filelock.FileLock(folder / '.lock')
    return lock.acquire(timeout=0)
  except filelock.Timeout:
    raise config_lib.UserError(
      f'workdir {folder} is in use by another sweep; wait for it, or give '
      'another workdir'
    ) from None
  except OSError as error:
    raise config_lib.UserError(
      f'workdir {folder} cannot be used as a folder to write in: '
      f'{error.strerror or error}'
    ) from None


def _compare(folder: pathlib.Path, old: dict[str, Any], new: dict[str, Any]):
  """Raises UserError where the folder's sweep is another one."""
  changed = [
    f'{name} was {_short(old.get(name))} and is {_short(new.get(name))}'
    for name in new
    if name != 'base' and old.get(name) != new.get(name)
  ]
  bases = [config_lib.from_json(json.dumps(s['base'])) for s in (old, new)]
  changed += [
    f'config.{field} was {a!r} and is {b!r}'
    for field, (a, b) in config_lib.differences(*bases).items()
  ]
  if changed:
    raise config_lib.UserError(
      f'workdir {folder} belongs to another sweep: {"; ".join(changed)}; give '
      'another workdir, or the same values'
    )


def _short(value: Any) -> str:
  shown = json.dumps(value)
  return shown if len(shown) < 200 else f'{shown[:200]}...'


def _conclude(folder: pathlib.Path, engine: engine_lib.Engine):
  """Draws the pictures; says where everything is, and which was best."""
  from experiments.search import pictures  # Matplotlib takes its time.

  rows = {picture.stem: picture for picture in pictures.draw(folder)}
  rows['results'] = folder / results.NAME
  for trial in engine.failed:
    run = next(r for r in trial.runs if r.why is not None)
    rows[f'trial {trial.number} failed'] = f'{run.why}; log: {run.log}'
  best = engine.best
  if best is not None:
    rows['best trial'] = f'{best.number}, {best.value:.4f}'
    rows['again'] = best.runs[0].command
  for key, value in rows.items():
    progress.say(f'{key:20}{os.fspath(value)}')
  if best is None:
    raise NothingFinishedError('no trial finished; the logs say why')
