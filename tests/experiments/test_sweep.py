"""The command: real runs in processes of their own, killed and gone on with."""

import io
import json
import pathlib
import random
import signal
import subprocess
import sys
import time
import types

import pytest

from experiments import command
from experiments import sweep
from experiments.search import launchers
from experiments.search import table as table_lib
from experiments.search import trials
from tests import conftest
from tests import process as process_lib

CONFIG = """
from train import config

def get_config():
  return config.Config(
    task='classification',
    total_steps=60,
    log_every=10,
    eval_every=10,
    checkpoint_every=10,
    data=config.Data(
      name='digits', batch_size=32, normalize='unit', validation_fraction=0.2
    ),
    model={'name': 'mlp', 'widths': (16,)},
    optimizer={'name': 'adam'},
    schedule={'name': 'constant_schedule', 'value': 1e-3},
  )
"""
GRID = {
  'schedule.value': ('choice', 1e-3, 1e-2), 'model.widths': ('choice', (8,),
  (16,)),
}  # fmt: skip


@pytest.fixture
def config(tmp_path):
  """config(space) -> the file of a config with that sweep()."""

  def config(space=None, extra=''):
    file = tmp_path / 'mine.py'
    text = CONFIG
    if space is not None:
      text += f'\ndef sweep():\n  return {space!r}\n'
    file.write_text(text + extra)
    return file

  return config


@pytest.fixture
def say(monkeypatch, capsys, tmp_path):
  """say(words) -> (exit code, standard error) of the command, in here."""
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')

  def say(*words):
    try:
      code = command.run('sweep', sweep.main, words)
    finally:
      sweep.FLAGS.unparse_flags()
    return code, capsys.readouterr().err

  return say


def results(folder):
  return json.loads((folder / 'sweep.json').read_text())


def table(folder):
  """What does not depend on the clock or on restarts."""
  return [
    (t['trial'], t['params'], t['state'], t['value'], t['deviation'],
     [(r['value'], r['step'], r['state'], r['attempts']) for r in t['runs']])
    for t in results(folder)['trials']
  ]  # fmt: skip


def arrays(workdir):
  """The digests of the last checkpoint's arrays."""
  newest = max(
    (workdir / 'checkpoints').glob('[0-9]*'), key=lambda f: int(f.name)
  )
  return json.loads((newest / 'manifest.json').read_text())['arrays']


def children(folder):
  """Processes whose command names the folder's trials."""
  found = []
  for file in pathlib.Path('/proc').glob('[0-9]*/cmdline'):
    try:
      words = file.read_bytes()
    except OSError:
      continue
    if f'--workdir={folder}/trials/'.encode() in words:
      found.append(int(file.parent.name))
  return found


