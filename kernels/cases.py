"""The ops on the shapes that matter, and what they must cost at least."""

import dataclasses
import functools
import importlib
import math

import jax
import jax.numpy as jnp

# The public function of each op, and its module.
OPS = {
  'softmax': 'kernels.ops.softmax.api',
  'softmax_cross_entropy': 'kernels.ops.cross_entropy.api',
  'linear_softmax_cross_entropy': 'kernels.ops.linear_cross_entropy.api',
  'conv2d': 'kernels.ops.convolution.api',
  'conv2d_stats': 'kernels.ops.convolution.stats',
}
CONVOLUTIONS = ('conv2d', 'conv2d_stats')
DTYPE = 'bfloat16'
FORWARD, BOTH = 'forward', 'forward+backward'
# The op as it is usually written: what XLA makes of that.
PLAIN = 'plain'


@dataclasses.dataclass(frozen=True)
class Case:
  """An op on one shape.

  Attributes:
    op: in OPS.
    shape: (rows, columns); of the linear op (rows, width, columns); of
      convolutions (images, height, width, channels, features, taps), with
      strides of 1, SAME, and taps x taps places.
    direction: FORWARD or BOTH.
  """

  op: str
  shape: tuple[int, ...]
  direction: str

  @property
  def columns(self) -> int:
    """What is summed over, or normalized."""
    if self.op in CONVOLUTIONS:
      return self.shape[3] * self.shape[5] ** 2
    return self.shape[-1]

  @property
  def bytes(self) -> int:
    """The fewest that must be read and written."""
    both = self.direction == BOTH
    if self.op in CONVOLUTIONS:
      *image, channels, features, taps = self.shape
      weights = taps * taps * channels * features
      passes = math.prod(image) * (channels + features) + weights
      # Back: the inputs and the gradient by the output are read, all others
      # written; of conv2d_stats the output is read too.
      return 2 * passes * (1 + 2 * both)
    if self.op == 'linear_softmax_cross_entropy':
      rows, width, columns = self.shape
      return 2 * (rows + columns) * width * (2 if both else 1)
    passes = {'softmax': (2, 5), 'softmax_cross_entropy': (1, 3)}[self.op]
    return 2 * math.prod(self.shape) * passes[both]

  @property
  def flops(self) -> int:
    """Of products; the logits are computed again for the gradient."""
    if self.op in CONVOLUTIONS:
      *pixels, taps = self.shape
      return (
        2 * math.prod(pixels) * taps**2 * (1 + 2 * (self.direction == BOTH))
      )
    if self.op != 'linear_softmax_cross_entropy':
      return 0
    return 2 * math.prod(self.shape) * (4 if self.direction == BOTH else 1)


CASES = (
  *(
    Case('softmax', shape, FORWARD)
    for shape in (
      (8192, 1024),
      (65536, 1024),
      (16384, 4096),
      (8192, 8192),
      (512, 32768),
      (8192, 32768),
      (2048, 131072),
      (1024, 262144),
    )
  ),
  *(
    Case('softmax', shape, BOTH)
    for shape in ((65536, 1024), (8192, 8192), (8192, 32768))
  ),
  *(
    Case('softmax_cross_entropy', shape, direction)
    for shape in ((4096, 32768), (8192, 32000), (8192, 131072))
    for direction in (FORWARD, BOTH)
  ),
  Case('linear_softmax_cross_entropy', (8192, 4096, 131072), BOTH),
  # Of ResNet-50. Of more images libtpu knows no cycles of XLA's.
  *(
    Case('conv2d', shape, FORWARD)
    for shape in (
      (16, 14, 14, 256, 256, 3),
      (64, 14, 14, 256, 256, 3),
      (16, 28, 14, 128, 128, 3),
      (64, 28, 28, 128, 128, 3),
      (64, 14, 14, 1024, 256, 1),
      (256, 28, 28, 128, 128, 3),
      (256, 56, 56, 64, 256, 1),
    )
  ),
  *(
    Case('conv2d_stats', shape, direction)
    for shape in ((256, 56, 56, 64, 256, 1), (256, 28, 28, 128, 128, 3))
    for direction in (FORWARD, BOTH)
  ),
)


