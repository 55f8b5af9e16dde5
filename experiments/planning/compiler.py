"""The process that compiles, as plan sees it: a question, an answer."""

import dataclasses
import importlib.metadata
import json
import os
import pathlib
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
from typing import Any

from experiments.planning import targets
from train import config as config_lib
from train import progress
from train import signals

_POLL_SECONDS = 0.2
# platform -> what must be installed, and the extra that has it.
_NEEDS = {
  'tpu': ('libtpu', 'tpu'),
  'cuda': ('jax-cuda13-plugin', 'cuda'),
}


class CompileError(Exception):
  """A compiler refused a program, or ended its process, in one line."""

  exit_code = 1


@dataclasses.dataclass
class Compiler:
  """A context that compiles for one target, in a process that it starts.

  Attributes:
    target: what for.
  """

  target: targets.Target

  def __enter__(self) -> 'Compiler':
    check_installed(self.target)
    self._process = self._errors = None
    return self

  def __exit__(self, *exception):
    self._end()

  def ask(
    self, config: config_lib.Config, *, compiled: bool = True
  ) -> dict[str, Any]:
    """What compiling.answer says of the config.

    Raises:
      UserError: the config, or the target, cannot be.
      CompileError: the compiler refused the program, or ended its process.
      Stopped: a signal came.
    """
    if self._process is None:
      self._start()
    request = {'config': config_lib.to_json(config), 'compiled': compiled}
    try:
      self._process.stdin.write(json.dumps(request) + '\n')
      self._process.stdin.flush()
    except BrokenPipeError:
      pass  # It has ended, which is seen below.
    told = self._next()
    while 'say' in told:
      progress.say(told['say'])
      told = self._next()
    if 'refused' in told:
      raise config_lib.UserError(told['refused'])
    if 'failed' in told:
      raise CompileError(
        f'the compiler for {self.target.name} refuses: {told["failed"]}'
      )
    return told

  def _start(self):
    root = str(pathlib.Path(__file__).parents[2])
    path = [root, *filter(None, [os.environ.get('PYTHONPATH')])]
    self._errors = tempfile.TemporaryFile('w+')  # noqa: SIM115 - till _end
    self._process = subprocess.Popen(
      [
        sys.executable,
        '-m',
        'experiments.planning.compiling',
        self.target.name,
      ],
      stdin=subprocess.PIPE,  # Closes with this process, however that ends.
      stdout=subprocess.PIPE,
      stderr=self._errors,
      text=True,
      env=os.environ
      | _environment(self.target)
      | {'PYTHONPATH': os.pathsep.join(path)},
      start_new_session=True,  # Ctrl-C comes to this process alone.
    )
    self._lines = queue.Queue()
    threading.Thread(
      target=_read, args=(self._process.stdout, self._lines), daemon=True
    ).start()

  def _next(self) -> dict[str, Any]:
    while True:
      signals.check('stopped while compiling')
      try:
        line = self._lines.get(timeout=_POLL_SECONDS)
      except queue.Empty:
        continue
      if line is not None:
        return json.loads(line)
      code = self._process.wait()
      reason = self._why(code)
      self._end()
      raise CompileError(
        f'the compiler for {self.target.name} ended its process: {reason}'
      )

  def _why(self, code: int) -> str:
    if code == -signal.SIGKILL:
      return 'it was killed, as where memory runs out'
    self._errors.seek(0)
    lines = self._errors.read().strip().splitlines()
    # A failed check is followed by many lines about where it is.
    fatal = (line for line in lines if re.match(r'F\d{4} ', line))
    said = next(fatal, lines[-1] if lines else 'without a word')
    how = f'exit code {code}' if code >= 0 else signal.Signals(-code).name
    return f'{how}: {said}'

  def _end(self):
    if self._process is None:
      return
    self._process.kill()
    self._process.wait()
    self._process.stdin.close()
    self._errors.close()
    self._process = None


def check_installed(target: targets.Target):
  """Raises UserError where the compiler is not here, with what brings it."""
  package, extra = _NEEDS.get(target.platform, (None, None))
  if package is None:
    return
  try:
    importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    raise config_lib.UserError(
      f'--target is {target.name!r}, whose compiler ({package}) is not '
      f'installed; python3 -m experiments.install {extra} installs it'
    ) from None


def _environment(target: targets.Target) -> dict[str, str]:
  environment = {
    'JAX_PLATFORMS': 'cpu',  # Whatever is here; the target's is only described.
    'JAX_ENABLE_COMPILATION_CACHE': 'false',
  }
  if target.platform == 'cpu':
    flags = os.environ.get('XLA_FLAGS', '').split()
    environment |= {
      'JAX_NUM_CPU_DEVICES': str(target.devices),
      'XLA_FLAGS': ' '.join(f for f in flags if 'device_count' not in f),
    }
  if target.platform == 'tpu':
    environment |= {
      'TPU_SKIP_MDS_QUERY': '1',
      'TPU_ACCELERATOR_TYPE': target.chip.accelerator,
      'TPU_WORKER_HOSTNAMES': 'localhost',
      'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
    }
  return environment


def _read(pipe, lines: queue.Queue):
  for line in pipe:
    lines.put(line)
  lines.put(None)
