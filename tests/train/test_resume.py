"""Stopping changes nothing where evaluations and running means decide.

One run with everything on that remembers: a running mean, parts of batches,
mixed examples, dropout, a rate that evaluations lower, and early stopping.
"""

import dataclasses
import json
import os
import shutil
import signal
import struct

import pytest

from tests import runs
from train import checkpoint
from train import config as config_lib
from train import evaluate
from train import loop
from train import program as program_lib
from train import signals
from train import workdir as workdir_lib
from train import writer

EVERY = 2  # Steps from one evaluation to the next.
PATIENCE = 4  # Evaluations after the best: then the run stops,
LOWER = 2  # and after so many its rate was halved.
RATE = 0.2  # Too high, so that the loss soon rises.
FULL = runs.config(
  total_steps=200,
  log_every=1,
  eval_every=EVERY,
  checkpoint_every=3 * EVERY,
  best_metric='eval/loss',
  data=config_lib.Data(
    name='digits',
    batch_size=32,
    max_examples=64,
    augment=('pad_crop', {'name': 'mixup', 'alpha': 0.2}),
  ),
  schedule={
    'name': 'reduce_on_plateau',
    'value': RATE,
    'factor': 0.5,
    'patience': LOWER,
  },
  early_stopping=config_lib.EarlyStopping(patience=PATIENCE),
  label_smoothing=0.1,
  l1=1e-4,
  l2=1e-3,
  weight_decay_mask=True,
  grad_clip_norm=1.0,
  rate_multipliers={'blocks': 0.5},
  ema_decay=0.5,
  accumulate=2,
)


@pytest.fixture(scope='module')
def program():
  """FULL's program. One, because making it again costs more than a run."""
  return program_lib.create(FULL)


@pytest.fixture(scope='module')
def unbroken(program, tmp_path_factory):
  """The workdir of FULL's run, never stopped."""
  workdir = tmp_path_factory.mktemp('unbroken')
  loop.run(program, workdir)
  return workdir


@pytest.fixture(scope='module')
def best(unbroken):
  """The step of its best evaluation; the run ends EVERY * PATIENCE later."""
  scores = _scores(unbroken)
  return min(scores, key=scores.get)


def _scores(workdir) -> dict[int, float]:
  return {
    line['step']: line['eval/loss']
    for line in writer.read(workdir / 'metrics.jsonl')
    if 'eval/loss' in line
  }


def _bytes(workdir) -> tuple:
  kept = sorted((workdir / 'evaluations').iterdir())
  return (
    runs.digest(workdir),
    (workdir / 'metrics.jsonl').read_bytes(),
    [(path.name, path.read_bytes()) for path in kept],
  )


def _ask_to_stop(monkeypatch, event, at):
  """A signal comes when `event` happens to step `at`."""
  owner, name = {
    'stepped': (writer.Writer, 'stepped'),
    'evaluating': (evaluate, 'evaluate'),
    'evaluated': (writer.Writer, 'evaluated'),
  }[event]
  real = getattr(owner, name)

  def watch(first, second, *rest, **between):
    # Of a program and a state, or of a writer and a step.
    if int(getattr(second, 'step', second)) == at:
      os.kill(os.getpid(), signal.SIGTERM)
    return real(first, second, *rest, **between)

  monkeypatch.setattr(owner, name, watch)


# ------------------------------------------------------------------ stopping


def test_the_run_lowers_its_rate_and_stops_early(unbroken, best):
  """Or the tests of this file would prove less than they say."""
  scores = _scores(unbroken)
  assert max(scores) == best + EVERY * PATIENCE < FULL.total_steps
  rates = _rates(unbroken)
  assert rates[best] > rates[best + EVERY * LOWER + 1]


