"""Blocks: words in a config become the arguments of a function."""

import typing

import pytest

import models
from train import blocks
from train import config as config_lib


def mill(
  power,
  stones=2,
  wind=0.5,
  sails=(3, 4),
  grain='rye',
  turning=False,
  miller=None,
  tool=len,
  *,
  door=1,
):
  """A function with an argument of every kind."""
  del power, stones, wind, sails, grain, turning, miller, tool, door


class Mill:
  """As mill, with rngs that the program passes."""

  def __init__(self, shape, stones=2, *, rngs):
    del shape, stones, rngs


def resolve(block, function=mill, **kwargs):
  return blocks.resolve('mills', block, function, **kwargs)


def refused(block, path, function=mill, **kwargs):
  """The one line that refuses the argument at `path`."""
  with pytest.raises(config_lib.UserError) as caught:
    resolve({'name': 'mill', **block}, function, **kwargs)
  line = str(caught.value)
  assert line.startswith(f'config.mills.{path} is '), line
  assert '\n' not in line
  return line


# ------------------------------------------------------------------- resolve


def test_every_default_that_json_can_hold_is_written_out_in_order():
  found = resolve({'name': 'mill', 'door': 7, 'power': 9.5})
  assert list(found.items()) == [
    ('name', 'mill'),
    ('power', 9.5),
    ('stones', 2),
    ('wind', 0.5),
    ('sails', (3, 4)),
    ('grain', 'rye'),
    ('turning', False),
    ('miller', None),
    ('door', 7),
  ]


def test_a_default_that_is_a_list_is_written_out_as_a_tuple():
  def function(widths=[1, [2]]):  # noqa: B006
    del widths

  assert resolve({'name': 'f'}, function)['widths'] == (1, (2,))


def test_a_resolved_block_resolves_to_itself():
  once = resolve({'name': 'mill', 'power': 1})
  assert resolve(once) == once


def test_the_block_that_is_given_is_left_as_it_is():
  block = {'name': 'mill', 'power': 1}
  resolve(block)
  assert block == {'name': 'mill', 'power': 1}


def test_the_name_is_no_argument():
  assert blocks.kwargs({'name': 'mill', 'power': 1, 'b': 2}) == {
    'power': 1,
    'b': 2,
  }


def test_what_the_program_knows_fills_what_the_user_left_out():
  found = resolve(
    {'name': 'm'}, Mill, given={'shape': (8,)}, supplied=('rngs',)
  )
  assert found == {'name': 'm', 'shape': (8,), 'stones': 2}


def test_what_the_user_says_goes_before_what_the_program_knows():
  block = {'name': 'm', 'shape': (3,), 'stones': 5}
  given = {'shape': (8,), 'stones': 9}
  assert resolve(block, Mill, given=given, supplied=('rngs',)) == block


def test_what_is_known_of_an_argument_that_is_not_taken_is_left_out():
  found = resolve({'name': 'm', 'power': 1}, given={'shape': (8,)})
  assert 'shape' not in found


def test_an_argument_that_the_program_passes_is_none_of_the_users():
  line = refused({'shape': (1,), 'rngs': 3}, 'rngs', Mill, supplied=('rngs',))
  assert line.endswith('it takes shape, stones')


def test_the_arguments_of_a_class_are_those_of_its_init():
  assert list(blocks.arguments(Mill)) == ['shape', 'stones', 'rngs']
  # The metaclass of nnx hides them from inspect.
  assert list(blocks.arguments(models.MODELS['linear'])) == [
    *('image_shape', 'num_classes', 'dtype', 'param_dtype', 'rngs')
  ]


def test_arguments_without_a_name_are_not_arguments():
  def function(a, /, b, *args, c, **kwargs):
    del a, b, args, c, kwargs

  assert list(blocks.arguments(function)) == ['b', 'c']


# ------------------------------------------------------------------ mistakes


def test_an_argument_that_is_not_taken_is_refused_with_those_that_are():
  line = refused({'power': 1, 'xyzzy': 2}, 'xyzzy')
  assert 'no argument of mill' in line
  assert line.endswith(
    'it takes power, stones, wind, sails, grain, turning, miller, tool, door'
  )
  assert 'did you mean' not in line


@pytest.mark.parametrize(
  ('typed', 'meant'),
  [('stone', 'stones'), ('poower', 'power'), ('sials', 'sails')],
)
def test_a_misspelt_argument_has_a_hint(typed, meant):
  assert f'did you mean {meant}?' in refused({'power': 1, typed: 2}, typed)


def test_a_function_without_arguments_says_so():
  assert refused({'a': 1}, 'a', lambda: None).endswith('it takes none')


def test_an_argument_without_a_default_must_be_given():
  line = refused({}, 'power')
  assert 'missing' in line
  assert '--config.mills.power=VALUE' in line


