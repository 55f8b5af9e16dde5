"""Ctrl-C and SIGTERM as a flag that long work looks at between its parts.

The first signal asks for a checkpoint and a clean end; a second one stops at
once, as if nobody had listened.
"""

import atexit
from collections.abc import Iterator
import contextlib
import os
import signal
import sys
import threading

from train import processes

_EXIT_CODES = {signal.SIGTERM: 75, signal.SIGINT: 130}
_received: int | None = None
_listening = False
_speaks = True


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

  def receive(signum, frame):
    del frame
    global _received
    # os.write: print is not safe inside a signal handler.
    if _received is not None:
      if sys.stdout.isatty():  # The cursor, which a progress bar hides.
        os.write(sys.stdout.fileno(), b'\x1b[?25h')
      os.write(2, b'stopped at once\n')
      os._exit(_EXIT_CODES[signum])
    _received = signum
    if _speaks:
      os.write(2, b'stopping after saving; once more stops at once\n')

  _listening, _received = True, None
  if until_exit:
    atexit.register(_ignore)  # Before any library's, so it is called last.
  try:
    for signum in _EXIT_CODES:
      signal.signal(signum, receive)
    yield
  finally:
    if not until_exit:
      _listening, _received = False, None
      for signum, handler in before.items():
        signal.signal(signum, handler)


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
