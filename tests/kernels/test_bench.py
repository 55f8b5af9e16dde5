"""The benchmark's arithmetic, its flags, and what it leaves for dispatch."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import bench
from kernels import blocks
from kernels import cases
from kernels import chips
from kernels import compile as compile_lib
from kernels import dispatch
from kernels import hlo
from kernels import tune

# Two loops' worth of what libtpu prints: the entry reads x [256, 1024] twice,
# once into the fast memory S(1), and a loop of 16 steps reads 8 of 128 rows.
TEXT = """HloModule jit_f, is_scheduled=true

%fused_slice (p.0: bf16[128,512], p.1: s32[]) -> bf16[8,512] {
  %p.0 = bf16[128,512]{1,0:T(8,128)(2,1)} parameter(0)
  %p.1 = s32[]{:T(128)S(6)} parameter(1)
  %zero.1 = s32[]{:T(128)} constant(0)
  ROOT %ds.1 = bf16[8,512]{1,0:T(8,128)} dynamic-slice(%p.0, %p.1, %zero.1), \
dynamic_slice_sizes={8,512}
}

%body (arg.0: (s32[], bf16[128,512])) -> (s32[], bf16[128,512]) {
  %arg.0 = (s32[]{:T(128)}, bf16[128,512]{1,0:T(8,128)(2,1)}) parameter(0)
  %i.1 = s32[]{:T(128)S(6)} get-tuple-element(%arg.0), index=0
  %h.1 = bf16[128,512]{1,0} get-tuple-element(%arg.0), index=1
  %slice.1 = bf16[8,512]{1,0:T(8,128)S(1)} fusion(%h.1, %i.1), kind=kLoop, \
calls=%fused_slice, backend_config={"bundle_analysis_data":\
{"estimated_cycles":"30","flops":"0"}}
  ROOT %tuple.1 = (s32[]{:T(128)}, bf16[128,512]{1,0}) tuple(%i.1, %h.1)
}

%condition (arg.1: (s32[], bf16[128,512])) -> pred[] {
  %arg.1 = (s32[]{:T(128)}, bf16[128,512]{1,0:T(8,128)(2,1)}) parameter(0)
  %limit.1 = s32[]{:T(128)} constant(16)
  %i.2 = s32[]{:T(128)} get-tuple-element(%arg.1), index=0
  ROOT %lt.1 = pred[]{:T(512)} compare(%i.2, %limit.1), direction=LT
}

