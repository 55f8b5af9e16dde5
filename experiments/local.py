"""Several processes of one run on this machine, to try out what many would do.

Each is the same command with its place among them. On CPUs all have the devices
that the environment says (JAX_NUM_CPU_DEVICES=4); GPUs are divided evenly. TPU
chips of one machine belong to one process.
"""

import collections
from collections.abc import Sequence
import math
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

from experiments.search import devices
from train import config as config_lib
from train import signals

_POLL_SECONDS = 0.1
_HELD_SECONDS = 2
# For the others to end after one has: more than they take for their own line.
_ENDING_SECONDS = 30


class ChildError(Exception):
  """A process of the run was ended by a signal."""

  exit_code = 1


def launch(argv: Sequence[str], count: int):
  """Runs the launch command `argv` in `count` processes until all have ended.

  Process 0 speaks for itself; of the others come the lines of standard error,
  with their number. A signal goes to process 0, which stops all after saving.

  Raises:
    SystemExit: the exit code of the first process that failed.
    ChildError: that process was ended by a signal.
    Stopped: a signal ended all, before they could end by themselves.
    UserError: the GPUs cannot be divided.
  """
  words = _without_processes(argv)
  shares = _gpu_shares(count)
  address = f'127.0.0.1:{_free_port()}'
  children = [_start(words, address, count, i, shares[i]) for i in range(count)]
  errors = _Errors(children)
  try:
    failed, stopped = _wait(children, errors)
  finally:
    for child in children:
      child.kill()
      child.wait()
    errors.close()
  if failed is None:
    return
  code = children[failed].returncode
  if stopped is not None and code < 0:
    raise stopped
  if code < 0:
    raise ChildError(
      f'process {failed} of {count} was ended by {signal.Signals(-code).name}'
    )
  sys.exit(code)


def _wait(
  children: list[subprocess.Popen], errors: '_Errors'
) -> tuple[int | None, signals.Stopped | None]:
  """Waits for all; the first that failed, and what stopped them."""
  failed = stopped = end = None
  while any(child.poll() is None for child in children):
    time.sleep(_POLL_SECONDS)
    errors.show(before=time.monotonic() - _HELD_SECONDS)
    if stopped is None:
      try:
        signals.check('stopped')
      except signals.Stopped as error:
        stopped = error
        children[0].send_signal(error.signum)
    codes = [child.poll() for child in children]
    if failed is None:
      # One ended by a signal is the cause of the others' errors.
      failing = [i for i, code in enumerate(codes) if code]
      failed = min(failing, key=lambda i: codes[i], default=None)
      end = time.monotonic() + _ENDING_SECONDS
    elif time.monotonic() > end:
      break
  if failed is None:
    failed = next((i for i, c in enumerate(children) if c.returncode), None)
  return failed, stopped


def _start(
  words: list[str], address: str, count: int, index: int, gpus: str | None
) -> subprocess.Popen:
  environment = dict(os.environ)
  # The project, wherever the parent found it.
  root = str(pathlib.Path(__file__).parents[1])
  path = [root, *filter(None, [environment.get('PYTHONPATH')])]
  environment['PYTHONPATH'] = os.pathsep.join(path)
  if gpus is not None:
    environment['CUDA_VISIBLE_DEVICES'] = gpus
  return subprocess.Popen(
    [
      sys.executable,
      '-c',
      'from experiments import command, launch, local; local.tie_to_parent(); '
      "command.start('launch', launch.main)",
      *words,
      f'--coordinator={address}',
      f'--num_processes={count}',
      f'--process_id={index}',
    ],
    stdin=subprocess.PIPE,  # Closes with the parent, however that ends.
    stdout=None if index == 0 else subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    env=environment,
    start_new_session=True,  # Ctrl-C goes to the parent alone.
  )


def tie_to_parent():
  """This process, a child, ends when the parent does, however that ends."""

  def end_with_it():
    while os.read(0, 1):  # Nothing comes but the end.
      pass
    os._exit(1)

  threading.Thread(target=end_with_it, daemon=True).start()
  signals.silence()  # The parent has said it.


class _Errors:
  """The processes' standard error, where what all of them say comes once.

  The others' lines are held for a while, in case process 0 says the same.
  """

  def __init__(self, children: list[subprocess.Popen]):
    self._held: collections.deque[tuple[float, int, bytes]]
    self._held = collections.deque()
    self._said: set[bytes] = set()
    self._readers = [
      threading.Thread(target=self._read, args=(i, child), daemon=True)
      for i, child in enumerate(children)
    ]
    for reader in self._readers:
      reader.start()

  def _read(self, index: int, child: subprocess.Popen):
    for line in child.stderr:
      if index:
        self._held.append((time.monotonic(), index, line))
      else:
        self._said.add(line)
        os.write(2, line)

  def show(self, before: float = math.inf):
    """Shows the others' lines that came before then."""
    while self._held and self._held[0][0] < before:
      _, index, line = self._held.popleft()
      if line not in self._said:
        self._said.add(line)
        os.write(2, f'process {index}: '.encode() + line)

  def close(self):
    """Shows the rest; the processes have ended."""
    for reader in self._readers:
      reader.join(5)
    self.show()


def _without_processes(argv: Sequence[str]) -> list[str]:
  """The words but for --processes=N, or --processes N."""
  words, rest = [], list(argv)
  while rest:
    word = rest.pop(0)
    if word.lstrip('-') == 'processes':
      rest.pop(0)
    elif word.lstrip('-').partition('=')[0] != 'processes':
      words.append(word)
  return words


def _free_port() -> int:
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    return probe.getsockname()[1]


def _gpu_shares(count: int) -> list[str | None]:
  """CUDA_VISIBLE_DEVICES of each process; None where there are no GPUs.

  Raises:
    UserError: they cannot be divided evenly.
  """
  if os.environ.get('JAX_PLATFORMS', '').startswith('cpu'):
    return [None] * count
  gpus = devices.visible_gpus()
  if len(gpus) % count:
    raise config_lib.UserError(
      f'--processes is {count}, which cannot share {len(gpus)} '
      f'GPU{"s" * (len(gpus) > 1)} evenly; JAX_PLATFORMS=cpu leaves GPUs out'
    )
  each = len(gpus) // count
  if not each:
    return [None] * count
  return [','.join(gpus[i * each : (i + 1) * each]) for i in range(count)]
