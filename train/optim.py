"""Optax's optimizers and schedules by their own names and arguments.

Two formulas that are often written down wrong: Adam divides its moments by
1 - b^t, t the number of the update (Kingma & Ba 2015, algorithm 1), not by
1 - b; and Nesterov's gradient is that at w + m v, to where momentum is about to
lead (Sutskever et al. 2013, equation 4), with a plus where v is an update.
"""

from collections.abc import Callable
import functools
import inspect
import types
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
    # nadam is a partial of adam.
    if isinstance(value, types.FunctionType | functools.partial)
    and not name.startswith('_')
  }


def _returns(function, words: tuple[str, ...]) -> bool:
  annotation = inspect.signature(function).return_annotation
  annotation = str(getattr(annotation, '__name__', annotation))
  return any(word in annotation for word in words)


# Names of Optax that look like an optimizer or a schedule, and why they cannot
# be one here.
REFUSED = {
  'dpsgd': "it needs each example's own gradient, which no step computes",
  'schedule_free': 'it wraps another optimizer; schedule_free_sgd and '
  'schedule_free_adamw are such',
  'join_schedules': 'it joins other schedules, which are no numbers; '
  'piecewise_interpolate_schedule and sgdr_schedule join by numbers',
}

# These find their own rate, or train other parameters than are evaluated: L1's
# threshold, which is in units of the rate, would mean something else.
_OWN_RATE = (
  'cocob', 'dadapt_adamw', 'dog', 'dowg', 'lbfgs', 'momo', 'momo_adam',
  'polyak_sgd', 'prodigy', 'schedule_free_adamw', 'schedule_free_sgd',
)  # fmt: skip

# A function of Optax that takes a learning rate and returns a transformation;
# polyak_sgd, which computes its rate, takes a factor on it.
OPTIMIZERS = {
  name: function
  for name, function in _public_functions(optax, optax.contrib).items()
  if {'learning_rate', 'max_learning_rate'} & set(blocks.arguments(function))
  and _returns(function, ('GradientTransformation', '_empty'))
  and not name.startswith('scale_by_')
  and name not in REFUSED
}


def reduce_on_plateau(
  value: float,
  factor: float = 0.1,
  patience: int = 10,
  min_value: float = 0.0,
  cooldown: int = 0,
) -> optax.Schedule:
  """A constant rate that evaluations lower; see control.rate_scale.

  Args:
    value: the first learning rate.
    factor: what the rate is multiplied with.
    patience: after so many evaluations in a row without a new best.
    min_value: the rate never falls below.
    cooldown: evaluations after a reduction that do not count.
  """
  if not 0 < factor < 1:
    raise ValueError(f'factor is {factor}; it must be between 0 and 1')
  if patience < 1 or cooldown < 0 or not 0 <= min_value <= value or not value:
    raise ValueError(
      'value must be above 0, patience at least 1, cooldown at least 0, '
      'min_value from 0 to value'
    )
  return optax.constant_schedule(value)


PLATEAU = reduce_on_plateau.__name__

# Functions of Optax whose arguments are numbers and which return a schedule;
# and the one that evaluations drive.
SCHEDULES = {
  name: function
  for name, function in _public_functions(optax.schedules).items()
  if name.endswith(('_schedule', '_decay')) and name not in REFUSED
} | {PLATEAU: reduce_on_plateau}

# The arguments that mean "how many steps", which follow total_steps.
_LENGTHS = ('decay_steps', 'transition_steps')


def resolve_schedule(
  block: config_lib.Block, total_steps: int
) -> config_lib.Block:
  """The schedule's block in full; a length left out becomes total_steps."""
  function = _lookup('schedule.name', block['name'], SCHEDULES)
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
  function = _lookup('schedule.name', block['name'], SCHEDULES)
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


def rates_at_quarters(schedule, total_steps: int, name: str) -> str:
  """One line: the rate at 0, 25, 50, 75 and 100 % of the run.

  Args:
    schedule: step -> learning rate.
    total_steps: of the run.
    name: the schedule's.
  """
  note = ', until evaluations lower it' if name == PLATEAU else ''
  rates = [
    f'{float(schedule(round(share * total_steps))):.3g} at {share:.0%}'
    for share in (0, 0.25, 0.5, 0.75, 1)
  ]
  return 'learning rate: ' + ', '.join(rates) + note


def _lookup(field: str, name: str, table: dict[str, Any]) -> Any:
  if name in REFUSED:
    raise config_lib.UserError(
      f'config.{field} is {name!r}, which cannot be used: {REFUSED[name]}'
    )
  return blocks.lookup(field, name, table)


# --------------------------------------------------------------- optimizers


def resolve_optimizer(block: config_lib.Block) -> config_lib.Block:
  """The optimizer's block with Optax's defaults written out."""
  function = _lookup('optimizer.name', block['name'], OPTIMIZERS)
  return blocks.resolve(
    'optimizer', block, function, supplied=(_rate_name(function),)
  )


def _rate_name(function: Callable) -> str:
  takes = blocks.arguments(function)
  return 'learning_rate' if 'learning_rate' in takes else 'scaling'


