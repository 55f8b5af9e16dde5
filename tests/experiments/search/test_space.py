"""What a config's sweep() may say, and the points that makes."""

import itertools
import math

import pytest

from experiments import overrides
from experiments.search import space as space_lib
from train import config as config_lib


@pytest.mark.parametrize(
  'value',
  [
    None, True, False, 0, -3, 10**30, 1e-4, 0.1 + 0.2, 1e300, 'adam', 'none',
    'true', '3', '1e5', "it's", 'a b', 'nan', 'flip,pad_crop', '(1, 2)', '',
    (64,), (256, 128), ('flip', 'pad_crop'), [1, 2], {'name': 'mixup', 'a': 1},
    ({'name': 'mixup'},), (), ((1,), (2, 3)), '\n', '--config.seed=1', '=',
  ],
)  # fmt: skip
def test_a_value_is_read_from_the_command_line_as_it_was(value):
  read = overrides.literal(space_lib.text(value))
  assert read == config_lib.tuples(value)
  assert type(read) is type(config_lib.tuples(value))


@pytest.mark.parametrize('value', [math.nan, {1, 2}, b'x', object(), 1j])
def test_a_value_that_no_config_holds_is_refused(value):
  with pytest.raises(config_lib.UserError, match=r'sweep\(\) has x='):
    space_lib.read([{'x': value}], 'a')


def test_a_grid_is_the_product_in_order():
  space = space_lib.read(
    {'a.b': ('int', 3, 5), 'c': ('choice', 'x', None, (1, 2))}, 'a'
  )
  points = space_lib.grid(space, 'a')
  assert [tuple(p.items()) for p in points] == [
    (('a.b', a), ('c', c))
    for a, c in itertools.product('345', ('x', 'none', '(1, 2)'))
  ]
  assert space_lib.words(points[2]) == ['--config.a.b=3', '--config.c=(1, 2)']


def test_probes_reach_every_end():
  small = space_lib.read({'a': ('log', 1e-3, 1), 'b': ('choice', 1, 2, 3)}, 'a')
  assert [tuple(p.values()) for p in space_lib.probes(small)] == list(
    itertools.product(('0.001', '1.0'), '123')
  )
  large = space_lib.read(
    {f'x{i}': ('choice', *range(5)) for i in range(9)}, 'a'
  )
  seen = {(path, v) for p in space_lib.probes(large) for path, v in p.items()}
  assert seen == {(f'x{i}', str(v)) for i in range(9) for v in range(5)}


@pytest.mark.parametrize(
  ('found', 'says'),
  [
    ({}, 'is empty; it must have a point'),
    ([], 'is empty; it must have a point'),
    (None, 'returns NoneType'),
    (3, 'returns int'),
    ([3], 'has 3 in its list'),
    ([{'seed': 1}, {'seed': 1}], "has {'seed': 1} twice"),
    ({3: ('choice', 1)}, 'has the path 3'),
    ({'config.seed': ('choice', 1)}, "has the path 'config.seed'"),
    ({'seed': 3}, 'has seed=3; it takes'),
    ({'seed': ()}, 'has seed=(); it takes'),
    ({'seed': ('loguniform', 1, 2)}, "has seed=('loguniform', 1, 2)"),
    ({'seed': ('choice',)}, 'it must have a choice'),
    ({'seed': ('choice', 1, 1)}, 'the same choice twice'),
    ({'seed': ('int', 1)}, "it takes ('int', LEAST, MOST)"),
    ({'seed': ('int', 1, 2.5)}, 'it takes two whole numbers'),
    ({'l2': ('uniform', 1, 1)}, 'the first must be below the second'),
    ({'l2': ('uniform', 2, 1)}, 'the first must be below the second'),
    ({'l2': ('uniform', 0, math.inf)}, 'it takes two numbers'),
    ({'l2': ('uniform', 0, 'x')}, 'it takes two numbers'),
    ({'l2': ('log', 0, 1)}, 'both must be above 0'),
    ({'l2': ('log', -1, 1)}, 'both must be above 0'),
  ],
)
def test_a_space_that_cannot_be_says_why(found, says):
  with pytest.raises(config_lib.UserError) as error:
    space_lib.read(found, 'mine')
  assert says in str(error.value)
  assert str(error.value).startswith("--config is 'mine', whose sweep() ")
  assert '\n' not in str(error.value)


def test_a_grid_takes_no_ranges_without_steps():
  space = space_lib.read({'l2': ('log', 1e-5, 1)}, 'a')
  with pytest.raises(config_lib.UserError, match='l2 as .log., which has no'):
    space_lib.grid(space, 'a')
