"""What test_tpu.py and test_gpu.py compile: entries of compile.Request."""

import functools
import importlib

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np

ROWS = PartitionSpec(('data', 'fsdp'))
APIS = {
  'conv2d': 'kernels.ops.convolution.api',
  'conv2d_stats': 'kernels.ops.convolution.stats',
  'softmax': 'kernels.ops.softmax.api',
  'log_softmax': 'kernels.ops.softmax.api',
  'softmax_cross_entropy': 'kernels.ops.cross_entropy.api',
  'linear_softmax_cross_entropy': 'kernels.ops.linear_cross_entropy.api',
}


def _op(devices, name, **settings):
  op = getattr(importlib.import_module(APIS[name]), name)
  tpu = devices[0].platform == 'tpu'
  implementation = 'pallas_tpu' if tpu else 'pallas_gpu'
  return functools.partial(op, implementation=implementation, **settings)


def one_device(devices, op, dtype, columns, gradient, settings, masked=False):
  """An op, and its gradient or under `where`, on the first device."""
  function = _op(devices, op, **settings)
  x = jax.ShapeDtypeStruct((256, columns), dtype)
  if op.endswith('softmax'):
    if masked:
      where = jax.ShapeDtypeStruct(x.shape, bool)
      return lambda x, where: function(x, where=where), (x, where)
    if gradient:
      return lambda x, g: jax.vjp(function, x)[1](g), (x, x)
    return function, (x,)
  labels = jax.ShapeDtypeStruct((256,), jnp.int32)
  operands = (x,)
  if op.startswith('linear'):
    width = 256
    operands = (
      jax.ShapeDtypeStruct((256, width), dtype),
      jax.ShapeDtypeStruct((width, columns), dtype),
    )
  if not gradient:
    return function, (*operands, labels)
  mean = lambda *operands: function(*operands).mean()  # noqa: E731
  places = tuple(range(len(operands)))
  return jax.value_and_grad(mean, places), (*operands, labels)


def convolution(
  devices, op, dtype, x, w, strides=1, given=(), activation=None, gradient=False
):
  """conv2d or conv2d_stats with `given` of its arrays, or its gradients."""
  before = op == 'conv2d_stats'
  settings = {
    'strides': strides,
    'in_activation' if before else 'activation': activation,
  }
  xla = getattr(importlib.import_module(APIS[op]), op)
  operands = {
    'x': jax.ShapeDtypeStruct(tuple(x), dtype),
    'w': jax.ShapeDtypeStruct(tuple(w), dtype),
  }
  results = jax.eval_shape(
    functools.partial(xla, implementation='xla', **settings), *operands.values()
  )
  for name in given:
    operands[name] = (
      results
      if name == 'residual'
      else jax.ShapeDtypeStruct((w[2 if before else 3],), jnp.float32)
    )
  kernel = _op(devices, op, **settings)
  function = lambda operands: kernel(**operands)  # noqa: E731
  if not gradient:
    return function, (operands,)

  def both(operands, grads):
    y, pull = jax.vjp(function, operands)
    return y, pull(grads)

  return both, (operands, results)


def four_devices(devices, op):
  """A step of a linear layer, its rows on a mesh of 2 x 2, by an op's loss."""
  mesh = Mesh(np.array(devices).reshape(2, 2), ('data', 'fsdp'))
  function = _op(devices, op)

  def loss(w, x, labels):
    if op.startswith('linear'):
      return function(x, w, labels).mean()
    logits = x @ w
    if op == 'softmax':
      seen = jax.nn.one_hot(labels, logits.shape[-1], dtype=x.dtype)
      return (function(logits) * seen).sum(-1).mean()
    return function(logits, labels).mean()

  def step(w, x, labels):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      value, gradient = jax.value_and_grad(loss)(w, x, labels)
      return value, w - 0.1 * gradient

  def struct(shape, dtype, spec):
    return jax.ShapeDtypeStruct(
      shape, dtype, sharding=NamedSharding(mesh, spec)
    )

  return step, (
    struct((256, 1024), jnp.bfloat16, PartitionSpec()),
    struct((512, 256), jnp.bfloat16, ROWS),
    struct((512,), jnp.int32, ROWS),
  )
