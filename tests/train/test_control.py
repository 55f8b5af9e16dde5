"""What evaluations decide: when a run stops, and how far its rate falls."""

import dataclasses

import pytest

from train import config as config_lib
from train import control

# Step -> score is what metrics.jsonl gives; an evaluation every 7 steps.
EVERY = 7


def scores(*values):
  return {EVERY * (i + 1): value for i, value in enumerate(values)}


def stopping(patience, metric='eval/accuracy', **fields):
  return config_lib.Config(
    total_steps=1000,
    best_metric=metric,
    early_stopping=config_lib.EarlyStopping(patience=patience),
    **fields,
  )


def plateau(metric='eval/loss', **kwargs):
  """A resolved config of W21: 1e-3, by 0.1 after 10, never below 1e-6."""
  block = {
    'name': 'reduce_on_plateau',
    'value': 1e-3,
    'factor': 0.1,
    'patience': 10,
    'min_value': 1e-6,
    'cooldown': 0,
  }
  return config_lib.Config(
    total_steps=1000, best_metric=metric, schedule=block | kwargs
  )


def rates(config, values):
  """The learning rate after each of these evaluations."""
  return [
    config.schedule['value']
    * control.rate_scale(config, scores(*values[: i + 1]))
    for i in range(len(values))
  ]


def reductions(config, values):
  """The evaluations, from 1, after which the rate was lower than before."""
  before = [config.schedule['value'], *rates(config, values)]
  pairs = zip(before[:-1], before[1:], strict=True)
  return [i for i, (old, new) in enumerate(pairs, 1) if new < old * 0.999]


# ------------------------------------------------------------- early stopping


@pytest.mark.parametrize('patience', [1, 2, 3, 10])
@pytest.mark.parametrize('better', [0, 1, 4])
def test_a_run_stops_patience_evaluations_after_its_best(patience, better):
  """W23: after `better` improvements, none."""
  config = stopping(patience)
  values = [0.5 + 0.1 * i for i in range(better + 1)]
  values += [0.4] * (patience + 3)
  best = better + 1  # The evaluation, from 1.
  stops = [
    control.should_stop(config, scores(*values[:count]))
    for count in range(1, len(values) + 1)
  ]
  assert stops.index(True) + 1 == best + patience
  assert all(stops[best + patience - 1 :])


@pytest.mark.parametrize(
  ('metric', 'values', 'stops'),
  [
    ('eval/accuracy', (0.1, 0.2, 0.3, 0.4), False),
    ('eval/accuracy', (0.4, 0.3, 0.3, 0.3), True),
    ('eval/accuracy', (0.4, 0.3, 0.2, 0.5), False),
    ('eval/top5_accuracy', (0.4, 0.3, 0.2, 0.1), True),
    ('eval/loss', (0.1, 0.2, 0.3, 0.4), True),
    ('eval/loss', (0.4, 0.3, 0.2, 0.1), False),
    ('eval/mean_squared_error', (9.0, 8.0, 7.0, 6.0), False),
    ('eval/mean_squared_error', (-9.0, -8.0, -7.0, -6.0), True),
  ],
)
def test_accuracies_are_better_high_and_losses_low(metric, values, stops):
  assert control.should_stop(stopping(3, metric), scores(*values)) == stops


def test_a_tie_is_no_improvement():
  config = stopping(2)
  assert control.should_stop(config, scores(0.5, 0.5, 0.5))
  assert control.should_stop(config, scores(0.4, 0.5, 0.5, 0.5))
  assert not control.should_stop(config, scores(0.4, 0.4, 0.5, 0.5))


def test_the_smallest_improvement_counts():
  values = (0.5, 0.4, 0.5 + 1e-12, 0.4)
  assert not control.should_stop(stopping(2), scores(*values))


def test_without_patience_or_scores_no_run_stops():
  assert not control.should_stop(stopping(None), scores(*[0.5] * 50))
  assert not control.should_stop(stopping(1), {})


def test_scores_are_judged_in_the_order_of_their_steps():
  found = scores(0.9, 0.5, 0.4)
  config = stopping(2)
  assert control.should_stop(config, found)
  assert control.should_stop(config, dict(reversed(found.items())))


