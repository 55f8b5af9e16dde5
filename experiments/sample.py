r"""Writes on from a prompt, with a character language model of a workdir.

  python -m experiments.sample --workdir=runs/shakespeare --prompt='ROMEO:'

Each next character is drawn from softmax(logits / temperature): below 1 it is
more often the likeliest, and 0 takes that one always. The same seed gives the
same text.
"""

from collections.abc import Sequence
import pathlib

from absl import flags

from experiments import command
from experiments import restore
from train import config as config_lib

FLAGS = flags.FlagValues()
restore.define(FLAGS)
flags.DEFINE_string('prompt', '\n', 'what comes before', flag_values=FLAGS)
flags.DEFINE_integer(
  'length', 500, 'characters to write', lower_bound=1, flag_values=FLAGS
)
flags.DEFINE_float(
  'temperature', 0.8, 'at least 0', lower_bound=0.0, flag_values=FLAGS
)
flags.DEFINE_integer(
  'seed', 0, 'of the draws', lower_bound=0, upper_bound=2**32 - 1,
  flag_values=FLAGS,
)  # fmt: skip


def main(argv: Sequence[str]):
  """Parses the flags and prints the prompt and what follows."""
  command.parse(FLAGS, argv, __doc__)
  restore.check(FLAGS)
  if not FLAGS.prompt:
    raise config_lib.UserError('--prompt is empty; it takes a text')
  from train import workdir as workdir_lib

  workdir = pathlib.Path(FLAGS.workdir).absolute()
  config = workdir_lib.read_config(workdir)
  command.quiet()
  import jax
  import numpy as np

  from models import sampling
  from train import program as program_lib
  from train.data import text

  program = program_lib.create(config, training=False, say=restore.say)
  vocabulary = program.dataset.vocabulary or ('none',)
  if config.task != 'token_classification' or max(map(len, vocabulary)) > 1:
    raise config_lib.UserError(
      f'--workdir is {FLAGS.workdir}, which did {config.task} on '
      f'{program.dataset.name}; a language model of a text is needed'
    )
  try:
    prompt = text.encode(FLAGS.prompt, vocabulary)
  except config_lib.UserError as error:
    raise config_lib.UserError(f'--prompt: {error}') from None
  state, _ = restore.restore(workdir, program, FLAGS.step)
  try:
    tokens = sampling.sample(
      program.merge(state),
      prompt[None].astype(np.int32),
      FLAGS.length,
      jax.random.key(FLAGS.seed),
      FLAGS.temperature,
    )
  except ValueError as error:  # As of a model that reads what comes after.
    raise config_lib.UserError(
      f'--workdir is {FLAGS.workdir}: {config_lib.first_line(error)}'
    ) from None
  written = ''.join(vocabulary[i] for i in np.asarray(tokens)[0])
  print(FLAGS.prompt + written)


if __name__ == '__main__':
  command.start('sample', main)
