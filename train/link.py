"""A process's connection to the hub: who is there, and what all say."""

from collections.abc import Callable
import contextlib
import json
import os
import socket
import sys
import threading
import time

from train import hub

_GRACE_SECONDS = 5  # To end by itself, after another has ended in an error.
_RETRY_SECONDS = 0.2


class ProcessError(Exception):
  """Another process of this run is missing, gone, or failed."""

  exit_code = 1


def connect(
  host: str, port: int, seconds: float, between: Callable[[], None]
) -> socket.socket:
  """A connection to process 0, which may come later than we do.

  Raises:
    OSError: it did not answer within `seconds`.
  """
  end = time.monotonic() + seconds
  while True:
    between()
    try:
      connection = socket.create_connection((host, port), timeout=5)
    except OSError:
      if time.monotonic() > end:
        raise
      time.sleep(_RETRY_SECONDS)
    else:
      connection.settimeout(None)
      hub.notice_lost_machines(connection)
      return connection


def relay(host: str, port: int) -> int:
  """A local port that leads to host:port, and stays open when that closes.

  jax's client ends the process where it sees its service go. Behind this it
  sees silence, and our own line comes first.
  """
  server = socket.create_server(('127.0.0.1', 0))

  def pump(source: socket.socket, sink: socket.socket):
    try:
      while data := source.recv(1 << 16):
        sink.sendall(data)
    except OSError:
      pass  # Silence, as if nothing more had come.

  def serve():
    while True:
      client, _ = server.accept()
      try:
        service = socket.create_connection((host, port))
      except OSError:
        client.close()  # jax tries again.
        continue
      for pair in ((client, service), (service, client)):
        threading.Thread(target=pump, args=pair, daemon=True).start()

  threading.Thread(target=serve, daemon=True).start()
  return server.getsockname()[1]


