"""--config.PATH=VALUE: what a person types becomes a field of the config."""

import math

import pytest

from experiments import overrides
from train import check
from train import config as config_lib


def make(**kwargs):
  return config_lib.Config(
    total_epochs=30.0,
    model={'name': 'mlp', 'widths': (256, 128), 'dropout': 0.2},
    optimizer={'name': 'adamw'},
    **kwargs,
  )


def override(*words, config=None):
  """The config and the notes after words such as 'seed=1'."""
  assignments = [tuple(word.split('=', 1)) for word in words]
  return overrides.override(config or make(), assignments)


def changed(*words, config=None):
  """What the words changed: path -> (old, new)."""
  config = config or make()
  new, notes = override(*words, config=config)
  assert notes == []
  return config_lib.differences(config, new)


def refused(*words):
  with pytest.raises(config_lib.UserError) as caught:
    override(*words)
  line = str(caught.value)
  assert '\n' not in line
  return line


# ------------------------------------------------------------------- literal


@pytest.mark.parametrize(
  ('text', 'value'),
  [
    ('none', None),
    ('None', None),
    ('NONE', None),
    ('true', True),
    ('True', True),
    ('false', False),
    ('FALSE', False),
    ('3', 3),
    ('-3', -3),
    ('1e-3', 0.001),
    ('.5', 0.5),
    ('1_000', 1000),
    ('64,128', (64, 128)),
    ('64,', (64,)),
    ('(64, 128)', (64, 128)),
    ('()', ()),
    ('[64, [1, 2]]', (64, (1, 2))),
    ('{100: 0.5, 200: 0.1}', {100: 0.5, 200: 0.1}),
    ("{'mean': [0.5], 'std': (1,)}", {'mean': (0.5,), 'std': (1,)}),
    ("'relu'", 'relu'),
    ('"3"', '3'),
    ("'none'", 'none'),
    # Whatever is no literal is a word.
    ('relu', 'relu'),
    ('eval/accuracy', 'eval/accuracy'),
    ('2e', '2e'),
    ('0.5e', '0.5e'),
    ('', ''),
    ('/data/a=b', '/data/a=b'),
    ('Größe', 'Größe'),
    ('(1', '(1'),
    ('None,', (None,)),
    # Words with commas between them are several, as 64,128 are.
    ('flip,pad_crop', ('flip', 'pad_crop')),
    ('flip,pad_crop,', ('flip', 'pad_crop')),
    ('flip,', ('flip',)),
    ('a,b', ('a', 'b')),
    (',flip', ',flip'),
    ('flip,,rotate', 'flip,,rotate'),
    ('flip, rotate', 'flip, rotate'),
    ('flip,8', 'flip,8'),
    ('/data/a,b', '/data/a,b'),
    ('{"blocks": 0.0, "head": 1}', {'blocks': 0.0, 'head': 1}),
    (
      "({'name': 'mixup', 'alpha': 0.2}, 'flip')",
      ({'name': 'mixup', 'alpha': 0.2}, 'flip'),
    ),
    # Python has these, config.json could not keep them.
    ('{1, 2}', '{1, 2}'),
    ("b'x'", "b'x'"),
    ('1j', '1j'),
    ('...', '...'),
    ('{(1, 2): 3}', '{(1, 2): 3}'),
  ],
)
def test_a_literal_is_what_a_person_means(text, value):
  found = overrides.literal(text)
  assert found == value
  assert type(found) is type(value)
  assert repr(found) == repr(value)


@pytest.mark.parametrize(
  'text',
  [
    '__import__("os").getcwd()',
    'len([1])',
    '[x for x in (1,)]',
    'f"{1}"',
    '2 ** 3',
    'os.environ',
  ],
)
def test_nothing_that_is_typed_is_run(text):
  assert overrides.literal(text) == text


@pytest.mark.parametrize(
  ('text', 'value'),
  [('inf', math.inf), ('-INF', -math.inf), ('Infinity', math.inf)],
)
def test_infinities_are_numbers_so_that_they_can_be_refused(text, value):
  assert overrides.literal(text) == value


@pytest.mark.parametrize('text', ['nan', 'NaN', '-nan', '+nan'])
def test_nan_is_a_number_so_that_it_can_be_refused(text):
  assert math.isnan(overrides.literal(text))


@pytest.mark.parametrize('text', ['nano', 'infer', 'in', 'truest', 'nonesuch'])
def test_a_word_that_begins_like_a_number_is_a_word(text):
  assert overrides.literal(text) == text


