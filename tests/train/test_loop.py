"""The promises of the loop, on a real config that is shrunk."""

import dataclasses
import datetime
import errno
import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from experiments import command
from experiments import evaluate as evaluate_command
from tests import runs
from train import checkpoint
from train import config as config_lib
from train import evaluate
from train import loop
from train import program as program_lib
from train import signals
from train import state as state_lib
from train import workdir as workdir_lib
from train import writer
from train.data import pipeline
from train.data import sources

CNN = {'name': 'cnn', 'widths': (8,), 'dropout': 0.3, 'head_widths': (16,)}


# ------------------------------------------------- stopping changes nothing


CONFIGS = {
  'mlp': runs.config(),
  'cnn': runs.config(model=CNN, optimizer={'name': 'sgd', 'momentum': 0.9}),
}


@pytest.fixture(scope='module')
def never_stopped(tmp_path_factory):
  """never_stopped('mlp') -> the workdir of a run of that config."""
  workdirs = {}

  def never_stopped(name):
    if name not in workdirs:
      workdirs[name] = tmp_path_factory.mktemp(name)
      loop.train_and_evaluate(CONFIGS[name], workdirs[name])
    return workdirs[name]

  return never_stopped


@pytest.fixture
def unbroken(never_stopped):
  """(config, workdir) of the mlp's run that was never stopped."""
  return CONFIGS['mlp'], never_stopped('mlp')


@pytest.mark.parametrize(
  ('name', 'step'),
  [
    ('mlp', 1),
    ('mlp', 4),
    ('mlp', 11),
    ('mlp', 12),
    pytest.param('cnn', 7, marks=pytest.mark.slow),
  ],
)
def test_a_run_stopped_and_started_again_ends_with_the_same_bytes(
  never_stopped, tmp_path, monkeypatch, name, step
):
  config, workdir = CONFIGS[name], never_stopped(name)
  stepped = writer.Writer.stepped

  def stop(self, now, metrics):
    stepped(self, now, metrics)
    if now == step:
      os.kill(os.getpid(), signal.SIGTERM)

  monkeypatch.setattr(writer.Writer, 'stepped', stop)
  with pytest.raises(signals.Stopped, match=f'step {step} of 12') as stopped:
    loop.train_and_evaluate(config, tmp_path)
  assert stopped.value.exit_code == 75
  monkeypatch.undo()
  final = loop.train_and_evaluate(config, tmp_path)
  assert _bytes(tmp_path) == _bytes(workdir)
  assert final == _last_line(workdir)


def test_a_run_stopped_while_it_evaluates_evaluates_on_resuming(
  unbroken, tmp_path, monkeypatch
):
  config, workdir = unbroken
  real = evaluate.evaluate

  def stop(program, state, split, *, between):
    os.kill(os.getpid(), signal.SIGINT)
    return real(program, state, split, between=between)

  monkeypatch.setattr(evaluate, 'evaluate', stop)
  with pytest.raises(signals.Stopped, match='step 4 of 12') as stopped:
    loop.train_and_evaluate(config, tmp_path)
  assert stopped.value.exit_code == 130
  monkeypatch.undo()
  loop.train_and_evaluate(config, tmp_path)
  assert _bytes(tmp_path) == _bytes(workdir)


def test_lines_ahead_of_the_newest_checkpoint_are_cut_back(
  unbroken, tmp_path, monkeypatch
):
  """As after kill -9: a step was logged, and its checkpoint never written."""
  config, workdir = unbroken
  save = checkpoint.Checkpoints.save
  monkeypatch.setattr(
    checkpoint.Checkpoints,
    'save',
    lambda self, state, step: save(self, state, step) if step < 8 else None,
  )
  monkeypatch.setattr(
    checkpoint.Checkpoints, 'is_best', lambda self, step: False
  )
  stepped = writer.Writer.stepped

  def die(self, now, metrics):
    stepped(self, now, metrics)
    if now == 11:
      raise MemoryError  # Any error that nobody catches.

  monkeypatch.setattr(writer.Writer, 'stepped', die)
  with pytest.raises(MemoryError):
    loop.train_and_evaluate(config, tmp_path)
  with (tmp_path / 'metrics.jsonl').open('a') as file:
    file.write('{"step": 11, "train/lo')  # A kill in the middle of a line.
  steps = [line['step'] for line in writer.read(tmp_path / 'metrics.jsonl')]
  assert max(steps) == 8
  monkeypatch.undo()
  loop.train_and_evaluate(config, tmp_path)
  assert _bytes(tmp_path) == _bytes(workdir)


