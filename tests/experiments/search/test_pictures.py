"""Pictures of sweeps that were made up, read from what they are drawn with."""

import json
import warnings

import numpy as np
import optuna
from optuna import distributions
from PIL import Image
import pytest

from experiments.search import importances
from experiments.search import parallel
from experiments.search import pictures
from experiments.search import results
from experiments.search import scales
from train import config as config_lib

SPACE = {
  'schedule.value': ('log', 1e-4, 1e-1),
  'data.batch_size': ('int', 32, 256),
  'model.dropout': ('uniform', 0, 0.5),
  'model.widths': ('choice', (64,), (128,), (256, 128)),
  'optimizer.nesterov': ('choice', True, False, None, 'auto'),
}
ALL = ['best', 'curves', 'importance', 'parallel', 'parameters']


@pytest.fixture(autouse=True)
def strict():
  """A warning of Matplotlib's or Optuna's is an error."""
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    yield


def points(count, seed=0):
  """Of SPACE, with the value of each; the rate explains nearly all of it."""
  generator = np.random.default_rng(seed)
  for _ in range(count):
    params = {
      'schedule.value': float(10 ** generator.uniform(-4, -1)),
      'data.batch_size': int(generator.integers(32, 257)),
      'model.dropout': float(generator.uniform(0, 0.5)),
      'model.widths': SPACE['model.widths'][1 + generator.integers(3)],
      'optimizer.nesterov': SPACE['optimizer.nesterov'][
        1 + generator.integers(4)
      ],
    }
    value = 0.98 - 0.05 * (np.log10(params['schedule.value']) + 2.3) ** 2
    yield params, float(value + generator.normal(0, 0.002))


def write(folder, trials, space=SPACE, direction='maximize', curves=True):
  """sweep.json and the runs' metrics.jsonl; trials are (params, value, state).

  A trial without a value has a curve that ends early.
  """
  metric = 'eval/accuracy'
  made, place = [], 0
  for i, (params, value, state) in enumerate(trials):
    workdir = folder / 'trials' / f'{i:03}'
    if curves and state not in ('waiting', 'failed'):
      workdir.mkdir(parents=True)
      last = 0.5 if value is None else value
      lines = [
        {'step': step, metric: last - 3 / step}
        for step in range(10, 101 if state == 'finished' else 31, 10)
      ]
      lines.insert(1, {'step': 15, 'train/loss': 1.0})
      text = ''.join(json.dumps(line) + '\n' for line in lines)
      (workdir / 'metrics.jsonl').write_text(text)
    finished = state == 'finished'
    made.append({
      'trial': i, 'params': params, 'state': state, 'value': value,
      'deviation': None, 'place': place if finished else None,
      'runs': [{
        'workdir': f'trials/{i:03}', 'seed': 0, 'fold': None, 'state': state,
        'value': value, 'step': None, 'command': '', 'log': '', 'attempts': 1,
      }],
    })  # fmt: skip
    place += finished
  sweep = {
    'config': 'digits_mlp', 'search': 'tpe', 'metric': metric,
    'direction': direction, 'seeds': 1, 'folds': None, 'space': space,
    'best': None, 'trials': made,
  }  # fmt: skip
  (folder / 'sweep.json').write_text(json.dumps(sweep))
  return folder


def finished(count):
  return [(params, value, 'finished') for params, value in points(count)]


def mixed(count):
  """Every third trial pruned, every fifth failed."""
  return [
    (params, None, 'pruned')
    if i % 3 == 1
    else (params, None, 'failed')
    if i % 5 == 3
    else (params, value, 'finished')
    for i, (params, value) in enumerate(points(count))
  ]


def drawn(folder):
  """(the pictures' names, what was said); each is a picture that opens."""
  said = []
  paths = pictures.draw(folder, said.append)
  for path in paths:
    with Image.open(path) as image:
      image.load()
      assert image.getextrema()[0] != (255, 255)  # Something is on it.
  names = sorted(path.name for path in paths)
  assert names == sorted(p.name for p in folder.glob('*.png*'))
  assert not any('\n' in line for line in said)
  return [name.removesuffix('.png') for name in names], said


