"""The one training step and the one evaluation step, as pure functions.

Shapes: B batch, K classes.
"""

from collections.abc import Callable
import dataclasses
import functools

from flax import nnx
import jax
import jax.numpy as jnp
import optax

from train import losses
from train import optim
from train import paths
from train import state as state_lib
from train.data import pipeline
from train.data import sources

# Streams of random numbers within a step.
_DROPOUT = 0
_AUGMENT = 1  # Then the place in the batch.


def make_prepare(
  input_key: str, normalize: dict | None, dtype=jnp.float32
) -> Callable:
  """prepare(batch) -> batch with 'input', of dtype: (x - mean) / std.

  Tokens are int32 and stay as they are.
  """
  mean, std = 0.0, 1.0
  if normalize is not None:
    mean = jnp.asarray(normalize['mean'], dtype)
    std = jnp.asarray(normalize['std'], dtype)

  def prepare(batch):
    x = batch[input_key]
    if input_key == 'tokens':
      return batch | {'input': x.astype(jnp.int32)}
    return batch | {'input': (x.astype(dtype) - mean) / std}

  return prepare


def apply(model, batch, **kwargs) -> tuple[jax.Array, dict[str, jax.Array]]:
  """The model's outputs [B, ...], of its dtype, and {'penalty': [B]}.

  Beside 'input' the model gets what else the batch has of sources.EXTRAS, by
  name. A model may return (outputs, penalty): what the outputs cannot tell, as
  a variational autoencoder's divergence, is added to each example's loss. Where
  it does not, the dict is empty.
  """
  extras = {key: batch[key] for key in sources.EXTRAS if key in batch}
  outputs = model(batch['input'], **extras, **kwargs)
  penalty = {}
  if isinstance(outputs, tuple):
    outputs, per_example = outputs
    penalty = {'penalty': losses.widen(per_example)}
  return outputs, penalty


def make_train_step(
  graphdef,
  tx,
  *,
  prepare,
  augment,
  loss_fn,
  measure,
  schedule,
  config,
  rates,
  unroll,
  gather=lambda params: params,
  axis_name=None,
) -> Callable:
  """Returns train_step(state, batch) -> (state, metrics), ready for jax.jit.

  Args:
    graphdef: the model's structure, from nnx.split.
    tx: an Optax transformation of the parameters that `rates` names; may ask
      for value, grad, value_fn and obj_fn.
    prepare: batch -> batch with 'input'.
    augment: (a key for each example [B], batch) -> batch.
    loss_fn: (outputs, batch) -> loss of each example [B].
    measure: (outputs, batch) -> metric -> [B].
    schedule: step -> learning rate, for the metrics and for L1.
    config: resolved: seed, accumulate, l1, l2, ema_decay.
    rates: path -> factor on the learning rate, of each trained parameter; what
      it leaves out is frozen.
    unroll: whether the parts of a batch are compiled one by one: on a CPU a
      convolution's gradient inside a loop is tens of times slower.
    gather: params -> params to compute with, where they lie divided.
    axis_name: of the devices that each run this step on their own examples, as
      in jax.pmap; None where it is one program with the whole batch.
  """

  def mean(tree):
    return tree if axis_name is None else jax.lax.pmean(tree, axis_name)

  def forward(params, batch_stats, batch, key):
    params = gather(params)
    model = nnx.merge(graphdef, params, batch_stats, copy=True)
    outputs, penalty = apply(
      model, batch, train=True, rngs=nnx.Rngs(dropout=key)
    )
    batch_stats = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
    return outputs, penalty, batch_stats

  if config.remat is not None:
    policy = getattr(jax.checkpoint_policies, config.remat)
    forward = jax.checkpoint(forward, policy=policy)

  def train_step(state: state_lib.TrainState, batch):
    batch = pipeline.select(batch, state.step)
    # A function of (seed, step), so that a resumed run draws the same masks.
    key = jax.random.fold_in(jax.random.key(config.seed), state.step)
    device = 0 if axis_name is None else jax.lax.axis_index(axis_name)
    batch = prepare(augment(_example_keys(key, batch, device), batch))
    trained, frozen = paths.split(state.params, rates)
    key = jax.random.fold_in(key, _DROPOUT)
    if axis_name is not None:  # Else all devices would draw the same masks.
      key = jax.random.fold_in(key, device)

    def compute_loss(trained, batch_stats, batch, key):
      params = paths.join(trained, frozen)
      outputs, penalty, batch_stats = forward(params, batch_stats, batch, key)
      loss = (_mixed(loss_fn, outputs, batch) + sum(penalty.values())).mean()
      measured = measure(outputs, batch) | penalty
      measured = {k: v.mean() for k, v in measured.items()}
      objective = loss
      if config.l2:
        objective += optim.l2_penalty(trained, config.l2)
      return objective, (batch_stats, {'loss': loss, **measured})

    def value_and_grad(batch_stats, batch, key):
      (objective, (batch_stats, metrics)), grads = jax.value_and_grad(
        compute_loss, has_aux=True
      )(trained, batch_stats, batch, key)
      return batch_stats, (objective, metrics, grads)

    over_parts = functools.partial(
      _mean_over_parts, config.accumulate, unroll, state.batch_stats, batch, key
    )
    batch_stats, (objective, metrics, grads) = mean(over_parts(value_and_grad))

    def value_fn(trained, obj_fn=None):
      del obj_fn  # L-BFGS hands on whatever it does not know itself.

      def value(batch_stats, batch, key):
        objective, (batch_stats, _) = compute_loss(
          trained, batch_stats, batch, key
        )
        return batch_stats, objective

      return mean(over_parts(value)[1])

    updates, opt_state = tx.update(
      grads,
      state.opt_state,
      trained,
      value=objective,
      grad=grads,
      value_fn=value_fn,
      obj_fn=value_fn,
    )
    learning_rate = jnp.asarray(schedule(state.step), jnp.float32)
    if config.schedule['name'] == optim.PLATEAU:
      scale = state.control['rate_scale']
      learning_rate *= scale
      updates = jax.tree.map(lambda u: u * scale.astype(u.dtype), updates)
    updates = _multiplied(updates, rates)
    trained = optax.apply_updates(trained, updates)
    if config.l1:
      threshold = jax.tree.map(lambda _: learning_rate * config.l1, trained)
      trained = optim.soft_threshold(trained, _multiplied(threshold, rates))
    params = paths.join(trained, frozen)
    ema_params = state.ema_params
    if config.ema_decay is not None:
      # The first values, which are random, are soon forgotten.
      seen = (1 + state.step) / (10 + state.step)
      decay = jnp.minimum(config.ema_decay, seen)
      # So written that a parameter which stays keeps its mean to the last bit.
      ema_params = jax.tree.map(
        lambda mean, w: mean + (1 - decay) * (w - mean), ema_params, params
      )
    grad_norm = optax.tree.norm(grads)
    metrics |= {
      'grad_norm': grad_norm,
      'param_norm': optax.tree.norm(state.params),
      'learning_rate': learning_rate,
    }
    step = state.step + 1
    finite = jnp.isfinite(objective) & jnp.isfinite(grad_norm)
    earlier = state.control['nonfinite_step']
    state = dataclasses.replace(
      state,
      step=step,
      params=params,
      batch_stats=batch_stats,
      opt_state=opt_state,
      ema_params=ema_params,
      control=state.control
      | {'nonfinite_step': jnp.where(finite | (earlier >= 0), earlier, step)},
    )
    return state, metrics

  return train_step