def test_a_finished_run_is_left_alone(unbroken):
  config, workdir = unbroken
  before = {p: p.stat().st_mtime_ns for p in workdir.glob('*.jsonl')}
  assert loop.train_and_evaluate(config, workdir) == _last_line(workdir)
  assert {p: p.stat().st_mtime_ns for p in workdir.glob('*.jsonl')} == before


def test_saving_in_the_background_is_not_disturbed_by_the_steps_that_follow(
  tmp_path,
):
  """The step takes over the state's memory while Orbax still writes it."""
  config = runs.config(checkpoint_every=1, keep_best=0)
  program = program_lib.create(config)
  kept = {}
  save = checkpoint.Checkpoints.save

  def watch(self, state, step):
    kept[step] = jax.tree.map(np.array, state.params)  # A copy, now.
    save(self, state, step)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(checkpoint.Checkpoints, 'save', watch)
    patch.setattr(
      checkpoint.Checkpoints,
      'should_preserve',
      lambda self, infos, *, context: [True] * len(infos),
    )
    loop.run(program, tmp_path)
  with checkpoint.Checkpoints(
    tmp_path, program.config, {}, say=print, read_only=True
  ) as checkpoints:
    assert checkpoints.steps() == list(range(1, 13))
    for step in checkpoints.steps():
      restored = checkpoints.restore(program, step)
      jax.tree.map(np.testing.assert_array_equal, restored.params, kept[step])


def test_what_a_kill_left_half_written_is_removed_and_no_link_followed(
  tmp_path,
):
  elsewhere = tmp_path / 'elsewhere'
  elsewhere.mkdir()
  (elsewhere / 'kept').write_text('')
  checkpoints = tmp_path / 'run' / 'checkpoints'
  (checkpoints / '3.orbax-checkpoint-tmp-1').mkdir(parents=True)
  (checkpoints / '3.orbax-checkpoint-tmp-1' / 'link').symlink_to(elsewhere)
  program = program_lib.create(runs.config())
  with checkpoint.Checkpoints(
    tmp_path / 'run', program.config, {}, say=print, read_only=True
  ):
    assert list(checkpoints.iterdir())  # Looking on leaves a live run's own.
  with checkpoint.Checkpoints(
    tmp_path / 'run', program.config, {}, say=print
  ) as opened:
    assert opened.steps() == []
  assert not list(checkpoints.iterdir())
  assert (elsewhere / 'kept').exists()


def test_streamed_examples_train_and_resume_as_resident_ones_do(
  unbroken, tmp_path, monkeypatch
):
  config, workdir = unbroken
  monkeypatch.setattr(pipeline, 'RESIDENT_BYTES', 0)
  stepped = writer.Writer.stepped

  def stop(self, now, metrics):
    stepped(self, now, metrics)
    if now == 7:
      os.kill(os.getpid(), signal.SIGTERM)

  with monkeypatch.context() as patch:
    patch.setattr(writer.Writer, 'stepped', stop)
    with pytest.raises(signals.Stopped):
      loop.train_and_evaluate(config, tmp_path)
  loop.train_and_evaluate(config, tmp_path)
  assert _bytes(tmp_path) == _bytes(workdir)


# ---------------------------------------------------------- saving that fails


@pytest.fixture
def full_disk(monkeypatch):
  """full_disk.undo() makes room again."""

  def fail(self, step, *args, **kwargs):
    raise OSError(errno.ENOSPC, 'No space left on device')

  with monkeypatch.context() as patch:
    patch.setattr(ocp.CheckpointManager, 'save', fail)
    yield patch


def test_a_run_that_could_not_be_saved_is_not_taken_for_finished(
  unbroken, tmp_path, full_disk, capsys
):
  config, workdir = unbroken
  with pytest.raises(workdir_lib.SaveError, match='step 12') as error:
    loop.train_and_evaluate(config, tmp_path)
  assert error.value.exit_code == 74
  assert 'No space left on device' in capsys.readouterr().out
  full_disk.undo()
  loop.train_and_evaluate(config, tmp_path)
  assert _bytes(tmp_path) == _bytes(workdir)


