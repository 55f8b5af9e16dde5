r"""Lists a workdir's checkpoints and verifies them, or shows what is in one.

  python -m experiments.checkpoints --workdir=runs/mine
  python -m experiments.checkpoints --workdir=runs/mine --step=best

Every file is read and compared with the checkpoint's manifest; nothing is put
on a device, executed or changed. Exit code 0: all verify; 1: one does not.
"""

from collections.abc import Sequence
import math
import os
import pathlib
import re
import time

from absl import flags

from experiments import command
from train import config as config_lib

FLAGS = flags.FlagValues()
flags.DEFINE_string('workdir', None, 'of the run', flag_values=FLAGS)
flags.DEFINE_string(
  'step',
  None,
  'latest, best, or a number: shows the arrays in it',
  flag_values=FLAGS,
)


class UnverifiedError(Exception):
  """A checkpoint is damaged."""

  exit_code = 1


def main(argv: Sequence[str]):
  """Parses the flags; prints a line a checkpoint, or one an array."""
  command.parse(FLAGS, argv, __doc__)
  if not FLAGS.workdir:
    raise config_lib.UserError('--workdir is missing; it takes a folder')
  if FLAGS.step is not None and not re.fullmatch(
    r'latest|best|[0-9]+', FLAGS.step
  ):
    raise config_lib.UserError(
      f'--step is {FLAGS.step!r}; it takes latest, best or a number'
    )
  from train import workdir as workdir_lib

  workdir = pathlib.Path(FLAGS.workdir)
  config = workdir_lib.read_config(workdir)
  command.quiet()
  from train import metrics
  from train import writer

  scores = writer.scores(workdir, config)
  folder = workdir / workdir_lib.CHECKPOINTS
  steps, aside = _names(folder)
  if not steps:
    raise config_lib.UserError(f'workdir {workdir} has no checkpoint yet')
  best = metrics.best_first(config.best_metric, scores, steps)
  if FLAGS.step is None:
    damaged = _list(folder, steps, scores, best[:1])
    for name in aside:
      print(f'set aside: {name}')
    if damaged:
      raise UnverifiedError(f'{damaged} of {len(steps)} do not verify')
    return
  named = {'latest': steps[-1:], 'best': best[:1]}
  step = next(iter(named.get(FLAGS.step, [FLAGS.step])), None)
  if str(step) not in map(str, steps):
    raise config_lib.UserError(
      f'--step is {FLAGS.step}, which is not saved; there are '
      f'{", ".join(map(str, steps))}'
    )
  _show(folder / f'{step}')


def _names(folder: pathlib.Path) -> tuple[list[int], list[str]]:
  """The steps that are saved, in order, and what was set aside."""
  names = os.listdir(folder) if folder.is_dir() else []
  steps = sorted(int(n) for n in names if re.fullmatch(r'0|[1-9][0-9]*', n))
  aside = sorted(n for n in names if re.fullmatch(r'\d+\.damaged(-\d+)?', n))
  return steps, aside


def _list(folder: pathlib.Path, steps, scores, best) -> int:
  """Prints a line for each step; returns how many do not verify."""
  from train import manifest

  print(f'{"step":>9} {"score":>11} {"MB":>10}  {"saved":19}  verified')
  damaged = 0
  for step in steps:
    size, verdict = '', 'yes'
    try:
      record = manifest.verify(folder / f'{step}')
      total = sum(file['bytes'] for file in record['files'].values())
      size = f'{total / 1e6:.2f}'
      for name in record['others']:
        verdict += f'; {name!r} lies there too'
    except manifest.DamagedError as error:
      damaged += 1
      verdict = f'no: {error}'
    score = f'{scores[step]:.6g}' if step in scores else ''
    star = '*' if step in best else ' '
    when = _when(folder / f'{step}')
    print(f'{step:9} {score:>10}{star} {size:>10}  {when:19}  {verdict}')
  return damaged


def _when(folder: pathlib.Path) -> str:
  try:
    seconds = os.lstat(folder).st_mtime
  except OSError:  # A run that is alive has removed it.
    return 'gone'
  return time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(seconds))


def _show(folder: pathlib.Path):
  """Prints the arrays of a checkpoint, and the versions that wrote it.

  Raises:
    UnverifiedError: it is damaged.
  """
  import numpy as np

  from train import manifest

  try:
    record = manifest.verify(folder)
  except manifest.DamagedError as error:
    raise UnverifiedError(f'checkpoint {folder}: {error}') from None
  width = max(map(len, record['arrays']))
  total = 0
  for path, entry in record['arrays'].items():
    shape = tuple(entry['shape'])
    size = math.prod(shape) * np.dtype(entry['dtype']).itemsize
    total += size
    print(f'{path:{width}}  {entry["dtype"]:9} {size:>13,}  {shape}')
  print(f'\n{len(record["arrays"])} arrays, {total:,} bytes; all verified')
  print(', '.join(f'{k} {v}' for k, v in record['versions'].items()))


if __name__ == '__main__':
  command.start('checkpoints', main)
