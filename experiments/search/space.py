"""A config's sweep(): what its trials may set, and the points that makes.

A point is {path: text}, the words of `--config.PATH=TEXT`, so that a trial is
an ordinary launch.
"""

from collections.abc import Mapping
import dataclasses
import itertools
import math
from typing import Any

from experiments import overrides
from train import config as config_lib

Point = dict[str, str]

KINDS = {
  'choice': "('choice', VALUE, ...)",
  'int': "('int', LEAST, MOST)",
  'uniform': "('uniform', LEAST, MOST)",
  'log': "('log', LEAST, MOST)",
}
_MOST_PROBES = 64


@dataclasses.dataclass(frozen=True)
class Dimension:
  """What one path may be.

  Attributes:
    kind: choice, int, uniform or log.
    values: the choices' texts; or the least and the most, both included.
  """

  kind: str
  values: tuple

  def ends(self) -> tuple[str, ...]:
    """All choices, or the least and the most."""
    return tuple(v if self.kind == 'choice' else repr(v) for v in self.values)


@dataclasses.dataclass(frozen=True)
class Space:
  """A list of points, or dimensions to search in; one of the two is None."""

  points: tuple[Point, ...] | None
  dimensions: dict[str, Dimension] | None

  @property
  def paths(self) -> tuple[str, ...]:
    """What trials set, in order."""
    if self.points is None:
      return tuple(self.dimensions)
    return tuple(dict.fromkeys(path for p in self.points for path in p))

  def to_json(self) -> dict[str, list] | None:
    """{path: [kind, value, ...]}, or None for a list."""
    if self.dimensions is None:
      return None
    found = {}
    for path, dimension in self.dimensions.items():
      values = dimension.values
      if dimension.kind == 'choice':
        values = map(parse, values)
      found[path] = [dimension.kind, *values]
    return found


def text(value: Any) -> str:
  """What --config.PATH= takes for this value.

  Raises:
    ValueError: a config cannot hold it.
  """
  value = config_lib.tuples(value)
  words = {None: 'none', True: 'true', False: 'false'}
  if value is None or isinstance(value, bool):
    return words[value]
  for written in (value if isinstance(value, str) else '', repr(value)):
    if written and parse(written) == value:
      return written
  raise ValueError


parse = overrides.literal


def read(found: Any, name: str) -> Space:
  """What a config file's sweep() returned.

  Args:
    found: it.
    name: of the config, for messages.

  Raises:
    UserError: it is no space, empty, or contradicts itself.
  """
  where = f'--config is {name!r}, whose sweep()'
  if not isinstance(found, Mapping | list | tuple):
    raise config_lib.UserError(
      f'{where} returns {type(found).__name__}; it takes a list of '
      '{path: value}, or {path: '
      f'{" or ".join(KINDS.values())}}}'
    )
  if not found:
    raise config_lib.UserError(f'{where} is empty; it must have a point')
  if isinstance(found, Mapping):
    for path in found:
      _check_path(path, where)
    dimensions = {p: _dimension(p, v, where) for p, v in found.items()}
    return Space(None, dimensions)
  points = tuple(_point(point, where) for point in found)
  for i, point in enumerate(points):
    if point in points[:i]:
      raise config_lib.UserError(
        f'{where} has {found[i]} twice; each point is tried once, --seeds=N '
        'tries it with N seeds'
      )
  return Space(points, None)


def _check_path(path: Any, where: str):
  if not isinstance(path, str) or path.startswith('config.'):
    raise config_lib.UserError(
      f'{where} has the path {path!r}; it takes what follows --config., as '
      "'data.batch_size'"
    )


def _point(point: Any, where: str) -> Point:
  if not isinstance(point, Mapping):
    raise config_lib.UserError(
      f'{where} has {point!r} in its list; a point is {{path: value}}'
    )
  texts = {}
  for path, value in point.items():
    _check_path(path, where)
    texts[path] = _text(path, value, where)
  return texts


def _text(path: str, value: Any, where: str) -> str:
  try:
    return text(value)
  except (ValueError, TypeError):
    raise config_lib.UserError(
      f'{where} has {path}={value!r}; it takes numbers, words, tuples, none'
    ) from None


def _dimension(path: str, given: Any, where: str) -> Dimension:
  """One dimension; raises UserError where it can hold nothing."""

  def require(holds: bool, allowed: str):
    if not holds:
      raise config_lib.UserError(f'{where} has {path}={given!r}; {allowed}')

  require(
    isinstance(given, list | tuple) and len(given) > 0
    and isinstance(given[0], str) and given[0] in KINDS,
    f'it takes {" or ".join(KINDS.values())}',
  )  # fmt: skip
  kind, *values = given
  if kind == 'choice':
    require(bool(values), 'it must have a choice')
    texts = tuple(_text(path, value, where) for value in values)
    require(len(set(texts)) == len(texts), 'it has the same choice twice')
    return Dimension(kind, texts)
  require(len(values) == 2, f'it takes {KINDS[kind]}')
  numbers = (int,) if kind == 'int' else (int, float)
  require(
    all(type(v) in numbers and math.isfinite(v) for v in values),
    f'it takes two {"whole " if kind == "int" else ""}numbers',
  )
  least, most = values if kind == 'int' else map(float, values)
  require(least < most, 'the first must be below the second')
  require(kind != 'log' or least > 0, 'both must be above 0')
  return Dimension(kind, (least, most))


def grid(space: Space, name: str) -> tuple[Point, ...]:
  """Every combination, the last path running fastest.

  Raises:
    UserError: a dimension without steps.
  """
  axes = []
  for path, dimension in space.dimensions.items():
    if dimension.kind in ('uniform', 'log'):
      raise config_lib.UserError(
        f'--search is grid, but sweep() of {name!r} has {path} as '
        f'{dimension.kind!r}, which has no steps; give choices, or '
        '--search=random'
      )
    if dimension.kind == 'int':
      least, most = dimension.values
      axes.append([str(value) for value in range(least, most + 1)])
    else:
      axes.append(dimension.values)
  return tuple(
    dict(zip(space.dimensions, values, strict=True))
    for values in itertools.product(*axes)
  )


def probes(space: Space) -> list[Point]:
  """Points that show whether each path can be set, and to its ends.

  All combinations of the ends where they are few; else each end with the
  others at their first.
  """
  if space.points is not None:
    return list(space.points)
  ends = {path: d.ends() for path, d in space.dimensions.items()}
  if math.prod(map(len, ends.values())) <= _MOST_PROBES:
    return [
      dict(zip(ends, values, strict=True))
      for values in itertools.product(*ends.values())
    ]
  first = {path: values[0] for path, values in ends.items()}
  return [first] + [
    first | {path: value} for path, values in ends.items() for value in values
  ]


def words(point: Mapping[str, str]) -> list[str]:
  """The point on a command line."""
  return [f'--config.{path}={value}' for path, value in point.items()]