def test_a_run_that_is_stopped_and_cannot_save_says_so(
  tmp_path, full_disk, monkeypatch
):
  stepped = writer.Writer.stepped

  def stop(self, now, metrics):
    stepped(self, now, metrics)
    if now == 6:
      os.kill(os.getpid(), signal.SIGTERM)

  monkeypatch.setattr(writer.Writer, 'stepped', stop)
  with pytest.raises(workdir_lib.SaveError, match='step 6 .*not saved'):
    loop.train_and_evaluate(runs.config(), tmp_path)


# ------------------------------------------------------- whose workdir it is


def test_a_workdir_in_use_refuses_a_second_run(tmp_path):
  config = program_lib.create(runs.config()).config
  start = datetime.datetime.now().astimezone() - datetime.timedelta(seconds=1)
  with workdir_lib.claimed(tmp_path, config, print):
    with (
      pytest.raises(config_lib.UserError) as refused,
      workdir_lib.claimed(tmp_path, config, print),
    ):
      pytest.fail('two runs hold one workdir')
    # The one that was refused takes nothing away from the other.
    assert (tmp_path / 'running.json').exists()
  found = re.fullmatch(
    rf'workdir {tmp_path} is in use by process {os.getpid()} on (\S+), since '
    r'(\S+); wait for it, or give another workdir',
    str(refused.value),
  )
  assert found, refused.value
  assert found[1] == socket.gethostname()
  since = datetime.datetime.fromisoformat(found[2])
  assert start <= since <= datetime.datetime.now().astimezone()
  said = []
  with workdir_lib.claimed(tmp_path, config, said.append) as path:
    assert path == tmp_path
  assert said == []
  assert not (tmp_path / 'running.json').exists()


def test_the_workdir_of_one_that_was_killed_is_taken_over_with_a_line(tmp_path):
  config = program_lib.create(runs.config()).config
  with workdir_lib.claimed(tmp_path, config, print):
    left = (tmp_path / 'running.json').read_text()
  (tmp_path / 'running.json').write_text(left)  # As a kill leaves it.
  said = []
  with workdir_lib.claimed(tmp_path, config, said.append):
    pass
  assert len(said) == 1
  assert re.fullmatch(
    rf'taking {tmp_path} over from process {os.getpid()} on \S+, since \S+, '
    'which has gone',
    said[0],
  )


@pytest.mark.parametrize(
  'text',
  [
    '', '{', '[]', '{"host": 3, "process": 4, "since": "2026-01-01"}',
    '{"host": "a\\u001b[2J", "process": 4, "since": "2026-01-01T00:00:00"}',
    '{"host": "a", "process": "x", "since": "2026-01-01T00:00:00"}',
    '{"host": "a", "process": 4, "since": "yesterday"}', '[' * 100_000,
    '\udcff',
  ],
)  # fmt: skip
def test_who_held_a_workdir_is_not_told_from_what_nobody_wrote(tmp_path, text):
  config = program_lib.create(runs.config()).config
  file = tmp_path / 'running.json'
  file.write_bytes(text.encode('utf-8', 'surrogateescape'))
  with workdir_lib.claimed(tmp_path, config, pytest.fail):
    assert json.loads(file.read_text())['process'] == os.getpid()


def test_a_link_where_a_file_is_written_is_not_followed(tmp_path):
  config = program_lib.create(runs.config()).config
  precious = tmp_path / 'precious'
  precious.write_text('mine')
  workdir = tmp_path / 'run'
  workdir.mkdir()
  for name in ('running.json', 'running.json.partial', 'config.json.partial'):
    (workdir / name).symlink_to(precious)
  with workdir_lib.claimed(workdir, config, print):
    assert precious.read_text() == 'mine'


def test_results_of_an_unknown_config_are_left_alone(tmp_path):
  (tmp_path / 'metrics.jsonl').write_text('{"step": 1, "eval/loss": 2.0}\n')
  with pytest.raises(config_lib.UserError, match=r'has results but no config'):
    loop.train_and_evaluate(runs.config(), tmp_path)
  assert (tmp_path / 'metrics.jsonl').read_text().startswith('{"step": 1')


