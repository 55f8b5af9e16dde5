"""What lies where on the mesh: shardings, and arrays under them."""

from collections.abc import Callable
from collections.abc import Mapping
import functools
import math
from typing import Any

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np

from kernels import dispatch
from train import config as config_lib
from train import mesh as mesh_lib
from train import paths

# Parameters below this size stay whole on every device of `fsdp`: gathering
# them would cost more time than their memory is worth.
MIN_FSDP_SIZE = 2**14
# Which dimension of a kernel `tensor` divides, by the parameter's path: what a
# layer takes in where it ends a branch, so that the branch is added up once;
# else what it gives out. The first that matches counts.
TENSOR_RULES = (
  (r'(.*/)?embed/.*', None),  # What layers add to stays whole.
  (r'(.*/)?(project|head)/kernel', -2),
  (r'(.*/)?(project|head)/bias', None),
  (r'(.*/)?(kernel|bias)', -1),
)


# ---------------------------------------------------------------- shardings


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
  """The whole array on every device."""
  return NamedSharding(mesh, PartitionSpec())


def batched(mesh: jax.sharding.Mesh, axis: int = 0) -> NamedSharding:
  """Dimension `axis` divided over the devices that share a batch."""
  return NamedSharding(mesh, PartitionSpec(*[None] * axis, mesh_lib.BATCH))


def state_shardings(
  mesh: jax.sharding.Mesh, state: Any, params: Mapping
) -> Any:
  """The sharding of each leaf of `state`.

  Args:
    mesh: of AXES.
    state: a TrainState of shapes.
    params: its parameters. What has a parameter's path behind its own, as a
      moment of Optax has, and its shape, lies as that parameter does.
  """
  flat = paths.flatten(params)
  tensor = {path: dim for path, dim, _ in _tensor_dims(flat)}

  def sharding(key_path, leaf):
    path = tuple(map(_name, key_path))
    own = next((path[i:] for i in range(len(path)) if path[i:] in flat), None)
    spec: list[str | None] = [None] * leaf.ndim

    def divide(axis, dims):
      """Along `axis`, the largest of these dimensions that it divides."""
      length = mesh.shape[axis]
      dims = [d for d in dims if spec[d] is None and not leaf.shape[d] % length]
      if length > 1 and dims:
        spec[max(dims, key=lambda dim: leaf.shape[dim])] = axis

    if own in tensor and flat[own].shape == leaf.shape:
      divide('tensor', [tensor[own]])
    if math.prod(leaf.shape) >= MIN_FSDP_SIZE:
      divide('fsdp', range(leaf.ndim))
    while spec and spec[-1] is None:
      spec.pop()
    return NamedSharding(mesh, PartitionSpec(*spec))

  return jax.tree_util.tree_map_with_path(sharding, state)


def make_gather(shardings: Mapping) -> Callable:
  """gather(params) -> the same, whole along `fsdp`, to be computed with.

  Said and not left to the compiler, which might rather move activations, and
  which on jax 0.10.2 computes wrong gradients of a convolution whose kernel is
  divided along `fsdp` and `tensor` while its images are along `data`.
  Gradients come back divided as the parameters are.

  Args:
    shardings: of the parameters.
  """
  flat = paths.flatten(shardings)
  divided = {p: s for p, s in flat.items() if 'fsdp' in s.spec}

  def gather(params):
    flat = paths.flatten(params)
    return paths.unflatten(
      {
        path: _gathered(divided[path], param) if path in divided else param
        for path, param in flat.items()  # In order: the same program each time.
      }
    )

  return gather if divided else lambda params: params


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gathered(sharding, param):
  spec = [None if axis == 'fsdp' else axis for axis in sharding.spec]
  whole = NamedSharding(sharding.mesh, PartitionSpec(*spec))
  return jax.lax.with_sharding_constraint(param, whole)


_gathered.defvjp(
  lambda sharding, param: (_gathered(sharding, param), None),
  lambda sharding, _, grad: (jax.lax.with_sharding_constraint(grad, sharding),),
)


