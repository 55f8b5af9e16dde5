"""A workdir: one experiment's folder, claimed by the config inside it."""

from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import os
import pathlib
import shutil
import time

import filelock

from train import check
from train import config as config_lib
from train import processes

CONFIG = 'config.json'
METRICS = 'metrics.jsonl'
TIMING = 'timing.jsonl'
CHECKPOINTS = 'checkpoints'

# A network's file systems show a new file to other machines after a while.
_SHARED_SECONDS = 60

# What resuming may change without becoming another experiment. That
# data.on_error may: both pick the same examples, until 'raise' ends the run.
_MAY_DIFFER = (
  'log_every', 'eval_every', 'checkpoint_every', 'keep_best', 'tensorboard',
  'on_save_error', 'data.num_workers', 'data.on_error',
  'mesh.data', 'mesh.fsdp', 'mesh.tensor', 'partition',
)  # fmt: skip


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
    lock.release()


def _acquire(path: pathlib.Path, lock: filelock.FileLock, config, say):
  try:
    os.fspath(path).encode('utf-8')
    path.mkdir(parents=True, exist_ok=True)
    lock.acquire(timeout=0)
    _claim(path, config, say)
  except filelock.Timeout:
    raise config_lib.UserError(
      f'workdir {path} is in use by another run; wait for it, or give another '
      'workdir'
    ) from None
  except UnicodeEncodeError:
    shown = os.fspath(path).encode('utf-8', 'replace').decode()
    raise config_lib.UserError(
      f'workdir {shown} has a name that is no UTF-8 here; give another '
      'workdir, or set LC_ALL=C.UTF-8'
    ) from None
  except OSError as error:
    raise config_lib.UserError(
      f'workdir {path} cannot be used as a folder to write in: '
      f'{error.strerror or error}'
    ) from None


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
  partial = path / f'{CONFIG}.partial'
  partial.write_text(config_lib.to_json(config))
  os.replace(partial, file)


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


def is_begun(workdir: str | os.PathLike) -> bool:
  """Whether there is an experiment in `workdir`."""
  return os.path.exists(os.path.join(workdir, CONFIG))  # No name is an error.


def read_config(workdir: str | os.PathLike) -> config_lib.Config:
  """The resolved config of the experiment in `workdir`.

  Raises:
    UserError: there is none.
  """
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
