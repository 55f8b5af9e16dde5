r"""Trains a config: begins, or goes on where its workdir stopped.

  python -m experiments.launch --config=digits_cnn
  python -m experiments.launch --config=my_config.py --workdir=runs/mine \
      --config.optimizer.name=sgd --config.optimizer.momentum=0.9
  python -m experiments.launch --config=digits_cnn --summary

Several processes train together, each on its own devices: the same command on
every machine, started by Slurm, Kubernetes, a TPU pod or Open MPI, or by hand;
--processes tries it out on this machine. All see the same workdir.

  python -m experiments.launch --config=digits_cnn --coordinator=auto
  python -m experiments.launch --config=digits_cnn \
      --coordinator=10.0.0.1:1234 --num_processes=2 --process_id=0
  python -m experiments.launch --config=digits_cnn --processes=2

Exit codes: 0 finished, 2 your input is wrong, 75 stopped by SIGTERM and 130 by
Ctrl-C, both after saving or --stop_seconds, 74 finished but a save failed, 1
anything else, as a process of several that has gone.
"""

from collections.abc import Sequence
import pathlib

from absl import flags

from experiments import command
from train import config as config_lib
from train import processes
from train import progress
from train import signals

_NOT_BEGUN = 'stopped before training began; nothing to save'

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
flags.DEFINE_float(
  'stop_seconds',
  None,
  'ends so long after SIGTERM or Ctrl-C even where that is within a step, or '
  'saving: a little less than what kills the process allows; without it, when '
  'it has saved',
  lower_bound=0.1,
  flag_values=FLAGS,
)
flags.DEFINE_integer(
  'processes',
  None,
  'starts so many processes on this machine, which share its GPUs; on CPUs '
  'each has as many devices as JAX_NUM_CPU_DEVICES says',
  lower_bound=1,
  flag_values=FLAGS,
)
flags.DEFINE_string(
  'coordinator',
  None,
  'HOST:PORT at which process 0 of several listens; auto: as Slurm, '
  'Kubernetes, a TPU pod or Open MPI tells, with one GPU a process under '
  'Slurm and Open MPI unless JAX_LOCAL_DEVICE_IDS names more',
  flag_values=FLAGS,
)
flags.DEFINE_integer(
  'num_processes',
  None,
  'with --coordinator=HOST:PORT: how many processes there are',
  lower_bound=1,
  flag_values=FLAGS,
)
flags.DEFINE_integer(
  'process_id',
  None,
  'with --coordinator=HOST:PORT: which of them this is, from 0',
  lower_bound=0,
  flag_values=FLAGS,
)
flags.DEFINE_float(
  'process_timeout',
  300,
  'seconds that a process waits for the others, at the start and later',
  lower_bound=1,
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
  _check_processes()
  signals.end_within(FLAGS.stop_seconds)
  config, name, notes = command.load_config(FLAGS.config, overrides)
  if (FLAGS.processes or 1) > 1:
    from experiments import local

    local.launch(argv, FLAGS.processes)
    return
  with processes.joined(
    _place(),
    seconds=FLAGS.process_timeout,
    between=lambda: signals.check(_NOT_BEGUN),
  ):
    for note in notes:
      progress.say(note)
    train(config, name)


def _check_processes():
  """Raises UserError where the flags on processes do not go together."""
  by_hand = {
    name: FLAGS[name].value
    for name in ('coordinator', 'num_processes', 'process_id')
  }
  given = [f'--{name}' for name, value in by_hand.items() if value is not None]
  if FLAGS.processes is not None and given:
    raise config_lib.UserError(
      f'--processes starts processes here and {given[0]} is for those started '
      'elsewhere; give one of the two'
    )
  if FLAGS.coordinator == 'auto':
    if len(given) > 1:
      raise config_lib.UserError(
        f'--coordinator=auto finds out what {given[1]} says; leave that out'
      )
  elif given:
    missing = [f'--{name}' for name, v in by_hand.items() if v is None]
    if missing:
      raise config_lib.UserError(
        f'{missing[0]} is missing; {" and ".join(given)} '
        f'need{"s" if len(given) == 1 else ""} it'
      )
    processes.address(FLAGS.coordinator)
    if FLAGS.process_id >= FLAGS.num_processes:
      raise config_lib.UserError(
        f'--process_id is {FLAGS.process_id}; with --num_processes='
        f'{FLAGS.num_processes} it takes 0 to {FLAGS.num_processes - 1}'
      )


def _place() -> processes.Place | None:
  if FLAGS.coordinator is None:
    return None
  command.quiet()  # Before jax is imported.
  if FLAGS.coordinator == 'auto':
    return processes.detect()
  return processes.Place(
    FLAGS.coordinator, FLAGS.num_processes, FLAGS.process_id
  )


def train(config: config_lib.Config, name: str):
  """Trains a config whose file has that name, and shows what came out."""
  command.quiet()
  # Libraries are imported once the user's words are known to be right.
  import models
  from train import mesh as mesh_lib
  from train import optim
  from train import program as program_lib

  program = processes.agree(
    'program', lambda: program_lib.create(config, described=FLAGS.summary)
  )
  if FLAGS.summary:
    from experiments import summary

    if processes.is_main():
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
  if config.deterministic:
    progress.say(mesh_lib.determinism(program.mesh)[1])
  progress.say(f'workdir: {workdir}')
  final = loop.run(program, workdir)

  if not processes.is_main():
    return
  from experiments import figures

  figures.show(workdir, program, final)


if __name__ == '__main__':
  command.start('launch', main)
