"""Datasets by name: scikit-learn's, TFDS's, and every mistake in a name."""

import collections
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import sklearn.datasets
from sklearn.model_selection import train_test_split
import tensorflow_datasets as tfds

from train import config as config_lib
from train import program
from train.data import embedded
from train.data import sources

REPOSITORY = pathlib.Path(__file__).parents[3]
SKLEARN = {
  'digits': sklearn.datasets.load_digits,
  'breast_cancer': sklearn.datasets.load_breast_cancer,
  'diabetes': sklearn.datasets.load_diabetes,
}


def quiet(line):
  """Takes the lines that a test does not look at."""


# ------------------------------------------------------------------ embedded


def inputs_and_labels(name):
  """scikit-learn's own arrays, in the form that a model is given."""
  raw = SKLEARN[name]()
  if name == 'digits':  # Grey levels 0..16 become 0..255.
    pixels = np.round(raw.data.astype('float64') * 255 / 16).astype('uint8')
    return pixels.reshape(-1, 8, 8, 1), raw.target.astype('int32')
  label = 'float32' if name == 'diabetes' else 'int32'
  return raw.data.astype('float32'), raw.target.astype(label)


def counted(inputs, labels):
  """How often each example occurs; TFDS may have put them in another order."""
  return collections.Counter(
    (row.tobytes(), label.item())
    for row, label in zip(inputs, labels, strict=True)
  )


@pytest.mark.parametrize(
  ('name', 'stratified', 'train_size', 'test_size'),
  [
    ('digits', True, 1437, 360),
    ('breast_cancer', True, 455, 114),
    ('diabetes', False, 353, 89),
  ],
)
def test_an_embedded_dataset_is_scikit_learns_own_split(
  name, stratified, train_size, test_size
):
  inputs, labels = inputs_and_labels(name)
  x_train, x_test, y_train, y_test = train_test_split(
    inputs,
    labels,
    test_size=0.2,
    stratify=labels if stratified else None,
    random_state=0,
  )
  dataset = sources.load(name, say=quiet)
  assert set(dataset.splits) == {'train', 'test'}
  assert len(dataset.splits['train']) == len(x_train) == train_size
  assert len(dataset.splits['test']) == len(x_test) == test_size
  for split, x, y in (('train', x_train, y_train), ('test', x_test, y_test)):
    arrays = dataset.splits[split].arrays
    assert set(arrays) == {dataset.input_key, 'label'}
    found = arrays[dataset.input_key]
    assert (found.dtype, found.shape) == (x.dtype, x.shape)
    assert (arrays['label'].dtype, arrays['label'].shape) == (y.dtype, y.shape)
    assert counted(found, arrays['label']) == counted(x, y)


@pytest.mark.parametrize(
  ('name', 'key', 'shape', 'classes'),
  [
    ('digits', 'image', (8, 8, 1), tuple('0123456789')),
    ('breast_cancer', 'features', (30,), ('malignant', 'benign')),
    ('diabetes', 'features', (10,), None),
  ],
)
def test_a_dataset_says_what_a_model_needs_to_know(name, key, shape, classes):
  dataset = sources.load(name, say=quiet)
  assert dataset.name == name
  assert dataset.input_key == key
  assert dataset.input_shape == shape
  assert dataset.classes == classes


def test_the_names_of_the_classes_are_in_the_order_of_the_labels():
  # 0 is malignant: scikit-learn counts 212 malignant tumours of 569.
  dataset = sources.load('breast_cancer', say=quiet)
  labels = np.concatenate([s.arrays['label'] for s in dataset.splits.values()])
  counts = dict(zip(dataset.classes, np.bincount(labels), strict=True))
  assert counts == {'malignant': 212, 'benign': 357}


