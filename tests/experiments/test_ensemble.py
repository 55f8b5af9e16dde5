"""An ensemble of runs, against float64 NumPy over what its members give."""

import dataclasses
import json
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import scipy.special
import sklearn.metrics

from experiments import command
from experiments import ensemble
from experiments import restore
from tests import conftest
from tests import runs
from tests.train import test_evaluate
from train import config as config_lib
from train import evaluate
from train import loop
from train import program as program_lib
from train import workdir as workdir_lib
from train.data import sources

DATA = config_lib.Data
# Three models, normalizations, batch sizes; weak, so that they do not agree.
MEMBERS = {
  'mlp': runs.config(
    data=DATA(batch_size=64, folds=5, fold=0), ema_decay=0.5, seed=1
  ),
  'linear': runs.config(
    data=DATA(batch_size=50, folds=5, fold=1, normalize='unit'),
    model={'name': 'linear'},
  ),
  'tanh': runs.config(
    data=DATA(batch_size=40, normalize='symmetric'),
    model={'name': 'mlp', 'widths': (16,), 'activation': 'tanh'},
  ),
}


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """The folder of the three runs."""
  folder = tmp_path_factory.mktemp('members')
  for name, config in MEMBERS.items():
    loop.train_and_evaluate(config, folder / name)
  return folder


@pytest.fixture
def evaluated(capsys):
  """evaluated('--workdir=...') -> the JSON and the lines of the command."""

  def evaluated(*words):
    capsys.readouterr()
    assert command.run('ensemble', ensemble.main, words) == 0
    out, lines = capsys.readouterr()
    return json.loads(out), lines.splitlines()

  return evaluated


@pytest.fixture
def refused(capsys):
  """refused('--workdir=...') -> the one line of the command."""

  def refused(*words):
    capsys.readouterr()
    assert command.run('ensemble', ensemble.main, words) == 2
    out, line = capsys.readouterr()
    assert not out
    assert line.count('\n') == 1, line
    return line

  return refused


def joined(folder, names=MEMBERS):
  return '--workdir=' + ','.join(str(folder / name) for name in names)


def logits_by_the_models(workdir, split='test'):
  """float64 [n, K]: the model called by hand on all examples at once."""
  config = workdir_lib.read_config(workdir)
  program = program_lib.create(config, training=False)
  state, _ = restore.restore(workdir, program, 'best')
  pixels = program.dataset.splits[split]
  pixels = pixels.take(np.arange(len(pixels)))['image'].astype(np.float32)
  scale = config.data.normalize
  pixels = (pixels - np.float32(scale['mean'])) / np.float32(scale['std'])
  return np.float64(program.merge(state)(pixels, train=False))


def expected_of_classes(logits, labels):
  """What an ensemble has to say of float64 logits [members, n, K]."""
  probabilities = scipy.special.softmax(logits, -1)
  mean = probabilities.mean(0)
  majority = []
  for votes, means in zip(logits.argmax(-1).T, mean, strict=True):
    counts = np.bincount(votes, minlength=len(means))
    first = np.flatnonzero(counts == counts.max())
    majority.append(max(first, key=lambda k: means[k]))
  return {
    'mean': {
      'accuracy': (mean.argmax(-1) == labels).mean(),
      'cross_entropy': pytest.approx(
        sklearn.metrics.log_loss(labels, mean), rel=1e-6
      ),
    },
    'majority': {'accuracy': (np.array(majority) == labels).mean()},
  }


# ------------------------------------------------------------------- classes


def test_mean_and_majority_are_those_of_the_models_in_float64(
  trained, evaluated
):
  found, lines = evaluated(joined(trained))
  logits = np.stack([logits_by_the_models(trained / name) for name in MEMBERS])
  labels = sources.load('digits').splits['test'].arrays['label']
  answers = logits.argmax(-1)
  assert (answers[0] != answers[1]).sum() > 20  # Else they would prove little.
  assert {'mean': found['mean'], 'majority': found['majority']} == (
    expected_of_classes(logits, labels)
  )
  assert (found['split'], found['count']) == ('test', 360)
  assert [line.split(':')[0] for line in lines] == [
    '1 of 3',
    '2 of 3',
    '3 of 3',
  ]


