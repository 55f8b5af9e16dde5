"""Sets larger than memory: the same examples in the same order as the cache."""

import io
import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
from PIL import Image
import pytest
import tensorflow_datasets as tfds

from train import config as config_lib
from train import mesh as mesh_lib
from train.data import embedded
from train.data import normalize
from train.data import pipeline
from train.data import records
from train.data import sources

REPOSITORY = pathlib.Path(__file__).parents[3]
N = {'train': 37, 'test': 10}
SIZE = 8


def photograph(i, mode='RGB'):
  """A smooth picture of a size of its own, between 9x11 and 40x50."""
  rng = np.random.default_rng(i)
  width, height = 9 + 7 * i % 32, 11 + 5 * i % 40
  pixels = rng.integers(0, 256, (3, 4, 3), dtype='uint8')
  image = Image.fromarray(pixels).resize((width, height))
  return image.convert(mode)


def encoded(image, kind='JPEG'):
  file = io.BytesIO()
  image.save(file, format=kind)
  file.seek(0)
  return file


class Photographs(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """Photographs of many sizes in three classes, as ImageNet is made."""

  VERSION = tfds.core.Version('1.0.0')
  image = tfds.features.Image(shape=(None, None, 3), encoding_format='jpeg')
  sizes = N

  def _info(self):
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict(
        {
          'image': self.image,
          'label': tfds.features.ClassLabel(names=['ant', 'bee', 'cow']),
          'file_name': tfds.features.Text(),
        }
      ),
    )

  def _split_generators(self, dl_manager):
    return {split: self._examples(split) for split in self.sizes}

  def _examples(self, split):
    for i in range(self.sizes[split]):
      yield i, self.example(i, split) | {'file_name': f'{i}.jpg'}

  def _generate_examples(self):
    raise NotImplementedError

  @staticmethod
  def example(i, split):
    i += 100 * (split == 'test')
    return {'image': encoded(photograph(i)), 'label': i % 3}


def prepare(folder, **attributes):
  """Writes the photographs, with other attributes where they are given."""
  attributes['name'] = 'photographs'  # Else TFDS takes the name of the class.
  builder = type('P', (Photographs,), attributes, skip_registration=True)(
    data_dir=str(folder), file_format='array_record'
  )
  embedded.prepare(builder)
  return pathlib.Path(builder.data_path)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """The photographs, prepared."""
  path = tmp_path_factory.mktemp('photographs')
  prepare(path)
  return path


def load(folder, image_size=SIZE):
  return sources.load(
    'photographs', str(folder), image_size=image_size, say=print
  )


@pytest.fixture
def small(monkeypatch):
  """Nothing is small enough for the cache."""
  monkeypatch.setattr(sources, 'CACHED_BYTES', 0)


@pytest.fixture
def both(folder, monkeypatch):
  """The dataset from the cache, and from its records."""
  cached = load(folder)
  monkeypatch.setattr(sources, 'CACHED_BYTES', 0)
  return cached, load(folder)


def everything(split):
  return split.take(np.arange(len(split)))


def equal(a, b):
  assert a.keys() == b.keys()
  for key in a:
    assert a[key].dtype == b[key].dtype
    assert np.array_equal(a[key], b[key]), key


# ------------------------------------------------------------------ examples


def test_a_set_above_the_limit_is_read_from_its_records_and_not_cached(
  folder, monkeypatch, tmp_path
):
  monkeypatch.setenv('TAISHAN_CACHE', str(tmp_path / 'cache'))
  size = sum(N.values()) * (SIZE * SIZE * 3 + 4)
  monkeypatch.setattr(sources, 'CACHED_BYTES', size - 1)
  large = load(folder)
  assert {type(s) for s in large.splits.values()} == {records.Records}
  assert not list(tmp_path.rglob('*.npy'))
  monkeypatch.setattr(sources, 'CACHED_BYTES', size)
  assert {type(s) for s in load(folder).splits.values()} == {sources.Split}


def test_records_say_the_same_of_themselves_as_the_cache(both):
  for a, b in zip(*(d.splits.values() for d in both), strict=True):
    assert len(a) == len(b)
    assert a.specs == b.specs
    assert a.nbytes == b.nbytes
  cached, large = both
  assert cached.input_key == large.input_key == 'image'
  assert cached.input_shape == large.input_shape == (SIZE, SIZE, 3)
  assert cached.classes == large.classes == ('ant', 'bee', 'cow')


