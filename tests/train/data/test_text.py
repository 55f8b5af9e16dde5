"""Text becomes windows of characters, each with the one after it."""

import numpy as np
import pytest

from train import config as config_lib
from train.data import builders
from train.data import embedded
from train.data import sources
from train.data import text

TEXT = 'to be or not to be, that is the question:\n' * 30


@pytest.fixture(scope='module')
def load(tmp_path_factory):
  """load(**kwargs) -> TEXT as Tiny Shakespeare, prepared in a folder."""
  folder = tmp_path_factory.mktemp('text')
  (folder / 'input.txt').write_text(TEXT)
  builder = builders.TinyShakespeare(
    data_dir=str(folder), file_format='array_record'
  )
  builder.files = {'input.txt': folder / 'input.txt'}
  embedded.prepare(builder)
  return lambda **kwargs: sources.load(
    'tiny_shakespeare', str(folder), **kwargs
  )


def test_encoding_gives_each_character_its_place():
  vocabulary = text.vocabulary({'train': 'banana', 'test': 'cab'})
  assert vocabulary == ('a', 'b', 'c', 'n')
  tokens = text.encode('cabn', vocabulary)
  assert tokens.tolist() == [2, 0, 1, 3]


def test_a_character_outside_of_the_vocabulary_is_refused():
  with pytest.raises(
    config_lib.UserError, match="'x' is not in the vocabulary"
  ):
    text.encode('ax', ('a', 'b'))


def test_windows_lie_end_to_end_and_targets_are_one_ahead():
  found = text.windows(np.arange(11, dtype=np.uint8), 4)
  assert found['tokens'].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
  assert found['targets'].tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]


def test_a_text_is_read_in_windows_of_the_length_that_is_asked(load):
  dataset = load(sequence_length=16)
  assert dataset.vocabulary == dataset.classes == tuple(sorted(set(TEXT)))
  train = dataset.splits['train'].arrays
  assert train['tokens'].shape == train['targets'].shape
  read = ''.join(dataset.vocabulary[i] for i in train['tokens'].ravel())
  following = ''.join(dataset.vocabulary[i] for i in train['targets'].ravel())
  assert TEXT.startswith(read)
  assert TEXT[1:].startswith(following)
  assert len(TEXT) * 0.9 - len(read) <= 17
  assert set(dataset.splits) == {'train', 'validation', 'test'}


def test_a_window_longer_than_a_split_is_refused(load):
  with pytest.raises(config_lib.UserError, match='has 63 characters'):
    load(sequence_length=63)
