"""A workdir: one experiment's folder, claimed by the config inside it."""

from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import datetime
import json
import os
import pathlib
import shutil
import socket
import time

import filelock

from train import check
from train import config as config_lib
from train import processes

CONFIG = 'config.json'
METRICS = 'metrics.jsonl'
TIMING = 'timing.jsonl'
CHECKPOINTS = 'checkpoints'
RUNNING = 'running.json'  # Who holds the lock; there only while a run lives.

_UNREADABLE = (
  OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError,
)  # fmt: skip

# A network's file systems show a new file to other machines after a while.
_SHARED_SECONDS = 60

# What resuming may change without becoming another experiment. That
# data.on_error may: both pick the same examples, until 'raise' ends the run.
_MAY_DIFFER = (
  'log_every', 'eval_every', 'checkpoint_every', 'keep_best', 'tensorboard',
  'on_save_error', 'data.num_workers', 'data.on_error',
  'mesh.data', 'mesh.fsdp', 'mesh.tensor', 'partition',
)  # fmt: skip


class SaveError(Exception):
  """Something could not be written; it says what, or a line before does."""

  exit_code = 74


@contextlib.contextmanager
def writing(path: pathlib.Path) -> Iterator[None]:
  """Raises SaveError where `path` cannot be written in the block."""
  try:
    yield
  except OSError as error:
    raise SaveError(
      f'{path} could not be written: {error.strerror or error}'
    ) from None


def write(path: pathlib.Path, data: str | bytes):
  """Writes a file whole or not at all, and follows no link.

  Raises:
    SaveError: not at all.
  """
  data = data.encode() if isinstance(data, str) else data
  partial = path.with_name(f'{path.name}.partial')
  with writing(path):
    try:
      partial.unlink(missing_ok=True)
      with partial.open('xb') as file:
        file.write(data)
      os.replace(partial, path)
    except OSError:
      with contextlib.suppress(OSError):
        partial.unlink()
      raise


@contextlib.contextmanager
def claimed(
  workdir: str | os.PathLike,
  config: config_lib.Config,
  say: Callable[[str], None],
) -> Iterator[pathlib.Path]:
  """Makes the workdir, or makes sure that it belongs to this config.

  Other runs are kept out until the block ends, or the process, however it ends.
  Of several processes the first does this, and the others see that it has.

  Args:
    workdir: the folder.
    config: resolved.
    say: takes a line for each allowed difference from the config there.

  Raises:
    UserError: it is no folder, cannot be written, is in use, or holds another
      experiment, or the processes do not share it.
    SaveError: there is no room for config.json.
  """
  path = pathlib.Path(workdir).absolute()
  lock = filelock.FileLock(path / '.lock')
  processes.agree(
    'workdir',
    lambda: processes.is_main() and _acquire(path, lock, config, say),
  )
  try:
    processes.agree('config.json', lambda: _await(path, config))
    yield path
  finally:
    if lock.is_locked:
      with contextlib.suppress(OSError):
        (path / RUNNING).unlink()
    lock.release()


def _acquire(path: pathlib.Path, lock: filelock.FileLock, config, say):
  try:
    check_name(path)
    path.mkdir(parents=True, exist_ok=True)
    lock.acquire(timeout=0)
    _claim(path, config, say)
    _take_over(path, say)
  except filelock.Timeout:
    raise config_lib.UserError(
      f'workdir {path} is in use by {_holder(path) or "another run"}; wait for '
      'it, or give another workdir'
    ) from None
  except OSError as error:
    raise config_lib.UserError(
      f'workdir {path} cannot be used as a folder to write in: '
      f'{error.strerror or error}'
    ) from None


def _take_over(path: pathlib.Path, say):
  """Writes down who holds the lock, and says who did not give it back."""
  before = _holder(path)
  if before:
    say(f'taking {path} over from {before}, which has gone')
  now = datetime.datetime.now().astimezone().isoformat(timespec='seconds')
  holder = {'host': socket.gethostname(), 'process': os.getpid(), 'since': now}
  write(path / RUNNING, json.dumps(holder) + '\n')


def _holder(path: pathlib.Path) -> str | None:
  """Who wrote RUNNING last; None where nobody did, or somebody else did."""
  try:
    found = json.loads((path / RUNNING).read_text('utf-8'))
    host, process, since = found['host'], found['process'], found['since']
    datetime.datetime.fromisoformat(since)
    if not host.isprintable():
      return None
    return f'process {int(process)} on {host:.100}, since {since}'
  except _UNREADABLE:
    return None