ENTRY %main (x.1: bf16[256,1024], h.0: bf16[128,512]) -> f32[256,1024] {
  %x.1 = bf16[256,1024]{1,0:T(8,128)(2,1)} parameter(0), sharding={replicated}
  %h.0 = bf16[128,512]{1,0:T(8,128)(2,1)} parameter(1)
  %copy-start = (bf16[256,1024]{1,0:T(8,128)S(1)}, bf16[256,1024]{1,0}, \
/*index=2*/u32[]{:S(2)}) copy-start(%x.1)
  %copy-done = bf16[256,1024]{1,0:T(8,128)S(1)} copy-done(%copy-start)
  %kernel.1 = f32[256,1024]{1,0:T(8,128)} custom-call(%x.1, \
/*index=1*/%copy-done), custom_call_target="tpu_custom_call", \
backend_config={"bundle_analysis_data":{"estimated_cycles":"700","flops":"0"}}
  %i.0 = s32[]{:T(128)} constant(0)
  %start.1 = (s32[]{:T(128)}, bf16[128,512]{1,0}) tuple(%i.0, %h.0)
  %while.1 = (s32[]{:T(128)}, bf16[128,512]{1,0}) while(%start.1), \
condition=%condition, body=%body
  ROOT %gather.1 = f32[256,1024]{1,0} all-gather(%kernel.1), dimensions={0}
}
"""
X = 256 * 1024


def test_the_bytes_of_operations_are_those_in_the_large_memory():
  found = {one.name: one for one in hlo.operations(TEXT, {})}
  assert found['copy-start'].bytes == 2 * X
  assert found['kernel.1'].bytes == 2 * X + 4 * X
  assert found['kernel.1'].target == 'tpu_custom_call'
  assert found['kernel.1'].cycles == 700
  # A slice of h, and not h.
  assert (found['slice.1'].runs, found['slice.1'].bytes) == (16, 2 * 8 * 512)
  assert set(found) == {'copy-start', 'kernel.1', 'slice.1', 'gather.1'}


def test_a_kernel_that_reads_twice_says_so_itself():
  (kernel,) = (
    one
    for one in hlo.operations(TEXT, {'kernel': 9 * X})
    if one.name == 'kernel.1'
  )
  assert kernel.bytes == 9 * X


def test_an_estimate_is_the_longer_of_cycles_and_bytes_of_each_operation():
  program = compile_lib.Program(hlo.operations(TEXT, {}), temporary=0)
  assert program.cycles == 700 + 16 * 30
  assert program.kernels == ('kernel.1',)
  assert program.collectives == {'all-gather'}
  assert program.unknown == ()
  slow = chips.Chip('', '', '', bandwidth=1e30, flops=1.0, clock=2.0)
  assert program.seconds(slow) == pytest.approx((700 + 480) / 2)
  moved = 2 * X + 6 * X + 16 * 8192 + 8 * X
  narrow = chips.Chip('', '', '', bandwidth=3.0, flops=1.0, clock=1e30)
  assert program.seconds(narrow) == pytest.approx(moved / 3)


def test_without_cycles_there_is_no_estimate():
  text = TEXT.replace('"estimated_cycles":"700"', '"estimated_cycles":"0"')
  program = compile_lib.Program(hlo.operations(text, {}), temporary=5)
  cost = bench.estimate(program, 'v5e')
  assert cost.seconds is None
  assert 'kernel.1' in cost.reason


@pytest.mark.parametrize(
  ('op', 'shape', 'direction', 'microseconds'),
  # Bytes by hand, over 819 GB/s; 35.2 TFLOP over 197.
  [
    ('softmax', (65536, 1024), cases.FORWARD, 328),
    ('softmax', (8192, 32768), cases.FORWARD, 1311),
    ('softmax_cross_entropy', (8192, 32000), cases.BOTH, 1920),
    ('softmax_cross_entropy', (8192, 131072), cases.BOTH, 7866),
    (
      'linear_softmax_cross_entropy',
      (8192, 4096, 131072),
      cases.BOTH,
      178_580,
    ),
    ('conv2d', (256, 28, 28, 128, 128, 3), cases.FORWARD, 300.5),
    ('conv2d', (256, 56, 56, 64, 256, 1), cases.FORWARD, 627.3),
  ],
)
def test_the_physical_limit(op, shape, direction, microseconds):
  case = cases.Case(op, shape, direction)
  assert case in cases.CASES
  chip = chips.CHIPS['v5e']
  floor = max(case.bytes / chip.bandwidth, case.flops / chip.flops)
  assert floor * 1e6 == pytest.approx(microseconds, rel=1e-3)


@pytest.mark.parametrize('direction', [cases.FORWARD, cases.BOTH])
@pytest.mark.parametrize('op', cases.OPS)
def test_what_is_compared_computes_the_same(op, direction):
  shape = {
    'linear_softmax_cross_entropy': (16, 8, 24),
    **dict.fromkeys(cases.CONVOLUTIONS, (3, 5, 6, 4, 24, 3)),
  }.get(op, (16, 24))
  case = cases.Case(op, shape, direction)
  results = []
  for name in bench.OTHERS:
    function, operands = cases.program(case, name)
    keys = jax.random.split(jax.random.key(0), len(operands))
    results.append(
      function(
        *(
          jax.random.randint(key, one.shape, 0, 24)
          if one.dtype == jnp.int32
          else jax.random.normal(key, one.shape, one.dtype)
          for key, one in zip(keys, operands, strict=True)
        )
      )
    )
  for ours, plain in zip(*map(jax.tree.leaves, results), strict=True):
    assert ours.shape == plain.shape
    ours, plain = np.float64(ours), np.float64(plain)
    if op in cases.CONVOLUTIONS:
      # A ReLU at 0 may round to either side, and its gradient with it.
      assert np.linalg.norm(ours - plain) < 0.05 * np.linalg.norm(plain)
    else:
      np.testing.assert_allclose(ours, plain, rtol=0.03, atol=0.03)


@pytest.mark.parametrize('command', [bench, tune])
@pytest.mark.parametrize(
  ('flags', 'said'),
  [
    (['--target=v9'], 'v9'),
    (['--bogus'], '--bogus'),
    (['--target=here'], '--target takes v5e or v6e'),
  ],
)
def test_a_wrong_flag_is_exit_code_2(command, flags, said, capsys):
  with pytest.raises(SystemExit) as ended:
    command.main(flags)
  assert ended.value.code == 2
  assert said in capsys.readouterr().err


def test_an_unknown_op_and_an_estimate_to_keep_are_refused(capsys):
  for flags, said in [
    (['--ops=softmax,relu'], "'relu' is no op"),
    (['--target=v5e', '--write'], 'measured times alone'),
  ]:
    with pytest.raises(SystemExit) as ended:
      bench.main(flags)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_without_libtpu_an_estimate_says_what_to_install(monkeypatch, capsys):
  def missing():
    raise compile_lib.Unavailable("pip install 'jax[tpu]'")

  monkeypatch.setattr(compile_lib, 'version', missing)
  with pytest.raises(SystemExit) as ended:
    bench.main(['--target=v5e'])
  assert ended.value.code == 2
  assert 'jax[tpu]' in capsys.readouterr().err


def _on(kind):
  device = jax.sharding.AbstractDevice(
    device_kind=kind, num_cores=1, platform='tpu'
  )
  return jax.sharding.use_abstract_mesh(
    jax.sharding.AbstractMesh((), (), abstract_device=device)
  )


def test_what_is_written_is_what_dispatch_reads(monkeypatch, tmp_path):
  monkeypatch.setattr(dispatch, 'MEASURED', tmp_path / 'measured.json')
  other = {'op': 'softmax', 'chip': 'another'}
  gone = {'op': 'softmax', 'chip': 'TPU v5 lite'}
  dispatch.MEASURED.write_text(json.dumps([other, gone]))
  kernel, xla = bench.Cost(1e-6), bench.Cost(3e-6)
  case = cases.Case('softmax', (8, 1000), cases.FORWARD)
  record = bench.record(case, 'TPU v5 lite', kernel, xla)
  bench.write([record])
  written = json.loads(dispatch.MEASURED.read_text())
  assert written == [other, record]
  monkeypatch.setattr(dispatch, '_measured', lambda: [record])
  with _on('TPU v5 lite'):
    choose = lambda columns: dispatch.choose(  # noqa: E731
      'softmax', None, lambda _: None, dtype='bfloat16', columns=columns
    )
    assert choose(1000) == choose(1024) == 'pallas_tpu'
    assert choose(1025) == 'xla'


def test_a_tuned_block_is_for_its_chip_dtype_and_columns(monkeypatch, tmp_path):
  monkeypatch.setattr(blocks, 'TUNED', tmp_path / 'tuned.json')
  task = tune.Task('softmax', 'softmax', ((8, 1000),), ((16,), (32,)))
  times = {((8, 1000), ()): 2.0, ((8, 1000), (16,)): 1.0}
  times[(8, 1000), (32,)] = None
  blocks.TUNED.write_text('[]')
  tune.write(task, 'TPU v5 lite', 'static estimate', times)
  blocks.table.cache_clear()
  try:
    with _on('TPU v5 lite'):
      assert blocks.tuned('softmax', jnp.bfloat16, 600) == (16,)
      assert blocks.tuned('softmax', jnp.float32, 600) is None
      assert blocks.tuned('softmax', jnp.bfloat16, 512) is None
      assert blocks.tuned('cross_entropy', jnp.bfloat16, 600) is None
      # What is compared with the rule must see the rule, and not the table.
      with blocks.trying(()):
        assert blocks.tuned('softmax', jnp.bfloat16, 600) is None
    with _on('TPU v6 lite'):
      assert blocks.tuned('softmax', jnp.bfloat16, 600) is None
      with blocks.trying((4, 8)):
        assert blocks.tuned('softmax', jnp.bfloat16, 600) == (4, 8)
    # No better than the rule: the row goes.
    times[(8, 1000), (16,)] = 1.99
    tune.write(task, 'TPU v5 lite', 'static estimate', times)
    assert json.loads(blocks.TUNED.read_text()) == []
  finally:
    blocks.table.cache_clear()


def test_the_committed_tables_name_ops_and_chips_that_exist():
  for row in json.loads(blocks.TUNED.read_text()):
    assert row['op'] in {task.folder for task in tune.TASKS}
    assert row['columns'] & (row['columns'] - 1) == 0
  for row in json.loads(dispatch.MEASURED.read_text()):
    assert row['op'] in (*cases.OPS, 'log_softmax')
    assert row['columns'] & (row['columns'] - 1) == 0
