"""Sweeps over recorded tables: what is judged, tried again, told, gone on."""

import errno
import os
import statistics

import optuna
import pytest

from experiments.search import engine as engine_lib
from experiments.search import space as space_lib
from experiments.search import study as study_lib
from tests.experiments.search import recorded
from train import config as config_lib
from train import workdir as workdir_lib

SPACE = space_lib.read(
  {
    'schedule.value': ('log', 1e-4, 1e-1),
    'data.batch_size': ('int', 32, 256),
    'model.dropout': ('uniform', 0.0, 0.5),
    'optimizer.name': ('choice', 'adam', 'sgd'),
  },
  'a',
)
NINE = space_lib.read(
  {'seed': ('int', 0, 2), 'model.width': ('choice', 8, 16, 32)}, 'a'
)
POINTS = space_lib.grid(NINE, 'a')


@pytest.fixture(autouse=True)
def quick(monkeypatch):
  """Nothing is waited for."""
  monkeypatch.setattr(engine_lib, '_POLL_SECONDS', 0)


def nine(name, flags):
  """Six evaluations of each of nine points; the best is the fourth one."""
  del flags
  number = int(name)
  return [0.1 * i + 0.01 * number for i in (1, 2, 3, 5, 4, 3)]


def table(engine):
  return [
    (t.number, t.point, t.state, t.value, [(r.value, r.step) for r in t.runs])
    for t in engine.trials
  ]


def worth(params):
  """A made score: the best near a rate of 0.01, with little dropout."""
  rate, dropout = params['schedule.value'], params['model.dropout']
  bonus = 0.05 if params['optimizer.name'] == 'adam' else 0.0
  return 1 / (1 + abs(rate - 0.01) * 20) - dropout / 2 + bonus


def of_flags(flags):
  return {
    path: flags[f'config.{path}']
    if path == 'optimizer.name'
    else float(flags[f'config.{path}'])
    for path in SPACE.paths
  }


def test_the_value_is_the_best_evaluation_and_the_earlier_of_equal_trials(
  tmp_path,
):
  def script(name, flags):
    del flags
    return [0.1, 0.9, 0.2] if name in ('003', '005') else [0.5, 0.6]

  engine, _ = recorded.run(tmp_path, recorded.Launcher(script), NINE, POINTS)
  assert engine.trials[3].value == 0.9
  assert engine.trials[3].runs[0].step == 2
  assert engine.best.number == 3


@pytest.mark.parametrize('slots', [1, 2, 4, 20])
def test_no_slot_is_idle_while_trials_wait(tmp_path, slots):
  launcher = recorded.Launcher(nine, slots)
  busy = []

  class Watched(engine_lib.Engine):
    def _fill(self):
      started = super()._fill()
      busy.append((len(self._active), 9 - len(launcher.started)))
      return started

  original, engine_lib.Engine = engine_lib.Engine, Watched
  try:
    engine, _ = recorded.run(tmp_path, launcher, NINE, POINTS)
  finally:
    engine_lib.Engine = original
  assert sorted(launcher.started) == [f'{i:03}' for i in range(9)]
  assert all(running == slots or not waiting for running, waiting in busy)
  assert [t.state for t in engine.trials] == ['finished'] * 9


@pytest.mark.parametrize('search', ['random', 'tpe'])
def test_suggestions_are_optunas_own(tmp_path, search):
  """Trial after trial, against Optuna alone with the same results."""
  optuna.logging.set_verbosity(optuna.logging.ERROR)
  engine, _ = recorded.run(
    tmp_path,
    recorded.Launcher(lambda _, flags: [worth(of_flags(flags))]),
    SPACE,
    None,
    search=search,
    trials=16,
    seed=7,
  )
  own = optuna.create_study(direction='maximize')
  distributions = {
    'schedule.value': optuna.distributions.FloatDistribution(
      1e-4, 1e-1, log=True
    ),
    'data.batch_size': optuna.distributions.IntDistribution(32, 256),
    'model.dropout': optuna.distributions.FloatDistribution(0.0, 0.5),
    'optimizer.name': optuna.distributions.CategoricalDistribution(
      ['adam', 'sgd']
    ),
  }
  suggested = []
  for number in range(16):
    seed = 7 * 1_000_003 + number
    own.sampler = (
      optuna.samplers.RandomSampler(seed=seed)
      if search == 'random'
      else optuna.samplers.TPESampler(seed=seed, constant_liar=True)
    )
    trial = own.ask(distributions)
    suggested.append(trial.params)
    own.tell(trial, worth(trial.params))
  assert [
    {p: space_lib.parse(v) for p, v in t.point.items()} for t in engine.trials
  ] == suggested
  assert len({str(params) for params in suggested}) == 16
  assert engine.best.value == own.best_value


