"""Plans by the compilers of TPUs and GPUs, with neither here."""

import importlib.metadata
import math

import pytest

from experiments.planning import compiler as compiler_lib
from experiments.planning import cost
from experiments.planning import targets
from tests import runs
from train import config as config_lib
from train import partition


def _lacks(package):
  try:
    importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return True
  return False


tpu = [
  pytest.mark.tpu,
  pytest.mark.skipif(_lacks('libtpu'), reason="libtpu: the extra 'tpu'"),
]
cuda = [
  pytest.mark.cuda,
  pytest.mark.skipif(
    _lacks('jax-cuda13-plugin'), reason="the plugin: the extra 'cuda'"
  ),
]
WIDTHS = (64, 512, 512, 10)  # Digits, two hidden layers, classes.
WEIGHTS = [a * b for a, b in zip(WIDTHS, WIDTHS[1:], strict=False)]
PARAMETERS = sum(WEIGHTS) + sum(WIDTHS[1:])


def ask(target, **fields):
  with compiler_lib.Compiler(targets.parse(target)) as compiler:
    account = compiler.ask(
      runs.config(**{'model': {'name': 'mlp', 'widths': WIDTHS[1:3]}, **fields})
    )
  return account, cost.plan(compiler.target, account)


@pytest.mark.parametrize(
  ('target', 'named'),
  [
    pytest.param('v5e:2x2', 'pallas_tpu', marks=tpu),
    pytest.param('h200:4', 'pallas_gpu', marks=cuda),
  ],
)
def test_a_named_kernel_is_in_the_program_and_auto_asks_the_target(
  target, named
):
  account, plan = ask(target, kernels=named, dtype='bfloat16')
  assert len(account['kernels']) >= 1
  assert plan.fits
  assert account['bytes']['parameters'] == 4 * PARAMETERS
  reduced = [one for one in plan.collectives if one['kind'] == 'all-reduce']
  assert sum(one['bytes'] for one in reduced) >= 2 * PARAMETERS
  assert plan.seconds['interconnect'] > 0
  account, _ = ask(target)
  assert account['kernels'] == []  # None was measured to be faster there.


@pytest.mark.parametrize(
  ('target', 'width'),
  [
    # By default a TPU's products read bfloat16: so are kernels gathered.
    pytest.param('v5e:2x2', 2, marks=tpu),
    pytest.param('h200:4', 4, marks=cuda),
  ],
)
def test_under_fsdp_what_is_divided_is_gathered(target, width):
  account, plan = ask(target, mesh=config_lib.Mesh(data=1, fsdp=4))
  divided = sum(w for w in WEIGHTS if w >= partition.MIN_FSDP_SIZE)
  whole = PARAMETERS - divided
  assert account['bytes']['parameters'] == 4 * (divided // 4 + whole)
  (gathered,) = (c for c in plan.collectives if c['kind'] == 'all-gather')
  assert gathered['bytes'] == width * divided


@pytest.mark.parametrize('target', [pytest.param('v5e:1x1', marks=tpu)])
def test_what_has_no_room_is_said_with_the_compilers_numbers(target):
  wide = 40_000
  account, plan = ask(target, model={'name': 'mlp', 'widths': (wide, wide)})
  arguments = sum(account['bytes'].values())
  assert arguments > 3 * 4 * wide**2  # With Adam's moments.
  assert not plan.fits
  assert plan.available == pytest.approx(15.75 * 2**30, rel=0.01)
  assert plan.needed >= arguments * 0.99
  assert plan.over == pytest.approx(plan.needed - plan.available)
  assert plan.step is None


@pytest.mark.parametrize('target', [pytest.param('v5e:3x5', marks=tpu)])
def test_a_slice_that_the_compiler_refuses_has_the_nearest(target):
  with pytest.raises(config_lib.UserError, match='the nearest is v5e:4x4'):
    ask(target)


@pytest.mark.parametrize(
  'target',
  [
    pytest.param(name, marks=tpu)
    for name in ('v4:2x2x1', 'v5p:2x2x1', 'v6e:2x2')
  ],
)
def test_every_kind_of_slice_compiles(target):
  account, plan = ask(target, model={'name': 'linear'})
  assert account['devices'] == math.prod(plan.target.shape) == 4
  assert account['kind'] == plan.target.chip.kind
