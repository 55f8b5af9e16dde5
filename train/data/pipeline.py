"""The order of examples, and batches on the devices.

Position p of the stream is element p mod n of the permutation of epoch p // n,
and step s (from 0) takes positions s*B to s*B + B - 1. So a batch is a function
of (seed, step) alone, batches cross epochs, and nothing is dropped.

Shapes: B batch, n examples, S steps.
"""

from collections.abc import Generator
from collections.abc import Iterator
import concurrent.futures
import functools
import math
from typing import Any

import jax
from jax.sharding import PartitionSpec
import numpy as np

from train import mesh as mesh_lib
from train import partition
from train.data import faults
from train.data import records
from train.data import sources
from train.data import workers

# Splits up to this size live on the devices, and the step itself picks its
# examples: measured 1.1x of copying each batch, for an MLP on a CPU.
RESIDENT_BYTES = 256 * 2**20
_ORDERED_STEPS = 256  # Steps whose order is sent at once to a resident split.
_PREFETCH = 2
_STEPS = 2**31 - 1  # No run has more: a step is an int32.

ReaderError = workers.ReaderError
Arrays = dict[str, np.ndarray]
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
  split: sources.Split | records.Records,
  *,
  seed: int,
  batch_size: int,
  first_step: int,
  mesh: jax.sharding.Mesh,
  resident_bytes: int | None = None,
  num_workers: int = 0,
) -> Iterator[Batch]:
  """Endless batches from `first_step` on, for `select` inside the step.

  Closing the generator ends its threads and processes.

  Args:
    split: what to read.
    seed: of the order.
    batch_size: B.
    first_step: the number of the first batch, from 0.
    mesh: the devices they are sent to.
    resident_bytes: up to this size a split lives on them; None: RESIDENT_BYTES.
    num_workers: processes that decode Records; 0: threads of this one.

  Raises:
    UserError: by next, a record cannot be decoded.
    ReaderError: by next, a process that decodes them died.
  """
  order = Order(seed, len(split), batch_size)
  if _is_resident(split, jax.process_count(), resident_bytes):
    return _resident(split, order, first_step, mesh)
  read = functools.partial(_read, order, partition.rows(mesh, batch_size))
  batches = workers.arrays(split, read, first_step, _STEPS, num_workers)
  return _ahead(batches, mesh, batch_size)


def _is_resident(split, processes: int, resident_bytes: int | None) -> bool:
  if resident_bytes is None:
    resident_bytes = RESIDENT_BYTES
  return (
    isinstance(split, sources.Split)
    and split.nbytes <= resident_bytes
    and processes == 1  # Else each reads its own examples alone.
  )


def batch_shapes(
  split: sources.Split | records.Records,
  *,
  batch_size: int,
  mesh: jax.sharding.Mesh,
  processes: int,
) -> tuple[Any, int]:
  """What train_batches yields, as jax.ShapeDtypeStruct with its shardings.

  Args:
    split: what would be read.
    batch_size: B.
    mesh: the devices, which may be none of this machine.
    processes: how many have them.

  Returns:
    The shapes, and how many such batches are on the devices at once.
  """
  if not _is_resident(split, processes, None):
    rows = partition.batched(mesh)
    return {
      key: jax.ShapeDtypeStruct(
        (batch_size, *spec.shape), spec.dtype, sharding=rows
      )
      for key, spec in split.specs.items()
    }, 1 + _PREFETCH
  everywhere = partition.replicated(mesh)
  examples = {
    key: jax.ShapeDtypeStruct(
      (len(split), *spec.shape), spec.dtype, sharding=everywhere
    )
    for key, spec in split.specs.items()
  }
  order = jax.ShapeDtypeStruct(
    (_ORDERED_STEPS, batch_size),
    np.int32,
    sharding=partition.batched(mesh, axis=1),
  )
  first_step = jax.ShapeDtypeStruct((), np.int32, sharding=everywhere)
  return {'examples': examples, 'order': order, 'first_step': first_step}, 1


def select(batch: Batch, step: jax.Array) -> Batch:
  """The examples of `step` from what train_batches yields; runs in the step."""
  if 'order' not in batch:
    return batch
  places = batch['order'][step - batch['first_step']]
  # An example as one row is picked in half the time.
  return {
    key: array.reshape(len(array), -1)[places].reshape(-1, *array.shape[1:])
    for key, array in batch['examples'].items()
  }


def specs(batch: Batch) -> Any:
  """How the devices share what train_batches yields, as PartitionSpecs."""
  rows = PartitionSpec(mesh_lib.BATCH)
  if 'order' not in batch:
    return jax.tree.map(lambda _: rows, batch)
  return {
    'examples': jax.tree.map(lambda _: PartitionSpec(), batch['examples']),
    'order': PartitionSpec(None, mesh_lib.BATCH),
    'first_step': PartitionSpec(),
  }


def eval_batches(
  split: sources.Split | records.Records,
  batch_size: int,
  mesh: jax.sharding.Mesh,
  *,
  num_workers: int = 0,
) -> Iterator[Batch]:
  """Every example once, in order; 'mask' is False where the last is padded.

  And where an example is damaged, so that none counts in its place.

  Args, errors and closing are those of train_batches; `batch_size` must divide
  over the mesh.
  """
  rows = partition.rows(mesh, batch_size)
  read = functools.partial(_read_in_order, batch_size, rows)
  steps = math.ceil(len(split) / batch_size)
  batches = workers.arrays(split, read, 0, steps, num_workers)
  return _ahead(batches, mesh, batch_size)


def _read(order: Order, rows: np.ndarray, split, step: int) -> Arrays:
  return split.take(order.places(step)[rows])


def _read_in_order(
  batch_size: int, rows: np.ndarray, split, step: int
) -> Arrays:
  places = step * batch_size + rows
  within = np.minimum(places, len(split) - 1)
  batch = split.take(within)
  return batch | {
    'mask': (places < len(split)) & faults.are_whole(split, within)
  }


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


def _ahead(
  batches: Generator[Arrays], mesh, batch_size: int
) -> Iterator[Batch]:
  """Each batch read and sent by a thread, two steps ahead."""

  def fetch() -> Batch | None:
    batch = next(batches, None)
    return batch and partition.put_rows(batch, mesh, batch_size)

  reader = concurrent.futures.ThreadPoolExecutor(1)
  try:
    ahead = [reader.submit(fetch) for _ in range(_PREFETCH)]
    while True:
      ahead.append(reader.submit(fetch))
      batch = ahead.pop(0).result()
      if batch is None:
        return
      yield batch
  finally:
    reader.shutdown(cancel_futures=True)
    batches.close()
