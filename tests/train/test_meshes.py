"""One loop on any mesh: the same losses, less memory, no stray collective.

Each in a process whose CPU is eight devices.
"""

import json
import math
import subprocess
import sys
import textwrap

import pytest

from experiments.benchmarks import meshes
from tests import conftest

FAMILIES = [  # An MLP and a CNN have most of what the others have.
  pytest.param(
    name,
    marks=[
      pytest.mark.slow,
      *[pytest.mark.long] * (name not in ('mlp', 'cnn')),
    ],
  )
  for name in meshes.MODELS
]

NORMS = ('cnn', 'resnet')  # The families with batch norms.


def on_eight(script: str, **variables: str):
  """The JSON that a script prints, which has `meshes` imported."""
  head = 'import json\nfrom experiments.benchmarks import meshes\n'
  ran = subprocess.run(
    [sys.executable, '-c', head + textwrap.dedent(script)],
    capture_output=True,
    text=True,
    timeout=400,
    cwd=conftest.REPOSITORY,
    env=conftest.environment(
      XLA_FLAGS='--xla_force_host_platform_device_count=8',
      JAX_PLATFORMS='cpu',
      **variables,
    ),
  )
  assert ran.returncode == 0, ran.stderr
  return json.loads(ran.stdout.splitlines()[-1])


@pytest.mark.parametrize('name', FAMILIES)
def test_every_mesh_computes_the_same_and_exchanges_what_it_must(name):
  """Gradients, a batch norm's statistics, under fsdp parameters: nothing else.

  Activations would show by their 64 examples.
  """
  found = on_eight(
    f"""
    import jax
    program = meshes.program(meshes.config({name!r}))
    first = program.init()
    found = {{'alone': {{'losses': meshes.Step(program).losses(first)}}}}
    for key, lengths, partition in (
      ('data', (8, 1, 1), 'jit'),
      ('fsdp', (1, 8, 1), 'jit'),
      ('all', (2, 2, 2), 'jit'),
      ('shard_map', (8, 1, 1), 'shard_map'),
    ):
      config = meshes.config({name!r}, lengths=lengths, partition=partition)
      program = meshes.program(config)
      step = meshes.Step(program)
      found[key] = {{
        'losses': step.losses(first),
        'exchanged': step.collectives(),
        'bytes': step.argument_bytes(),
        'divided': [
          leaf.shape for leaf in jax.tree.leaves(program.state_shape.params)
          if 'fsdp' in leaf.sharding.spec
        ],
        'params': [
          leaf.shape for leaf in jax.tree.leaves(program.state_shape.params)
        ],
      }}
    print(json.dumps(found))
    """,
    JAX_ENABLE_X64='1',
  )
  alone = found.pop('alone')['losses']
  assert len(alone) == meshes.STEPS
  assert alone[-1] != alone[0]
  for case, values in found.items():
    assert values['losses'] == pytest.approx(alone, rel=0, abs=1e-9), case
  gradients = sum(map(math.prod, found['data']['params']))
  channels = sum(s[0] for s in found['data']['params'] if len(s) == 1)
  few = 100  # The loss, metrics, norms of gradients and parameters.
  for case in ('data', 'shard_map'):
    exchanged = found[case]['exchanged']
    assert {kind for kind, _ in exchanged} == {'all-reduce'}
    numbers = sum(math.prod(shape) for _, shape in exchanged)
    # Of a batch norm's channel a sum, squares, two gradients, and what
    # shard_map averages of the running statistics.
    most = gradients + few + (4 * channels if name in NORMS else 0)
    assert gradients <= numbers <= most, case
  exchanged = found['fsdp']['exchanged']
  gathered = [shape for kind, shape in exchanged if kind == 'all-gather']
  assert sorted(gathered) == sorted(found['fsdp']['divided'])
  assert {kind for kind, _ in exchanged} <= {
    'all-gather',
    'all-reduce',
    'reduce-scatter',
  }


@pytest.mark.slow
def test_a_convolution_in_groups_exchanges_no_images():
  """Whose gradients the compiler would gather them for."""
  exchanged, params = on_eight("""
    import jax
    config = meshes.config('resnet', 'float32', (8, 1, 1))
    config.model = {'name': 'resnext', 'depth': (1,), 'stem': '3x3'}
    program = meshes.program(config)
    params = jax.tree.leaves(program.state_shape.params)
    print(json.dumps([
      meshes.Step(program).collectives(), [leaf.shape for leaf in params]]))
    """)
  assert {kind for kind, _ in exchanged} == {'all-reduce'}
  channels = sum(shape[0] for shape in params if len(shape) == 1)
  numbers = sum(math.prod(shape) for _, shape in exchanged)
  assert numbers <= sum(map(math.prod, params)) + 4 * channels + 100


