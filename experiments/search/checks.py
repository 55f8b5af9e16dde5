"""Whether the points of a sweep can be, before anything is started."""

from collections.abc import Sequence

from experiments import overrides
from experiments.search import space as space_lib
from train import config as config_lib
from train import program
from train import progress
from train.data import sources

_HELD_OUT = '0.2'


def check(
  config: config_lib.Config,
  space: space_lib.Space,
  points: Sequence[space_lib.Point] | None,
  *,
  folds: int | None,
  fixed: space_lib.Point,
) -> tuple[config_lib.Config, space_lib.Point]:
  """Tries each point, or the ends of the space, as far as needs no device.

  Args:
    config: with the command line's overrides.
    space: what is searched.
    points: the trials in order; None where they are drawn.
    folds: of a cross-validation, or None.
    fixed: what the command line sets.

  Returns:
    The config in full, and what is to be set besides: a validation part, where
    evaluations would be over the test split.

  Raises:
    UserError: the first point that cannot be.
  """
  added, where = {}, 'data.validation_fraction'
  if folds is not None:
    fold = {'data.folds': str(folds), 'data.fold': '0'}
    base = _resolved(config, fold)[0]
  else:
    fold = {}
    base, dataset = _resolved(config, {})
    if 'validation' not in dataset.splits and where not in {
      *space.paths,
      *fixed,
    }:
      added = {where: _HELD_OUT}
      progress.say(
        f'{config.data.name} has no validation part, and a sweep does not '
        f'choose by test: each trial has --config.{where}={_HELD_OUT}'
      )
      base = _resolved(config, added)[0]
  for point in space_lib.probes(space) if points is None else points:
    metric = _check_point(config, added | fold, point)
    if metric != base.best_metric:
      raise config_lib.UserError(
        f'sweep() at {_shown(point)}: it is judged by {metric}, and the config '
        f'itself by {base.best_metric}; set config.best_metric'
      )
  return base, added


def _check_point(config, added: space_lib.Point, point: space_lib.Point) -> str:
  """The metric that judges it; raises UserError where it cannot be."""
  try:
    resolved, dataset = _resolved(config, added | point)
  except config_lib.UserError as error:
    raise config_lib.UserError(f'sweep() at {_shown(point)}: {error}') from None
  if 'validation' not in dataset.splits:
    raise config_lib.UserError(
      f'sweep() at {_shown(point)}: config.data.validation_fraction is 0, so '
      'that it would be judged by test; hold a part out'
    )
  return resolved.best_metric


def _resolved(
  config: config_lib.Config, point: space_lib.Point
) -> tuple[config_lib.Config, sources.Dataset]:
  changed, _ = overrides.override(config, list(point.items()))
  return program.resolved(changed)[:2]


def _shown(point: space_lib.Point) -> str:
  return ', '.join(f'{p}={v}' for p, v in point.items()) or 'its one point'