def _name(key) -> Any:
  """One step of a path in a pytree, as paths.flatten has it."""
  return getattr(key, 'key', getattr(key, 'name', getattr(key, 'idx', None)))


def _tensor_dims(flat: Mapping[paths.Path, Any]):
  """(path, dimension, its size) of each parameter that `tensor` may divide.

  Of dense layers and convolutions: not a norm's, and not a recurrence's, whose
  gates lie side by side and would be exchanged at every step.
  """
  for path, leaf in flat.items():
    *layer, _ = path
    if (*layer, 'kernel') not in flat or (*layer, 'recurrent_kernel') in flat:
      continue
    dims = (d for rule, d in TENSOR_RULES if paths.matches(f'{rule}$', path))
    dim = next(dims, None)
    if dim is not None:
      yield path, dim, leaf.shape[dim]


def check_tensor(model: str, params: Mapping, mesh: jax.sharding.Mesh):
  """Raises UserError where mesh.tensor divides no width of the model."""
  length = mesh.shape['tensor']
  sizes = sorted({size for _, _, size in _tensor_dims(paths.flatten(params))})
  if length == 1 or any(size % length == 0 for size in sizes):
    return
  nearest = max(
    n for n in range(1, length) if n == 1 or any(s % n == 0 for s in sizes)
  )
  raise config_lib.UserError(
    f'config.mesh.tensor is {length}, which divides no width of {model} '
    f'({", ".join(map(str, sizes)) or "it has none"}); the nearest that does '
    f'is {nearest}'
  )


# ------------------------------------------------------------------- arrays


def rows(mesh: jax.sharding.Mesh, batch_size: int) -> np.ndarray:
  """The places in a batch whose examples this process's devices take."""
  indices = batched(mesh).addressable_devices_indices_map((batch_size,))
  places = np.arange(batch_size)
  return np.unique(np.concatenate([places[i] for i in indices.values()]))


def put_rows(batch: Any, mesh: jax.sharding.Mesh, batch_size: int) -> Any:
  """The global arrays of a batch of whose `rows` each process has its own."""
  sharding = batched(mesh)
  if sharding.is_fully_addressable:
    return jax.device_put(batch, sharding)
  return jax.tree.map(
    lambda x: jax.make_array_from_process_local_data(
      sharding, x, (batch_size, *x.shape[1:])
    ),
    batch,
  )


def put(tree: Any, sharding: NamedSharding) -> Any:
  """Arrays that every process has whole, to the devices."""
  if sharding.is_fully_addressable:
    return jax.device_put(tree, sharding)
  with jax.transfer_guard('allow'):  # It is no hidden one.
    return jax.tree.map(
      lambda x: jax.make_array_from_callback(
        x.shape, sharding, lambda index: x[index]
      ),
      tree,
    )


def get(tree: Any, mesh: jax.sharding.Mesh) -> Any:
  """Arrays whole in every process's memory, wherever they lie; waits."""
  if not replicated(mesh).is_fully_addressable:
    tree = _gather(replicated(mesh))(tree)
  return jax.device_get(tree)


@functools.lru_cache
def _gather(sharding):
  return jax.jit(lambda tree: tree, out_shardings=sharding)


# -------------------------------------------------------------------- steps


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


def per_device(
  mesh: jax.sharding.Mesh, train_step: Callable, specs: Callable
) -> Callable:
  """train_step(state, batch) as each device computes it with its own examples.

  What jax.pmap does, within jax.jit. The step itself must reduce what it gives
  over the axis `data`.

  Args:
    mesh: whose axes but `data` have length 1.
    train_step: with `data` as its axis_name.
    specs: batch -> its PartitionSpecs.
  """

  @functools.wraps(train_step)
  def mapped(state, batch):
    return jax.shard_map(
      train_step,
      mesh=mesh,
      in_specs=(PartitionSpec(), specs(batch)),
      out_specs=PartitionSpec(),
      check_vma=False,  # The step's own reductions are explicit.
    )(state, batch)

  return mapped
