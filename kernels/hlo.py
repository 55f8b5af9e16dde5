"""What a program costs, read from the text of its compiled HLO.

A compiled program is a list of operations, some of them loops over others. Of
each the text tells the operands' shapes and in which memory they lie, and, when
libtpu was asked for its static profile, the cycles.
"""

from collections.abc import Iterator
from collections.abc import Mapping
import dataclasses
import functools
import math
import re

import numpy as np

# They move nothing by themselves.
FREE = (
  'after-all',
  'bitcast',
  'constant',
  'get-tuple-element',
  'iota',
  'parameter',
  'partition-id',
  'replica-id',
  'tuple',
)
COLLECTIVES = (
  'all-gather',
  'all-reduce',
  'all-to-all',
  'collective-permute',
  'reduce-scatter',
)
# Operations that run another computation once, and by which attribute.
_CALLS = {'fusion': 'calls', 'async-start': 'calls', 'call': 'to_apply'}
_COMMENT = re.compile(r'/\*.*?\*/')
_COMPUTATION = re.compile(r'^(ENTRY )?%?(\S+) \(.*\{$')
_INSTRUCTION = re.compile(r'^\s+(?:ROOT )?%?(\S+) = (.*)$')
_ARRAY = re.compile(r'([a-z]+)(\d*)\w*\[([\d,]*)\](?:\{([^}]*)\})?')
_IOTA = re.compile(
  r'replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?'
)
_NAMED = re.compile(r'replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}')
_CYCLES = re.compile(r'"bundle_analysis_data":\{"estimated_cycles":"(\d+)"')


@dataclasses.dataclass(frozen=True)
class Operation:
  """One operation of a compiled program.

  Attributes:
    name: in the compiled text.
    opcode: what it is.
    target: of a custom call, else ''.
    runs: how often the loops around it run it.
    cycles: of one run; None where libtpu does not say.
    bytes: read from and written to the device's large memory in one run.
  """

  name: str
  opcode: str
  target: str
  runs: int
  cycles: int | None
  bytes: int


@dataclasses.dataclass(frozen=True)
class Collective:
  """An exchange between devices.

  Attributes:
    kind: in COLLECTIVES.
    runs: how often the loops around it run it.
    bytes: of the whole: what all-gather gives, what the others take.
    group: the places of the devices that exchange with the first, in the order
      in which the program was given them; () for all.
  """

  kind: str
  runs: int
  bytes: int
  group: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class _Instruction:
  name: str
  shape: str
  opcode: str
  operands: tuple[str, ...]
  rest: str

  def attribute(self, name: str) -> str:
    found = re.search(rf'\b{name}="?%?([\w.\-]+)', self.rest)
    return found[1] if found else ''


def operations(
  text: str, kernel_bytes: Mapping[str, int]
) -> tuple[Operation, ...]:
  """All operations of a compiled program, in order.

  Args:
    text: of jax.stages.Compiled.as_text().
    kernel_bytes: what Pallas kernels of these names say that they move, where
      it is more than their operands and results.
  """
  return tuple(_Program(text, kernel_bytes).operations())


def collectives(text: str, devices: int) -> tuple[Collective, ...]:
  """All exchanges of a compiled program, also those within fusions.

  Args:
    text: of jax.stages.Compiled.as_text().
    devices: how many it was compiled for.
  """
  found = {}
  for channel, one in _Program(text, {}).collectives(devices):
    # A fusion that goes on with an exchange names it once more.
    found.setdefault(channel, one)
  return tuple(found.values())


