"""Compiling for a GPU that is not here, and the registers its kernels take.

XLA and Mosaic GPU compile from a description of the chip, down to its machine
code. There is no estimate of the time in it; what it does tell is whether a
kernel fits in the registers, or spills them to the memory.
"""

from collections.abc import Iterator
from collections.abc import Sequence
import contextlib
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

import jax
from jax.experimental import topologies
from jax.sharding import Mesh
import numpy as np

from kernels import chips
from kernels import compile as compile_lib
from kernels import hlo

_REGISTERS = re.compile(r'Used (\d+) registers')
_SPILLED = re.compile(r'(\d+) bytes spill stores')


@dataclasses.dataclass(frozen=True)
class Kernel:
  """What ptxas says of a Mosaic GPU kernel.

  Attributes:
    registers: a thread; there are 255.
    spilled: bytes a thread that it stores in the memory for want of them.
  """

  registers: int
  spilled: int


@dataclasses.dataclass(frozen=True)
class Program:
  """A compiled program.

  Attributes:
    kernels: its different Mosaic GPU kernels.
    collectives: of hlo.COLLECTIVES those that it has.
    temporary: bytes that it needs beside operands and results, a device.
  """

  kernels: tuple[Kernel, ...]
  collectives: frozenset[str]
  temporary: int


def version() -> str:
  """The CUDA plugin's, or raises compile.Unavailable."""
  try:
    return importlib.metadata.version('jax-cuda13-plugin')
  except importlib.metadata.PackageNotFoundError:
    raise compile_lib.Unavailable(
      "compiling for a GPU needs jax's plugin: pip install 'jax[cuda13]'"
    ) from None


def for_gpu(
  requests: Sequence[compile_lib.Request], target: str, *, timeout: float = 300
) -> Iterator[Program | compile_lib.Failure]:
  """Compiles each request for four GPUs of one host.

  Each in a process: a kernel that one has compiled is not reported again.

  Args:
    requests: what to compile, in this order.
    target: in chips.GPUS.
    timeout: seconds for each.

  Raises:
    compile.Unavailable: the plugin is not installed.
  """
  version()
  for request in requests:
    yield _result(request, target, timeout)


def _result(request, target, timeout):
  with tempfile.TemporaryDirectory() as directory:
    environment = dict(
      os.environ,
      PYTHONPATH=os.pathsep.join(filter(None, sys.path)),
      JAX_PLATFORMS='cpu',
      JAX_ENABLE_COMPILATION_CACHE='false',
      MOSAIC_GPU_DUMP_PTXAS='1',
      MOSAIC_GPU_DUMP_TO=directory,
    )
    asked = json.dumps(dataclasses.asdict(request))
    try:
      done = subprocess.run(
        [sys.executable, '-m', 'kernels.compile_gpu', target, asked],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
      )
    except subprocess.TimeoutExpired:
      return compile_lib.Failure(f'not compiled within {timeout:.0f} s')
    if done.returncode:
      lines = done.stderr.strip().splitlines() or [f'{done.returncode}']
      return compile_lib.Failure(lines[-1])
    record = json.loads(done.stdout.splitlines()[-1])
    if 'reason' in record:
      return compile_lib.Failure(record['reason'])
    reports = sorted(pathlib.Path(directory).glob('*.ptxas'))
    kernels = tuple(_kernel(one.read_text()) for one in reports)
  if record['calls'] and not kernels:
    return compile_lib.Failure('this jax does not write what ptxas says')
  return Program(kernels, frozenset(record['collectives']), record['temporary'])


def _kernel(report):
  return Kernel(
    *(max(map(int, one.findall(report))) for one in (_REGISTERS, _SPILLED))
  )


def _compiled(request, devices):
  function, operands = compile_lib.program(request, devices)
  mesh = contextlib.nullcontext()
  if all(
    len(one.sharding.device_set) == 1 for one in jax.tree.leaves(operands)
  ):
    # Mosaic GPU asks the ambient mesh for the chip; a program for several
    # devices has entered its own.
    one = Mesh(np.array(devices[:1]), ('one',))
    mesh = jax.sharding.use_abstract_mesh(one.abstract_mesh)
  with mesh:
    compiled = jax.jit(function).lower(*operands).compile()
  operations = hlo.operations(compiled.as_text(), {})
  opcodes = {one.opcode.removesuffix('-start') for one in operations}
  return {
    'calls': sum(one.target.startswith('mosaic_gpu') for one in operations),
    'collectives': sorted(opcodes.intersection(hlo.COLLECTIVES)),
    'temporary': compiled.memory_analysis().temp_size_in_bytes,
  }


def main(argv: Sequence[str]):
  """The other process: [target, request] to a JSON line on stdout."""
  topology = topologies.get_topology_desc(
    platform='cuda',
    topology_name='',
    target_config=chips.GPUS[argv[0]],
    topology='1x1x4',
  )
  request = compile_lib.Request(**json.loads(argv[1]))
  try:
    record = _compiled(request, topology.devices)
  except Exception as error:  # whatever the compiler raises is the answer
    first = str(error).strip().splitlines() or ['']
    record = {'reason': f'{type(error).__name__}: {first[0]}'}
  print(json.dumps(record))


if __name__ == '__main__':
  main(sys.argv[1:])