BAD = [
  (None, ['--search=grid'], 'which has no sweep() that says what to search'),
  ({}, ['--search=grid'], 'is empty; it must have a point'),
  ({'sed': ('choice', 1, 2)}, ['--search=grid'],
   'sweep() at sed=1: config.sed is not a field; did you mean config.seed?'),
  ({'data.batch_size': ('int', 32, 5000)}, ['--search=random', '--trials=2'],
   'sweep() at data.batch_size=5000: config.data.batch_size is 5000; digits '
   'has 1150 training examples'),
  ({'optimizer.momentum': ('choice', 0.9)}, ['--search=grid'],
   'config.optimizer.momentum'),
  ({'model.widths': ('choice', (8,), 'wide')}, ['--search=grid'],
   'sweep() at model.widths=wide'),
  ({'best_metric': ('choice', 'eval/loss', 'eval/accuracy')},
   ['--search=grid'], 'it is judged by eval/loss'),
  ({'data.validation_fraction': ('choice', 0.2, 0.0)}, ['--search=grid'],
   'it would be judged by test'),
  (GRID, [], '--search is missing; it takes grid, random, tpe or list'),
  (GRID, ['--search=best'], '--search'),
  (GRID, ['--search=list'], '--search is list; sweep() of'),
  (GRID, ['--search=tpe'], '--trials is missing; --search=tpe'),
  (GRID, ['--search=grid', '--trials=0'], '--trials'),
  (GRID, ['--search=grid', '--folds=1'], '--folds'),
  (GRID, ['--search=grid', '--config.schedule.value=1e-2'],
   '--config.schedule.value is 1e-2, but sweep() of'),
  (GRID, ['--search=grid', '--config.sed=1'], 'did you mean config.seed?'),
  ({'seed': ('choice', 1, 2)}, ['--search=grid', '--seeds=2'],
   '--seeds is 2, but sweep() of'),
  ({'data.fold': ('choice', 1, 2)}, ['--search=grid', '--folds=3'],
   '--folds is 3, but sweep() of'),
  ([{'seed': 1}], ['--search=grid'], 'has a list, for which it takes list'),
  (GRID, ['--search=grid', '--devices_per_trial=1000'],
   '--devices_per_trial is 1000; this machine has'),
  (GRID, ['--search=grid', '--ray_address=auto'],
   '--ray_address is for --launcher=ray'),
  (GRID, ['--search=grid', '--workdir='], '--workdir is empty'),
  (GRID, ['grid'], "'grid' is no flag"),
]  # fmt: skip


@pytest.mark.parametrize(('space', 'words', 'says'), BAD)
def test_bad_input_is_one_line_and_nothing_is_started(
  space, words, says, config, say, tmp_path
):
  folder = tmp_path / 'sweep'
  words = [f'--workdir={folder}', f'--config={config(space)}', *words]
  code, error = say(*words)
  assert (code, error.count('\n')) == (2, 1)
  assert error.startswith('sweep: ')
  assert says in error
  assert not folder.exists()


def test_a_config_must_be_given(say):
  code, error = say('--search=grid')
  assert code == 2
  assert error.startswith('sweep: --config is missing\n')


@pytest.mark.parametrize(
  ('file', 'says'),
  [('config.json', 'holds a run, and no sweep'), ('a.txt', 'is not empty')],
)
def test_a_folder_of_something_else_is_left_alone(
  file, says, config, say, tmp_path
):
  folder = tmp_path / 'sweep'
  folder.mkdir()
  (folder / file).write_text('{}')
  code, error = say(
    f'--workdir={folder}', f'--config={config(GRID)}', '--search=grid'
  )
  assert (code, error.count('\n')) == (2, 1)
  assert says in error
  assert [path.name for path in folder.iterdir()] == [file]


def assert_is_its_launch(folder, trial, said, tmp_path):
  """Its command, typed again for another workdir, gives the same bytes."""
  (kept,) = trial['runs']
  assert kept['command'] in said
  workdir = folder / kept['workdir']
  again = tmp_path / f'again-{workdir.name}'
  line = kept['command'].replace(str(workdir), str(again))
  line = line.replace(' python ', f' {sys.executable} ')
  subprocess.run(
    line, shell=True, check=True, capture_output=True, timeout=120,
    cwd=conftest.REPOSITORY, env=conftest.environment(),
  )  # fmt: skip
  for file in ('metrics.jsonl', 'config.json'):
    assert (again / file).read_bytes() == (workdir / file).read_bytes()
  assert arrays(again) == arrays(workdir)
  lines = [json.loads(x) for x in (again / 'metrics.jsonl').open()]
  scores = [x['eval/accuracy'] for x in lines if 'eval/accuracy' in x]
  assert trial['value'] == max(scores)


