"""Several processes that train one model together; by default there is one.

Each runs the same program on its own devices. Process 0 alone writes and
speaks. What one of them finds wrong ends all of them.
"""

import atexit
from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import dataclasses
import os
import socket
import sys
from typing import TypeVar

from train import config as config_lib
from train import hub as hub_lib
from train import link as link_lib

ProcessError = link_lib.ProcessError
T = TypeVar('T')

_link: link_lib.Link | None = None
_has_begun = False  # All are here, and from now on do the same.


@dataclasses.dataclass(frozen=True)
class Place:
  """Which process this is.

  Attributes:
    coordinator: HOST:PORT at which process 0 listens.
    count: of processes.
    index: of this one.
    devices: which of the local GPUs are its own; None: all.
  """

  coordinator: str
  count: int
  index: int
  devices: tuple[int, ...] | None = None


def detect() -> Place:
  """This process's place, as Slurm, Kubernetes, a TPU pod or Open MPI tells.

  As jax detects it. Under Slurm and Open MPI each process takes one GPU, that
  of its number on its machine, unless JAX_LOCAL_DEVICE_IDS says which.

  Raises:
    UserError: there is no such cluster, or it does not tell.
  """
  from jax._src import clusters  # Not public; the same in jax 0.10 to 0.12.

  ids = os.environ.get('JAX_LOCAL_DEVICE_IDS')
  detect_unset = clusters.ClusterEnv.auto_detect_unset_distributed_params
  try:
    coordinator, count, index, devices = detect_unset(
      os.environ.get('JAX_COORDINATOR_ADDRESS'),
      None,
      None,
      ids and tuple(map(int, ids.split(','))),
      None,
      60,
    )
  except Exception as error:  # Of a cluster's own libraries.
    raise config_lib.UserError(
      f'--coordinator=auto: {config_lib.first_line(error)}'
    ) from None
  if None in (coordinator, count, index):
    raise config_lib.UserError(
      '--coordinator=auto finds no Slurm, Kubernetes, TPU pod or Open MPI; '
      'write --coordinator=HOST:PORT --num_processes=N --process_id=I'
    )
  return Place(coordinator, count, index, devices and tuple(devices))


def address(coordinator: str) -> tuple[str, int]:
  """The host and the port in HOST:PORT.

  Raises:
    UserError: it is not of that form.
  """
  host, _, port = coordinator.rpartition(':')
  if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
    raise config_lib.UserError(
      f'--coordinator is {coordinator!r}; it takes auto or HOST:PORT, where '
      'process 0 listens'
    )
  return host.strip('[]'), int(port)


# ------------------------------------------------------------ begin and end


@contextlib.contextmanager
def joined(
  place: Place | None,
  *,
  seconds: float = 300,
  name: str = 'launch',
  between: Callable[[], None] = lambda: None,
) -> Iterator[None]:
  """Joins the other processes for the block; jax then has all their devices.

  After the block this process is to end: jax's own good-bye, which waits for
  processes that may be gone, is left out.

  Args:
    place: which process this is; None or one of one: nothing happens.
    seconds: how long this process waits for the others, here and later.
    name: of the command, for the line that ends it when another has gone.
    between: called while waiting; may raise to stop.

  Raises:
    UserError: process 0 cannot listen at the address.
    ProcessError: another process did not come; it is named.
  """
  if place is None or place.count == 1:
    yield
    return
  if _link is not None:
    raise RuntimeError('this process has joined others already')
  try:
    _join(place, seconds, name, between)
    yield
  except BaseException as error:
    _leave(error)
    raise
  _leave(None)


def _join(place: Place, seconds: float, name: str, between):
  global _link, _has_begun
  host, port = address(place.coordinator)
  service = ''
  if place.index == 0:
    try:
      server = hub_lib.listen(host, port)
    except OSError as error:
      raise config_lib.UserError(
        f'--coordinator is {place.coordinator}, where process 0 cannot listen: '
        f'{os.strerror(error.errno)}'
      ) from None
    connection = hub_lib.Hub(server, place.count, seconds).start()
    service = str(_free_port(server))
  else:
    try:
      connection = link_lib.connect(host, port, seconds, between)
    except OSError as error:
      raise ProcessError(
        f'process 0 of {place.count} did not answer at {place.coordinator} '
        f'within {seconds:g} s ({error.strerror or error}); this is process '
        f'{place.index}, and --process_timeout says how long to wait'
      ) from None
  _link = link_lib.Link(
    connection, place.index, place.count, seconds=seconds, name=name
  )
  port = int(_link.gather('start', service, between=between)[0])

  import jax

  # Stopping is agreed on by `agree_to_stop`: jax's service takes SIGTERM away
  # from train/signals.py, and knows neither Ctrl-C nor a second signal.
  jax.config.update('jax_enable_preemption_service', False)
  _mute_gloo()
  at = {}
  if place.index == 0:
    at['coordinator_bind_address'] = f'{_bound(server)}:{port}'
    host = '127.0.0.1' if server.family == socket.AF_INET else '[::1]'
  else:
    host, port = '127.0.0.1', link_lib.relay(host, port)
  jax.distributed.initialize(
    f'{host}:{port}',
    place.count,
    place.index,
    local_device_ids=place.devices,
    cluster_detection_method='deactivate',
    initialization_timeout=int(seconds) + 1,
    # Who has gone is the link's to say, first.
    heartbeat_timeout_seconds=10 * int(seconds) + 60,
    **at,
  )
  _has_begun = True