def test_prunings_are_optunas_own(tmp_path):
  """Successive halving on a recorded table, against Optuna's own loop."""
  optuna.logging.set_verbosity(optuna.logging.ERROR)
  curves = [
    [round(0.9 - 0.8 / (1 + (7 * n % 11) * k / 10), 6) for k in range(1, 17)]
    for n in range(9)
  ]
  engine, _ = recorded.run(
    tmp_path,
    recorded.Launcher(lambda name, _: curves[int(name)]),
    NINE,
    POINTS,
    pruner=('asha', 2, 2),
  )
  own = optuna.create_study(
    direction='maximize',
    pruner=optuna.pruners.SuccessiveHalvingPruner(
      min_resource=2, reduction_factor=2
    ),
  )

  def objective(trial):
    for step, value in enumerate(curves[trial.number], 1):
      trial.report(value, step)
      if trial.should_prune():
        raise optuna.TrialPruned
    return max(curves[trial.number])

  own.optimize(objective, n_trials=9)
  states = {
    optuna.trial.TrialState.COMPLETE: 'finished',
    optuna.trial.TrialState.PRUNED: 'pruned',
  }
  assert [(t.state, len(t.runs[0].scores)) for t in engine.trials] == [
    (states[t.state], len(t.intermediate_values)) for t in own.trials
  ]
  assert {t.state for t in engine.trials} == {'finished', 'pruned'}


def test_a_pruned_trials_job_is_ended_and_its_slot_used_again(tmp_path):
  def script(name, flags):
    del flags
    return [0.9 if name == '000' else 0.1] * 50

  launcher = recorded.Launcher(script)
  recorded.run(tmp_path, launcher, NINE, POINTS, pruner=('asha', 2, 1))
  assert launcher.started == [f'{i:03}' for i in range(9)]
  assert [job.killed for job in launcher.jobs.values()] == [False] + [True] * 8


def test_one_in_four_crashes_and_the_others_do_not_know(tmp_path):
  crash = (1, 'ValueError: the fourth always fails')

  def script(name, flags):
    return [0.3, crash] if int(name) % 4 == 3 else nine(name, flags)

  launcher = recorded.Launcher(script, slots=2)
  engine, lines = recorded.run(tmp_path / 'a', launcher, NINE, POINTS)
  whole, _ = recorded.run(
    tmp_path / 'b', recorded.Launcher(nine, slots=2), NINE, POINTS
  )
  assert [t.number for t in engine.failed] == [3, 7]
  for ours, theirs in zip(table(engine), table(whole), strict=True):
    assert ours[0] in (3, 7) or ours == theirs
  for number in (3, 7):
    name = f'{number:03}'
    assert launcher.started.count(name) == 3  # Two retries.
    said = [line for line in lines if line.startswith(f'trial {number} failed')]
    assert any(f'exit code 1: {crash[1]}' in line for line in said)
    assert any(str(tmp_path / 'a' / 'trials' / f'{name}.log') in line
               for line in said)  # fmt: skip


def test_a_crash_that_passes_is_forgotten(tmp_path):
  tries = []

  def script(name, flags):
    if name == '002' and tries.count(name) < 2:
      tries.append(name)
      return [0.1, (-9, 'killed')]
    return nine(name, flags)

  engine, lines = recorded.run(
    tmp_path, recorded.Launcher(script), NINE, POINTS
  )
  assert [t.state for t in engine.trials] == ['finished'] * 9
  assert sum('signal 9' in line for line in lines) == 2


def test_failed_trials_do_not_use_up_the_budget(tmp_path):
  def script(name, flags):
    del flags
    return [(1, 'crash')] if int(name) % 2 else [0.5]

  engine, _ = recorded.run(
    tmp_path, recorded.Launcher(script), SPACE, None, trials=5, retries=0
  )
  assert [t.state for t in engine.trials].count('finished') == 5
  assert len(engine.failed) == 4


def test_where_everything_fails_it_ends(tmp_path):
  engine, _ = recorded.run(
    tmp_path,
    recorded.Launcher(lambda *_: [(1, 'crash')]),
    SPACE,
    None,
    trials=3,
    retries=0,
  )
  assert [t.state for t in engine.trials] == ['failed'] * 4
  assert engine.best is None


def test_wrong_input_and_divergence_are_not_tried_again(tmp_path):
  nan = 'launch: a loss, gradient or metric became nan or infinite at step 4: x'

  def script(name, flags):
    if name == '001':
      return [(2, 'launch: config.seed is wrong')]
    return [0.1, (1, nan)] if name == '002' else nine(name, flags)

  launcher = recorded.Launcher(script)
  engine, _ = recorded.run(tmp_path, launcher, NINE, POINTS)
  assert launcher.started.count('001') == launcher.started.count('002') == 1
  states = [t.state for t in engine.trials]
  assert states[1:3] == ['failed', 'pruned']
  assert states[:1] + states[3:] == ['finished'] * 7


