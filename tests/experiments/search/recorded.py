"""A launcher that runs nothing: its trials do what a table says."""

import json
import pathlib

from experiments.search import devices
from experiments.search import engine as engine_lib
from experiments.search import study as study_lib
from experiments.search import trials as trials_lib

METRIC = 'eval/accuracy'


class Job:
  """Writes an evaluation each time it is looked at, then ends."""

  def __init__(self, launcher, workdir, log, script):
    self._launcher, self._script = launcher, list(script)
    self._file = workdir / 'metrics.jsonl'
    self._log, self.killed = log, False
    workdir.mkdir(parents=True, exist_ok=True)
    done = 0
    if self._file.exists():  # Resumes: what was evaluated stands.
      done = len(self._file.read_text().splitlines())
    self._todo = self._script[done:]

  def poll(self):
    if self._launcher.dies_after is not None:
      if self._launcher.dies_after == 0:
        raise Dead
      self._launcher.dies_after -= 1
    if self._todo and isinstance(self._todo[0], float):
      value = self._todo.pop(0)
      with self._file.open('a') as file:
        step = 1 + len(self._file.read_text().splitlines())
        file.write(json.dumps({'step': step, METRIC: value}) + '\n')
      return None
    if not self._todo:
      return 0
    code, line = self._todo[0]
    self._log.write_text(f'{line}\n')
    return code

  def stop(self):
    self._todo = []

  def kill(self):
    self.killed = True


class Dead(BaseException):
  """The sweep's process is killed here."""


class Launcher:
  """Trials by number: a list of evaluations, then perhaps (code, last line).

  Attributes:
    started: the workdirs' names, in order.
    most: how many ran side by side at most.
    dies_after: looks at jobs, then the whole sweep ends without a word.
  """

  def __init__(self, table, slots=1, dies_after=None):
    self._table, self.dies_after = table, dies_after
    self.slots = [devices.Slot(f'cpu {i}') for i in range(slots)]
    self.started, self.jobs = [], {}

  def start(self, words, log, slot):
    del slot
    flags = dict(word.removeprefix('--').split('=', 1) for word in words)
    workdir = pathlib.Path(flags['workdir'])
    self.started.append(workdir.name)
    script = self._table(workdir.name, flags)
    job = Job(self, workdir, log, script)
    self.jobs[workdir.name] = job
    return job

  def close(self):
    pass


def run(folder, launcher, space, points, **changes):
  """A sweep over a table, to its end; returns the engine and its lines."""
  folder.mkdir(exist_ok=True)
  (folder / trials_lib.TRIALS).mkdir(exist_ok=True)
  search = changes.pop('search', 'grid' if points is not None else 'random')
  study = study_lib.Study(
    folder,
    search,
    space,
    points,
    higher_is_better=True,
    seed=changes.pop('seed', 0),
    pruner=changes.pop('pruner', None),
  )
  plan = trials_lib.Plan(
    **{
      'folder': folder,
      'config': 'digits_mlp',
      'fixed': {},
      'metric': METRIC,
      'seeds': 1,
      'first_seed': 0,
      'folds': None,
      'trials': None if points is None else len(points),
      'retries': 2,
    }
    | changes
  )
  lines = []
  engine = engine_lib.Engine(
    plan, study, launcher, say=lines.append, changed=lambda engine: None
  )
  engine.run()
  return engine, lines