@pytest.mark.slow
def test_a_grid_is_single_launches_and_goes_on_for_nothing(
  config, run, say, monkeypatch, tmp_path
):
  """Byte for byte, by the printed commands; a finished sweep starts nothing."""
  folder = tmp_path / 'sweep'
  words = [f'--config={config(GRID)}', '--search=grid', f'--workdir={folder}']
  ran = run('sweep', *words, timeout=300)
  assert (ran.returncode, ran.stderr) == (0, '')
  found = results(folder)
  assert [t['params'] for t in found['trials']] == [
    {'schedule.value': rate, 'model.widths': list(width)}
    for rate in (1e-3, 1e-2)
    for width in ((8,), (16,))
  ]
  assert_is_its_launch(folder, found['trials'][2], ran.stdout, tmp_path)
  before = table(folder)
  monkeypatch.setattr(launchers.Local, 'start', None)
  assert say(*words) == (0, '')
  assert table(folder) == before
  # Another search in the same folder is refused, by name.
  assert say(*words, '--config.seed=1') == (
    2,
    f'sweep: workdir {folder} belongs to another sweep: config.seed was 0 and '
    'is 1; give another workdir, or the same values\n',
  )


@pytest.mark.slow
@pytest.mark.long
def test_the_grid_of_a_config_here_is_nine_launches(run, tmp_path):
  folder = tmp_path / 'sweep'
  ran = run(
    'sweep', '--config=digits_mlp', '--search=grid', f'--workdir={folder}',
    timeout=600,
  )  # fmt: skip
  assert (ran.returncode, ran.stderr) == (0, '')
  trials = results(folder)['trials']
  assert len(trials) == 9
  for trial in trials:
    assert_is_its_launch(folder, trial, ran.stdout, tmp_path)


@pytest.mark.slow
@pytest.mark.long
def test_one_process_in_four_crashes_and_is_named_with_its_log(
  config, run, tmp_path
):
  """By a signal, as its config is read; the others end as without it."""
  crash = """
import os, signal, sys
if '--config.seed=2' in sys.argv and 'trials' in ' '.join(sys.argv):
  os.kill(os.getpid(), signal.SIGSEGV)
"""
  space = {'seed': ('int', 0, 3)}
  tables = []
  for name, extra in (('crashing', crash), ('whole', '')):
    folder = tmp_path / name
    ran = run(
      'sweep', f'--config={config(space, extra)}', '--search=grid',
      f'--workdir={folder}', '--retries=1', timeout=400,
    )  # fmt: skip
    assert (ran.returncode, ran.stderr) == (0, '')
    tables.append(table(folder))
    log = folder / 'trials' / '002.log'
    failed = f'trial 2 failed with signal {signal.SIGSEGV:d}'
    assert ran.stdout.count(failed) == (2 if extra else 0)
    assert (f'log: {log}\n' in ran.stdout) == bool(extra)
  crashing, whole = tables
  assert crashing[2][2:4] == ('failed', None)
  assert crashing[:2] + crashing[3:] == whole[:2] + whole[3:]


def test_the_table_is_shown_on_any_terminal(monkeypatch):
  """Each character is one that the output's encoding has."""
  raw = io.BytesIO()
  out = io.TextIOWrapper(raw, 'ascii', errors='strict')
  monkeypatch.setattr(sys, 'stdout', out)
  values = (0.75, 0.25)
  runs = [
    trials.Run(i, i, None, {}, pathlib.Path('a'), pathlib.Path('b'),
               state='finished', value=value)
    for i, value in enumerate(values)
  ]  # fmt: skip
  done = trials.Trial(0, {'model.name': 'mlp'}, runs, state='finished')
  engine = types.SimpleNamespace(
    trials=[done], best=done, failed=[], seconds_left=lambda: None,
    plan=types.SimpleNamespace(metric='eval/accuracy', sign=1.0, trials=1),
  )  # fmt: skip
  show = table_lib.Show(pathlib.Path('nowhere'), {})
  monkeypatch.setattr(show, 'changed', lambda *_, **__: None)
  show.end(engine)
  out.flush()
  text = raw.getvalue().decode('ascii')
  assert '0.5 +- 0.35' in text
  assert 'mlp' in text
  assert '?' not in text


