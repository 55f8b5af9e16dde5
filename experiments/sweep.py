r"""Tries a config's points on every device at hand; shows which was best.

  python -m experiments.sweep --config=digits_mlp --search=grid
  python -m experiments.sweep --config=my_config.py --workdir=runs/sweep \
      --search=tpe --trials=100 --pruner=asha
  python -m experiments.sweep --config=digits_linear --folds=5

The config file's own sweep() says what is searched: a list of {path: value}, or
{path: ('choice', VALUE, ...) | ('int' | 'uniform' | 'log', LEAST, MOST)}, with
paths as those of --config.PATH. Each trial is an ordinary launch, whose command
is shown, bound to devices of its own. The same command goes on where a sweep
stopped. Without --search the config itself is the one point, for --seeds or
--folds.

Exit codes: as launch; 0 where a trial finished.
"""

from collections.abc import Sequence
import hashlib
import importlib.util
import json
import pathlib

from absl import flags

from experiments import command
from experiments.search import devices
from experiments.search import space as space_lib
from train import config as config_lib

FLAGS = flags.FlagValues()
flags.DEFINE_string(
  'config',
  None,
  'a config file with a sweep(), or the bare name of one',
  flag_values=FLAGS,
)
flags.DEFINE_string(
  'workdir',
  None,
  'where the sweep goes; by default runs/CONFIG-sweep-DIGEST',
  flag_values=FLAGS,
)
flags.DEFINE_enum(
  'search',
  None,
  ['grid', 'random', 'tpe', 'list'],
  "which points: grid all combinations, random and tpe as Optuna's samplers "
  'draw them, list those of a list',
  flag_values=FLAGS,
)
flags.DEFINE_integer(
  'trials',
  None,
  'how many are to finish; of a grid or a list all, unless this is less',
  lower_bound=1,
  flag_values=FLAGS,
)
flags.DEFINE_integer(
  'seeds',
  1,
  'trains each point with so many seeds; its value is their mean',
  lower_bound=1,
  flag_values=FLAGS,
)
flags.DEFINE_integer(
  'folds',
  None,
  'trains each point so often, each time with another part of the training '
  'data held out: cross-validation; its value is the mean',
  lower_bound=2,
  flag_values=FLAGS,
)
flags.DEFINE_integer(
  'devices_per_trial',
  1,
  'GPUs, TPU chips or, where there is neither, CPU cores of each run',
  lower_bound=1,
  flag_values=FLAGS,
)
flags.DEFINE_integer(
  'workers',
  None,
  'runs side by side; by default as many as there are devices for',
  lower_bound=1,
  flag_values=FLAGS,
)
flags.DEFINE_enum(
  'pruner',
  'none',
  ['none', 'asha'],
  'asha ends trials early that are worse than others were (Li et al. 2018)',
  flag_values=FLAGS,
)
flags.DEFINE_integer(
  'reduction_factor',
  4,
  'with asha: at each rung one of so many goes on',
  lower_bound=2,
  flag_values=FLAGS,
)
flags.DEFINE_integer(
  'min_evaluations',
  1,
  'with asha: evaluations before the first rung',
  lower_bound=1,
  flag_values=FLAGS,
)
flags.DEFINE_integer(
  'retries',
  2,
  'how often a run that fails is tried again',
  lower_bound=0,
  flag_values=FLAGS,
)
flags.DEFINE_integer(
  'search_seed',
  0,
  'of what random and tpe draw',
  lower_bound=0,
  flag_values=FLAGS,
)
flags.DEFINE_enum(
  'launcher',
  'local',
  ['local', 'ray'],
  'where runs are started: on this machine, or by Ray on a cluster whose '
  'machines share the workdir',
  flag_values=FLAGS,
)
flags.DEFINE_string(
  'ray_address',
  None,
  'HOST:PORT of a Ray cluster, or auto; without it Ray is started here',
  flag_values=FLAGS,
)


