"""Batches of records, decoded ahead by Grain in threads or processes."""

from collections.abc import Callable
from collections.abc import Generator
import dataclasses
import gc
import multiprocessing
from multiprocessing import resource_tracker
import os
import signal
import threading

from absl import flags
import jax
import numpy as np

from train.data import records
from train.data import sources

Arrays = dict[str, np.ndarray]


def arrays(
  split, read: Callable[..., Arrays], first: int, end: int, num_workers: int
) -> Generator[Arrays]:
  """read(split, step) for every step from `first` to `end`, in order.

  Records are decoded ahead by Grain: in each worker process every
  num_workers-th step, so that the batches are the same for any number.
  """
  if isinstance(split, sources.Split):
    for step in range(first, end):
      yield read(split, step)
    return
  import grain  # Takes a second, and large sets alone need it.

  if num_workers:  # Each has one thread, else one a core.
    split = dataclasses.replace(split, threads=1)
  steps = grain.MapDataset.source(_Steps(split, read, end))[first:]
  batches = steps.to_iter_dataset(
    grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
  )
  if num_workers:
    if not flags.FLAGS.is_parsed():  # Grain reads its own when it starts.
      flags.FLAGS.mark_as_parsed()
    _hold_signals()
    batches = batches.mp_prefetch(
      grain.MultiprocessingOptions(min(num_workers, end - first)),
      worker_init_fn=_start_worker,
    )
  iterator = iter(batches)
  try:
    for batch in iterator:
      # A worker's arrays lie in shared memory, which jax would hold on to.
      yield {key: np.array(array) for key, array in batch.items()}
  finally:
    iterator.close()
    # Grain's iterators refer to themselves, and to their last batches.
    del iterator
    gc.collect()


@dataclasses.dataclass(frozen=True)
class _Steps:
  """Batches by their step, as Grain asks for them; sent to the workers."""

  split: records.Records
  read: Callable[..., Arrays]
  end: int

  def __len__(self) -> int:
    return self.end

  def __getitem__(self, step: int) -> Arrays:
    return self.read(self.split, step)


def _hold_signals():
  """Leaves Ctrl-C and SIGTERM to the other threads, of which main is one.

  Threads and processes that this one starts inherit it: workers end when they
  are closed, or their parent dies, and not with a traceback each.
  """
  resource_tracker.ensure_running()  # Where it starts later, it undoes this.
  if hasattr(signal, 'pthread_sigmask'):  # Not on Windows.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})


def _start_worker(index: int, count: int):
  """Runs first in a worker: no accelerator for it, and no life of its own."""
  del index, count
  jax.config.update('jax_platforms', 'cpu')  # Grain imports jax.

  def follow():
    multiprocessing.parent_process().join()
    os._exit(1)

  threading.Thread(target=follow, daemon=True).start()