class Link:
  """One process's end of its connection."""

  def __init__(
    self,
    connection: socket.socket,
    index: int,
    count: int,
    *,
    seconds: float,
    name: str,
  ):
    """Says hello.

    Args:
      connection: to process 0's hub.
      index: of this process.
      count: of processes.
      seconds: how long this process waits for the others.
      name: the command's, which begins the line that may end this process.
    """
    self.index = index
    self.count = count
    self.seconds = seconds
    self._connection = connection
    self._name = name
    self._changed = threading.Condition()
    self._said: dict[str, list[str]] = {}
    self._failed: dict[str, str] = {}  # Name -> why it cannot be said by all.
    self._ended: dict[int, tuple[int, str]] = {}
    self._has_ended = False
    self._calls = 0  # Of `agree_to_stop`.
    self._stop: int | None = None
    self._stop_at: int | None = None
    self._is_stopping = False
    self._heard = time.monotonic()
    self._send(hello=index, of=count)
    for run in (self._listen, self._live):
      threading.Thread(target=run, daemon=True).start()

  def gather(
    self,
    name: str,
    text: str,
    *,
    seconds: float | None = None,
    between: Callable[[], None] = lambda: None,
  ) -> list[str]:
    """What each process says to `name`, by their order; waits for all.

    Args:
      name: one that no other thread waits with.
      text: what this process says.
      seconds: how long to wait; None: as long as this process waits for others.
      between: called while waiting; may raise to stop.

    Raises:
      ProcessError: some did not come in time; it names them.
    """
    seconds = seconds or self.seconds
    end = time.monotonic() + seconds + _GRACE_SECONDS
    self._send(say=name, text=text, seconds=seconds)
    while True:
      between()
      with self._changed:
        if name in self._said:
          return self._said.pop(name)
        if name in self._failed:
          raise ProcessError(self._failed[name])
        self._changed.wait(_RETRY_SECONDS)
      if time.monotonic() > end:
        raise ProcessError(f'process 0 does not answer (at {name!r})')

  def agree_to_stop(self, asked: int | None) -> int | None:
    """What one process was asked, at the same call of this in all of them.

    Devices are sent steps ahead, so that the processes are at different calls
    when they learn of it: they stop at the call after that of the foremost.

    Args:
      asked: the signal that this process received, if any.

    Returns:
      The signal, at that call.
    """
    with self._changed:
      if asked is not None and self._stop is None:
        self._stop = asked
        self._send(stop=asked)
      end = time.monotonic() + self.seconds + _GRACE_SECONDS
      while self._stop is not None and self._stop_at is None:
        self._changed.wait(_RETRY_SECONDS)
        if 'stop' in self._failed:
          raise ProcessError(self._failed['stop'])
        if time.monotonic() > end:
          raise ProcessError('process 0 does not answer (when to stop)')
      self._calls += 1
      return self._stop if self._calls == self._stop_at else None

  def failed_elsewhere(self, text: str, seconds: float) -> ProcessError | None:
    """What else than `text` another process ended in, within `seconds`.

    Where it has gone without a word, this process does not return from here.
    """
    end = time.monotonic() + seconds
    with self._changed:
      while time.monotonic() < end:
        for process, (code, other) in self._ended.items():
          if code:
            return None if other == text else _failure(process, code, other)
        self._changed.wait(_RETRY_SECONDS)
    return None

  def end(self, code: int, text: str, seconds: float):
    """Says that this process ends; waits until all have, or for `seconds`."""
    end = time.monotonic() + seconds
    with self._changed:
      self._has_ended = True  # From here on nothing ends this process early.
      self._send(end=code, text=text)
      while len(self._ended) < self.count and time.monotonic() < end:
        self._changed.wait(_RETRY_SECONDS)

  def _send(self, **message):
    # Where it fails the listener knows, and says so.
    with self._changed, contextlib.suppress(OSError):
      self._connection.sendall(hub.line(**message))

  def _live(self):
    while True:
      time.sleep(hub.ALIVE_SECONDS)
      with self._changed, contextlib.suppress(OSError):
        self._connection.sendall(b'\n')
      silence = max(self.seconds, hub.SILENT_SECONDS)
      if time.monotonic() - self._heard > silence:
        self._fall(self._gone(0))

  def _listen(self):
    try:
      with self._connection.makefile('rb') as lines:
        for line in lines:
          self._heard = time.monotonic()
          if line.strip():
            self._handle(json.loads(line))
    except (OSError, ValueError):
      pass
    with self._changed:  # Without process 0 nobody hears of anybody.
      code, text = self._ended.get(0, (1, ''))
      for process in range(self.count):
        self._ended.setdefault(process, (1, ''))
      self._changed.notify_all()
      self._fall(_failure(0, code, text) if text else self._gone(0), code)

  def _handle(self, message: dict):
    if 'refused' in message:
      self._fall(message['refused'])
    elif 'gone' in message:
      with self._changed:
        self._ended[message['gone']] = (1, '')
        self._changed.notify_all()
        self._fall(self._gone(message['gone']))
    elif 'ended' in message:
      process, code = message['ended'], message['code']
      with self._changed:
        self._ended[process] = (code, message['text'])
        self._changed.notify_all()
      if code:
        error = _failure(process, code, message['text'])
        timer = threading.Timer(_GRACE_SECONDS, self._fall, (error, code))
        timer.daemon = True
        timer.start()
    else:
      with self._changed:
        if 'stop' in message:
          if not self._is_stopping:  # The first that the hub had, for all.
            self._is_stopping, self._stop = True, message['stop']
            self._send(say='stop', text=str(self._calls), seconds=self.seconds)
        elif message.get('said') == 'stop':
          self._stop_at = max(map(int, message['texts'])) + 1
        elif 'said' in message:
          self._said[message['said']] = message['texts']
        elif 'missing' in message:
          name, who = message['missing'], message['who']
          self._failed[name] = (
            f'{names(who)} of {self.count} did not come within '
            f'{message["seconds"]:g} s'
            + ('' if name == 'start' else f' to {name!r}')
            + '; --process_timeout says how long to wait'
          )
        self._changed.notify_all()

  def _gone(self, process: int) -> str:
    return (
      f'process {process} of {self.count} has gone without a word; the same '
      'command resumes from the newest checkpoint'
    )

  def _fall(self, line: object, code: int = 1):
    """Ends this process with one line, unless it ends by itself already.

    Its main thread may hang in a collective for ever, so nothing waits for it.
    """
    with self._changed:
      if self._has_ended:
        return
      self._has_ended = True
      if sys.stdout.isatty():  # The cursor, which a progress bar hides.
        os.write(sys.stdout.fileno(), b'\x1b[?25h\n')
      os.write(2, f'{self._name}: {line}\n'.encode(errors='replace'))
      os._exit(code)


def _failure(process: int, code: int, text: str) -> ProcessError:
  error = ProcessError(f'process {process} ended: {text}')
  error.exit_code = code
  return error


def names(processes: list[int]) -> str:
  """'process 1', or 'processes 1, 2 and 5', or the first ten of them."""
  if len(processes) == 1:
    return f'process {processes[0]}'
  shown = [str(i) for i in processes[:10]]
  if len(processes) > 10:
    return f'processes {", ".join(shown)} and {len(processes) - 10} more'
  return f'processes {", ".join(shown[:-1])} and {shown[-1]}'
