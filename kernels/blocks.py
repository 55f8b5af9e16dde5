"""Block sizes that were found to be better than an op's own rule.

`tuned.json` holds them by chip, op, dtype and columns; kernels.tune writes it.
"""

from collections.abc import Iterator
import contextlib
import functools
import json
import pathlib
import threading
from typing import Any

import jax

from kernels import dispatch

TUNED = pathlib.Path(__file__).with_name('tuned.json')
_local = threading.local()


def tuned(op: str, dtype: Any, columns: int) -> tuple[int, ...] | None:
  """The block for the chip that is traced for, None: the op's rule decides.

  Args:
    op: the op's folder.
    dtype: of the large operand.
    columns: the length of its reduced axis.
  """
  tried = getattr(_local, 'tried', None)
  if tried is not None:
    return tried or None
  _, kind = dispatch.chip()
  key = kind, op, jax.numpy.dtype(dtype).name
  for row in table():
    if (row['chip'], row['op'], row['dtype']) == key and (
      row['columns'] // 2 < columns <= row['columns']
    ):
      return tuple(row['block'])
  return None


@contextlib.contextmanager
def trying(block: tuple[int, ...]) -> Iterator[None]:
  """In it, tuned() returns this block for every op; None where it is ()."""
  _local.tried = block
  try:
    yield
  finally:
    _local.tried = None


@functools.cache
def table() -> list[dict[str, Any]]:
  """The rows of TUNED."""
  return json.loads(TUNED.read_text())
