"""What test_sharding.py asks of a process that has eight devices, as JSON.

Each case gives its error, the collectives in its compiled text, and the shape
that a device holds of its result.
"""

import json
import re

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np

from kernels import sharding
from kernels.ops.convolution import api as convolution
from kernels.ops.convolution import stats as convolution_stats
from kernels.ops.softmax import api

GENERATOR = np.random.default_rng(0)
X = np.float32(GENERATOR.normal(size=(8, 4, 16, 128)))
WHERE = GENERATOR.random((8, 1, 1, 128)) < 0.8
KERNEL = 'pallas_tpu_interpret'
# name -> shape, axes, their type, how X is divided.
MESHES = {
  'data': ((8,), ('data',), AxisType.Auto, ('data',)),
  'fsdp': ((2, 4), ('data', 'fsdp'), AxisType.Auto, (('data', 'fsdp'),)),
  'tensor': ((2, 4), ('data', 'tensor'), AxisType.Auto, ('data',)),
  'explicit': ((8,), ('data',), AxisType.Explicit, ('data',)),
  'explicit queries': (
    (2, 4),
    ('data', 'rows'),
    AxisType.Explicit,
    ('data', None, 'rows'),
  ),
}


def _loss(x, where, implementation=KERNEL):
  y = api.softmax(
    x, where=where, causal=True, scale=2.0, implementation=implementation
  )
  return jnp.sum(jnp.sin(3 * y))


def _scan(x, where):
  def body(carry, xs):
    return carry, jax.grad(_loss)(*xs)

  return jax.lax.scan(body, None, (x[None], where[None]))[1][0]


def _vmap(x, where):
  heads = jnp.broadcast_to(where, (8, 4, 1, 128))
  return jax.vmap(jax.grad(_loss), 1, 1)(x, heads)


def _shard_map(x, where):
  return jax.shard_map(
    jax.grad(_loss),
    in_specs=(PartitionSpec('data'), PartitionSpec('data')),
    out_specs=PartitionSpec('data'),
    axis_names={'data'},
    check_vma=False,
  )(x, where)


FUNCTIONS = {
  'grad': jax.grad(_loss),
  'remat': jax.grad(jax.checkpoint(_loss)),
  'scan': _scan,
  'vmap': _vmap,
  'shard_map': _shard_map,
}


def _compared(function, mesh, spec):
  expected = jax.grad(_loss)(X, WHERE, 'xla')
  with jax.set_mesh(mesh):
    x = jax.device_put(X, NamedSharding(mesh, PartitionSpec(*spec)))
    where = jax.device_put(WHERE, NamedSharding(mesh, PartitionSpec(spec[0])))
    compiled = jax.jit(function).lower(x, where).compile()
    y = compiled(x, where)
  return {
    'error': float(np.abs(np.asarray(y) - np.asarray(expected)).max()),
    'collectives': re.findall(
      r'= \S+ (all-\w+|collective-permute|reduce-scatter)', compiled.as_text()
    ),
    'held': y.sharding.shard_shape(y.shape),
  }


# x, w and two arrays that scale and shift: F and C are the same.
CONVOLVED = tuple(
  np.float32(GENERATOR.normal(size=shape))
  for shape in ((16, 5, 4, 6), (2, 3, 6, 6), (6,), (6,))
)


def _conv2d_loss(x, w, scale, shift, implementation=KERNEL):
  y = convolution.conv2d(
    x,
    w,
    scale=scale,
    shift=shift,
    residual=x,
    activation='relu',
    implementation=implementation,
  )
  return jnp.sum(jnp.sin(y))


def _conv2d_stats_loss(x, w, scale, shift, implementation=KERNEL):
  y, total, squares = convolution_stats.conv2d_stats(
    x,
    w,
    in_scale=scale,
    in_shift=shift,
    in_activation='relu',
    implementation=implementation,
  )
  # Every image's gradient depends on all images' statistics.
  mean, variance = (one / (y.size // y.shape[-1]) for one in (total, squares))
  return jnp.sum(jnp.sin((y - mean) * jax.lax.rsqrt(variance + 1e-3)))


CONVOLUTIONS = {'conv2d': _conv2d_loss, 'conv2d_stats': _conv2d_stats_loss}


def _convolved(loss, mesh, spec):
  """The gradients' largest error, of the largest; and what is moved."""
  gradients = jax.value_and_grad(loss, (0, 1, 2, 3))
  expected = jax.tree.leaves(
    jax.jit(lambda *args: gradients(*args, 'xla'))(*CONVOLVED)
  )
  specs = PartitionSpec(*spec), *[PartitionSpec()] * 3
  try:
    with jax.set_mesh(mesh):
      arrays = [
        jax.device_put(one, NamedSharding(mesh, spec))
        for one, spec in zip(CONVOLVED, specs, strict=True)
      ]
      compiled = jax.jit(gradients).lower(*arrays).compile()
      found = jax.tree.leaves(compiled(*arrays))
  except ValueError as error:
    return {'raised': str(error)}
  return {
    'error': max(
      float(np.abs(np.asarray(one) - wanted).max() / np.abs(wanted).max())
      for one, wanted in zip(found, map(np.asarray, expected), strict=True)
    ),
    'collectives': sorted(
      {*re.findall(
        r' (all-[a-z]+(?:-[a-z]+)?|collective-permute|reduce-scatter)'
        r'(?:-start)?\(',
        compiled.as_text(),
      )}
    ),
    'held': found[1].sharding.shard_shape(found[1].shape),
  }  # fmt: skip


def _refusal(x):
  try:
    api.softmax(x, implementation=KERNEL)
  except ValueError as error:
    return str(error)
  return None


def _mesh(name):
  shape, axes, kind, _ = MESHES[name]
  return jax.make_mesh(shape, axes, axis_types=(kind,) * len(axes))


def _weights_gradient(mesh):
  """The largest error of the gradient by an array that each device has."""

  def loss(w, rows):
    return jnp.sum(sharding.over_rows(lambda x, w: x @ w, [rows], [w]))

  rows = X[:, 0, 0]
  with jax.set_mesh(mesh):
    grads = jax.jit(jax.grad(loss))(np.ones(128, np.float32), rows)
  return float(np.abs(np.asarray(grads) - rows.sum(0)).max())


def main():
  """Prints the cases' results."""
  results = {}
  for mesh, (*_, spec) in MESHES.items():
    for name, function in FUNCTIONS.items():
      if 'explicit' in mesh and name == 'shard_map':
        continue
      results[f'{name} on {mesh}'] = _compared(function, _mesh(mesh), spec)
  for mesh in ('data', 'fsdp'):
    for name, loss in CONVOLUTIONS.items():
      *_, spec = MESHES[mesh]
      results[f'{name} on {mesh}'] = _convolved(loss, _mesh(mesh), spec)
  refusals = {}
  with jax.set_mesh(_mesh('data')):
    refusals['seven'] = _refusal(jnp.zeros((7, 128)))
    refusals['one row'] = _refusal(jnp.zeros(128))
  mesh = _mesh('explicit')
  with jax.set_mesh(mesh):
    columns = NamedSharding(mesh, PartitionSpec(None, 'data'))
    refusals['columns'] = _refusal(jax.device_put(jnp.zeros((8, 128)), columns))
  print(
    json.dumps(
      {
        'cases': results,
        'refusals': refusals,
        'weights': _weights_gradient(_mesh('data')),
      }
    )
  )


if __name__ == '__main__':
  main()