def program(case: Case, implementation: str):
  """The function of a case, and its operands' shapes.

  Args:
    case: which.
    implementation: in dispatch.IMPLEMENTATIONS, or PLAIN.
  """
  *rows, columns = case.shape[0], case.shape[-1]
  if implementation == PLAIN:
    op = _PLAIN[case.op]
  else:
    op = getattr(importlib.import_module(OPS[case.op]), case.op)
    op = functools.partial(op, implementation=implementation)
  if case.op in CONVOLUTIONS:
    return _convolution(case, op)
  labels = jax.ShapeDtypeStruct(tuple(rows), jnp.int32)
  large = jax.ShapeDtypeStruct((*rows, columns), DTYPE)
  if case.op == 'softmax':
    if case.direction == FORWARD:
      return op, (large,)
    return lambda x, y_grad: jax.vjp(op, x)[1](y_grad), (large, large)
  operands = [large]
  if case.op == 'linear_softmax_cross_entropy':
    width = case.shape[1]
    operands = [
      jax.ShapeDtypeStruct((*rows, width), DTYPE),
      jax.ShapeDtypeStruct((width, columns), DTYPE),
    ]
  if case.direction == FORWARD:
    return op, (*operands, labels)
  differentiated = tuple(range(len(operands)))
  mean = lambda *operands: op(*operands).mean()  # noqa: E731
  return jax.value_and_grad(mean, differentiated), (*operands, labels)


def _convolution(case, op):
  """With an affine and a ReLU: behind conv2d, before conv2d_stats."""
  *_, channels, features, taps = case.shape
  x = jax.ShapeDtypeStruct(case.shape[:4], DTYPE)
  w = jax.ShapeDtypeStruct((taps, taps, channels, features), DTYPE)
  affine = features if case.op == 'conv2d' else channels
  affine = jax.ShapeDtypeStruct((affine,), jnp.float32)

  def function(x, w, scale, shift):
    if case.op == 'conv2d':
      return op(x, w, scale=scale, shift=shift, activation='relu')
    return op(x, w, in_scale=scale, in_shift=shift, in_activation='relu')

  operands = (x, w, affine, affine)
  if case.direction == FORWARD:
    return function, operands
  grads, tree = jax.tree.flatten(jax.eval_shape(function, *operands))

  def both(x, w, scale, shift, *grads):
    _, backward = jax.vjp(function, x, w, scale, shift)
    return backward(jax.tree.unflatten(tree, grads))

  return both, (*operands, *grads)


def compiled(devices, op, shape, direction, implementation):
  """compile.Request's entry."""
  function, operands = program(
    Case(op, tuple(shape), direction), implementation
  )
  mesh = jax.sharding.Mesh([devices[0]], ('data',))

  def on_device(*operands):
    # Known to dispatch.chip(), for the block sizes of this chip.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return function(*operands)

  here = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  return on_device, tuple(
    jax.ShapeDtypeStruct(one.shape, one.dtype, sharding=here)
    for one in operands
  )


def _plain_cross_entropy(logits, labels):
  # Not take_along_axis: of its gather libtpu's profile has no cycles.
  logits = logits.astype(jnp.float32)
  column = jax.lax.broadcasted_iota(labels.dtype, logits.shape, 1)
  picked = jnp.where(column == labels[:, None], logits, 0).sum(-1)
  return jax.nn.logsumexp(logits, -1) - picked


def _plain_convolution(x, w, *, scale, shift, activation):
  # A batch norm as usually written: in float32, behind the convolution.
  y = jax.lax.conv_general_dilated(
    x, w, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
  )
  assert activation == 'relu'
  return jax.nn.relu(y.astype(jnp.float32) * scale + shift).astype(x.dtype)


def _plain_statistics(x, w, *, in_scale, in_shift, in_activation):
  assert in_activation == 'relu'
  x = jax.nn.relu(x.astype(jnp.float32) * in_scale + in_shift).astype(x.dtype)
  y = jax.lax.conv_general_dilated(
    x, w, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
  )
  wide = y.astype(jnp.float32)
  total, squares = wide.sum((0, 1, 2)), jnp.square(wide).sum((0, 1, 2))
  return y, total, squares - jnp.square(total) / (y.size // y.shape[-1])


_PLAIN = {
  'conv2d': _plain_convolution,
  'conv2d_stats': _plain_statistics,
  'softmax': jax.nn.softmax,
  'softmax_cross_entropy': _plain_cross_entropy,
  'linear_softmax_cross_entropy': lambda h, w, labels: _plain_cross_entropy(
    h @ w, labels
  ),
}