@pytest.mark.parametrize('split', ['train', 'test'])
def test_records_hold_the_same_examples_as_the_cache(both, split):
  cached, large = (dataset.splits[split] for dataset in both)
  equal(everything(cached), everything(large))
  places = np.array([3, 3, 0, 9])
  equal(cached.take(places), large.take(places))
  equal(cached.take(places[:0]), large.take(places[:0]))


def test_held_out_parts_are_the_same_as_the_caches(both):
  cached, large = (sources.hold_out(dataset, 0.25) for dataset in both)
  for split, count in (('train', 28), ('validation', 9), ('test', 10)):
    assert len(large.splits[split]) == count
    equal(everything(cached.splits[split]), everything(large.splits[split]))


@pytest.mark.parametrize('kind', ['records', 'cache'])
def test_a_part_of_a_part_is_counted_from_that_part(both, kind):
  split = both[kind == 'records'].splits['train']
  part = split.part(np.arange(5, 15)).part(np.array([2, 0]))
  assert len(part) == 2
  equal(everything(part), split.take(np.array([7, 5])))


def test_the_shorter_side_is_resized_and_the_middle_is_taken():
  # Written out for a wide and a high image; 30 * 16 / 20 = 24, and so on.
  for width, height, resized, box in (
    (30, 20, (24, 16), (4, 0, 20, 16)),
    (10, 25, (16, 40), (0, 12, 16, 28)),
    (16, 16, (16, 16), (0, 0, 16, 16)),
  ):
    image = photograph(5).resize((width, height))
    expected = image.resize(resized, Image.Resampling.BILINEAR).crop(box)
    found = records.decode_image(encoded(image, 'PNG').read(), 3, 16)
    assert found.dtype == np.uint8
    assert np.array_equal(found, np.asarray(expected))


def test_shrinking_averages_what_it_leaves_out():
  stripes = np.zeros((64, 64), 'uint8')
  stripes[:, ::2] = 255
  image = encoded(Image.fromarray(stripes), 'PNG').read()
  found = records.decode_image(image, 1, 8)
  assert found.shape == (8, 8, 1)
  assert 120 < found.min() <= found.max() < 135


@pytest.mark.parametrize('mode', ['RGB', 'L', 'P', 'CMYK', 'RGBA', '1'])
@pytest.mark.parametrize(('channels', 'wanted'), [(1, 'L'), (3, 'RGB')])
def test_images_of_other_channels_are_converted(mode, channels, wanted):
  image = photograph(3).convert(mode)
  kind = 'TIFF' if mode == 'CMYK' else 'PNG'
  found = records.decode_image(encoded(image, kind).read(), channels, None)
  assert found.shape == (image.height, image.width, channels)
  assert np.array_equal(
    found.squeeze(), np.asarray(image.convert(wanted)).squeeze()
  )


def test_grey_images_stay_grey(tmp_path):
  prepare(
    tmp_path,
    image=tfds.features.Image(shape=(None, None, 1), encoding_format='png'),
    example=staticmethod(
      lambda i, split: {
        'image': encoded(photograph(i, 'L'), 'PNG'),
        'label': i % 3,
      }
    ),
  )
  assert load(tmp_path).input_shape == (SIZE, SIZE, 1)


def test_other_sizes_are_other_arrays_in_the_cache(folder):
  for size in (8, 6, 8):
    dataset = load(folder, size)
    assert dataset.input_shape == (size, size, 3)
    image = dataset.splits['test'].arrays['image']
    assert image.shape == (10, size, size, 3)


def test_images_of_many_sizes_need_an_image_size(folder):
  with pytest.raises(config_lib.UserError) as caught:
    load(folder, None)
  line = str(caught.value)
  assert line.startswith("config.data.name is 'photographs'")
  assert 'config.data.image_size' in line
  assert '\n' not in line


def test_rows_of_features_have_no_image_size():
  with pytest.raises(config_lib.UserError) as caught:
    sources.load('diabetes', image_size=8, say=print)
  assert str(caught.value).startswith('config.data.image_size is 8; diabetes')


