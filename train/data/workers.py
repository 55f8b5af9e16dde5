"""Batches of records, decoded ahead by Grain in threads or processes."""

import atexit
from collections.abc import Callable
from collections.abc import Generator
import concurrent.futures
import contextlib
import dataclasses
import gc
import multiprocessing
from multiprocessing import resource_tracker
import os
import re
import signal
import threading
from typing import Any

from absl import flags
import jax
import numpy as np

from train import processes as processes_lib
from train import progress
from train.data import records
from train.data import sources

_NEWS = 'news'  # Beside a batch's arrays: what its reader found damaged.
_MOST_DEATHS = 3  # One after the other, without a batch between them.
_MOST_SECONDS = 60  # That Grain may need to end after a death.
_GRAIN = 'grain'  # So the names of its processes begin.
_DEATH = re.compile(r'terminated unexpectedly with exit code (-?\d+)')

Arrays = dict[str, np.ndarray]


class ReaderError(Exception):
  """A worker process died; what has been trained can be saved."""

  exit_code = 1


class SharedReaderError(Exception):
  """As ReaderError, of one of several processes, which save together alone."""

  exit_code = 1


class _Died(Exception):  # noqa: N818 - what happened to a worker process
  """Its text says how."""


def arrays(
  split, read: Callable[..., Arrays], first: int, end: int, num_workers: int
) -> Generator[Arrays]:
  """read(split, step) for every step from `first` to `end`, in order.

  Records are decoded ahead by Grain: in each worker process every
  num_workers-th step, so that the batches are the same for any number. Where a
  process dies and damage is passed over, all are started again.

  Raises:
    UserError: by next, that of `read`.
    ReaderError: by next, a worker process died.
  """
  if isinstance(split, sources.Split):
    for step in range(first, end):
      yield read(split, step)
    return
  deaths = 0
  while first < end:
    try:
      with contextlib.closing(
        _stream(split, read, first, end, num_workers)
      ) as batches:
        for batch in batches:
          yield batch
          first, deaths = first + 1, 0
    except _Died as death:
      deaths += 1
      if split.faults is None:
        raise _error(
          f'{death}; the same command goes on from the last checkpoint, and '
          "config.data.on_error='skip' starts readers again"
        ) from None
      if deaths > _MOST_DEATHS:
        line = f'{death}, {deaths} times before a batch came'
        raise _error(line) from None
      progress.say(f"config.data.on_error is 'skip': {death}; they start again")


def _stream(
  split, read: Callable[..., Arrays], first: int, end: int, num_workers: int
) -> Generator[Arrays]:
  """The batches, as long as every worker process lives.

  Raises:
    _Died: one does not.
  """
  import grain  # Takes a second, and large sets alone need it.

  # Worker processes have one thread each, else there is one a core.
  its_split = dataclasses.replace(split, threads=1) if num_workers else split
  steps = grain.MapDataset.source(_Steps(its_split, read, end))[first:]
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
  iterator, processes = iter(batches), set()
  try:
    while (batch := _next(iterator, processes, num_workers)) is not None:
      # A worker's arrays lie in shared memory, which jax would hold on to.
      batch = {key: np.array(array) for key, array in batch.items()}
      news = batch.pop(_NEWS, None)
      if news is not None:
        split.faults.hear(news.tobytes().decode())
      yield batch
  finally:
    _watched(iterator.close, processes) if num_workers else iterator.close()
    # Grain's iterators refer to themselves, and to their last batches.
    del iterator
    gc.collect()


def _next(iterator, processes: set, num_workers: int) -> Arrays | None:
  """The next batch, None after the last.

  Raises:
    _Died: the process that was to read it has.
  """
  if not num_workers:
    return next(iterator, None)
  try:
    return _watched(lambda: next(iterator, None), processes)
  except RuntimeError as error:  # Grain's, which looks each second.
    code = _DEATH.search(str(error))
    if code is None:
      raise
    raise _Died(
      f'a process that reads the data died with code {_named(int(code[1]))}'
    ) from None


def _watched(call: Callable[[], Any], processes: set) -> Any:
  """call(), which is not waited for long once a worker process has died.

  Where it died with a lock in its hand, Grain would wait for that forever.

  Args:
    call: into Grain.
    processes: the worker processes that were seen, to which more are added.

  Raises:
    ReaderError: it does not return.
  """
  done = concurrent.futures.Future()

  def run():
    try:
      done.set_result(call())
    except BaseException as error:
      done.set_exception(error)

  # Unlike a pool's, such a thread does not keep Python from ending.
  threading.Thread(target=run, daemon=True).start()
  left = _MOST_SECONDS
  while not concurrent.futures.wait([done], 1).done:
    processes |= set(multiprocessing.active_children())
    codes = [p.exitcode for p in processes if p.name.startswith(_GRAIN)]
    left -= any(codes)
    if left <= 0:
      # Grain would wait again when Python ends.
      atexit.register(os._exit, ReaderError.exit_code)
      raise _error(
        'a process that reads the data died with code '
        f'{_named(next(filter(None, codes)))}, and the others do not answer; '
        'the same command goes on from the last checkpoint'
      )
  return done.result()


def _error(text: str) -> Exception:
  kind = ReaderError if processes_lib.count() == 1 else SharedReaderError
  return kind(text)


def _named(code: int) -> str:
  """'-9 (SIGKILL, as where memory is short)', or '1'."""
  if code >= 0:
    return str(code)
  try:
    name = signal.Signals(-code).name
  except ValueError:
    return str(code)
  short = ', as where memory is short' if name == 'SIGKILL' else ''
  return f'{code} ({name}{short})'


@dataclasses.dataclass(frozen=True)
class _Steps:
  """Batches by their step, as Grain asks for them; sent to the workers."""

  split: records.Records
  read: Callable[..., Arrays]
  end: int

  def __len__(self) -> int:
    return self.end

  def __getitem__(self, step: int) -> Arrays:
    batch = self.read(self.split, step)
    # In a worker process; elsewhere it has been said.
    news = self.split.faults.news() if self.split.faults is not None else ''
    return batch | ({_NEWS: _as_bytes(news)} if news else {})


def _as_bytes(text: str) -> np.ndarray:
  return np.frombuffer(text.encode(), np.uint8)


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
