"""Which of a dataset's examples are used: some classes, a fold, or a few."""

import dataclasses
import itertools
import warnings

import numpy as np

from train import config as config_lib
from train.data import faults
from train.data import sources


def pick_classes(
  dataset: sources.Dataset, classes: tuple[int, ...]
) -> sources.Dataset:
  """Only the examples of these classes, which are numbered anew from 0.

  Args:
    dataset: with classes as labels.
    classes: their numbers, in the order of the new ones; () for all.

  Raises:
    UserError: the data has no such class, one is given twice, there is only
      one, or the data is read record by record.
  """
  if not classes:
    return dataset
  labelled = 'label' in dataset.splits['train'].specs
  there = range(len(dataset.classes or ()) if labelled else 0)
  if (
    not all(type(c) is int and c in there for c in classes)
    or len(set(classes)) != len(classes)
    or len(classes) < 2
  ):
    has = f'the classes 0 to {len(there) - 1}' if there else 'no classes'
    raise config_lib.UserError(
      f'config.data.classes is {classes}; it takes two or more different '
      f'numbers, and {dataset.name} has {has}'
    )
  numbers = np.full(len(there), -1, np.int32)
  numbers[list(classes)] = np.arange(len(classes))
  splits = {}
  for name, split in dataset.splits.items():
    if not isinstance(split, sources.Split):
      raise config_lib.UserError(
        f'config.data.classes is {classes}, but {dataset.name} is read record '
        'by record, where labels are not known beforehand'
      )
    labels = numbers[split.arrays['label']]
    # Of a damaged example the class is not known: it belongs to none.
    picked = (labels >= 0) & faults.are_whole(split, np.arange(len(labels)))
    splits[name] = dataclasses.replace(
      split,
      arrays=split.arrays | {'label': labels},
      rows=np.flatnonzero(picked),
    )
  return dataclasses.replace(
    dataset,
    splits=splits,
    classes=tuple(dataset.classes[c] for c in classes),
  )


def pick_fold(
  dataset: sources.Dataset, folds: int | None, fold: int | None
) -> sources.Dataset:
  """Part `fold` of the training examples as validation, the others as train.

  scikit-learn divides them, by a fixed key: runs with other seeds, and other
  models, have the same folds. Each has its share of every class, to within one
  example, where the labels lie in memory and are classes, of which one at least
  has an example for each fold; else they are drawn from all alike.

  Args:
    dataset: of `folds` training examples or more.
    folds: how many parts; None: the dataset stays as it is.
    fold: from 0.

  Raises:
    UserError: there are fewer training examples than folds.
  """
  if folds is None:
    return dataset
  train = dataset.splits['train']
  if folds > len(train):
    raise config_lib.UserError(
      f'config.data.folds is {folds}; {dataset.name} has {len(train)} training '
      'examples'
    )
  from sklearn import model_selection  # Which few runs need.

  labels = _class_labels(dataset)
  stratified = labels is not None and np.bincount(labels).max() >= folds
  kind = 'StratifiedKFold' if stratified else 'KFold'
  splitter = getattr(model_selection, kind)(folds, shuffle=True, random_state=0)
  with warnings.catch_warnings():  # Of a class that not every fold can have.
    warnings.simplefilter('ignore', UserWarning)
    parts = splitter.split(np.arange(len(train)), labels)
    kept, held = next(itertools.islice(parts, fold, None))
  return dataset.divided(held, kept)


def _class_labels(dataset: sources.Dataset) -> np.ndarray | None:
  """The training examples' classes; None where they are not known."""
  train = dataset.splits['train']
  if (
    not isinstance(train, sources.Split)
    or dataset.classes is None
    or 'label' not in train.arrays
  ):
    return None
  labels = train.arrays['label']
  return labels if train.rows is None else labels[train.rows]


def limit(
  dataset: sources.Dataset, max_examples: int | None
) -> sources.Dataset:
  """At most so many training examples, chosen by a fixed key.

  The key is not the run's seed: runs with other seeds see the same examples.

  Raises:
    UserError: there are not so many.
  """
  if max_examples is None:
    return dataset
  train = dataset.splits['train']
  if max_examples > len(train):
    raise config_lib.UserError(
      f'config.data.max_examples is {max_examples}; {dataset.name} has '
      f'{len(train)} training examples'
    )
  order = np.random.default_rng(1).permutation(len(train))
  few = train.part(np.sort(order[:max_examples]))
  return dataclasses.replace(dataset, splits=dataset.splits | {'train': few})
