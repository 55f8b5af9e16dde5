"""The field `kernels`: who computes the step's loss and its convolutions."""

import json
import subprocess
import sys
import textwrap

import jax
import pytest

from kernels import dispatch
from tests import conftest
from tests import runs
from train import config as config_lib
from train import loop
from train import mesh as mesh_lib
from train import partition
from train import program as program_lib
from train import writer
from train.data import pipeline


def first_batch(program):
  return next(
    pipeline.train_batches(
      program.dataset.splits['train'],
      seed=0,
      batch_size=program.config.data.batch_size,
      first_step=0,
      mesh=program.mesh,
    )
  )


def losses(folder, kernels, **fields):
  config = runs.config(kernels=kernels, label_smoothing=0.1, **fields)
  loop.train_and_evaluate(config, folder / kernels)
  return [
    line[key]
    for line in writer.read(folder / kernels / 'metrics.jsonl')
    for key in ('train/loss', 'eval/loss')
    if key in line
  ]


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_a_run_through_a_kernel_has_xlas_losses(tmp_path, dtype):
  expected = losses(tmp_path, 'xla', dtype=dtype)
  assert len(expected) == 6
  found = losses(tmp_path, 'pallas_tpu_interpret', dtype=dtype)
  rel = 1e-4 if dtype == 'float32' else 1e-2
  assert found == pytest.approx(expected, rel=rel)


@pytest.mark.slow
def test_a_run_through_the_convolutions_kernel_has_xlas_losses(tmp_path):
  model = {'name': 'cnn', 'widths': (4, 6)}
  fields = {'model': model, 'total_steps': 4, 'log_every': 1, 'eval_every': 2}
  data = config_lib.Data(name='digits', batch_size=8, max_examples=32)
  expected = losses(tmp_path, 'xla', data=data, **fields)
  assert len(expected) == 6
  found = losses(tmp_path, 'pallas_tpu_interpret', data=data, **fields)
  assert found == pytest.approx(expected, rel=1e-3)


def test_auto_is_xla_and_says_why():
  program = program_lib.create(runs.config())
  choices = dispatch.explain(
    program.train_step.__wrapped__, program.init(), first_batch(program)
  )
  assert {(c.op, c.implementation) for c in choices} == {
    ('softmax_cross_entropy', 'xla')
  }
  assert choices[0].reason == 'there is no kernel for cpu'


@pytest.mark.parametrize(
  ('platform', 'call'),
  [('tpu', 'tpu_custom_call'), ('cuda', 'mosaic_gpu')],
)
def test_a_whole_step_is_exported_with_the_kernel_in_it(
  platform, call, monkeypatch
):
  name = {'tpu': 'pallas_tpu', 'cuda': 'pallas_gpu'}[platform]
  device = {
    'tpu': {'device_kind': 'TPU v5 lite', 'num_cores': 1},
    'cuda': {'device_kind': 'NVIDIA H200', 'num_cores': 132},
  }[platform]
  # The machine has no such device; the export needs none.
  monkeypatch.setattr(mesh_lib, 'check_kernels', lambda *_: None)
  mesh = jax.sharding.AbstractMesh(
    (1, 1, 1),
    mesh_lib.AXES,
    axis_types=(jax.sharding.AxisType.Auto,) * 3,
    abstract_device=jax.sharding.AbstractDevice(platform=platform, **device),
  )
  of_here = partition.ambient
  monkeypatch.setattr(
    partition,
    'ambient',
    lambda _, *rest: of_here(type('M', (), {'abstract_mesh': mesh}), *rest),
  )
  program = program_lib.create(runs.config(kernels=name))
  shapes = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype),
    (program.state_shape, first_batch(program)),
  )
  exported = jax.export.export(
    jax.jit(program.train_step.__wrapped__),
    platforms=[platform],
    disabled_checks=[
      jax.export.DisabledSafetyCheck.custom_call('mosaic_gpu_v2')
    ],
  )(*shapes)
  assert call in exported.mlir_module()


@pytest.mark.slow
def test_eight_devices_share_the_rows_and_gather_nothing():
  script = textwrap.dedent("""
    import json, re
    import jax
    from tests import runs
    from tests.train import test_kernels
    from train import program as program_lib

    assert jax.device_count() == 8
    found = {}
    for kernels in ('xla', 'pallas_tpu_interpret'):
      program = program_lib.create(runs.config(kernels=kernels))
      state, batch = program.init(), test_kernels.first_batch(program)
      text = program.train_step.lower(state, batch).compile().as_text()
      found[kernels] = {
        name: len(re.findall(rf' {name}(-start)?[(]', text))
        for name in ('all-gather', 'all-to-all', 'collective-permute')
      }
      _, metrics = program.train_step(state, batch)
      found[kernels]['loss'] = float(metrics['loss'])
    print(json.dumps(found))
  """)
  ran = subprocess.run(
    [sys.executable, '-c', script],
    capture_output=True,
    text=True,
    cwd=conftest.REPOSITORY,
    env=conftest.environment(
      XLA_FLAGS='--xla_force_host_platform_device_count=8'
    ),
  )
  found = json.loads(ran.stdout)
  xla, kernel = found['xla'], found['pallas_tpu_interpret']
  assert kernel.pop('loss') == pytest.approx(xla.pop('loss'), rel=1e-5)
  assert kernel == dict.fromkeys(xla, 0)


@pytest.mark.parametrize('name', ['pallas_tpu', 'pallas_gpu'])
def test_a_kernel_of_another_platform_is_refused_before_compiling(name):
  with pytest.raises(
    config_lib.UserError, match=rf'config.kernels is {name}, which needs a'
  ):
    program_lib.create(runs.config(kernels=name))


def test_what_the_kernel_refuses_is_the_users_line(monkeypatch):
  from kernels.ops.cross_entropy import shapes

  monkeypatch.setattr(shapes, 'refusal', lambda *_: 'the rows are odd')
  with pytest.raises(
    config_lib.UserError,
    match='config.kernels is pallas_tpu_interpret: .* the rows are odd',
  ):
    program_lib.create(runs.config(kernels='pallas_tpu_interpret'))
