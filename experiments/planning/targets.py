"""Targets by name: 'v5e:4x4' is 16 chips of a TPU, 'h200:8' eight GPUs.

Names of chips and their rates are those of kernels.chips.
"""

import dataclasses
import itertools
import math
import os
import re

from kernels import chips
from train import config as config_lib

# Slices by Cloud TPU's documentation; of these the nearest is named where
# libtpu refuses another.
_FLAT = ('1x1', '2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16')
_DEEP = (
  '2x2x1', '2x2x2', '2x2x4', '2x4x4', '4x4x4', '4x4x8', '4x8x8', '8x8x8',
  '8x8x16', '8x16x16', '16x16x16',
)  # fmt: skip
SLICES = {'v4': _DEEP, 'v5e': _FLAT, 'v5p': _DEEP, 'v6e': _FLAT}
_FLAT_WRAP = 16  # A side of so many chips of v5e and v6e closes to a ring.
_DEEP_WRAP = 4  # Sides of a multiple, in each dimension, of v4 and v5p.
# A message crosses a link between TPUs in a microsecond: Austin et al. (2025),
# "How to Scale Your Model", chapter 2. NCCL takes some ten to begin.
_HOP_SECONDS = 1e-6
_GPU_SECONDS = 10e-6
_NETWORK = 50e9  # Of each GPU between hosts, one way: 400 Gb/s, as DGX has.
_GPU_SHARE = 0.75  # Of a GPU's memory jax takes so much, unless it is told.
_MOST_GPUS = 1024
_MOST_CPUS = 1024

# All devices of a CPU together, by `python -m experiments.benchmark
# --suite=plan` on two cores of an Intel Xeon: operations a second of a training
# step, bytes a second of the memory, and of the caches, where all that a step
# needs fits into them.
CPU = chips.Chip('cpu', '', '', 9.9e9, 92e9, 0)
CPU_CACHE_BANDWIDTH = 25e9
CPU_CACHE_BYTES = 32 * 2**20


