"""The mesh: the devices of all processes, along three axes.

`data` divides the examples of a batch. `fsdp` divides them too, and with them
the parameters and what Optax keeps for each, which are gathered where they are
used (Rajbhandari et al. 2020, ZeRO stage 3). `tensor` divides layers' widths
(Shoeybi et al. 2019, Megatron-LM). What lies where is partition.py's to say.
"""

from collections.abc import Sequence
import math
import os
import re

import jax

from kernels import dispatch
from train import config as config_lib

DATA = 'data'
AXES = (DATA, 'fsdp', 'tensor')
BATCH = (DATA, 'fsdp')  # The axes that divide examples.
# An interpreted GPU kernel has a thread for each warpgroup, which wait for each
# other: some never ended on a CPU of two cores.
INTERPRETER_THREADS = 16


def make_mesh(
  wanted: config_lib.Mesh | None = None,
  devices: Sequence[jax.Device] | None = None,
  *,
  strict: bool = True,
) -> jax.sharding.Mesh:
  """The devices of all processes (or these) along AXES.

  Args:
    wanted: the length of each axis, -1 for what is left over; None: all along
      `data`.
    devices: in place of all.
    strict: False where lengths that do not fit become all along `data`.

  Raises:
    UserError: the lengths do not multiply to the devices, or the platform that
      JAX_PLATFORMS asks for is not there.
  """
  try:
    devices = jax.devices() if devices is None else devices
  except RuntimeError as error:
    raise config_lib.UserError(
      f'jax finds no devices (JAX_PLATFORMS is '
      f'{os.environ.get("JAX_PLATFORMS", "not set")}): '
      f'{config_lib.first_line(error)}'
    ) from None
  wanted = wanted or config_lib.Mesh()
  lengths = _lengths(wanted, len(devices))
  if lengths is None and not strict:
    lengths = (len(devices), 1, 1)
  if lengths is None:
    raise config_lib.UserError(_mismatch(wanted, len(devices)))
  # Auto is written out: Explicit fails on the first convolution under fsdp.
  return jax.make_mesh(
    lengths,
    AXES,
    axis_types=(jax.sharding.AxisType.Auto,) * len(AXES),
    devices=devices,
  )


def _lengths(wanted: config_lib.Mesh, count: int) -> tuple[int, ...] | None:
  """The axes' lengths, -1 filled in; None where they do not make `count`."""
  lengths = [getattr(wanted, axis) for axis in AXES]
  rest, left = divmod(count, math.prod(n for n in lengths if n != -1))
  lengths = tuple(rest if n == -1 else n for n in lengths)
  return lengths if not left and math.prod(lengths) == count else None


