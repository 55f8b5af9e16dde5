"""Launching and evaluating, end to end, on real configs that are shrunk."""

import ast
import contextlib
import io
import json
import math
import os
import pathlib
import pickle
import re
import runpy
import shutil
import subprocess
import sys

from matplotlib import image
import numpy as np
import pytest
import sklearn.datasets
from sklearn.model_selection import train_test_split

from experiments import __main__ as overview
from experiments import command
from experiments import evaluate
from experiments import figures
from experiments import launch
from experiments.configs import digits_transfer
from tests import runs
from train import config as config_lib
from train.data import embedded
from train.data import sources
from train.data import text

REPOSITORY = pathlib.Path(__file__).parents[2]
CONFIGS = sorted((REPOSITORY / 'experiments/configs').glob('[a-z]*.py'))


def call(name, *words):
  """(exit code, stdout, stderr) of a command, in this process."""
  main = {'launch': launch.main, 'evaluate': evaluate.main}[name]
  with (
    contextlib.redirect_stdout(io.StringIO()) as out,
    contextlib.redirect_stderr(io.StringIO()) as errors,
  ):
    code = command.run(name, main, list(map(str, words)))
  return code, out.getvalue(), errors.getvalue()


def launched(*words):
  """Standard output of a launch that must finish and say nothing is wrong."""
  code, out, errors = call('launch', *words)
  assert (code, errors) == (0, '')
  return out


def evaluated(*words):
  """What evaluate prints, parsed."""
  code, out, errors = call('evaluate', *words)
  assert (code, errors) == (0, '')
  return json.loads(out, parse_constant=pytest.fail)


def lines(path):
  """The objects of a .jsonl file, which must hold nothing but JSON."""
  text = path.read_text()
  assert text.endswith('\n')
  return [
    json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()
  ]


def kind(line):
  """'train', 'eval' or 'test': the prefix of every key but step."""
  (prefix,) = {key.partition('/')[0] for key in line if key != 'step'}
  return prefix


def snapshot(folder, without=()):
  """Path -> bytes of every file below."""
  return {
    str(path.relative_to(folder)): path.read_bytes()
    for path in sorted(folder.rglob('*'))
    if path.is_file() and path.relative_to(folder).parts[0] not in without
  }


# -------------------------------------------------------------- a whole run


@pytest.fixture(scope='module')
def mlp(tmp_path_factory):
  """(workdir, stdout) of 60 steps of digits_mlp with a validation part.

  The rate jumps at step 40, so that the last checkpoint is not the best.
  """
  workdir = tmp_path_factory.mktemp('mlp') / 'deep' / 'run'
  out = launched(
    '--config=digits_mlp', '--config.total_steps=60', '--config.log_every=7',
    '--config.eval_every=20', '--config.checkpoint_every=20',
    '--config.keep_best=3', '--config.data.validation_fraction=0.1',
    '--config.schedule.name=piecewise_constant_schedule',
    '--config.schedule.init_value=0.003',
    '--config.schedule.boundaries_and_scales={40: 300.0}',
    f'--workdir={workdir}',
  )  # fmt: skip
  return workdir, out


CANCER = """
from train import config

def get_config():
  return config.Config(
    task='binary_classification',
    total_epochs=100.0,
    checkpoint_every='50e',
    data=config.Data(name='breast_cancer', batch_size=65),
    model={'name': 'linear'},
    optimizer={'name': 'adamw', 'weight_decay': 0.1},
    schedule={'name': 'cosine_decay_schedule', 'init_value': 0.01},
  )
"""


@pytest.fixture(scope='module')
def cancer(tmp_path_factory):
  """(workdir, words, stdout) of 40 steps of CANCER by another optimizer."""
  folder = tmp_path_factory.mktemp('cancer')
  workdir, file = folder / 'run', folder / 'cancer.py'
  file.write_text(CANCER)
  words = (
    f'--config={file}', '--config.total_steps=40', '--config.eval_every=20',
    '--config.log_every=10', '--config.optimizer.name=sgd',
    '--config.optimizer.momentum=0.9', f'--workdir={workdir}',
  )  # fmt: skip
  return workdir, words, launched(*words)