def main(argv: Sequence[str]):
  """Parses the flags, checks every point, runs the trials, shows the best."""
  overrides = command.parse(FLAGS, argv, __doc__)
  if FLAGS.config is None:
    from experiments import __main__ as overview

    raise config_lib.UserError(f'--config is missing\n\n{overview.text()}')
  for name in ('workdir', 'ray_address'):
    if FLAGS[name].value == '':
      raise config_lib.UserError(f'--{name} is empty')
  config, name, notes = command.load_config(FLAGS.config, overrides)
  fixed = dict(overrides)
  space = _space(fixed)
  points = _points(space)
  if FLAGS.launcher == 'local':
    if FLAGS.ray_address is not None:
      raise config_lib.UserError('--ray_address is for --launcher=ray')
    slots = devices.slots(FLAGS.devices_per_trial, FLAGS.workers)

  command.quiet()
  # Libraries are imported once the user's words are known to be right.
  import jax

  # This process only reads; the devices are the trials'.
  jax.config.update('jax_platforms', 'cpu')
  from experiments.search import checks
  from experiments.search import launchers
  from experiments.search import sweeps
  from train import metrics
  from train import progress

  for note in notes:
    progress.say(note)
  base, added = checks.check(
    config, space, points, folds=FLAGS.folds, fixed=fixed
  )
  if FLAGS.launcher == 'ray':
    if importlib.util.find_spec('ray') is None:
      raise config_lib.UserError(
        '--launcher is ray, which needs Ray; install it with python3 -m '
        'experiments.install ray'
      )
    from experiments.search import ray_launcher

    launcher = ray_launcher.connect(
      FLAGS.ray_address, FLAGS.devices_per_trial, FLAGS.workers
    )
  else:
    launcher = launchers.Local(slots)
  higher = metrics.higher_is_better(base.best_metric)
  sweep = {
    'config': name,
    'search': FLAGS.search,
    'metric': base.best_metric,
    'direction': 'maximize' if higher else 'minimize',
    'seeds': FLAGS.seeds,
    'folds': FLAGS.folds,
    'space': space.to_json(),
    'points': None if space.points is None else list(points),
    'search_seed': FLAGS.search_seed,
    'pruner': _pruner(),
    'base': json.loads(config_lib.to_json(base)),
  }
  digest = hashlib.sha256(json.dumps(sweep).encode()).hexdigest()[:8]
  folder = pathlib.Path(FLAGS.workdir or f'runs/{name}-sweep-{digest}')
  sweeps.run(
    folder,
    sweep,
    space,
    points,
    launcher,
    config=FLAGS.config,
    fixed=fixed | added,
    trials=FLAGS.trials,
    retries=FLAGS.retries,
    first_seed=base.seed,
  )


def _space(fixed: space_lib.Point) -> space_lib.Space:
  """What is searched, by the flags and the config's sweep()."""
  if FLAGS.search is None:
    if FLAGS.seeds == 1 and FLAGS.folds is None:
      raise config_lib.UserError(
        '--search is missing; it takes grid, random, tpe or list, and without '
        'it --seeds or --folds say what is repeated'
      )
    space = space_lib.Space(({},), None)
  else:
    space = space_lib.read(command.load_sweep(FLAGS.config), FLAGS.config)
  if (FLAGS.search == 'list') != (space.points is not None) and FLAGS.search:
    has = 'a list' if space.dimensions is None else 'paths with ranges'
    takes = 'list' if space.dimensions is None else 'grid, random, tpe'
    raise config_lib.UserError(
      f'--search is {FLAGS.search}; sweep() of {FLAGS.config!r} has {has}, for '
      f'which it takes {takes}'
    )
  repeated = {'seed': FLAGS.seeds > 1}
  repeated |= dict.fromkeys(
    ('data.folds', 'data.fold', 'data.validation_fraction'),
    FLAGS.folds is not None,
  )
  for path in space.paths:
    if path in fixed:
      raise config_lib.UserError(
        f'--config.{path} is {fixed[path]}, but sweep() of {FLAGS.config!r} '
        'searches it; leave one of them out'
      )
    if repeated.get(path):
      flag = 'seeds' if path == 'seed' else 'folds'
      raise config_lib.UserError(
        f'--{flag} is {FLAGS[flag].value}, but sweep() of {FLAGS.config!r} '
        f'searches {path}; leave one of them out'
      )
  return space


def _points(space: space_lib.Space) -> tuple[space_lib.Point, ...] | None:
  """The trials in order; None where they are drawn."""
  if FLAGS.search == 'grid':
    return space_lib.grid(space, FLAGS.config)
  if FLAGS.search in ('random', 'tpe') and FLAGS.trials is None:
    raise config_lib.UserError(
      f'--trials is missing; --search={FLAGS.search} goes on for ever without'
    )
  return space.points


def _pruner() -> list | None:
  if FLAGS.pruner == 'none':
    return None
  return ['asha', FLAGS.reduction_factor, FLAGS.min_evaluations]


if __name__ == '__main__':
  command.start('sweep', main)
