"""Which implementation runs, and what is said about it."""

import jax
import jax.numpy as jnp
import pytest

from kernels import dispatch
from train import config as config_lib

CHIP = 'TPU v5 lite'


@pytest.fixture
def measured(monkeypatch):
  """measured(speedup, ...) puts a row in place of the committed table."""

  def put(speedup, chip=CHIP, dtype='float32', columns=1024):
    row = {
      'op': 'softmax',
      'chip': chip,
      'dtype': dtype,
      'columns': columns,
      'speedup': speedup,
    }
    monkeypatch.setattr(dispatch, '_measured', lambda: [row])

  return put


def on_a_tpu():
  return jax.sharding.use_abstract_mesh(
    jax.sharding.AbstractMesh(
      (),
      (),
      abstract_device=jax.sharding.AbstractDevice(
        device_kind=CHIP, num_cores=1, platform='tpu'
      ),
    )
  )


def explained(refusal=None, implementation=None, columns=1000):
  def op(x):
    dispatch.choose(
      'softmax',
      implementation,
      lambda name: refusal,
      dtype=x.dtype,
      columns=x.shape[-1],
    )
    return x

  shape = jax.ShapeDtypeStruct((8, columns), jnp.float32)
  (choice,) = dispatch.explain(op, shape)
  return choice.implementation, choice.reason


def test_a_cpu_has_no_kernel():
  assert explained() == ('xla', 'there is no kernel for cpu')


def test_nothing_was_measured_yet_so_that_xla_runs():
  with on_a_tpu():
    name, reason = explained()
  assert name == 'xla'
  assert 'was not measured on TPU v5 lite' in reason


def test_a_kernel_runs_where_it_was_measured_faster(measured):
  measured(1.5)
  with on_a_tpu():
    assert explained() == (
      'pallas_tpu',
      'measured 1.50 times as fast on TPU v5 lite',
    )
    assert explained(columns=513)[0] == 'pallas_tpu'
    for columns in (512, 1025):
      assert explained(columns=columns)[0] == 'xla'


@pytest.mark.parametrize(
  'row', [{'chip': 'TPU v6 lite'}, {'dtype': 'bfloat16'}, {'columns': 4096}]
)
def test_what_was_measured_elsewhere_tells_nothing(measured, row):
  measured(1.5, **row)
  with on_a_tpu():
    assert explained()[0] == 'xla'


def test_a_slower_kernel_does_not_run(measured):
  measured(0.5)
  with on_a_tpu():
    assert explained() == (
      'xla',
      f'on {CHIP} pallas_tpu took 2.00 times as long',
    )


def test_a_faster_kernel_that_cannot_take_the_operands_does_not_run(measured):
  measured(1.5)
  with on_a_tpu():
    assert explained('the rows are odd') == ('xla', 'the rows are odd')


def test_a_named_implementation_runs_or_raises():
  assert explained(implementation='pallas_gpu')[0] == 'pallas_gpu'
  assert explained(implementation='xla', refusal='odd')[0] == 'xla'
  with pytest.raises(
    ValueError, match=r'softmax: pallas_gpu cannot run here: the rows are odd'
  ):
    explained('the rows are odd', implementation='pallas_gpu')


def test_an_unknown_implementation_is_told_what_there_is():
  with pytest.raises(ValueError, match=r"'cuda'; there are xla, pallas_tpu"):
    explained(implementation='cuda')


def test_outside_of_explain_nothing_is_kept():
  explained()
  assert dispatch._local.records == []


def test_the_config_takes_the_same_words():
  assert ('auto', *dispatch.IMPLEMENTATIONS) == config_lib.KERNELS


def test_a_default_stands_where_none_is_named():
  kernel = 'pallas_tpu_interpret'
  with dispatch.default(kernel):
    assert explained() == (kernel, 'named as the default')
    assert explained(implementation='xla') == ('xla', 'named by the caller')
    with dispatch.default(None):
      assert explained() == ('xla', 'there is no kernel for cpu')
    with pytest.raises(ValueError, match='cannot run here: it is odd'):
      explained(refusal='it is odd')
  assert explained() == ('xla', 'there is no kernel for cpu')
