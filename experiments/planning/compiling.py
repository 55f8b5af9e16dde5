"""Compiles training steps for devices that are not here, in its own process.

Where a compiler ends the process, as libtpu's does at a failed check, plan goes
on and says so. Requests come as JSON lines, until there are no more.
"""

from collections.abc import Sequence
import contextlib
import json
import math
import os
import queue
import re
import sys
import threading
import time
from typing import Any

from experiments import command
from train import config as config_lib

# libtpu's "Used 29.52G of 15.75G hbm", or "the total memory required for HLO
# temporaries (29.52G) exceeds available HBM (15.75G)", and its names of units.
_OVER = re.compile(
  r'(?:Used |required for .*?\()([\d.]+)([BKMGT]?)'
  r'(?: of |\) exceeds available HBM \()([\d.]+)([BKMGT]?)'
)
_UNITS = {unit: 2 ** (10 * i) for i, unit in enumerate('BKMGT')} | {'': 1}
_GPU_KERNEL = 'mosaic_gpu'


def main(target: str):
  """The other process: a JSON line for each, as `answer` has it."""
  requests = _read_lines()
  # What libraries print must not be taken for an answer.
  out = os.fdopen(os.dup(1), 'w')
  os.dup2(2, 1)
  command.quiet()

  def tell(**values):
    print(json.dumps(values), file=out, flush=True)

  while True:
    request = json.loads(requests.get())
    try:
      told = answer(
        target,
        config_lib.from_json(request['config']),
        request['compiled'],
        lambda line: tell(say=line),
      )
    except Exception as error:
      if not hasattr(error, 'exit_code'):
        told = {'failed': f'{type(error).__name__}: '
                          f'{config_lib.first_line(error)}'}  # fmt: skip
      else:
        told = {'refused': str(error)}
    tell(**told)


def _read_lines() -> queue.Queue:
  """Of standard input, with which the process ends."""
  lines = queue.Queue()

  def read():
    for line in sys.stdin:
      lines.put(line)
    os._exit(0)  # The parent has what it wants, or has gone.

  threading.Thread(target=read, daemon=True).start()
  return lines


def answer(
  target_name: str, config: config_lib.Config, compiled: bool, say
) -> dict[str, Any]:
  """What a config's training step is and needs on the target.

  Args:
    target_name: as targets.parse takes it.
    config: as written.
    compiled: False for what is known without the compiler.
    say: takes a line for the user.

  Returns:
    JSON. Bytes are of one device, but for those of collectives.

  Raises:
    UserError: the config, or the target, cannot be.
  """
  from experiments.planning import targets
  from train import program as program_lib

  started = time.monotonic()
  target = targets.parse(target_name)
  devices = _devices(target)
  program = program_lib.create(config, described=True, devices=devices, say=say)
  found = account(program, compiled=compiled)
  found['seconds']['created'] = round(
    time.monotonic() - started - sum(found['seconds'].values()), 1
  )
  return found


def account(program, *, compiled: bool = True) -> dict[str, Any]:
  """What `answer` says, of a program on the devices of its mesh."""
  from train import flops

  started = time.monotonic()
  batch, held = batch_shapes(program)
  found = _known(program, batch, held)
  try:
    found['flops'] = flops.count(program.train_step, program.state_shape, batch)
  except ValueError as error:
    raise config_lib.UserError(f'no plan can be made: {error}') from None
  found['seconds'] = {'traced': round(time.monotonic() - started, 1)}
  if compiled:
    started = time.monotonic()
    found |= _compile(program, batch)
    found['seconds']['compiled'] = round(time.monotonic() - started, 1)
  return found


def _devices(target) -> Sequence[Any]:
  """The target's, none of which need be here."""
  import jax
  from jax.experimental import topologies

  from experiments.planning import targets
  from kernels import chips

  if target.platform == 'cpu':
    return jax.devices()[: target.devices]
  name = target.name.partition(':')[0]
  try:
    if target.platform == 'cuda':
      topology = topologies.get_topology_desc(
        platform='cuda',
        topology_name='',
        target_config=chips.GPUS[name],
        topology='1x{}x{}'.format(*target.shape),
      )
    else:
      sides = 'x'.join(map(str, target.shape))
      more = {'chip_config_name': 'megacore'} if name == 'v4' else {}
      if target.devices == 1:  # A host has four chips otherwise.
        more['chips_per_host_bounds'] = (1, 1, 1)
      topology = topologies.get_topology_desc(
        platform='tpu', topology_name=f'{name}:{sides}', **more
      )
    devices = topology.devices
  except Exception as error:  # Whatever the compiler raises.
    if target.platform == 'cuda':
      raise
    reason = f'its compiler says {config_lib.first_line(error)}'
    raise targets.refused(target, reason) from None
  return devices


