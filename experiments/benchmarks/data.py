"""Preparing MNIST from its original files, opening its cache, reading it."""

import dataclasses
import gzip
import hashlib
import json
import os
import pathlib
import statistics
import struct
import tempfile
import time
from unittest import mock

from experiments.benchmarks import silence

ROUNDS = 5
BATCH_SIZE = 128


def main():
  """Prints seconds and examples a second.

  The files are packed anew from the MNIST that is there (or downloaded), so
  that the network is not measured; they hold the same bytes as the originals.
  """
  import numpy as np

  from train.data import downloads
  from train.data import pipeline
  from train.data import sources

  known = sources.load('mnist')
  with tempfile.TemporaryDirectory() as folder:
    files = _pack(known, pathlib.Path(folder), downloads.FILES['mnist'])
    with (
      mock.patch.dict(os.environ, {'TAISHAN_CACHE': f'{folder}/cache'}),
      mock.patch.dict(downloads.FILES, {'mnist': files}),
      silence.silence(),
    ):
      start = time.perf_counter()
      prepared = sources.load('mnist', folder)
      preparing = time.perf_counter() - start
      opening = []
      for _ in range(ROUNDS):
        start = time.perf_counter()
        dataset = sources.load('mnist', folder)
        opening.append(time.perf_counter() - start)
    total = sum(len(split) for split in prepared.splits.values())
    _show('prepare and decode', examples=total, seconds=preparing)
    _show('open the cache', seconds=statistics.median(opening), runs=ROUNDS)
    split = dataset.splits['train']
    order = pipeline.Order(0, len(split), BATCH_SIZE)
    rates = []
    for epoch in range(ROUNDS):
      steps = len(split) // BATCH_SIZE
      first = epoch * steps
      start = time.perf_counter()
      for step in range(first, first + steps):
        split.take(order.places(step))
      rates.append(steps * BATCH_SIZE / (time.perf_counter() - start))
    rate = statistics.median(rates)
    _show('read it, shuffled', examples_per_second=rate, runs=ROUNDS)
    assert all(
      np.array_equal(
        np.sort(known.splits[name].arrays['label']),
        np.sort(prepared.splits[name].arrays['label']),
      )
      for name in known.splits
    )


def _pack(dataset, folder: pathlib.Path, published) -> tuple:
  """Writes the dataset as gzipped IDX files; returns their own table."""
  files = []
  for file in published:
    split = 'train' if file.name.startswith('train') else 'test'
    arrays = dataset.splits[split].arrays
    if 'images' in file.name:
      images = arrays['image'][..., 0]
      content = struct.pack('>iiii', 2051, *images.shape) + images.tobytes()
    else:
      labels = arrays['label'].astype('uint8')
      content = struct.pack('>ii', 2049, len(labels)) + labels.tobytes()
    packed = gzip.compress(content, compresslevel=6, mtime=0)
    (folder / file.name).write_bytes(packed)
    digest = hashlib.sha256(packed).hexdigest()
    files.append(dataclasses.replace(file, size=len(packed), sha256=digest))
  return tuple(files)


def _show(what: str, **numbers):
  print(json.dumps({'what': what} | numbers), flush=True)