def test_rows_of_features_are_read_from_records_too(monkeypatch):
  cached = sources.load('breast_cancer', say=print)
  monkeypatch.setattr(sources, 'CACHED_BYTES', 0)
  large = sources.load('breast_cancer', say=print)
  for split in ('train', 'test'):
    equal(everything(cached.splits[split]), everything(large.splits[split]))


# ------------------------------------------------------------------- batches


def mesh():
  return mesh_lib.make_mesh(devices=jax.devices()[:1])


def train(split, first_step, steps, **kwargs):
  """The batches of `steps` steps of 5 examples, as NumPy arrays."""
  kwargs = {'seed': 4, 'resident_bytes': 0} | kwargs
  stream = pipeline.train_batches(
    split, batch_size=5, first_step=first_step, mesh=mesh(), **kwargs
  )
  found = [jax.device_get(b) for b in itertools.islice(stream, steps)]
  stream.close()
  return found


@pytest.mark.slow
def test_batches_are_those_of_the_cache_for_any_number_of_workers(both):
  # 20 batches of 5 are 2.7 epochs of 37.
  cached, large = (dataset.splits['train'] for dataset in both)
  expected = train(cached, 0, 20)
  places = pipeline.Order(4, N['train'], 5).places(0, 20)
  labels = everything(cached)['label'][places]
  assert np.concatenate([b['label'] for b in expected]).tolist() == [*labels]
  for workers in (0, 1, 2):
    found = train(large, 0, 20, num_workers=workers)
    for a, b in zip(expected, found, strict=True):
      equal(a, b)


@pytest.mark.parametrize(
  'workers', [0, pytest.param(2, marks=pytest.mark.slow)]
)
def test_a_batch_of_records_is_the_same_from_whatever_step_it_is_reached(
  both, workers
):
  cached, large = (dataset.splits['train'] for dataset in both)
  expected = train(cached, 0, 16)
  for first_step in (1, 6, 13):
    found = train(large, first_step, 3, num_workers=workers)
    for a, b in zip(expected[first_step:], found, strict=False):
      equal(a, b)


def test_workers_read_a_held_out_part(both):
  cached, large = (
    sources.hold_out(dataset, 0.25).splits['train'] for dataset in both
  )
  for a, b in zip(
    train(cached, 2, 8), train(large, 2, 8, num_workers=1), strict=True
  ):
    equal(a, b)


@pytest.mark.parametrize('workers', [0, 2])
def test_evaluation_of_records_sees_each_example_once_in_order(both, workers):
  cached, large = (dataset.splits['test'] for dataset in both)
  expected = list(pipeline.eval_batches(cached, 4, mesh()))
  found = list(pipeline.eval_batches(large, 4, mesh(), num_workers=workers))
  for a, b in zip(expected, found, strict=True):
    equal(jax.device_get(a), jax.device_get(b))
  assert [int(b['mask'].sum()) for b in found] == [4, 4, 2]


def test_a_stream_that_was_never_begun_closes_at_once(both):
  stream = pipeline.train_batches(
    both[1].splits['train'],
    seed=0,
    batch_size=5,
    first_step=0,
    mesh=mesh(),
    num_workers=2,
  )
  stream.close()


# Prints the number of its worker processes once two batches have come.
STREAM = """
import multiprocessing, os, pathlib, sys, time
import jax
from train import mesh as mesh_lib
from train.data import pipeline, sources
folder, workers, end = sys.argv[1:]
sources.CACHED_BYTES = 0
dataset = sources.load('photographs', folder, image_size=8)
stream = pipeline.train_batches(
  dataset.splits['train'], seed=0, batch_size=5, first_step=0,
  mesh=mesh_lib.make_mesh(), num_workers=int(workers),
)
try:
  if end == 'starting':
    print('ready', flush=True)
  next(stream), next(stream)
  print(len(multiprocessing.active_children()), flush=True)
  if end == 'closed':
    stream.close()
    test = dataset.splits['test']
    print(len(list(pipeline.eval_batches(
      test, 4, mesh_lib.make_mesh(), num_workers=int(workers)))))
    print(len(multiprocessing.active_children()), flush=True)
    time.sleep(1)  # Grain frees shared memory in a thread.
  elif end != 'left open':
    while True: next(stream); time.sleep(0.01)
except KeyboardInterrupt:
  stream.close()
  print('interrupted', len(multiprocessing.active_children()), flush=True)
  time.sleep(1)
"""


