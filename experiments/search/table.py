"""What a person sees of a sweep: sweep.json, a live table, lines."""

import json
import pathlib
import sys
import time
from typing import Any

import rich.box
import rich.console
import rich.live
import rich.table
import rich.text

from experiments.search import engine as engine_lib
from experiments.search import results as results_lib
from experiments.search import space as space_lib
from experiments.search import trials as trials_lib
from train import config as config_lib
from train import progress
from train import workdir as workdir_lib

_WRITE_SECONDS = 2  # Between two of sweep.json while runs move on.
_REFRESH_SECONDS = 0.5
_ENDED_ROWS = 12  # Of trials that have ended, the newest.


def results(engine: engine_lib.Engine, sweep: dict[str, Any]) -> dict[str, Any]:
  """What sweep.json holds: what is searched, and each trial with its runs."""
  best = engine.best
  return sweep | {
    'best': None if best is None else best.number,
    'trials': [_trial(engine, trial) for trial in engine.trials],
  }


def _trial(
  engine: engine_lib.Engine, trial: trials_lib.Trial
) -> dict[str, Any]:
  return {
    'trial': trial.number,
    'params': {
      path: space_lib.parse(text) for path, text in trial.point.items()
    },
    'state': trial.state,
    'value': trial.value,
    'deviation': trial.deviation,
    'place': trial.place,
    'runs': [
      {
        'workdir': f'{trials_lib.TRIALS}/{run.workdir.name}',
        'seed': run.seed,
        'fold': run.fold,
        'state': run.state,
        'value': run.value,
        'step': run.step,
        'why': run.why,
        'attempts': run.attempts,
        'command': run.command,
        'log': f'{trials_lib.TRIALS}/{run.log.name}',
      }
      for run in trial.runs
    ],
  }


class Show:
  """Lines, sweep.json, and on a terminal a table; used in a with-statement."""

  def __init__(self, folder: pathlib.Path, sweep: dict[str, Any]):
    self._file, self._sweep = folder / results_lib.NAME, sweep
    self._written, self._at = '', 0.0
    self._drawn = 0.0
    self._steps: dict[pathlib.Path, int] = {}
    self._live = None

  def __enter__(self):
    if sys.stdout.isatty():
      self._live = rich.live.Live(
        console=rich.console.Console(file=sys.stdout, highlight=False),
        auto_refresh=False,
        transient=True,
      )
      self._live.start()
    return self

  def __exit__(self, *exception):
    if self._live is not None:
      self._live.stop()

  def say(self, line: str):
    """One line for each thing that happens, above the table."""
    if self._live is None:
      progress.say(line)
    else:
      self._live.console.print(rich.text.Text(line))

  def changed(self, engine: engine_lib.Engine, *, last: bool = False):
    """Writes and draws, unless that was just done."""
    now = time.monotonic()
    if last or now - self._at > _WRITE_SECONDS:
      text = json.dumps(results(engine, self._sweep), indent=1) + '\n'
      if text != self._written:
        workdir_lib.write(self._file, text)
        self._written = text
      self._at = now
    if self._live is not None and (
      last or now - self._drawn > _REFRESH_SECONDS
    ):
      self._live.update(self._table(engine), refresh=True)
      self._drawn = now

  def end(self, engine: engine_lib.Engine):
    """The whole table, to stay."""
    self.changed(engine, last=True)
    if self._live is not None:
      self._live.stop()
      self._live = None
    width = None if sys.stdout.isatty() else 120
    console = rich.console.Console(file=sys.stdout, width=width)
    with console.capture() as captured:
      console.print(self._table(engine, all_rows=True))
    progress.say(captured.get().rstrip('\n'))

  def _table(self, engine: engine_lib.Engine, *, all_rows: bool = False):
    varied = _varied(engine.trials)
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, caption=_caption(engine))
    metric = engine.plan.metric
    table.add_column('trial', justify='right')
    for name in _names(varied):
      table.add_column(name)
    for column in (f'last {metric}', 'best'):
      table.add_column(column, justify='right')
    table.add_column('state')
    table.add_column('left', justify='right')
    table.add_column('device')
    ended = [t for t in engine.trials if t.state != trials_lib.RUNNING]
    going = [t for t in engine.trials if t.state == trials_lib.RUNNING]
    shown = engine.trials if all_rows else ended[-_ENDED_ROWS:] + going
    for trial in shown:
      style = 'bold' if trial is engine.best else None
      table.add_row(*self._row(engine, trial, varied), style=style)
    return table

  def _row(self, engine, trial, varied) -> list[rich.text.Text]:
    sign = engine.plan.sign
    run = next((r for r in trial.runs if r.state == trials_lib.RUNNING), None)
    run = run or trial.runs[-1]
    scores = run.scores
    best = trial.value
    if best is None and scores:
      best = sign * max(sign * value for value in scores.values())
    best = '' if best is None else f'{best:.4g}'
    if trial.deviation is not None:
      best += f' +- {trial.deviation:.2g}'
    state = trial.state
    if len(trial.runs) > 1 and state == trials_lib.RUNNING:
      done = sum(r.state == trials_lib.FINISHED for r in trial.runs)
      state = f'{done} of {len(trial.runs)} runs'
    cells = [
      str(trial.number),
      *(_value(trial.point.get(path, '')) for path in varied),
      f'{scores[max(scores)]:.4g}' if scores else '',
      best,
      state,
      *self._left(trial, run),
    ]
    return [rich.text.Text(cell) for cell in cells]

  def _left(self, trial, run) -> tuple[str, str]:
    """Seconds that a running trial has left, and where it runs."""
    if trial.state != trials_lib.RUNNING or run.state != trials_lib.RUNNING:
      return '', ''
    steps = self._total_steps(run.workdir)
    done = run.newest
    if not steps or not done or run.began is None:
      return '', run.slot
    took = time.monotonic() - run.began
    return _duration(took * (steps - done) / done), run.slot

  def _total_steps(self, workdir: pathlib.Path) -> int:
    if workdir not in self._steps and workdir_lib.is_begun(workdir):
      try:
        self._steps[workdir] = workdir_lib.read_config(workdir).total_steps
      except config_lib.UserError:
        return 0
    return self._steps.get(workdir, 0)


def _varied(trials) -> list[str]:
  """The paths of which trials have more than one value."""
  found: dict[str, set] = {}
  for trial in trials:
    for path in trial.point:
      found.setdefault(path, set())
  for path, values in found.items():
    values.update(trial.point.get(path) for trial in trials)
  return [p for p, values in found.items() if len(values) > 1] or list(found)


def _names(paths: list[str]) -> list[str]:
  """Their last words, where these differ."""
  short = [path.rpartition('.')[2] for path in paths]
  return short if len(set(short)) == len(short) else paths


def _value(text: str) -> str:
  """Four digits of a number are enough to know it by."""
  value = space_lib.parse(text) if text else text
  return f'{value:.4g}' if isinstance(value, float) else text


def _caption(engine: engine_lib.Engine) -> str:
  ended = sum(t.state != trials_lib.RUNNING for t in engine.trials)
  wanted = engine.plan.trials
  words = [f'{ended} of {wanted} trials' if wanted else f'{ended} trials']
  if engine.failed:
    words.append(f'{len(engine.failed)} failed')
  if (left := engine.seconds_left()) and ended != wanted:
    words.append(f'about {_duration(left)} left')
  return ', '.join(words)


def _duration(seconds: float) -> str:
  minutes, rest = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours}:{minutes:02}:{rest:02}' if hours else f'{minutes}:{rest:02}'