def test_a_members_own_metrics_are_those_of_evaluate(trained, evaluated):
  found, _ = evaluated(joined(trained), '--step=12')
  for name, entry in zip(MEMBERS, found['members'], strict=True):
    workdir = trained / name
    program = program_lib.create(workdir_lib.read_config(workdir))
    state, _ = restore.restore(workdir, program, '12')
    alone = evaluate.evaluate(program, state, 'test')
    assert entry == {
      'workdir': str(workdir),
      'step': 12,
      'loss': pytest.approx(alone['loss'], rel=1e-6),
      'accuracy': alone['accuracy'],
    }


def test_of_equal_votes_the_greater_mean_probability_wins():
  # Two votes for class 0 and two for class 2, of which those for 2 are surer;
  # class 1, which nobody names, has the greatest mean.
  p = [[0.51, 0.48, 0.01], [0.51, 0.48, 0.01], [0, 0.49, 0.51], [0, 0.44, 0.56]]
  together = ensemble._Classes(np.array([2]))
  for row in p:
    with np.errstate(divide='ignore'):
      log_p = np.log(np.array([row]))
    together.add({'log_p': log_p, 'class': log_p.argmax(-1)})
  found = together.summarize({'any'})
  assert found['majority'] == {'accuracy': 1.0}
  assert found['mean']['accuracy'] == 0.0
  assert found['mean']['cross_entropy'] == pytest.approx(-np.log(1.09 / 4))


def test_what_all_members_hold_to_be_impossible_has_a_finite_cross_entropy():
  together = ensemble._Classes(np.array([1]))
  for log_p in (-2000.0, -3000.0):
    together.add({'log_p': np.array([[0, log_p]]), 'class': np.array([0])})
  found = together.summarize({'any'})
  assert found['mean']['cross_entropy'] == pytest.approx(2000 + np.log(2))


# ------------------------------------------------------ two classes, numbers


@pytest.fixture
def of_noise(monkeypatch):
  """of_noise(task, dataset, losses) -> (the result, the members' outputs).

  Members are linear models as they begin, each of another seed.
  """
  monkeypatch.setattr(
    restore, 'restore', lambda workdir, program, step: (program.init(), 0)
  )

  def of_noise(task, dataset, losses):
    programs = [
      program_lib.create(
        runs.config(**test_evaluate.LINEAR, task=task, loss=loss, seed=seed),
        dataset,
      )
      for seed, loss in enumerate(losses)
    ]
    outputs = np.stack([
      test_evaluate._logits(program.init(), dataset.splits['test'])[:, 0]
      for program in programs
    ])  # fmt: skip
    workdirs = [pathlib.Path(f'{i}') for i in range(len(losses))]
    return ensemble.evaluate(workdirs, programs, 'test', 'best'), outputs

  return of_noise


def test_of_two_classes_the_sigmoids_are_averaged(of_noise):
  dataset = test_evaluate._dataset(101, classes=2)
  found, z = of_noise('binary_classification', dataset, [None] * 3)
  labels = dataset.splits['test'].arrays['label']
  logits = np.stack([np.zeros_like(z), z], -1)
  expected = expected_of_classes(logits, labels)
  assert {key: found[key] for key in expected} == expected


def numbers(n):
  dataset = test_evaluate._dataset(n)
  splits = {
    name: sources.Split({k: v.astype('float32') for k, v in s.arrays.items()})
    for name, s in dataset.splits.items()
  }
  return dataclasses.replace(dataset, splits=splits, classes=None)


@pytest.mark.parametrize('other', ['huber_loss', 'absolute_error'])
def test_of_numbers_the_predictions_are_averaged(of_noise, other):
  dataset = numbers(101)
  labels = dataset.splits['test'].arrays['label']
  found, z = of_noise('regression', dataset, [other] * 3)
  error = np.abs(z.mean(0) - labels)
  loss = {
    'huber_loss': np.where(error < 1, error**2 / 2, error - 0.5).mean(),
    'absolute_error': error.mean(),
  }[other]
  expected = {
    'loss': pytest.approx(loss, rel=1e-6),
    'mean_squared_error': pytest.approx((error**2).mean(), rel=1e-6),
    'mean_absolute_error': pytest.approx(error.mean(), rel=1e-6),
  }
  assert found['mean'] == expected
  del expected['loss']  # Members with other losses have none together.
  assert of_noise('regression', dataset, [other, None, other])[0]['mean'] == (
    expected
  )


# ------------------------------------------------------------ padding, memory