def test_a_damaged_line_in_the_middle_of_metrics_is_not_cut_away(tmp_path):
  file = tmp_path / 'metrics.jsonl'
  file.write_text('{"step": 1}\n{"ste\n{"step": 3}\n')
  with pytest.raises(config_lib.UserError, match='damaged in line 2'):
    writer.read(file)
  file.write_text('{"step": 1}\n{"step": 2}\n{"ste')
  assert [line['step'] for line in writer.read(file)] == [1, 2]


# ------------------------------------------------------------ early stopping


# The rate jumps after step 8, from where the loss can only rise.
DIVERGING = {
  'name': 'piecewise_constant_schedule',
  'init_value': 3e-3,
  'boundaries_and_scales': {8: 300.0},
}


@pytest.mark.parametrize('patience', [1, 3])
def test_a_run_stops_so_many_evaluations_after_its_best(tmp_path, patience):
  config = runs.config(
    total_steps=100,
    log_every=1,
    eval_every=2,
    checkpoint_every=3,
    data=config_lib.Data(
      name='digits', batch_size=64, validation_fraction=0.25
    ),
    schedule=DIVERGING,
    early_stopping=config_lib.EarlyStopping(
      patience=patience, metric='eval/loss'
    ),
  )
  final = loop.train_and_evaluate(config, tmp_path)
  lines = writer.read(tmp_path / 'metrics.jsonl')
  scores = {
    line['step']: line['eval/loss'] for line in lines if 'eval/loss' in line
  }
  best = min(scores, key=scores.get)
  assert list(scores) == list(range(2, best + 2 * patience + 1, 2))
  last = max(scores)
  trained = [line['step'] for line in lines if 'train/loss' in line]
  assert trained == list(range(1, last + 1))
  saved = {int(path.name) for path in (tmp_path / 'checkpoints').iterdir()}
  assert saved == {best, last}
  # What it returns is the best: of the test split, which did not decide.
  (tested,) = (line for line in lines if 'test/loss' in line)
  assert tested == {'step': best, **final}
  program = program_lib.create(config)
  with checkpoint.Checkpoints(
    tmp_path, program.config, scores, say=print, read_only=True
  ) as checkpoints:
    assert checkpoints.find('best')[0] == best
    of_step = {step: checkpoints.restore(program, step) for step in saved}
  results = {
    step: evaluate.scalars(evaluate.evaluate(program, state, 'test'), 'test')
    for step, state in of_step.items()
  }
  assert results[best] == final
  assert results[last] != final
  assert {path.name for path in (tmp_path / 'evaluations').iterdir()} == {
    f'test-{best}.json'
  }


def test_an_accuracy_that_rises_does_not_stop_a_run(tmp_path):
  """Higher is better of it, lower of a loss."""
  config = runs.config(
    total_steps=24,
    eval_every=4,
    early_stopping=config_lib.EarlyStopping(patience=2),
  )
  loop.train_and_evaluate(config, tmp_path)
  lines = writer.read(tmp_path / 'metrics.jsonl')
  scores = {
    line['step']: line['eval/accuracy']
    for line in lines
    if 'eval/accuracy' in line
  }
  assert scores[24] > scores[4] + 0.1
  assert max(scores) == 24


def test_a_best_that_could_not_be_saved_gives_way_and_the_run_says_so(
  tmp_path, monkeypatch, capsys
):
  config = runs.config(
    total_steps=30,
    eval_every=2,
    schedule=DIVERGING,
    best_metric='eval/loss',
    early_stopping=config_lib.EarlyStopping(patience=2),
  )
  save = ocp.CheckpointManager.save

  def fail(self, step, *args, **kwargs):
    if step == 8:
      raise OSError(errno.ENOSPC, 'No space left on device')
    return save(self, step, *args, **kwargs)

  monkeypatch.setattr(ocp.CheckpointManager, 'save', fail)
  with pytest.raises(workdir_lib.SaveError, match='was not saved'):
    loop.train_and_evaluate(config, tmp_path)
  lines = writer.read(tmp_path / 'metrics.jsonl')
  scores = {
    line['step']: line['eval/loss'] for line in lines if 'eval/loss' in line
  }
  assert sorted(scores, key=scores.get)[:2] == [8, 6]
  assert [line['step'] for line in lines if 'test/loss' in line] == [6]
  said = capsys.readouterr().out
  assert 'No space left on device' in said
  assert 'the best of eval/loss is step 6' in said