class _Program:
  def __init__(self, text, kernel_bytes):
    self._kernel_bytes = kernel_bytes
    self._computations = {}
    self._entry = ''
    for line in _COMMENT.sub('', text).splitlines():
      if found := _COMPUTATION.match(line):
        current = self._computations.setdefault(found[2], {})
        self._entry = found[2] if found[1] else self._entry
      elif self._computations and (found := _INSTRUCTION.match(line)):
        current[found[1]] = _instruction(found[1], found[2])

  def operations(self, name: str = '', runs: int = 1) -> Iterator[Operation]:
    computation = self._computations[name or self._entry]
    for one in computation.values():
      if one.opcode == 'while':
        times = self._times(one.attribute('condition'))
        yield from self.operations(one.attribute('body'), runs * times)
      elif one.opcode == 'call':
        yield from self.operations(one.attribute('to_apply'), runs)
      elif one.opcode not in FREE and not one.opcode.endswith('-done'):
        cycles = _CYCLES.search(one.rest)
        yield Operation(
          one.name,
          one.opcode,
          one.attribute('custom_call_target'),
          runs,
          int(cycles[1]) if cycles else None,
          self._bytes(computation, one),
        )

  def collectives(
    self, devices: int, name: str = '', runs: int = 1
  ) -> Iterator[tuple[tuple[str, str], Collective]]:
    """Each with what tells it from others."""
    name = name or self._entry
    computation = self._computations[name]
    for one in computation.values():
      kind = one.opcode.removesuffix('-start')
      if one.opcode == 'while':
        times = self._times(one.attribute('condition'))
        yield from self.collectives(
          devices, one.attribute('body'), runs * times
        )
      elif one.opcode in _CALLS:
        called = one.attribute(_CALLS[one.opcode])
        yield from self.collectives(devices, called, runs)
      elif kind in COLLECTIVES:
        group = group_of_first(one.rest)
        size = sum(
          _size(computation[operand].shape, everywhere=True)
          for operand in one.operands
        )
        if kind == 'all-gather':
          size *= len(group) or devices
        if name.startswith('all-reduce-scatter'):  # So libtpu fuses the two.
          kind = 'reduce-scatter'
        channel = one.attribute('channel_id') or f'{name}/{one.name}'
        yield (kind, channel), Collective(kind, runs, size, group)

  def _times(self, condition):
    """How often a loop runs: jax's count from 0 up to a constant."""
    limits = [
      int(one.operands[0])
      for one in self._computations[condition].values()
      if one.opcode == 'constant' and one.operands[0].isdigit()
    ]
    return max(limits, default=1)

  def _bytes(self, computation, one):
    if one.opcode.endswith('-start'):
      return _size(one.shape)  # which holds its operands as well
    if one.opcode == 'fusion':
      called = one.attribute('calls')
      written = min(self._written(called), _size(one.shape))
      return written + sum(
        min(self._read(called, index), _size(computation[name].shape))
        for index, name in enumerate(one.operands)
      )
    moved = _size(one.shape) + sum(
      _size(computation[name].shape) for name in one.operands
    )
    if one.opcode == 'custom-call':
      kernel = one.name.split('.')[0]
      moved = max(moved, self._kernel_bytes.get(kernel, 0))
    elif one.opcode in ('dynamic-slice', 'slice'):
      moved = 2 * _size(one.shape)
    elif one.opcode == 'dynamic-update-slice':
      moved = 2 * _size(computation[one.operands[1]].shape)
    return moved

  @functools.cache  # noqa: B019 - lives as long as one call of operations()
  def _read(self, name, index):
    """How much a fused computation reads of its parameter."""
    computation = self._computations[name]
    (parameter,) = (
      one
      for one in computation.values()
      if one.opcode == 'parameter' and one.operands == (str(index),)
    )
    aliases, size = {parameter.name}, 0
    for one in computation.values():
      if not aliases.intersection(one.operands):
        continue
      if one.opcode == 'bitcast':
        aliases.add(one.name)
      elif one.opcode in ('dynamic-slice', 'slice'):
        size += _size(one.shape, everywhere=True)
      elif one.opcode == 'dynamic-update-slice' and (
        one.operands[0] in aliases
      ):
        continue  # written in place
      elif one.opcode == 'fusion':
        size += sum(
          self._read(one.attribute('calls'), place)
          for place, operand in enumerate(one.operands)
          if operand in aliases
        )
      else:
        return _size(parameter.shape)
    return min(size, _size(parameter.shape))

  def _written(self, name):
    """How much a fused computation writes."""
    computation = self._computations[name]
    root = list(computation.values())[-1]
    while root.opcode == 'bitcast':
      root = computation[root.operands[0]]
    if root.opcode == 'dynamic-update-slice':
      return _size(computation[root.operands[1]].shape, everywhere=True)
    return _size(root.shape)


def group_of_first(attributes: str) -> tuple[int, ...]:
  """The places of the devices in the group of place 0; () for all.

  Of the ways in which XLA writes it: {{0,2},{1,3}}, [2,2]<=[2,2]T(1,0), and
  mesh['data'=2,'fsdp'=2] {'fsdp'}.
  """
  if found := re.search(r'replica_groups=\{\{([\d,]+)\}', attributes):
    return tuple(map(int, found[1].split(',')))
  if found := _IOTA.search(attributes):
    shape, dims, order = ([int(n) for n in re.findall(r'\d+', part or '')]
                          for part in found.groups())  # fmt: skip
    places = np.arange(math.prod(dims)).reshape(dims)
    places = places.transpose(order or None).reshape(-1, shape[-1])
    return tuple(places[0].tolist())
  if found := _NAMED.search(attributes):
    axes = re.findall(r"'(\w+)'=(\d+)", found[1])
    places = np.arange(math.prod(int(n) for _, n in axes))
    places = places.reshape([int(n) for _, n in axes])
    named = re.findall(r"'(\w+)'", found[2])
    rest = tuple(slice(None) if a in named else 0 for a, _ in axes)
    return tuple(places[rest].reshape(-1).tolist())
  if found := re.search(r'source_target_pairs=\{([^=]*)\}\}', attributes):
    pairs = re.findall(r'(\d+),(\d+)', found[1])
    return tuple(map(int, pairs[0])) if pairs else ()
  return ()


def _instruction(name, text):
  """Splits 'shape opcode(operands), attributes'."""
  end = _closing(text, 0) + 1 if text.startswith('(') else text.index(' ')
  shape, rest = text[:end], text[end:].strip()
  opcode, _, rest = rest.partition('(')
  end = _closing('(' + rest, 0) - 1
  operands = tuple(
    operand.strip().lstrip('%') for operand in rest[:end].split(',')
  )
  if opcode not in ('constant', 'parameter'):
    operands = tuple(
      operand.split()[-1].lstrip('%') for operand in operands if operand
    )
  return _Instruction(name, shape, opcode, operands, rest[end + 1 :])


def _closing(text, start):
  depth = 0
  for index in range(start, len(text)):
    depth += (text[index] == '(') - (text[index] == ')')
    if not depth:
      return index
  raise ValueError(f'no closing bracket in {text[start : start + 80]!r}')


def _size(shape, *, everywhere=False):
  """Bytes of all arrays of a shape that lie in the large memory."""
  total = 0
  for kind, bits, dimensions, layout in _ARRAY.findall(shape):
    if 'S(' in layout and not everywhere:
      continue
    size = 1 if kind == 'pred' else int(bits or 0) / 8
    for dimension in filter(None, dimensions.split(',')):
      size *= int(dimension)
    total += int(size)
  return total
