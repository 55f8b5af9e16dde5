"""Which folder a dataset comes from, and where it is prepared."""

import os
import pathlib

import pytest
import tensorflow_datasets as tfds

from tests.train.data import test_builders as originals
from train import config as config_lib
from train.data import prepare

folders = originals.folders
put = originals.put


def find(name='mnist', data_dir=None, say=lambda line: None):
  return prepare.find_or_prepare(name, data_dir and str(data_dir), say)


def refused(name, data_dir=None):
  with pytest.raises(config_lib.UserError) as caught:
    find(name, data_dir, pytest.fail)
  assert '\n' not in str(caught.value)
  return str(caught.value)


@pytest.fixture
def mnist(put):
  """MNIST's files lie in the cache's downloads."""
  files, splits = originals.mnist_files()
  put('mnist', files)
  return splits


def test_the_cache_is_where_a_dataset_is_prepared(mnist, folders):
  builder = find()
  assert builder.data_path == folders / 'tfds' / 'mnist' / '3.0.1'


@pytest.mark.parametrize('name', ['mnist', 'mnist:3.0.1'])
def test_a_data_dir_is_where_a_dataset_is_prepared(
  mnist, folders, tmp_path, name
):
  there = tmp_path / 'there'
  there.mkdir()
  builder = find(name, there)
  assert builder.data_path == there / 'mnist' / '3.0.1'
  assert not (folders / 'tfds').exists()
  # Of TFDS's own folders for downloads there is none.
  assert {p.name for p in there.iterdir()} == {'mnist'}
  again = find(name, there, pytest.fail)
  originals.check_images(list(again.as_data_source('test')), *mnist['test'])


def test_original_files_in_the_data_dir_are_enough(folders, put, tmp_path):
  files, splits = originals.mnist_files()
  put('mnist', files)
  mine = tmp_path / 'mine'
  (folders / 'downloads' / 'mnist').rename(mine)
  builder = find('mnist', mine)
  originals.check_images(
    list(builder.as_data_source('train')), *splits['train']
  )


def test_what_tfds_has_prepared_in_its_own_folder_comes_first(
  mnist, folders, tmp_path, monkeypatch
):
  own = tmp_path / 'own'
  own.mkdir()
  find('mnist', own)
  monkeypatch.setattr(tfds.core.constants, 'DATA_DIR', str(own))
  assert find('mnist', None, pytest.fail).data_path.is_relative_to(own)


def test_files_of_tfds_that_need_tensorflow_give_way_to_ours(
  mnist, folders, tmp_path, monkeypatch
):
  own = tmp_path / 'own'
  own.mkdir()
  info = find('mnist', own).data_path / 'dataset_info.json'
  info.write_text(info.read_text().replace('array_record', 'tfrecord'))
  monkeypatch.setattr(tfds.core.constants, 'DATA_DIR', str(own))
  builder = find()
  assert builder.data_path.is_relative_to(folders)
  assert len(builder.as_data_source('train')) == 7


def test_the_real_mnist_that_tfds_prepared_comes_first(tmp_path, monkeypatch):
  folder = os.environ.get('TFDS_DATA_DIR', '')
  if not folder or not (pathlib.Path(folder) / 'mnist').is_dir():
    pytest.skip('TFDS_DATA_DIR names no folder that holds mnist')
  monkeypatch.setenv('TAISHAN_CACHE', str(tmp_path))
  for data_dir in (folder, None):
    builder = find('mnist', data_dir, pytest.fail)
    assert builder.data_path.is_relative_to(folder)
    assert builder.info.splits['train'].num_examples == 60_000
    assert next(iter(builder.as_data_source('test')))['image'].shape == (
      *(28, 28, 1),
    )
  assert not list(tmp_path.iterdir())


def test_a_data_dir_that_is_not_there_is_one_line_and_is_not_made(
  mnist, tmp_path
):
  line = refused('mnist', tmp_path / 'typo')
  assert 'config.data.data_dir' in line
  assert 'no folder' in line
  assert not (tmp_path / 'typo').exists()


def test_a_data_dir_that_cannot_be_written_is_one_line(mnist, tmp_path):
  file = tmp_path / 'file'
  file.touch()
  line = refused('mnist', file)
  assert str(file) in line
  assert 'config.data.data_dir' in line


@pytest.mark.parametrize('info', [None, '', '{', '{"name": 3}', '[]'])
@pytest.mark.parametrize('given', [True, False])
def test_a_damaged_folder_is_named_and_left_alone(
  mnist, folders, tmp_path, info, given
):
  root = tmp_path / 'there' if given else folders / 'tfds'
  version = root / 'mnist' / '3.0.1'
  version.mkdir(parents=True)
  if info is not None:
    (version / 'dataset_info.json').write_text(info)
  before = originals.tree(version)
  line = refused('mnist', root if given else None)
  assert str(root) in line or 'config.data.name' in line
  assert originals.tree(version) == before


def test_a_full_disk_is_one_line_and_leaves_nothing(
  mnist, folders, monkeypatch
):
  # What array_record's writer raises then.
  def write(*_):
    raise RuntimeError('write() failed: No space left on device; writing ...')

  monkeypatch.setattr(
    tfds.core.file_adapters.ArrayRecordFileAdapter, 'write_examples', write
  )
  with pytest.raises(config_lib.UserError, match='No space left') as caught:
    find()
  assert str(folders / 'tfds') in str(caught.value)
  assert not originals.tree(folders / 'tfds')


def test_a_version_that_is_not_ours_is_left_to_tfds(folders):
  assert '9.9.9' in refused('mnist:9.9.9')


def test_an_unknown_name_is_told_what_there_is(folders):
  line = refused('nmist')
  assert 'mnist, fashion_mnist, cifar10, cifar100, tiny_shakespeare' in line
  assert 'diabetes, adding, reversal, mackey_glass need no download' in line