def test_seeds_and_folds_are_runs_of_a_trial(tmp_path):
  values = {}

  def script(name, flags):
    values.setdefault(name[:3], []).append(0.01 * len(values) ** 2 + 0.1)
    assert flags['config.data.folds'] == '2'
    assert name == (
      f'{name[:3]}-seed{flags["config.seed"]}-fold{flags["config.data.fold"]}'
    )
    return [values[name[:3]][-1] + 0.05 * len(values[name[:3]])]

  points = space_lib.read([{'model.width': 8}, {'model.width': 16}], 'a').points
  engine, _ = recorded.run(
    tmp_path,
    recorded.Launcher(script, slots=3),
    space_lib.Space(points, None),
    points,
    seeds=3,
    first_seed=5,
    folds=2,
  )
  assert len(engine.trials) == 2
  for trial in engine.trials:
    found = [run.value for run in trial.runs]
    assert len(found) == 6
    assert {run.seed for run in trial.runs} == {5, 6, 7}
    assert trial.value == pytest.approx(sum(found) / 6)
    assert trial.deviation == pytest.approx(statistics.stdev(found))


def test_a_trial_one_of_whose_runs_cannot_finish_ends_with_all(tmp_path):
  def script(name, flags):
    del flags
    if name == '000-seed1':
      return [0.1, 0.2, (2, 'launch: no')]
    return [0.3] * 4

  launcher = recorded.Launcher(script, slots=3)
  engine, _ = recorded.run(tmp_path, launcher, NINE, POINTS[:2], seeds=3)
  assert [t.state for t in engine.trials] == ['failed', 'finished']
  assert launcher.jobs['000-seed0'].killed
  assert launcher.jobs['000-seed2'].killed
  assert engine.best.number == 1


def test_a_journal_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
  def full(descriptor):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  recorded.run(tmp_path, recorded.Launcher(nine), NINE, POINTS[:1])
  with monkeypatch.context() as patch:
    patch.setattr(os, 'fsync', full)
    with pytest.raises(
      workdir_lib.SaveError, match=r'journal\.jsonl could not'
    ):
      recorded.run(tmp_path, recorded.Launcher(nine), NINE, POINTS)
  engine, _ = recorded.run(tmp_path, recorded.Launcher(nine), NINE, POINTS)
  assert [t.state for t in engine.trials] == ['finished'] * 9


@pytest.mark.parametrize('line', ['{"op_code":', 'nonsense', '{}', '[]', '7'])
def test_a_damaged_journal_is_named(tmp_path, line):
  recorded.run(tmp_path, recorded.Launcher(nine), NINE, POINTS[:2])
  file = tmp_path / study_lib.JOURNAL
  lines = file.read_text().splitlines()
  lines[2] = line
  file.write_text('\n'.join(lines) + '\n')
  with pytest.raises(config_lib.UserError, match=r'journal\.jsonl is damaged'):
    recorded.run(tmp_path, recorded.Launcher(nine), NINE, POINTS[:2])


@pytest.mark.parametrize('kept', ['failed', 'pruned', 'finished'])
def test_a_kill_between_a_runs_end_and_its_trials(tmp_path, kept):
  """What the journal has of the run decides; nothing is started again."""
  study = study_lib.Study(
    tmp_path, 'grid', NINE, POINTS[:1], higher_is_better=True, seed=0,
    pruner=None,
  )  # fmt: skip
  study.begin()
  study.keep_run(0, 0, {'state': kept, 'value': 0.5, 'step': 3, 'why': None})
  launcher = recorded.Launcher(nine)
  engine, _ = recorded.run(tmp_path, launcher, NINE, POINTS[:1])
  assert not launcher.started
  assert [t.state for t in engine.trials] == [kept]
  assert [t.state for t in study.trials][0].is_finished()


@pytest.mark.parametrize('seed', range(4))
def test_killed_anywhere_it_goes_on_to_the_same_table(tmp_path, seed):
  """Whatever was between two looks; no trial is lost, none runs twice."""
  whole, _ = recorded.run(
    tmp_path / 'whole', recorded.Launcher(nine, slots=2), NINE, POINTS
  )
  finished, folder = [], tmp_path / 'killed'
  for dies_after in (seed, 3 + seed, 7, 11, 5 * seed, 23, 8, None):
    launcher = recorded.Launcher(nine, slots=2, dies_after=dies_after)
    try:
      engine, _ = recorded.run(folder, launcher, NINE, POINTS)
    except recorded.Dead:
      (folder / f'{study_lib.JOURNAL}.lock').touch()  # As a kill leaves it.
      with (folder / study_lib.JOURNAL).open('a') as file:
        file.write('{"op_code": 4, "wor')
    # What had finished when this began was not started by it.
    assert not set(finished) & set(launcher.started)
    study = study_lib.Study(
      folder, 'grid', NINE, POINTS, higher_is_better=True, seed=0, pruner=None
    )
    finished = [f'{t.number:03}' for t in study.trials if t.value is not None]
  assert table(engine) == table(whole)


def test_a_resumed_tpe_asks_what_it_would_have_asked(tmp_path):
  def script(name, flags):
    del name
    return [worth(of_flags(flags))]

  whole, _ = recorded.run(
    tmp_path / 'a', recorded.Launcher(script), SPACE, None,
    search='tpe', trials=14,
  )  # fmt: skip
  for trials in (4, 11, 14):
    parts, _ = recorded.run(
      tmp_path / 'b', recorded.Launcher(script), SPACE, None,
      search='tpe', trials=trials,
    )  # fmt: skip
  assert table(parts) == table(whole)
