"""The loss and the gradient of rows by any implementation, sharding aside."""

from collections.abc import Callable
import functools
import math

import jax
import jax.numpy as jnp

from kernels.ops.cross_entropy import pallas_gpu
from kernels.ops.cross_entropy import pallas_tpu
from kernels.ops.cross_entropy import reference

_KERNELS = {
  'pallas_tpu': functools.partial(pallas_tpu.forward, interpret=False),
  'pallas_tpu_interpret': functools.partial(pallas_tpu.forward, interpret=True),
  'pallas_gpu': functools.partial(pallas_gpu.forward, interpret=False),
  'pallas_gpu_interpret': functools.partial(pallas_gpu.forward, interpret=True),
}


def forward(
  implementation: str,
  logits: jax.Array,
  targets: jax.Array,
  label_smoothing: float,
  z_loss: float,
) -> tuple[jax.Array, jax.Array]:
  """(loss, lse), each [...]; reference.forward by `implementation`."""
  if implementation == 'xla':
    return reference.forward(logits, targets, label_smoothing, z_loss)
  return _kernel(implementation, label_smoothing, z_loss)(logits, targets)


def encode(
  labels: jax.Array, classes: int, ignore_index: int | None
) -> jax.Array:
  """The labels as int32 targets: in [0, classes), IGNORED or OUTSIDE."""
  inside = (labels >= 0) & (labels < classes)
  # Cut before the cast, in which a large one may wrap round to a class.
  targets = jnp.where(inside, labels, 0).astype(jnp.int32)
  targets = jnp.where(inside, targets, reference.OUTSIDE)
  bounds = jnp.iinfo(labels.dtype)
  if ignore_index is None or not bounds.min <= ignore_index <= bounds.max:
    return targets
  return jnp.where(labels == ignore_index, reference.IGNORED, targets)


def _kernel(
  implementation: str, label_smoothing: float, z_loss: float
) -> Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
  """The kernel, of logits [..., K] and targets [...]."""

  @jax.custom_batching.custom_vmap
  def run(logits, targets):
    shape = targets.shape
    rows = math.prod(shape)
    if not rows:
      empty = jnp.zeros(shape, jnp.float32)
      return empty, empty
    loss, lse = _KERNELS[implementation](
      logits.reshape(rows, logits.shape[-1]),
      targets.reshape(rows),
      label_smoothing,
      z_loss,
    )
    return loss.reshape(shape), lse.reshape(shape)

  @run.def_vmap
  def _(size, batched, logits, targets):
    # More rows, in place of a grid with one more dimension.
    if not batched[0]:
      logits = jnp.broadcast_to(logits, (size, *logits.shape))
    if not batched[1]:
      targets = jnp.broadcast_to(targets, (size, *targets.shape))
    return run(logits, targets), (True, True)

  return run