def _example_keys(key, batch, device):
  """A key for each place of the batch, of which a device has [B] in a row."""
  size = len(jax.tree.leaves(batch)[0])
  places = device * size + jnp.arange(size)
  key = jax.random.fold_in(key, _AUGMENT)
  return jax.vmap(jax.random.fold_in, (None, 0))(key, places)


def _mixed(loss_fn, outputs, batch):
  """[B]; after mixup and cutmix an example has a share of another's label."""
  loss = loss_fn(outputs, batch)
  if 'other_label' not in batch:
    return loss
  other = loss_fn(outputs, batch | {'label': batch['other_label']})
  return loss + batch['other_share'] * (other - loss)


def _multiplied(updates, rates):
  """Each leaf times its factor on the learning rate."""
  flat = paths.flatten(updates)
  if all(rate == 1 for rate in rates.values()):
    return updates
  return paths.unflatten({path: u * rates[path] for path, u in flat.items()})


def _mean_over_parts(parts, unroll, batch_stats, batch, key, function):
  """function(batch_stats, batch, key) -> (batch_stats, the mean of its tree).

  The parts of the batch are equal and go one after the other, so that only one
  of them has its activations in memory. Each device splits its own examples.
  """
  if parts == 1:
    return function(batch_stats, batch, key)
  batches = jax.tree.map(
    lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch
  )
  keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(parts))

  def add(carry, part):
    batch_stats, total = carry
    batch_stats, out = function(batch_stats, *part)
    return (batch_stats, jax.tree.map(jnp.add, total, out)), None

  first = jax.tree.map(lambda x: x[0], (batches, keys))
  shapes = jax.eval_shape(function, batch_stats, *first)[1]
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
  (batch_stats, total), _ = jax.lax.scan(
    add, (batch_stats, zeros), (batches, keys), unroll=unroll
  )
  return batch_stats, jax.tree.map(lambda t: t / parts, total)


def make_predict(
  graphdef, *, prepare, loss_fn, measure, gather=lambda params: params
) -> Callable:
  """Returns predict(params, batch_stats, batch) -> (outputs, values).

  The model's outputs [B, ...], and 'loss' and each metric of every example [B],
  of the padding too.
  """

  def predict(params, batch_stats, batch):
    batch = prepare(batch)
    model = nnx.merge(graphdef, gather(params), batch_stats, copy=True)
    outputs, penalty = apply(model, batch, train=False)
    loss = loss_fn(outputs, batch) + sum(penalty.values())
    return outputs, {'loss': loss, **measure(outputs, batch), **penalty}

  return predict


def make_eval_step(predict, count) -> Callable:
  """Returns eval_step(params, batch_stats, totals, batch) -> totals.

  Each total is kept lane by lane, [B]: the sum over the batches of what stood
  at that place of the batch. So no order of summation depends on the devices.
  `totals` is None for the shapes alone (jax.eval_shape).
  """

  def eval_step(params, batch_stats, totals, batch):
    outputs, values = predict(params, batch_stats, batch)
    mask = batch['mask']
    # where, not a product: a nan in the padding must not reach the sum.
    sums = {key: jnp.where(mask, value, 0) for key, value in values.items()}
    sums['count'] = mask.astype(jnp.int32)
    if count is not None:
      sums['confusion'] = count(outputs, batch)
    if totals is None:
      return sums
    return jax.tree.map(jnp.add, totals, sums)

  return eval_step
