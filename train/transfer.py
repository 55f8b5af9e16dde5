"""Starting from the parameters of another run, or a file: config.init_from.

A model's last layer, its head, belongs to the classes it was trained on: where
the shapes differ it stays new. Everything else must fit, or be named in
config.init_new. A file, of another library's weights, is read as arrays and
never executed.
"""

from collections.abc import Callable
import dataclasses
import os
import pathlib
import re

import jax

from models import convert
from models.convert import files
from train import checkpoint
from train import config as config_lib
from train import paths
from train import program as program_lib
from train import state as state_lib
from train import workdir as workdir_lib
from train import writer

_HEAD = 'head/'


@dataclasses.dataclass(frozen=True)
class _Source:
  """Where parameters come from, and which.

  Attributes:
    workdir: of the other run.
    config: its own.
    word: which of its checkpoints: 'best', 'latest' or a number.
    params: path -> shape of each parameter that is taken.
    batch_stats: path -> shape of each running statistic that is taken.
    new: the paths of the parameters that are not.
  """

  workdir: pathlib.Path
  config: config_lib.Config
  word: str
  params: dict[paths.Path, jax.ShapeDtypeStruct]
  batch_stats: dict[paths.Path, jax.ShapeDtypeStruct]
  new: list[paths.Path]


def check(program: program_lib.Program):
  """Raises UserError if config.init_from cannot be used."""
  if program.config.init_from is None:
    return
  if _is_file(program.config.init_from):
    _read(program)
  else:
    _find(program)


def initial_state(
  program: program_lib.Program, say: Callable[[str], None]
) -> state_lib.TrainState:
  """The state before the first step, its parameters new or from init_from.

  Raises:
    UserError: config.init_from is no workdir with a checkpoint and no file of
      weights, or what is there does not fit this model.
  """
  if program.config.init_from is None:
    return program.init()
  if _is_file(program.config.init_from):
    params, batch_stats, report = _read(program)
    for line in str(report).splitlines():
      say(f'init_from: {line}')
    return program.init(params, batch_stats)
  source = _find(program)
  wanted = {
    _name(source.config): paths.unflatten(source.params),
    'batch_stats': paths.unflatten(source.batch_stats),
  }
  with _open(source.workdir, source.config, say) as checkpoints:
    try:
      restored, step = checkpoints.restore_part(source.word, wanted)
    except config_lib.UserError as error:
      raise config_lib.UserError(f'{_field(program.config)}: {error}') from None
  new = ', '.join(map(paths.spelled, source.new)) or 'none'
  say(
    f'init_from: {len(source.params)} parameters of {source.workdir}, step '
    f'{step}; new: {new}'
  )
  return program.init(restored[_name(source.config)], restored['batch_stats'])


def _name(config: config_lib.Config) -> str:
  """What the other run is evaluated with."""
  return 'params' if config.ema_decay is None else 'ema_params'


def _open(workdir, config, say) -> checkpoint.Checkpoints:
  scores = writer.scores(workdir, config)
  return checkpoint.Checkpoints(
    workdir, config, scores, say=say, read_only=True
  )


def _find(program: program_lib.Program) -> _Source:
  config = program.config
  found = re.fullmatch(r'(.*?)(?::(best|latest|\d+))?', config.init_from)
  workdir, word = pathlib.Path(found[1]).absolute(), found[2] or 'best'
  field = _field(config)
  try:
    source = workdir_lib.read_config(workdir)
  except config_lib.UserError as error:
    forms = ''
    if not workdir_lib.is_begun(workdir):
      forms = f'; a file of weights ends in {" or ".join(files.FILES)}'
    raise config_lib.UserError(f'{field}: {error}{forms}') from None
  if source.optimizer['name'].startswith('schedule_free'):
    raise config_lib.UserError(
      f'{field}, which {source.optimizer["name"]} trained: its parameters for '
      'evaluation are not in the checkpoint'
    )
  with _open(workdir, source, lambda line: None) as checkpoints:
    try:
      checkpoints.find(word)
    except config_lib.UserError as error:
      raise config_lib.UserError(f'{field}: {error}') from None
  try:
    theirs, their_stats = map(paths.flatten, program_lib.shapes(source))
  except (ValueError, TypeError, ZeroDivisionError, AttributeError) as error:
    raise config_lib.UserError(
      f'{field}, whose model cannot be made: {config_lib.first_line(error)}'
    ) from None
  ours, our_stats = map(paths.flatten, program_lib.shapes(config))
  paths.check_patterns('init_new', config.init_new, ours)
  new = _new(config, ours, theirs)
  taken = {path: ours[path] for path in ours if path not in new}
  stats = {
    path: our_stats[path]
    for path in our_stats
    if _fits(path, our_stats, their_stats) and not _is_new(config, path)
  }
  everywhere = jax.sharding.NamedSharding(
    program.mesh, jax.sharding.PartitionSpec()
  )

  def placed(leaves):
    return {
      path: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=everywhere)
      for path, s in leaves.items()
    }

  return _Source(workdir, source, word, placed(taken), placed(stats), new)


