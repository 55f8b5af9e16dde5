"""What a run writes while it trains: metrics.jsonl and timing.jsonl.

metrics.jsonl is the truth: nothing in it depends on the clock or on restarts.
timing.jsonl holds what does.
"""

from collections.abc import Generator
import contextlib
import hashlib
import json
import math
import os
import pathlib
import shutil
import time
from typing import Any

import jax

from train import config as config_lib
from train import control
from train import mesh as mesh_lib
from train import processes
from train import program as program_lib
from train import progress as progress_lib
from train import state as state_lib
from train import workdir as workdir_lib


class Writer:
  """One line a log interval in both files, and each evaluation in the first.

  Of several processes the first writes; all have the lines, and decide alike.

  Attributes:
    lines: the lines of metrics.jsonl.
    scores: step -> the value of config.best_metric, from these lines.
  """

  def __init__(
    self,
    workdir: pathlib.Path,
    program: program_lib.Program,
    progress: progress_lib.Progress,
  ):
    """Reads the lines that are there; `resume` is to be called before more."""
    self._metrics = workdir / workdir_lib.METRICS
    self._timing = workdir / workdir_lib.TIMING
    self._config = program.config
    self._progress = progress
    self._most_in_flight = mesh_lib.steps_in_flight(program.mesh)
    self._in_flight: list[jax.Array] = []
    self._events = None
    self.lines = read(self._metrics)
    self.scores = _scores(self.lines, program.config)
    text = json.dumps(self.lines)  # Before the first process cuts them.
    processes.check_same(
      str(self._metrics), hashlib.sha256(text.encode()).hexdigest()
    )

  def __enter__(self):
    return self

  def __exit__(self, *exception):
    if self._events is not None:
      self._events.close()  # What it has been given is written only now.

  # ---------------------------------------------------------------- metrics

  def resume(self, step: int):
    """Cuts both files back to `step`; a test of an unfinished run goes too."""
    self.lines = [
      line
      for line in self.lines
      if line['step'] <= step and not self._is_outdated(line, step)
    ]
    _rewrite(self._metrics, self.lines)
    standing = {line['step'] for line in self.lines if _is(line, 'eval')}
    for gone in self.scores.keys() - standing:
      del self.scores[gone]
    timing = [line for line in read(self._timing) if line['step'] <= step]
    _rewrite(self._timing, timing)
    self._first_step = step
    if self._config.tensorboard and processes.is_main():
      self._open_events()
    self.start_clock(step)

  def _is_outdated(self, line: dict[str, Any], step: int) -> bool:
    """Whether a run never ended before would not have this line.

    A test; and what was logged or evaluated because an earlier total_steps
    ended here, between the cadences.
    """
    if _is(line, 'test'):
      return True
    every = self._config.eval_every
    if _is(line, 'train'):
      every = self._config.log_every
    return line['step'] == step < self._config.total_steps and step % every != 0

  def finished(self) -> dict[str, float] | None:
    """The 'test' values of a run that has ended, or None."""
    newest = max((line['step'] for line in self.lines), default=0)
    if newest < self._config.total_steps and not control.should_stop(
      self._config, self.scores
    ):
      return None
    tests = [line for line in self.lines if _is(line, 'test')]
    return self.find('test', tests[-1]['step']) if tests else None

  def find(self, kind: str, step: int) -> dict[str, float] | None:
    """The 'train', 'eval' or 'test' values of a step, or None."""
    for line in self.lines:
      if line['step'] == step and _is(line, kind):
        return {k: v for k, v in line.items() if k != 'step'}
    return None

  def train(self, step: int, metrics: dict[str, jax.Array]):
    """Writes and shows what a training step measured; waits for it."""
    values = {k: float(v) for k, v in jax.device_get(metrics).items()}
    values = {'loss': values.pop('loss'), **dict(sorted(values.items()))}
    self._write(step, {f'train/{k}': v for k, v in values.items()})
    self._progress.trained(step, values, self._time(step))

  def evaluated(self, step: int, values: dict[str, float]):
    """Writes and shows an evaluation, its names as 'eval/loss'.

    Raises:
      NonFiniteError: one of the values; nothing is written then.
    """
    if not all(map(math.isfinite, values.values())):
      raise state_lib.NonFiniteError(step, self._config)
    self._write(step, values)
    self._progress.evaluated(step, values)
    self.start_clock(step)  # Evaluating does not count as training.

  def _write(self, step: int, values: dict[str, float]):
    line = {'step': step, **values}
    if processes.is_main():
      # It is on the disk before any checkpoint of this step.
      _append(self._metrics, line, durably=True)
    self.lines.append(line)
    self._add_events(line)
    if self._config.best_metric in values:
      self.scores[step] = values[self._config.best_metric]

  # ------------------------------------------------------------ TensorBoard

  def _open_events(self):
    """Begins the events anew from the lines that stand."""
    import tensorboardX  # An extra.

    folder = self._metrics.parent / 'tensorboard'
    shutil.rmtree(folder, ignore_errors=True)  # Follows no link.
    self._events = tensorboardX.SummaryWriter(folder)
    for line in self.lines:
      self._add_events(line)

  def _add_events(self, line: dict[str, Any]):
    if self._events is not None:
      for name, value in line.items():
        if name != 'step':
          self._events.add_scalar(name, value, line['step'])

  # ----------------------------------------------------------------- timing

  def watch(self, batches: Generator) -> Generator:
    """The same batches; the time spent waiting for them is counted."""
    with contextlib.closing(batches):
      while True:
        start = time.perf_counter()
        batch = next(batches)
        self._waited += time.perf_counter() - start
        yield batch

  def stepped(self, step: int, metrics: dict[str, jax.Array]):
    """After each step: paces the devices and moves the bar."""
    if step == self._first_step + 1:  # It compiled, which is no training.
      metrics['loss'].block_until_ready()
      self.start_clock(step)
    self._pace(metrics['loss'])
    self._progress.stepped(step)

  def _pace(self, loss: jax.Array):
    """Keeps the devices at most so many steps behind.

    Waits once for half of them and not for each: on a CPU, being woken costs
    the step that runs meanwhile its core.
    """
    self._in_flight.append(loss)
    if len(self._in_flight) >= self._most_in_flight:
      half = (len(self._in_flight) + 1) // 2
      self._in_flight[half - 1].block_until_ready()
      del self._in_flight[:half]

  def start_clock(self, step: int):
    """Rates count from here: after compiling, evaluating, logging."""
    self._start_step, self._start = step, time.perf_counter()
    self._waited = 0.0

  def _time(self, step: int) -> float | None:
    """Writes a line of timing.jsonl; examples a second since the clock began.

    None where no step was timed: the first, which compiles, is not.
    """
    steps, seconds = step - self._start_step, time.perf_counter() - self._start
    if not steps:
      return None
    rate = steps * self._config.data.batch_size / seconds
    line = {
      'step': step,
      'steps': steps,
      'seconds': seconds,
      'steps_per_second': steps / seconds,
      'examples_per_second': rate,
      'waiting_share': self._waited / seconds,
    }
    if processes.is_main():
      _append(self._timing, line)
    self.start_clock(step)
    return rate


