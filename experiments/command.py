"""The command line shared by all commands: flags, configs, exit codes.

Flags are absl's. `--config.PATH=VALUE` sets a field of the config, or an
argument of its model, optimizer or schedule.
"""

import ast
from collections.abc import Callable
from collections.abc import Sequence
import importlib.util
import inspect
import logging
import math
import os
import pathlib
import sys
import types
from typing import Any

from absl import flags

from experiments import overrides as overrides_lib
from train import check
from train import config as config_lib
from train import signals

CONFIGS = pathlib.Path(__file__).parent / 'configs'

Overrides = list[tuple[str, str]]


class Help(Exception):  # noqa: N818 - a request, not an error
  """--help was given."""


def run(
  name: str, main: Callable[[Sequence[str]], None], argv: Sequence[str]
) -> int:
  """Calls main(argv) and returns the exit code.

  An error that knows its exit code is one line for the user; any other is a
  defect of ours and keeps its traceback.
  """
  try:
    with signals.listen():
      main(argv)
  except Help as help_:
    print(help_)
  except KeyboardInterrupt:
    print(f'{name}: stopped', file=sys.stderr)
    return 130
  except Exception as error:
    if not hasattr(error, 'exit_code'):
      raise
    print(f'{name}: {error}', file=sys.stderr)
    return error.exit_code
  return 0


def start(name: str, main: Callable[[Sequence[str]], None]):
  """Runs main as this process's command, and ends the process."""
  with signals.listen(until_exit=True):
    code = run(name, main, sys.argv[1:])
  sys.exit(code)


def python() -> str:
  """This interpreter, as a person would type it here."""
  path = os.path.relpath(sys.executable)
  return 'python' if path.startswith(os.pardir) else path


def quiet():
  """Libraries say only what went wrong; call before they are imported."""
  from absl import logging as absl_logging

  absl_logging.set_verbosity(absl_logging.ERROR)
  # Orbax's are tracebacks of errors that we have a line for.
  absl_logging.get_absl_logger().addFilter(
    lambda record: 'orbax' not in pathlib.Path(record.pathname).parts
  )

  logging.getLogger('asyncio').setLevel(logging.CRITICAL)  # Orbax's alone.

  def unraisable(raised):  # Of a save that failed, after that was said.
    if str(raised.exc_value) != 'Event loop is closed':
      sys.__unraisablehook__(raised)

  sys.unraisablehook = unraisable
  for name in ('jax', 'matplotlib'):  # It warns of a home that is read-only.
    logging.getLogger(name).setLevel(logging.ERROR)


# -------------------------------------------------------------------- flags


def parse(
  flag_values: flags.FlagValues, argv: Sequence[str], usage: str
) -> Overrides:
  """Parses argv (without the program) into `flag_values`.

  Returns:
    The (path, text) of each --config.PATH=TEXT.

  Raises:
    UserError: an unknown flag, a stray word, a value that does not fit.
    Help: --help was given.
  """
  overrides, rest = [], []
  for word in argv:
    if word in ('-h', '-help', '--help', '--helpfull', '--helpshort'):
      raise Help(_help(flag_values, usage))
    path = word.lstrip('-')
    if word.startswith('-') and path.startswith('config.'):
      path, equals, text = path.partition('=')
      if not equals:
        raise config_lib.UserError(f'{word} has no value; write --{path}=VALUE')
      overrides.append((path.removeprefix('config.'), text))
    elif path.partition('=')[0] in ('flagfile', 'undefok'):  # absl's own.
      raise config_lib.UserError(f'{word} is no flag of this command')
    else:
      rest.append(word)
  if overrides and 'config' not in flag_values:
    raise config_lib.UserError(
      f'--config.{overrides[0][0]}: this command takes its config from the '
      'workdir'
    )
  try:
    flag_values.unparse_flags()
    stray = flag_values(['command', *rest])[1:]
  except flags.Error as error:
    message = str(error).replace('\n', ' ')
    known = ', '.join(f'--{name}' for name in sorted(flag_values))
    raise config_lib.UserError(f'{message} There are {known}') from None
  for name in flag_values:
    value = flag_values[name].value
    if isinstance(value, float) and not math.isfinite(value):
      raise config_lib.UserError(f'--{name} is {value}; it takes a number')
  if stray:
    raise config_lib.UserError(
      f'{stray[0]!r} is no flag; flags are --NAME=VALUE'
    )
  return overrides


