"""The hub of several processes, in process 0: passes on what each says.

jax's coordination service learns of a death from heartbeats, and tells of it by
ending every process with a dump of C++; the callback that could do better fails
(std::bad_cast in jax 0.10 to 0.12). Here the operating system closes a dead
process's connection, at once, and what is said of it is one line of ours.

Messages are lines of JSON. To the hub: hello, say, stop, end. From it: said,
missing, stop, gone, ended, refused. An empty line says: alive.
"""

import json
import selectors
import socket
import threading
import time

ALIVE_SECONDS = 5  # How often a process says that it is alive.
SILENT_SECONDS = 60  # At least; saying nothing for longer counts as gone.
_POLL_SECONDS = 0.2
_SEND_SECONDS = 10  # Nobody may hold all others up for longer.


def listen(host: str, port: int) -> socket.socket:
  """A socket that takes connections; on a loopback address from here alone."""
  if host in ('localhost', '127.0.0.1', '::1'):
    family = socket.AF_INET6 if ':' in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=1024)
  if socket.has_dualstack_ipv6():
    return socket.create_server(
      ('', port), family=socket.AF_INET6, backlog=1024, dualstack_ipv6=True
    )
  return socket.create_server(('', port), backlog=1024)


def notice_lost_machines(connection: socket.socket):
  """The kernel asks after the other side, and gives it up after 30 s.

  A process that dies has its connections closed; a machine cannot do that.
  """
  connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
  for name, value in {
    'TCP_KEEPIDLE': 10,
    'TCP_KEEPALIVE': 10,  # What macOS calls it.
    'TCP_KEEPINTVL': 5,
    'TCP_KEEPCNT': 4,
    'TCP_USER_TIMEOUT': 30_000,  # Milliseconds; with words on their way.
  }.items():
    if hasattr(socket, name):
      connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


class Hub:
  """What process 0 runs in a thread: passes on what the processes say."""

  def __init__(self, server: socket.socket, count: int, seconds: float):
    """Takes connections on `server`.

    Args:
      server: from `listen`.
      count: of processes.
      seconds: how long processes wait for each other.
    """
    self._server = server
    self._count = count
    self._silence = max(seconds, SILENT_SECONDS)
    self._rests: dict[socket.socket, bytes] = {}  # Of lines not yet whole.
    self._owners: dict[socket.socket, int] = {}
    self._heard: dict[socket.socket, float] = {}
    self._ended: set[int] = set()
    self._said: dict[str, dict[int, str]] = {}
    self._deadlines: dict[str, tuple[float, float]] = {}  # And the seconds.
    self._selector = selectors.DefaultSelector()
    self._selector.register(server, selectors.EVENT_READ)

  def start(self) -> socket.socket:
    """Begins; the connection that process 0 itself takes."""
    ours, its = socket.socketpair()
    self._add(its)
    threading.Thread(target=self._run, name='hub', daemon=True).start()
    return ours

  def _run(self):
    alive = time.monotonic()
    while True:
      for key, _ in self._selector.select(timeout=_POLL_SECONDS):
        if key.fileobj is self._server:
          connection, _ = self._server.accept()
          notice_lost_machines(connection)
          self._add(connection)
        elif key.fileobj in self._rests:
          self._read(key.fileobj)
      now = time.monotonic()
      for name, (end, seconds) in list(self._deadlines.items()):
        if end < now:
          there = self._said.pop(name)
          del self._deadlines[name]
          who = [i for i in range(self._count) if i not in there]
          self._tell_all(missing=name, who=who, seconds=seconds)
      for connection, heard in list(self._heard.items()):
        if now - heard > self._silence:
          self._lose(connection)
      if now - alive > ALIVE_SECONDS:
        alive = now
        self._send(list(self._owners), b'\n')

  def _add(self, connection: socket.socket):
    connection.settimeout(_SEND_SECONDS)
    self._rests[connection] = b''
    self._heard[connection] = time.monotonic()
    self._selector.register(connection, selectors.EVENT_READ)

  def _read(self, connection: socket.socket):
    try:
      data = connection.recv(1 << 16)
    except OSError:
      data = b''
    if not data:
      self._lose(connection)
      return
    self._heard[connection] = time.monotonic()
    *lines, self._rests[connection] = (self._rests[connection] + data).split(
      b'\n'
    )
    for line in filter(None, lines):
      try:
        self._handle(connection, json.loads(line))
      except (ValueError, KeyError, TypeError):  # Nobody of ours.
        self._lose(connection)
        return

  def _handle(self, connection: socket.socket, message: dict):
    if 'hello' in message:
      self._greet(connection, message['hello'], message['of'])
      return
    process = self._owners[connection]
    if 'say' in message:
      name = message['say']
      said = self._said.setdefault(name, {})
      said[process] = message['text']
      if len(said) == self._count:
        del self._said[name]
        self._deadlines.pop(name, None)
        self._tell_all(said=name, texts=[said[i] for i in range(self._count)])
      else:
        seconds = message['seconds']
        end = time.monotonic() + seconds
        self._deadlines.setdefault(name, (end, seconds))
    elif 'stop' in message:
      self._tell_all(**message)
    elif 'end' in message:
      self._ended.add(process)
      self._tell_all(ended=process, code=message['end'], text=message['text'])

  def _greet(self, connection: socket.socket, process: int, count: int):
    refused = None
    if count != self._count:
      refused = (
        f'process {process} was started as one of {count} processes, and '
        f'process 0 as one of {self._count}'
      )
    elif process in self._owners.values() or not 0 <= process < count:
      refused = f'another process is process {process} already'
    if refused:
      self._send([connection], line(refused=refused))
      self._forget(connection)
    else:
      self._owners[connection] = process

  def _lose(self, connection: socket.socket):
    process = self._forget(connection)
    if process is not None and process not in self._ended:
      self._ended.add(process)
      self._tell_all(gone=process)

  def _forget(self, connection: socket.socket) -> int | None:
    if connection in self._rests:
      self._selector.unregister(connection)
      del self._rests[connection], self._heard[connection]
      connection.close()
    return self._owners.pop(connection, None)

  def _tell_all(self, **message):
    # Process 0 last: what it hears may end it, and with it this thread.
    owners = sorted(self._owners, key=self._owners.get, reverse=True)
    self._send(owners, line(**message))

  def _send(self, connections: list[socket.socket], data: bytes):
    for connection in connections:
      try:
        connection.sendall(data)
      except OSError:
        self._lose(connection)


def line(**message) -> bytes:
  """A message as it is sent."""
  return json.dumps(message).encode() + b'\n'