def start(folder, end, **env):
  return subprocess.Popen(
    [sys.executable, '-c', STREAM, str(folder), '2', end],
    cwd=REPOSITORY,
    env=os.environ | env,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    start_new_session=True,  # A group of its own for Ctrl-C.
  )


def finish(child):
  """What it still said; workers that survive it would hold its pipes open."""
  try:
    return child.communicate(timeout=60)
  finally:
    os.killpg(child.pid, signal.SIGKILL) if child.poll() is None else None


@pytest.mark.slow
@pytest.mark.parametrize('end', ['closed', 'left open'])
def test_workers_end_with_the_stream_or_the_process(folder, end):
  child = start(folder, end)
  out, error = finish(child)
  assert child.returncode == 0, error
  assert out.split() == (['2', '3', '0'] if end == 'closed' else ['2'])
  # Python complains of what is open. A worker that ends between making a block
  # of shared memory and handing it over leaves it to Python's tracker.
  lines = error.splitlines()
  lines = [line for line in lines if 'resource_tracker' not in line]
  assert end == 'left open' or not lines


@pytest.mark.slow
def test_no_worker_survives_a_parent_that_is_killed(folder):
  child = start(folder, 'killed')
  assert child.stdout.readline() == '2\n'
  child.kill()
  out, error = finish(child)
  assert (out, 'Traceback' in error) == ('', False), error


@pytest.mark.slow
@pytest.mark.parametrize(
  'when', [pytest.param('running', marks=pytest.mark.long), 'starting']
)
def test_ctrl_c_ends_workers_without_a_word_of_theirs(folder, when):
  child = start(folder, when)
  assert child.stdout.readline() in ('2\n', 'ready\n')
  if when == 'starting':
    time.sleep(1.5)  # About when a worker imports.
  os.killpg(child.pid, signal.SIGINT)  # As a terminal does.
  out, error = finish(child)
  assert out.splitlines()[-1] == 'interrupted 0'
  assert error == ''
  assert child.returncode == 0


@pytest.mark.slow
def test_neither_the_process_nor_a_worker_imports_tensorflow(folder, tmp_path):
  # Wherever it is looked for there is one, which leaves a trace if it is run.
  stub = tmp_path / 'tensorflow'
  stub.mkdir()
  (stub / '__init__.py').write_text(
    f'open({str(tmp_path / "trace")!r}, "w").close()\nraise ImportError\n'
  )
  path = f'{tmp_path}{os.pathsep}{REPOSITORY}'
  child = start(folder, 'closed', PYTHONPATH=path)
  out, error = finish(child)
  assert out.split() == ['2', '3', '0'], error
  assert not (tmp_path / 'trace').exists()


# ------------------------------------------------------------ normalization


def test_mean_and_std_of_few_records_are_those_of_all(both):
  cached, large = (normalize.resolve('mean_std', d) for d in both)
  assert cached == large


