"""What devices exchange, read from compiled programs."""

import json
import subprocess
import sys
import textwrap

import pytest

from kernels import hlo
from tests import conftest


@pytest.mark.parametrize(
  ('written', 'group'),
  [
    # The same groups in all of XLA's notations.
    ('replica_groups={{0,2},{1,3}}, dimensions={0}', (0, 2)),
    ('replica_groups=[2,2]<=[2,2]T(1,0), dimensions={0}', (0, 2)),
    ("replica_groups=mesh['data'=2,'fsdp'=2] {'data'}, x={0}", (0, 2)),
    # Rows of a mesh.
    ('replica_groups={{0,1},{2,3}}', (0, 1)),
    ('replica_groups=[2,2]<=[4], dimensions={0}', (0, 1)),
    ("replica_groups=mesh['data'=2,'fsdp'=2] {'fsdp'}", (0, 1)),
    # The middle of three axes, then two of them.
    ("replica_groups=mesh['a'=2,'b'=3,'c'=4] {'b'}", (0, 4, 8)),
    ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}", (0, 1, 4, 5)),
    ('replica_groups=[8,3]<=[2,3,4]T(0,2,1)', (0, 4, 8)),
    # All of them.
    ('replica_groups={{0,1,2,3}}', (0, 1, 2, 3)),
    ('replica_groups=[1,4]<=[4]', (0, 1, 2, 3)),
    ('replica_groups={}', ()),
    ('source_target_pairs={{0,3},{3,0}}', (0, 3)),
  ],
)
def test_the_group_of_the_first_device_is_read(written, group):
  assert hlo.group_of_first(f'channel_id=1, {written}, to_apply=%f') == group


PROGRAM = """
  import json, jax, jax.numpy as jnp
  from jax.sharding import PartitionSpec as P
  from kernels import hlo
  mesh = jax.make_mesh(
    (2, 4), ('a', 'b'), axis_types=(jax.sharding.AxisType.Auto,) * 2)

  def exchange(x, y):
    def body(total, _):
      return jax.lax.psum(jnp.sin(total + x), 'a'), None
    total, _ = jax.lax.scan(body, x, length=5)
    gathered = jax.lax.all_gather(y, 'b', tiled=True)
    scattered = jax.lax.psum_scatter(
      jnp.cos(gathered), ('a', 'b'), tiled=True)
    moved = jax.lax.ppermute(jnp.exp(y), 'b', [(0, 1), (1, 0)])
    return total, scattered, moved

  mapped = jax.jit(jax.shard_map(
    exchange, mesh=mesh, in_specs=(P(), P('b')),
    out_specs=(P(), P(('a', 'b')), P('b')), check_vma=False))
  x = jax.ShapeDtypeStruct((100,), jnp.float32)
  y = jax.ShapeDtypeStruct((32, 64), jnp.float32)
  text = mapped.lower(x, y).compile().as_text()
  print(json.dumps([
    [one.kind, one.runs, one.bytes, one.group]
    for one in hlo.collectives(text, 8)]))
"""


@pytest.mark.slow
def test_exchanges_have_their_bytes_their_groups_and_their_loops():
  ran = subprocess.run(
    [sys.executable, '-c', textwrap.dedent(PROGRAM)],
    capture_output=True,
    text=True,
    timeout=200,
    env=conftest.environment(JAX_NUM_CPU_DEVICES='8', JAX_PLATFORMS='cpu'),
  )
  assert ran.returncode == 0, ran.stderr
  found = json.loads(ran.stdout)
  whole = 32 * 64 * 4
  assert sorted(found) == [
    ['all-gather', 1, whole, [0, 1, 2, 3]],
    ['all-reduce', 5, 100 * 4, [0, 4]],
    ['collective-permute', 1, whole // 4, [0, 1]],
    ['reduce-scatter', 1, whole, [0, 1, 2, 3, 4, 5, 6, 7]],
  ]
