r"""Measures what the README claims; prints a JSON line a case.

  python -m experiments.benchmark --suite=startup    # about 3 minutes
  python -m experiments.benchmark --suite=results    # about 5 minutes
  python -m experiments.benchmark --suite=results --configs=mnist_mlp --seeds=3
  python -m experiments.benchmark --suite=loop       # about 10 minutes
  python -m experiments.benchmark --suite=augment    # about 5 minutes
  python -m experiments.benchmark --suite=data       # about 2 minutes
  python -m experiments.benchmark --suite=models     # about 6 minutes
  python -m experiments.benchmark --suite=models --cases=mlp,lstm --rounds=5
  python -m experiments.benchmark --suite=compile    # about 1 minute
  python -m experiments.benchmark --suite=meshes     # about 20 minutes
  python -m experiments.benchmark --suite=checkpoints   # about 1 minute
  python -m experiments.benchmark --suite=memory     # about 2 minutes
  python -m experiments.benchmark --suite=plan       # about 3 minutes
  python -m experiments.benchmark --suite=scaling    # about 30 minutes, libtpu

startup: seconds from the command to --help and to the first step.
results: configs over several seeds, by default all whose data needs no
download, and scikit-learn's estimators on the same split.
loop: steps a second of the whole loop against a hand-written jitted step of the
same model, optimizer and metrics on one batch that lies on the device: rounds
of the two in turn, and the median of the rounds' ratios.
augment: a training step with each augmentation against one with none.
data: preparing MNIST from its original files, opening its cache, reading it.
models: a training step of each family through the loop against the same network
in PyTorch, eager and compiled, where that is installed; rounds of them in turn,
and the share of this machine's fastest matrix product that each reaches (MFU).
meshes: on meshes of eight CPU devices, how far the losses of 20 steps are from
one device's; a device's memory with and without fsdp; a step with a mesh of one
device against one without a mesh.
checkpoints: CPU and wall seconds of a save and of a restore, with digests and
verified against Orbax alone, in turn.
plan: what experiments.plan predicts of memory and of steps on this CPU, after
one calibration, against what is measured.
scaling: plans of four models on 4 to 256 chips of v5e; goes on where
experiments/results/scaling.json ends.
memory: resident memory and open files of a run of 100,000 steps, at each tenth.
sweeps: the share of time in which 4 workers of a sweep of 16 trials train.
compile: seconds until a deep ViT's first step, blocks scanned and unrolled.
"""

from collections.abc import Sequence
import importlib.metadata
import os
import pathlib
import platform

from absl import flags

from experiments import command
from train import config as config_lib

SUITES = (
  'startup',
  'results',
  'loop',
  'augment',
  'data',
  'models',
  'compile',
  'meshes',
  'checkpoints',
  'memory',
  'sweeps',
  'plan',
  'scaling',
)

FLAGS = flags.FlagValues()
flags.DEFINE_enum('suite', None, SUITES, 'what to measure', flag_values=FLAGS)
flags.DEFINE_integer(
  'rounds',
  9,
  'rounds of loop, augment, models, meshes, checkpoints, plan',
  lower_bound=1,
  flag_values=FLAGS,
)
flags.DEFINE_integer(
  'seeds', 5, 'seeds of results', lower_bound=1, flag_values=FLAGS
)
flags.DEFINE_list(
  'configs', [], 'configs of results and loop', flag_values=FLAGS
)
flags.DEFINE_integer(
  'steps', 100_000, 'steps of memory', lower_bound=10, flag_values=FLAGS
)
flags.DEFINE_list(
  'cases', [], 'cases of models, meshes, plan, scaling', flag_values=FLAGS
)


def main(argv: Sequence[str]):
  """Parses the flags and runs one suite."""
  command.parse(FLAGS, argv, __doc__)
  if FLAGS.suite is None:
    raise config_lib.UserError(
      f'--suite is missing; it takes {", ".join(SUITES)}'
    )
  for name in FLAGS.configs:
    command.load_config(name, [])
  command.quiet()
  print(conditions(), flush=True)
  if FLAGS.suite == 'startup':
    from experiments.benchmarks import startup

    startup.main()
  elif FLAGS.suite == 'results':
    from experiments.benchmarks import results

    results.main(FLAGS.configs, FLAGS.seeds)
  elif FLAGS.suite == 'loop':
    from experiments.benchmarks import loop

    loop.main(FLAGS.configs, FLAGS.rounds)
  elif FLAGS.suite == 'augment':
    from experiments.benchmarks import augment

    augment.main(FLAGS.rounds)
  elif FLAGS.suite == 'models':
    from experiments.benchmarks import models

    models.main(FLAGS.cases, FLAGS.rounds)
  elif FLAGS.suite == 'meshes':
    from experiments.benchmarks import meshes

    meshes.main(FLAGS.cases, FLAGS.rounds)
  elif FLAGS.suite == 'checkpoints':
    from experiments.benchmarks import checkpoints

    checkpoints.main(FLAGS.rounds)
  elif FLAGS.suite == 'memory':
    from experiments.benchmarks import memory

    memory.main(FLAGS.steps)
  elif FLAGS.suite == 'sweeps':
    from experiments.benchmarks import sweeps

    sweeps.main()
  elif FLAGS.suite == 'plan':
    from experiments.benchmarks import plan

    plan.main(FLAGS.cases, FLAGS.rounds)
  elif FLAGS.suite == 'scaling':
    from experiments.benchmarks import scaling

    scaling.main(FLAGS.cases)
  elif FLAGS.suite == 'compile':
    from experiments.benchmarks import compile as compile_suite

    compile_suite.main()
  else:
    from experiments.benchmarks import data

    data.main()


def conditions() -> str:
  """One line: processor, cores, versions."""
  versions = ', '.join(
    f'{name} {importlib.metadata.version(name)}'
    for name in ('jax', 'flax', 'optax')
  )
  cores = len(os.sched_getaffinity(0))
  return (
    f'{_processor()}, {cores} cores, Python {platform.python_version()}, '
    f'{versions}'
  )


def _processor() -> str:
  try:
    text = pathlib.Path('/proc/cpuinfo').read_text()
    return text.split('model name\t: ')[1].partition('\n')[0]
  except (OSError, IndexError):
    return platform.processor() or platform.machine()


if __name__ == '__main__':
  command.start('benchmark', main)