def create(
  config: config_lib.Config, schedule: Callable
) -> optax.GradientTransformationExtraArgs:
  """The optimizer that config.optimizer names, behind the clipping.

  It is tried on a toy, so that it can be trusted. Its `update` is to be given
  value, grad, value_fn and obj_fn, of which each optimizer takes what it needs.

  Raises:
    UserError: Optax refuses an argument, the optimizer takes no schedule and
      gets one, it has no weight decay to mask, or other fields do not go with
      it.
  """
  block = config.optimizer
  _check_together(config)
  function = _lookup('optimizer.name', block['name'], OPTIMIZERS)
  arguments = blocks.kwargs(block)
  if config.weight_decay_mask:
    arguments[_mask_name(block['name'], function)] = has_many_dimensions
  try:
    optimizer = _try(function, schedule, arguments)
  except Exception as error:  # Optax raises many kinds; all mean the block.
    try:
      # Some take a number alone.
      optimizer = _try(function, float(schedule(0)), arguments)
    except Exception:
      raise config_lib.UserError(
        f'config.optimizer.{blocks.spelled(block)}, which cannot be used so: '
        + config_lib.first_line(error)
      ) from None
    if config.schedule['name'] not in ('constant_schedule', PLATEAU):
      raise config_lib.UserError(
        f'config.schedule.name is {config.schedule["name"]!r}, but '
        f'{block["name"]} takes one rate for the whole run; say '
        '--config.schedule.name=constant_schedule'
      ) from None
  clips = []
  if config.grad_clip_value is not None:
    clips.append(optax.clip(config.grad_clip_value))
  if config.grad_clip_norm is not None:
    clips.append(optax.clip_by_global_norm(config.grad_clip_norm))
  return optax.chain(*clips, optimizer)


def _check_together(config: config_lib.Config):
  """Refuses recipes that exclude each other."""
  name = config.optimizer['name']
  found = None
  if config.l1 and name in _OWN_RATE:
    found = f'config.l1 is {config.l1}, but {name} has no rate of that meaning'
  if name.startswith('schedule_free'):
    if config.ema_decay is not None:
      found = (
        f'config.ema_decay is {config.ema_decay}, but {name} is evaluated with '
        'a mean of its own'
      )
    elif config.schedule['name'] == PLATEAU:
      found = f'config.schedule.name is {PLATEAU!r}, but {name} has no schedule'
    elif set(config.rate_multipliers.values()) - {0, 1}:
      found = (
        f'config.rate_multipliers is {config.rate_multipliers}, but {name} '
        'takes 0 and 1 alone'
      )
  if config.weight_decay_mask and config.optimizer.get('adam_weight_decay'):
    found = (
      'config.weight_decay_mask is true, but '
      'config.optimizer.adam_weight_decay cannot be masked'
    )
  if found:
    raise config_lib.UserError(found)


def has_many_dimensions(params) -> Any:
  """True for kernels, False for biases and the scales of norms."""
  return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def _mask_name(name: str, function: Callable) -> str:
  for argument in ('weight_decay_mask', 'mask'):
    if argument in blocks.arguments(function):
      return argument
  raise config_lib.UserError(
    f'config.weight_decay_mask is true, but {name} has no weight decay that '
    'can be masked; config.l2 spares biases and norms with any optimizer'
  )


def _try(function, rate, arguments) -> optax.GradientTransformationExtraArgs:
  """The optimizer, once it has updated the shapes of a toy."""
  toy = {'kernel': jnp.zeros((5, 3)), 'bias': jnp.zeros((3,))}
  if _rate_name(function) == 'learning_rate':
    tx = function(learning_rate=rate, **arguments)
  else:
    # polyak_sgd would scale its gradients, and so its own rate the other way.
    factor = rate if callable(rate) else optax.constant_schedule(rate)
    tx = optax.chain(function(**arguments), optax.scale_by_schedule(factor))
  tx = optax.with_extra_args_support(tx)
  jax.eval_shape(
    lambda params: tx.update(
      params,
      tx.init(params),
      params,
      value=jnp.zeros(()),
      grad=params,
      # L-BFGS hands its function whatever it does not know itself.
      value_fn=lambda params, obj_fn=None: optax.tree.norm(params),
      obj_fn=optax.tree.norm,
    ),
    toy,
  )
  return tx


def eval_params(opt_state, params) -> Any:
  """What to evaluate: `params`, but for schedule_free, which trains others.

  Defazio et al. (2024): gradients are taken at y, the answer is x.
  """
  is_schedule_free = lambda node: isinstance(  # noqa: E731
    node, optax.contrib.ScheduleFreeState
  )
  for node in jax.tree.leaves(opt_state, is_leaf=is_schedule_free):
    if is_schedule_free(node):
      return optax.contrib.schedule_free_eval_params(node, params)
  return params


def soft_threshold(params, threshold) -> Any:
  """sign(w) max(|w| - threshold, 0) of kernels: the proximal step of L1.

  Args:
    params: a tree.
    threshold: a tree of numbers of the same structure.
  """
  # Parikh & Boyd (2014), section 6.5.2.
  return jax.tree.map(
    lambda w, t, is_kernel: (
      jnp.sign(w) * jnp.maximum(jnp.abs(w) - t, 0) if is_kernel else w
    ),
    params,
    threshold,
    has_many_dimensions(params),
  )


def l2_penalty(params, strength: float) -> jax.Array:
  """strength / 2 * sum w^2 over the kernels."""
  kernels = [leaf for leaf in jax.tree.leaves(params) if leaf.ndim > 1]
  return strength / 2 * sum(jnp.vdot(w, w) for w in kernels)
