"""sweep.json: what a sweep tried and what came of it, read and checked.

Its origin is not known: nothing in it is executed, and no path in it leads out
of the sweep's folder.
"""

from collections.abc import Mapping
import dataclasses
import json
import os
import pathlib
from typing import Any

from experiments.search import space as space_lib
from train import config as config_lib

NAME = 'sweep.json'
# Of a trial and of a run.
STATES = ('waiting', 'running', 'finished', 'pruned', 'failed')
# What the arithmetic of pictures can hold; no float32 is as large.
_LARGEST = 1e100
_ODD = (
  ValueError, LookupError, TypeError, AttributeError, RecursionError,
  OverflowError,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Run:
  """One of a trial's runs: of a seed, of a fold."""

  workdir: pathlib.Path
  state: str
  value: float | None
  step: int | None  # Of the evaluation whose value it is.


@dataclasses.dataclass(frozen=True)
class Trial:
  """One point of the search, and the mean over its runs."""

  number: int
  params: dict[str, Any]
  state: str
  value: float | None
  deviation: float | None
  place: int | None  # In the order of finishing, from 0.
  runs: tuple[Run, ...]


@dataclasses.dataclass(frozen=True)
class Sweep:
  """The trials, and what judges them. No space: the trials were listed."""

  folder: pathlib.Path
  metric: str
  maximize: bool
  space: dict[str, tuple] | None
  trials: tuple[Trial, ...]

  @property
  def best_first(self) -> list[Trial]:
    """The finished trials: the best first, of equals the earlier."""
    sign = -1 if self.maximize else 1
    return sorted(
      (t for t in self.trials if t.state == 'finished' and t.value is not None),
      key=lambda trial: (sign * trial.value, trial.number),
    )


def is_there(folder: str | os.PathLike) -> bool:
  """Whether `folder` is a sweep's."""
  return os.path.exists(os.path.join(folder, NAME))


def read(folder: pathlib.Path) -> Sweep:
  """The sweep in `folder`.

  Raises:
    UserError: there is none, or it is damaged.
  """
  file = folder / NAME
  try:
    found = config_lib.tuples(json.loads(file.read_text('utf-8')))
    return _sweep(folder, found)
  except OSError as error:
    raise config_lib.UserError(
      f'{folder} holds no sweep: {NAME}: {error.strerror}'
    ) from None
  except _ODD as error:
    raise config_lib.UserError(
      f'{file} is damaged: {config_lib.first_line(error)}'
    ) from None


def is_number(value: Any) -> bool:
  """Whether it is one that a picture can show; True and nan are none."""
  if isinstance(value, bool) or not isinstance(value, int | float):
    return False
  return abs(value) <= _LARGEST


def _sweep(folder: pathlib.Path, found: Any) -> Sweep:
  where = NAME
  direction = _take(found, 'direction', str, where)
  if direction not in ('maximize', 'minimize'):
    raise ValueError(f'{where} has the direction {direction!r}')
  space = _take(found, 'space', (Mapping, None), where)
  for name, words in (space or {}).items():
    if not _is_range(words):
      raise ValueError(f'{where} has {words!r:.60} for {name!r} in its space')
  return Sweep(
    folder,
    _take(found, 'metric', str, where),
    direction == 'maximize',
    space,
    tuple(
      _trial(folder, trial) for trial in _take(found, 'trials', tuple, where)
    ),
  )


def _is_range(words: Any) -> bool:
  """Whether it is as ('choice', ...), or as ('log', 0.1, 1)."""
  if (
    not isinstance(words, tuple) or not words or words[0] not in space_lib.KINDS
  ):
    return False
  kind, *bounds = words
  if kind == 'choice':
    return bool(bounds)
  if len(bounds) != 2 or not all(map(is_number, bounds)):
    return False
  return bounds[0] <= bounds[1] and (kind != 'log' or bounds[0] > 0)


def _trial(folder: pathlib.Path, found: Any) -> Trial:
  number = _take(found, 'trial', int, 'a trial')
  where = f'trial {number}'
  return Trial(
    number,
    _take(found, 'params', Mapping, where),
    _state(found, where),
    _take(found, 'value', (float, None), where),
    _take(found, 'deviation', (float, None), where),
    _take(found, 'place', (int, None), where),
    tuple(
      _run(folder, run, where) for run in _take(found, 'runs', tuple, where)
    ),
  )


def _run(folder: pathlib.Path, found: Any, where: str) -> Run:
  where = f'a run of {where}'
  name = _take(found, 'workdir', str, where)
  path = pathlib.PurePath(name)
  if path.is_absolute() or '..' in path.parts or not name.isprintable():
    raise ValueError(f'{where} has the workdir {name!r}, outside of the sweep')
  return Run(
    folder / path,
    _state(found, where),
    _take(found, 'value', (float, None), where),
    _take(found, 'step', (int, None), where),
  )


def _state(found: Any, where: str) -> str:
  state = _take(found, 'state', str, where)
  if state not in STATES:
    raise ValueError(f'{where} has the state {state!r}')
  return state


def _take(found: Any, key: str, kinds, where: str) -> Any:
  """found[key], of one of `kinds`; a whole number is a number, True is not."""
  kinds = kinds if isinstance(kinds, tuple) else (kinds,)
  if not isinstance(found, Mapping) or key not in found:
    raise ValueError(f'{where} has no {key}')
  value = found[key]
  if value is None and None in kinds:
    return None
  if float in kinds and type(value) is int:
    value = float(value)
  if isinstance(value, bool) or not isinstance(
    value, tuple(kind for kind in kinds if kind)
  ):
    raise ValueError(f'{where} has {key} {value!r:.60}')
  if isinstance(value, int | float) and not is_number(value):
    raise ValueError(f'{where} has {key} {value!r:.60}')
  return value