# -------------------------------------------------------------- running mean


@pytest.fixture(scope='module')
def plain(tmp_path_factory):
  """(config, workdir, step -> params) of six steps without a running mean."""
  config = runs.config(total_steps=6, eval_every=3, checkpoint_every=1)
  program = program_lib.create(config)
  workdir = tmp_path_factory.mktemp('plain')
  params = {0: jax.device_get(program.init().params)}
  save = checkpoint.Checkpoints.save

  def watch(self, state, step):
    params[step] = jax.tree.map(np.array, state.params)
    save(self, state, step)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(checkpoint.Checkpoints, 'save', watch)
    loop.run(program, workdir)
  return config, workdir, params


def test_a_running_mean_is_evaluated_and_changes_no_parameter(plain, tmp_path):
  config, workdir, params = plain
  decay = 0.7
  with_mean = dataclasses.replace(config, ema_decay=decay)
  program = program_lib.create(with_mean)
  loop.run(program, tmp_path)
  with checkpoint.Checkpoints(
    tmp_path, program.config, {}, say=print, read_only=True
  ) as checkpoints:
    state = checkpoints.restore(program, 6)
  jax.tree.map(np.testing.assert_array_equal, state.params, params[6])
  mean = jax.tree.map(np.float64, params[0])
  expected = {}
  for step in range(1, 7):
    d = min(decay, step / (9 + step))
    mean = jax.tree.map(
      lambda m, p, d=d: d * m + (1 - d) * p, mean, params[step]
    )
    expected[step] = mean
  jax.tree.map(
    lambda m, e: np.testing.assert_allclose(m, e, rtol=1e-5, atol=1e-7),
    state.ema_params,
    expected[6],
  )
  # An evaluation is that of a run whose parameters are the mean.
  raw = program_lib.create(config)
  lines, without = (
    [line for line in writer.read(w / 'metrics.jsonl') if 'eval/loss' in line]
    for w in (tmp_path, workdir)
  )
  for line, other in zip(lines, without, strict=True):
    state = dataclasses.replace(
      raw.init(),
      params=jax.tree.map(np.float32, expected[line['step']]),
    )
    found = evaluate.evaluate(raw, state, 'test')
    assert line['eval/loss'] == pytest.approx(found['loss'], rel=1e-5)
    assert line['eval/loss'] != pytest.approx(other['eval/loss'], rel=1e-3)


def test_of_a_running_mean_raw_gives_the_parameters_as_trained(
  plain, tmp_path, capsys
):
  config, workdir, _ = plain
  with_mean = dataclasses.replace(config, ema_decay=0.7)
  loop.train_and_evaluate(with_mean, tmp_path)
  capsys.readouterr()

  def printed(*words):
    words = [f'--workdir={tmp_path}', *words]
    assert command.run('evaluate', evaluate_command.main, words) == 0
    return json.loads(capsys.readouterr().out)

  raw, ema = printed('--params=raw'), printed('--params=ema')
  assert printed() == ema
  for result, of in ((raw, workdir), (ema, tmp_path)):
    assert result['loss'] == _last_line(of)['test/loss']
  assert raw['loss'] != ema['loss']


def test_another_evaluation_does_not_take_the_place_of_the_runs_own(
  plain, tmp_path, capsys
):
  config, _, _ = plain
  loop.train_and_evaluate(dataclasses.replace(config, ema_decay=0.7), tmp_path)
  kept = (tmp_path / 'evaluations' / 'test-6.json').read_bytes()
  words = [f'--workdir={tmp_path}', '--params=raw']
  assert command.run('evaluate', evaluate_command.main, words) == 0
  assert (tmp_path / 'evaluations' / 'test-6.json').read_bytes() == kept


# --------------------------------------------------------------- few examples


