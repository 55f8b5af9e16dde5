"""The short form of every part: the trials that it says are a fair share."""

import pytest

from tests.faults import trials

PARTS = trials.parts()


@pytest.mark.parametrize(
  ('name', 'i'),
  [
    pytest.param(
      name,
      i,
      # A part says which of its trials take longer than some seconds.
      marks=[pytest.mark.slow] if i in getattr(part, 'SLOW', ()) else [],
    )
    for name, part in PARTS.items()
    for i in part.SHORT
  ],
)
def test_a_promise_holds_under_a_fault(name, i, tmp_path):
  word = PARTS[name].trial(i, tmp_path)
  assert word is None or isinstance(word, str)


@pytest.mark.parametrize('name', PARTS)
def test_a_part_says_what_it_tries_and_how_often(name):
  part = PARTS[name]
  assert part.WHAT
  assert '\n' not in part.WHAT
  assert part.SHORT
  assert all(0 <= i < part.TRIALS for i in part.SHORT)