@pytest.mark.slow
def test_fsdp_divides_parameters_and_moments():
  replicated, divided = on_eight("""
    found = []
    for lengths in ((8, 1, 1), (1, 8, 1)):
      config = meshes.config('mlp', 'float32', lengths)
      config.model = config.model | meshes.LARGER['mlp']
      step = meshes.Step(meshes.program(config))
      found.append(step.argument_bytes())
    print(json.dumps(found))
    """)
  assert divided <= replicated / 6


@pytest.mark.slow
def test_shard_map_is_what_pmap_computes():
  """With dropout, which both draw from a device's own key."""
  largest, apart = on_eight("""
    import jax, numpy as np
    import dataclasses
    from train import partition
    config = meshes.config('cnn', 'float32', (8, 1, 1), partition='shard_map')
    config.model = config.model | {'dropout': 0.5, 'head_widths': (32,)}
    program = meshes.program(config)
    split = program.dataset.splits['train']
    function = program.train_step.__wrapped__.__wrapped__.__wrapped__
    pmapped = jax.pmap(function, axis_name='data')
    ours = program.init()
    theirs = jax.tree.map(
      lambda x: np.broadcast_to(np.asarray(x), (8, *x.shape)), ours)
    for step in range(5):
      batch = split.take(np.arange(64) + 64 * step)
      divided = {k: v.reshape(8, 8, *v.shape[1:]) for k, v in batch.items()}
      ours, metrics = program.train_step(
        ours, partition.put_rows(batch, program.mesh, 64))
      theirs, other = pmapped(theirs, divided)
    def state(s):
      return jax.tree.leaves((s.params, s.batch_stats, s.opt_state))
    largest = max(
      float(np.abs(np.asarray(a) - np.asarray(b)[0]).max())
      for a, b in zip(state(ours), state(theirs), strict=True))
    apart = abs(float(metrics['loss']) - float(other['loss'][0]))
    print(json.dumps([largest, apart]))
    """)
  assert largest <= 1e-6
  assert apart <= 1e-6


@pytest.mark.slow
@pytest.mark.parametrize('partition', ['jit', 'shard_map'])
def test_no_two_devices_draw_the_same_mask(partition):
  """The same example on every place of the batch; its outputs differ."""
  rows, again = on_eight(f"""
    import jax, jax.numpy as jnp, numpy as np
    from flax import nnx
    from train import config as config_lib, mesh as mesh_lib
    from train import optim, partition, paths
    from train import state as state_lib, step as step_lib
    from train.data import pipeline

    class Model(nnx.Module):
      def __init__(self):
        self.scale = nnx.Param(jnp.ones(()))
        self.dropout = nnx.Dropout(0.5)
      def __call__(self, x, *, train=False, rngs=None):
        return self.dropout(
          self.scale * x, deterministic=not train, rngs=rngs)

    graphdef, params = nnx.split(Model())
    params = nnx.to_pure_dict(params)
    config = config_lib.Config(
      total_steps=10,
      optimizer=optim.resolve_optimizer({{'name': 'sgd'}}),
      schedule={{'name': 'constant_schedule', 'value': 0.0}})
    schedule = optim.create_schedule(config.schedule, 10)
    tx = optim.create(config, schedule)
    seen = []
    def measure(outputs, batch):
      jax.debug.callback(lambda x: seen.append(np.asarray(x)), outputs)
      return {{}}
    mapped = {partition!r} == 'shard_map'
    step = step_lib.make_train_step(
      graphdef, tx, prepare=step_lib.make_prepare('features', None),
      augment=lambda keys, batch: batch,
      loss_fn=lambda outputs, batch: outputs.mean(-1), measure=measure,
      schedule=schedule, config=config,
      rates=dict.fromkeys(paths.flatten(params), 1.0), unroll=True,
      axis_name='data' if mapped else None)
    mesh = mesh_lib.make_mesh()
    if mapped:
      step = partition.per_device(mesh, step, pipeline.specs)
    step = jax.jit(partition.ambient(mesh, 'auto', step))
    batch = partition.put_rows(
      {{'features': np.ones((16, 64), np.float32)}}, mesh, 16)
    state = jax.device_put(
      state_lib.create(params, {{}}, tx.init(params), ema=False),
      partition.replicated(mesh))
    found = []
    for _ in range(2):
      seen.clear()
      jax.block_until_ready(step(state, batch))
      jax.effects_barrier()
      rows = {{row.tobytes() for block in seen for row in block}}
      found.append(sorted(row.hex()[:512] for row in rows))
    print(json.dumps(found))
    """)
  assert len(set(rows)) == 16
  assert rows == again  # A function of (seed, step).


@pytest.mark.slow
def test_batch_norm_can_be_of_each_devices_own_examples():
  together, each = on_eight("""
    found = []
    for sync in (True, False):
      step = meshes.Step(meshes.program(meshes.config(
        'cnn', 'float32', (8, 1, 1), partition='shard_map',
        sync_batch_norm=sync)))
      found.append(step.losses())
    print(json.dumps(found))
    """)
  assert abs(each[0] - together[0]) > 1e-3
  assert each[-1] < each[0]
