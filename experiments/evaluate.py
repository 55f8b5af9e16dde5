r"""Evaluates a checkpoint of a workdir; prints JSON.

  python -m experiments.evaluate --workdir=runs/mine --step=best --split=test

Config, data and normalization come from the workdir. Nothing in it is executed.
"""

from collections.abc import Sequence
import pathlib
import re
import sys

from absl import flags

from experiments import command
from train import config as config_lib
from train import signals

FLAGS = flags.FlagValues()
flags.DEFINE_string(
  'workdir', None, 'of the run to evaluate', flag_values=FLAGS
)
flags.DEFINE_string(
  'step', 'latest', 'latest, best, or a number', flag_values=FLAGS
)
flags.DEFINE_string(
  'split', 'test', 'train, validation or test', flag_values=FLAGS
)
flags.DEFINE_enum(
  'params',
  'ema',
  ['ema', 'raw'],
  'ema: what the run was evaluated with, the running mean where ema_decay is '
  'set; raw: the parameters as trained',
  flag_values=FLAGS,
)


def main(argv: Sequence[str]):
  """Parses the flags, evaluates, prints and keeps the result."""
  command.parse(FLAGS, argv, __doc__)
  if not FLAGS.workdir:
    raise config_lib.UserError('--workdir is missing; it takes a folder')
  workdir = pathlib.Path(FLAGS.workdir).absolute()
  if not re.fullmatch(r'latest|best|[0-9]+', FLAGS.step):
    raise config_lib.UserError(
      f'--step is {FLAGS.step!r}; it takes latest, best or a number'
    )
  from train import workdir as workdir_lib

  config = workdir_lib.read_config(workdir)
  command.quiet()
  from train import checkpoint
  from train import evaluate
  from train import program as program_lib
  from train import writer

  def say(line: str):
    print(line, file=sys.stderr)

  def stop_if_asked():
    signals.check('stopped; no result was written')

  program = program_lib.create(config, say=say)
  if FLAGS.split not in program.dataset.splits:
    raise config_lib.UserError(
      f'--split is {FLAGS.split!r}; this run has '
      f'{", ".join(program.dataset.splits)}'
    )
  scores = writer.scores(workdir, program.config)
  with checkpoint.Checkpoints(
    workdir, program.config, scores, say=say, read_only=True
  ) as checkpoints:
    try:
      step = checkpoints.find(FLAGS.step)
    except config_lib.UserError as error:
      raise config_lib.UserError(f'--step is {FLAGS.step}: {error}') from None
    stop_if_asked()
    state = checkpoints.restore(program, step)
  results = evaluate.evaluate(
    program, state, FLAGS.split, params=FLAGS.params, between=stop_if_asked
  )
  text = evaluate.to_json(FLAGS.split, step, results)
  print(text, end='')
  try:
    evaluate.write(workdir, FLAGS.split, step, results, params=FLAGS.params)
  except OSError as error:
    raise config_lib.UserError(
      f'the result could not be kept in {workdir}: {error}'
    ) from None


if __name__ == '__main__':
  command.start('evaluate', main)