def _mismatch(wanted: config_lib.Mesh, count: int) -> str:
  """One line with the numbers and the nearest mesh that fits."""

  def distance(lengths):
    return sum(
      abs(math.log(n / getattr(wanted, axis)))
      for axis, n in zip(AXES, lengths, strict=True)
      if getattr(wanted, axis) != -1
    )

  divisors = [n for n in range(1, count + 1) if count % n == 0]
  valid = [
    (count // (fsdp * tensor), fsdp, tensor)
    for fsdp in divisors
    for tensor in divisors
    if count % (fsdp * tensor) == 0
  ]

  def spelled(lengths):
    return ', '.join(f'{a} {n}' for a, n in zip(AXES, lengths, strict=True))

  lengths = [getattr(wanted, axis) for axis in AXES]
  takes = math.prod(n for n in lengths if n != -1)
  takes = f'a multiple of {takes}' if -1 in lengths else takes
  return (
    f'config.mesh is {spelled(lengths)}, which takes {takes} devices; there '
    f'{"are" if count > 1 else "is"} {count}: the nearest is '
    f'{spelled(min(valid, key=distance))}'
  )


def give_threads(least: int):
  """At least so many to XLA's CPU programs, unless the user has said how many.

  What waits for another part of a program holds one of XLA's threads, and the
  part that it waits for needs another: with too few both wait for ever. Read
  when jax first looks for devices.
  """
  os.environ.setdefault('PJRT_NPROC', str(max(least, os.cpu_count() or 1)))


def _devices_wanted() -> int:
  """How many CPU devices this process will have."""
  flags = os.environ.get('XLA_FLAGS', '')
  found = re.findall(r'host_platform_device_count=(\d+)', flags)
  return max([jax.config.jax_num_cpu_devices, *map(int, found[-1:])])


# Several devices wait for each other in collectives: a recurrent network on two
# of them never ended a step with two threads.
if _devices_wanted() > 1:
  give_threads(2 * _devices_wanted())


def steps_in_flight(mesh: jax.sharding.Mesh) -> int:
  """How many steps may be sent to the devices before the oldest is waited for.

  Without a bound, Python could send steps and their batches far ahead of what
  is done. Several CPU devices get one at a time: their collectives wait for
  each other in one pool of threads, where two programs that overlap can starve
  each other for ever.
  """
  several_cpus = mesh.devices.size > 1 and (
    mesh.devices.flat[0].platform == 'cpu'
  )
  return 1 if several_cpus else 16


def determinism(mesh: jax.sharding.Mesh) -> tuple[dict[str, bool], str]:
  """What the compiler is told where equal bytes are asked for, in words too."""
  platform = mesh.devices.flat[0].platform
  if platform == 'gpu':
    return {'xla_gpu_deterministic_ops': True}, (
      'deterministic: XLA adds up in a fixed order and does not try programs '
      'out for the fastest, so steps take longer; what has no such program on '
      'a GPU is refused when it is compiled'
    )
  return {}, (
    f'deterministic: on {platform.upper()}s it costs nothing, programs are so '
    'already; equal bytes take the same devices, versions and threads'
  )


def round_up(batch_size: int, mesh: jax.sharding.Mesh) -> int:
  """The batch size, or the next that the devices can share evenly."""
  devices = math.prod(mesh.shape[axis] for axis in BATCH)
  return math.ceil(batch_size / devices) * devices


# ------------------------------------------------------------------- checks


def check(config: config_lib.Config, mesh: jax.sharding.Mesh):
  """Raises UserError where the mesh cannot train such a config."""
  check_batch_size(config.data.batch_size, mesh, config.accumulate)
  if config.partition == 'shard_map':
    for axis in ('fsdp', 'tensor'):
      if mesh.shape[axis] > 1:
        raise config_lib.UserError(
          f'config.partition is shard_map, which divides examples alone, and '
          f'config.mesh.{axis} is {mesh.shape[axis]}; set it to 1, or '
          'config.partition to jit'
        )


def check_kernels(name: str, mesh: jax.sharding.Mesh):
  """Raises UserError where a kernel is named that the devices cannot run."""
  platform = mesh.devices.flat[0].platform
  needed = dispatch.IMPLEMENTATIONS.get(name)
  if needed not in (None, platform):
    raise config_lib.UserError(
      f'config.kernels is {name}, which needs a {needed.upper()}; the devices '
      f'here are {platform}: it takes auto, xla or pallas_{needed}_interpret'
    )


def check_batch_size(
  batch_size: int, mesh: jax.sharding.Mesh, accumulate: int = 1
):
  """Raises UserError unless the devices can share a batch's parts evenly."""
  devices = mesh.shape['data'] * mesh.shape['fsdp']
  if accumulate > 1 and batch_size % (devices * accumulate):
    raise config_lib.UserError(
      f'config.accumulate is {accumulate}, into which config.data.batch_size '
      f'{batch_size} on {devices} device{"s" * (devices > 1)} cannot be divided'
    )
  if batch_size % devices:
    below = batch_size // devices * devices
    near = f'{below} or {below + devices}' if below else f'{devices}'
    raise config_lib.UserError(
      f'config.data.batch_size is {batch_size}, which {devices} devices cannot '
      f'share evenly; the nearest is {near}'
    )
