"""What training remembers from one step to the next."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from train import config as config_lib

NON_FINITE = 'a loss, gradient or metric became nan or infinite'


class NonFiniteError(Exception):
  """A loss, a gradient or a metric became nan or infinite."""

  exit_code = 1

  def __init__(self, step: int, config: config_lib.Config):
    super().__init__(
      f'{NON_FINITE} at step {step}: '
      f'config.schedule ({config.schedule["name"]}) may give too high a '
      'learning rate, or config.data.normalize may not fit the data'
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """A pytree of plain nested dicts.

  Attributes:
    step: updates done, int32.
    params: what is trained.
    batch_stats: running statistics of normalisation layers.
    opt_state: Optax's moments and counters, of what is not frozen.
    ema_params: the running mean of params, or {} where there is none.
    control: what the step must know of the run. `nonfinite_step` is the first
      step whose loss or gradient was nan or infinite, -1 while there is none;
      `rate_scale` is what evaluations have multiplied the learning rate with.
  """

  step: jax.Array
  params: Any
  batch_stats: Any
  opt_state: Any
  ema_params: Any
  control: dict[str, jax.Array]


def create(params, batch_stats, opt_state, *, ema: bool) -> TrainState:
  """The state before the first step."""
  # L-BFGS begins with weakly typed numbers and goes on with others, for which
  # the second step would compile again.
  opt_state = jax.tree.map(lambda x: jnp.asarray(x, x.dtype), opt_state)
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    batch_stats=batch_stats,
    opt_state=opt_state,
    # A copy: a step that takes over its state takes each buffer once.
    ema_params=jax.tree.map(jnp.copy, params) if ema else {},
    control={
      'nonfinite_step': jnp.full((), -1, jnp.int32),
      'rate_scale': jnp.ones((), jnp.float32),
    },
  )


def check_finite(state: TrainState, config: config_lib.Config):
  """Raises NonFiniteError, naming the step at which the run diverged."""
  step = int(state.control['nonfinite_step'])
  if step >= 0:
    raise NonFiniteError(step, config)