@pytest.mark.slow  # 7 s.
def test_each_of_10007_examples_on_eight_devices_counts_once():
  script = """
import jax
import numpy as np
from experiments import ensemble
from tests import runs
from tests.train import test_evaluate
from train import program as program_lib

dataset = test_evaluate._dataset(10_007)
split = dataset.splits['test']
program = program_lib.create(runs.config(**test_evaluate.LINEAR), dataset)
state = program.init()
values, found = ensemble.predict(program, state, 'test')
logits = test_evaluate._logits(state, split)
log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
print(
  jax.device_count(),
  len(values['loss']),
  np.array_equal(found['label'], split.arrays['label']),
  np.array_equal(found['class'], logits.argmax(-1)),
  np.allclose(found['log_p'], log_p, atol=1e-5),
)
"""
  ran = subprocess.run(
    [sys.executable, '-c', script],
    capture_output=True,
    text=True,
    cwd=conftest.REPOSITORY,
    env=conftest.environment(JAX_NUM_CPU_DEVICES='8'),
  )
  assert ran.stdout.split() == ['8', '10007', 'True', 'True', 'True'], (
    ran.stderr
  )


def test_one_member_after_the_other_is_in_memory(
  trained, evaluated, monkeypatch
):
  held, real = [], restore.restore

  def counted(*args):
    held.append(sum(array.nbytes for array in jax.live_arrays()))
    return real(*args)

  monkeypatch.setattr(restore, 'restore', counted)
  evaluated(joined(trained))
  state = program_lib.create(MEMBERS['mlp']).state_shape
  of_one = sum(
    leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)
  )
  assert held[1] - held[0] < 0.1 * of_one


# --------------------------------------------------------------------- sweeps


def sweep_json(folder, trials, **values):
  """Writes a sweep.json; trials are (state, value, workdirs)."""
  found = {
    'config': 'digits_mlp', 'search': 'random', 'metric': 'eval/accuracy',
    'direction': 'maximize', 'seeds': 1, 'folds': None, 'best': None,
    'space': {'seed': ['int', 0, 9]},
    'trials': [
      {
        'trial': i, 'params': {'seed': i}, 'state': state, 'value': value,
        'deviation': None, 'place': None,
        'runs': [
          {
            'workdir': workdir, 'seed': 0, 'fold': None, 'state': state,
            'value': value, 'step': 12, 'command': '', 'log': '', 'attempts': 1,
          }
          for workdir in workdirs
        ],
      }
      for i, (state, value, workdirs) in enumerate(trials)
    ],
  } | values  # fmt: skip
  (folder / 'sweep.json').write_text(json.dumps(found))


@pytest.fixture
def sweep(trained, tmp_path):
  """A copy of the runs, where they are trials."""
  shutil.copytree(trained, tmp_path / 'sweep')
  return tmp_path / 'sweep'


@pytest.mark.parametrize(
  ('direction', 'members'),
  [('maximize', ['linear', 'mlp']), ('minimize', ['tanh'])],
)
def test_the_best_finished_trials_of_a_sweep_are_the_members(
  sweep, evaluated, direction, members
):
  sweep_json(
    sweep,
    [
      ('failed', None, ['nowhere']),
      ('finished', 0.5, ['tanh']),
      ('pruned', 0.9, ['nowhere']),
      ('finished', 0.8, ['linear', 'mlp']),
      ('waiting', None, []),
    ],
    direction=direction,
  )
  found, _ = evaluated(f'--workdir={sweep}', '--top=1')
  assert [entry['workdir'] for entry in found['members']] == members
  kept = (sweep / 'evaluations' / 'ensemble-test.json').read_text()
  assert json.loads(kept) == found


def test_without_top_all_of_a_small_sweep_are_members(sweep, evaluated):
  sweep_json(sweep, [('finished', 0.5, ['mlp']), ('finished', 0.6, ['tanh'])])
  found, _ = evaluated(f'--workdir={sweep}')
  assert [entry['workdir'] for entry in found['members']] == ['tanh', 'mlp']


def test_more_than_have_finished_are_one_line(sweep, refused):
  sweep_json(sweep, [('finished', 0.5, ['mlp']), ('pruned', 0.6, ['tanh'])])
  line = refused(f'--workdir={sweep}', '--top=2')
  assert f'--top is 2; {sweep} has 1 finished trials' in line


@pytest.mark.parametrize(
  'workdir', ['/etc', '../mlp', 'mlp/../..', 'a\nb', None, 3]
)
def test_a_sweep_leads_nowhere_else(sweep, refused, workdir):
  sweep_json(sweep, [('finished', 0.5, [workdir])])
  line = refused(f'--workdir={sweep}')
  assert 'sweep.json is damaged: a run of trial 0 has' in line
  assert repr(workdir) in line


