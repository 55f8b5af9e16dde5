"""Datasets without their files: what a program sees is the same."""

import dataclasses
import os
import pathlib

import numpy as np
import pytest

from experiments import command
from tests import runs
from train import config as config_lib
from train import program as program_lib
from train.data import described
from train.data import sources

FOLDER = pathlib.Path(os.environ.get('TFDS_DATA_DIR', ''))


def shapes(dataset):
  """What a program reads of a dataset."""
  return {
    'specs': {name: split.specs for name, split in dataset.splits.items()},
    'lengths': {name: len(split) for name, split in dataset.splits.items()},
    'classes': len(dataset.classes or ()),
    'vocabulary': len(dataset.vocabulary or ()),
    'sequence_length': dataset.sequence_length,
    'input': (dataset.input_key, dataset.input_shape),
  }


@pytest.mark.parametrize(
  'name', ['mnist', 'cifar10', 'tiny_shakespeare', 'digits', 'reversal']
)
def test_a_dataset_without_files_has_the_shapes_of_the_one_with(
  name, tmp_path, monkeypatch
):
  real = FOLDER / name
  there = name in ('digits', 'reversal') or (
    'TFDS_DATA_DIR' in os.environ and real.is_dir()
  )
  if not there:
    pytest.skip(f'{name} is not in TFDS_DATA_DIR')
  loaded = sources.load(name, say=lambda line: None)
  prepared = described.describe(config_lib.Data(name=name))
  assert shapes(prepared) == shapes(loaded)
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path))
  without = described.describe(config_lib.Data(name=name))
  assert shapes(without) == shapes(loaded)
  assert list(tmp_path.iterdir()) == []


@pytest.fixture
def nothing(tmp_path, monkeypatch):
  """Neither data nor a cache."""
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path))
  monkeypatch.setenv('TAISHAN_CACHE', str(tmp_path / 'cache'))
  yield
  assert not (tmp_path / 'cache' / 'decoded').exists()


def test_imagenet_is_described_on_a_laptop(nothing):
  dataset = described.describe(
    config_lib.Data(name='imagenet2012', image_size=224)
  )
  assert dataset.input_shape == (224, 224, 3)
  # Russakovsky et al. (2015), table 2.
  assert len(dataset.splits['train']) == 1_281_167
  assert len(dataset.splits['validation']) == 50_000
  assert len(dataset.classes) == 1000
  assert dataset.splits['train'].nbytes > sources.CACHED_BYTES


def test_parts_of_it_have_their_sizes(nothing):
  config = runs.config(
    data=config_lib.Data(
      name='cifar10', classes=(1, 2), validation_fraction=0.1, max_examples=500
    ),
  )
  dataset = program_lib.create(config, described=True).dataset
  lengths = {name: len(split) for name, split in dataset.splits.items()}
  assert lengths == {'train': 500, 'validation': 1000, 'test': 2000}
  assert len(dataset.classes) == 2


def test_a_scale_that_the_data_would_give_is_any(nothing):
  config = runs.config(data=config_lib.Data(name='mnist'))
  resolved = program_lib.create(config, described=True).config
  assert len(resolved.data.normalize['mean']) == 1
  assert np.all(np.array(resolved.data.normalize['std']) > 0)
  unit = dataclasses.replace(
    config, data=config_lib.Data(name='mnist', normalize='unit')
  )
  resolved = program_lib.create(unit, described=True).config
  assert resolved.data.normalize == {'mean': (0.0,), 'std': (255.0,)}


@pytest.mark.parametrize(
  ('data', 'named'),
  [
    ({'name': 'none_such'}, 'none_such'),
    ({'name': '../x'}, '../x'),
    ({'name': 'oxford_flowers102', 'image_size': 32}, 'download_and_prepare'),
    ({'name': 'imagenet2012'}, 'config.data.image_size'),
    ({'name': 'mnist', 'sequence_length': 7}, 'sequence_length'),
    ({'name': 'tiny_shakespeare', 'image_size': 8}, 'image_size'),
  ],
)
def test_what_cannot_be_is_one_line(data, named, nothing):
  with pytest.raises(config_lib.UserError) as error:
    described.describe(config_lib.Data(**data))
  assert named in str(error.value)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('name', ['imagenet_vit_s16', 'cifar10_resnet18'])
def test_a_summary_needs_no_data(name, nothing, capsys):
  from experiments import launch

  words = [f'--config={name}', '--summary']
  assert command.run('launch', launch.main, words) == 0
  said = capsys.readouterr()
  assert said.err == ''
  total = next(l for l in said.out.splitlines() if l.startswith('total'))
  published = {'imagenet_vit_s16': 9.2e9, 'cifar10_resnet18': 1.11e9}
  assert int(total.split()[-1].replace(',', '')) == pytest.approx(
    published[name], rel=0.02
  )