@pytest.mark.parametrize(
  ('key', 'value', 'takes'),
  [
    ('stones', 'two', 'a number'),
    ('stones', True, 'a number'),
    ('stones', (2,), 'a number'),
    ('wind', '0,5', 'a number'),
    ('wind', False, 'a number'),
    ('wind', None, 'a number'),
    ('sails', None, 'a tuple, as 64,128'),
    ('turning', None, 'true or false'),
    ('sails', 'three', 'a tuple, as 64,128'),
    ('sails', 3, 'a tuple, as 64,128'),
    ('turning', 'yes', 'true or false'),
    ('turning', 1, 'true or false'),
    ('turning', 0.0, 'true or false'),
    ('door', 'red', 'a number'),
  ],
)
def test_a_value_of_another_kind_than_the_default_is_refused(key, value, takes):
  line = refused({'power': 1, key: value}, key)
  assert repr(value) in line
  assert line.endswith(f'it takes {takes}')


@pytest.mark.parametrize(
  ('key', 'value'),
  [
    ('stones', 2.5),  # A number is a number.
    ('wind', 1),
    ('sails', ()),
    ('sails', ('a', None)),
    ('grain', 'wheat'),
    ('turning', True),
    ('miller', 'Ann'),  # None tells no kind.
    ('miller', (1, 2)),
    ('power', 'x'),  # Nor does the lack of a default.
  ],
)
def test_a_value_of_the_same_kind_is_taken(key, value):
  assert resolve({'name': 'm', 'power': 1, key: value})[key] is value


def annotated(
  count: int,
  rate: float | None = None,
  scale: typing.Optional[typing.Union[int, float, bool]] = 1.0,  # noqa: UP007, UP045
  size: int = 0,
  either: float | str = 0.5,
  anything: typing.Any = 2,
  unsaid: int = None,  # noqa: RUF013
  label: float | str | None = None,
):
  """A function whose annotations say more than its defaults."""
  del count, rate, scale, size, either, anything, unsaid, label


@pytest.mark.parametrize(
  ('key', 'value', 'takes'),
  [
    ('count', 'x', 'a whole number'),
    ('count', 2.5, 'a whole number'),
    ('count', True, 'a whole number'),
    ('count', None, 'a whole number'),
    ('rate', 'x', 'a number'),
    ('rate', (1.0,), 'a number'),
    ('scale', 'x', 'a number'),
    ('size', 0.5, 'a whole number'),
    ('size', None, 'a whole number'),
  ],
)
def test_a_value_of_another_kind_than_the_annotation_is_refused(
  key, value, takes
):
  line = refused({'count': 1, key: value}, key, annotated)
  assert repr(value) in line
  assert line.endswith(f'it takes {takes}')


@pytest.mark.parametrize(
  ('key', 'value'),
  [
    ('count', 3),
    ('rate', None),
    ('rate', 1),
    ('rate', 0.5),
    ('scale', None),
    ('scale', 3),
    ('unsaid', None),
    ('label', 'x'),
    ('either', 'x'),
    ('either', 2),
    ('anything', (1, 2)),
  ],
)
def test_a_value_of_the_annotated_kind_is_taken(key, value):
  block = {'name': 'a', 'count': 1, key: value}
  assert resolve(block, annotated)[key] is value


def test_a_block_is_spelled_in_full_for_messages():
  block = {'name': 'sgd', 'momentum': 0.9, 'nesterov': True}
  assert blocks.spelled(block) == "name is 'sgd' (momentum=0.9, nesterov=True)"


# -------------------------------------------------------------------- lookup

TABLE = {'wind': 1, 'water': 2}


def test_a_name_is_looked_up():
  assert blocks.lookup('mills.name', 'water', TABLE) == 2


@pytest.mark.parametrize('name', ['__class__', 'items', '', 'Water', 'steam'])
def test_a_name_that_is_not_in_the_table_is_refused_with_those_that_are(name):
  with pytest.raises(config_lib.UserError) as caught:
    blocks.lookup('mills.name', name, TABLE)
  line = str(caught.value)
  assert line.startswith(f'config.mills.name is {name!r}; ')
  assert line.endswith('there are water, wind')
  assert '\n' not in line


def test_a_misspelt_name_has_a_hint():
  with pytest.raises(config_lib.UserError, match=r"did you mean 'water'\?"):
    blocks.lookup('mills.name', 'watre', TABLE)


def test_a_number_is_taken_for_the_word_that_it_spells():
  # As of --config.model.variant=50.
  block = blocks.resolve(
    'model', {'name': 'resnet', 'variant': 50}, models.MODELS['resnet'],
    supplied=('rngs', 'dtype', 'param_dtype'),
  )  # fmt: skip
  assert block['variant'] == '50'
