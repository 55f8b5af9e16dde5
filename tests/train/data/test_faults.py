"""Files that were really damaged: who takes which place, and what is said."""

import itertools
import json
import multiprocessing
import os
import pathlib
import shutil
import signal
import threading
import time

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds

from experiments import command
from tests import runs
from tests.train.data import test_records
from train import config as config_lib
from train import loop
from train import mesh as mesh_lib
from train.data import builders
from train.data import embedded
from train.data import faults
from train.data import pipeline
from train.data import sources
from train.data import subset
from train.data import workers

N = {'train': 64, 'test': 20}  # In 16 files each.


class Animals(test_records.Photographs, skip_registration=True):
  """Small pictures of three classes, and of a fourth that is met once."""

  name = 'animals'
  sizes = N

  def _info(self):
    names = ['ant', 'bee', 'cow', 'dog']
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict(
        {
          'image': self.image,
          'label': tfds.features.ClassLabel(names=names),
          'file_name': tfds.features.Text(),
        }
      ),
    )

  @staticmethod
  def example(i, split):
    image = test_records.photograph(i + 100 * (split == 'test'))
    label = 3 if (i, split) == (11, 'train') else i % 3
    return {'image': test_records.encoded(image), 'label': label}


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
  """The animals, undamaged, by TFDS's own writer."""
  folder = tmp_path_factory.mktemp('animals')
  tfds.disable_progress_bar()
  builder = Animals(data_dir=str(folder), file_format='array_record')
  builder.download_and_prepare(
    download_dir=str(folder / 'unused'),
    download_config=tfds.download.DownloadConfig(
      num_shards=16, try_download_gcs=False
    ),
  )
  return folder


