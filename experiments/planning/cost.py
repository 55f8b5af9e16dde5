"""Whether a step fits, and how fast it is, from what its compiler says."""

from collections.abc import Mapping
import dataclasses
from typing import Any

from experiments.planning import targets


@dataclasses.dataclass(frozen=True)
class Plan:
  """A config on a target.

  Attributes:
    target: the devices.
    account: what compiling.answer says.
    over: bytes of a device that are missing; 0 where it fits.
    needed: bytes of a device at the step's peak, with batches read ahead.
    available: bytes of a device that there are; 0 where that is not known.
    seconds: 'compute', 'memory' and 'interconnect' of one step. {} where the
      compiler refused the program for want of memory.
    collectives: each kind with the others of its kind: 'kind', 'count', 'bytes'
      of all runs, 'seconds'.
  """

  target: targets.Target
  account: Mapping[str, Any]
  over: float
  needed: float
  available: float
  seconds: Mapping[str, float]
  collectives: tuple[Mapping[str, Any], ...]

  @property
  def fits(self) -> bool:
    """Whether the step can run there."""
    return self.over <= 0

  @property
  def step(self) -> float | None:
    """Seconds of a step: the longest of its three parts, the others behind."""
    return max(self.seconds.values(), default=None)

  @property
  def bound(self) -> str | None:
    """Which of the three it is."""
    return max(self.seconds, key=self.seconds.get, default=None)

  @property
  def share_of_peak(self) -> float | None:
    """MFU: operations of the step, over what the devices could do in it."""
    if not self.step:
      return None
    return self.seconds['compute'] / self.step

  @property
  def examples(self) -> float | None:
    """A second."""
    return self.step and self.account['batch_size'] / self.step

  @property
  def hours(self) -> float | None:
    """Of all steps of the config, one after the other."""
    return self.step and self.account['total_steps'] * self.step / 3600


def plan(target: targets.Target, account: Mapping[str, Any]) -> Plan:
  """Judges what compiling.answer says.

  A step takes the longest of three: its products at the device's peak, what it
  reads and writes at the memory's rate, what it exchanges at the links'. Each
  is a lower bound, and so is their largest.
  """
  if 'over' in account:
    over = account['over']
    return Plan(
      target,
      account,
      over['used'] - over['memory'] + account['ahead'],
      over['used'] + account['ahead'],
      over['memory'],
      {},
      (),
    )
  needed = sum(account['memory'].values()) + account['ahead']
  available = target.memory
  if target.platform == 'cpu':  # Which they share.
    available /= target.devices
  collectives = tuple(_collectives(target, account['collectives']))
  rate = target.rate(account['dtype'])
  return Plan(
    target,
    account,
    max(0, needed - available) if available else 0,
    needed,
    available,
    {
      'compute': account['flops'] / target.devices / rate,
      'memory': account['moved'] / target.bandwidth(needed),
      'interconnect': sum(one['seconds'] for one in collectives),
    },
    collectives,
  )


def _collectives(target, found):
  """One for each kind, the largest first."""
  kinds = {}
  for alike in found:
    one = kinds.setdefault(
      alike['kind'],
      {'kind': alike['kind'], 'count': 0, 'bytes': 0, 'seconds': 0.0},
    )
    for runs, size in alike['sizes']:
      one['count'] += runs
      one['bytes'] += runs * size
      one['seconds'] += runs * target.exchange_seconds(
        alike['kind'], size, alike['members'], tuple(alike['extents'])
      )
  return sorted(kinds.values(), key=lambda one: -one['seconds'])


def as_json(plan: Plan) -> dict[str, Any]:
  """All of it, for programs. Bytes and operations are whole numbers."""
  account = plan.account
  return {
    'target': plan.target.name,
    'devices': plan.target.devices,
    'kind': account['kind'],
    'mesh': account['mesh'],
    'model': account['model'],
    'variant': account['variant'],
    'data': account['data'],
    'dtype': account['dtype'],
    'batch_size': account['batch_size'],
    'parameters': account['parameters'],
    'fits': plan.fits,
    'bytes_a_device': {
      'needed': plan.needed,
      'available': plan.available,
      'over': plan.over,
      'arguments': account['bytes'],
      'batches_ahead': account['ahead'],
      **{f'compiled_{k}': v for k, v in account.get('memory', {}).items()},
    },
    'flops': account['flops'],
    'forward_flops_an_example': account['forward'],
    'moved_a_device': account.get('moved'),
    'collectives': list(plan.collectives),
    'kernels': account.get('kernels', []),
    'seconds': dict(plan.seconds),
    'step_seconds': plan.step,
    'bound': plan.bound,
    'share_of_peak': plan.share_of_peak,
    'examples_a_second': plan.examples,
    'total_steps': account['total_steps'],
    'hours': plan.hours,
    'chip_hours': plan.hours and plan.hours * plan.target.devices,
    'compile_seconds': account['seconds'],
  }
