"""Kernels on a mesh: each device computes the rows that it holds.

XLA does not divide a Pallas call by itself: on a GPU it would gather the
operands in silence, on a TPU it refuses. So a kernel's op runs inside
jax.shard_map over the ambient mesh (jax.set_mesh, or while tracing
jax.sharding.use_abstract_mesh), where there is one.
"""

from collections.abc import Callable
from collections.abc import Sequence
import math

import jax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec

# Axes that divide examples where nothing else says how an array is divided; the
# devices along the others compute the same rows.
ROW_AXES = ('data', 'fsdp')


def over_rows(
  function: Callable,
  rows: Sequence[jax.Array],
  whole: Sequence[jax.Array] = (),
  *,
  pallas: bool = True,
):
  """function(*rows, *whole), on a mesh with its share of the rows a device.

  Differentiable where function is: the gradients of `whole` are summed over the
  devices. An axis that shard_map already divides is left as it is.

  Args:
    function: to arrays (or a tree of them) whose leading dimensions are those
      of `rows`, or are as divided.
    rows: arrays [..., K] and [...] with the same leading dimensions. On
      explicit axes they are divided as the first is, on others by the first
      dimension.
    whole: arrays that every device needs.
    pallas: False where function is XLA's, so that axes other than ROW_AXES can
      stay the compiler's.

  Raises:
    ValueError: refusal's, of the first array.
  """
  reason = refusal(rows[0])
  if reason:
    raise ValueError(reason)
  free = _free_axes() if pallas else frozenset(_automatic())
  if not free:
    return function(*rows, *whole)
  spec = _divided(rows[0])
  while spec and not spec[-1]:
    spec = spec[:-1]  # What comes back may have fewer dimensions.
  return jax.shard_map(
    function,
    in_specs=(
      *(PartitionSpec(*spec[: array.ndim]) for array in rows),
      *(PartitionSpec() for _ in whole),
    ),
    out_specs=PartitionSpec(*spec),
    axis_names=free,
    check_vma=False,
  )(*rows, *whole)


def by_rows(x: jax.Array) -> jax.Array:
  """x, divided over the ambient mesh, where there is one, by rows alone.

  Rows are dimension 0. For what is made anew, as a recurrence's first state:
  nothing else tells the compiler how to divide it, and a loop that begins with
  all rows on every device goes on so. And for what a layer adds to, which the
  compiler would divide as that layer's width is. On one device it is x itself:
  with a constraint that says nothing, two runs in five of an encoder and
  decoder never ended their first step on a CPU of two cores.
  """
  mesh = jax.sharding.get_abstract_mesh()
  compilers = (a for a, t in _types().items() if t == AxisType.Auto)
  if math.prod(mesh.shape[axis] for axis in compilers) == 1:
    return x
  return jax.lax.with_sharding_constraint(x, PartitionSpec(_automatic()))


def row_devices() -> int:
  """How many devices share rows, where the compiler divides them."""
  mesh = jax.sharding.get_abstract_mesh()
  return math.prod(mesh.shape[axis] for axis in _automatic())


def refusal(x: jax.Array) -> str | None:
  """Why the ambient mesh's devices cannot share x [..., K], or None."""
  if not _free_axes():
    return None
  mesh = jax.sharding.get_abstract_mesh()
  explicit = jax.typeof(x).sharding.spec
  if len(explicit) == x.ndim and explicit[-1]:
    return f'{explicit} divides the last dimension of {x.shape}'
  for size, axes in zip(x.shape, _divided(x), strict=False):
    devices = math.prod(mesh.shape[axis] for axis in axes)
    if size % devices:
      return f'{devices} devices cannot share {size} of {x.shape} evenly'
  return None


def _free_axes() -> frozenset[str]:
  """The ambient mesh's axes that no shard_map around has taken."""
  types = _types().items()
  return frozenset(name for name, kind in types if kind != AxisType.Manual)


def _automatic() -> tuple[str, ...]:
  """The axes along which the compiler divides rows."""
  types = _types()
  return tuple(a for a in ROW_AXES if types.get(a) == AxisType.Auto)


def _types() -> dict[str, AxisType]:
  """How each axis of the ambient mesh is divided along; {} without a mesh."""
  mesh = jax.sharding.get_abstract_mesh()
  return dict(zip(mesh.axis_names, mesh.axis_types, strict=True))


def _divided(x: jax.Array) -> tuple[tuple[str, ...], ...]:
  """The axes along which each leading dimension of x [..., K] is divided."""
  spec = [
    (axes,) if isinstance(axes, str) else tuple(axes or ())
    for axes in jax.typeof(x).sharding.spec[: x.ndim - 1]
  ]
  automatic = _automatic()
  if automatic and x.ndim > 1:
    spec = spec or [()]
    spec[0] = spec[0] + automatic
  return tuple(spec)