def say_nothing(line):
  pytest.fail(line)


# ------------------------------------------------------------------ all kinds


def test_pruned_failed_and_finished_trials_give_all_pictures(tmp_path):
  assert drawn(write(tmp_path, mixed(20))) == (ALL, [])


@pytest.mark.slow  # 5 s.
def test_two_hundred_trials_give_all_pictures(tmp_path):
  assert drawn(write(tmp_path, mixed(200))) == (ALL, [])


@pytest.mark.parametrize('direction', ['maximize', 'minimize'])
def test_one_trial_gives_what_one_trial_can_show(tmp_path, direction):
  names, said = drawn(write(tmp_path, finished(1), direction=direction))
  assert names == ['best', 'curves', 'parallel', 'parameters']
  assert said == [
    'importance.png is left out: it takes 4 finished trials, of which are 1'
  ]


def test_where_all_failed_a_line_says_so_and_nothing_is_drawn(tmp_path):
  trials = [(params, None, 'failed') for params, _ in points(3)]
  names, said = drawn(write(tmp_path, trials))
  assert names == []
  assert said[0] == 'none of 3 trials has finished: no picture but curves'
  assert said[1].startswith('curves.png is left out: no run has eval/accuracy')


def test_while_none_has_finished_the_curves_are_drawn(tmp_path):
  states = ('pruned', 'failed', 'running', 'waiting')
  trials = [(p, None, s) for (p, _), s in zip(points(4), states, strict=True)]
  assert drawn(write(tmp_path, trials))[0] == ['curves']


LISTED = [
  {'optimizer.name': 'sgd', 'optimizer.momentum': 0.9},
  {'optimizer.name': 'adamw', 'schedule.value': 1e-3},
  {'model.widths': (64, 32)},
  {'model.widths': None, 'ema': True},
  {'ema': False, 'odd': '$\\frac{1$', 'blocks': {'name': 'flip'}},
  {'odd': '\u6cf0\u5c71\n\t\x07', 'schedule.value': 10**400},
  {},
]  # fmt: skip


@pytest.mark.parametrize('direction', ['maximize', 'minimize'])
def test_a_list_whose_trials_have_other_parameters_is_drawn(
  tmp_path, direction
):
  trials = [(p, 0.1 * i, 'finished') for i, p in enumerate(LISTED)]
  names, said = drawn(write(tmp_path, trials, None, direction))
  assert names == ['best', 'curves', 'parallel', 'parameters']
  assert said == [
    'importance.png is left out: no parameter varies that all finished trials '
    'have'
  ]


def test_one_parameter_gives_all_pictures(tmp_path):
  trials = [({'seed': i}, 0.1 * i**2, 'finished') for i in range(5)]
  assert drawn(write(tmp_path, trials, {'seed': ('int', 0, 9)})) == (ALL, [])


def test_without_parameters_that_vary_the_others_are_drawn(tmp_path):
  trials = [({'seed': 1}, 0.1 * i, 'finished') for i in range(5)]
  names, said = drawn(write(tmp_path, trials, None))
  assert names == ['best', 'curves']
  which = [x.partition(' is left out: no parameter varies')[0] for x in said]
  assert which == ['parameters.png', 'parallel.png', 'importance.png']


def test_equal_values_have_no_importances(tmp_path):
  trials = [({'seed': i}, 0.5, 'finished') for i in range(5)]
  names, said = drawn(write(tmp_path, trials, None))
  assert names == ['best', 'curves', 'parallel', 'parameters']
  assert 'all finished trials have the value 0.5' in said[0]


