"""The one training step and the one evaluation step, as pure functions.

Shapes: B batch, K classes.
"""

from collections.abc import Callable
import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import optax

from train import state as state_lib
from train.data import pipeline

# Streams of random numbers within a step.
_DROPOUT = 0


def make_prepare(input_key: str, normalize: dict | None) -> Callable:
  """prepare(batch) -> batch with 'input', float32: (x - mean) / std."""
  mean, std = 0.0, 1.0
  if normalize is not None:
    mean = jnp.asarray(normalize['mean'], jnp.float32)
    std = jnp.asarray(normalize['std'], jnp.float32)

  def prepare(batch):
    return batch | {
      'input': (batch[input_key].astype(jnp.float32) - mean) / std
    }

  return prepare


def make_train_step(
  graphdef, tx, *, prepare, loss_fn, measure, schedule, seed: int
) -> Callable:
  """Returns train_step(state, batch) -> (state, metrics), ready for jax.jit.

  Args:
    graphdef: the model's structure, from nnx.split.
    tx: an Optax transformation; may ask for value, grad and value_fn.
    prepare: batch -> batch with 'input'.
    loss_fn: (outputs, batch) -> loss of each example [B].
    measure: (outputs, batch) -> metric -> [B].
    schedule: step -> learning rate, for the metrics.
    seed: of the run.
  """

  def train_step(state: state_lib.TrainState, batch):
    batch = prepare(pipeline.select(batch, state.step))
    # A function of (seed, step), so that a resumed run draws the same masks.
    key = jax.random.fold_in(jax.random.key(seed), state.step)

    def compute_loss(params):
      model = nnx.merge(graphdef, params, state.batch_stats, copy=True)
      rngs = nnx.Rngs(dropout=jax.random.fold_in(key, _DROPOUT))
      outputs = model(batch['input'], train=True, rngs=rngs)
      batch_stats = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
      return loss_fn(outputs, batch).mean(), (outputs, batch_stats)

    (loss, (outputs, batch_stats)), grads = jax.value_and_grad(
      compute_loss, has_aux=True
    )(state.params)
    updates, opt_state = tx.update(
      grads,
      state.opt_state,
      state.params,
      value=loss,
      grad=grads,
      value_fn=lambda params: compute_loss(params)[0],
    )
    grad_norm = optax.tree.norm(grads)
    measured = {k: v.mean() for k, v in measure(outputs, batch).items()}
    metrics = {
      'loss': loss,
      **measured,
      'grad_norm': grad_norm,
      'param_norm': optax.tree.norm(state.params),
      'learning_rate': jnp.asarray(schedule(state.step), jnp.float32),
    }
    step = state.step + 1
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    earlier = state.control['nonfinite_step']
    state = dataclasses.replace(
      state,
      step=step,
      params=optax.apply_updates(state.params, updates),
      batch_stats=batch_stats,
      opt_state=opt_state,
      control={
        'nonfinite_step': jnp.where(finite | (earlier >= 0), earlier, step)
      },
    )
    return state, metrics

  return train_step


def make_eval_step(graphdef, *, prepare, loss_fn, measure, count) -> Callable:
  """Returns eval_step(params, batch_stats, totals, batch) -> totals.

  Each total is kept lane by lane, [B]: the sum over the batches of what stood
  at that place of the batch. So no order of summation depends on the devices.
  `totals` is None for the shapes alone (jax.eval_shape).
  """

  def eval_step(params, batch_stats, totals, batch):
    batch = prepare(batch)
    model = nnx.merge(graphdef, params, batch_stats, copy=True)
    outputs = model(batch['input'], train=False)
    mask = batch['mask']
    values = {'loss': loss_fn(outputs, batch), **measure(outputs, batch)}
    # where, not a product: a nan in the padding must not reach the sum.
    sums = {key: jnp.where(mask, value, 0) for key, value in values.items()}
    sums['count'] = mask.astype(jnp.int32)
    if count is not None:
      sums['confusion'] = count(outputs, batch)
    if totals is None:
      return sums
    return jax.tree.map(jnp.add, totals, sums)

  return eval_step
