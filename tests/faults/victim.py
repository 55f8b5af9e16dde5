"""A run that sends itself a signal at a named point of its life.

python -m tests.faults.victim POINT SIGNAL and the words of launch. What Python
does with files is seen by an audit hook, which comes right before each act; the
rest by functions of ours that are wrapped.
"""

from collections.abc import Callable
import os
import pathlib
import re
import sys
import threading
import time

from experiments import command
from experiments import launch

SLOW_SECONDS = 1  # How long a batch takes, or a save, where they are to last.


def at_file(event: str, pattern: str, *, nth: int = 1, after: bool = False):
  """Right before, or after, the nth act of that kind on such a path.

  Of a rename both paths are looked at, as 'FROM -> TO'.
  """

  def arm(fire: Callable):
    count, is_next = 0, False

    def hook(name: str, args: tuple):
      nonlocal count, is_next
      if is_next and name in ('open', 'os.rename', 'os.mkdir', 'os.listdir'):
        is_next = False
        fire()
      if name != event:
        return
      ends = 2 if name == 'os.rename' else 1
      if name == 'open' and args[1] in ('r', 'rb'):
        return
      text = ' -> '.join(map(_text, args[:ends]))
      if re.search(pattern, text):
        count += 1
        if count == nth and after:
          is_next = True
        elif count == nth:
          fire()

    sys.addaudithook(hook)

  return arm


def _text(path) -> str:
  return os.fsdecode(path) if isinstance(path, str | bytes) else str(path)


def at_import(module: str):
  """While that library is imported."""

  def arm(fire: Callable):
    def hook(name: str, args: tuple):
      if name == 'import' and args[0] == module:
        fire()

    sys.addaudithook(hook)

  return arm


def at_call(module: str, name: str, *, nth: int = 1, seconds: float = 0):
  """At the nth call of a function of ours; `seconds`: and it takes so long."""

  def arm(fire: Callable):
    command.quiet()  # Before jax is imported.
    owner = __import__(module, fromlist=['_'])
    *classes, last = name.split('.')
    for part in classes:
      owner = getattr(owner, part)
    real, count = getattr(owner, last), 0

    def call(*args, **kwargs):
      nonlocal count
      count += 1
      if count == nth:
        fire()
      time.sleep(seconds if count >= nth else 0)
      return real(*args, **kwargs)

    setattr(owner, last, call)

  return arm


def while_compiling(fire: Callable):
  """Soon after the compiler has been given the training step."""
  command.quiet()
  import jax

  def heard(event: str, duration: float, **details):
    del duration
    if event.endswith('jaxpr_to_mlir_module_duration') and (
      'train_step' in str(details.get('fun_name', ''))
    ):
      threading.Timer(0.05, fire).start()

  jax.monitoring.register_event_duration_secs_listener(heard)


def half_a_line(fire: Callable):
  """A line of metrics.jsonl is on the disk but for its last bytes."""
  command.quiet()
  real, count = os.fsync, 0

  def fsync(file):
    nonlocal count
    path = pathlib.Path(f'/proc/self/fd/{file}')
    if path.exists() and path.readlink().name == 'metrics.jsonl':
      count += 1
      if count == 6:
        os.truncate(path, path.stat().st_size - 7)
        fire()
    real(file)

  os.fsync = fsync


def between_shards(fire: Callable):
  """Process 0 has written its part of a checkpoint, and this one has not."""
  command.quiet()
  from train import commit

  real = commit._Handler._save

  async def save(self, directory, args):
    end = time.monotonic() + 60
    while not (pathlib.Path(directory) / '0.json').exists():
      assert time.monotonic() < end
      time.sleep(0.001)
    fire()
    await real(self, directory, args)

  commit._Handler._save = save


def waiting_for_data(fire: Callable):
  """The next batch has been asked for, and comes slowly."""
  command.quiet()
  from train.data import pipeline

  pipeline.RESIDENT_BYTES = 0  # Or all batches are there at once.
  at_call('train.data.sources', 'Split.take', nth=50, seconds=SLOW_SECONDS)(
    lambda: threading.Timer(SLOW_SECONDS / 2, fire).start()
  )


def _checkpoint(step: int) -> str:
  return rf'checkpoints/{step}$'


POINTS = {
  # The experiment's own files.
  'before the rename to config.json': at_file('os.rename', r'/config\.json$'),
  'after the rename to config.json': at_file(
    'os.rename', r'/config\.json$', after=True
  ),
  'within a line of metrics.jsonl': half_a_line,
  'before metrics.jsonl is cut back': at_file(
    'os.rename', r'/metrics\.jsonl$'
  ),
  'after metrics.jsonl was cut back': at_file(
    'os.rename', r'/metrics\.jsonl$', after=True
  ),
  # A checkpoint.
  "before Orbax's rename": at_file(
    'os.rename', r'-> .*tmp-whole$', nth=2
  ),
  'before manifest.json is written': at_file(
    'open', r'/manifest\.json$', nth=2
  ),
  'before the rename to a checkpoint': at_file(
    'os.rename', f'-> .*{_checkpoint(40)}'
  ),
  'after the rename to a checkpoint': at_file(
    'os.rename', f'-> .*{_checkpoint(40)}', after=True
  ),
  # Collection of old ones.
  'before an old checkpoint is renamed': at_file(
    'os.rename', r'checkpoints/\d+ -> '
  ),
  'within the removal of an old checkpoint': at_file(
    'os.remove', r'^_METADATA$'
  ),
  # Computing.
  'while importing': at_import('optax'),
  'while initialising': at_call('train.transfer', 'initial_state'),
  'while compiling': while_compiling,
  'after the first step': at_call('train.writer', 'Writer.stepped'),
  'after a step': at_call('train.writer', 'Writer.stepped', nth=50),
  'while evaluating': at_call('train.mesh', 'steps_in_flight', nth=3),
  'while saving': at_call(
    'train.commit', '_complete', nth=2, seconds=SLOW_SECONDS
  ),
  'while waiting for data': waiting_for_data,
  'before the test': at_call('train.evaluate', 'evaluate', nth=4),
  'before an evaluation is written': at_call(
    'train.writer', 'Writer.evaluated'
  ),
  'between the parts of two processes': between_shards,
}  # fmt: skip


def main():
  """Arms the point, and launches."""
  point, signum, *words = sys.argv[1:]
  done = False

  def fire():
    nonlocal done
    if not done:
      done = True
      os.kill(os.getpid(), int(signum))

  POINTS[point](fire)
  sys.argv = ['launch', *words]
  command.start('launch', launch.main)


if __name__ == '__main__':
  main()
