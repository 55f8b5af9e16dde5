"""Blocks: {'name': ..., **kwargs} looked up in a table and checked.

The one way from words in a config to a call of a library's function. Names
resolve through tables of public functions only, never through attributes.
"""

from collections.abc import Callable
from collections.abc import Mapping
import difflib
import functools
import inspect
import json
import types
import typing
from typing import Any

from train import config as config_lib


def lookup(field: str, name: str, table: Mapping[str, Any]) -> Any:
  """table[name], or a UserError that says what `field` takes."""
  if name in table:
    return table[name]
  close = difflib.get_close_matches(str(name), table, n=1)
  hint = f'did you mean {close[0]!r}? ' if close else ''
  raise config_lib.UserError(
    f'config.{field} is {name!r}; {hint}there are {", ".join(sorted(table))}'
  )


def arguments(function: Callable) -> dict[str, inspect.Parameter]:
  """The named arguments of a function or class, in order."""
  if inspect.isclass(function):  # nnx's metaclass hides them.
    function = functools.partial(function.__init__, None)
  kinds = (
    inspect.Parameter.POSITIONAL_OR_KEYWORD,
    inspect.Parameter.KEYWORD_ONLY,
  )
  return {
    name: parameter
    for name, parameter in inspect.signature(function).parameters.items()
    if parameter.kind in kinds
  }


def resolve(
  field: str,
  block: config_lib.Block,
  function: Callable,
  *,
  given: Mapping[str, Any] = {},  # noqa: B006
  supplied: tuple[str, ...] = (),
) -> config_lib.Block:
  """The block with every argument of `function` that JSON can hold.

  Args:
    field: the block's place in the config, for messages.
    block: {'name': ..., **kwargs} as the user gave it.
    function: what the name stands for.
    given: values for arguments that the block leaves out (an image's shape).
    supplied: arguments that the program passes itself (rngs).

  Raises:
    UserError: an argument that the function does not take, lacks, or whose
      value is of another kind than its default.
  """
  takes = {k: v for k, v in arguments(function).items() if k not in supplied}
  name = block['name']
  for key in block:
    if key != 'name' and key not in takes:
      close = difflib.get_close_matches(key, takes, n=1)
      hint = f'; did you mean {close[0]}?' if close else ''
      raise config_lib.UserError(
        f'config.{field}.{key} is no argument of {name}{hint or ";"} it takes '
        + (', '.join(takes) or 'none')
      )
  resolved = {'name': name}
  for key, parameter in takes.items():
    default = parameter.default
    if key in block:
      _check_kind(f'config.{field}.{key}', block[key], parameter)
      resolved[key] = _as_word(block[key], parameter)
    elif key in given:
      resolved[key] = given[key]
    elif default is inspect.Parameter.empty:
      raise config_lib.UserError(
        f'config.{field}.{key} is missing; {name} needs it '
        f'(--config.{field}.{key}=VALUE)'
      )
    elif _is_data(default):
      resolved[key] = config_lib.tuples(default)
  return resolved


def kwargs(block: config_lib.Block) -> dict[str, Any]:
  """The block's arguments, without its name."""
  return {key: value for key, value in block.items() if key != 'name'}


def spelled(block: config_lib.Block) -> str:
  """The block for messages: "name is 'sgd' (momentum=0.9)"."""
  listed = ', '.join(f'{k}={v!r}' for k, v in kwargs(block).items())
  return f'name is {block["name"]!r}' + (f' ({listed})' if listed else '')


def _as_word(value: Any, parameter: inspect.Parameter) -> Any:
  """'50' of 50 where a word is meant, as in --config.model.variant=50."""
  is_number = type(value) in (int, float)
  return str(value) if parameter.annotation is str and is_number else value


def _check_kind(name: str, value: Any, parameter: inspect.Parameter):
  """Refuses a value of another kind than the annotation or the default.

  Where neither says a kind, the function itself must judge.
  """
  annotation, default = parameter.annotation, parameter.default
  members = {annotation}
  if typing.get_origin(annotation) in (typing.Union, types.UnionType):
    members = set(typing.get_args(annotation))
  right = True
  if members & {str, Any}:
    return
  if value is None and (default is None or type(None) in members):
    return
  if members & {int, float}:
    words = 'a number' if float in members else 'a whole number'
    right = isinstance(value, (int, float) if float in members else int)
    right = right and not isinstance(value, bool)
  elif isinstance(default, bool):
    words, right = 'true or false', isinstance(value, bool)
  elif isinstance(default, int | float):
    words = 'a number'
    right = isinstance(value, int | float) and not isinstance(value, bool)
  elif isinstance(default, tuple):
    words, right = 'a tuple, as 64,128', isinstance(value, tuple)
  if not right:
    raise config_lib.UserError(f'{name} is {value!r}; it takes {words}')


def _is_data(value: Any) -> bool:
  try:
    return config_lib.tuples(json.loads(json.dumps(value))) == (
      config_lib.tuples(value)
    )
  except (TypeError, ValueError):
    return False