def test_mean_and_std_of_many_records_are_those_of_an_even_part(
  both, monkeypatch
):
  monkeypatch.setattr(normalize, '_MOST_RECORDS', 10)
  split = both[1].splits['train']
  looked_at = split.part(np.arange(10) * 37 // 10)
  pixels = everything(looked_at)['image'].reshape(-1, 3).astype('float64')
  found = normalize.resolve('mean_std', both[1])
  np.testing.assert_allclose(found['mean'], pixels.mean(0), rtol=1e-12)
  np.testing.assert_allclose(found['std'], pixels.std(0), rtol=1e-9)
  # The cache is looked at as a whole.
  assert normalize.resolve('mean_std', both[0]) != found


@pytest.mark.parametrize('kind', ['unit', 'symmetric', None])
def test_pixels_of_records_are_scaled_without_decoding_one(
  both, kind, monkeypatch
):
  monkeypatch.setattr(records.Records, 'take', None)
  assert normalize.resolve(kind, both[1]) == normalize.resolve(kind, both[0])


# ------------------------------------------------------------------ mistakes


def broken(i, split):
  """As an example is, but the JPEG of number 3 ends in its middle."""
  example = Photographs.example(i, split)
  if i == 3:
    file = example['image'].read()
    example['image'] = io.BytesIO(file[: len(file) * 2 // 3])
  return example


def unlabelled(i, split):
  return Photographs.example(i, split) | {'label': -1 if i == 3 else 0}


def message(folder, monkeypatch):
  """What decoding says: into the cache, as records, through a worker."""
  found = []
  for workers in (None, 0, 1):  # The first decodes into the cache.
    with pytest.raises(config_lib.UserError) as caught:
      train(load(folder).splits['train'], 0, 8, num_workers=workers or 0)
    found.append(str(caught.value))
    monkeypatch.setattr(sources, 'CACHED_BYTES', 0)
  assert len(set(found)) == 1
  assert '\n' not in found[0]
  return found[0]


def place(folder):
  """Where number 3 has come to lie: TFDS shuffles what it writes."""
  builder = tfds.builder('photographs', data_dir=folder, try_gcs=False)
  source = builder.as_data_source(
    'train', decoders={'image': tfds.decode.SkipDecoding()}
  )
  return [example['file_name'] for example in source].index(b'3.jpg')


def test_a_broken_record_is_one_line_with_its_place(tmp_path, monkeypatch):
  prepare(tmp_path, example=staticmethod(broken))
  line = message(tmp_path, monkeypatch)
  assert line.startswith(
    f"config.data.name is 'photographs', whose record {place(tmp_path)} of "
    'split train cannot be decoded: '
  )


@pytest.mark.slow
def test_a_label_below_the_classes_is_one_line_with_its_place(
  tmp_path, monkeypatch
):
  prepare(tmp_path, example=staticmethod(unlabelled))
  assert message(tmp_path, monkeypatch) == (
    f"config.data.name is 'photographs', whose record {place(tmp_path)} of "
    'split train has the label -1; its 3 classes are 0 to 2, ant, bee, cow; '
    "config.data.on_error='skip' passes over it"
  )


def test_a_label_above_the_classes_is_refused(tmp_path, monkeypatch):
  monkeypatch.setenv('TAISHAN_CACHE', str(tmp_path / 'cache'))
  path = prepare(tmp_path)
  file = path / 'features.json'
  features = json.loads(file.read_text())
  label = features['featuresDict']['features']['label']
  label['classLabel']['numClasses'] = '2'
  file.write_text(json.dumps(features))
  (path / 'label.labels.txt').write_text('ant\nbee\n')
  with pytest.raises(config_lib.UserError) as caught:
    load(tmp_path)
  assert str(caught.value).endswith(
    'of split train has the label 2; its 2 classes are 0 to 1, ant, bee; '
    "config.data.on_error='skip' passes over it"
  )


def test_a_file_that_is_gone_is_one_line(tmp_path, small):
  path = prepare(tmp_path)
  dataset = load(tmp_path)
  file = next(path.glob('*train*'))
  file.unlink()
  for read in (
    lambda: everything(dataset.splits['train']),
    lambda: load(tmp_path),
  ):
    with pytest.raises(config_lib.UserError) as caught:
      read()
    line = str(caught.value)
    assert 'split train' in line
    assert str(file) in line
    assert '\n' not in line


@pytest.mark.parametrize('cached_bytes', [0, sources.CACHED_BYTES])
def test_a_test_split_without_labels_gives_way_to_validation(
  tmp_path, monkeypatch, cached_bytes
):
  def example(i, split):
    made = Photographs.example(i, split)
    return made | ({'label': -1} if split == 'test' else {})

  sizes = {'train': 6, 'validation': 4, 'test': 3}
  prepare(tmp_path, example=staticmethod(example), sizes=sizes)
  monkeypatch.setattr(sources, 'CACHED_BYTES', cached_bytes)
  lines = []
  dataset = sources.load(
    'photographs', str(tmp_path), image_size=8, say=lines.append
  )
  assert {k: len(s) for k, s in dataset.splits.items()} == {
    'train': 6,
    'validation': 4,
  }
  assert lines == [
    'the test split of photographs has no labels and is left out'
  ]