@pytest.mark.parametrize(
  'text', ['(' * 10_000, '-' * 10_000 + '1', '9' * 10_000, '\0', '[' * 200]
)
def test_what_python_cannot_read_is_a_word(text):
  assert overrides.literal(text) == text


# --------------------------------------------------------------------- fields


@pytest.mark.parametrize(
  ('word', 'expected'),
  [
    ('seed=7', {'seed': (0, 7)}),
    ('log_every=2e', {'log_every': (50, '2e')}),
    ('loss=squared_error', {'loss': (None, 'squared_error')}),
    ('keep_best=3', {'keep_best': (1, 3)}),
    ('data.batch_size=8', {'data.batch_size': (64, 8)}),
    ('data.name=mnist:3.0.1', {'data.name': ('digits', 'mnist:3.0.1')}),
    ('data.normalize=none', {'data.normalize': ('mean_std', None)}),
    ('data.data_dir=/a=b', {'data.data_dir': (None, '/a=b')}),
    (
      "data.normalize={'mean': (0.5,), 'std': (1.0,)}",
      {'data.normalize': ('mean_std', {'mean': (0.5,), 'std': (1.0,)})},
    ),
    ('model.widths=8,4', {'model.widths': ((256, 128), (8, 4))}),
    ('model.activation=tanh', {'model.activation': (None, 'tanh')}),
    ('optimizer.b1=0.8', {'optimizer.b1': (None, 0.8)}),
    ('schedule.init_value=0.1', {'schedule.init_value': (1e-3, 0.1)}),
    ('early_stopping.patience=3', {'early_stopping.patience': (None, 3)}),
    (
      'early_stopping.metric=eval/loss',
      {'early_stopping.metric': (None, 'eval/loss')},
    ),
    ('ema_decay=0.999', {'ema_decay': (None, 0.999)}),
    ('tensorboard=true', {'tensorboard': (False, True)}),
    (
      'rate_multipliers={"blocks":0.0}',
      {'rate_multipliers': ({}, {'blocks': 0.0})},
    ),
    ('init_from=runs/a:300', {'init_from': (None, 'runs/a:300')}),
    ('init_new=head,', {'init_new': ((), ('head',))}),
    (
      'data.augment=flip,pad_crop',
      {'data.augment': ((), ('flip', 'pad_crop'))},
    ),
    ('data.classes=0,1', {'data.classes': ((), (0, 1))}),
  ],
)
def test_a_word_changes_one_field_and_nothing_else(word, expected):
  assert changed(word) == expected


@pytest.mark.parametrize(
  ('path', 'word'), [('data.augment', 'flip'), ('init_new', 'blocks/0')]
)
def test_one_word_where_a_field_takes_several_is_a_tuple_of_it(path, word):
  config, _ = override(f'{path}={word}', 'init_from=runs/a')
  assert config_lib.get(check.check(config), path) == (word,)


def test_the_config_that_is_given_is_left_as_it_is():
  config = make()
  override('seed=7', 'model.name=cnn', 'data.batch_size=8', config=config)
  assert config == make()


def test_the_last_of_two_values_counts():
  assert changed('seed=7', 'seed=8') == {'seed': (0, 8)}
  assert changed('model.dropout=0.1', 'model.dropout=0.3') == {
    'model.dropout': (0.2, 0.3)
  }


def test_nothing_given_changes_nothing():
  assert changed() == {}


# ---------------------------------------------------------------------- names


def test_another_name_replaces_the_block_and_says_what_fell():
  config, notes = override('model.name=cnn')
  assert config.model == {'name': 'cnn'}
  assert notes == [
    'config.model: mlp became cnn, which drops widths=(256, 128), dropout=0.2'
  ]


def test_another_name_of_a_block_without_arguments_says_nothing():
  config, notes = override('optimizer.name=sgd')
  assert config.optimizer == {'name': 'sgd'}
  assert notes == []


@pytest.mark.parametrize(
  'words',
  [
    ('model.name=cnn', 'model.widths=8,16'),
    ('model.widths=8,16', 'model.name=cnn'),
  ],
)
def test_arguments_of_the_new_name_stay_wherever_they_stand(words):
  config, notes = override(*words)
  assert config.model == {'name': 'cnn', 'widths': (8, 16)}
  assert len(notes) == 1


def test_the_same_name_keeps_the_arguments():
  assert changed('model.name=mlp') == {}
  assert changed('model.name=mlp', 'model.dropout=0.5') == {
    'model.dropout': (0.2, 0.5)
  }