def read(path: pathlib.Path) -> list[dict[str, Any]]:
  """The lines of a .jsonl file, without a last one that a kill cut short.

  Raises:
    UserError: a line before the last is damaged.
  """
  lines = []
  texts = path.read_bytes().split(b'\n') if path.exists() else []
  for i, text in enumerate(texts[:-1]):  # After the last newline: cut short.
    try:
      line = json.loads(text)
      line['step'] += 0
    except (ValueError, KeyError, TypeError):
      if i == len(texts) - 2:
        break
      raise config_lib.UserError(
        f'{path} is damaged in line {i + 1}; mend or remove that line'
      ) from None
    lines.append(line)
  return lines


def scores(
  workdir: pathlib.Path, config: config_lib.Config
) -> dict[int, float]:
  """Step -> the value of config.best_metric, from metrics.jsonl."""
  return _scores(read(workdir / workdir_lib.METRICS), config)


def _scores(lines, config: config_lib.Config) -> dict[int, float]:
  return {
    line['step']: line[config.best_metric]
    for line in lines
    if config.best_metric in line
  }


def _is(line: dict[str, Any], kind: str) -> bool:
  return any(key.startswith(f'{kind}/') for key in line)


def _rewrite(path: pathlib.Path, lines: list[dict[str, Any]]):
  if not processes.is_main():
    return
  text = ''.join(json.dumps(line) + '\n' for line in lines)
  workdir_lib.write(path, text)


def _append(path: pathlib.Path, line: dict[str, Any], *, durably=False):
  with workdir_lib.writing(path):
    # Never created here: where the file is gone, so is the disk it was on.
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
    with open(descriptor, 'w', encoding='utf-8') as file:
      file.write(json.dumps(line) + '\n')
      file.flush()
      if durably:
        os.fsync(descriptor)
