"""A command in a process of its own, which is read and sent signals."""

import pathlib
import re
import select
import signal
import subprocess
import sys
import time

from tests import conftest


class Process:
  """python -m MODULE in a process of its own, read as its words come."""

  def __init__(self, name, *words, package='experiments', **env):
    self._process = subprocess.Popen(
      [sys.executable, '-m', f'{package}.{name}', *words],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      cwd=conftest.REPOSITORY,
      env=conftest.environment(**env),
    )
    self.out, self.errors = '', ''

  def __enter__(self):
    return self

  def __exit__(self, *exception):
    self._process.kill()
    self._process.communicate()

  def wait_for(self, pattern, seconds=120):
    """Reads until standard output or error has the pattern."""
    end = time.monotonic() + seconds
    while not re.search(pattern, self.out + self.errors, re.MULTILINE):
      assert time.monotonic() < end, (pattern, self.out, self.errors)
      assert self._process.poll() is None or self._readable(0), (
        pattern,
        self.out,
        self.errors,
      )
      self._read(1)

  def _readable(self, seconds):
    pipes = [self._process.stdout, self._process.stderr]
    return [
      pipe
      for pipe in select.select(pipes, [], [], seconds)[0]
      if pipe.peek(1)  # At its end a pipe is readable and empty.
    ]

  def _read(self, seconds):
    for pipe in self._readable(seconds):
      text = pipe.read1().decode()
      if pipe is self._process.stdout:
        self.out += text
      else:
        self.errors += text

  @property
  def pid(self):
    return self._process.pid

  def send(self, signum):
    self._process.send_signal(signum)

  def wait_until_it_listens(self, seconds=60):
    """Before that a signal is Python's own, which has only begun to start."""
    status = pathlib.Path(f'/proc/{self._process.pid}/status')
    if not status.exists():
      time.sleep(1)
      return
    end = time.monotonic() + seconds
    while True:
      caught = re.search(r'^SigCgt:\s*(\w+)$', status.read_text(), re.MULTILINE)
      if int(caught[1], 16) >> (signal.SIGTERM - 1) & 1:
        return
      assert time.monotonic() < end
      time.sleep(0.005)

  def end(self, seconds=120):
    """Reads to the end; returns the exit code."""
    out, errors = self._process.communicate(timeout=seconds)
    self.out += out.decode()
    self.errors += errors.decode()
    return self._process.returncode
