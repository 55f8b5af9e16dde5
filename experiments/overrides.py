"""--config.PATH=VALUE: what a person types becomes a field of the config."""

import ast
from collections.abc import Mapping
from collections.abc import Sequence
import difflib
import json
import re
from typing import Any

from train import config as config_lib

# Of these a config has one, so giving one takes the other's place.
_INSTEAD = {'total_steps': 'total_epochs', 'total_epochs': 'total_steps'}


def literal(text: str) -> Any:
  """A Python literal; none, true, false, nan, inf in any case; or a string."""
  words = {'none': None, 'true': True, 'false': False}
  if text.lower() in words:
    return words[text.lower()]
  if re.fullmatch(r'[+-]?(nan|inf(inity)?)', text.lower()):
    return float(text)
  try:
    value = config_lib.tuples(ast.literal_eval(text))
    json.dumps(value)  # A set or bytes could not be kept in config.json.
  except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
    if re.fullmatch(r'[a-z]\w*(,[a-z]\w*)+,?|[a-z]\w*,', text):
      return tuple(word for word in text.split(',') if word)  # flip,pad_crop
    return text
  return value


def override(
  config: config_lib.Config, assignments: Sequence[tuple[str, str]]
) -> tuple[config_lib.Config, list[str]]:
  """Applies (path, literal) pairs; returns the config and lines on what fell.

  Naming another function in a block drops the arguments of the old one, and
  giving one of total_steps and total_epochs drops the other.
  """
  paths = config_lib.fields()
  notes = []
  names = [(p, v) for p, v in assignments if p.endswith('.name')]
  others = [(p, v) for p, v in assignments if not p.endswith('.name')]
  for path, text in (*names, *others):
    root, _, key = path.partition('.')
    value = literal(text)
    if path in paths:
      if path in config_lib.BLOCKS:
        raise config_lib.UserError(
          f'config.{path} is a block; set config.{path}.name or another of '
          'its arguments'
        )
      config = config_lib.replace(config, path, value)
      other = _INSTEAD.get(path)
      if other and other not in dict(assignments) and value is not None:
        config = config_lib.replace(config, other, None)
    elif root in config_lib.BLOCKS and key and '.' not in key:
      block = getattr(config, root)
      if key == 'name' and value != block.get('name'):
        dropped = ', '.join(f'{k}={v!r}' for k, v in block.items() if k != key)
        if dropped:
          notes.append(
            f'config.{root}: {block.get("name")} became {value}, which drops '
            + dropped
          )
        block = {}
      config = config_lib.replace(config, root, block | {key: value})
    else:
      raise config_lib.UserError(
        _unknown(f'config.{path}', f'config.{root}', paths, key)
      )
  return config, notes


def _unknown(name: str, root: str, paths: Mapping[str, Any], key: str) -> str:
  """'config.sed is not a field; did you mean config.seed?'"""
  known = [f'config.{p}' for p in paths]
  roots = {p.partition('.')[0] for p in paths}
  near = difflib.get_close_matches(root.removeprefix('config.'), roots, n=1)
  if key and near and root != f'config.{near[0]}':
    return f'{name} is not a field; did you mean config.{near[0]}.{key}?'
  path = name.removeprefix('config.')
  close = difflib.get_close_matches(path, paths, n=1)
  if close:
    return f'{name} is not a field; did you mean config.{close[0]}?'
  inside = [p for p in known if key and p.startswith(root + '.')]
  return f'{name} is not a field; there are {", ".join(inside or known)}'
