"""The order of examples: a batch is a function of (seed, step)."""

import itertools
import time

import jax
import numpy as np
import pytest

from train import mesh as mesh_lib
from train.data import pipeline
from train.data import sources


def mesh():
  """One device, however many there are: any batch size divides over it."""
  return mesh_lib.make_mesh(devices=jax.devices()[:1])


def split(n, offset=0):
  """n images, each of which holds its own number, as its label does."""
  numbers = np.arange(n) + offset
  return sources.Split(
    {
      'image': np.tile(numbers.astype('uint8')[:, None, None, None], (2, 2, 1)),
      'label': numbers.astype('int32'),
    }
  )


# --------------------------------------------------------------------- order


@pytest.mark.parametrize('epoch', [0, 1, 2, 1000])
def test_every_epoch_is_a_permutation(epoch):
  order = pipeline.epoch_order(3, epoch, 101)
  assert sorted(order) == list(range(101))


def test_every_epoch_and_every_seed_has_a_permutation_of_its_own():
  orders = {
    tuple(pipeline.epoch_order(seed, epoch, 50))
    for seed in range(4)
    for epoch in range(4)
  }
  assert len(orders) == 16
  assert tuple(range(50)) not in orders


@pytest.mark.parametrize(
  ('n', 'batch_size', 'steps'),
  [
    (10, 4, 20),  # Batches cross epochs.
    (12, 4, 9),  # They end where epochs end.
    (3, 8, 7),  # A batch holds more than two epochs.
    (5, 1, 11),
    (7, 7, 5),
  ],
)
def test_position_p_is_element_p_mod_n_of_the_permutation_of_epoch_p_div_n(
  n, batch_size, steps
):
  order = pipeline.Order(5, n, batch_size)
  taken = np.concatenate([order.places(step) for step in range(steps)])
  assert taken.tolist() == [
    pipeline.epoch_order(5, p // n, n)[p % n] for p in range(steps * batch_size)
  ]
  # Nothing is dropped: each whole epoch has every example once.
  for epoch in range(steps * batch_size // n):
    assert sorted(taken[epoch * n : (epoch + 1) * n]) == list(range(n))


def test_many_steps_at_once_are_the_same_as_one_by_one():
  one_by_one = [pipeline.Order(1, 10, 4).places(step) for step in range(3, 11)]
  at_once = pipeline.Order(1, 10, 4).places(3, 8)
  assert np.array_equal(at_once, np.concatenate(one_by_one))


def test_the_order_does_not_depend_on_what_was_asked_before():
  order = pipeline.Order(1, 10, 4)
  forward = {step: order.places(step) for step in range(30)}
  for step in (29, 0, 14, 14, 3, 28):
    assert np.array_equal(order.places(step), forward[step])


def test_the_seed_decides_the_order():
  def places(seed):
    return pipeline.Order(seed, 100, 10).places(0, 10)

  assert np.array_equal(places(0), places(0))
  assert not np.array_equal(places(0), places(1))


# ------------------------------------------------------------------- batches

# Whole splits live on the devices, or each batch is sent.
RESIDENT, STREAMED = pipeline.RESIDENT_BYTES, 0
either = pytest.mark.parametrize(
  'resident_bytes', [RESIDENT, STREAMED], ids=['resident', 'streamed']
)
select = jax.jit(pipeline.select)


def batches(split, first_step, steps, resident_bytes, seed=0, batch_size=8):
  """The batches of `steps` steps as the training step sees them."""
  stream = pipeline.train_batches(
    split,
    seed=seed,
    batch_size=batch_size,
    first_step=first_step,
    mesh=mesh(),
    resident_bytes=resident_bytes,
  )
  found = [
    select(batch, np.int32(first_step + i))
    for i, batch in enumerate(itertools.islice(stream, steps))
  ]
  stream.close()
  return found


def labels(found):
  return np.concatenate([batch['label'] for batch in found])


# With 100 examples in batches of 8, an epoch ends within step 12; a resident
# split is sent its order for 256 steps at once.
@either
@pytest.mark.parametrize('first_step', [0, 10, 250, 256])
def test_a_batch_holds_the_examples_of_its_step(first_step, resident_bytes):
  found = batches(split(100), first_step, 12, resident_bytes)
  positions = np.arange(first_step * 8, (first_step + 12) * 8)
  assert labels(found).tolist() == [
    pipeline.epoch_order(0, p // 100, 100)[p % 100] for p in positions
  ]


def test_resident_and_streamed_batches_are_equal_for_two_windows_of_order():
  steps = 2 * pipeline._ORDERED_STEPS + 5
  resident = batches(split(100), 3, steps, RESIDENT)
  streamed = batches(split(100), 3, steps, STREAMED)
  assert len(resident) == len(streamed) == steps
  assert np.array_equal(labels(resident), labels(streamed))
  assert np.array_equal(
    np.concatenate([b['image'] for b in resident]),
    np.concatenate([b['image'] for b in streamed]),
  )


def test_a_small_split_is_resident_and_a_large_one_streamed():
  def kind(bytes_):
    stream = pipeline.train_batches(
      split(100),
      seed=0,
      batch_size=8,
      first_step=0,
      mesh=mesh(),
      resident_bytes=bytes_,
    )
    keys = set(next(stream))
    stream.close()
    return keys

  # 100 examples of 4 pixels and an int32 are 800 bytes.
  assert kind(800) == {'examples', 'order', 'first_step'}
  assert kind(799) == {'image', 'label'}


@either
def test_a_batch_is_the_same_from_whatever_step_it_is_reached(resident_bytes):
  whole = batches(split(100), 0, 30, resident_bytes)
  for first_step in (1, 12, 13, 29):
    resumed = batches(split(100), first_step, 1, resident_bytes)
    assert np.array_equal(labels(resumed), labels(whole[first_step:][:1]))


@either
def test_the_seed_decides_the_batches(resident_bytes):
  found = [
    labels(batches(split(100), 0, 5, resident_bytes, seed=seed))
    for seed in (0, 0, 1)
  ]
  assert np.array_equal(found[0], found[1])
  assert not np.array_equal(found[0], found[2])


@either
def test_an_image_keeps_its_label_and_stays_uint8_on_the_device(resident_bytes):
  for batch in batches(split(100), 11, 3, resident_bytes):
    assert isinstance(batch['image'], jax.Array)
    assert batch['image'].dtype == np.uint8
    assert batch['image'].shape == (8, 2, 2, 1)
    assert batch['label'].dtype == np.int32
    assert np.array_equal(batch['image'][:, 1, 1, 0], batch['label'])


@either
def test_training_never_sees_a_held_out_example(resident_bytes):
  dataset = sources.Dataset('toy', {'train': split(100), 'test': split(4)})
  dataset = sources.hold_out(dataset, 0.25)
  # 15 batches of 5 are one epoch of the 75 that are left.
  found = labels(
    batches(dataset.splits['train'], 0, 15, resident_bytes, batch_size=5)
  )
  held = dataset.splits['validation'].take(np.arange(25))['label']
  assert sorted([*found, *held]) == list(range(100))


@either
def test_a_batch_may_be_larger_than_the_split(resident_bytes):
  found = labels(batches(split(3), 0, 2, resident_bytes, batch_size=9))
  assert np.bincount(found).tolist() == [6, 6, 6]


def test_one_compilation_serves_every_window_of_a_resident_split():
  traced = []

  @jax.jit
  def count(batch, step):
    traced.append(step)
    return pipeline.select(batch, step)['label']

  stream = pipeline.train_batches(
    split(100), seed=0, batch_size=8, first_step=0, mesh=mesh()
  )
  for step in range(pipeline._ORDERED_STEPS + 3):
    count(next(stream), np.int32(step))
  assert len(traced) == 1


# ---------------------------------------------------------------- evaluation


@pytest.mark.parametrize(
  ('n', 'sizes'),
  [
    (10, [4, 4, 2]),  # The last is padded.
    (8, [4, 4]),  # No batch is empty.
    (3, [3]),
    (1, [1]),
  ],
)
def test_evaluation_sees_each_example_once_in_order(n, sizes):
  found = list(pipeline.eval_batches(split(n, offset=20), 4, mesh()))
  assert [int(batch['mask'].sum()) for batch in found] == sizes
  seen = [batch['label'][np.asarray(batch['mask'])] for batch in found]
  assert np.concatenate(seen).tolist() == list(range(20, 20 + n))


def test_every_evaluation_batch_has_the_same_shape_and_types():
  # Of 10 the last batch holds 2, and as many again of what is there to see.
  for batch in pipeline.eval_batches(split(10), 4, mesh()):
    assert batch['image'].shape == (4, 2, 2, 1)
    assert batch['image'].dtype == np.uint8
    assert (batch['label'].shape, batch['label'].dtype) == ((4,), np.int32)
    assert (batch['mask'].shape, batch['mask'].dtype) == ((4,), bool)
    assert np.array_equal(batch['image'][:, 0, 0, 0], batch['label'])


def test_the_mask_stands_over_the_first_places_of_the_last_batch():
  masks = [b['mask'] for b in pipeline.eval_batches(split(10), 4, mesh())]
  assert np.all(masks[:2])
  assert masks[2].tolist() == [True, True, False, False]


def test_evaluation_of_a_held_out_part_sees_that_part():
  part = sources.Split(split(10).arrays, np.array([2, 3, 7]))
  found = list(pipeline.eval_batches(part, 2, mesh()))
  seen = [batch['label'][np.asarray(batch['mask'])] for batch in found]
  assert np.concatenate(seen).tolist() == [2, 3, 7]


def test_two_batches_are_read_ahead_of_the_one_in_use(monkeypatch):
  read = []
  take = sources.Split.take

  def watch(self, places):
    read.append(len(read))
    return take(self, places)

  monkeypatch.setattr(sources.Split, 'take', watch)
  stream = pipeline.train_batches(
    split(100),
    seed=0,
    batch_size=8,
    first_step=0,
    mesh=mesh(),
    resident_bytes=STREAMED,
  )
  for used in range(1, 4):
    next(stream)
    deadline = time.monotonic() + 10
    while len(read) < used + 2 and time.monotonic() < deadline:
      time.sleep(0.01)
    assert len(read) == used + 2
  stream.close()
