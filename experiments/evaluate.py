r"""Evaluates a checkpoint of a workdir; prints JSON.

  python -m experiments.evaluate --workdir=runs/mine --step=best --split=test

Config, data and normalization come from the workdir. Nothing in it is executed.
"""

from collections.abc import Sequence
import pathlib

from absl import flags

from experiments import command
from experiments import restore
from train import config as config_lib
from train import signals

FLAGS = flags.FlagValues()
restore.define(FLAGS)
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
  restore.check(FLAGS)
  from train import workdir as workdir_lib

  workdir = pathlib.Path(FLAGS.workdir).absolute()
  config = workdir_lib.read_config(workdir)
  command.quiet()
  from train import evaluate
  from train import program as program_lib

  program = program_lib.create(config, training=False, say=restore.say)
  if FLAGS.split not in program.dataset.splits:
    raise config_lib.UserError(
      f'--split is {FLAGS.split!r}; this run has '
      f'{", ".join(program.dataset.splits)}'
    )
  state, step = restore.restore(workdir, program, FLAGS.step)
  results = evaluate.evaluate(
    program,
    state,
    FLAGS.split,
    params=FLAGS.params,
    between=lambda: signals.check('stopped; no result was written'),
  )
  text = evaluate.to_json(FLAGS.split, step, results)
  print(text, end='')
  evaluate.write(workdir, FLAGS.split, step, results, params=FLAGS.params)


if __name__ == '__main__':
  command.start('evaluate', main)