def batch_shapes(program):
  """Of a training step's batch, and how many of them are held at once."""
  from train.data import pipeline

  return pipeline.batch_shapes(
    program.dataset.splits['train'],
    batch_size=program.config.data.batch_size,
    mesh=program.mesh,
    processes=len({d.process_index for d in program.mesh.devices.flat}),
  )


def _known(program, batch, held: int) -> dict[str, Any]:
  """What is known before compiling."""
  import models

  config, state = program.config, program.state_shape
  parts = {
    'parameters': state.params,
    'moments': state.opt_state,
    'statistics': state.batch_stats,
    'running mean': state.ema_params,
    'counters': (state.step, state.control),
    'batch': batch,
  }
  sizes = {name: _bytes(tree) for name, tree in parts.items()}
  return {
    'mesh': dict(program.mesh.shape),
    'devices': program.mesh.devices.size,
    'kind': program.mesh.devices.flat[0].device_kind,
    'model': config.model['name'],
    'variant': config.model.get('variant'),
    'data': program.dataset.name,
    'dtype': config.dtype,
    'batch_size': config.data.batch_size,
    'examples': len(program.dataset.splits['train']),
    'total_steps': config.total_steps,
    'parameters': models.count_parameters(program.model),
    'forward': _forward(program),
    'bytes': sizes,
    'ahead': (held - 1) * sizes['batch'],
  }


def _bytes(tree) -> int:
  """Of one device's share."""
  import jax

  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
  )


def _forward(program) -> int:
  """Operations of one example's forward pass."""
  from flax import nnx

  from train import flops
  from train import program as program_lib
  from train import step as step_lib

  graphdef, state = nnx.split(program.model)

  def forward(state, inputs):
    return step_lib.apply(nnx.merge(graphdef, state), inputs, train=False)[0]

  inputs = program_lib.model_inputs(program.dataset, 1)
  return flops.count(forward, state, inputs)


# ----------------------------------------------------------------- compiled


def _compile(program, batch) -> dict[str, Any]:
  """What the compiler says of the training step."""
  from kernels import hlo

  lowered = program.train_step.lower(program.state_shape, batch)
  try:
    compiled = lowered.compile()
  except Exception as error:  # Whatever the compiler raises is the answer.
    if over := _OVER.search(str(error)):
      used, unit, most, most_unit = over.groups()
      return {
        'over': {
          'used': float(used) * _UNITS[unit],
          'memory': float(most) * _UNITS[most_unit],
        }
      }
    return {'failed': f'{type(error).__name__}: '
                      f'{config_lib.first_line(error)}'}  # fmt: skip
  text = compiled.as_text()
  operations = hlo.operations(text, {})
  memory = compiled.memory_analysis()
  return {
    'memory': {
      'arguments': memory.argument_size_in_bytes,
      'outputs': memory.output_size_in_bytes - memory.alias_size_in_bytes,
      'temporaries': memory.temp_size_in_bytes,
      'code': memory.generated_code_size_in_bytes,
    },
    'moved': sum(one.runs * one.bytes for one in operations),
    'kernels': sorted(filter(None, map(_kernel, operations))),
    'collectives': _collectives(text, program.mesh),
  }


def _kernel(operation) -> str | None:
  """The name of a Pallas kernel, as far as the compiler keeps it."""
  if operation.target == 'tpu_custom_call':
    return operation.name.partition('.')[0]
  # A GPU's all have one name.
  return operation.target if _GPU_KERNEL in operation.target else None


def _collectives(text: str, mesh) -> list[dict[str, Any]]:
  """Those that are alike together, with how far each reaches."""
  from kernels import hlo

  devices = list(mesh.devices.flat)
  each = len(devices) // len({device.process_index for device in devices})
  found = {}
  for one in hlo.collectives(text, len(devices)):
    group = one.group or range(len(devices))
    reach = _extents([_place(devices[i], each) for i in group])
    alike = found.setdefault((one.kind, len(group), reach), [])
    alike.append((one.runs, one.bytes))
  return [
    {'kind': kind, 'members': members, 'extents': reach, 'sizes': sizes}
    for (kind, members, reach), sizes in found.items()
  ]


def _place(device, each: int) -> tuple[int, ...]:
  """Where a device lies on its network: a chip's coordinates; host and GPU."""
  if device.platform == 'tpu':
    return tuple(device.coords)
  return device.process_index, device.id % each


def _extents(places: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
  return tuple(len(set(axis)) for axis in zip(*places, strict=True))


if __name__ == '__main__':
  with contextlib.suppress(KeyboardInterrupt):
    main(sys.argv[1])