def _is_file(init_from: str) -> bool:
  suffix = pathlib.Path(init_from).suffix.lower()
  if suffix in files.FILES + files.PICKLES:
    return not os.path.isdir(init_from)
  return os.path.isfile(init_from)


def _read(program: program_lib.Program) -> tuple[dict, dict, convert.Report]:
  """The parameters and running statistics that are taken, and the report."""
  config = program.config
  ours, our_stats = map(paths.flatten, program_lib.shapes(config))
  paths.check_patterns('init_new', config.init_new, (*ours, *our_stats))
  skip = {p for p in (*ours, *our_stats) if _is_new(config, p)}
  try:
    values, report = convert.converted(
      program.model, config.init_from, skip=skip
    )
  except ValueError as error:
    raise config_lib.UserError(f'{_field(config)}: {error}') from None
  params, batch_stats = (
    {path: values[path] for path in part if path in values}
    for part in (ours, our_stats)
  )
  _new(config, ours, params)
  for path in our_stats:
    if path not in batch_stats and path not in skip:
      _refuse(config, path, our_stats, batch_stats)
  return paths.unflatten(params), paths.unflatten(batch_stats), report


def _new(config, ours, theirs) -> list[paths.Path]:
  """The paths of `ours` that are not taken from `theirs`.

  Raises:
    UserError: some of them are not to be new, or all of them are new.
  """
  new = [p for p in ours if _is_new(config, p) or not _fits(p, ours, theirs)]
  heads = [p for p in ours if _is_head(p)]
  if set(heads) & set(new):  # A head is one: its bias fits any inputs.
    new = [p for p in ours if p in new or p in heads]
  for path in new:
    if not _is_new(config, path) and not _is_head(path):
      _refuse(config, path, ours, theirs)
  if len(new) == len(ours):
    raise config_lib.UserError(f'{_field(config)}, of which nothing is taken')
  return new


def _refuse(config, path, ours, theirs):
  """Raises UserError for a path of `ours` that does not fit."""
  there = theirs[path].shape if path in theirs else 'not'
  raise config_lib.UserError(
    f'{_field(config)}, where {paths.spelled(path)} is {there}; here it is '
    f'{ours[path].shape}. Give the same model, or '
    f'--config.init_new={_pattern(path, ours, theirs)} to begin it anew'
  )


def _pattern(path, ours, theirs) -> str:
  """What picks this path: of its whole block, where theirs has none of it."""
  for end, part in enumerate(path, 1):
    block = paths.spelled(path[:end])
    for pattern in (block, f'{block}/') if str(part).isdigit() else ():
      picked = [p for p in ours if paths.matches(pattern, p)]
      if len(picked) > 1 and not any(p in theirs for p in picked):
        return pattern
  return paths.spelled(path)


def _field(config) -> str:
  return f'config.init_from is {config.init_from!r}'


def _is_new(config, path) -> bool:
  return any(paths.matches(p, path) for p in config.init_new)


def _is_head(path) -> bool:
  return paths.spelled(path).startswith(_HEAD)


def _fits(path, ours, theirs) -> bool:
  return path in theirs and theirs[path].shape == ours[path].shape