@pytest.mark.parametrize(
  'text',
  [
    '', '{', '[]', 'null', '3', '{}', '{"trials": 3}', '[' * 100_000,
    b'\xff\xfe', '__import__("os").mkdir("x")',
  ],
  ids=lambda text: str(text)[:12],
)  # fmt: skip
def test_a_damaged_sweep_is_one_line(sweep, refused, text):
  data = text if isinstance(text, bytes) else text.encode()
  (sweep / 'sweep.json').write_bytes(data)
  assert 'sweep.json is damaged: ' in refused(f'--workdir={sweep}')


@pytest.mark.parametrize(
  ('state', 'value'),
  [
    ('finished', 'x'), ('finished', True), ('finished', 1e999), ('done', 0.5),
    (None, 0.5), ('finished', [0.5]), ('finished', 10**400),
  ],
)  # fmt: skip
def test_a_trial_of_another_kind_is_one_line(sweep, refused, state, value):
  sweep_json(sweep, [(state, value, ['mlp'])])
  assert 'sweep.json is damaged: ' in refused(f'--workdir={sweep}')


# ------------------------------------------------------------------ bad input


def test_members_of_other_validation_examples_are_one_line(trained, refused):
  line = refused(joined(trained, ['mlp', 'linear']), '--split=validation')
  assert 'the members have not the same ' in line
  assert 'validation examples' in line


@pytest.fixture
def other(trained, tmp_path):
  """other(task='regression') -> the mlp's workdir, its config changed."""

  def other(name='other', **fields):
    data = fields.pop('data', {})
    workdir = shutil.copytree(trained / 'mlp', tmp_path / name)
    config = json.loads((workdir / 'config.json').read_text())
    config |= {**fields, 'data': config['data'] | data}
    (workdir / 'config.json').write_text(json.dumps(config))
    return workdir

  return other


CANCER = {'name': 'breast_cancer', 'normalize': None}


@pytest.mark.parametrize(
  ('fields', 'named'),
  [
    (
      {'task': 'regression', 'best_metric': 'eval/loss', 'loss': None},
      ('same task', "'classification'", "'regression'"),
    ),
    (
      {'data': CANCER, 'model': {'name': 'linear'}},
      ('same dataset', "'digits'", "'breast_cancer'"),
    ),
    ({'data': {'classes': [1, 0]}}, ('same classes', '(1, 0)')),
    (
      {
        'task': 'reconstruction',
        'best_metric': 'eval/loss',
        'loss': None,
        'model': {'name': 'autoencoder'},
      },
      ('did reconstruction', 'classification, binary_classification'),
    ),
  ],
  ids=['task', 'dataset', 'classes', 'autoencoder'],
)
def test_members_that_cannot_answer_together_are_one_line(
  trained, refused, other, fields, named
):
  workdir = other(**fields)
  line = refused(f'{joined(trained, ["tanh"])},{workdir}')
  assert str(workdir) in line
  for words in named:
    assert words in line


def test_members_whose_labels_differ_are_one_line(trained, of_noise):
  a, b = numbers(20), numbers(20)
  b.splits['test'].arrays['label'][7] += 1
  programs = [
    program_lib.create(
      runs.config(**test_evaluate.LINEAR, task='regression'), dataset
    )
    for dataset in (a, b)
  ]
  workdirs = [pathlib.Path('a'), pathlib.Path('b')]
  with pytest.raises(config_lib.UserError, match='same test labels: a has'):
    ensemble.evaluate(workdirs, programs, 'test', 'best')


@pytest.mark.parametrize(
  ('words', 'named'),
  [
    (['--workdir=mlp,mlp'], ('--workdir names', 'mlp twice')),
    (['--workdir=mlp,tanh', '--top=2'], ('--top is 2', 'sweep.json')),
    (['--workdir=mlp,nowhere'], ('nowhere holds no experiment',)),
    (['--workdir=mlp', '--top=0'], ('top', '0')),
    (['--workdir=mlp,linear', '--split=weird'], ('--split', "'weird'")),
    (['--workdir=mlp,tanh', '--split=validation'], ('--split', 'validation')),
    (['--workdir=mlp,tanh', '--step=99'], ('--step is 99',)),
    (['--workdir=,'], ('--workdir',)),
    ([], ('--workdir is missing',)),
  ],
  ids=str,
)
def test_a_wrong_word_is_named(trained, refused, monkeypatch, words, named):
  monkeypatch.chdir(trained)
  line = refused(*words)
  for part in named:
    assert part in line
