"""This machine's accelerators, dealt out to trials that run side by side."""

from collections.abc import Mapping
import dataclasses
import importlib.util
import os
import pathlib

from train import config as config_lib

# Chips side by side on a TPU host's board, as libtpu wants them described.
_TPU_BOUNDS = {1: '1,1,1', 2: '1,2,1', 4: '2,2,1', 8: '2,4,1'}
_TPU_PORT = 8476  # Cloud TPU's own first; each process listens at another.
_NAMES = {'gpu': 'GPU', 'tpu': 'TPU chip', 'cpu': 'CPU core'}


@dataclasses.dataclass(frozen=True)
class Slot:
  """Where one trial runs.

  Attributes:
    name: for the table, as 'gpu 0,1'.
    environment: what its process sees of the machine.
    cores: the CPU cores it is bound to; None for all.
  """

  name: str
  environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
  cores: tuple[int, ...] | None = None

  @property
  def prefix(self) -> tuple[str, ...]:
    """What a person types before a command for the same place."""
    words = tuple(f'{k}={v}' for k, v in self.environment.items())
    if self.cores is not None:
      words += ('taskset', '-c', ','.join(map(str, self.cores)))
    return words


def slots(per_trial: int, workers: int | None) -> list[Slot]:
  """The places for trials, each with so many devices of its own.

  Args:
    per_trial: GPUs, TPU chips or, where there is neither, CPU cores.
    workers: how many places; by default as many as there are devices for. On
      CPU cores there may be more, which then share the cores.

  Raises:
    UserError: there are not so many devices.
  """
  kind, ids = find()
  name = _NAMES[kind]
  have = f'this machine has {len(ids)} {name}{"s" * (len(ids) != 1)}'
  if per_trial > len(ids):
    raise config_lib.UserError(f'--devices_per_trial is {per_trial}; {have}')
  if kind == 'tpu' and per_trial not in _TPU_BOUNDS:
    raise config_lib.UserError(
      f'--devices_per_trial is {per_trial}; of TPU chips a process takes '
      f'{", ".join(map(str, _TPU_BOUNDS))}'
    )
  count = len(ids) // per_trial if workers is None else workers
  if kind != 'cpu' and count * per_trial > len(ids):
    raise config_lib.UserError(
      f'--workers is {count}, with {per_trial} a trial; {have}'
    )
  ids = [ids[i % len(ids)] for i in range(count * per_trial)]
  return [
    _slot(kind, ids[i * per_trial : (i + 1) * per_trial], i)
    for i in range(count)
  ]


def find() -> tuple[str, list[str]]:
  """The kind of accelerator that JAX would take here, and the devices' ids."""
  platforms = os.environ.get('JAX_PLATFORMS', '')
  if not platforms.startswith('cpu'):
    if gpus := visible_gpus():
      return 'gpu', gpus
    if chips := _tpu_chips():
      return 'tpu', chips
  if hasattr(os, 'sched_getaffinity'):
    return 'cpu', [str(core) for core in sorted(os.sched_getaffinity(0))]
  return 'cpu', [str(core) for core in range(os.cpu_count() or 1)]


def visible_gpus() -> list[str]:
  """The ids of CUDA_VISIBLE_DEVICES, or of all NVIDIA GPUs."""
  visible = os.environ.get('CUDA_VISIBLE_DEVICES')
  if visible is not None:
    return [word.strip() for word in visible.split(',') if word.strip()]
  return _numbered('/dev', 'nvidia')


def _tpu_chips() -> list[str]:
  visible = os.environ.get('TPU_VISIBLE_CHIPS')
  if visible is not None:
    return [word.strip() for word in visible.split(',') if word.strip()]
  if importlib.util.find_spec('libtpu') is None:
    return []
  # Chips are seen by their driver (v2 to v4) or by VFIO (v5e and later).
  found = _numbered('/dev', 'accel') or _numbered('/dev/vfio', '')
  return [str(i) for i in range(len(found))]


def _numbered(folder: str, prefix: str) -> list[str]:
  """The numbers of the files PREFIX0, PREFIX1, ... there."""
  found = pathlib.Path(folder).glob(f'{prefix}[0-9]*')
  numbers = [file.name.removeprefix(prefix) for file in found]
  return sorted((n for n in numbers if n.isdecimal()), key=int)


def _slot(kind: str, ids: list[str], index: int) -> Slot:
  listed = ','.join(ids)
  if kind == 'gpu':
    return Slot(f'gpu {listed}', {'CUDA_VISIBLE_DEVICES': listed})
  if kind == 'tpu':
    port = str(_TPU_PORT + index)
    return Slot(
      f'tpu {listed}',
      {
        'TPU_VISIBLE_CHIPS': listed,
        'TPU_CHIPS_PER_PROCESS_BOUNDS': _TPU_BOUNDS[len(ids)],
        'TPU_PROCESS_BOUNDS': '1,1,1',
        'TPU_PROCESS_ADDRESSES': f'localhost:{port}',
        'TPU_PROCESS_PORT': port,
        'CLOUD_TPU_TASK_ID': '0',
      },
    )
  return Slot(f'cpu {listed}', cores=tuple(map(int, ids)))