@pytest.mark.parametrize(
  ('event', 'evaluations', 'steps'),
  [
    ('stepped', 0, -1),  # Before the best evaluation,
    ('evaluating', 0, 0),  # while it goes on,
    ('evaluated', 0, 0),  # right after it.
    ('stepped', 1, 1),  # Between two evaluations.
    ('evaluating', LOWER, 0),  # As the rate is to be lowered,
    ('evaluated', LOWER, 0),  # and when it has been.
    ('stepped', PATIENCE, -1),  # The last step but one,
    ('stepped', PATIENCE, 0),  # the last,
    ('evaluating', PATIENCE, 0),  # its evaluation, which ends the run,
    ('evaluated', PATIENCE, 0),  # and what comes after.
  ],
)
def test_a_run_stopped_anywhere_ends_with_the_same_bytes(
  program, unbroken, best, tmp_path, monkeypatch, event, evaluations, steps
):
  at = best + EVERY * evaluations + steps
  with monkeypatch.context() as patch:
    _ask_to_stop(patch, event, at)
    with pytest.raises(signals.Stopped, match=f'step {at} of 200, saved'):
      loop.run(program, tmp_path)
  loop.run(program, tmp_path)
  assert _bytes(tmp_path) == _bytes(unbroken)


def test_a_run_stopped_at_its_test_ends_with_the_same_bytes(
  program, unbroken, best, tmp_path, monkeypatch
):
  saved, restore = [], checkpoint.Checkpoints.restore_final

  def stop(self, *args):
    saved.append(self.steps())
    os.kill(os.getpid(), signal.SIGTERM)
    return restore(self, *args)

  with monkeypatch.context() as patch:
    patch.setattr(checkpoint.Checkpoints, 'restore_final', stop)
    with pytest.raises(signals.Stopped, match='before the test'):
      loop.run(program, tmp_path)
  assert saved == [[best, best + EVERY * PATIENCE]]
  loop.run(program, tmp_path)
  assert _bytes(tmp_path) == _bytes(unbroken)


def test_a_run_stopped_again_and_again_ends_with_the_same_bytes(
  program, unbroken, best, tmp_path, monkeypatch
):
  stops = 0
  for event in ('stepped', 'evaluating', 'evaluated'):
    for at in range(1, best + EVERY * PATIENCE + 1, 3):
      with monkeypatch.context() as patch:
        _ask_to_stop(patch, event, at)
        try:
          loop.run(program, tmp_path)
        except signals.Stopped:
          stops += 1
  assert stops > 3
  loop.run(program, tmp_path)
  assert _bytes(tmp_path) == _bytes(unbroken)


@pytest.mark.parametrize('evaluations', [0, LOWER, PATIENCE])
def test_a_run_killed_between_an_evaluation_and_its_save_ends_with_the_same(
  program, unbroken, best, tmp_path, monkeypatch, evaluations
):
  at = best + EVERY * evaluations
  evaluated = writer.Writer.evaluated

  def die(self, step, values):
    evaluated(self, step, values)
    if step == at:
      raise MemoryError  # Any error that nobody catches.

  with monkeypatch.context() as patch:
    patch.setattr(writer.Writer, 'evaluated', die)
    with pytest.raises(MemoryError):
      loop.run(program, tmp_path)
  assert max(_scores(tmp_path)) == at
  assert not (tmp_path / 'checkpoints' / f'{at}').exists()
  loop.run(program, tmp_path)
  assert _bytes(tmp_path) == _bytes(unbroken)


def test_lines_far_ahead_of_the_newest_checkpoint_are_made_again(
  program, unbroken, best, tmp_path
):
  workdir = shutil.copytree(unbroken, tmp_path / 'run')
  file = workdir / 'metrics.jsonl'
  lines = file.read_text().splitlines(keepends=True)
  file.write_text(''.join(lines[:-1]))  # It was not tested yet.
  shutil.rmtree(workdir / 'checkpoints' / f'{best + EVERY * PATIENCE}')
  shutil.rmtree(workdir / 'evaluations')
  loop.run(program, workdir)
  assert _bytes(workdir) == _bytes(unbroken)


