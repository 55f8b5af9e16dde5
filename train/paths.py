"""Parameters by path: patterns that pick some, and a tree taken apart by them.

A path is the names from the model down, as 'blocks/0/kernel'. A pattern is a
regular expression that must match from a path's start: 'blocks/0' picks all of
the first block (and of blocks/01), '.*bias' every bias.
"""

from collections.abc import Iterable
from collections.abc import Mapping
import re
from typing import Any

from flax import traverse_util

from train import config as config_lib

Path = tuple[Any, ...]


def flatten(tree: Mapping) -> dict[Path, Any]:
  """Path as a tuple -> leaf of a nested dict."""
  return traverse_util.flatten_dict(tree)


def unflatten(flat: Mapping[Path, Any]) -> dict:
  """Undoes `flatten`."""
  return traverse_util.unflatten_dict(flat)


def spelled(path: Path) -> str:
  """('blocks', 0, 'kernel') as 'blocks/0/kernel'."""
  return '/'.join(map(str, path))


def matches(pattern: str, path: Path) -> bool:
  """Whether the pattern picks this path."""
  return re.match(pattern, spelled(path)) is not None


def check_patterns(field: str, patterns: Iterable[str], paths: Iterable[Path]):
  """Raises UserError for a pattern of config.FIELD that picks none of `paths`.

  A slip in a pattern would otherwise train what was to be frozen.
  """
  paths = list(paths)
  for pattern in patterns:
    if not any(matches(pattern, path) for path in paths):
      raise config_lib.UserError(
        f'config.{field} has the pattern {pattern!r}, which matches no '
        f'parameter; there are {", ".join(map(spelled, paths[:20]))}'
        + (', ...' if len(paths) > 20 else '')
      )


def split(tree: Mapping, picked: Iterable[Path]) -> tuple[dict, dict]:
  """Two nested dicts: the leaves at the paths in `picked`, and the others."""
  flat = flatten(tree)
  ours = {path: flat.pop(path) for path in picked}
  return unflatten(ours), unflatten(flat)


def join(a: Mapping, b: Mapping) -> dict:
  """One nested dict of the leaves of both; undoes `split`."""
  return unflatten({**flatten(a), **flatten(b)})