def _help(flag_values: flags.FlagValues, usage: str) -> str:
  lines = [usage.strip(), '', 'flags:']
  for name in sorted(flag_values):
    flag = flag_values[name]
    default = '' if flag.default is None else f' (default {flag.default})'
    lines.append(f'  --{name}: {flag.help}{default}')
  if 'config' in flag_values:
    lines += ['', 'config fields, and their defaults:']
    default = config_lib.Config()
    lines += [
      f'  --config.{path}={config_lib.get(default, path)}'
      for path in config_lib.fields()
      if path not in config_lib.BLOCKS
    ]
    lines += [
      f'  --config.{path}.name=NAME, and any argument of NAME'
      for path in config_lib.BLOCKS
    ]
  return '\n'.join(lines)


# ------------------------------------------------------------------ configs


def config_names() -> dict[str, str]:
  """The bare names of the configs here, with their docstrings' first lines."""
  return _first_lines(CONFIGS)


def command_names() -> dict[str, str]:
  """The commands, with their docstrings' first lines; nothing is executed."""
  folder = CONFIGS.parent
  return {
    name: line
    for name, line in _first_lines(folder).items()
    if '\nif __name__ ==' in (folder / f'{name}.py').read_text('utf-8')
  }


def _first_lines(folder: pathlib.Path) -> dict[str, str]:
  found = {}
  for file in sorted(folder.glob('[a-z]*.py')):
    doc = ast.get_docstring(ast.parse(file.read_bytes())) or ''
    found[file.stem] = doc.partition('\n')[0]
  return found


def load_sweep(name: str) -> Any:
  """What a config file's sweep() returns; with ':ARG' it may take that.

  Raises:
    UserError: no such file, it has no sweep(), or that fails.
  """
  module, _, argument = _load(name)
  if not callable(getattr(module, 'sweep', None)):
    raise config_lib.UserError(
      f'--config is {name!r}, which has no sweep() that says what to search'
    )
  takes = inspect.signature(module.sweep).parameters
  return _call(name, lambda: module.sweep(*(argument if takes else ())))


def load_config(
  name: str, overrides: Overrides
) -> tuple[config_lib.Config, str, list[str]]:
  """Runs a config file's get_config() and applies the overrides.

  Args:
    name: a file, or the bare name of one in experiments/configs; ':ARG' after
      it is passed to get_config.
    overrides: from `parse`.

  Returns:
    The config, checked; the file's bare name; lines on what overrides dropped.

  Raises:
    UserError: no such file, it fails, or a field cannot be set so.
  """
  module, file, argument = _load(name)
  config = _call(name, lambda: module.get_config(*argument))
  if not isinstance(config, config_lib.Config):
    raise config_lib.UserError(
      f'--config is {name!r}, whose get_config() returns '
      f'{type(config).__name__} and not train.config.Config'
    )
  config, notes = overrides_lib.override(config, overrides)
  return check.check(config), file.stem, notes


def _load(name: str) -> tuple[types.ModuleType, pathlib.Path, tuple[str, ...]]:
  """The module of a config, its file, and what follows ':' in the name."""
  name, _, argument = name.partition(':')
  try:
    files = [pathlib.Path(name), CONFIGS / f'{name}.py']
    file = next((file for file in files if file.is_file()), None)
  except (OSError, ValueError):  # Longer than a name can be, or a NUL in it.
    file = None
  if file is None:
    raise config_lib.UserError(
      f'--config is {name!r}, which is no file; there are '
      f'{", ".join(config_names())}'
    )
  if file.suffix != '.py':
    raise config_lib.UserError(f'--config is {name!r}, which is no .py file')
  spec = importlib.util.spec_from_file_location(file.stem, file)
  module = importlib.util.module_from_spec(spec)
  _call(name, lambda: spec.loader.exec_module(module))
  return module, file, (argument,) if argument else ()


def _call(name: str, function: Callable[[], Any]) -> Any:
  """Calls what a config file defines; UserError where that fails."""
  try:
    return function()
  except config_lib.UserError:
    raise
  except (Exception, SystemExit) as error:  # The file is the user's.
    raise config_lib.UserError(
      f'--config is {name!r}, which fails: {type(error).__name__}: '
      f'{config_lib.first_line(error)}'
    ) from None