def test_a_dataset_is_prepared_once_and_said_so(tmp_path, monkeypatch):
  monkeypatch.setenv('TAISHAN_CACHE', str(tmp_path / 'cache'))
  lines = []
  first = sources.load('diabetes', say=lines.append)
  assert len(lines) == 1
  assert 'diabetes' in lines[0]
  second = sources.load('diabetes', say=lines.append)
  assert len(lines) == 1
  for split in ('train', 'test'):
    for key in ('features', 'label'):
      assert np.array_equal(
        first.splits[split].arrays[key], second.splits[split].arrays[key]
      )


def test_an_embedded_dataset_is_prepared_in_the_data_dir_that_is_given(
  tmp_path,
):
  sources.load('diabetes', str(tmp_path), say=quiet)
  assert (tmp_path / 'diabetes').is_dir()


def test_two_processes_that_prepare_a_dataset_at_once_both_get_it(tmp_path):
  code = (
    'import pathlib, sys, time\n'
    'from train.data import embedded, sources\n'  # The slow part.
    'here = pathlib.Path(sys.argv[1])\n'
    '(here / sys.argv[2]).touch()\n'
    'for _ in range(3000):\n'
    '  if len(list(here.glob("ready*"))) == 2: break\n'
    '  time.sleep(0.01)\n'
    'd = sources.load("diabetes")\n'
    'print(*(len(s) for s in d.splits.values()), '
    'd.splits["train"].arrays["features"].sum())\n'
  )
  cache = tmp_path / 'cache'
  children = [
    subprocess.Popen(
      [sys.executable, '-c', code, str(tmp_path), f'ready{i}'],
      cwd=REPOSITORY,
      env=os.environ | {'TAISHAN_CACHE': str(cache)},
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in range(2)
  ]
  try:
    said = [child.communicate(timeout=60) for child in children]
  finally:
    for child in children:
      child.kill()
  assert [child.returncode for child in children] == [0, 0], said
  outputs = [out.splitlines() for out, _ in said]
  assert outputs[0][-1] == outputs[1][-1]
  assert outputs[0][-1].startswith('353 89 ')
  # One of them prepared it, and one copy is there.
  assert sorted(len(lines) for lines in outputs) == [1, 2]
  assert len(list(cache.rglob('dataset_info.json'))) == 1
  assert len(list(cache.rglob('features.npy'))) == 2  # train and test


# ---------------------------------------------------------------------- TFDS


class Prepared(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """A dataset that TFDS knows by its files alone: `examples` of each split."""

  VERSION = tfds.core.Version('1.2.3')
  features = {
    'image': tfds.features.Image(
      shape=(2, 3, 1), dtype=np.uint8, encoding_format='png'
    ),
    'label': tfds.features.ClassLabel(names=['even', 'odd']),
  }
  splits = {'train': 5, 'test': 3}

  def _info(self):
    return tfds.core.DatasetInfo(
      builder=self, features=tfds.features.FeaturesDict(self.features)
    )

  def _split_generators(self, dl_manager):
    return {split: self._examples(split) for split in self.splits}

  def _examples(self, split):
    for i in range(self.splits[split]):
      yield i, self.example(i, split)

  def _generate_examples(self):
    raise NotImplementedError

  @staticmethod
  def example(i, split):
    return {'image': embedded.png(tiny_image(i, split)), 'label': i % 2}


def tiny_image(i, split):
  return np.arange(6, dtype=np.uint8).reshape(2, 3) + 10 * i + (split == 'test')


def prepare(folder, **attributes):
  """Writes that dataset, with other attributes where they are given."""
  attributes['name'] = 'tiny'  # Else TFDS takes the name of the class.
  builder = type('Tiny', (Prepared,), attributes, skip_registration=True)(
    data_dir=str(folder), file_format='array_record'
  )
  embedded.prepare(builder)
  return builder


@pytest.mark.parametrize('name', ['tiny', 'tiny:1.2.3'])
def test_a_dataset_that_tfds_prepared_is_loaded_by_name(tmp_path, name):
  prepare(tmp_path)
  dataset = sources.load(name, str(tmp_path), say=quiet)
  assert dataset.classes == ('even', 'odd')
  assert dataset.input_shape == (2, 3, 1)
  for split, count in (('train', 5), ('test', 3)):
    arrays = dataset.splits[split].arrays
    assert arrays['image'].dtype == np.uint8
    expected = np.stack([tiny_image(i, split) for i in range(count)])
    assert counted(arrays['image'], arrays['label']) == counted(
      expected[..., None], np.arange(count) % 2
    )


def test_a_dataset_that_was_decoded_opens_without_reading_its_records(
  tmp_path, monkeypatch
):
  prepare(tmp_path)
  first = sources.load('tiny', str(tmp_path), say=quiet)
  monkeypatch.setattr(sources, '_source', None)
  again = sources.load('tiny', str(tmp_path), say=quiet)
  for split in ('train', 'test'):
    for key in ('image', 'label'):
      assert np.array_equal(
        first.splits[split].arrays[key], again.splits[split].arrays[key]
      )


def test_two_folders_with_the_same_version_are_two_datasets(tmp_path):
  for folder, count in (('a', 5), ('b', 4)):
    prepare(tmp_path / folder, splits={'train': count, 'test': 3})
  lengths = [
    len(sources.load('tiny', str(tmp_path / f), say=quiet).splits['train'])
    for f in ('a', 'b')
  ]
  assert lengths == [5, 4]


def test_a_validation_split_that_tfds_has_is_used(tmp_path):
  prepare(tmp_path, splits={'train': 5, 'validation': 2})
  dataset = sources.load('tiny', str(tmp_path), say=quiet)
  assert {k: len(s) for k, s in dataset.splits.items()} == {
    'train': 5,
    'validation': 2,
  }


def test_real_mnist_is_loaded(monkeypatch):
  folder = pathlib.Path(os.environ.get('TFDS_DATA_DIR', ''))
  versions = folder / 'mnist'
  if 'TFDS_DATA_DIR' not in os.environ or not versions.is_dir():
    pytest.skip('TFDS_DATA_DIR names no folder that holds mnist')
  # Decoding all of it takes 8 s; the records are the same for any split.
  monkeypatch.setattr(sources, 'CACHED_BYTES', 0)
  dataset = sources.load('mnist', str(folder), say=quiet)
  assert dataset.input_shape == (28, 28, 1)
  assert dataset.classes == tuple('0123456789')
  assert len(dataset.splits['train']) == 60_000
  count, examples = sources._decode(dataset.splits['test'])
  assert count == 10_000
  first = [next(examples) for _ in range(200)]
  assert {e['image'].shape for e in first} == {(28, 28, 1)}
  assert {e['image'].dtype for e in first} == {np.dtype('uint8')}
  assert {e['label'].dtype for e in first} == {np.dtype('int32')}
  assert {e['label'].item() for e in first} == set(range(10))


@pytest.mark.slow
def test_all_of_mnist_is_loaded_by_name_and_data_dir():
  folder = os.environ.get('TFDS_DATA_DIR', '')
  if not folder or not (pathlib.Path(folder) / 'mnist').is_dir():
    pytest.skip('TFDS_DATA_DIR names no folder that holds mnist')
  dataset = sources.load('mnist', folder, say=quiet)
  train = dataset.splits['train'].arrays
  test = dataset.splits['test'].arrays
  assert train['image'].shape == (60_000, 28, 28, 1)
  assert test['image'].shape == (10_000, 28, 28, 1)
  # LeCun's own counts of the digits in the two sets.
  assert np.bincount(train['label']).tolist() == [
    *(5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949)
  ]
  assert np.bincount(test['label']).tolist() == [
    *(980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009)
  ]
  # The mean and std of the pixels / 255 that everybody normalizes by.
  pixels = train['image'].astype('float64') / 255
  np.testing.assert_allclose(pixels.mean(), 0.1307, atol=5e-5)
  np.testing.assert_allclose(pixels.std(), 0.3081, atol=5e-5)


def test_tensorflow_is_never_imported(tmp_path):
  # Wherever it is looked for there is one, which leaves a trace if it is run.
  prepare(tmp_path / 'prepared')
  stub = tmp_path / 'stub' / 'tensorflow'
  stub.mkdir(parents=True)
  trace = tmp_path / 'trace'
  (stub / '__init__.py').write_text(
    f'open({str(trace)!r}, "w").close()\nraise ImportError("a stub")\n'
  )
  code = (
    'import sys\n'
    'from train import loop\n'
    'from train.data import sources\n'
    'sizes = [len(sources.load(n).splits["train"]) for n in '
    '("digits", "diabetes", "tiny")]\n'
    'print(sizes, "tensorflow" in sys.modules)\n'
  )
  done = subprocess.run(
    [sys.executable, '-c', code],
    cwd=REPOSITORY,
    env=os.environ
    | {
      'PYTHONPATH': f'{tmp_path / "stub"}{os.pathsep}{REPOSITORY}',
      'TAISHAN_CACHE': str(tmp_path / 'cache'),
      # Where data_dir is left out, this is the place.
      'TFDS_DATA_DIR': str(tmp_path / 'prepared'),
    },
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout.splitlines()[-1] == '[1437, 353, 5] False'
  assert not trace.exists()


# ------------------------------------------------------------------ mistakes


def refused(name, data_dir=None):
  """The one line that says why there is no such dataset."""
  with pytest.raises(config_lib.UserError) as caught:
    sources.load(name, data_dir, say=quiet)
  line = str(caught.value)
  assert line.startswith(f'config.data.name is {name!r}')
  assert '\n' not in line
  return line


@pytest.mark.parametrize(
  'name',
  [
    '../x',
    '/etc/passwd',
    'hf:foo',
    'huggingface:foo/bar',
    'os.system',
    'Digits',
    'digits\n',
    'mnist:3',
    'mnist:latest',
    'mnist/../../x',
    'mnist?x=1',
    '',
    ' ',
  ],
)
def test_a_malformed_name_is_refused_and_touches_no_file(
  name, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv('TAISHAN_CACHE', str(tmp_path / 'cache'))
  monkeypatch.setattr(tfds, 'builder', lambda *_, **__: pytest.fail('sought'))
  assert 'it takes a name as digits' in refused(name)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('name', ['no_such_dataset', 'os', 'core', 'x/y'])
def test_an_unknown_dataset_is_refused_with_the_names_that_need_no_download(
  name,
):
  assert refused(name).endswith(
    'digits, breast_cancer, diabetes, adding, reversal, mackey_glass need '
    'no download'
  )


@pytest.mark.parametrize('name', ['__builtins__', '__init__', '_'])
def test_a_name_with_a_meaning_to_python_is_refused(name):
  refused(name)


def test_a_dataset_that_is_not_prepared_says_where_it_was_sought(tmp_path):
  line = refused('kmnist', str(tmp_path))
  assert str(tmp_path / 'kmnist') in line
  assert 'config.data.data_dir' in line
  assert 'TFDS_DATA_DIR' in line
  assert not list(tmp_path.iterdir())


def test_a_version_that_there_is_not_is_refused():
  assert '9.9.9' in refused('mnist:9.9.9')


def test_a_dataset_without_a_split_to_test_on_is_refused(tmp_path):
  prepare(tmp_path, splits={'train': 5})
  assert 'test or validation' in refused('tiny', str(tmp_path))


def test_a_dataset_without_a_split_to_train_on_is_refused(tmp_path):
  prepare(tmp_path, splits={'test': 5, 'validation': 2})
  assert 'training needs train' in refused('tiny', str(tmp_path))


def test_a_dataset_of_another_layout_is_refused(tmp_path):
  prepare(
    tmp_path,
    features={'text': tfds.features.Text(), 'title': tfds.features.Text()},
    example=staticmethod(lambda i, split: {'text': 'to be', 'title': 'to'}),
  )
  line = refused('tiny', str(tmp_path))
  assert 'text' in line
  assert 'image or features, and label' in line


def test_a_dataset_of_images_of_many_sizes_is_refused(tmp_path):
  prepare(
    tmp_path,
    features=Prepared.features
    | {
      'image': tfds.features.Image(
        shape=(None, None, 1), dtype=np.uint8, encoding_format='png'
      )
    },
  )
  assert '(None, None, 1)' in refused('tiny', str(tmp_path))


def test_a_dataset_in_files_that_need_tensorflow_is_refused(tmp_path):
  # TFDS writes .tfrecord files unless told otherwise.
  folder = pathlib.Path(prepare(tmp_path).data_path)
  for file in folder.glob('*array_record*'):
    file.rename(str(file).replace('array_record', 'tfrecord'))
  info = folder / 'dataset_info.json'
  values = json.loads(info.read_text()) | {'fileFormat': 'tfrecord'}
  info.write_text(json.dumps(values))
  assert 'array_record' in refused('tiny', str(tmp_path))


def test_a_data_dir_that_is_a_file_is_refused(tmp_path):
  file = tmp_path / 'file'
  file.touch()
  with pytest.raises(config_lib.UserError, match='config.data.data_dir'):
    sources.load('digits', str(file), say=quiet)


# ------------------------------------------------------------------ hold_out


def toy(n=100):
  arrays = {
    'features': np.arange(2 * n, dtype='float32').reshape(n, 2),
    'label': np.arange(n, dtype='int32'),
  }
  test = {key: array[:7] for key, array in arrays.items()}
  return sources.Dataset(
    'toy', {'train': sources.Split(arrays), 'test': sources.Split(test)}
  )


def labels(split):
  return split.take(np.arange(len(split)))['label']


@pytest.mark.parametrize(
  ('n', 'fraction', 'held'), [(100, 0.25, 25), (1437, 0.25, 359), (10, 0.1, 1)]
)
def test_the_parts_are_disjoint_and_complete(n, fraction, held):
  dataset = sources.hold_out(toy(n), fraction)
  train, validation = (
    labels(dataset.splits[part]) for part in ('train', 'validation')
  )
  assert (len(train), len(validation)) == (n - held, held)
  assert sorted([*train, *validation]) == list(range(n))
  assert len(dataset.splits['test']) == 7


def test_held_out_examples_keep_their_labels():
  part = sources.hold_out(toy(), 0.25).splits['validation']
  examples = part.take(np.array([3, 0, 3]))
  assert np.array_equal(examples['features'][:, 0], 2 * examples['label'])
  assert examples['label'][0] == examples['label'][2] != examples['label'][1]


def test_the_validation_part_is_drawn_from_everywhere():
  held = labels(sources.hold_out(toy(), 0.25).splits['validation'])
  # Of every quarter of the examples, about a quarter.
  assert np.bincount(held // 25, minlength=4).min() >= 2


def test_the_validation_part_does_not_follow_any_seed():
  held = labels(sources.hold_out(toy(), 0.25).splits['validation'])
  np.random.seed(7)
  again = labels(sources.hold_out(toy(), 0.25).splits['validation'])
  assert np.array_equal(held, again)


def test_runs_with_other_seeds_have_the_same_validation_part():
  rows = []
  for seed in (0, 1):
    config = config_lib.Config(
      seed=seed,
      total_steps=1,
      task='regression',
      data=config_lib.Data(validation_fraction=0.25, batch_size=8),
      model={'name': 'linear'},
    )
    made = program.create(config, toy(40))
    rows.append(labels(made.dataset.splits['validation']))
  assert len(rows[0]) == 10
  assert np.array_equal(*rows)


def test_a_fraction_of_0_holds_nothing_out():
  dataset = toy()
  assert sources.hold_out(dataset, 0.0) is dataset


@pytest.mark.parametrize('fraction', [0.001, 0.999])
def test_a_fraction_that_leaves_a_part_empty_is_refused(fraction):
  with pytest.raises(config_lib.UserError) as caught:
    sources.hold_out(toy(), fraction)
  line = str(caught.value)
  assert line.startswith(f'config.data.validation_fraction is {fraction}')
  assert '\n' not in line