def test_a_run_is_over_at_its_last_step_or_when_it_stops():
  config = stopping(2)
  assert control.is_over(config, 1000, {})
  assert not control.is_over(config, 999, scores(0.5))
  assert control.is_over(config, 21, scores(0.5, 0.4, 0.4))


# --------------------------------------------------------- reduce on plateau


@pytest.mark.parametrize('metric', ['eval/loss', 'eval/accuracy'])
@pytest.mark.parametrize('score', [0.7, 0.0, -3.0])
def test_a_flat_metric_lowers_the_rate_every_ten_evaluations(metric, score):
  """W21: the first evaluation is the best, and ten more are not better."""
  config = plateau(metric)
  found = rates(config, [score] * 60)
  expected = [1e-3] * 10 + [1e-4] * 10 + [1e-5] * 10 + [1e-6] * 30
  assert found == pytest.approx(expected, rel=1e-6)


def test_the_rate_never_falls_below_its_smallest():
  config = plateau(value=1e-3, min_value=3e-4, factor=0.5, patience=1)
  found = rates(config, [1.0] * 6)
  assert found == pytest.approx([1e-3, 5e-4] + [3e-4] * 4, rel=1e-6)


@pytest.mark.parametrize(
  ('metric', 'sign'), [('eval/loss', -1), ('eval/accuracy', 1)]
)
def test_an_improvement_starts_the_count_anew(metric, sign):
  config = plateau(metric, patience=3)
  # By hand: better at 1 and 3; 4, 5, 6 are not, and then 7, 8, 9.
  values = [sign * value for value in (1, 1, 2, 1, 2, 0, 1, 1, 1)]
  assert reductions(config, values) == [6, 9]
  # Better at 6 too, so that nothing is reduced there.
  values = [sign * value for value in (1, 1, 2, 1, 2, 3, 1, 1, 1)]
  assert reductions(config, values) == [9]


@pytest.mark.parametrize('metric', ['eval/loss', 'eval/accuracy'])
def test_what_improves_all_the_time_keeps_its_rate(metric):
  sign = 1 if metric == 'eval/accuracy' else -1
  values = [sign * (0.5 + 1e-4 * i) for i in range(40)]
  assert rates(plateau(metric, patience=1), values) == [1e-3] * 40
  # And what gets worse all the time does not, whatever its sign.
  assert reductions(plateau(metric, patience=2), values[::-1])[:2] == [3, 5]


def test_after_a_reduction_evaluations_cool_down():
  """By hand: reduced at 3; 4 and 5 do not count; 6 and 7 do."""
  values = [1.0] * 12
  assert reductions(plateau(patience=2, cooldown=0), values) == [3, 5, 7]
  assert reductions(plateau(patience=2, cooldown=2), values) == [3, 7, 11]


def test_an_improvement_while_it_cools_down_is_the_best_from_then_on():
  config = plateau(patience=2, cooldown=2)
  # Reduced at 3; 0.5 at 4 is the best; 6 and 7 are above it.
  values = [1.0, 1.0, 1.0, 0.5, 0.9, 0.9, 0.9]
  assert reductions(config, values) == [3, 7]


@pytest.mark.parametrize('name', ['constant_schedule', 'cosine_decay_schedule'])
def test_other_schedules_are_left_alone(name):
  config = config_lib.Config(
    total_steps=10, best_metric='eval/loss', schedule={'name': name}
  )
  assert control.rate_scale(config, scores(*[1.0] * 50)) == 1.0


def test_before_any_evaluation_the_rate_is_the_first():
  assert control.rate_scale(plateau(), {}) == 1.0


def test_a_resumed_run_decides_as_one_never_stopped():
  """The scores alone decide: no count is kept elsewhere."""
  config = plateau(patience=2)
  values = [0.5, 0.6, 0.7, 0.4, 0.5, 0.6, 0.7]
  straight = rates(config, values)
  for _ in range(2):
    again = rates(dataclasses.replace(config), values)
    assert again == straight