@pytest.mark.slow
def test_few_examples_are_the_same_for_every_seed_and_spare_evaluation(
  tmp_path, monkeypatch
):
  splits = []
  real = pipeline.train_batches

  def watch(split, **rest):
    splits.append(split)
    return real(split, **rest)

  monkeypatch.setattr(pipeline, 'train_batches', watch)
  for seed in (0, 1):
    config = runs.config(
      seed=seed,
      total_steps=2,
      data=config_lib.Data(
        name='digits',
        batch_size=50,
        validation_fraction=0.25,
        max_examples=100,
      ),
    )
    loop.train_and_evaluate(config, tmp_path / f'{seed}')
    tested = json.loads(
      (tmp_path / f'{seed}' / 'evaluations' / 'test-2.json').read_text()
    )
    assert tested['count'] == 360
  few = [split.take(np.arange(len(split))) for split in splits]
  assert len(splits[0]) == 100
  for key in ('image', 'label'):
    np.testing.assert_array_equal(few[0][key], few[1][key])
  # Of the training part, and of every class.
  whole = program_lib.create(dataclasses.replace(config, data=config_lib.Data(
    name='digits', batch_size=50, validation_fraction=0.25,
  ))).dataset.splits  # fmt: skip
  everything = whole['train'].take(np.arange(len(whole['train'])))['image']
  assert {i.tobytes() for i in few[0]['image']} <= {
    i.tobytes() for i in everything
  }
  assert len(np.unique(few[0]['label'])) == 10
  validation = program_lib.create(config).dataset.splits['validation']
  np.testing.assert_array_equal(validation.rows, whole['validation'].rows)


# --------------------------------------------------------------- TensorBoard


def test_events_for_tensorboard_are_written_where_they_are_asked_for(
  tmp_path, capsys
):
  pytest.importorskip('tensorboardX')
  config = runs.config(total_steps=2)
  for tensorboard in (False, True):
    workdir = tmp_path / str(tensorboard)
    config = dataclasses.replace(config, tensorboard=tensorboard)
    loop.train_and_evaluate(config, workdir)
    files = list(workdir.glob('tensorboard/events.out.tfevents.*'))
    assert len(files) == tensorboard
    assert all(file.stat().st_size > 0 for file in files)
  one, other = (tmp_path / n / 'metrics.jsonl' for n in ('False', 'True'))
  assert one.read_bytes() == other.read_bytes()


# -------------------------------------------------- looking changes nothing


def test_logging_evaluating_and_saving_change_no_parameter(tmp_path):
  cadences = [(1, 1, 1), (5, 3, 2), (100, 100, 100), (100, 1, 100)]
  digests = set()
  for i, (log, evaluation, save) in enumerate(cadences):
    config = runs.config(
      log_every=log,
      eval_every=evaluation,
      checkpoint_every=save,
    )
    loop.train_and_evaluate(config, tmp_path / f'{i}')
    digests.add(runs.digest(tmp_path / f'{i}'))
  assert len(digests) == 1


@pytest.mark.slow
def test_a_terminal_shows_a_bar_and_changes_no_parameter(tmp_path, run):
  words = [
    '--config=digits_mlp',
    '--config.total_steps=12',
    '--config.log_every=4',
  ]
  plain = run('launch', *words, f'--workdir={tmp_path / "plain"}')
  assert plain.returncode == 0, plain.stderr
  assert '\x1b' not in plain.stdout
  shown = _in_terminal(
    [
      sys.executable, '-m', 'experiments.launch', *words,
      f'--workdir={tmp_path / "terminal"}',
    ]
  )  # fmt: skip
  assert 'step 12/12' in shown
  assert 'examples/s' in shown
  assert '\x1b' in shown
  assert runs.digest(tmp_path / 'plain') == runs.digest(tmp_path / 'terminal')
  for name in ('metrics.jsonl', 'config.json'):
    a, b = (tmp_path / kind / name for kind in ('plain', 'terminal'))
    assert a.read_bytes() == b.read_bytes()


def _in_terminal(words) -> str:
  ours, theirs = pty.openpty()
  with subprocess.Popen(
    words,
    stdout=theirs,
    stderr=theirs,
    env=os.environ | {'TERM': 'xterm', 'COLUMNS': '120'},
  ) as process:
    os.close(theirs)
    shown = b''
    while True:
      try:
        chunk = os.read(ours, 4096)
      except OSError:  # How a terminal says that the other end is gone.
        break
      if not chunk:
        break
      shown += chunk
  os.close(ours)
  assert process.returncode == 0, shown.decode()
  return shown.decode()


# --------------------------------------------------------- one step function