def test_a_program_made_anew_goes_on_where_the_old_one_stopped(
  program, unbroken, best, tmp_path, monkeypatch
):
  """As a process of its own does; the other tests share one program."""
  with monkeypatch.context() as patch:
    _ask_to_stop(patch, 'stepped', best + 1)
    with pytest.raises(signals.Stopped):
      loop.run(program, tmp_path)
  loop.train_and_evaluate(FULL, tmp_path)
  assert _bytes(tmp_path) == _bytes(unbroken)


# ------------------------------------------------------------ finished or not


def test_a_run_that_stopped_early_has_finished(program, unbroken, capsys):
  before = _all_bytes(unbroken)
  final = loop.run(program, unbroken)
  assert f'{unbroken} had finished before' in capsys.readouterr().out
  line = writer.read(unbroken / 'metrics.jsonl')[-1]
  assert final == {k: v for k, v in line.items() if k != 'step'}
  assert _all_bytes(unbroken) == before


def _all_bytes(workdir):
  return {
    path: (path.read_bytes(), path.stat().st_mtime_ns)
    for path in workdir.rglob('*')
    if path.is_file() and path.name not in ('config.json', '.lock')
  }


def test_more_steps_do_not_wake_a_run_that_stopped_early(
  program, unbroken, tmp_path, capsys
):
  workdir = shutil.copytree(unbroken, tmp_path / 'run')
  loop.run(_with(program, total_steps=300), workdir)
  assert 'had finished before' in capsys.readouterr().out
  assert _bytes(workdir) == _bytes(unbroken)


def _with(program, **fields):
  """The program of a config with other fields, which no step reads."""
  config = dataclasses.replace(program.config, **fields)
  return dataclasses.replace(program, config=config)


def test_more_steps_continue_a_run_that_had_not_stopped_early(
  program, unbroken, best, tmp_path
):
  short = best + EVERY
  final = loop.run(_with(program, total_steps=short), tmp_path)
  lines = writer.read(tmp_path / 'metrics.jsonl')
  assert max(line['step'] for line in lines) == short
  # Test is of the best also where the steps have run out.
  assert lines[-1] == {'step': best, **final}
  loop.run(program, tmp_path)
  assert _bytes(tmp_path) == _bytes(unbroken)


@pytest.mark.parametrize(
  'fields',
  [
    {},
    {'early_stopping': config_lib.EarlyStopping()},
    {'schedule': {'name': 'constant_schedule', 'value': RATE}},
  ],
  ids=['both', 'plateau', 'early stopping'],
)
def test_evaluations_that_decide_come_as_often_as_they_did(
  program, unbroken, tmp_path, fields
):
  # The plateau alone, early stopping alone: as if the run had begun so.
  workdir = shutil.copytree(unbroken, tmp_path / 'run')
  changed = _with(program, **fields)
  (workdir / 'config.json').write_text(config_lib.to_json(changed.config))
  before = _all_bytes(workdir)
  with pytest.raises(
    config_lib.UserError, match='config.eval_every was 2 and is 1;'
  ) as error:
    loop.run(_with(changed, eval_every=1), workdir)
  assert '\n' not in str(error.value)
  assert _all_bytes(workdir) == before


def test_evaluations_that_decide_nothing_may_come_more_often(program, tmp_path):
  config = dataclasses.replace(
    program.config,
    early_stopping=config_lib.EarlyStopping(),
    schedule={'name': 'constant_schedule', 'value': RATE},
  )
  with workdir_lib.claimed(tmp_path, config, print):
    pass
  said = []
  more = dataclasses.replace(config, eval_every=1)
  with workdir_lib.claimed(tmp_path, more, said.append):
    pass
  assert said == ['resuming with config.eval_every 1, which was 2']


# ------------------------------------------------------- what evaluations do


def _rates(workdir) -> dict[int, float]:
  return {
    line['step']: line['train/learning_rate']
    for line in writer.read(workdir / 'metrics.jsonl')
    if 'train/learning_rate' in line
  }