def test_a_run_leaves_what_it_promises(mlp):
  workdir, _ = mlp
  assert {path.name for path in workdir.iterdir()} == {
    'config.json', 'metrics.jsonl', 'timing.jsonl', 'checkpoints',
    'evaluations', 'curves.png', 'confusion.png', '.lock',
  }  # fmt: skip
  steps = {path.name for path in (workdir / 'checkpoints').iterdir()}
  assert steps == {'20', '40', '60'}
  assert {path.name for path in (workdir / 'evaluations').iterdir()} == {
    'test-60.json'
  }


def test_metrics_are_json_lines_in_the_order_of_events(mlp):
  found = lines(mlp[0] / 'metrics.jsonl')
  assert [(line['step'], kind(line)) for line in found] == [
    (7, 'train'), (14, 'train'), (20, 'eval'), (21, 'train'), (28, 'train'),
    (35, 'train'), (40, 'eval'), (42, 'train'), (49, 'train'), (56, 'train'),
    (60, 'train'), (60, 'eval'), (60, 'test'),
  ]  # fmt: skip


def test_keys_of_metrics_have_one_order_and_step_comes_first(mlp):
  orders = {'train': set(), 'eval': set(), 'test': set()}
  for line in lines(mlp[0] / 'metrics.jsonl'):
    orders[kind(line)].add(tuple(line))
    assert all(type(value) in (int, float) for value in line.values())
  assert [len(found) for found in orders.values()] == [1, 1, 1]
  for prefix, ((first, second, *rest),) in orders.items():
    assert (first, second) == ('step', f'{prefix}/loss')
    assert f'{prefix}/accuracy' in rest
  assert 'train/learning_rate' in next(iter(orders['train']))


def test_the_rate_in_metrics_follows_the_schedule(mlp):
  rates = {
    line['step']: line['train/learning_rate']
    for line in lines(mlp[0] / 'metrics.jsonl')
    if kind(line) == 'train'
  }
  assert rates[7] == rates[35] == pytest.approx(0.003)
  assert rates[49] == rates[60] == pytest.approx(0.9)


def test_timing_holds_rates_and_its_own_file(mlp):
  found = lines(mlp[0] / 'timing.jsonl')
  steps = [line['step'] for line in found]
  assert steps == sorted(steps)
  assert steps[-1] == 60
  for line in found:
    assert next(iter(line)) == 'step'
    assert line['seconds'] > 0
    assert line['examples_per_second'] == pytest.approx(
      64 * line['steps'] / line['seconds']
    )
    assert 0 <= line['waiting_share'] <= 1


@pytest.mark.parametrize('name', ['curves.png', 'confusion.png'])
def test_pictures_are_pictures_of_something(mlp, name):
  pixels = image.imread(mlp[0] / name)  # Height, width, channels in 0..1.
  assert min(pixels.shape[:2]) > 300
  ink = (pixels[..., :3].min(-1) < 0.9).mean()
  assert 0.01 < ink < 0.9


def test_a_regression_has_curves_and_no_confusion(line_20):
  assert (line_20[0] / 'curves.png').exists()
  assert not (line_20[0] / 'confusion.png').exists()


def test_the_examples_of_every_split_are_counted_on_screen(mlp):
  # Of 1,437, a tenth is held out.
  first = mlp[1].partition('digits: ')[2].partition('\n')[0]
  for words in ('1293 train', '144 validation', '360 test', 'batches of 64'):
    assert words in first


def test_plain_output_has_nothing_that_moves(mlp):
  assert not re.search(r'[\x00-\x09\x0b-\x1f\x7f]', mlp[1])
  steps = [line for line in mlp[1].splitlines() if line.startswith('step ')]
  assert len(steps) == len(lines(mlp[0] / 'metrics.jsonl'))


def test_what_to_type_next_is_on_one_line(mlp):
  workdir, out = mlp
  assert re.search(
    rf'python -m experiments\.evaluate --workdir={re.escape(str(workdir))} *\n',
    out,
  )