def test_values_outside_of_the_space_are_said(tmp_path):
  trials = [({'seed': i}, 0.1 * i, 'finished') for i in range(5)]
  names, said = drawn(write(tmp_path, trials, {'seed': ('int', 0, 3)}))
  assert names == ['best', 'curves', 'parallel', 'parameters']
  assert said[0].startswith('importance.png is left out: ')


@pytest.mark.parametrize(
  'text', ['{"step": 1}\nx\n{"step": 2}\n', '[]\n[]\n', '\0\n\0\n']
)
def test_a_damaged_metrics_jsonl_is_one_line_and_the_rest_is_drawn(
  tmp_path, text
):
  write(tmp_path, mixed(8))
  (tmp_path / 'trials' / '000' / 'metrics.jsonl').write_text(text)
  names, said = drawn(tmp_path)
  assert names == ALL
  assert len(said) == 1
  assert said[0].startswith('trial 0: ')


def test_odd_values_of_a_metric_are_no_points(tmp_path):
  write(tmp_path, finished(4))
  lines = [
    '{"step": 1, "eval/accuracy": "x"}',
    '{"step": 2, "eval/accuracy": NaN}',
    '{"step": 3, "eval/accuracy": 1e999}',
    '{"step": 4, "eval/accuracy": [1]}',
    '{"step": 5, "eval/accuracy": 0.5}',
  ]
  file = tmp_path / 'trials' / '000' / 'metrics.jsonl'
  file.write_text('\n'.join(lines) + '\n')
  figure = pictures.curves(results.read(tmp_path), say_nothing)
  single = [x for x in figure.axes[0].get_lines() if len(x.get_xdata()) == 1]
  assert [(*x.get_xdata(), *x.get_ydata()) for x in single] == [(5, 0.5)]


@pytest.mark.parametrize(
  'space',
  [
    {'seed': []}, {'seed': ['weird', 0, 1]}, {'seed': ['log', 0, 1]},
    {'seed': ['int', 3, 1]}, {'seed': ['uniform', 'a', 'b']},
    {'seed': ['int', 1]}, {'seed': 3}, {'seed': ['choice']}, [],
  ],
  ids=str,
)  # fmt: skip
def test_a_space_that_is_none_is_one_line(tmp_path, space):
  trials = [({'seed': i}, 0.1 * i, 'finished') for i in range(5)]
  write(tmp_path, trials, space)
  with pytest.raises(config_lib.UserError, match=r'sweep\.json is damaged: '):
    pictures.draw(tmp_path, say_nothing)
  assert not list(tmp_path.glob('*.png'))


def test_a_folder_without_a_sweep_is_one_line(tmp_path):
  with pytest.raises(config_lib.UserError, match='holds no sweep'):
    pictures.draw(tmp_path)


# --------------------------------------------------------- what they are of


def test_the_best_so_far_only_gets_better(tmp_path):
  values = [0.5, 0.7, 0.6, 0.9, 0.8]
  trials = [({'seed': i}, v, 'finished') for i, v in enumerate(values)]
  trials.insert(2, ({'seed': 9}, None, 'failed'))
  write(tmp_path, trials, None)
  figure = pictures.best(results.read(tmp_path), say_nothing)
  axes = figure.axes[0]
  (line,) = axes.get_lines()
  # The failed one was the third; the line goes on to the end.
  assert line.get_xdata().tolist() == [1, 2, 4, 5, 6, 6]
  assert line.get_ydata().tolist() == [0.5, 0.7, 0.7, 0.9, 0.9, 0.9]
  assert axes.get_title('left') == 'accuracy: best 0.9, trial 4'
  legend = {text.get_text() for text in figure.legends[0].get_texts()}
  assert legend == {'finished (5)', 'best so far', 'failed (1)'}


def test_the_best_of_a_loss_is_the_lowest(tmp_path):
  values = [0.5, 0.7, 0.4]
  trials = [({'seed': i}, v, 'finished') for i, v in enumerate(values)]
  write(tmp_path, trials, None, 'minimize')
  figure = pictures.best(results.read(tmp_path), say_nothing)
  (line,) = figure.axes[0].get_lines()
  assert line.get_ydata().tolist() == [0.5, 0.5, 0.4, 0.4]


