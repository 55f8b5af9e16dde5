"""What a person sees while a run trains.

A bar on a terminal; elsewhere one plain line a log interval, and nothing that
moves. Looking changes nothing: all of it reads numbers that are there anyway.
"""

import os
import sys
import time

import rich.console
import rich.progress

from train import processes

_REFRESH_SECONDS = 0.2


def say(line: str):
  """One line on standard output, whatever its encoding can hold.

  Of several processes the first alone speaks.
  """
  if not processes.is_main():
    return
  encoding = sys.stdout.encoding or 'ascii'
  text = line.encode(encoding, 'replace').decode(encoding)
  try:
    print(text, flush=True)
  except OSError:  # As of `launch | head`, or > FILE on a full disk: goes on.
    sys.stdout = open(os.devnull, 'w')  # noqa: SIM115 - until the process ends


class Progress:
  """Shows steps, metrics and evaluations until it is closed."""

  def __init__(self, total_steps: int):
    self._total_steps = total_steps
    self._bar = None
    self._moved = self._began = time.perf_counter()
    self._first_step = 0

  def __enter__(self):
    return self

  def __exit__(self, *exception):
    if self._bar is not None:
      self._bar.stop()

  def start(self, step: int):
    """Training goes on from `step`."""
    self._first_step, self._began = step, time.perf_counter()
    if sys.stdout.isatty() and processes.is_main():
      self._bar = rich.progress.Progress(
        rich.progress.TextColumn('step {task.completed}/{task.total}'),
        rich.progress.BarColumn(bar_width=None),
        rich.progress.TextColumn('{task.description}'),
        rich.progress.TextColumn('{task.fields[left]}'),
        console=rich.console.Console(file=sys.stdout, highlight=False),
        expand=True,
      )
      self._task = self._bar.add_task(
        'compiling', total=self._total_steps, completed=step, left=''
      )
      self._bar.start()

  def say(self, line: str):
    """A line of its own, above the bar where there is one."""
    if self._bar is None:
      say(line)
    else:
      self._bar.console.print(line, markup=False, soft_wrap=True)

  def stepped(self, step: int):
    """Moves the bar, a few times a second at most."""
    if step == self._first_step + 1:  # Compiling does not come again.
      self._first_step, self._began = step, time.perf_counter()
    if self._bar is not None:
      now = time.perf_counter()
      if now - self._moved > _REFRESH_SECONDS:
        self._moved = now
        self._bar.update(self._task, completed=step, left=self._left(step))

  def trained(self, step: int, values: dict[str, float], rate: float | None):
    """Shows one step's metrics and the examples a second."""
    shown = _join(values, ('loss', 'accuracy', 'mean_absolute_error'))
    if rate is not None:
      shown += f'  {rate:,.0f} examples/s'
    if self._bar is None:
      say(f'{self._step(step)}  {shown}  {self._left(step)}')
    else:
      self._bar.update(
        self._task, completed=step, description=shown, left=self._left(step)
      )

  def evaluated(self, step: int, values: dict[str, float]):
    """Shows an evaluation."""
    self.say(f'{self._step(step)}  {_join(values, values)}')

  def _step(self, step: int) -> str:
    return f'step {step:>{len(str(self._total_steps))}}/{self._total_steps}'

  def _left(self, step: int) -> str:
    done = step - self._first_step
    if done <= 0:
      return ''
    left = (time.perf_counter() - self._began) / done
    seconds = round(left * (self._total_steps - step))
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    clock = f'{hours}:{minutes:02}' if hours else f'{minutes}'
    return f'{clock}:{seconds:02} left'


def _join(values: dict[str, float], names) -> str:
  """'loss 0.0312  accuracy 0.9889', of these names that there are."""
  return '  '.join(f'{n} {values[n]:.4g}' for n in names if n in values)
