"""Where the runs of a sweep are started: the door, and this machine behind it.

A launcher has `slots`, the places for runs side by side, and `start`, which
begins a command in one of them and returns a job. What a job must do is what
`Process` does: `poll` gives its exit code once it has ended, `stop` asks it to
save and end, `kill` ends it at once. When the sweep's process ends, however
that happens, so do its jobs; `close` gives everything back.
"""

from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import contextlib
import os
import pathlib
import platform
import signal
import subprocess
import sys
from typing import Protocol

from experiments.search import devices
from train import workdir as workdir_lib
from train.data import cache

ROOT = pathlib.Path(__file__).parents[2]
_CACHE_BYTES = 2**31  # What was used least recently goes.


class Job(Protocol):
  """A command that was started."""

  def poll(self) -> int | None:
    """Its exit code; None while it runs."""

  def stop(self):
    """Asks it to save and to end."""

  def kill(self):
    """Ends it at once, and waits until its devices are free."""


class Launcher(Protocol):
  """Starts commands, each in a slot."""

  slots: Sequence[devices.Slot]

  def start(
    self, words: Sequence[str], log: pathlib.Path, slot: devices.Slot
  ) -> Job:
    """Begins `python -m experiments.launch WORDS`; its output goes to `log`."""

  def close(self):
    """No job is left; gives everything back."""


class Local:
  """Processes of this machine."""

  def __init__(self, slots: Sequence[devices.Slot]):
    self.slots = slots

  def start(
    self, words: Sequence[str], log: pathlib.Path, slot: devices.Slot
  ) -> Job:
    """As Launcher.start."""
    return Process(words, log, slot)

  def close(self):
    """As Launcher.close."""


class Process:
  """A launch in a child process, bound to its slot; it dies with this one."""

  def __init__(
    self, words: Sequence[str], log: pathlib.Path, slot: devices.Slot
  ):
    with workdir_lib.writing(log):
      file = log.open('ab')
    with file, _bound(slot.cores):
      self._process = subprocess.Popen(
        [
          sys.executable,
          '-c',
          'from experiments import command, launch, local; '
          "local.tie_to_parent(); command.start('launch', launch.main)",
          *words,
        ],
        stdin=subprocess.PIPE,  # Closes with the parent, however that ends.
        stdout=file,
        stderr=subprocess.STDOUT,
        env=environment(os.environ, slot),
        start_new_session=True,  # Ctrl-C goes to the parent alone.
      )

  def poll(self) -> int | None:
    """As Job.poll; below 0 for the signal that ended it."""
    return self._process.poll()

  def stop(self):
    """As Job.stop."""
    self._process.send_signal(signal.SIGTERM)

  def kill(self):
    """As Job.kill."""
    self._process.kill()
    self._process.wait()


def environment(
  before: Mapping[str, str], slot: devices.Slot
) -> dict[str, str]:
  """What a run in `slot` is given: its devices, the project, a warm compiler.

  Programs that one run compiled are read by the others, of this sweep and the
  next. What XLA makes of a program depends on the machine and on the number of
  its cores, so each has a folder; one that the user names is left alone.
  """
  path = [str(ROOT), *filter(None, [before.get('PYTHONPATH')])]
  found = dict(before) | dict(slot.environment)
  found['PYTHONPATH'] = os.pathsep.join(path)
  if 'JAX_COMPILATION_CACHE_DIR' not in found:
    cores = len(slot.cores or ()) or os.cpu_count()
    name = f'{platform.node()}-{cores}'
    found |= {
      'JAX_COMPILATION_CACHE_DIR': str(cache.root() / 'compiled' / name),
      'JAX_COMPILATION_CACHE_MAX_SIZE': str(_CACHE_BYTES),
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    }
  return found


@contextlib.contextmanager
def _bound(cores: tuple[int, ...] | None) -> Iterator[None]:
  """In the block new processes are bound to these CPU cores."""
  if cores is None or not hasattr(os, 'sched_setaffinity'):
    yield
    return
  before = os.sched_getaffinity(0)
  os.sched_setaffinity(0, cores)  # What a process inherits.
  try:
    yield
  finally:
    os.sched_setaffinity(0, before)
