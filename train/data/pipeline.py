"""The order of examples, and batches on the devices.

Position p of the stream is element p mod n of the permutation of epoch p // n,
and step s (from 0) takes positions s*B to s*B + B - 1. So a batch is a function
of (seed, step) alone, batches cross epochs, and nothing is dropped.

Shapes: B batch, n examples, S steps.
"""

from collections.abc import Iterator
import concurrent.futures
import math

import jax
import numpy as np

from train import partition
from train.data import sources

# Splits up to this size live on the devices, and the step itself picks its
# examples: measured 1.1x of copying each batch, for an MLP on a CPU.
RESIDENT_BYTES = 256 * 2**20
_ORDERED_STEPS = 256  # Steps whose order is sent at once to a resident split.
_PREFETCH = 2

Batch = dict[str, jax.Array]


# -------------------------------------------------------------------- order


def epoch_order(seed: int, epoch: int, n: int) -> np.ndarray:
  """The permutation of 0..n-1 that belongs to an epoch, int64 [n]."""
  return np.random.default_rng([seed, epoch]).permutation(n)


class Order:
  """places(step) -> int64 [B]; remembers the last two epochs' permutations."""

  def __init__(self, seed: int, n: int, batch_size: int):
    self.seed, self.n, self.batch_size = seed, n, batch_size
    self._epochs: dict[int, np.ndarray] = {}

  def places(self, first_step: int, steps: int = 1) -> np.ndarray:
    """The places of the examples of `steps` steps, int64 [steps * B]."""
    start = first_step * self.batch_size
    positions = np.arange(start, start + steps * self.batch_size)
    epochs, within = np.divmod(positions, self.n)
    known = {}
    for epoch in range(epochs[0], epochs[-1] + 1):
      known[epoch] = self._epochs.get(epoch)
      if known[epoch] is None:
        known[epoch] = epoch_order(self.seed, epoch, self.n)
    self._epochs = dict(list(known.items())[-2:])
    picked = np.empty_like(positions)
    for epoch, order in known.items():
      here = epochs == epoch
      picked[here] = order[within[here]]
    return picked


# ------------------------------------------------------------------ batches


def train_batches(
  split: sources.Split,
  *,
  seed: int,
  batch_size: int,
  first_step: int,
  mesh: jax.sharding.Mesh,
  resident_bytes: int | None = None,
) -> Iterator[Batch]:
  """Endless batches from `first_step` on, for `select` inside the step."""
  order = Order(seed, len(split), batch_size)
  size = sum(array.nbytes for array in split.arrays.values())
  if size <= (RESIDENT_BYTES if resident_bytes is None else resident_bytes):
    return _resident(split, order, first_step, mesh)
  return _streamed(split, order, first_step, mesh)


def select(batch: Batch, step: jax.Array) -> Batch:
  """The examples of `step` from what train_batches yields; runs in the step."""
  if 'order' not in batch:
    return batch
  places = batch['order'][step - batch['first_step']]
  return {key: array[places] for key, array in batch['examples'].items()}


def _resident(split, order: Order, step: int, mesh) -> Iterator[Batch]:
  """The whole split on every device, with the order of the steps to come."""
  examples = jax.device_put(
    split.take(np.arange(len(split))), partition.replicated(mesh)
  )
  while True:
    places = order.places(step, _ORDERED_STEPS)
    places = places.reshape(_ORDERED_STEPS, -1).astype(np.int32)
    batch = {
      'examples': examples,
      'order': jax.device_put(places, partition.batched(mesh, axis=1)),
      'first_step': jax.device_put(np.int32(step), partition.replicated(mesh)),
    }
    for _ in range(_ORDERED_STEPS):
      yield batch
    step += _ORDERED_STEPS


def _streamed(split, order: Order, step: int, mesh) -> Iterator[Batch]:
  """Each batch read and sent by a thread, two steps ahead."""

  def fetch(step: int) -> Batch:
    return jax.device_put(
      split.take(order.places(step)), partition.batched(mesh)
    )

  with concurrent.futures.ThreadPoolExecutor(1) as reader:
    ahead = [reader.submit(fetch, step + i) for i in range(_PREFETCH)]
    while True:
      ahead.append(reader.submit(fetch, step + len(ahead)))
      yield ahead.pop(0).result()
      step += 1


def eval_batches(
  split: sources.Split, batch_size: int, mesh: jax.sharding.Mesh
) -> Iterator[Batch]:
  """Every example once, in order; 'mask' is False where the last is padded."""
  for i in range(math.ceil(len(split) / batch_size)):
    places = np.arange(i * batch_size, (i + 1) * batch_size)
    batch = split.take(np.minimum(places, len(split) - 1))
    batch['mask'] = places < len(split)
    yield jax.device_put(batch, partition.batched(mesh))