def _bound(server: socket.socket) -> str:
  host = server.getsockname()[0]
  return f'[{host}]' if ':' in host else host


def _free_port(server: socket.socket) -> int:
  """A port for jax's service, next to `server`."""
  with socket.socket(server.family) as probe:
    probe.bind((server.getsockname()[0], 0))
    return probe.getsockname()[1]


def _mute_gloo():
  """Gloo, between CPUs, tells C++'s standard output of every connection."""
  sys.stdout.flush()
  sys.stdout = os.fdopen(
    os.dup(1),
    'w',
    buffering=1,
    encoding=sys.stdout.encoding,
    errors=sys.stdout.errors,
  )
  with open(os.devnull, 'w') as nowhere:
    os.dup2(nowhere.fileno(), 1)


_AGREED = (2, 75, 130)  # Exit codes of what all processes do together.
_VERDICT_SECONDS = 3  # Until the link hears of a death that a collective met.
_ENDING_SECONDS = 15  # More than the link's grace.
_PARTING_SECONDS = 1


def _leave(error: BaseException | None):
  """Tells the others how this process ends, and waits until they do."""
  if _link is None:
    return
  code, text = 0, ''
  if error is not None:
    code = getattr(error, 'exit_code', None)
    text = config_lib.first_line(error)
    if code is None:
      code, text = 1, f'{type(error).__name__}: {text}'
    # Collectives, of which saving has some, fail where another process has.
    if code not in _AGREED and not isinstance(error, ProcessError):
      failure = _link.failed_elsewhere(text, _VERDICT_SECONDS)
      if failure is not None:
        _leave(failure)
        raise failure from None
  wait = _ENDING_SECONDS if code else _link.seconds
  if isinstance(error, ProcessError):  # All know of it, or never will.
    wait = _PARTING_SECONDS
  _link.end(code, text, wait)

  def exit_at_once():
    for stream in (sys.stdout, sys.stderr):
      with contextlib.suppress(OSError, ValueError):
        stream.flush()
    os._exit(code)

  atexit.register(exit_at_once)


# ------------------------------------------------------------ all processes


def count() -> int:
  """How many processes train together."""
  return _link.count if _link else 1


def index() -> int:
  """Which of them this is, from 0."""
  return _link.index if _link else 0


def is_main() -> bool:
  """Whether this is the process that writes and speaks."""
  return index() == 0


def gather(name: str, text: str = '') -> list[str]:
  """What every process says under `name`, in their order; waits for all.

  Raises:
    ProcessError: some did not come in time; it names them.
  """
  return _link.gather(name, text) if _link else [text]


def barrier(name: str, seconds: float | None = None):
  """Waits until every process is here, by default as long as for anything.

  Raises:
    ProcessError: some did not come in time; it names them.
  """
  if _link is not None:
    _link.gather(name, '', seconds=seconds)


def agree(name: str, act: Callable[[], T]) -> T:
  """act(), in every process; what is wrong in one is wrong in all.

  Raises:
    UserError: that of the first process that had one.
    ProcessError: some did not come in time; it names them.
  """
  result, wrong = None, ''
  try:
    result = act()
  except config_lib.UserError as error:
    if _link is None:
      raise
    wrong = str(error)
  for process, text in enumerate(gather(name, wrong)):
    if text:
      where = f'process {process}: ' if process else ''
      raise config_lib.UserError(where + text)
  return result


def check_same(what: str, text: str):
  """Raises UserError unless every process gives the same text."""
  texts = gather(what, text)
  differing = [i for i, other in enumerate(texts) if other != texts[0]]
  if differing:
    raise config_lib.UserError(
      f'{what} differs between process 0 and {link_lib.names(differing)}'
    )


def agree_to_stop(asked: int | None) -> int | None:
  """The signal that any process received, once all are at the same call.

  To be called the same number of times in every process.
  """
  return _link.agree_to_stop(asked) if _link and _has_begun else asked