def test_the_learning_rate_is_shown_at_every_quarter(cancer):
  line = next(
    line for line in cancer[2].splitlines() if line.startswith('learning rate:')
  )
  rates = re.findall(r'([-+.e\d]+) at (\d+)%', line)
  assert [int(share) for _, share in rates] == [0, 25, 50, 75, 100]
  for rate, share in rates:
    cosine = 0.01 * (1 + math.cos(math.pi * int(share) / 100)) / 2
    assert float(rate) == pytest.approx(cosine, rel=5e-3, abs=1e-9)


def test_another_optimizer_says_once_what_it_drops(cancer):
  dropped = [line for line in cancer[2].splitlines() if 'drops' in line]
  assert len(dropped) == 1
  for word in ('config.optimizer', 'adamw', 'sgd', 'weight_decay=0.1'):
    assert word in dropped[0]
  block = json.loads((cancer[0] / 'config.json').read_text())['optimizer']
  assert block['name'] == 'sgd'
  assert block['momentum'] == 0.9
  assert 'weight_decay' not in block


def test_the_same_optimizer_drops_nothing(line_20):
  assert 'config.schedule: ' in line_20[2]  # Which became another.
  assert 'config.optimizer' not in line_20[2]


def test_config_json_holds_every_field_resolved(cancer):
  values = json.loads((cancer[0] / 'config.json').read_text())
  assert values['total_steps'] == 40
  assert values['total_epochs'] is None
  assert values['schedule']['decay_steps'] == 40
  assert values['checkpoint_every'] == 350  # 50 epochs of 455 / 65 steps.
  assert values['best_metric'] == 'eval/accuracy'
  assert values['model']['image_shape'] == [30]
  assert len(values['data']['normalize']['mean']) == 30
  fields = {path.partition('.')[0] for path in config_lib.fields()}
  assert set(values) == fields


# ------------------------------------------------------ the default workdir