@pytest.mark.slow
def test_a_whole_run_compiles_one_training_and_one_evaluation_step(
  tmp_path, run
):
  # 1,437 examples: the last batch of evaluation is ragged.
  ran = run(
    'launch',
    '--config=digits_cnn',
    '--config.total_steps=50',
    '--config.eval_every=20',
    '--config.data.validation_fraction=0.25',
    f'--workdir={tmp_path}',
    env={'JAX_LOG_COMPILES': '1', 'JAX_LOGGING_LEVEL': 'WARNING'},
  )
  assert ran.returncode == 0, ran.stderr
  # Two handlers may print the same line; two compilations never take the same
  # time to the last digit.
  found = re.findall(r'Finished XLA compilation of (\S+) in (\S+)', ran.stderr)
  compiled = [name for name, _ in set(found)]
  assert compiled.count('jit(train_step)') == 1
  assert compiled.count('jit(eval_step)') == 1


def test_the_loop_knows_no_model_task_or_mesh():
  source = (command.CONFIGS.parents[1] / 'train' / 'loop.py').read_text()
  assert len(source.splitlines()) <= 150
  branches = re.findall(r'^\s*(?:if|elif|while|for)\b.*', source, re.M)
  assert branches
  for line in branches:
    assert not re.search(r'\b(model|task|mesh|loss|optimizer)\b', line), line


# ------------------------------------------------------------------ sanity


@pytest.mark.slow
def test_with_true_labels_it_learns(tmp_path):
  """The control of the next: the same run, its labels as they are."""
  final = loop.train_and_evaluate(
    runs.config(total_steps=300, eval_every=300), tmp_path
  )
  assert final['test/accuracy'] > 0.9


@pytest.mark.slow
def test_with_shuffled_labels_the_test_accuracy_stays_at_chance(tmp_path):
  dataset = sources.load('digits')
  train = dataset.splits['train'].arrays
  labels = np.random.default_rng(0).permutation(train['label'])
  shuffled = sources.Split(train | {'label': labels})
  dataset = dataclasses.replace(
    dataset, splits=dataset.splits | {'train': shuffled}
  )
  final = loop.train_and_evaluate(
    runs.config(total_steps=300, eval_every=300), tmp_path, dataset=dataset
  )
  # Chance is 0.1 of 360; five standard deviations.
  assert abs(final['test/accuracy'] - 0.1) < 5 * (0.1 * 0.9 / 360) ** 0.5


def test_the_best_checkpoint_stays_with_the_newest(tmp_path):
  config = runs.config(
    total_steps=40, eval_every=4, checkpoint_every=8, keep_best=2
  )
  loop.train_and_evaluate(config, tmp_path)
  scores = {
    line['step']: line['eval/accuracy']
    for line in writer.read(tmp_path / 'metrics.jsonl')
    if 'eval/accuracy' in line
  }
  best = sorted(scores, key=lambda step: (-scores[step], step))[:2]
  saved = {int(path.name) for path in (tmp_path / 'checkpoints').iterdir()}
  assert saved == {40, *best}


def test_of_equal_scores_the_earlier_checkpoint_stays(tmp_path):
  # At rate zero, every evaluation is the first one again.
  config = runs.config(
    schedule={'name': 'constant_schedule', 'value': 0.0},
    early_stopping=config_lib.EarlyStopping(patience=1),
  )
  loop.train_and_evaluate(config, tmp_path)
  saved = {int(path.name) for path in (tmp_path / 'checkpoints').iterdir()}
  assert saved == {4, 8}
  lines = writer.read(tmp_path / 'metrics.jsonl')
  assert [line['step'] for line in lines if 'test/loss' in line] == [4]


def test_a_loss_that_is_not_finite_stops_the_run_naming_the_step(tmp_path):
  config = runs.config(
    optimizer={'name': 'sgd'},
    schedule={'name': 'constant_schedule', 'value': 1e30},
  )
  with pytest.raises(state_lib.NonFiniteError, match='step 2: config.schedule'):
    loop.train_and_evaluate(config, tmp_path)
  assert not list((tmp_path / 'checkpoints').iterdir())


def _bytes(workdir) -> tuple[str, bytes, bytes]:
  return (
    runs.digest(workdir),
    (workdir / 'metrics.jsonl').read_bytes(),
    (workdir / 'evaluations' / 'test-12.json').read_bytes(),
  )


def _last_line(workdir) -> dict[str, float]:
  line = (workdir / 'metrics.jsonl').read_text().splitlines()[-1]
  return {k: v for k, v in json.loads(line).items() if k != 'step'}
