"""Which implementation of an op runs, and why.

Decided while tracing, by the chip, the shapes and the dtype. A named
implementation runs or raises. With None it is XLA, until `measured.json` holds
a time of that chip in which the kernel was faster. default() names one for all.
"""

from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import dataclasses
import functools
import json
import pathlib
import threading
from typing import Any

import jax

MEASURED = pathlib.Path(__file__).with_name('measured.json')
# name -> the platform it is compiled for, None for any.
IMPLEMENTATIONS = {
  'xla': None,
  'pallas_tpu': 'tpu',
  'pallas_gpu': 'gpu',
  # The same kernels' bodies, step by step on any platform: slow, for tests.
  'pallas_tpu_interpret': None,
  'pallas_gpu_interpret': None,
}

# Why an implementation cannot take the operands, or None where it can.
Refusal = Callable[[str], str | None]
_local = threading.local()


@dataclasses.dataclass(frozen=True)
class Choice:
  """What runs.

  Attributes:
    op: the public function's name.
    implementation: in IMPLEMENTATIONS.
    reason: one clause that says why.
  """

  op: str
  implementation: str
  reason: str


def choose(
  op: str,
  implementation: str | None,
  refusal: Refusal,
  *,
  dtype: Any,
  columns: int,
) -> str:
  """The implementation that runs, in IMPLEMENTATIONS.

  Args:
    op: the public function's name.
    implementation: the caller's wish, None for default()'s, or else for the
      best that was measured.
    refusal: says why a kernel cannot take the operands.
    dtype: of the large operand.
    columns: the length of its reduced axis.

  Raises:
    ValueError: there is no such implementation, or it cannot take these.
  """
  named = 'named by the caller'
  if implementation is None:
    implementation = getattr(_local, 'default', None)
    named = 'named as the default'
  if implementation is None:
    choice = _best(op, refusal, jax.numpy.dtype(dtype).name, columns)
  elif implementation not in IMPLEMENTATIONS:
    raise ValueError(
      f'implementation is {implementation!r}; there are '
      f'{", ".join(IMPLEMENTATIONS)}, and None'
    )
  else:
    reason = None if implementation == 'xla' else refusal(implementation)
    if reason:
      raise ValueError(f'{op}: {implementation} cannot run here: {reason}')
    choice = Choice(op, implementation, named)
  for record in getattr(_local, 'records', ()):
    record.append(choice)
  return choice.implementation


@contextlib.contextmanager
def default(implementation: str | None) -> Iterator[None]:
  """In it, an op that is asked for None runs this; it too runs or raises.

  Of what is traced in it: a program that jax.jit has traced before stays.
  """
  before = getattr(_local, 'default', None)
  _local.default = implementation
  try:
    yield
  finally:
    _local.default = before


def explain(function: Callable, *args, **kwargs) -> tuple[Choice, ...]:
  """The choices of all ops that function(*args, **kwargs) comes to.

  It is traced and not run, so that arrays may be jax.ShapeDtypeStruct. What
  jax.jit has traced before with the same shapes is not traced again, and its
  choices are not seen.
  """
  with _recording() as record:
    jax.eval_shape(functools.partial(function, **kwargs), *args)
  return tuple(record)


def chip() -> tuple[str, str]:
  """(platform, kind) of what is traced for: the ambient mesh's, or jax's."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  if device is not None:
    return device.platform, device.device_kind
  device = jax.devices()[0]
  return device.platform, device.device_kind


@contextlib.contextmanager
def _recording():
  records = _local.__dict__.setdefault('records', [])
  records.append([])
  try:
    yield records[-1]
  finally:
    records.pop()


def _best(op: str, refusal: Refusal, dtype: str, columns: int) -> Choice:
  platform, kind = chip()
  names = [
    name for name, needed in IMPLEMENTATIONS.items() if needed == platform
  ]
  if not names:
    return Choice(op, 'xla', f'there is no kernel for {platform}')
  (name,) = names
  found = [
    row['speedup']
    for row in _measured()
    if (row['op'], row['chip'], row['dtype']) == (op, kind, dtype)
    and row['columns'] // 2 < columns <= row['columns']
  ]
  if not found:
    return Choice(
      op, 'xla', f'{name} was not measured on {kind}, {dtype}, {columns} wide'
    )
  speedup = min(found)
  if speedup <= 1:
    return Choice(
      op, 'xla', f'on {kind} {name} took {1 / speedup:.2f} times as long'
    )
  reason = refusal(name)
  if reason:
    return Choice(op, 'xla', reason)
  return Choice(op, name, f'measured {speedup:.2f} times as fast on {kind}')


@functools.cache
def _measured() -> list[dict[str, Any]]:
  return json.loads(MEASURED.read_text())
