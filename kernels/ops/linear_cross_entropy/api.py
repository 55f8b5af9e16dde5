"""linear_softmax_cross_entropy: chunk by chunk of rows, there and back."""

import functools

import jax
import jax.numpy as jnp

from kernels import dispatch
from kernels import sharding
from kernels.ops.cross_entropy import reference
from kernels.ops.cross_entropy import rows
from kernels.ops.cross_entropy import shapes as row_shapes
from kernels.ops.linear_cross_entropy import shapes


def linear_softmax_cross_entropy(
  h: jax.Array,
  w: jax.Array,
  labels: jax.Array,
  *,
  implementation: str | None = None,
) -> jax.Array:
  """softmax_cross_entropy(h @ w, labels), [...], a chunk of rows at a time.

  There are never the logits of more than one chunk (shapes.chunks), forward or
  backward: they are computed again on the way back, for which h, w, the labels
  and one float32 a row are kept. Operands of half precision are multiplied as
  they are and added up in float32, w's gradient over all chunks.

  Differentiable once, by reverse mode, in h and w.

  Args:
    h: floating, [..., D].
    w: [D, V], of h's dtype.
    labels: integers, [...]. One outside [0, V) makes its row NaN, and with it
      the gradient of w.
    implementation: of the cross-entropy, in dispatch.IMPLEMENTATIONS; the
      products are XLA's.

  Returns:
    [...], float32; float64 where h is.

  Raises:
    TypeError: h is not floating, w of another dtype, labels not integers.
    ValueError: shapes that do not match, no classes, or an implementation that
      does not exist or cannot take these.
  """
  h, w, labels = (jnp.asarray(array) for array in (h, w, labels))
  _check(h, w, labels)
  shape = labels.shape
  if not shape:
    h, labels = h[None], labels[None]
  implementation = dispatch.choose(
    'linear_softmax_cross_entropy',
    implementation,
    lambda name: row_shapes.refusal(name, h),
    dtype=h.dtype,
    columns=w.shape[1],
  )
  targets = rows.encode(labels, w.shape[1], None)

  def loss(h, targets, w):
    flat = h.reshape(targets.size, h.shape[-1])
    flat = _loss(implementation, flat, targets.reshape(-1), w)
    return flat.reshape(targets.shape)

  pallas = implementation != 'xla'
  if not pallas and sharding.refusal(h) is not None:  # The compiler gathers.
    return loss(h, targets, w).reshape(shape)
  return sharding.over_rows(loss, [h, targets], [w], pallas=pallas).reshape(
    shape
  )


def _check(h, w, labels):
  if not jnp.issubdtype(h.dtype, jnp.floating) or h.dtype != w.dtype:
    raise TypeError(
      f'h is {h.dtype} and w {w.dtype}; both must be of one floating dtype'
    )
  if not jnp.issubdtype(labels.dtype, jnp.integer):
    raise TypeError(
      f'labels are {labels.dtype}; they must be integers, one class a row'
    )
  if not h.ndim or w.ndim != 2 or h.shape[-1] != w.shape[0]:
    raise ValueError(
      f'h is {h.shape} and w {w.shape}; h [..., D] takes w [D, V]'
    )
  if h.shape[:-1] != labels.shape:
    raise ValueError(
      f'h is {h.shape} and labels {labels.shape}; h [..., D] takes labels [...]'
    )
  if not w.shape[1]:
    raise ValueError(f'w is {w.shape}, which holds no class')


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(implementation, h, targets, w):
  return _forward(implementation, h, targets, w)[0]


def _forward(implementation, h, targets, w):
  """h [R, D], targets [R], w [D, V] -> the loss [R], and what is kept."""
  split, join = _chunks(h, w)
  chunks = split(h)

  def chunk(operands):
    index, targets = operands
    logits = _logits(chunks, index, w)
    return rows.forward(implementation, logits, targets, 0.0, 0.0)

  targets_split = _first(split(targets, reference.IGNORED))
  loss, lse = jax.lax.map(
    chunk, (jnp.arange(len(targets_split)), targets_split)
  )
  loss, lse = join(_first(loss)), join(_first(lse))
  return loss, (h, targets, w, lse)


def _backward(implementation, kept, loss_grad):
  del implementation  # One element by element, which XLA does best.
  h, targets, w, lse = kept
  split, join = _chunks(h, w)
  chunks = split(h)

  def chunk(carry, operands):
    w_grad, h_grad = carry
    index, targets, lse, loss_grad = operands
    grad = reference.backward(
      _logits(chunks, index, w), targets, lse, loss_grad, 0.0, 0.0
    )
    # Fused into the two products below it does not compile for a TPU v5e.
    grad = jax.lax.optimization_barrier(grad.astype(h.dtype))
    w_grad += _product('rd,rv->dv', _chunk(chunks, index), grad)
    of_chunk = _product('rv,dv->rd', grad, w).astype(h.dtype)
    # In place, where scan's own outputs would be turned afterwards.
    h_grad = jax.lax.dynamic_update_index_in_dim(h_grad, of_chunk, index, 1)
    return (w_grad, h_grad), None

  of_rows = [
    _first(split(targets, reference.IGNORED)),
    _first(split(lse)),
    _first(split(loss_grad)),
  ]
  start = jnp.zeros(w.shape, reference.statistics_dtype(w))
  (w_grad, h_grad), _ = jax.lax.scan(
    chunk,
    (start, jnp.zeros_like(chunks)),
    (jnp.arange(chunks.shape[1]), *of_rows),
  )
  return join(h_grad), None, w_grad.astype(w.dtype)


_loss.defvjp(_forward, _backward)


def _chunks(h, w):
  """(split, join): from [R, ...] to [rows of a chunk, chunks, ...] and back.

  A chunk is every so many-th row: where a mesh divides the rows, each device
  has its share of every chunk.
  """
  size = h.shape[0]
  count, each = shapes.chunks(size, *w.shape)

  def split(array, padding=0):
    if count * each > size:
      widths = [(0, count * each - size)] + [(0, 0)] * (array.ndim - 1)
      array = jnp.pad(array, widths, constant_values=padding)
    return array.reshape(each, count, *array.shape[1:])

  def join(array):
    return array.reshape(count * each, *array.shape[2:])[:size]

  return split, join


def _first(array):
  """The first two axes change places."""
  return array.swapaxes(0, 1)


def _chunk(chunks, index):
  return jax.lax.dynamic_index_in_dim(chunks, index, 1, keepdims=False)


def _logits(chunks, index, w):
  return _product('rd,dv->rv', _chunk(chunks, index), w)


def _product(formula, a, b):
  dtype = reference.statistics_dtype(a)
  return jnp.einsum(formula, a, b, preferred_element_type=dtype)