def _await(path: pathlib.Path, config: config_lib.Config):
  """Until another process's config.json is seen here, as a process has it."""
  end = time.monotonic() + _SHARED_SECONDS
  while not processes.is_main():
    with contextlib.suppress(OSError):
      if (path / CONFIG).read_text('utf-8') == config_lib.to_json(config):
        return
    if time.monotonic() > end:
      raise config_lib.UserError(
        f'workdir {path} is not shared between the processes, or they have '
        f'different configs: its {CONFIG} is not this one'
      )
    time.sleep(0.2)


def _claim(path: pathlib.Path, config: config_lib.Config, say):
  """Compares with the config that is there; writes this one."""
  file = path / CONFIG
  if file.exists():
    _compare(path, read_config(path), config, say)
  elif (path / METRICS).exists() or any((path / CHECKPOINTS).glob('*')):
    raise config_lib.UserError(
      f'workdir {path} has results but no {CONFIG}; give another workdir'
    )
  write(file, config_lib.to_json(config))


def remove(folder: pathlib.Path, pattern: str, seconds: float = 0):
  """Removes what in `folder` has such a name; follows no link.

  And again for so long: after a failure a library may still be writing there.
  """
  end = time.monotonic() + seconds
  while True:
    for path in folder.glob(pattern):
      with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
          shutil.rmtree(path)
        else:
          path.unlink()
    if time.monotonic() > end:
      return
    time.sleep(0.05)


def set_aside(folder: pathlib.Path) -> str:
  """Renames a checkpoint so that it is none; returns the new name.

  Raises:
    UserError: that is not allowed.
  """
  names = (f'{folder.name}.damaged{end}' for end in ('', *range(2, 10**6)))
  name = next(n for n in names if not os.path.lexists(folder.with_name(n)))
  try:
    os.rename(folder, folder.with_name(name))
  except OSError as error:
    raise config_lib.UserError(
      f'{folder} is damaged and cannot be renamed: {error.strerror}'
    ) from None
  return name


def check_name(path: pathlib.Path):
  """Raises UserError where tensorstore would take a path for another one."""
  name, why = os.fspath(path), None
  shown = ' '.join(name.encode('utf-8', 'replace').decode().splitlines())
  try:
    name.encode('utf-8')
  except UnicodeEncodeError:
    why = 'is no UTF-8 here; give another workdir, or set LC_ALL=C.UTF-8'
  if '\\' in name:
    why = 'has a backslash, which is taken for a slash; give another workdir'
  if why is not None:
    raise config_lib.UserError(f'workdir {shown} has a name that {why}')


def is_begun(workdir: str | os.PathLike) -> bool:
  """Whether there is an experiment in `workdir`."""
  return os.path.exists(os.path.join(workdir, CONFIG))  # No name is an error.


def read_config(workdir: str | os.PathLike) -> config_lib.Config:
  """The resolved config of the experiment in `workdir`.

  Raises:
    UserError: there is none, or its name cannot be one.
  """
  check_name(pathlib.Path(workdir).absolute())
  file = pathlib.Path(workdir) / CONFIG
  try:
    config = check.check(config_lib.from_json(file.read_text('utf-8')))
  except OSError as error:
    raise config_lib.UserError(
      f'workdir {workdir} holds no experiment: {CONFIG}: {error.strerror}'
    ) from None
  except (config_lib.UserError, UnicodeDecodeError) as error:
    raise config_lib.UserError(
      f'workdir {workdir} has a damaged {CONFIG}: {error}'
    ) from None
  for field in ('total_steps', 'best_metric'):
    if getattr(config, field) is None:
      raise config_lib.UserError(
        f'workdir {workdir} has a damaged {CONFIG}: no {field}'
      )
  return config


def _is_driven_by_evaluations(config: config_lib.Config) -> bool:
  return (
    config.early_stopping.patience is not None
    or config.schedule['name'] == 'reduce_on_plateau'
  )


def _compare(path, old: config_lib.Config, new: config_lib.Config, say):
  changed = config_lib.differences(old, new)
  refused = dict(changed)
  for name in _MAY_DIFFER:
    refused.pop(name, None)
  if 'eval_every' in changed and _is_driven_by_evaluations(new):
    refused['eval_every'] = changed['eval_every']
  if new.total_steps > old.total_steps:
    refused.pop('total_steps', None)
  if refused:
    listed = '; '.join(
      f'config.{field} was {a!r} and is {b!r}'
      for field, (a, b) in refused.items()
    )
    raise config_lib.UserError(
      f'workdir {path} belongs to another config: {listed}; give another '
      'workdir, or the same values'
    )
  for field, (a, b) in changed.items():
    say(f'resuming with config.{field} {b!r}, which was {a!r}')