@pytest.mark.slow
def test_sigterm_saves_all_runs_and_the_command_goes_on(config, run, tmp_path):
  folder = tmp_path / 'sweep'
  words = [
    f'--config={config(GRID)}', '--search=grid', f'--workdir={folder}',
    '--config.total_steps=3000', '--trials=2', '--config.log_every=100',
    '--config.eval_every=1000', '--config.checkpoint_every=1000',
  ]  # fmt: skip
  with process_lib.Process('sweep', *words) as process:
    process.wait_for('^trial 1 on')
    end = time.monotonic() + 60
    while not all(
      'step' in _text(folder / 'trials' / name / 'metrics.jsonl')
      for name in ('000', '001')
    ):
      assert time.monotonic() < end
      time.sleep(0.1)
    process.send(signal.SIGTERM)
    assert process.end() == 75
    assert 'sweep: stopped, saved; the same command goes on\n' in process.errors
  assert not children(folder)
  ran = run('sweep', *words, timeout=300)
  assert ran.returncode == 0
  assert [t['state'] for t in results(folder)['trials']] == ['finished'] * 2
  logs = [(folder / 'trials' / f'00{i}.log').read_text() for i in (0, 1)]
  assert all('saved' in log for log in logs)


def _text(file):
  return file.read_text() if file.exists() else ''


def _kill_until_done(words, folder, times, longest):
  """kill -9 of the sweep's process, so often; then to its end."""
  draw = random.Random(0)
  for _ in range(times):
    with process_lib.Process('sweep', *words) as process:
      process.wait_for('^workdir: ')
      time.sleep(draw.uniform(0, longest))
      process.send(signal.SIGKILL)
      process.end()
    end = time.monotonic() + 5
    while left := children(folder):
      assert time.monotonic() < end, left
      time.sleep(0.05)
  with process_lib.Process('sweep', *words) as process:
    assert process.end(300) == 0, process.errors


@pytest.mark.slow
@pytest.mark.parametrize(
  ('times', 'trials'), [(1, 2), pytest.param(10, 4, marks=pytest.mark.long)]
)
def test_killed_at_any_instant_the_table_is_the_same(
  config, tmp_path, times, trials
):
  """No orphan, no trial lost, none twice; and the same bytes in each."""
  words = [f'--config={config(GRID)}', '--search=grid', f'--trials={trials}']
  killed, whole = tmp_path / 'killed', tmp_path / 'whole'
  _kill_until_done([*words, f'--workdir={killed}'], killed, times, 14)
  _kill_until_done([*words, f'--workdir={whole}'], whole, 0, 0)
  assert table(killed) == table(whole)
  for trial in results(whole)['trials']:
    name = trial['runs'][0]['workdir']
    for file in ('metrics.jsonl', 'config.json'):
      assert (killed / name / file).read_bytes() == (
        whole / name / file
      ).read_bytes()
    assert arrays(killed / name) == arrays(whole / name)


@pytest.mark.long
@pytest.mark.slow
def test_a_pruned_trials_devices_are_in_use_again_at_once(config, tmp_path):
  """On one worker; the next trial starts within five seconds."""
  space = [{'schedule.value': rate} for rate in (1e-2, 1e-9, 1e-3)]
  folder = tmp_path / 'sweep'
  words = [
    f'--config={config(space)}', '--search=list', f'--workdir={folder}',
    '--pruner=asha', '--reduction_factor=2', '--workers=1',
    '--config.total_steps=400',
  ]  # fmt: skip
  with process_lib.Process('sweep', *words) as process:
    process.wait_for('^trial 1 pruned')
    start = time.monotonic()
    process.wait_for('^trial 2 on')
    assert time.monotonic() - start < 5
    assert process.end(200) == 0
  states = [t['state'] for t in results(folder)['trials']]
  assert states[:2] == ['finished', 'pruned']
