"""What is judged before the data, and that it judges no more than it knows."""

import pytest

from tests import runs
from train import config as config_lib
from train import program as program_lib
from train import resolve


def test_a_rate_that_grows_is_judged_over_the_run_and_no_further():
  """1.01 per step is 1.3 times after a run of 30, and beyond float32 later."""
  schedule = {
    'name': 'exponential_decay',
    'init_value': 0.1,
    'transition_steps': 1,
    'decay_rate': 1.01,
  }
  fields = {'total_steps': None, 'total_epochs': 1.0, 'schedule': schedule}
  program = program_lib.create(runs.config(**fields))
  last = program.config.total_steps - 1
  assert float(program.schedule(last)) == pytest.approx(0.1 * 1.01**last)


def test_a_warm_up_of_an_experiment_in_epochs_waits_for_its_length():
  schedule = {
    'name': 'warmup_cosine_decay_schedule',
    'init_value': 0.0,
    'peak_value': 0.1,
    'warmup_steps': 10,
  }
  fields = {'total_steps': None, 'total_epochs': 2.0, 'schedule': schedule}
  program = program_lib.create(runs.config(**fields))
  assert program.config.schedule['decay_steps'] == program.config.total_steps
  assert float(program.schedule(10)) == pytest.approx(0.1)


@pytest.mark.parametrize(
  ('fields', 'named'),
  [
    ({'optimizer': {'name': 'nosuch'}}, 'config.optimizer.name'),
    ({'schedule': {'name': 'nosuch'}}, 'config.schedule.name'),
    ({'model': {'name': 'nosuch'}}, 'config.model.name'),
    ({'task': 'nosuch'}, 'config.task'),
    ({'loss': 'nosuch'}, 'config.loss'),
    (
      {'schedule': {'name': 'constant_schedule', 'value': -1.0}},
      'config.schedule.name',
    ),
  ],
)
def test_names_are_refused_without_any_data(fields, named):
  with pytest.raises(config_lib.UserError, match=named):
    resolve.check_names(runs.config(**fields))
