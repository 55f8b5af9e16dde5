"""softmax_cross_entropy: its arguments, its gradient, and who computes it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from kernels import dispatch
from kernels import sharding
from kernels.ops.cross_entropy import reference
from kernels.ops.cross_entropy import rows
from kernels.ops.cross_entropy import shapes


def softmax_cross_entropy(
  logits: jax.Array,
  labels: jax.Array,
  *,
  ignore_index: int | None = None,
  label_smoothing: float = 0.0,
  z_loss: float = 0.0,
  implementation: str | None = None,
) -> jax.Array:
  """-log softmax(logits)[label] of each row, [...].

  With a = label_smoothing the target is (1 - a) onehot(label) + a / K (Szegedy
  et al. 2016, https://arxiv.org/abs/1512.00567); z_loss times the square of the
  log-sum-exp is added (Chowdhery et al. 2022, https://arxiv.org/abs/2204.02311).

  Differentiable once, by reverse mode, in the logits. What is kept for the way
  back is the logits, the labels, and one float32 a row, the log-sum-exp; a
  probability is therefore as exact as that is: with all logits near 3e4, to one
  in a thousand.

  Args:
    logits: floating, [..., K].
    labels: integers, [...]. One that is no class, and not ignore_index, makes
      its row NaN and no other.
    ignore_index: rows with this label have the loss 0 and the gradient 0,
      whatever their logits are.
    label_smoothing: in [0, 1].
    z_loss: its weight.
    implementation: in dispatch.IMPLEMENTATIONS; None for XLA, or the kernel
      where it was measured to be faster.

  Returns:
    [...], float32; float64 where the logits are.

  Raises:
    TypeError: logits that are not floating, labels that are not integers, or
      an ignore_index, label_smoothing or z_loss that is no Python number.
    ValueError: shapes that do not match, no classes, a smoothing outside
      [0, 1], or an implementation that does not exist or cannot take these.
  """
  logits, labels = jnp.asarray(logits), jnp.asarray(labels)
  check(logits, labels)
  if ignore_index is not None and not isinstance(
    ignore_index, int | np.integer
  ):
    raise TypeError(
      f'ignore_index is {ignore_index!r}; it takes an int or None'
    )
  for name, value in (('label_smoothing', label_smoothing), ('z_loss', z_loss)):
    if not isinstance(value, int | float | np.number):
      raise TypeError(f'{name} is {value!r}; it takes a Python number')
  if not 0 <= label_smoothing <= 1:
    raise ValueError(f'label_smoothing is {label_smoothing}; it lies in [0, 1]')
  shape, columns = labels.shape, logits.shape[-1]
  if not shape:
    logits, labels = logits[None], labels[None]
  implementation = dispatch.choose(
    'softmax_cross_entropy',
    implementation,
    lambda name: shapes.refusal(name, logits),
    dtype=logits.dtype,
    columns=columns,
  )
  targets = rows.encode(labels, columns, ignore_index)
  loss = functools.partial(
    _loss, implementation, float(label_smoothing), float(z_loss)
  )
  return loss(logits, targets).reshape(shape)


def check(logits: jax.Array, labels: jax.Array) -> None:
  """Raises the TypeError or ValueError of logits and labels that do not fit."""
  if not jnp.issubdtype(logits.dtype, jnp.floating):
    raise TypeError(f'logits are {logits.dtype}; they must be floating')
  if not jnp.issubdtype(labels.dtype, jnp.integer):
    raise TypeError(
      f'labels are {labels.dtype}; they must be integers, one class a row'
    )
  if logits.shape[:-1] != labels.shape or not logits.ndim:
    raise ValueError(
      f'logits are {logits.shape} and labels {labels.shape}; logits [..., K] '
      'take labels [...]'
    )
  if not logits.shape[-1]:
    raise ValueError(f'logits are {logits.shape}, which holds no class')


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _loss(implementation, label_smoothing, z_loss, logits, targets):
  return _forward(implementation, label_smoothing, z_loss, logits, targets)[0]


def _forward(implementation, label_smoothing, z_loss, logits, targets):
  def of_rows(logits, targets):
    return rows.forward(
      implementation, logits, targets, label_smoothing, z_loss
    )

  if implementation == 'xla':
    loss, lse = of_rows(logits, targets)
  else:
    # The gradient is no part of it: the derivative of shard_map would add up
    # what devices along the other axes have computed alike.
    loss, lse = sharding.over_rows(of_rows, [logits, targets])
  return loss, (logits, targets, lse)


def _backward(implementation, label_smoothing, z_loss, kept, loss_grad):
  del implementation  # One element by element, which XLA does best.
  grad = reference.backward(*kept, loss_grad, label_smoothing, z_loss)
  return grad, None


_loss.defvjp(_forward, _backward)
