"""What training remembers from one step to the next."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from train import config as config_lib


class NonFiniteError(Exception):
  """A loss, a gradient or a metric became nan or infinite."""

  exit_code = 1

  def __init__(self, step: int, config: config_lib.Config):
    super().__init__(
      f'a loss, gradient or metric became nan or infinite at step {step}: '
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
    opt_state: Optax's moments and counters.
    control: what stopping rules remember. `nonfinite_step` is the first step
      whose loss or gradient was nan or infinite, -1 while there is none.
  """

  step: jax.Array
  params: Any
  batch_stats: Any
  opt_state: Any
  control: dict[str, jax.Array]


def create(params, batch_stats, tx) -> TrainState:
  """The state before the first step."""
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    batch_stats=batch_stats,
    opt_state=tx.init(params),
    control={'nonfinite_step': jnp.full((), -1, jnp.int32)},
  )


def check_finite(state: TrainState, config: config_lib.Config):
  """Raises NonFiniteError, naming the step at which the run diverged."""
  step = int(state.control['nonfinite_step'])
  if step >= 0:
    raise NonFiniteError(step, config)
