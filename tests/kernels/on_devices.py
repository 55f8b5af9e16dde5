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
