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
    step = _step(FLAGS.step, checkpoints)
    stop_if_asked()
    state = checkpoints.restore(program, step)
  results = evaluate.evaluate(
    program, state, FLAGS.split, between=stop_if_asked
  )
  text = evaluate.to_json(FLAGS.split, step, results)
  print(text, end='')
  try:
    evaluate.write(workdir, FLAGS.split, step, results)
  except OSError as error:
    raise config_lib.UserError(
      f'the result could not be kept in {workdir}: {error}'
    ) from None


def _step(word: str, checkpoints) -> int:
  steps = checkpoints.steps()
  if not steps:
    raise config_lib.UserError('--workdir has no checkpoint yet')
  if word == 'latest':
    return steps[-1]
  if word == 'best':
    best = checkpoints.best_step()
    if best is None:
      raise config_lib.UserError('--step is best, but no step was evaluated')
    return best
  by_word = {str(step): step for step in steps}
  if word not in by_word:
    raise config_lib.UserError(
      f'--step is {word}; saved are {", ".join(by_word)}'
    )
  return by_word[word]


if __name__ == '__main__':
  command.start('evaluate', main)
