"""Optax's optimizers and schedules by their own names and arguments."""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

from train import blocks
from train import config as config_lib


def _public_functions(*modules) -> dict[str, Any]:
  return {
    name: value
    for module in modules
    for name, value in vars(module).items()
    if inspect.isfunction(value) and not name.startswith('_')
  }


def _returns(function, words: str) -> bool:
  annotation = inspect.signature(function).return_annotation
  return words in str(getattr(annotation, '__name__', annotation))


# A function of Optax that takes a learning rate and returns a transformation.
OPTIMIZERS = {
  name: function
  for name, function in _public_functions(optax, optax.contrib).items()
  if 'learning_rate' in blocks.arguments(function)
  and _returns(function, 'GradientTransformation')
  # schedule_free is evaluated at other parameters than it trains.
  and not name.startswith(('scale_by_', 'schedule_free'))
}

# A function of Optax whose arguments are numbers and which returns a schedule.
SCHEDULES = {
  name: function
  for name, function in _public_functions(optax.schedules).items()
  if name.endswith(('_schedule', '_decay'))
  and not {'schedules', 'cosine_kwargs'} & set(blocks.arguments(function))
}

# The arguments that mean "how many steps", which follow total_steps.
_LENGTHS = ('decay_steps', 'transition_steps')


def resolve_schedule(
  block: config_lib.Block, total_steps: int
) -> config_lib.Block:
  """The schedule's block in full; a length left out becomes total_steps."""
  function = blocks.lookup('schedule.name', block['name'], SCHEDULES)
  takes = blocks.arguments(function)
  lengths = {
    k: total_steps
    for k in _LENGTHS
    if k in takes and takes[k].default in (inspect.Parameter.empty, None)
  }
  return blocks.resolve('schedule', block, function, given=lengths)


def create_schedule(block: config_lib.Block, total_steps: int):
  """step -> learning rate, checked at every hundredth of the run.

  Raises:
    UserError: the rate is negative or not finite somewhere, or Optax refuses.
  """
  function = blocks.lookup('schedule.name', block['name'], SCHEDULES)
  try:
    schedule = function(**blocks.kwargs(block))
    steps = np.linspace(0, total_steps - 1, 101).astype(np.int32)
    with np.errstate(over='ignore'):  # An infinite rate is refused below.
      rates = jax.vmap(lambda step: jnp.reshape(schedule(step), ()))(steps)
    rates = jax.device_get(rates)
  except Exception as error:  # Optax raises many kinds; all mean the block.
    raise config_lib.UserError(
      f'config.schedule.{blocks.spelled(block)}, which Optax refuses: '
      + config_lib.first_line(error)
    ) from None
  for step, rate in zip(steps.tolist(), rates.tolist(), strict=True):
    if not 0 <= rate < float('inf'):
      raise config_lib.UserError(
        f'config.schedule.{blocks.spelled(block)}, which gives a learning rate '
        f'of {rate:.3g} at step {step}; it must be finite and at least 0'
      )
  return schedule


def rates_at_quarters(schedule, total_steps: int) -> str:
  """One line: the rate at 0, 25, 50, 75 and 100 % of the run."""
  rates = [
    f'{float(schedule(round(share * total_steps))):.3g} at {share:.0%}'
    for share in (0, 0.25, 0.5, 0.75, 1)
  ]
  return 'learning rate: ' + ', '.join(rates)


def resolve_optimizer(block: config_lib.Block) -> config_lib.Block:
  """The optimizer's block with Optax's defaults written out."""
  function = blocks.lookup('optimizer.name', block['name'], OPTIMIZERS)
  return blocks.resolve(
    'optimizer', block, function, supplied=('learning_rate',)
  )


def create(
  block: config_lib.Block, schedule
) -> optax.GradientTransformationExtraArgs:
  """The Optax optimizer of that name, tried on a toy so that it can be trusted.

  Raises:
    UserError: Optax refuses an argument, or the optimizer needs more than
      gradients, parameters, the loss and a function that gives it.
  """
  function = blocks.lookup('optimizer.name', block['name'], OPTIMIZERS)
  toy = {'kernel': jnp.zeros((5, 3)), 'bias': jnp.zeros((3,))}
  try:
    tx = function(learning_rate=schedule, **blocks.kwargs(block))
    tx = optax.with_extra_args_support(tx)
    jax.eval_shape(
      lambda p: tx.update(
        p,
        tx.init(p),
        p,
        value=jnp.zeros(()),
        grad=p,
        value_fn=optax.tree.norm,
      ),
      toy,
    )
  except Exception as error:  # Optax raises many kinds; all mean the block.
    raise config_lib.UserError(
      f'config.optimizer.{blocks.spelled(block)}, which cannot be used so: '
      + config_lib.first_line(error)
    ) from None
  return tx