@pytest.fixture(scope='module')
def whole(prepared):
  """The animals as they are, read from undamaged files."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sources, 'CACHED_BYTES', 0)
    return load(prepared, 'raise')


@pytest.fixture
def folder(prepared, tmp_path, monkeypatch):
  """A copy that may be damaged, and a cache of its own."""
  monkeypatch.setenv('TAISHAN_CACHE', str(tmp_path / 'cache'))
  shutil.copytree(prepared, tmp_path / 'data')
  return tmp_path / 'data'


@pytest.fixture(params=['cache', 'records'])
def kind(request, monkeypatch):
  """Decoded once into the cache, or read record by record."""
  if request.param == 'records':
    monkeypatch.setattr(sources, 'CACHED_BYTES', 0)
  return request.param


@pytest.fixture
def small(monkeypatch):
  """Nothing is small enough for the cache."""
  monkeypatch.setattr(sources, 'CACHED_BYTES', 0)


def load(folder, on_error='skip', say=lambda line: None):
  return sources.load(
    'animals', str(folder), image_size=8, on_error=on_error, say=say
  )


def files(folder, split='train'):
  return sorted(folder.rglob(f'animals-{split}.array_record-*'))


def flip(file):
  """Flips a byte within the first record, whose checksum then differs."""
  content = bytearray(file.read_bytes())
  content[200] ^= 0xFF
  file.write_bytes(content)


def mislabel(folder):
  """Takes the fourth class away: the label 3, met once, is out of range."""
  path = folder / 'animals' / '1.0.0'
  features = json.loads((path / 'features.json').read_text())
  label = features['featuresDict']['features']['label']
  label['classLabel']['numClasses'] = '3'
  (path / 'features.json').write_text(json.dumps(features))
  (path / 'label.labels.txt').write_text('ant\nbee\ncow\n')


def everything(split):
  return split.take(np.arange(len(split)))


def numbers(folder, split='train'):
  """file_name of each row, by TFDS itself; None where it cannot read it."""
  builder = tfds.builder('animals', data_dir=folder, try_gcs=False)
  source = builder.as_data_source(
    split, decoders={'image': tfds.decode.SkipDecoding()}
  )
  found = []
  for row in range(N[split]):
    try:
      found.append(source[row]['file_name'].decode())
    except RuntimeError:
      found.append(None)
  return found


def standing_in(damaged, rows):
  """Row -> the row of the same part that stands in for it, written out."""
  rows = list(rows)
  found = []
  for place in range(len(rows)):
    while rows[place % len(rows)] in damaged:
      place += 1
    found.append(rows[place % len(rows)])
  return np.array(found)


def equal(a, b):
  assert a.keys() == b.keys()
  for key in a:
    assert np.array_equal(a[key], b[key]), key


def line(function):
  """The one line of the error that it raises."""
  with pytest.raises(config_lib.UserError) as caught:
    function()
  assert '\n' not in str(caught.value)
  return str(caught.value)


def flip_two(folder):
  flip(files(folder)[3])
  flip(files(folder)[15])


def lose_one(folder):
  files(folder)[15].unlink()


def cut_one(folder):
  os.truncate(files(folder)[0], 40_000)


DAMAGES = {
  'flipped': (flip_two, 2, 'cannot be read: Corrupted'),
  'lost': (lose_one, 4, 'is missing'),
  'cut': (cut_one, 4, 'cannot be read: '),
  'mislabelled': (mislabel, 1, 'has the label 3; its 3 classes are 0 to 2, '),
}
each_damage = pytest.mark.parametrize('damage', DAMAGES)


def hurt(folder, damage):
  """Damages the files; the rows that no longer read, by TFDS, as a set."""
  harm, count, _ = DAMAGES[damage]
  if damage == 'mislabelled':
    rows = {numbers(folder).index('11.jpg')}
    harm(folder)
  else:
    harm(folder)
    rows = {i for i, name in enumerate(numbers(folder)) if name is None}
  # Files of 64 records in 16 hold 3 to 5.
  assert abs(len(rows) - count) <= (count == 4)
  return rows


# --------------------------------------------------------------------- raise


@each_damage
def test_by_default_damage_is_one_line_with_what_where_and_the_way_out(
  folder, kind, damage
):
  rows = hurt(folder, damage)
  said = line(lambda: everything(load(folder, 'raise').splits['train']))
  assert said.startswith("config.data.name is 'animals', whose ")
  assert 'of split train ' in said
  assert DAMAGES[damage][2] in said
  assert said.endswith("; config.data.on_error='skip' passes over it")
  if damage == 'lost':
    assert files(folder)[0].name.replace('00000-of', '00015-of') in said
    assert f' {min(rows)} to {max(rows)} ' in said
  else:
    assert f'record {min(rows)} of' in said


def test_files_that_nobody_needs_any_more_may_be_gone(folder):
  before = everything(load(folder, 'raise').splits['train'])
  lose_one(folder)
  equal(everything(load(folder, 'raise').splits['train']), before)
  equal(everything(load(folder, 'skip').splits['train']), before)


def test_a_text_of_which_a_record_is_damaged_is_one_line(tmp_path):
  (tmp_path / 'input.txt').write_text('to be or not to be\n' * 99)
  builder = builders.TinyShakespeare(
    data_dir=str(tmp_path), file_format='array_record'
  )
  builder.files = {'input.txt': tmp_path / 'input.txt'}
  embedded.prepare(builder)
  flip(next(pathlib.Path(builder.data_path).glob('*test*')))
  for on_error in ('raise', 'skip'):
    said = line(
      lambda how=on_error: sources.load(
        'tiny_shakespeare', str(tmp_path), on_error=how
      )
    )
    assert 'whose split test cannot be read: ' in said


# ---------------------------------------------------------------------- skip


@each_damage
def test_a_damaged_place_is_taken_by_the_next_example_that_reads(
  whole, folder, kind, damage
):
  rows = hurt(folder, damage)
  animals = whole.splits['train']
  found = load(folder).splits['train']
  assert len(found) == len(animals) == 64
  expected = everything(animals.part(standing_in(rows, range(64))))
  equal(everything(found), expected)
  # Whatever was asked before: a new reader, one place at a time, from behind.
  found = load(folder).splits['train']
  for place in reversed(range(64)):
    example = found.take(np.array([place]))
    assert np.array_equal(example['image'][0], expected['image'][place])
  assert [*np.flatnonzero(~faults.are_whole(found, np.arange(64)))] == sorted(
    rows
  )


def test_one_that_stands_in_is_of_the_same_part(whole, folder, kind):
  lose_one(folder)
  flip(files(folder)[2])
  rows = {i for i, name in enumerate(numbers(folder)) if name is None}
  dataset = sources.hold_out(load(folder), 0.25)
  dataset = subset.limit(dataset, 40)
  for name, count in (('train', 40), ('validation', 16)):
    part = dataset.splits[name]
    assert len(part) == count
    assert rows & set(part.rows), 'the damage lies elsewhere'
    expected = whole.splits['train'].part(standing_in(rows, part.rows))
    equal(everything(part), everything(expected))


def train(split, first_step, steps, num_workers=0):
  stream = pipeline.train_batches(
    split, seed=4, batch_size=5, first_step=first_step, resident_bytes=0,
    mesh=mesh_lib.make_mesh(devices=jax.devices()[:1]),
    num_workers=num_workers,
  )  # fmt: skip
  found = [jax.device_get(b) for b in itertools.islice(stream, steps)]
  stream.close()
  return found


@pytest.mark.slow
def test_all_other_places_of_the_order_stay_as_they_are(whole, folder, kind):
  rows = hurt(folder, 'flipped')
  damaged = load(folder).splits['train']
  before, after = train(whole.splits['train'], 0, 26), []
  for first, steps in ((0, 7), (7, 1), (8, 18)):  # As a run that was resumed.
    after += train(damaged, first, steps)
  places = pipeline.Order(4, 64, 5).places(0, 26)
  moved = np.isin(places, [*rows])
  assert 2 * len(rows) <= moved.sum() < 10
  for key in ('image', 'label'):
    a, b = (np.concatenate([x[key] for x in batches]) for batches in
            (before, after))  # fmt: skip
    assert np.array_equal(a[~moved], b[~moved])
  assert not np.array_equal(
    *(np.concatenate([x['image'] for x in found])[moved] for found in
      (before, after))
  )  # fmt: skip


def test_evaluation_counts_those_that_read_and_no_other(whole, folder, kind):
  flip(files(folder, 'test')[2])
  bad = numbers(folder, 'test').index(None)
  animals = everything(whole.splits['test'])
  batches = list(
    pipeline.eval_batches(
      load(folder).splits['test'], 6,
      mesh_lib.make_mesh(devices=jax.devices()[:1]),
    )
  )  # fmt: skip
  mask = np.concatenate([b['mask'] for b in batches])
  assert [*np.flatnonzero(~mask)] == [bad, *range(20, 24)]
  for key in ('image', 'label'):
    seen = np.concatenate([b[key] for b in batches])[mask]
    assert np.array_equal(seen, np.delete(animals[key], bad, 0))


def test_a_damaged_example_belongs_to_no_class(whole, folder):
  rows = hurt(folder, 'flipped')
  labels = everything(whole.splits['train'])['label']
  part = subset.pick_classes(load(folder), (2, 0)).splits['train']
  kept = [r for r in range(64) if labels[r] in (0, 2) and r not in rows]
  assert part.rows.tolist() == kept
  assert everything(part)['label'].tolist() == [
    [1, None, 0][labels[row]] for row in kept
  ]


def test_more_than_a_tenth_is_refused(folder, kind):
  for file in files(folder)[:2]:  # 8 of 64.
    file.unlink()
  said = line(lambda: everything(load(folder).splits['train']))
  assert "config.data.name is 'animals', of whose split train " in said
  assert 'more than a tenth' in said
  assert not list(folder.parent.rglob('train/*.npy'))
  line(lambda: load(folder, 'raise'))


def test_a_part_of_which_nothing_reads_is_refused(folder, kind):
  flip(files(folder)[0])
  part = load(folder).splits['train'].part(np.array([0]))
  assert 'damaged as a whole' in line(lambda: everything(part))


# --------------------------------------------------------- said, and counted


def test_the_first_are_said_with_why_and_the_rest_are_counted(folder, kind):
  for file in files(folder)[:5]:
    flip(file)
  rows = [row for row, name in enumerate(numbers(folder)) if name is None]
  assert len(rows) == 5
  lines = []
  split = load(folder, say=lines.append).splits['train']
  for _ in range(3):  # Epochs.
    everything(split)
  for row, said in zip(rows[:3], lines, strict=True):
    assert said.startswith(
      f"config.data.on_error is 'skip': record {row} of split train cannot be "
      'read: Corrupted'
    )
  assert lines[-1].endswith('; what follows is only counted')


@pytest.mark.parametrize('num_workers', [0, 1])
def test_what_a_reader_process_finds_is_said_by_its_parent(
  folder, small, num_workers
):
  rows = hurt(folder, 'flipped')
  expected = train(load(folder).splits['train'], 0, 26)
  lines = []
  split = load(folder, say=lines.append).splits['train']
  found = train(split, 0, 26, num_workers)
  for a, b in zip(expected, found, strict=True):
    equal(a, b)
  assert {int(said.split('record ')[1].split()[0]) for said in lines} == rows
  assert set(split.faults.why) == rows
  assert len(lines) == 2


def test_a_cache_knows_what_was_damaged_and_no_other_policy_uses_it(folder):
  rows = hurt(folder, 'flipped')
  lines, again = [], []
  first = everything(load(folder, say=lines.append).splits['train'])
  index = next((folder.parent / 'cache').rglob('train/index.json'))
  made = index.stat().st_mtime_ns
  assert set(map(int, json.loads(index.read_text())['damaged'])) == rows
  equal(everything(load(folder, say=again.append).splits['train']), first)
  assert again == lines
  assert len(lines) == 2
  said = line(lambda: load(folder, 'raise'))
  assert f'record {min(rows)} of split train cannot be read' in said
  assert index.stat().st_mtime_ns == made


@pytest.mark.parametrize('on_error', ['raise', 'skip'])
def test_a_cache_is_made_again_where_the_files_have_been_mended(
  prepared, whole, folder, on_error
):
  hurt(folder, 'flipped')
  load(folder)
  for damaged, good in zip(files(folder), files(prepared), strict=True):
    shutil.copy(good, damaged)
  lines = []
  split = load(folder, on_error, lines.append).splits['train']
  equal(everything(split), everything(whole.splits['train']))
  assert len(lines) == 1
  assert 'is made again' in lines[0]


def config(folder, on_error='skip', **fields):
  return runs.config(
    total_steps=48, log_every=4, eval_every=48, checkpoint_every=48,
    data=config_lib.Data(
      name='animals', data_dir=str(folder), image_size=8, batch_size=8,
      on_error=on_error, **fields,
    ),
  )  # fmt: skip


def test_a_run_says_at_its_end_how_much_it_passed_over(
  folder, kind, tmp_path, capsys
):
  flip(files(folder)[3])
  flip(files(folder, 'test')[2])
  results = loop.train_and_evaluate(config(folder), tmp_path / 'run')
  said = capsys.readouterr().out.splitlines()
  assert (
    'damaged and passed over: 1 of 64 records of train, 1 of 20 records of test'
  ) in said
  written = tmp_path / 'run' / 'evaluations' / 'test-48.json'
  assert json.loads(written.read_text())['count'] == 19
  # Of 19 and not of 20.
  assert (results['test/accuracy'] * 19) % 1 == pytest.approx(0, abs=1e-6)


# ------------------------------------------------------- readers that are dead


def kill_one():
  """Ends a worker process as a machine short of memory does."""
  os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)


def killed_at(monkeypatch, steps):
  """Makes the training stream lose a reader before each of these steps.

  Returns the steps whose batches came, as they come.
  """
  whole, came = pipeline.train_batches, []

  def stream(*args, first_step, **kwargs):
    batches = whole(*args, first_step=first_step, **kwargs)
    try:
      for step in itertools.count(first_step):
        if step in steps:
          kill_one()
        batch = next(batches)
        came.append(step)
        yield batch
    finally:
      batches.close()

  monkeypatch.setattr(pipeline, 'train_batches', stream)
  return came


@pytest.mark.slow
def test_readers_that_died_start_again_and_nothing_else_changes(
  folder, small, tmp_path, monkeypatch, capsys
):
  hurt(folder, 'flipped')
  loop.train_and_evaluate(config(folder), tmp_path / 'whole')
  killed_at(monkeypatch, (6,))
  loop.train_and_evaluate(config(folder, num_workers=2), tmp_path / 'killed')
  said = capsys.readouterr().out
  assert said.count('died with code -9 (SIGKILL') == 1
  assert said.count('they start again') == 1
  lines = [
    (tmp_path / run / 'metrics.jsonl').read_text()
    for run in ('whole', 'killed')
  ]
  assert lines[0] == lines[1]
  assert runs.digest(tmp_path / 'whole') == runs.digest(tmp_path / 'killed')


@pytest.mark.long
@pytest.mark.slow
def test_a_reader_that_died_is_one_line_and_nothing_is_lost(
  folder, small, tmp_path, monkeypatch, capsys
):
  settings = config(folder, 'raise', num_workers=2)
  whole, killed = tmp_path / 'whole', tmp_path / 'killed'
  loop.train_and_evaluate(config(folder, 'raise'), whole)
  with monkeypatch.context() as patch:
    came = killed_at(patch, (6,))
    began = time.monotonic()
    code = command.run(
      'launch', lambda _: loop.train_and_evaluate(settings, killed), []
    )
  assert time.monotonic() - began < 60
  assert code == 1
  said = capsys.readouterr().err.splitlines()
  assert (
    len([text for text in said if 'died with code -9 (SIGKILL' in text]) == 1
  )
  assert 'Traceback' not in ''.join(said)
  # Some batches had been read ahead; each was used, and the last step is saved.
  assert 6 <= len(came) < 48
  assert (killed / 'checkpoints' / f'{len(came)}').is_dir()
  # Resumed by the other policy: where nothing is damaged they are the same.
  loop.train_and_evaluate(config(folder, 'skip'), killed)
  assert (
    "resuming with config.data.on_error 'skip', which was 'raise'"
    in capsys.readouterr().out
  )
  assert runs.digest(whole) == runs.digest(killed)


def test_a_death_that_leaves_a_lock_held_is_not_waited_for_forever(monkeypatch):
  monkeypatch.setattr(workers, '_MOST_SECONDS', 2)
  registered = []
  monkeypatch.setattr(
    workers.atexit, 'register', lambda *words: registered.append(words)
  )
  child = multiprocessing.get_context('spawn').Process(
    target=time.sleep, args=(60,), name='grain-process'
  )
  child.start()
  lock = threading.Lock()  # That nobody is there to release.
  lock.acquire()
  seen = {child}
  child.kill()
  began = time.monotonic()
  with pytest.raises(workers.ReaderError, match=r'code -9 \(SIGKILL'):
    workers._watched(lock.acquire, seen)
  assert time.monotonic() - began < 20
  assert registered == [(os._exit, 1)]
