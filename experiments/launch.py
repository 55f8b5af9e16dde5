r"""Trains a config: begins, or goes on where its workdir stopped.

  python -m experiments.launch --config=digits_cnn
  python -m experiments.launch --config=my_config.py --workdir=runs/mine \
      --config.optimizer.name=sgd --config.optimizer.momentum=0.9
  python -m experiments.launch --config=digits_cnn --summary

Exit codes: 0 finished, 2 your input is wrong, 75 stopped by SIGTERM and 130 by
Ctrl-C, both after saving, 74 finished but a save failed, 1 anything else.
"""

from collections.abc import Sequence
import pathlib

from absl import flags

from experiments import command
from train import config as config_lib
from train import progress

FLAGS = flags.FlagValues()
flags.DEFINE_string(
  'config',
  None,
  'a config file, or the bare name of one in experiments/configs',
  flag_values=FLAGS,
)
flags.DEFINE_string(
  'workdir',
  None,
  'where everything goes; by default runs/CONFIG-DIGEST, so that the same '
  'command resumes and a changed one starts anew',
  flag_values=FLAGS,
)
flags.DEFINE_bool(
  'summary',
  False,
  "show the model's layers, output shapes, parameters and FLOPs, and end",
  flag_values=FLAGS,
)


def main(argv: Sequence[str]):
  """Parses the flags, trains, and shows what came out."""
  overrides = command.parse(FLAGS, argv, __doc__)
  if FLAGS.config is None:
    from experiments import __main__ as overview

    raise config_lib.UserError(f'--config is missing\n\n{overview.text()}')
  if FLAGS.workdir == '':
    raise config_lib.UserError('--workdir is empty; it takes a folder')
  config, name, notes = command.load_config(FLAGS.config, overrides)
  for note in notes:
    progress.say(note)

  command.quiet()
  # Libraries are imported once the user's words are known to be right.
  import models
  from train import optim
  from train import program as program_lib

  program = program_lib.create(config)
  if FLAGS.summary:
    from experiments import summary

    summary.show(program)
    return
  from train import loop

  config = program.config
  workdir = pathlib.Path(
    FLAGS.workdir or f'runs/{name}-{config_lib.digest(config)}'
  )
  sizes = ', '.join(f'{len(s)} {k}' for k, s in program.dataset.splits.items())
  progress.say(f'{config.data.name}: {sizes}, batches of '
               f'{config.data.batch_size}')  # fmt: skip
  progress.say(
    f'{config.model["name"]}: '
    f'{models.count_parameters(program.model):,} parameters'
  )
  progress.say(
    optim.rates_at_quarters(
      program.schedule, config.total_steps, config.schedule['name']
    )
  )
  progress.say(f'workdir: {workdir}')
  final = loop.run(program, workdir)

  from experiments import figures

  figures.show(workdir, program, final)


if __name__ == '__main__':
  command.start('launch', main)
