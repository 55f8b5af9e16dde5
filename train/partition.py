"""Where arrays live: the mesh of devices, and shardings over it."""

from collections.abc import Callable
from collections.abc import Sequence
import functools
import os

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np

from kernels import dispatch
from train import config as config_lib

AXES = ('data', 'fsdp', 'tensor')


def make_mesh(devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
  """All devices (or these) along `data`; the other axes have length 1.

  Raises:
    UserError: the platform that JAX_PLATFORMS asks for is not there.
  """
  try:
    devices = np.array(jax.devices() if devices is None else devices)
  except RuntimeError as error:
    raise config_lib.UserError(
      f'jax finds no devices (JAX_PLATFORMS is '
      f'{os.environ.get("JAX_PLATFORMS", "not set")}): '
      f'{config_lib.first_line(error)}'
    ) from None
  # Auto is written out: Explicit fails on the first convolution under fsdp.
  return jax.sharding.Mesh(
    devices.reshape(-1, 1, 1),
    AXES,
    axis_types=(jax.sharding.AxisType.Auto,) * len(AXES),
  )


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
  """The whole array on every device."""
  return NamedSharding(mesh, PartitionSpec())


def batched(mesh: jax.sharding.Mesh, axis: int = 0) -> NamedSharding:
  """Dimension `axis` divided over the devices."""
  return NamedSharding(mesh, PartitionSpec(*[None] * axis, ('data', 'fsdp')))


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


def check_kernels(name: str, mesh: jax.sharding.Mesh):
  """Raises UserError where a kernel is named that the devices cannot run."""
  platform = mesh.devices.flat[0].platform
  needed = dispatch.IMPLEMENTATIONS.get(name)
  if needed not in (None, platform):
    raise config_lib.UserError(
      f'config.kernels is {name}, which needs a {needed.upper()}; the devices '
      f'here are {platform}: it takes auto, xla or pallas_{needed}_interpret'
    )


def ambient(
  mesh: jax.sharding.Mesh, kernels: str, function: Callable
) -> Callable:
  """The function, traced so that kernels see the mesh and divide themselves.

  Those for which it names no implementation are `kernels`, in config.KERNELS.
  """
  default = None if kernels == 'auto' else kernels

  @functools.wraps(function)
  def traced(*args):
    with (
      jax.sharding.use_abstract_mesh(mesh.abstract_mesh),
      dispatch.default(default),
    ):
      return function(*args)

  return traced


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
