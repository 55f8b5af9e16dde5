"""Ctrl-C and SIGTERM as a flag that long work looks at between its parts.

The first signal asks for a checkpoint and a clean end; a second one stops at
once, as if nobody had listened. A thread of its own hears them: Python's
handlers run in the main thread alone, and not while that is in the compiler.
"""

import atexit
from collections.abc import Iterator
import contextlib
import os
import select
import signal
import sys
import threading

from train import processes

_EXIT_CODES = {signal.SIGTERM: 75, signal.SIGINT: 130}
_received: int | None = None
_listening = False
_speaks = True
_most_seconds: float | None = None
_lock = threading.RLock()


class Stopped(Exception):  # noqa: N818 - what happened, not an error
  """Work ended early because a signal asked for it.

  Attributes:
    exit_code: 75 for SIGTERM, 130 for Ctrl-C.
    signum: which of the two.
  """

  def __init__(self, message: str, signum: int):
    super().__init__(message)
    self.exit_code = _EXIT_CODES[signum]
    self.signum = signum


@contextlib.contextmanager
def listen(*, until_exit: bool = False) -> Iterator[None]:
  """Holds the first signal for `check` while the block runs.

  A second signal ends the process at once. Does nothing inside another
  `listen`, or off the main thread.

  Args:
    until_exit: after the block the process ends, and no signal may change its
      exit code any more: Python's teardown restores the default handlers, so
      that one in these tenths of a second would kill a run that has finished.
  """
  global _listening, _received
  if _listening or threading.current_thread() is not threading.main_thread():
    yield
    return
  before = {s: signal.getsignal(s) for s in _EXIT_CODES}
  heard, told = os.pipe()
  os.set_blocking(told, False)
  _listening, _received = True, None
  if until_exit:
    atexit.register(_ignore)  # Before any library's, so it is called last.
  hearing = threading.Thread(target=_hear, args=(heard,), daemon=True)
  hearing.start()
  told_before = signal.set_wakeup_fd(told)
  try:
    for signum in _EXIT_CODES:
      signal.signal(signum, lambda signum, frame: _receive(signum))
    yield
  finally:
    if not until_exit:
      for signum, handler in before.items():
        signal.signal(signum, handler)
      signal.set_wakeup_fd(told_before)
      os.close(told)
      hearing.join()  # Or what it heard last would be the next block's.
      _listening, _received = False, None


def _receive(signum: int):
  """Keeps the first signal; says so, in whichever thread hears it first."""
  global _received
  with _lock:
    if _received is None:
      _received = signum
      if _speaks:
        os.write(2, b'stopping after saving; once more stops at once\n')


def _hear(pipe: int):
  """Reads the numbers of all signals as they come."""
  first = left = None
  while select.select([pipe], [], [], left)[0]:
    number = os.read(pipe, 1)
    if not number:  # Nobody listens any more.
      os.close(pipe)
      return
    signum = number[0]
    if signum not in _EXIT_CODES:
      continue
    if first is not None:
      _stop_at_once('stopped at once', signum)
    _receive(signum)
    first, left = signum, _most_seconds
  _stop_at_once(
    f'stopped at once: not at an end {left:g} s after the signal; what was '
    'saved before stands',
    first,
  )


def _stop_at_once(message: str, signum: int):
  if sys.stdout.isatty():  # The cursor, which a progress bar hides.
    os.write(sys.stdout.fileno(), b'\x1b[?25h')
  os.write(2, f'{message}\n'.encode())
  os._exit(_EXIT_CODES[signum])


def end_within(seconds: float | None):
  """The process ends so long after the first signal, whatever it is doing."""
  global _most_seconds
  _most_seconds = seconds


def silence():
  """The first signal is heard without a word, which a parent has said."""
  global _speaks
  _speaks = False


def _ignore():
  for signum in _EXIT_CODES:
    signal.signal(signum, signal.SIG_IGN)


def check(message: str):
  """Raises Stopped(message) if a signal has come, to this process or another.

  Several processes must all come here equally often: they stop together.
  """
  signum = processes.agree_to_stop(_received)
  if signum is not None:
    raise Stopped(message, signal.Signals(signum))