def test_one_block_that_is_replaced_leaves_the_others():
  config, notes = override('schedule.name=constant_schedule')
  assert config.schedule == {'name': 'constant_schedule'}
  assert config.model == make().model
  assert notes == [
    'config.schedule: cosine_decay_schedule became constant_schedule, which '
    'drops init_value=0.001'
  ]


def test_another_dataset_is_no_block():
  assert changed('data.name=diabetes', 'data.batch_size=8') == {
    'data.name': ('digits', 'diabetes'),
    'data.batch_size': (64, 8),
  }


# --------------------------------------------------------------------- length


def test_giving_steps_clears_epochs():
  config, _ = override('total_steps=5')
  assert (config.total_steps, config.total_epochs) == (5, None)


def test_giving_epochs_clears_steps():
  config = config_lib.replace(make(), 'total_epochs', None)
  config = config_lib.replace(config, 'total_steps', 5)
  config, _ = override('total_epochs=2.5', config=config)
  assert (config.total_steps, config.total_epochs) == (None, 2.5)


@pytest.mark.parametrize(
  'words',
  [
    ('total_steps=5', 'total_epochs=2'),
    ('total_epochs=2', 'total_steps=5'),
  ],
)
def test_giving_both_keeps_both_and_is_refused_later(words):
  config, _ = override(*words)
  assert (config.total_steps, config.total_epochs) == (5, 2)
  with pytest.raises(config_lib.UserError, match='give one of the two'):
    check.check(config)


@pytest.mark.parametrize(
  'words',
  [
    ('total_steps=5', 'total_epochs=none'),
    ('total_epochs=none', 'total_steps=5'),
  ],
)
def test_one_may_be_set_to_none_by_hand(words):
  config, _ = override(*words)
  assert (config.total_steps, config.total_epochs) == (5, None)


def test_none_does_not_clear_the_other():
  config, _ = override('total_steps=none')
  assert (config.total_steps, config.total_epochs) == (None, 30.0)


# ------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
  ('path', 'meant'),
  [
    ('sed', 'seed'),
    ('total_epoch', 'total_epochs'),
    ('totalsteps', 'total_steps'),
    ('evalevery', 'eval_every'),
    ('batch_size', 'data.batch_size'),
    ('data.batchsize', 'data.batch_size'),
    ('data.validation', 'data.validation_fraction'),
    ('optimiser', 'optimizer'),
    ('optimiser.name', 'optimizer.name'),
    ('optimzer.b1', 'optimizer.b1'),
    ('modle.name', 'model.name'),
    ('modell.widths', 'model.widths'),
    ('shedule.value', 'schedule.value'),
    ('early_stoping.patience', 'early_stopping.patience'),
    ('augment', 'data.augment'),
    ('ema_deca', 'ema_decay'),
    ('label_smooting', 'label_smoothing'),
    ('rate_multiplier', 'rate_multipliers'),
    ('init_form', 'init_from'),
  ],
)
def test_a_misspelt_field_has_a_hint(path, meant):
  assert refused(f'{path}=3') == (
    f'config.{path} is not a field; did you mean config.{meant}?'
  )


def test_a_field_like_no_other_is_refused_with_all_that_there_are():
  line = refused('xyzzyxyzzyxyzzy=3')
  assert line.startswith('config.xyzzyxyzzyxyzzy is not a field; there are ')
  for path in config_lib.fields():
    assert f'config.{path}' in line


def test_a_field_of_data_like_no_other_is_refused_with_those_of_data():
  line = refused('data.xyzzyxyzzyxyzzyxyzzy=3')
  assert 'config.data.batch_size' in line
  assert 'config.seed' not in line


@pytest.mark.parametrize('path', ['model', 'optimizer', 'schedule'])
def test_a_block_is_not_set_as_a_whole(path):
  assert refused(f'{path}=cnn') == (
    f'config.{path} is a block; set config.{path}.name or another of its '
    'arguments'
  )


@pytest.mark.parametrize(
  'path',
  [
    'data',
    'model.widths.0',
    'model.',
    'seed.x',
    'early_stopping',
    'rate_multipliers.blocks',
    'data.augment.0',
    'data.name.x',
    '',
    '.',
    '__class__',
    'data.__class__',
    'model.__class__.x',
  ],
)
def test_a_path_that_leads_nowhere_is_refused(path):
  assert refused(f'{path}=3').startswith(f'config.{path} is not a field; ')
