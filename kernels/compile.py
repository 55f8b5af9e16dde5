"""Compiling for chips that are not here, and what their compiler says.

libtpu compiles for a TPU on any machine, and estimates the cycles of every
operation, Pallas kernels and XLA's own alike. It cannot know the memory's rate:
an operation takes the longer of its cycles and of its bytes.

Everything runs in another process: libtpu ends the process where an operation
is not supported, and reads its settings when it is loaded.
"""

from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import importlib
import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from kernels import chips
from kernels import hlo

_KERNEL = re.compile(
  r'bytes_accessed\\22:\s*(\d+).*?kernel_name = "([^"]*)"', re.DOTALL
)


class Unavailable(Exception):  # noqa: N818 - a state of this machine
  """The compiler is not installed."""


@dataclasses.dataclass(frozen=True)
class Request:
  """A program to compile.

  Attributes:
    entry: 'module:function'; function(devices, **arguments) returns what is
      jitted and its operands, a tuple of trees of jax.ShapeDtypeStruct. Those
      without a sharding lie on the first device.
    arguments: JSON.
  """

  entry: str
  arguments: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Program:
  """A compiled program.

  Attributes:
    operations: what one device runs.
    temporary: bytes that it needs beside operands and results, a device.
  """

  operations: tuple[hlo.Operation, ...]
  temporary: int

  @property
  def kernels(self) -> tuple[str, ...]:
    """The names of its Pallas kernels."""
    return tuple(one.name for one in self.operations if _is_kernel(one))

  @property
  def collectives(self) -> frozenset[str]:
    """Of hlo.COLLECTIVES those that it has."""
    return frozenset(
      one.opcode.removesuffix('-start')
      for one in self.operations
      if one.opcode.removesuffix('-start') in hlo.COLLECTIVES
    )

  @property
  def unknown(self) -> tuple[str, ...]:
    """Operations whose cycles libtpu does not estimate."""
    return tuple(
      one.name
      for one in self.operations
      if not one.cycles and (one.opcode == 'fusion' or _is_kernel(one))
    )

  @property
  def cycles(self) -> int:
    """Of all operations, one after the other."""
    return sum(one.runs * (one.cycles or 0) for one in self.operations)

  @property
  def bytes(self) -> int:
    """Moved to and from the large memory by all operations."""
    return sum(one.runs * one.bytes for one in self.operations)

  def seconds(self, chip: chips.Chip) -> float:
    """The static estimate: no figure of a chip."""
    alone = sum(
      one.runs * max((one.cycles or 0) / chip.clock, one.bytes / chip.bandwidth)
      for one in self.operations
      if not one.opcode.endswith('-start')  # beside the others
    )
    return max(alone, self.bytes / chip.bandwidth)


@dataclasses.dataclass(frozen=True)
class Failure:
  """What the compiler refused, in one line."""

  reason: str


def version() -> str:
  """libtpu's, or raises Unavailable."""
  try:
    return importlib.metadata.version('libtpu')
  except importlib.metadata.PackageNotFoundError:
    raise Unavailable(
      "compiling for a TPU needs libtpu: pip install 'jax[tpu]'"
    ) from None


def for_tpu(
  requests: Sequence[Request], target: str, *, timeout: float = 300
) -> Iterator[Program | Failure]:
  """Compiles each request for a slice of a TPU.

  Args:
    requests: what to compile, in this order.
    target: in chips.CHIPS.
    timeout: seconds for each.

  Raises:
    Unavailable: libtpu is not installed.
  """
  version()
  left = list(requests)
  while left:
    for result in _process(left, target, True, timeout):
      if isinstance(result, Failure) and 'Static LLO profiling' in str(result):
        # The profile cannot be made: this one again, without cycles.
        (result,) = _process(left[:1], target, False, timeout)
      left.pop(0)
      yield result


def _process(requests, target, profile, timeout):
  """The results up to the one that ends the process, which is a Failure."""
  with (
    tempfile.TemporaryDirectory() as directory,
    tempfile.TemporaryFile('w+') as errors,
  ):
    environment = dict(
      os.environ,
      PYTHONPATH=os.pathsep.join(filter(None, sys.path)),
      JAX_PLATFORMS='cpu',
      TPU_SKIP_MDS_QUERY='1',
      TPU_ACCELERATOR_TYPE=chips.CHIPS[target].accelerator,
      TPU_WORKER_HOSTNAMES='localhost',
      ALLOW_MULTIPLE_LIBTPU_LOAD='1',
      LIBTPU_INIT_ARGS=(
        f'--xla_jf_dump_static_llo_profile_to={directory}' if profile else ''
      ),
    )
    asked = [dataclasses.asdict(one) for one in requests]
    process = subprocess.Popen(
      [sys.executable, '-m', 'kernels.compile', target, json.dumps(asked)],
      env=environment,
      stdout=subprocess.PIPE,
      stderr=errors,
      text=True,
    )
    try:
      for _ in requests:
        late = threading.Timer(timeout, process.kill)
        late.start()
        line = process.stdout.readline()
        late.cancel()
        if not line:
          process.wait()
          yield Failure(_why(errors, process.returncode, timeout))
          return
        yield _result(json.loads(line))
    finally:
      process.kill()
      process.communicate()


def _why(errors, code, timeout):
  if code == -signal.SIGKILL:
    return f'killed, or not compiled within {timeout:.0f} s'
  errors.seek(0)
  lines = errors.read().strip().splitlines() or [f'exit code {code}']
  # A failed check is followed by many lines about where it is.
  fatal = (line for line in lines if re.match(r'F\d{4} ', line))
  return next(fatal, lines[-1])


def _result(record):
  if 'reason' in record:
    return Failure(record['reason'])
  operations = tuple(hlo.Operation(**one) for one in record['operations'])
  return Program(operations, record['temporary'])


def _is_kernel(operation):
  return operation.target == 'tpu_custom_call'


def program(request: Request, devices: Sequence[Any]) -> tuple[Any, Any]:
  """What the request's entry returns, every operand with a sharding."""
  module, _, name = request.entry.partition(':')
  entry = getattr(importlib.import_module(module), name)
  function, operands = entry(devices, **request.arguments)
  here = SingleDeviceSharding(devices[0])
  operands = jax.tree.map(
    lambda one: (
      one
      if one.sharding
      else jax.ShapeDtypeStruct(one.shape, one.dtype, sharding=here)
    ),
    operands,
  )
  return function, operands


def _compiled(request, devices):
  function, operands = program(request, devices)
  lowered = jax.jit(function).lower(*operands)
  kernel_bytes = {}
  for moved, kernel in _KERNEL.findall(lowered.as_text()):
    kernel_bytes[kernel] = max(int(moved), kernel_bytes.get(kernel, 0))
  compiled = lowered.compile()
  return Program(
    hlo.operations(compiled.as_text(), kernel_bytes),
    compiled.memory_analysis().temp_size_in_bytes,
  )


def main(argv: Sequence[str]):
  """The other process: [target, requests] to a JSON line each on stdout."""
  topology = topologies.get_topology_desc(
    platform='tpu', topology_name=chips.CHIPS[argv[0]].topology
  )
  for one in json.loads(argv[1]):
    try:
      record = dataclasses.asdict(_compiled(Request(**one), topology.devices))
    except Exception as error:  # whatever the compiler raises is the answer
      first = str(error).strip().splitlines() or ['']
      record = {'reason': f'{type(error).__name__}: {first[0]}'}
    print(json.dumps(record), flush=True)


if __name__ == '__main__':
  main(sys.argv[1:])
