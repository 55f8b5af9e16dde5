"""The configuration: what it takes, and how it is kept."""

import dataclasses
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from train import check
from train import config as config_lib
from train import resolve
from train.data import sources

REPOSITORY = pathlib.Path(__file__).parents[2]


def make(**kwargs):
  """A config that is right but for what is given, by path ('data__name')."""
  config = config_lib.Config(total_steps=10)
  for path, value in kwargs.items():
    config = config_lib.replace(config, path.replace('__', '.'), value)
  return config


def printed(code):
  """What a new process that runs this prints."""
  done = subprocess.run(
    [sys.executable, '-c', code],
    cwd=REPOSITORY,
    capture_output=True,
    text=True,
    check=True,
  )
  return done.stdout.strip()


# Another value for every field, and for parts of the blocks.
CHANGES = [
  ('seed', 1),
  ('total_steps', 11),
  ('total_epochs', 2.5),
  ('log_every', 7),
  ('log_every', '2e'),
  ('eval_every', 100),
  ('checkpoint_every', '0.5e'),
  ('keep_best', 3),
  ('on_save_error', 'stop'),
  ('best_metric', 'eval/loss'),
  ('task', 'regression'),
  ('loss', 'squared_error'),
  ('data.name', 'diabetes'),
  ('data.data_dir', '/a folder'),
  ('data.batch_size', 32),
  ('data.validation_fraction', 0.25),
  ('data.folds', 5),
  ('data.fold', 1),
  ('data.normalize', None),
  ('data.normalize', 'unit'),
  ('data.normalize', {'mean': (0.5, 1.0), 'std': (1.0, 2.0)}),
  ('data.augment', ('flip',)),
  ('data.augment', ({'name': 'pad_crop', 'padding': 4}, 'flip')),
  ('data.classes', (0, 1)),
  ('data.max_examples', 100),
  ('data.image_size', 224),
  ('data.sequence_length', 64),
  ('data.num_workers', 4),
  ('data.on_error', 'skip'),
  ('early_stopping.patience', 5),
  ('early_stopping.metric', 'eval/loss'),
  ('label_smoothing', 0.1),
  ('kernels', 'xla'),
  ('l1', 1e-4),
  ('l2', 0.5),
  ('weight_decay_mask', True),
  ('grad_clip_value', 0.5),
  ('grad_clip_norm', 1.0),
  ('rate_multipliers', {'blocks/0': 0.1, '.*bias': 2, 'head': 0.0}),
  ('ema_decay', 0.999),
  ('accumulate', 4),
  ('dtype', 'bfloat16'),
  ('deterministic', True),
  ('partition', 'shard_map'),
  ('sync_batch_norm', False),
  ('mesh.data', 4),
  ('mesh.fsdp', 2),
  ('mesh.tensor', 2),
  ('remat', 'dots_saveable'),
  ('init_from', 'runs/another:best'),
  ('init_new', ('head', 'blocks/1')),
  ('tensorboard', True),
  ('model', {'name': 'cnn'}),
  ('model', {'name': 'mlp', 'widths': (8, 4)}),
  ('model', {'name': 'mlp', 'nested': ((1, 2), {'a': (3, None)})}),
  ('optimizer', {'name': 'sgd', 'momentum': None}),
  ('optimizer', {'name': 'sgd', 'nesterov': True}),
  ('schedule', {'name': 'constant_schedule', 'value': 1e-3}),
  (
    'schedule',
    {
      'name': 'piecewise_constant_schedule',
      'init_value': 0.1,
      'boundaries_and_scales': {5: 0.5, 10: 0.5},
    },
  ),
]
every_change = pytest.mark.parametrize(('path', 'value'), CHANGES)


def test_every_field_is_covered_here():
  assert {path for path, _ in CHANGES} == set(config_lib.fields())


# ---------------------------------------------------------------------- JSON


@every_change
def test_a_config_comes_back_from_json_as_it_was(path, value):
  config = config_lib.replace(make(), path, value)
  back = config_lib.from_json(config_lib.to_json(config))
  assert back == config
  # Equality of dicts does not tell 1 from 1.0 from True.
  assert repr(back) == repr(config)
  assert config_lib.differences(config, back) == {}


