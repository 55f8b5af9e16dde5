"""What evaluations decide: when to stop, and how far the rate has fallen.

Both are functions of the scores in metrics.jsonl alone, so that a resumed run
decides as one never stopped.
"""

from collections.abc import Mapping
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax.contrib

from train import config as config_lib
from train import metrics
from train import optim
from train import partition
from train import state as state_lib


def _costs(config: config_lib.Config, scores: Mapping[int, float]):
  """The scores in the order of their steps, so signed that less is better."""
  sign = -1.0 if metrics.higher_is_better(config.best_metric) else 1.0
  return [sign * scores[step] for step in sorted(scores)]


def should_stop(config: config_lib.Config, scores: Mapping[int, float]) -> bool:
  """Whether `patience` evaluations have passed since the best one."""
  patience = config.early_stopping.patience
  if patience is None or not scores:
    return False
  costs = _costs(config, scores)
  return len(costs) - 1 - costs.index(min(costs)) >= patience


def is_over(
  config: config_lib.Config, step: int, scores: Mapping[int, float]
) -> bool:
  """Whether `step` is the last."""
  return step == config.total_steps or should_stop(config, scores)


def rate_scale(config: config_lib.Config, scores: Mapping[int, float]) -> float:
  """What the evaluations so far have multiplied the learning rate with.

  1 unless the schedule is reduce_on_plateau. Optax's own rule decides; one of
  its counts is one evaluation here, and its smallest scale is relative.
  """
  if config.schedule['name'] != optim.PLATEAU:
    return 1.0
  with jax.transfer_guard('allow'):  # Which the loop forbids.
    update, state = _plateau(
      config.schedule['factor'],
      config.schedule['patience'],
      config.schedule['cooldown'],
      config.schedule['min_value'] / config.schedule['value'],
    )
    for cost in _costs(config, scores):
      state = update(state, cost)
    return float(state.scale)


def judged(
  state: state_lib.TrainState,
  config: config_lib.Config,
  scores: Mapping[int, float],
) -> state_lib.TrainState:
  """The state with the rate_scale that these scores make."""
  old = state.control['rate_scale']
  scale = np.full((), rate_scale(config, scores), np.float32)
  scale = partition.put(scale, old.sharding)
  return dataclasses.replace(
    state, control=state.control | {'rate_scale': scale}
  )


@functools.lru_cache
def _plateau(factor: float, patience: int, cooldown: int, min_scale: float):
  """update(state, cost) -> state, and the state before the first cost."""
  plateau = optax.contrib.reduce_on_plateau(
    factor=factor,
    patience=patience,
    cooldown=cooldown,
    min_scale=min_scale,
    # Any improvement counts; a relative one of a cost below zero, which
    # accuracies become, would point the wrong way. Optax wants one above zero.
    rtol=0.0,
    atol=float(np.finfo(np.float32).tiny),
  )
  update = jax.jit(lambda state, cost: plateau.update({}, state, value=cost)[1])
  return update, plateau.init({'scale': jnp.ones(())})
