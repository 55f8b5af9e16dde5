"""Parameters by path: which a pattern picks, and trees taken apart by them."""

import numpy as np
import pytest

from train import config as config_lib
from train import paths

# As an MLP of many blocks has them: the places in a list are whole numbers.
TREE = {
  'blocks': {
    0: {'kernel': np.zeros(1), 'bias': np.zeros(2)},
    1: {'kernel': np.zeros(3), 'bias': np.zeros(4)},
    10: {'kernel': np.zeros(5), 'bias': np.zeros(6)},
  },
  'head': {'kernel': np.zeros(7), 'bias': np.zeros(8)},
}
PATHS = list(paths.flatten(TREE))


def picked(pattern):
  return [paths.spelled(path) for path in PATHS if paths.matches(pattern, path)]


def test_a_path_is_spelled_from_the_model_down():
  assert paths.spelled(('blocks', 0, 'kernel')) == 'blocks/0/kernel'
  assert len(PATHS) == 8


@pytest.mark.parametrize(
  ('pattern', 'expected'),
  [
    ('head', ['head/kernel', 'head/bias']),
    ('head/kernel', ['head/kernel']),
    # From the start alone: "1" is the start of "10".
    (
      'blocks/1',
      [
        'blocks/1/kernel',
        'blocks/1/bias',
        'blocks/10/kernel',
        'blocks/10/bias',
      ],
    ),
    ('blocks/1/', ['blocks/1/kernel', 'blocks/1/bias']),
    ('kernel', []),
    ('ead', []),
    (
      '.*bias',
      ['blocks/0/bias', 'blocks/1/bias', 'blocks/10/bias', 'head/bias'],
    ),
    (r'blocks/\d/bias', ['blocks/0/bias', 'blocks/1/bias']),
    ('head/(kernel|nothing)$', ['head/kernel']),
    ('no_such', []),
  ],
)
def test_a_pattern_matches_from_the_start_of_a_path(pattern, expected):
  assert picked(pattern) == expected


def test_every_pattern_must_match_and_one_that_does_not_is_named():
  paths.check_patterns('init_new', ['head', '.*bias'], PATHS)
  paths.check_patterns('init_new', [], PATHS)
  with pytest.raises(config_lib.UserError) as caught:
    paths.check_patterns('init_new', ['head', 'haed'], PATHS)
  line = str(caught.value)
  assert line.startswith("config.init_new has the pattern 'haed', which")
  assert 'blocks/0/kernel' in line
  assert 'head/bias' in line
  assert '\n' not in line


def test_a_long_list_of_paths_is_cut():
  many = [('layer', i) for i in range(100)]
  with pytest.raises(config_lib.UserError) as caught:
    paths.check_patterns('init_new', ['x'], iter(many))
  line = str(caught.value)
  assert line.endswith('layer/19, ...')
  assert 'layer/20' not in line


@pytest.mark.parametrize('pattern', ['head', '.*bias', '.*', 'no_such'])
def test_a_tree_split_and_joined_is_the_same_tree(pattern):
  ours = [path for path in PATHS if paths.matches(pattern, path)]
  a, b = paths.split(TREE, ours)
  assert list(paths.flatten(a)) == ours
  assert set(paths.flatten(b)) == set(PATHS) - set(ours)
  whole = paths.flatten(paths.join(a, b))
  assert set(whole) == set(PATHS)
  # The very leaves, which are not copied.
  assert all(whole[path] is leaf for path, leaf in paths.flatten(TREE).items())


def test_flattening_and_unflattening_gives_the_tree_back():
  back = paths.unflatten(paths.flatten(TREE))
  assert back.keys() == TREE.keys()
  assert back['blocks'].keys() == TREE['blocks'].keys()
  assert back['blocks'][10]['bias'] is TREE['blocks'][10]['bias']


def test_the_trees_that_are_given_stay_as_they_are():
  a, b = {'x': {'y': 1}}, {'x': {'z': 2}}
  assert paths.join(a, b) == {'x': {'y': 1, 'z': 2}}
  assert (a, b) == ({'x': {'y': 1}}, {'x': {'z': 2}})
  paths.split(a, [('x', 'y')])
  assert a == {'x': {'y': 1}}


def test_of_two_values_for_a_path_the_second_stays():
  """What transfer gives takes the place of new values."""
  assert paths.join({'x': 1, 'y': 2}, {'x': 3}) == {'x': 3, 'y': 2}