def test_the_rate_falls_after_the_evaluation_that_is_too_many(unbroken):
  scores = _scores(unbroken)
  rate, least, bad = RATE, float('inf'), 0
  expected = {}
  for step in range(1, max(scores) + 1):
    expected[step] = rate  # Of this step; its evaluation comes after it.
    if step not in scores:
      continue
    bad = 0 if scores[step] < least else bad + 1
    least = min(least, scores[step])
    if bad == LOWER:
      rate, bad = rate / 2, 0
  assert len(set(expected.values())) > 1
  assert _rates(unbroken) == pytest.approx(expected, rel=1e-6)


def test_a_run_that_may_stop_early_returns_its_best(unbroken, best):
  lines = writer.read(unbroken / 'metrics.jsonl')
  (tested,) = (line for line in lines if 'test/loss' in line)
  (at_best,) = (
    line for line in lines if line['step'] == best and 'eval/loss' in line
  )
  # Without a validation part, both are over the same examples.
  assert tested == {k.replace('eval/', 'test/'): v for k, v in at_best.items()}
  assert tested is lines[-1]
  (kept,) = (unbroken / 'evaluations').iterdir()
  assert kept.name == f'test-{best}.json'
  assert json.loads(kept.read_text())['loss'] == tested['test/loss']


# --------------------------------------------------------------- TensorBoard


def test_events_after_a_stop_and_a_kill_are_the_lines_of_metrics_once_each(
  tmp_path, monkeypatch
):
  pytest.importorskip('tensorboardX')
  config = runs.config(
    total_steps=9, log_every=2, eval_every=3, tensorboard=True
  )
  program = program_lib.create(config)
  with monkeypatch.context() as patch:
    _ask_to_stop(patch, 'stepped', 5)
    with pytest.raises(signals.Stopped):
      loop.run(program, tmp_path)
  evaluated = writer.Writer.evaluated

  def die(self, step, values):
    evaluated(self, step, values)
    raise MemoryError

  with monkeypatch.context() as patch:
    patch.setattr(writer.Writer, 'evaluated', die)
    with pytest.raises(MemoryError):  # At step 6, which is not saved.
      loop.run(program, tmp_path)
  loop.run(program, tmp_path)
  expected = [
    (line['step'], name, pytest.approx(value, rel=1e-6))
    for line in writer.read(tmp_path / 'metrics.jsonl')
    for name, value in line.items()
    if name != 'step'
  ]
  events = _events((tmp_path / 'tensorboard').iterdir())
  assert sorted(events, key=lambda e: e[:2]) == sorted(
    expected, key=lambda e: e[:2]
  )


def test_asking_for_events_later_is_allowed_and_changes_no_parameter(
  tmp_path, monkeypatch
):
  pytest.importorskip('tensorboardX')
  program = program_lib.create(runs.config())
  loop.run(program, tmp_path / 'without')
  with monkeypatch.context() as patch:
    _ask_to_stop(patch, 'stepped', 6)
    with pytest.raises(signals.Stopped):
      loop.run(program, tmp_path / 'with')
  assert not (tmp_path / 'with' / 'tensorboard').exists()
  loop.run(_with(program, tensorboard=True), tmp_path / 'with')
  assert _bytes(tmp_path / 'with') == _bytes(tmp_path / 'without')
  events = _events((tmp_path / 'with' / 'tensorboard').iterdir())
  assert {step for step, _, _ in events} == {4, 8, 12}  # The earlier too.


def _events(files) -> list[tuple[int, str, float]]:
  """(step, name, value) of event files, as TensorBoard shows them.

  A file that begins again at a step takes the place of what is from there on.
  TensorBoard reads them by their names, which begin with the time.
  """
  from tensorboardX.proto import event_pb2

  events = []
  for file in sorted(files):
    data = file.read_bytes()
    while data:  # A length, its checksum, the record, its checksum.
      (length,) = struct.unpack('<Q', data[:8])
      event = event_pb2.Event.FromString(data[12 : 12 + length])
      data = data[12 + length + 4 :]
      if event.session_log.status == event_pb2.SessionLog.START:
        events = [e for e in events if e[0] < event.step]
      for value in event.summary.value:
        events.append((event.step, value.tag, value.simple_value))
  return events
