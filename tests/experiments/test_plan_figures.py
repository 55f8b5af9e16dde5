"""What the suites plan and scaling give."""

import math
import os

import pytest

from experiments import benchmark
from experiments import command
from experiments.benchmarks import plan as plan_suite
from experiments.benchmarks import scaling

ROWS = scaling.rows()
# Of one image of 224x224, as torchvision publishes them; H/14 is four times as
# many patches as L/32, of width 1280, in 32 blocks.
MULTIPLY_ADDS = {'ResNet-50': 4.089e9, 'ViT-B/16': 17.564e9,
                 'ViT-L/16': 61.555e9}  # fmt: skip


def test_the_table_is_that_of_its_rows():
  table = (scaling.FOLDER / 'scaling.md').read_text()
  assert scaling.text(ROWS) == table
  lines = [line for line in table.splitlines() if line.startswith('| ')]
  assert len(lines) == 1 + len(ROWS)
  assert len({line.count('|') for line in lines}) == 1


def test_all_models_are_planned_on_all_slices():
  planned = {(row['model'], row['chips']) for row in ROWS}
  assert planned == {
    (name, chips) for name in scaling.CASES for chips in scaling.SLICES
  }


@pytest.mark.parametrize(
  'row', ROWS, ids=lambda r: f'{r["model"]}-{r["chips"]}'
)
def test_a_planned_step_costs_what_its_images_cost(row):
  """At the peak of so many chips; forward, twice backward, blocks once more."""
  assert math.prod(row['mesh'].values()) == row['chips']
  seconds = row['flops'] / row['chips'] / 197e12
  assert row['seconds']['compute'] == pytest.approx(seconds)
  if forward := MULTIPLY_ADDS.get(row['model']):
    passes = row['flops'] / (2 * forward * row['batch_size'])
    least, most = (2.9, 3) if row['model'] == 'ResNet-50' else (3.5, 4)
    assert least < passes < most
  hidden, added = scaling.steps(row)
  assert max(row['seconds'].values()) == hidden < added


def test_efficiency_is_the_step_on_four_chips_over_that_on_more():
  row = {'model': 'ResNet-50', 'mesh': {'data': 4, 'fsdp': 1}, 'chips': 4,
         'batch_size': 8, 'needed': 2**30, 'over': 0,
         'seconds': {'compute': 2, 'memory': 4, 'interconnect': 1}}  # fmt: skip
  slower = row | {
    'chips': 16, 'seconds': {'compute': 2, 'memory': 4, 'interconnect': 5}
  }  # fmt: skip
  first, second = scaling.text([slower, row]).splitlines()[-2:]
  assert '| 4000.0, 5000.0 | 100%, 100% | 20.0% |' in first
  assert '| 5000.0, 9000.0 | 80%, 56% | 55.6% |' in second
  full = scaling.text([row | {'over': 3 * 2**29}]).splitlines()[-1]
  assert 'does not fit: 1.50 GiB too much' in full


@pytest.mark.slow
def test_steps_are_predicted_from_rates_that_are_measured_beside_them():
  rates, (row,) = plan_suite.measure_steps(('mlp',), rounds=1)
  assert rates.keys() == {'flops', 'bandwidth', 'cache_bandwidth'}
  assert min(rates.values()) > 1e8
  assert row['error'] == pytest.approx(
    row['predicted_ms'] / row['measured_ms'] - 1, abs=0.02
  )


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.skipif(
  not os.path.exists('/proc/self/clear_refs'), reason='Linux tells the peak'
)
def test_the_peak_of_a_vit_is_predicted_within_a_fifth():
  row = plan_suite.measure_memory('cifar10_vit')
  assert abs(row['error']) < 0.2


@pytest.mark.parametrize('suite', ['plan', 'scaling'])
def test_a_mistake_is_one_line(suite, capsys):
  words = [f'--suite={suite}', '--cases=none_such']
  assert command.run('benchmark', benchmark.main, words) == 2
  errors = capsys.readouterr().err
  assert errors.count('\n') == 1
  assert 'none_such' in errors