@dataclasses.dataclass(frozen=True)
class Target:
  """Devices.

  Attributes:
    name: as it was asked for.
    platform: 'tpu', 'cuda' or 'cpu'.
    chip: one of them.
    shape: chips along each axis of a slice; hosts and GPUs of each; (devices,).
    cache_bandwidth: of a CPU's caches.
  """

  name: str
  platform: str
  chip: chips.Chip
  shape: tuple[int, ...]
  cache_bandwidth: float = CPU_CACHE_BANDWIDTH

  @property
  def devices(self) -> int:
    """How many there are."""
    return math.prod(self.shape)

  @property
  def memory(self) -> float:
    """Bytes of a device that a program can have; 0 where they all share it.

    Of a TPU its compiler says how many, and refuses what needs more.
    """
    share = _GPU_SHARE if self.platform == 'cuda' else 1
    return share * self.chip.memory

  def rate(self, dtype: str) -> float:
    """Operations a second of a device's products of that dtype."""
    if self.platform == 'cpu':
      return self.chip.flops / self.devices
    return self.chip.slower.get(dtype, self.chip.flops)

  def bandwidth(self, needed: float) -> float:
    """Bytes a second of a device's memory, of which a step needs so many."""
    if self.platform != 'cpu':
      return self.chip.bandwidth
    cached = self.devices * needed <= CPU_CACHE_BYTES
    rate = self.cache_bandwidth if cached else self.chip.bandwidth
    return rate / self.devices

  def exchange_seconds(
    self, kind: str, size: int, members: int, extents: tuple[int, ...]
  ) -> float:
    """How long the links need for one collective.

    By rings along every axis of the torus that the group spans, all at once; a
    lower bound.

    Args:
      kind: in hlo.COLLECTIVES.
      size: bytes of the whole, as hlo.Collective has it.
      members: devices that exchange with each other.
      extents: over how many places of each axis of `shape` these reach.
    """
    if members <= 1 or not size:
      return 0.0
    moved = {
      'all-reduce': 2 * size * (members - 1) / members,
      'collective-permute': size,
    }.get(kind, size * (members - 1) / members)
    if self.platform == 'cpu':  # Each part is written and read in memory.
      return 2 * moved * self.devices / self.chip.bandwidth
    if self.platform == 'cuda':
      hosts, gpus = extents
      # As many rings as a host has GPUs, each through its own adapter.
      rate = min(self.chip.link, gpus * _NETWORK if hosts > 1 else math.inf)
      return _GPU_SECONDS + moved / rate
    spanned = {i: n for i, n in enumerate(extents) if n > 1}
    ways = {i: self._ways(i, n) for i, n in spanned.items()}
    hops = sum(n // ways[i] for i, n in spanned.items())
    if kind == 'collective-permute' or not spanned:
      return _HOP_SECONDS + size / self.chip.link
    if kind == 'all-to-all':  # The middle of the longest axis carries most.
      longest = max(spanned, key=spanned.get)
      moved = size * spanned[longest] / (4 * ways[longest])
      return hops * _HOP_SECONDS + moved / (ways[longest] * self.chip.link)
    return hops * _HOP_SECONDS + moved / (sum(ways.values()) * self.chip.link)

  def _ways(self, axis: int, extent: int) -> int:
    """2 where so many along the axis are a ring, 1 where they are a line."""
    closed = (
      self.shape[axis] % _FLAT_WRAP == 0
      if len(self.shape) == 2
      else not any(n % _DEEP_WRAP for n in self.shape)
    )
    return 2 if closed and extent == self.shape[axis] else 1


def names() -> str:
  """What --target takes, in words."""
  tpus = ', '.join(f'{chip}:{_middle(chip)}' for chip in chips.TPUS)
  return f'{tpus}, {", ".join(f"{gpu}:8" for gpu in chips.GPU_CHIPS)}, cpu:8'


def _middle(chip: str) -> str:
  return SLICES[chip][3]


def parse(text: str) -> Target:
  """The target of that name.

  Raises:
    UserError: there is none; with the list, or the nearest.
  """
  chip, colon, rest = text.partition(':')
  if chip in chips.TPUS:
    return _tpu(text, chip, rest)
  if chip not in (*chips.GPU_CHIPS, 'cpu') or not colon:
    raise config_lib.UserError(
      f'--target is {text!r}; it takes a chip and how many, as {names()}'
    )
  if not re.fullmatch(r'[1-9]\d{0,5}', rest):
    raise config_lib.UserError(
      f'--target is {text!r}; after {chip}: it takes a number of devices, as '
      f'{chip}:8'
    )
  count = int(rest)
  if chip == 'cpu':
    if count > _MOST_CPUS:
      raise config_lib.UserError(
        f'--target is {text!r}; the nearest is cpu:{_MOST_CPUS}'
      )
    return Target(text, 'cpu', _cpu(), (count,))
  entry = chips.GPU_CHIPS[chip]
  if count > entry.most and (count % entry.most or count > _MOST_GPUS):
    near = min(_MOST_GPUS, max(1, round(count / entry.most)) * entry.most)
    raise config_lib.UserError(
      f'--target is {text!r}, and a host has {entry.most} of them: the nearest '
      f'is {chip}:{near}'
    )
  hosts = max(1, count // entry.most)
  return Target(text, 'cuda', entry, (hosts, count // hosts))


def _tpu(text: str, chip: str, rest: str) -> Target:
  dimensions = len(SLICES[chip][0].split('x'))
  pattern = 'x'.join([r'([1-9]\d{0,3})'] * dimensions)
  found = re.fullmatch(pattern, rest)
  if not found:
    raise config_lib.UserError(
      f'--target is {text!r}; a slice of {chip} has {dimensions} sides, as '
      f'{", ".join(f"{chip}:{s}" for s in SLICES[chip])}'
    )
  shape = tuple(map(int, found.groups()))
  target = Target(text, 'tpu', chips.TPUS[chip], shape)
  if target.devices > target.chip.most:
    raise refused(target, f'a pod has {target.chip.most} chips')
  return target


def refused(target: Target, why: str) -> config_lib.UserError:
  """What to say of a slice that nobody has, with the nearest that there is."""
  chip = target.name.partition(':')[0]

  def distance(name):
    sides = sorted(map(int, name.split('x')))
    pairs = zip(sides, sorted(target.shape), strict=True)
    apart = sum(abs(math.log(a / b)) for a, b in pairs)
    return abs(math.log(math.prod(sides) / target.devices)) + apart / 100

  nearest = min(SLICES[chip], key=distance)
  return config_lib.UserError(
    f'--target is {target.name!r}, and {why}; the nearest is {chip}:{nearest}'
  )


def calibrated(
  *, flops: float, bandwidth: float, cache_bandwidth: float
) -> Target:
  """One CPU device of these rates, in place of those of CPU."""
  chip = dataclasses.replace(CPU, flops=flops, bandwidth=bandwidth)
  return Target('cpu:1', 'cpu', chip, (1,), cache_bandwidth)


def _cpu() -> chips.Chip:
  """CPU with the memory of this machine, which all devices share."""
  try:
    memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
  except (ValueError, OSError, AttributeError):
    memory = 0
  return dataclasses.replace(CPU, memory=memory)


def meshes(devices: int) -> list[tuple[int, int, int]]:
  """All lengths of (data, fsdp, tensor) that make so many devices."""
  divisors = [n for n in range(1, devices + 1) if devices % n == 0]
  return [
    (devices // (fsdp * tensor), fsdp, tensor)
    for tensor, fsdp in itertools.product(divisors, divisors)
    if devices % (fsdp * tensor) == 0
  ]
