"""A workdir's checkpoint, opened to read; shared by the commands that do."""

from __future__ import annotations

import pathlib
import re
import sys
import typing

from absl import flags

from train import config as config_lib
from train import signals

if typing.TYPE_CHECKING:  # It imports jax.
  from train import program as program_lib


def define(values: flags.FlagValues):
  """--workdir and --step."""
  flags.DEFINE_string('workdir', None, 'of the run', flag_values=values)
  flags.DEFINE_string(
    'step', 'latest', 'latest, best, or a number', flag_values=values
  )


def check(values: flags.FlagValues):
  """Raises UserError for words that cannot be, before anything is imported."""
  if not values.workdir:
    raise config_lib.UserError('--workdir is missing; it takes a folder')
  if not re.fullmatch(r'latest|best|[0-9]+', values.step):
    raise config_lib.UserError(
      f'--step is {values.step!r}; it takes latest, best or a number'
    )


def say(line: str):
  """To stderr: stdout is for the result."""
  print(line, file=sys.stderr)


def restore(workdir: pathlib.Path, program: program_lib.Program, word: str):
  """A state of the workdir's run, and that state's step.

  Args:
    workdir: of the run.
    program: of workdir.read_config(workdir).
    word: 'latest', 'best', or a step.

  Raises:
    UserError: there is no such checkpoint.
  """
  from train import checkpoint
  from train import writer

  workdir = workdir.absolute()  # Orbax takes no other.
  scores = writer.scores(workdir, program.config)
  with checkpoint.Checkpoints(
    workdir, program.config, scores, say=say, read_only=True
  ) as checkpoints:
    signals.check('stopped; no result was written')
    try:
      return checkpoints.restore_named(program, word)
    except config_lib.UserError as error:
      raise config_lib.UserError(f'--step is {word}: {error}') from None