def test_a_command_repeated_has_finished_and_another_seed_is_another_run(
  tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  words = (
    '--config=diabetes_linear', '--config.total_epochs=1.5',
    '--config.data.batch_size=177',
  )  # fmt: skip
  launched(*words)
  (workdir,) = (tmp_path / 'runs').iterdir()
  assert re.fullmatch(r'diabetes_linear-[0-9a-f]{8}', workdir.name)
  values = json.loads((workdir / 'config.json').read_text())
  assert (values['total_steps'], values['total_epochs']) == (3, None)
  before = snapshot(workdir)

  out = launched(*words)
  assert re.search(rf'{workdir.name} had finished', out)
  assert 'test/loss' in out
  assert list((tmp_path / 'runs').iterdir()) == [workdir]
  after = snapshot(workdir)
  for name in before:
    if not name.endswith('.png'):  # Drawn again, from the same numbers.
      assert after[name] == before[name], name

  launched(*words, '--config.seed=1')
  (other,) = {*(tmp_path / 'runs').iterdir()} - {workdir}
  assert re.fullmatch(r'diabetes_linear-[0-9a-f]{8}', other.name)
  metrics = [w / 'metrics.jsonl' for w in (workdir, other)]
  assert metrics[0].read_bytes() != metrics[1].read_bytes()


# ------------------------------------------------------------------ resuming


def words_of_line(steps, *more):
  """diabetes_linear under a rate that does not know how long the run is."""
  return (
    '--config=diabetes_linear', f'--config.total_steps={steps}',
    '--config.log_every=5', '--config.eval_every=10',
    '--config.checkpoint_every=10', '--config.data.batch_size=100',
    '--config.schedule.name=constant_schedule', '--config.schedule.value=0.05',
    *more,
  )  # fmt: skip


@pytest.fixture(scope='module')
def line_20(tmp_path_factory):
  """(workdir, words, stdout) of 20 steps of words_of_line."""
  workdir = tmp_path_factory.mktemp('line') / 'run'
  words = words_of_line(20, f'--workdir={workdir}')
  return workdir, words, launched(*words)


@pytest.fixture(scope='module')
def line_40(tmp_path_factory):
  """The workdir of 40 steps of words_of_line, never stopped."""
  workdir = tmp_path_factory.mktemp('line') / 'run'
  launched(*words_of_line(40, f'--workdir={workdir}'))
  return workdir


def test_more_steps_under_a_constant_rate_continue_the_run(
  line_20, line_40, tmp_path
):
  workdir = shutil.copytree(line_20[0], tmp_path / 'run')
  out = launched(*words_of_line(40, f'--workdir={workdir}'))
  said = [line for line in out.splitlines() if 'config.total_steps' in line]
  assert len(said) == 1
  assert '20' in said[0]
  assert '40' in said[0]
  assert 'resuming from step 20' in out
  assert not re.search(r'^step +([1-9]|1\d|20)/', out, re.MULTILINE)
  assert (workdir / 'metrics.jsonl').read_bytes() == (
    line_40 / 'metrics.jsonl'
  ).read_bytes()
  assert runs.digest(workdir) == runs.digest(line_40)
  assert runs.digest(workdir) != runs.digest(line_20[0])


def test_looking_more_often_is_allowed_and_changes_no_parameter(
  line_20, line_40, tmp_path
):
  workdir = shutil.copytree(line_20[0], tmp_path / 'run')
  out = launched(*words_of_line(
    40, '--config.log_every=1', '--config.eval_every=3',
    '--config.checkpoint_every=6', '--config.keep_best=2',
    f'--workdir={workdir}',
  ))  # fmt: skip
  for name, old, new in (
    ('log_every', 5, 1), ('eval_every', 10, 3), ('checkpoint_every', 10, 6),
    ('keep_best', 1, 2),
  ):  # fmt: skip
    said = [line for line in out.splitlines() if f'config.{name}' in line]
    assert len(said) == 1, said
    assert set(re.findall(r'\d+', said[0])) == {str(old), str(new)}
  steps = [
    line['step']
    for line in lines(workdir / 'metrics.jsonl')
    if kind(line) == 'train'
  ]
  assert steps == [5, 10, 15, *range(20, 41)]
  assert runs.digest(workdir) == runs.digest(line_40)


@pytest.mark.parametrize(
  ('steps', 'named'),
  [
    (80, ('config.schedule.decay_steps', '40', '80')),
    (20, ('config.total_steps', '40', '20')),
  ],
)
def test_another_length_under_a_cosine_is_refused_by_name(
  cancer, tmp_path, steps, named
):
  workdir = shutil.copytree(cancer[0], tmp_path / 'run')
  before = snapshot(workdir)
  code, _, errors = call(
    'launch', *cancer[1], f'--config.total_steps={steps}',
    f'--workdir={workdir}',
  )  # fmt: skip
  assert code == 2
  assert errors.count('\n') == 1
  for word in named:
    assert word in errors
  assert snapshot(workdir) == before


def test_fewer_steps_are_refused_under_a_constant_rate_too(line_20, tmp_path):
  workdir = shutil.copytree(line_20[0], tmp_path / 'run')
  before = snapshot(workdir)
  code, _, errors = call('launch', *words_of_line(10, f'--workdir={workdir}'))
  assert code == 2
  assert 'config.total_steps was 20 and is 10' in errors
  assert snapshot(workdir) == before


# ---------------------------------------------------------------- evaluating


def best_step(workdir):
  """The step with the highest eval/accuracy, the earlier of equals."""
  return max(
    (line['eval/accuracy'], -line['step'], line['step'])
    for line in lines(workdir / 'metrics.jsonl')
    if kind(line) == 'eval'
  )[2]


@pytest.mark.parametrize('step', ['latest', 'best', '20', '40', '60', None])
def test_evaluate_gives_what_training_wrote_to_the_last_digit(mlp, step):
  workdir, _ = mlp
  best = best_step(workdir)
  assert best != 60  # Or 'best' would be 'latest'.
  words = [f'--step={step}'] if step else []
  result = evaluated(f'--workdir={workdir}', '--split=validation', *words)
  expected = {'latest': 60, None: 60, 'best': best}.get(step) or int(step)
  assert (result['split'], result['step']) == ('validation', expected)
  (line,) = (
    line
    for line in lines(workdir / 'metrics.jsonl')
    if line['step'] == expected and kind(line) == 'eval'
  )
  for key in ('loss', 'accuracy'):
    assert result[key] == line[f'eval/{key}']
  assert result['count'] == 144


def test_evaluate_gives_the_test_line_again(mlp):
  workdir, _ = mlp
  kept = (workdir / 'evaluations' / 'test-60.json').read_text()
  code, out, _ = call('evaluate', f'--workdir={workdir}')
  assert code == 0
  assert out == kept == (workdir / 'evaluations' / 'test-60.json').read_text()
  (line,) = (
    line for line in lines(workdir / 'metrics.jsonl') if kind(line) == 'test'
  )
  result = json.loads(out)
  assert result['loss'] == line['test/loss']
  assert result['accuracy'] == line['test/accuracy']


def test_without_a_validation_part_eval_is_over_test(cancer):
  workdir = cancer[0]
  result = evaluated(f'--workdir={workdir}', '--step=40')
  by_kind = {
    kind(line): line
    for line in lines(workdir / 'metrics.jsonl')
    if line['step'] == 40
  }
  assert result['count'] == 114
  assert result['loss'] == by_kind['eval']['eval/loss']
  assert result['loss'] == by_kind['test']['test/loss']


def test_a_regression_has_a_count_and_no_classes(line_20):
  result = evaluated(f'--workdir={line_20[0]}')
  assert result['count'] == 89
  assert set(result) == {
    'split', 'step', 'loss', 'mean_squared_error', 'mean_absolute_error',
    'count',
  }  # fmt: skip
  # The config's loss is the squared error.
  assert result['loss'] == pytest.approx(result['mean_squared_error'], rel=1e-6)


def label_counts(data, split):
  """How many of each label scikit-learn's own split has."""
  parts = train_test_split(
    data.target, test_size=0.2, stratify=data.target, random_state=0
  )
  return np.bincount(parts[split == 'test']).tolist()


@pytest.mark.parametrize('split', ['train', 'test'])
@pytest.mark.parametrize('name', ['mlp', 'cancer'])
def test_the_confusion_matrix_adds_up(request, name, split):
  workdir = request.getfixturevalue(name)[0]
  result = evaluated(f'--workdir={workdir}', f'--split={split}')
  confusion = np.array(result['confusion'])
  classes = {'mlp': 10, 'cancer': 2}[name]
  assert confusion.shape == (classes, classes)
  assert confusion.min() >= 0
  assert confusion.sum() == result['count']
  assert result['accuracy'] == confusion.trace() / result['count']
  for row, entry in enumerate(result['per_class'].values()):
    right = confusion[row, row]
    assert entry['count'] == confusion[row].sum()
    assert entry['accuracy'] == right / confusion[row].sum()
    answers = confusion[:, row].sum()
    assert entry['precision'] == (right / answers if answers else None)
  if (name, split) != ('mlp', 'train'):  # Of which a tenth is held out.
    data = {
      'mlp': sklearn.datasets.load_digits,
      'cancer': sklearn.datasets.load_breast_cancer,
    }[name]()
    assert confusion.sum(1).tolist() == label_counts(data, split)


def test_the_parts_of_the_training_split_add_up(mlp):
  counts = [
    evaluated(f'--workdir={mlp[0]}', f'--split={split}')['count']
    for split in ('train', 'validation')
  ]
  assert counts == [1293, 144]


def test_evaluate_writes_nothing_but_its_result(mlp, tmp_path):
  workdir = shutil.copytree(mlp[0], tmp_path / 'run')
  before = snapshot(workdir)
  for step in ('best', '20'):
    evaluated(f'--workdir={workdir}', f'--step={step}', '--split=train')
  after = snapshot(workdir)
  added = {f'evaluations/train-{s}.json' for s in (20, best_step(workdir))}
  assert set(after) - set(before) == added
  assert {name: after[name] for name in before} == before


# ------------------------------------------------------------ early stopping


@pytest.fixture(scope='module')
def early(tmp_path_factory):
  """(workdir, stdout) of a run of 200 steps that stops early.

  The rate jumps at step 12; a running mean is evaluated.
  """
  workdir = tmp_path_factory.mktemp('early') / 'run'
  out = launched(
    '--config=digits_mlp', '--config.total_steps=200', '--config.eval_every=4',
    '--config.data.validation_fraction=0.25', '--config.model.widths=32,',
    '--config.early_stopping.patience=3',
    '--config.early_stopping.metric=eval/loss', '--config.ema_decay=0.5',
    '--config.schedule.name=piecewise_constant_schedule',
    '--config.schedule.init_value=0.003',
    '--config.schedule.boundaries_and_scales={12: 300.0}',
    f'--workdir={workdir}',
  )  # fmt: skip
  return workdir, out


def test_a_run_that_stops_early_shows_and_keeps_the_test_of_its_best(early):
  workdir, out = early
  found = lines(workdir / 'metrics.jsonl')
  losses = {
    line['step']: line['eval/loss'] for line in found if kind(line) == 'eval'
  }
  best = min(losses, key=losses.get)
  assert max(losses) == best + 3 * 4 < 200
  (tested,) = (line for line in found if kind(line) == 'test')
  assert tested['step'] == best
  assert f'the best of eval/loss is step {best}' in out
  kept = (workdir / 'evaluations' / f'test-{best}.json').read_text()
  code, again, _ = call('evaluate', f'--workdir={workdir}', '--step=best')
  assert (code, again) == (0, kept)
  assert json.loads(again)['loss'] == tested['test/loss']
  assert evaluated(f'--workdir={workdir}')['step'] == best + 3 * 4
  assert (workdir / 'confusion.png').exists()


def test_raw_parameters_are_evaluated_on_request(early, tmp_path):
  workdir = shutil.copytree(early[0], tmp_path / 'run')
  ema, raw = (
    evaluated(f'--workdir={workdir}', '--step=best', f'--params={params}')
    for params in ('ema', 'raw')
  )
  assert (ema['step'], ema['count']) == (raw['step'], raw['count'])
  assert ema['loss'] != raw['loss']
  code, _, errors = call('evaluate', f'--workdir={workdir}', '--params=mean')
  assert code == 2
  assert errors.count('\n') == 1
  assert 'params' in errors


# ---------------------------------------------------- reading never executes

PLANTED = (
  'train.py', 'jax.py', 'models.py', 'experiments.py', 'numpy.py', 'config.py',
  'sitecustomize.py', 'usercustomize.py', 'conftest.py', '__init__.py',
  'get_config.py', 'evaluations/json.py', 'checkpoints/orbax.py',
  'checkpoints/20/state/codecs.py', 'odd.pth',
)  # fmt: skip
PICKLES = (
  'state.pkl', 'config.pkl', 'checkpoints/20/state.pkl', 'metrics.npy',
  'checkpoints/20/state/aggregate.pkl', 'evaluations/test-20.npy',
)  # fmt: skip


class Touch:
  """Unpickled, it makes a file."""

  def __init__(self, marker):
    self.marker = marker

  def __reduce__(self):
    return open, (str(self.marker), 'w')


def plant(workdir, marker):
  """Fills a workdir with what must not run; the marker appears if it does."""
  code = f'import pathlib; pathlib.Path({str(marker)!r}).touch()\n'
  for name in PLANTED:
    (workdir / name).write_text(code)
  for name in PICKLES:
    (workdir / name).write_bytes(pickle.dumps(Touch(marker)))
  for odd in (
    f'$(cd {marker.parent.name}; touch {marker.name})',
    f'; touch {marker.name};',
    f'`touch {marker.name}`',
    '-rf',
    '--config=x.py',
    'a\nb',
    '%s{0}',
    '\u202etxt.yp',
  ):
    (workdir / odd.replace('/', '')).mkdir()
    (workdir / 'evaluations' / odd.replace('/', '')).touch()


def test_what_is_planted_would_run_if_it_were_read(line_20, tmp_path):
  # Without this, the next test could not fail.
  workdir = shutil.copytree(line_20[0], tmp_path / 'run')
  marker = tmp_path / 'marker'
  plant(workdir, marker)
  for act in (
    lambda: runpy.run_path(str(workdir / PLANTED[0])),
    lambda: pickle.loads((workdir / PICKLES[0]).read_bytes()).close(),
  ):
    assert not marker.exists()
    act()
    assert marker.exists()
    marker.unlink()


@pytest.mark.slow
def test_evaluating_and_resuming_execute_nothing_of_the_workdir(
  line_20, tmp_path
):
  workdir = shutil.copytree(line_20[0], tmp_path / 'run')
  marker = tmp_path / 'marker'
  plant(workdir, marker)
  words = [f'--workdir={workdir}']
  script = tmp_path / 'both.py'  # Both in one process, which imports once.
  script.write_text(f"""
from experiments import command, evaluate, launch

assert command.run('evaluate', evaluate.main, {words}) == 0
assert command.run(
  'launch', launch.main, {[*words_of_line(22), *words]}
) == 0
""")
  done = subprocess.run(
    [sys.executable, script],
    capture_output=True, text=True, cwd=tmp_path, timeout=120, check=False,
    env=os.environ | {'PYTHONPATH': str(REPOSITORY)},
  )  # fmt: skip
  told = done.stderr.splitlines()
  assert all(line.endswith('which nobody saved; unread') for line in told)
  assert (done.returncode, len(told)) == (0, 3)
  assert '"step": 20,' in done.stdout
  assert 'resuming from step 20' in done.stdout
  assert not list(tmp_path.rglob('marker*'))


# ---------------------------------------------------- commands and configs


def test_the_overview_lists_commands_and_configs_on_one_line_each():
  done = subprocess.run(
    [sys.executable, '-m', 'experiments'],
    capture_output=True, text=True, cwd=REPOSITORY, timeout=60, check=False,
    env=os.environ | {'PYTHONPATH': str(REPOSITORY)},
  )  # fmt: skip
  assert (done.returncode, done.stderr) == (0, '')
  listed = dict(re.findall(r'^  (\S+) +(\S.*)$', done.stdout, re.MULTILINE))
  for file in CONFIGS:
    doc = ast.get_docstring(ast.parse(file.read_text()))
    assert listed.pop(file.stem) == doc.splitlines()[0]
  assert {'launch', 'evaluate'} <= set(listed)
  for name in listed:
    source = (REPOSITORY / 'experiments' / f'{name}.py').read_text()
    assert "__name__ == '__main__'" in source
  assert all(listed.values())


def test_the_overview_executes_nothing(tmp_path, monkeypatch):
  code = (
    '"""{title}.\n\nMore."""\nimport pathlib\n'
    f'pathlib.Path({str(tmp_path / "marker")!r}).touch()\n'
  )
  configs = tmp_path / 'experiments' / 'configs'
  configs.mkdir(parents=True)
  (configs / 'beta.py').write_text(code.format(title='A config'))
  (configs.parent / 'helper.py').write_text(code.format(title='A helper'))
  (configs.parent / 'alpha.py').write_text(
    code.format(title='A command') + "\nif __name__ == '__main__':\n  pass\n"
  )
  monkeypatch.setattr(command, 'CONFIGS', configs)
  text = overview.text()
  assert re.search(r'^  alpha  A command\.$', text, re.MULTILINE)
  assert re.search(r'^  beta  A config\.$', text, re.MULTILINE)
  assert 'helper' not in text
  assert not (tmp_path / 'marker').exists()


@pytest.mark.parametrize('file', CONFIGS, ids=lambda file: file.stem)
def test_a_config_says_how_to_run_it(file):
  doc = ast.get_docstring(ast.parse(file.read_text()))
  first, second, *_ = doc.splitlines()
  assert first.endswith('.')
  assert second == ''
  assert re.search(
    rf'^ *python -m experiments\.launch --config={file.stem}\b',
    doc,
    re.MULTILINE,
  )
  for begins in ('Cost: ', 'Result'):
    assert any(line.startswith(begins) for line in doc.splitlines())


# What is downloaded, by the shape of its images: the tests need no network.
IMAGES = {
  'mnist': (28, 28, 1),
  'fashion_mnist': (28, 28, 1),
  'cifar10': (32, 32, 3),
}


# Too large to run here; test_recipes.py builds their programs.
UNTRIED = ('imagenet2012',)


def dataset_of(file):
  """The name of a config's dataset; the file is one of ours."""
  config, _, _ = command.load_config(str(file), [])
  return config.data.name


def random_text():
  """A text of random letters in windows, in place of Tiny Shakespeare."""
  letters = np.random.default_rng(0).integers(0, 26, 2_000)
  split = sources.Split(text.windows(letters.astype(np.uint8), 16))
  names = tuple('abcdefghijklmnopqrstuvwxyz')
  return sources.Dataset(
    'tiny_shakespeare', {'train': split, 'test': split}, names, names, 16
  )


def random_images(name):
  """A dataset of noise that looks like the one of that name."""
  generator = np.random.default_rng(0)
  splits = {
    split: sources.Split(
      {
        'image': generator.integers(
          0, 256, (size, *IMAGES[name]), dtype=np.uint8
        ),
        'label': np.arange(size, dtype=np.int32) % 10,
      }
    )
    for split, size in (('train', 600), ('test', 100))
  }
  return sources.Dataset(name, splits, tuple('0123456789'))


def cost(file):
  """The marks of a config's run: of stand-ins for large sets a few in CI."""
  if dataset_of(file) in embedded.BUILDERS:
    return [pytest.mark.slow] if file.stem == 'digits_vit' else []
  few = file.stem in ('cifar10_cnn', 'mnist_vae', 'shakespeare_lstm')
  return [pytest.mark.slow] if few else [pytest.mark.slow, pytest.mark.long]


@pytest.mark.parametrize(
  'file',
  [
    pytest.param(
      file,
      id=file.stem,
      marks=cost(file),
    )
    for file in CONFIGS
    if dataset_of(file) not in UNTRIED
  ],
)
def test_a_config_runs_and_its_schedule_is_as_long_as_the_run(
  file, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(figures, 'show', lambda *_: None)  # Tested above.
  if (name := dataset_of(file)) == 'tiny_shakespeare':
    monkeypatch.setattr(sources, 'load', lambda *_, **__: random_text())
  elif name in IMAGES:
    monkeypatch.setattr(sources, 'load', lambda *_, **__: random_images(name))
  schedule = command.load_config(str(file), [])[0].schedule
  launched(
    f'--config={file.stem}',
    *['--config.data.batch_size=16'][: name in IMAGES],  # It takes long enough.
    '--config.total_steps=3',
    '--config.log_every=1',
    # A warm-up is longer than that.
    *['--config.schedule.warmup_steps=1'][: 'warmup_steps' in schedule],
  )
  (workdir,) = (tmp_path / 'runs').iterdir()
  assert workdir.name.startswith(f'{file.stem}-')
  found = [
    (line['step'], kind(line)) for line in lines(workdir / 'metrics.jsonl')
  ]
  trained = [step for step, of in found if of == 'train']
  assert trained == [1, 2, 3]
  assert found[-2:] == [(3, 'eval'), (3, 'test')]
  schedule = json.loads((workdir / 'config.json').read_text())['schedule']
  lengths = [
    schedule[key] for key in ('decay_steps', 'transition_steps')
    if key in schedule
  ]  # fmt: skip
  assert all(length == 3 for length in lengths)
  assert lengths or schedule['name'] == 'constant_schedule'


@pytest.mark.slow
@pytest.mark.parametrize('name', ['digits_transfer', 'mnist_few_labels'])
def test_the_recipes_of_a_transfer_start_from_what_they_say(
  name, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(figures, 'show', lambda *_: None)
  if name == 'mnist_few_labels':
    monkeypatch.setattr(
      sources, 'load', lambda *_, **__: random_images('mnist')
    )
  launched(
    f'--config={name}:source', '--config.total_steps=3',
    f'--workdir=runs/{name}',
  )  # fmt: skip
  for recipe in digits_transfer.RECIPES:
    out = launched(
      f'--config={name}:{recipe}', '--config.total_steps=3',
      f'--workdir=runs/{recipe}',
    )  # fmt: skip
    said = f'parameters of {tmp_path / "runs" / name}, step 3; new: head/bias'
    assert (said in out) == (recipe != 'scratch')


def test_evaluating_from_inside_the_workdir_executes_nothing_either(
  tmp_path, run
):
  """`python -m` puts the current folder first on the path."""
  plant = "open('executed', 'w')\nraise SystemExit(9)\n"
  for name in ('jax', 'absl', 'numpy', 'train', 'pathlib'):
    (tmp_path / f'{name}.py').write_text(plant)
  ran = run('evaluate', '--workdir=.', cwd=tmp_path)
  assert ran.returncode == 2, ran.stderr
  assert 'holds no experiment' in ran.stderr
  assert not (tmp_path / 'executed').exists()