def test_a_trial_that_diverged_does_not_press_the_others_together(tmp_path):
  values = [0.2, 0.25, 0.3, 1e9]
  trials = [({'seed': i}, v, 'finished') for i, v in enumerate(values)]
  write(tmp_path, trials, None, 'minimize')
  figure = pictures.best(results.read(tmp_path), say_nothing)
  low, high = figure.axes[0].get_ylim()
  assert low < 0.2
  assert 0.3 < high < 1
  legend = {text.get_text() for text in figure.legends[0].get_texts()}
  assert 'beyond (1)' in legend


def test_a_trial_somewhat_worse_is_no_reason_to_cut_it_off(tmp_path):
  values = [0.94, 0.97, 0.98, 0.99]
  trials = [({'seed': i}, v, 'finished') for i, v in enumerate(values)]
  write(tmp_path, trials, None)
  figure = pictures.best(results.read(tmp_path), say_nothing)
  low, high = figure.axes[0].get_ylim()
  assert low < 0.94
  assert high > 0.99


def test_seeds_and_folds_show_their_deviation(tmp_path):
  write(tmp_path, [({'seed': 0}, 0.5, 'finished')], None)
  file = tmp_path / 'sweep.json'
  text = file.read_text().replace('"deviation": null', '"deviation": 0.1')
  file.write_text(text)
  figure = pictures.best(results.read(tmp_path), say_nothing)
  axes = figure.axes[0]
  np.testing.assert_allclose(
    axes.collections[0].get_segments(), [[(1, 0.4), (1, 0.6)]]
  )
  low, high = axes.get_ylim()
  assert low < 0.4
  assert high > 0.6
  ticks = axes.get_xticks()
  assert ticks[(ticks > 0.5) & (ticks < 1.5)].tolist() == [1]


def test_a_parameters_panel_has_its_trials_where_its_scale_says(tmp_path):
  rates = [1e-4, 1e-3, 1e-2, 1e-1]
  trials = [({'rate': r}, 0.1 * i, 'finished') for i, r in enumerate(rates)]
  write(tmp_path, trials, {'rate': ('log', 1e-4, 1e-1)})
  figure = pictures.parameters(results.read(tmp_path), say_nothing)
  (axes,) = figure.axes
  offsets = np.concatenate([x.get_offsets() for x in axes.collections])
  expected = [(i / 3, 0.1 * i) for i in range(4)]
  assert {tuple(row) for row in offsets.round(9).tolist()} == {
    (round(x, 9), round(y, 9)) for x, y in expected
  }
  labels = [text.get_text() for text in axes.get_xticklabels()]
  assert labels == ['0.0001', '0.001', '0.01', '0.1']
  np.testing.assert_allclose(axes.get_xticks(), [0, 1 / 3, 2 / 3, 1])


def test_a_line_goes_through_a_trials_values_and_below_what_it_lacks(tmp_path):
  trials = [
    ({'a': 1, 'b': 'x'}, 0.1, 'finished'),
    ({'a': 3}, 0.2, 'finished'),
    ({'a': 2, 'b': 'y'}, 0.3, 'finished'),
  ]
  write(tmp_path, trials, None)
  figure = parallel.draw(results.read(tmp_path), say_nothing)
  axes = figure.axes[0]
  lines = [s[:, 1].tolist()[:2] for s in axes.collections[0].get_segments()]
  assert lines[0] == [0, 0]
  assert lines[1][0] == 1
  assert lines[1][1] < 0
  best = axes.get_lines()[0].get_ydata()
  assert best[:2].tolist() == [0.5, 1]
  texts = {text.get_text() for text in axes.texts}
  assert {'x', 'y', 'absent'} <= texts