def test_tuples_and_boundaries_in_steps_come_back_as_such():
  config = make(
    model={'name': 'mlp', 'widths': (8, 4)},
    schedule={'name': 'x', 'boundaries_and_scales': {5: 0.5, 10: 0.1}},
  )
  back = config_lib.from_json(config_lib.to_json(config))
  assert type(back.model['widths']) is tuple
  keys = list(back.schedule['boundaries_and_scales'])
  assert keys == [5, 10]
  assert {type(key) for key in keys} == {int}


def test_lists_become_tuples_however_deep():
  value = {'a': [1, [2, {'5': [3]}]], 'b': 'x'}
  assert config_lib.tuples(value) == {'a': (1, (2, {'5': (3,)})), 'b': 'x'}


def test_json_has_every_field_in_order_and_ends_a_line():
  text = config_lib.to_json(make())
  places = [
    text.index(f'"{field.name}":')
    for field in dataclasses.fields(config_lib.Config)
  ]
  assert places == sorted(places)
  assert text.endswith('}\n')


@pytest.mark.parametrize(
  'text',
  [
    '',
    '{',
    'null',
    '[]',
    '3',
    '{"data": 3}',
    '{"no_such_field": 1}',
    '{"data": {"no_such_field": 1}}',
    pytest.param('[' * 100_000, id='deep'),
    '__import__("os").mkdir("x")',
  ],
)
def test_text_that_is_no_config_is_refused_and_not_run(
  text, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(config_lib.UserError, match=r'config\.json') as caught:
    config_lib.from_json(text)
  assert '\n' not in str(caught.value)
  assert not list(tmp_path.iterdir())


# -------------------------------------------------------------------- digest


def test_a_digest_is_eight_hex_digits_and_the_same_for_equal_configs():
  digest = config_lib.digest(make())
  assert len(digest) == 8
  assert int(digest, 16) >= 0
  assert config_lib.digest(make()) == digest
  text = config_lib.to_json(make())
  assert config_lib.digest(config_lib.from_json(text)) == digest


def test_a_digest_is_the_same_in_another_process():
  code = (
    'from train import config\n'
    'print(config.digest(config.Config(total_steps=10)))\n'
  )
  assert printed(code) == config_lib.digest(make())


def test_every_change_has_a_digest_of_its_own():
  configs = [make()]
  configs += [
    config_lib.replace(make(), path, value) for path, value in CHANGES
  ]
  assert len({config_lib.digest(c) for c in configs}) == len(configs)


def test_a_whole_number_of_epochs_is_the_same_config_as_a_float():
  configs = [
    check.check(config_lib.Config(total_epochs=epochs)) for epochs in (30, 30.0)
  ]
  assert len({config_lib.digest(config) for config in configs}) == 1


# --------------------------------------------------------------- differences


@every_change
def test_the_one_difference_is_named_with_both_values(path, value):
  old, new = make(), config_lib.replace(make(), path, value)
  found = config_lib.differences(old, new)
  if path not in config_lib.BLOCKS:
    assert found == {path: (config_lib.get(old, path), value)}
    return
  block = config_lib.get(old, path)
  assert found == {
    f'{path}.{key}': (block.get(key), value.get(key))
    for key in (*block, *value)
    if block.get(key) != value.get(key)
  }


def test_differences_name_the_arguments_of_a_block():
  old = make(optimizer={'name': 'sgd', 'momentum': 0.9, 'nesterov': True})
  new = make(optimizer={'name': 'sgd', 'momentum': 0.8, 'b': 1}, seed=3)
  assert config_lib.differences(old, new) == {
    'seed': (0, 3),
    'optimizer.momentum': (0.9, 0.8),
    'optimizer.nesterov': (True, None),
    'optimizer.b': (None, 1),
  }


def test_equal_configs_have_no_differences():
  assert config_lib.differences(make(), make()) == {}


# --------------------------------------------------------------------- check


def refused(config, path):
  """The one line with which check() refuses the field at `path`."""
  with pytest.raises(config_lib.UserError) as caught:
    check.check(config)
  line = str(caught.value)
  assert line.startswith(f'config.{path}'), line
  assert '\n' not in line
  return line


@every_change
def test_a_right_value_is_left_as_it_is(path, value):
  config = config_lib.replace(make(), path, value)
  if path == 'total_epochs':
    config = config_lib.replace(config, 'total_steps', None)
  if path == 'init_new':
    config = config_lib.replace(config, 'init_from', 'runs/another')
  if path == 'data.folds':
    config = config_lib.replace(config, 'data.fold', 0)
  if path == 'data.fold':
    config = config_lib.replace(config, 'data.folds', 5)
  if path == 'sync_batch_norm':
    config = config_lib.replace(config, 'partition', 'shard_map')
  assert repr(check.check(config)) == repr(config)


NAN, INF = float('nan'), float('inf')
TOO_MANY = 2**31
TOO_LARGE = 10**400  # No float.


@pytest.mark.parametrize(
  ('path', 'values', 'takes'),
  [
    ('seed', ('x', 1.5, True, None, (1,)), 'a whole number'),
    ('seed', (-1, 2**32), 'from 0 to 2**32 - 1'),
    ('total_steps', ('x', 1.5, True), 'a whole number or none'),
    ('total_steps', (0, -1, TOO_MANY), 'at least 1'),
    ('log_every', (1.5, None, True, (1,)), 'a whole number or a word'),
    ('log_every', ('9' * 400 + 'e',), "('2e')"),
    ('log_every', (0, -5, '0e', '-1e', 'e', '2', '2ee', 'x', ''), "('2e')"),
    ('eval_every', (0, '0.0e', '1e5', ' 1e', '1.e', '.5e', 'nane'), "('2e')"),
    ('checkpoint_every', (0, 'infe', '2e\n', '1,5e'), "('2e')"),
    ('keep_best', (1.0, 'x', True, None), 'a whole number'),
    ('keep_best', (-1,), 'at least 0'),
    ('best_metric', (3, True, ('a',)), 'a word or none'),
    ('on_save_error', (None, 3, True), 'a word'),
    ('on_save_error', ('', 'Stop', 'ignore'), 'continue, stop'),
    ('task', (None, 3, True), 'a word'),
    ('loss', (3, True, ('a',)), 'a word or none'),
    ('data.name', (None, 3, ('a',)), 'a word'),
    ('data.data_dir', (3, True), 'a word or none'),
    ('data.batch_size', ('x', 1.0, None, True), 'a whole number'),
    ('data.batch_size', (0, -1), 'at least 1'),
    ('data.validation_fraction', ('x', None, True), 'a number'),
    ('data.validation_fraction', (-0.1, 1, 1.5), 'at least 0 and below 1'),
    ('data.validation_fraction', (NAN, INF, -INF), 'finite'),
    ('data.folds', ('x', 1.5, True, (5,)), 'a whole number or none'),
    ('data.folds', (1, 0, -5), 'at least 2, or none'),
    ('data.folds', (2, 5), 'give both'),
    ('data.fold', ('x', 1.5, True, (0,)), 'a whole number or none'),
    ('data.fold', (0, 3, -1), 'give both'),
    ('data.normalize', (3, True, (0.5,)), 'a word or a block'),
    ('data.normalize', ('meanstd', ''), 'mean_std, unit, symmetric, none'),
    (
      'data.normalize',
      ({}, {'mean': (0.0,)}, {'mean': (0.0,), 'std': (1.0,), 'x': 1}),
      "{'mean': (...), 'std': (...)}",
    ),
    ('data.augment', (3, None, {'name': 'flip'}), 'a tuple'),
    ('data.classes', (3, None, True, {'a': 1}), 'a tuple'),
    ('data.max_examples', ('x', 1.5, True), 'a whole number or none'),
    ('data.max_examples', (0, -1), 'at least 1'),
    ('data.image_size', ('x', 224.0, True, (32, 32)), 'a whole number or none'),
    ('data.image_size', (0, -224), 'at least 1'),
    ('data.num_workers', ('x', 1.5, True, None), 'a whole number'),
    ('data.num_workers', (-1,), 'at least 0'),
    ('data.on_error', (None, 3, True), 'a word'),
    ('data.on_error', ('', 'Skip', 'stop'), 'raise, skip'),
    ('early_stopping.patience', ('x', 1.5, True), 'a whole number or none'),
    ('early_stopping.patience', (0, -3), 'at least 1, or none'),
    ('early_stopping.metric', (3, True, ('a',)), 'a word or none'),
    (
      'early_stopping',
      (None, 3, {'patience': 3}),
      'train.config.EarlyStopping',
    ),
    ('kernels', (None, 3, True), 'a word'),
    ('kernels', ('pallas', '', 'XLA'), 'it takes auto, xla, pallas_tpu'),
    ('label_smoothing', ('x', None, True), 'a number'),
    ('label_smoothing', (-0.1, 1, 1.0, 2), 'at least 0 and below 1'),
    ('label_smoothing', (NAN, INF), 'finite'),
    ('l1', ('x', None, True, (0.1,), TOO_LARGE), 'a number'),
    ('l1', (-1e-9, -1), 'at least 0'),
    ('l1', (NAN, INF), 'finite'),
    ('l2', ('x', None, True), 'a number'),
    ('l2', (-1e-9, -1), 'at least 0'),
    ('weight_decay_mask', (1, 0, 'true', None), 'true or false'),
    ('grad_clip_value', ('x', True, (1.0,)), 'a number or none'),
    ('grad_clip_value', (0, 0.0, -1.0), 'above 0, or none'),
    ('grad_clip_value', (NAN, INF), 'finite'),
    ('grad_clip_norm', ('x', True), 'a number or none'),
    ('grad_clip_norm', (0, 0.0, -1.0), 'above 0, or none'),
    ('rate_multipliers', (None, 'head', 0.1, ('head',)), 'a block'),
    ('rate_multipliers', ({3: 0.1},), 'its keys must be words'),
    ('ema_decay', ('x', True), 'a number or none'),
    ('ema_decay', (0, 0.0, 1, 1.0, -0.5, 1.5), 'it must be within 0, 1'),
    ('ema_decay', (NAN,), 'finite'),
    ('accumulate', ('x', 2.0, None, True), 'a whole number'),
    ('accumulate', (0, -2), 'at least 1'),
    ('dtype', (None, 32), 'a word'),
    ('dtype', ('float16', 'bf16', ''), 'float32, bfloat16, float64'),
    ('partition', ('pmap', 'pjit', ''), 'jit, shard_map'),
    ('remat', ('everything', ''), 'none, dots_saveable'),
    ('mesh.data', (0, -2, 2**31), 'or -1 for all that are left'),
    ('init_from', (3, True, ('a',)), 'a word or none'),
    ('init_from', ('',), 'a workdir'),
    ('init_new', (3, None, {'head': 1}), 'a tuple'),
    ('init_new', (('head',),), 'init_from, which is none'),
    ('tensorboard', (1, 'yes', None), 'true or false'),
    ('model', (None, 'mlp', 3, ('mlp',)), 'a block with a name'),
    ('model', ({}, {'name': None}, {'name': 3}), 'it must have a name'),
    ('model', ({'name': 'mlp', 3: 4},), 'its keys must be words'),
    ('optimizer', ({}, {'b1': 0.9}), 'it must have a name'),
    ('data', (None, 'digits', {'name': 'digits'}), 'train.config.Data'),
    ('schedule', ({}, {'name': ('a',)}), 'it must have a name'),
  ],
)
def test_a_wrong_value_is_one_line_that_says_what_is_taken(path, values, takes):
  for value in values:
    line = refused(config_lib.replace(make(), path, value), path)
    assert repr(value) in line or f'is {value}' in line
    assert takes in line


@pytest.mark.parametrize('fold', [-1, 5, 2**40])
def test_a_fold_is_one_of_the_folds(fold):
  line = refused(make(data__folds=5, data__fold=fold), 'data.fold is')
  assert f'{fold};' in line
  assert line.endswith('of config.data.folds 5 it takes 0 to 4')


def test_a_fold_and_a_fraction_cannot_both_be_the_validation_part():
  config = make(data__folds=5, data__fold=0, data__validation_fraction=0.25)
  line = refused(config, 'data.folds is 5')
  assert 'config.data.validation_fraction is 0.25' in line


@pytest.mark.parametrize(
  'factor', ['x', None, True, (0.1,), {'a': 1}, -0.1, -1, NAN, INF]
)
def test_a_rate_multiplier_is_a_number_of_at_least_0(factor):
  config = make(rate_multipliers={'head': 1.0, 'blocks/0': factor})
  line = refused(config, 'rate_multipliers')
  assert 'blocks/0' in line
  assert repr(factor) in line


def test_a_rate_multiplier_that_no_float_can_hold_is_refused():
  refused(make(rate_multipliers={'head': TOO_LARGE}), 'rate_multipliers')


@pytest.mark.parametrize(
  'pattern',
  ['(', '[a', '*', 'a{2,1}', '(?P<a', '\\', 'a{99999999999}', '(' * 5000],
  ids=lambda pattern: pattern[:10],
)
@pytest.mark.parametrize('path', ['rate_multipliers', 'init_new'])
def test_a_pattern_that_is_no_regular_expression_is_refused(path, pattern):
  value = {pattern: 0.1} if path == 'rate_multipliers' else (pattern,)
  config = config_lib.replace(make(init_from='runs/another'), path, value)
  line = refused(config, path)
  assert repr(pattern)[:20] in line


@pytest.mark.parametrize('value', [(3,), (None,), ({'name': 'head'},)])
def test_what_is_new_is_named_by_words(value):
  refused(make(init_from='runs/another', init_new=value), 'init_new')


@pytest.mark.parametrize('path', ['data.augment', 'init_new'])
def test_one_word_is_taken_for_a_tuple_of_it(path):
  config = make(init_from='runs/another')
  config = check.check(config_lib.replace(config, path, 'head'))
  assert config_lib.get(config, path) == ('head',)


def test_early_stopping_needs_a_best_checkpoint_to_return():
  config = make(early_stopping__patience=3, keep_best=0)
  line = refused(config, 'keep_best')
  assert 'early stopping returns the best checkpoint' in line
  check.check(make(early_stopping__patience=None, keep_best=0))


def resolved_metric(best, stopping):
  split = sources.Split(
    {'features': np.zeros((4, 2), np.float32), 'label': np.zeros(4, np.int32)}
  )
  dataset = sources.Dataset('toy', {'train': split, 'test': split}, ('a', 'b'))
  config = make(
    best_metric=best,
    early_stopping__metric=stopping,
    data__batch_size=2,
  )
  config = resolve.resolve(config, dataset)
  assert config.early_stopping.metric == config.best_metric
  return config.best_metric


@pytest.mark.parametrize(
  ('best', 'stopping', 'expected'),
  [
    (None, None, 'eval/accuracy'),
    ('eval/loss', None, 'eval/loss'),
    (None, 'eval/loss', 'eval/loss'),
    ('eval/loss', 'eval/loss', 'eval/loss'),
  ],
)
def test_one_metric_judges_what_is_best_and_when_to_stop(
  best, stopping, expected
):
  assert resolved_metric(best, stopping) == expected


def test_two_metrics_that_differ_are_refused():
  with pytest.raises(config_lib.UserError) as caught:
    resolved_metric('eval/loss', 'eval/accuracy')
  line = str(caught.value)
  assert line.startswith("config.early_stopping.metric is 'eval/accuracy'")
  assert "config.best_metric is 'eval/loss'" in line
  assert '\n' not in line


@pytest.mark.parametrize(
  'epochs',
  [
    'x',
    True,
    (1,),
    0,
    0.0,
    -1.0,
    NAN,
    INF,
    pytest.param(10**400, id='10**400'),
  ],
)
def test_epochs_that_are_no_number_above_0_are_refused(epochs):
  config = config_lib.Config(total_epochs=epochs)
  assert repr(epochs) in refused(config, 'total_epochs')


@pytest.mark.parametrize('epochs', [1e10, 1e16, 1e300])
def test_more_epochs_than_steps_can_be_counted_are_refused(epochs):
  arrays = {'features': np.zeros((100, 2)), 'label': np.zeros(100)}
  split = sources.Split(arrays)
  dataset = sources.Dataset('toy', {'train': split, 'test': split})
  config = config_lib.Config(total_epochs=epochs, task='regression')
  with pytest.raises(config_lib.UserError, match=r'config\.total_epochs is'):
    resolve.resolve(config, dataset)


@pytest.mark.parametrize(
  ('steps', 'epochs'), [(None, None), (10, 2.0)], ids=['neither', 'both']
)
def test_the_length_is_given_once(steps, epochs):
  config = config_lib.Config(total_steps=steps, total_epochs=epochs)
  line = refused(config, 'total_steps')
  assert 'config.total_epochs' in line
  assert 'none' in line


@pytest.mark.parametrize('value', [NAN, INF, -INF])
@pytest.mark.parametrize(
  ('path', 'block', 'place'),
  [
    ('optimizer', lambda v: {'name': 'sgd', 'momentum': v}, '.momentum'),
    ('data.augment', lambda v: ({'name': 'x', 'p': v},), '.p'),
    ('rate_multipliers', lambda v: {'head': v}, '.head'),
    ('model', lambda v: {'name': 'x', 'a': (1.0, (v,))}, '.a'),
    ('schedule', lambda v: {'name': 'x', 'b': {5: v}}, '.b.5'),
    ('data.normalize', lambda v: {'mean': (v,), 'std': (1.0,)}, '.mean'),
  ],
)
def test_no_number_is_nan_or_infinite_however_deep(path, block, place, value):
  line = refused(config_lib.replace(make(), path, block(value)), path)
  assert line == f'config.{path}{place} is {value}; it must be finite'


@pytest.mark.parametrize(
  'value', [{1, 2}, b'x', 1j, len, {(1, 2): 3}, {None: 3}, {'a': (1, {2})}]
)
def test_what_json_cannot_hold_is_refused_however_deep(value):
  refused(make(model={'name': 'mlp', 'x': value}), 'model.x')


@pytest.mark.parametrize('rate', [1e-3, None, 'x'])
def test_a_rate_in_the_optimizer_is_refused_with_where_it_belongs(rate):
  config = make(optimizer={'name': 'sgd', 'learning_rate': rate})
  line = refused(config, 'optimizer.learning_rate')
  assert '--config.schedule.name=constant_schedule' in line
  assert f'--config.schedule.value={rate}' in line


def test_a_whole_number_is_taken_for_a_number():
  config = check.check(config_lib.Config(total_epochs=3))
  assert type(config.total_epochs) is float
  config = make(data__validation_fraction=0)
  assert type(check.check(config).data.validation_fraction) is float


def test_a_check_leaves_the_config_that_it_is_given():
  config = config_lib.Config(total_epochs=3)
  check.check(config)
  assert type(config.total_epochs) is int


# ------------------------------------------------------------------- cadence


@pytest.mark.parametrize(
  ('cadence', 'steps'),
  [
    (100, 100),
    (1, 1),
    ('1e', 22),  # 22.453125 steps are an epoch of digits in batches of 64.
    ('2e', 45),
    ('10e', 225),
    ('0.5e', 11),
    ('30.0e', 674),
    ('0.001e', 1),  # Never less than one step.
  ],
)
def test_a_cadence_in_epochs_is_the_nearest_number_of_steps(cadence, steps):
  assert config_lib.in_steps(cadence, 1437 / 64) == steps


# --------------------------------------------------------------------- fields


def test_a_field_is_read_and_replaced_by_its_path():
  config = make()
  changed = config_lib.replace(config, 'data.batch_size', 8)
  assert config_lib.get(changed, 'data.batch_size') == 8
  assert config_lib.get(config, 'data.batch_size') == 64
  assert config_lib.differences(config, changed) == {'data.batch_size': (64, 8)}


def test_two_configs_share_no_block():
  one, other = config_lib.Config(), config_lib.Config()
  parts = (*config_lib.PARTS, *config_lib.BLOCKS, 'rate_multipliers')
  for path in parts:
    assert config_lib.get(one, path) is not config_lib.get(other, path)


def test_importing_the_config_imports_no_jax():
  code = (
    'import sys\n'
    'from train import config\n'
    'from experiments import overrides\n'
    'print("jax" in sys.modules, "numpy" in sys.modules)\n'
  )
  assert printed(code) == 'False False'
