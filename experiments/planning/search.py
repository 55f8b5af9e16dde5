"""The largest batch that fits, and the fastest mesh among those that fit."""

from collections.abc import Callable
from collections.abc import Iterator
import dataclasses

from experiments.planning import compiler as compiler_lib
from experiments.planning import cost
from experiments.planning import targets
from train import config as config_lib

# The batch is found to within this share of itself.
_GRAIN = 16
_MOST_TRIES = 24

Say = Callable[[str], None]


def batch(
  compiler: compiler_lib.Compiler, config: config_lib.Config
) -> Iterator[tuple[int, cost.Plan]]:
  """Batch sizes that are tried, with their plans; the largest that fits wins.

  Memory grows nearly in proportion: from two plans a third is guessed. Sizes
  are multiples of what the mesh and config.accumulate divide into, found to
  within a sixteenth of the largest power of two below.

  Raises:
    UserError: not even the smallest fits.
  """
  account = compiler.ask(_sized(compiler, config), compiled=False)
  step = account['mesh']['data'] * account['mesh']['fsdp'] * config.accumulate
  most = account['examples'] // step

  def tried(count):
    here = _with_batch(config, count * step)
    return count * step, cost.plan(compiler.target, compiler.ask(here))

  # (multiple, plan): the two largest that fit, the least that does not.
  before, low, high = None, None, None
  count = max(1, min(most, account['batch_size'] // step))
  for _ in range(_MOST_TRIES):
    size, plan = tried(count)
    yield size, plan
    if plan.fits:
      before, low = low, (count, plan)
    else:
      high = count, plan
    if low is None and count == 1:
      raise config_lib.UserError(
        f'--search_batch: not even batches of {size} fit on '
        f'{compiler.target.name}: {plan.over / 2**30:.2f} GiB a device are '
        'missing; config.mesh.fsdp, config.remat and config.accumulate save '
        'memory'
      )
    count = _next(before, low, high, most)
    if count is None:
      return


def _next(before, low, high, most: int) -> int | None:
  """The next multiple to try; None where it is found."""
  if high is None:
    if low[0] >= most:
      return None
    guess = _guess(before, low) if before else 0
    return min(most, max(2 * low[0], min(guess, 16 * low[0])))
  if low is None:
    return max(1, high[0] // 2)
  grain = max(1, 2 ** (low[0].bit_length() - 1) // _GRAIN)
  if high[0] - low[0] <= grain:
    return None
  # What was guessed too high or too low stays within, and moves.
  guess = _guess(low, high) // grain * grain
  return min(max(guess, low[0] + grain), high[0] - grain)


def _guess(one, other) -> int:
  """The multiple that just fits, on the line through two."""
  (a, first), (b, second) = one, other
  slope = (second.needed - first.needed) / (b - a)
  if slope <= 0:
    return 16 * b
  return a + int((first.available - first.needed) / slope)


def _sized(compiler, config):
  """The config with a batch that its mesh can share."""
  try:
    compiler.ask(config, compiled=False)
  except config_lib.UserError as error:
    if 'config.data.batch_size' not in str(error):
      raise
    return _with_batch(config, compiler.target.devices * config.accumulate)
  return config


def _with_batch(config, size):
  return config_lib.replace(config, 'data.batch_size', size)


def mesh(
  compiler: compiler_lib.Compiler, config: config_lib.Config
) -> Iterator[tuple[config_lib.Mesh, cost.Plan | str]]:
  """Every mesh of the target's devices with its plan, or why it cannot be.

  What has no room for its arguments alone is not compiled.
  """
  for data, fsdp, tensor in targets.meshes(compiler.target.devices):
    one = config_lib.Mesh(data=data, fsdp=fsdp, tensor=tensor)
    here = dataclasses.replace(config, mesh=one)
    try:
      account = compiler.ask(here, compiled=False)
      arguments = sum(account['bytes'].values())
      most = compiler.target.memory
      if compiler.target.platform == 'cpu':
        most /= compiler.target.devices
      if most and arguments > most:
        yield one, f'{arguments / 2**30:.2f} GiB of arguments alone'
        continue
      yield one, cost.plan(compiler.target, compiler.ask(here))
    except (config_lib.UserError, compiler_lib.CompileError) as error:
      yield one, str(error)


def fastest(
  plans: list[tuple[config_lib.Mesh, cost.Plan | str]],
) -> list[tuple[config_lib.Mesh, cost.Plan | str]]:
  """Those that fit, by their step; then those that do not; then the others."""

  def key(pair):
    _, plan = pair
    if isinstance(plan, str):
      return 2, 0
    return (0, plan.step) if plan.fits else (1, plan.over)

  return sorted(plans, key=key)
