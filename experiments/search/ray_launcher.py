"""Runs of a sweep on a Ray cluster, through the same door as on one machine.

Ray decides which machine, and gives each run GPUs, TPU chips or CPUs of its
own. The machines share the folder of the sweep and that of the project. A run
whose machine is lost is tried again on another, from its own checkpoint.
"""

from collections.abc import Sequence
import contextlib
import logging
import os
import pathlib
import socket
import warnings

import ray

from experiments.search import devices
from experiments.search import launchers
from train import config as config_lib

_RESOURCES = {'GPU': 'GPU', 'TPU': 'TPU chip', 'CPU': 'CPU'}
_SECONDS = 10
_LOST = 1  # As any other failure: the run is tried again.


def connect(
  address: str | None, per_trial: int, workers: int | None
) -> launchers.Launcher:
  """Joins the cluster at `address`, or starts Ray on this machine.

  Args:
    address: HOST:PORT, auto for the one that this machine belongs to, or None.
    per_trial: GPUs, TPU chips or CPUs of each run.
    workers: runs side by side; None for as many as there are devices for.

  Raises:
    UserError: it cannot be reached, or has not so many devices.
  """
  _reach(address)
  os.environ.setdefault('RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO', '0')
  path = [str(launchers.ROOT), os.environ.get('PYTHONPATH', '')]
  variables = {'PYTHONPATH': os.pathsep.join(filter(None, path))}
  try:
    with warnings.catch_warnings():  # That it forks; it executes at once.
      warnings.simplefilter('ignore', RuntimeWarning)
      ray.init(
        address=address or 'local',
        include_dashboard=False if address is None else None,
        log_to_driver=False,
        logging_level=logging.ERROR,
        runtime_env={'env_vars': variables},
      )
  except (ConnectionError, OSError, RuntimeError, ValueError) as error:
    raise config_lib.UserError(
      f'--ray_address is {address}, where no Ray cluster answers: '
      f'{config_lib.first_line(error)}'
    ) from None
  try:
    kind, slots = _slots(per_trial, workers)
    return _Ray(kind, per_trial, slots)
  except config_lib.UserError:
    ray.shutdown()
    raise


def _reach(address: str | None):
  """Raises UserError where nobody listens; Ray itself would try for long."""
  if address in (None, 'auto'):
    return
  host, colon, port = address.rpartition(':')
  if not colon or not host or not port.isdecimal() or int(port) > 65535:
    raise config_lib.UserError(
      f'--ray_address is {address}; it takes HOST:PORT, or auto'
    )
  try:
    socket.create_connection((host, int(port)), timeout=_SECONDS).close()
  except OSError as error:
    raise config_lib.UserError(
      f'--ray_address is {address}, where no Ray cluster answers: '
      f'{error.strerror or error}'
    ) from None


def _slots(
  per_trial: int, workers: int | None
) -> tuple[str, list[devices.Slot]]:
  """The kind of device that the cluster has, and the places for runs."""
  nodes = [node['Resources'] for node in ray.nodes() if node['Alive']]
  wanted = list(_RESOURCES)
  if os.environ.get('JAX_PLATFORMS', '').startswith('cpu'):
    wanted = ['CPU']
  kind = next(k for k in wanted if any(k in node for node in nodes))
  each = [int(node.get(kind, 0)) // per_trial for node in nodes]
  if not sum(each):
    most = max(int(node.get(kind, 0)) for node in nodes)
    raise config_lib.UserError(
      f'--devices_per_trial is {per_trial}; no machine of this Ray cluster has '
      f'more than {most} {_RESOURCES[kind]}{"s" * (most != 1)}'
    )
  if workers is not None and workers > sum(each):
    raise config_lib.UserError(
      f'--workers is {workers}, with {per_trial} a trial; this Ray cluster has '
      f'room for {sum(each)}'
    )
  # Ray binds no process to its cores; XLA takes so many threads.
  environment = {'PJRT_NPROC': str(per_trial)} if kind == 'CPU' else {}
  count = workers or sum(each)
  return kind, [devices.Slot(f'ray {i}', environment) for i in range(count)]


class _Ray:
  """A cluster; each run is an actor that holds its devices."""

  def __init__(self, kind: str, each: int, slots: Sequence[devices.Slot]):
    self._kind, self._each, self.slots = kind, each, slots

  def start(
    self, words: Sequence[str], log: pathlib.Path, slot: devices.Slot
  ) -> launchers.Job:
    """As Launcher.start."""
    options = {
      'GPU': {'num_gpus': self._each, 'num_cpus': 0},
      'TPU': {'resources': {'TPU': self._each}, 'num_cpus': 0},
      'CPU': {'num_cpus': self._each},
    }
    actor = ray.remote(_Actor).options(**options[self._kind])
    return _Job(actor.remote(list(words), str(log), os.getcwd(), slot), log)

  def close(self):
    """As Launcher.close."""
    ray.shutdown()


class _Actor:
  """Runs on the machine that Ray chose; the run dies with it."""

  def __init__(self, words, log, folder, slot):
    os.chdir(folder)
    self._process = launchers.Process(words, pathlib.Path(log), slot)

  def poll(self):
    return self._process.poll()

  def stop(self):
    self._process.stop()

  def kill(self):
    self._process.kill()


class _Job:
  """An actor's run, seen from here."""

  def __init__(self, actor, log: pathlib.Path):
    self._actor, self._log = actor, log
    self._answer = actor.poll.remote()  # Comes once Ray has started it.

  def poll(self) -> int | None:
    """As Job.poll; a machine that was lost is a failure."""
    if not ray.wait([self._answer], timeout=0)[0]:
      return None
    try:
      code = ray.get(self._answer)
    except ray.exceptions.RayError as error:
      with self._log.open('a') as file:
        line = config_lib.first_line(error)
        file.write(f'ray: the run was lost: {line}\n')
      return _LOST
    if code is None:
      self._answer = self._actor.poll.remote()
    else:
      ray.kill(self._actor)
    return code

  def stop(self):
    """As Job.stop."""
    self._actor.stop.remote()

  def kill(self):
    """As Job.kill."""
    gone = (ray.exceptions.RayError, TimeoutError)  # Or it never began.
    with contextlib.suppress(*gone):
      ray.get(self._actor.kill.remote(), timeout=10)
    ray.kill(self._actor)
