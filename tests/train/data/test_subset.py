"""Folds: each training example is validated once, for any seed."""

import pathlib

import numpy as np
import pytest
from sklearn import linear_model
from sklearn import model_selection
from sklearn import pipeline
from sklearn import preprocessing

from experiments import command
from tests.train.data import test_records
from train import config as config_lib
from train import loop
from train import program
from train.data import normalize
from train.data import sources
from train.data import subset
from train.writer import read


def toy(labels, classes=None, n_test=7):
  n = len(labels)
  arrays = {
    'features': np.arange(2 * n, dtype='float32').reshape(n, 2),
    'label': np.asarray(labels),
  }
  test = {key: array[:n_test] for key, array in arrays.items()}
  splits = {'train': sources.Split(arrays), 'test': sources.Split(test)}
  return sources.Dataset('toy', splits, classes)


def numbers(split):
  """Which examples these are, of a toy."""
  return (split.take(np.arange(len(split)))['features'][:, 0] / 2).astype(int)


def classes(split):
  return split.take(np.arange(len(split)))['label']


NUMBERS = np.random.default_rng(0).normal(size=103).astype('float32')
DIGITS = np.random.default_rng(1).integers(0, 10, 103).astype('int32')
TEN = tuple('0123456789')


@pytest.mark.parametrize(
  'dataset', [toy(NUMBERS), toy(DIGITS, TEN)], ids=['numbers', 'classes']
)
@pytest.mark.parametrize('folds', [2, 5, 10])
def test_each_example_is_validated_once_and_trained_on_in_all_other_folds(
  dataset, folds
):
  validated = []
  for fold in range(folds):
    splits = subset.pick_fold(dataset, folds, fold).splits
    held, kept = numbers(splits['validation']), numbers(splits['train'])
    assert sorted([*held, *kept]) == list(range(103))
    assert 103 // folds <= len(held) <= 103 // folds + 1
    assert len(splits['test']) == 7
    # As in the files, and not in blocks of them.
    assert (np.diff(kept) > 0).all()
    assert (np.diff(held) > 1).any()
    validated += held.tolist()
  assert sorted(validated) == list(range(103))


def test_without_folds_the_dataset_stays_as_it_is():
  dataset = toy(NUMBERS)
  assert subset.pick_fold(dataset, None, None) is dataset


def test_each_fold_of_the_digits_has_its_share_of_each_digit():
  dataset = sources.load('digits')
  whole = np.bincount(dataset.splits['train'].arrays['label'])
  for fold in range(5):
    held = subset.pick_fold(dataset, 5, fold).splits['validation']
    counts = np.bincount(classes(held), minlength=10)
    assert (np.abs(counts - whole / 5) < 1).all()


def test_folds_of_some_classes_have_their_share_of_those():
  dataset = subset.pick_classes(sources.load('digits'), (7, 3))
  whole = np.bincount(classes(dataset.splits['train']))
  held = subset.pick_fold(dataset, 5, 2).splits['validation']
  assert (np.abs(np.bincount(classes(held)) - whole / 5) < 1).all()


def test_a_class_of_two_examples_lies_in_two_of_five_folds(recwarn):
  labels = np.array([0] * 48 + [1] * 2, 'int32')
  dataset = toy(labels, ('often', 'rare'))
  rare = [
    int(classes(subset.pick_fold(dataset, 5, fold).splits['validation']).sum())
    for fold in range(5)
  ]
  assert sorted(rare) == [0, 0, 0, 1, 1]
  assert not recwarn.list


def test_where_no_class_has_an_example_for_each_fold_all_are_drawn_alike():
  dataset = toy(np.arange(20, dtype='int32') % 10, TEN)
  held = [
    numbers(subset.pick_fold(dataset, 20, fold).splits['validation'])
    for fold in range(20)
  ]
  assert sorted(np.concatenate(held)) == list(range(20))


def test_more_folds_than_examples_are_one_line():
  with pytest.raises(config_lib.UserError) as caught:
    subset.pick_fold(toy(NUMBERS), 104, 0)
  assert str(caught.value) == (
    'config.data.folds is 104; toy has 103 training examples'
  )


def test_a_validation_split_of_the_datas_own_becomes_test_where_there_is_none():
  dataset = toy(NUMBERS)
  dataset.splits['validation'] = dataset.splits.pop('test')
  splits = subset.pick_fold(dataset, 5, 0).splits
  assert len(splits['validation']) == 21
  assert len(splits['test']) == 7


def test_records_read_one_by_one_are_divided_too(tmp_path, monkeypatch):
  test_records.prepare(tmp_path)
  monkeypatch.setattr(sources, 'CACHED_BYTES', 0)
  dataset = test_records.load(tmp_path)
  rows = [
    subset.pick_fold(dataset, 4, fold).splits['validation'].rows
    for fold in range(4)
  ]
  n = len(dataset.splits['train'])
  assert sorted(np.concatenate(rows)) == list(range(n))


def make(seed, **data):
  config = config_lib.Config(
    seed=seed,
    total_steps=1,
    task='regression',
    data=config_lib.Data(batch_size=8, folds=5, fold=3, **data),
    model={'name': 'linear'},
  )
  return program.create(config, toy(NUMBERS))


def test_folds_are_the_same_for_any_seed_and_the_means_are_of_train_alone():
  made = [make(seed) for seed in (0, 1)]
  held, other = (numbers(m.dataset.splits['validation']) for m in made)
  np.testing.assert_array_equal(held, other)
  assert made[0].eval_split == 'validation'
  assert made[0].test_split == 'test'
  kept = np.setdiff1d(np.arange(103), held)
  mean = made[0].config.data.normalize['mean']
  np.testing.assert_allclose(mean, [2 * kept.mean(), 2 * kept.mean() + 1])
  whole = normalize.resolve('mean_std', toy(NUMBERS))
  assert whole['mean'] != mean


def test_few_examples_are_those_of_the_other_folds():
  splits = make(0, max_examples=10).dataset.splits
  assert len(splits['train']) == 10
  assert not set(numbers(splits['train'])) & set(numbers(splits['validation']))


@pytest.mark.slow  # 15 s.
def test_five_folds_of_the_digits_agree_with_scikit_learns(
  tmp_path: pathlib.Path,
):
  train = sources.load('digits').splits['train'].arrays
  pixels = train['image'].reshape(1437, -1).astype(float)
  theirs = model_selection.cross_val_score(
    pipeline.make_pipeline(
      preprocessing.StandardScaler(),
      linear_model.LogisticRegression(max_iter=5_000),
    ),
    pixels,
    train['label'],
    cv=model_selection.StratifiedKFold(5, shuffle=True, random_state=0),
  )
  ours = []
  for fold in range(5):
    words = [('data.folds', '5'), ('data.fold', f'{fold}')]
    config, _, _ = command.load_config('digits_linear', words)
    loop.train_and_evaluate(config, tmp_path / f'{fold}')
    lines = read(tmp_path / f'{fold}' / 'metrics.jsonl')
    ours.append([x for x in lines if 'eval/accuracy' in x][-1]['eval/accuracy'])
  print(f'ours {np.mean(ours):.4f}, scikit-learn {theirs.mean():.4f}')
  assert abs(np.mean(ours) - theirs.mean()) < 0.01