def test_importances_are_optunas_of_a_study_with_the_same_trials(tmp_path):
  trials = mixed(24)
  write(tmp_path, trials)
  found, why = importances.importances(results.read(tmp_path))
  assert not why
  optuna.logging.set_verbosity(optuna.logging.ERROR)
  study = optuna.create_study(direction='maximize')
  words = {
    'model.widths': ('64', '128', '256-128'),
    'optimizer.nesterov': ('true', 'false', 'none', 'auto'),
  }
  space = {
    'schedule.value': distributions.FloatDistribution(1e-4, 1e-1, log=True),
    'data.batch_size': distributions.IntDistribution(32, 256),
    'model.dropout': distributions.FloatDistribution(0, 0.5),
  } | {n: distributions.CategoricalDistribution(w) for n, w in words.items()}
  for params, value, state in trials:
    if state == 'finished':
      named = {n: w[SPACE[n].index(params[n]) - 1] for n, w in words.items()}
      study.add_trial(
        optuna.create_trial(
          value=value, params=params | named, distributions=space
        )
      )
  evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
  expected = optuna.importance.get_param_importances(study, evaluator=evaluator)
  assert found == pytest.approx(expected)
  assert list(found)[0] == 'schedule.value'
  figure = pictures.importance(results.read(tmp_path), say_nothing)
  axes = figure.axes[0]
  labels = [text.get_text() for text in axes.get_yticklabels()]
  assert labels[::-1] == list(found)
  widths = [bar.get_width() for bar in axes.patches]
  assert widths[::-1] == pytest.approx(list(found.values()))


def test_the_curves_are_those_of_the_runs_the_best_in_front(tmp_path):
  trials = [
    ({'seed': 0}, 0.8, 'finished'),
    ({'seed': 1}, 0.9, 'finished'),
    ({'seed': 2}, None, 'pruned'),
  ]
  write(tmp_path, trials, None)
  figure = pictures.curves(results.read(tmp_path), say_nothing)
  lines = {x.get_label(): x for x in figure.axes[0].get_lines()}
  assert set(lines) == {'best: trial 1, 0.9', 'then: 0', 'pruned (1)'}
  best = lines['best: trial 1, 0.9']
  steps = np.arange(10, 101, 10)
  np.testing.assert_allclose(best.get_xdata(), steps)
  np.testing.assert_allclose(best.get_ydata(), 0.9 - 3 / steps)
  assert lines['pruned (1)'].get_xdata().tolist() == [10, 20, 30]
  assert best.get_zorder() > max(
    x.get_zorder() for x in lines.values() if x is not best
  )


# ---------------------------------------------------------------------- words


@pytest.mark.parametrize(
  ('value', 'text'),
  [
    (None, 'none'), (True, 'true'), (False, 'false'), (0, '0'), (1, '1'),
    (0.000123456, '0.000123'), ((64,), '64'), ((256, 128), '256, 128'),
    ((), '()'), ('adamw', 'adamw'), ('', ''), ({'name': 'flip'}, 'name=flip'),
    ('a' * 40, 'a' * 17 + '…'), ('\u5c71', '\\u5c71'), ('a\nb', 'a b'),
  ],
)  # fmt: skip
def test_a_value_is_written_as_a_person_does(value, text):
  assert scales.shown(value) == text


def test_values_that_look_alike_when_cut_keep_their_own_places():
  names = ['x' * 30 + end for end in 'abc']
  scale = scales.Scale(None, names)
  assert [scale.place(name) for name in names] == [0, 0.5, 1]


@pytest.mark.parametrize(
  ('words', 'values', 'is_log'),
  [
    (('log', 1e-4, 1), [1e-3, 1e-2], True),
    (('uniform', 0, 1), [1e-3, 1], False),
    (None, [1e-3, 1], True),
    (None, [0.5, 1], False),
    (None, [0, 1000], False),
  ],
)
def test_a_scale_has_decades_where_the_search_had_or_a_list_spans_them(
  words, values, is_log
):
  assert scales.Scale(words, values).is_log == is_log
