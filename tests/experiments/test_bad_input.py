"""A user's mistake is one line that names it, exit code 2, and nothing else.

Each row of a table is one mistake: what is typed, and what the line must name.
"""

import ast
import importlib.util
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import pytest

from experiments import command
from experiments import evaluate
from experiments import launch
from train import loop

REPOSITORY = pathlib.Path(__file__).parents[2]
MAINS = {'launch': launch.main, 'evaluate': evaluate.main}
# What training and evaluation compile; tiny helpers of jax.numpy do not count.
STEPS = {'jit(init)', 'jit(train_step)', 'jit(eval_step)'}


def snapshot(folder):
  """Path -> bytes of every file below, None for a folder."""
  return {
    str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
    for path in sorted(folder.rglob('*'))
  }


@pytest.fixture
def compiled():
  """The names of the functions that XLA compiled during the test."""
  names = []

  def listen(event, duration, **kwargs):
    del duration
    if event == '/jax/core/compile/backend_compile_duration':
      names.append(kwargs.get('fun_name'))

  jax.monitoring.register_event_duration_secs_listener(listen)
  yield names
  jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys, compiled):
  """refused('launch', words) -> the one line, of a command that must refuse.

  The command runs inside tmp_path, which it must leave as it is.
  """
  monkeypatch.chdir(tmp_path)
  # A mistake that nobody notices fails at once, and does not train for long.
  monkeypatch.setattr(loop, 'fit', lambda *_: pytest.fail('training began'))

  def refused(name, words):
    before = snapshot(tmp_path)
    capsys.readouterr()
    code = command.run(name, MAINS[name], words)
    errors = capsys.readouterr().err
    assert code == 2, errors
    assert errors.count('\n') == 1, errors
    assert errors.endswith('\n')
    assert errors.startswith(f'{name}: ')
    assert not STEPS & set(compiled)
    assert snapshot(tmp_path) == before
    return errors

  return refused


def names(line, wanted):
  """Whether the line has each of these, as words of their own."""
  missing = [
    word
    for word in wanted
    if not re.search(rf'(?<!\w)(?<!\d\.){re.escape(word)}(?!\w|\.\d)', line)
  ]
  assert not missing, f'{missing} not in: {line}'


def shown(text):
  """What a person typed, as Python shows it: 1e-9 is 1e-09, none is None."""
  words = {'none': 'None', 'true': 'True', '': "''"}
  try:
    return repr(ast.literal_eval(text))
  except (ValueError, SyntaxError):
    return words.get(text, text)


# ------------------------------------------------------------ config fields


def field(path, *texts, config='digits_mlp', with_=(), named=None):
  """One row for each text given to a field: it and the text must be named.

  Args:
    path: of the field.
    *texts: what is typed for it, in turn.
    config: on which config.
    with_: further words of the command.
    named: what must be named besides the text, in place of the path.
  """
  for text in texts:
    flag = f'--config.{path}={text}'
    yield pytest.param(
      config,
      (*with_, flag),
      (*(named or (f'config.{path}',)), shown(text)),
      id=' '.join((config, *with_, flag)),
    )


def row(config, *words, named):
  """A row that says itself what must be named."""
  return pytest.param(config, words, named, id=' '.join((config, *words)))


NOT_NAMES = (
  'nosuch', '__builtins__', '__import__', '__class__', 'os.system', 'eval',
  '',
)  # fmt: skip
NOT_WORDS = ('none', '3', 'true', '(1, 2)')
CNN, SVM, LINE = 'digits_cnn', 'cancer_svm', 'diabetes_linear'
SGD = ('--config.optimizer.name=sgd',)
CONSTANT = ('--config.schedule.name=constant_schedule',)

UNKNOWN_FIELDS = [
  row(
    'digits_mlp', '--config.sed=1',
    named=('config.sed', 'did you mean config.seed'),
  ),
  row(
    'digits_mlp', '--config.data.batchsize=8',
    named=('config.data.batchsize', 'did you mean config.data.batch_size'),
  ),
  row(
    'digits_mlp', '--config.totl_steps=8',
    named=('config.totl_steps', 'did you mean config.total_steps'),
  ),
  row(
    'digits_mlp', '--config.model.widhts=8,8',
    named=('config.model.widhts', 'did you mean widths', 'mlp'),
  ),
  row(
    'digits_mlp', *SGD, '--config.optimizer.momentm=0.9',
    named=('config.optimizer.momentm', 'did you mean momentum', 'sgd'),
  ),
  row(
    'digits_mlp', '--config.schedule.init_valeu=1',
    named=(
      'config.schedule.init_valeu', 'did you mean init_value',
      'cosine_decay_schedule',
    ),
  ),
  # Nothing comes close: the line lists what there is.
  row('digits_mlp', '--config.zzz=1', named=('config.zzz', 'config.seed')),
  row(
    'digits_mlp', '--config.data.zzz=1',
    named=('config.data.zzz', 'config.data.name'),
  ),
  row('digits_mlp', '--config.model.zzz=1', named=('config.model.zzz', 'mlp')),
  row(
    'digits_mlp', '--config.optimizer.zzz=1',
    named=('config.optimizer.zzz', 'adamw'),
  ),
  row('digits_mlp', '--config.seed.a=1', named=('config.seed.a',)),
  row('digits_mlp', '--config.model.a.b=1', named=('config.model.a.b',)),
  row('digits_mlp', '--config.__class__=1', named=('config.__class__',)),
  row(
    'digits_mlp', '--config.data.__dict__=1', named=('config.data.__dict__',)
  ),
  row('digits_mlp', '--config.=1', named=('config.',)),
  row('digits_mlp', '--config.model.=1', named=('config.model.',)),
  # A block is set one argument at a time.
  row('digits_mlp', '--config.model=x', named=('config.model.name',)),
  row('digits_mlp', '--config.optimizer=x', named=('config.optimizer.name',)),
  row('digits_mlp', '--config.data=x', named=('config.data',)),
  # What the program passes itself is no argument.
  row('digits_mlp', '--config.model.rngs=1', named=('config.model.rngs',)),
  row('digits_mlp', '--config.model.dtype=x', named=('config.model.dtype',)),
]  # fmt: skip

FIELDS = [
  *field('seed', '-1', '1099511627776', '1.5', 'abc', 'none', 'true', ''),
  # Steps and epochs.
  *field('total_steps', '0', '-5', '1.5', 'many', 'true', '2147483648'),
  *field(
    'total_epochs', '0.0', '-1.5', 'nan', 'inf', 'many', 'true', '1e300', '1e12'
  ),
  row(
    LINE, '--config.total_steps=none',
    named=('config.total_steps', 'config.total_epochs', 'None'),
  ),
  row(
    'digits_mlp', '--config.total_steps=7', '--config.total_epochs=2.5',
    named=('config.total_steps', 'config.total_epochs', '7', '2.5'),
  ),
  *field('log_every', 'x', '0', '-1', '0e', '-1e', '2f', 'e', '1.5', 'none'),
  *field('eval_every', 'x', '0', '1e5', 'nane', 'true'),
  *field('checkpoint_every', 'x', '0', 'inf', '(1, 2)'),
  *field('keep_best', '-1', 'x', '1.5', 'none'),
  *field('on_save_error', 'x', '3', 'none', ''),
  *field('best_metric', 'eval/weird', 'accuracy', 'test/accuracy', '3'),
  *field('best_metric', 'eval/accuracy', config=LINE),
  # Data.
  *field('data.name', *NOT_NAMES, *NOT_WORDS, '../digits', 'Digits',
         'digits:9.9.9', 'kmnist'),
  *field('data.data_dir', '3', '/proc/nowhere', '/dev/null/data'),
  *field(
    'data.batch_size',
    '0', '-1', '1.5', 'abc', 'none', 'true', '(64, 64)', '100000000',
    '1099511627776',
  ),
  *field(
    'data.validation_fraction',
    '1.0', '1', '-0.1', '1e-9', '0.9999', 'nan', 'half',
  ),
  *field('data.folds', '1', '-5', '2.5', 'many', '1438', '1099511627776',
         with_=('--config.data.fold=0',)),
  *field('data.fold', '-1', '5', '0.5', 'first', 'none',
         with_=('--config.data.folds=5',)),
  row(
    'digits_mlp', '--config.data.folds=5', '--config.data.fold=0',
    '--config.data.validation_fraction=0.25',
    named=('config.data.folds', '5', 'config.data.validation_fraction', '0.25'),
  ),
  *field('data.normalize', 'weird', '3', "{'mean': (0.0,)}"),
  *(
    row(
      'digits_mlp', f'--config.data.normalize={text}',
      named=('config.data.normalize', part),
    )
    for text, part in (
      ("{'mean': (0.5,), 'std': (0.0,)}", 'std (0.0,)'),
      ("{'mean': (0.5,), 'std': (-1.0,)}", 'std (-1.0,)'),
      ("{'mean': ('a',), 'std': (1.0,)}", "mean ('a',)"),
      ("{'mean': (0, 0), 'std': (1, 1)}", 'mean (0, 0)'),
      ("{'mean': 0.5, 'std': 1.0}", 'mean 0.5'),
    )
  ),
  # Task and loss.
  *field('task', *NOT_NAMES, *NOT_WORDS),
  *field('loss', *NOT_NAMES, *NOT_WORDS[1:]),  # None is the task's own.
  *field('loss', 'squared_error', 'hinge_loss', 'sigmoid_focal_loss'),
  *field('task', 'regression', 'binary_classification',
         with_=('--config.loss=none',)),
  *field('task', 'classification', 'binary_classification', config=LINE,
         with_=('--config.loss=none',)),
  # The model's name and arguments.
  *(
    line
    for block in ('model', 'optimizer', 'schedule')
    for line in field(
      f'{block}.name', *NOT_WORDS, named=(f'config.{block}', 'name')
    )
  ),
  *field('model.name', *NOT_NAMES, 'MLP', 'create', 'layers'),
  *field('model.name', 'cnn', config=SVM, named=('config.model', '(30,)')),
  *field('model.activation', 'weird', 'none', '3',
         named=('config.model', 'activation')),
  *field('model.widths', 'wide', '8', '0,8', '-1,', '8,a', '8.5,4',
         named=('config.model', 'widths')),
  *field('model.dropout', '1.5', '-1', 'x', 'nan',
         named=('config.model', 'dropout')),
  *field('model.num_classes', '5', named=('config.model', '10')),
  *field('model.num_classes', '0', '-1', 'x', '1.5',
         named=('config.model', 'num_classes')),
  *field('model.image_shape', '5', 'x', '0,0', '4,4,1',
         named=('config.model', 'image_shape')),
  *field('model.norm', 'weird', '3', config=CNN,
         named=('config.model', 'norm')),
  *field('model.pool', 'weird', '3', config=CNN,
         named=('config.model', 'pool')),
  *field('model.kernel_size', '0', '-1', '1.5', 'x', config=CNN,
         named=('config.model', 'kernel_size')),
  *field('model.head_widths', 'x', '0,', '-8,', config=CNN,
         named=('config.model', 'head_widths')),
  row(  # 8x8 can be halved three times.
    CNN, '--config.model.widths=8,8,8,8,8', named=('config.model', '(8, 8, 1)')
  ),
  # The optimizer's.
  *field('optimizer.name', *NOT_NAMES, 'Adam', 'chain', 'scale_by_adam',
         'apply_updates', 'contrib'),
  *field('optimizer.b1', 'word', 'nan', 'inf', 'true', '(1, 2)'),
  *field('optimizer.weight_decay', 'word', '-inf'),
  *field('optimizer.nesterov', '3', 'maybe'),
  *field('optimizer.mu_dtype', 'weird', named=('config.optimizer',)),
  *field('optimizer.momentum', 'word', with_=SGD, named=('config.optimizer',)),
  row(
    'digits_mlp', '--config.optimizer.learning_rate=0.1',
    named=('config.optimizer.learning_rate', 'config.schedule', '0.1'),
  ),
  # The schedule's: the rate.
  *field('schedule.name', *NOT_NAMES, 'join_schedules', 'Schedule',
         'inject_hyperparams'),
  *field('schedule.init_value', 'nan', 'inf', '-inf', '-0.1', 'word', 'true',
         '(1, 2)', named=('config.schedule',)),
  *field('schedule.value', 'nan', 'inf', '-0.1', 'word', 'none',
         with_=CONSTANT, named=('config.schedule',)),
  *field('schedule.alpha', 'word', 'nan'),
  *field('schedule.decay_steps', '0', '-5', 'word',
         named=('config.schedule',)),
  row(
    'digits_mlp', *CONSTANT,
    named=('config.schedule.value', 'constant_schedule'),
  ),
]  # fmt: skip


PATIENCE = ('--config.early_stopping.patience=3',)
PLATEAU = (
  '--config.schedule.name=reduce_on_plateau', '--config.schedule.value=0.1',
)  # fmt: skip
HINGE = ('--config.loss=multiclass_hinge_loss',)

RECIPES = [
  # Early stopping, and what it returns.
  *field('early_stopping.patience', '0', '-1', '1.5', 'x', 'true'),
  *field('early_stopping.metric', 'eval/weird', 'accuracy', '3'),
  *field('keep_best', '0', with_=PATIENCE),
  row(
    'digits_mlp', '--config.best_metric=eval/accuracy',
    '--config.early_stopping.metric=eval/loss',
    named=(
      'config.best_metric', 'config.early_stopping.metric', "'eval/accuracy'",
      "'eval/loss'",
    ),
  ),
  row(
    'digits_mlp', '--config.early_stopping=3',
    named=('config.early_stopping', 'config.early_stopping.metric'),
  ),
  row(
    'digits_mlp', '--config.early_stoping.patience=3',
    named=('config.early_stoping.patience', 'config.early_stopping.patience'),
  ),
  # The objective.
  *field('partition', 'pmap', 'none', '3'),
  *field('remat', 'all', 'true', '3'),
  *field('sync_batch_norm', 'none', '3', 'sometimes'),
  row('digits_mlp', '--config.sync_batch_norm=false',
      named=('config.sync_batch_norm', 'False', 'shard_map')),
  row('digits_mlp', '--config.dtype=float64',
      named=('config.dtype', 'float64', 'JAX_ENABLE_X64=1')),
  *field('mesh.data', '0', '-2', '1.5', 'all', 'none'),
  *field('mesh.fsdp', '0', '-2', 'nan'),
  *field('mesh.tensor', '0', str(2**40)),
  row('digits_mlp', '--config.mesh=8', named=('config.mesh',)),
  row('digits_mlp', '--config.mesh.pipeline=2',
      named=('config.mesh.pipeline', 'config.mesh.tensor')),
  row('digits_mlp', '--config.mesh.fsdp=-1',
      named=('config.mesh', 'data -1', 'fsdp -1', 'one axis')),
  row('digits_mlp', '--config.mesh.data=3',
      named=('config.mesh', 'data 3', 'there is 1', 'the nearest is data 1')),
  row('digits_mlp', '--config.mesh.tensor=2',
      named=('config.mesh', 'tensor 2', 'a multiple of 2', 'there is 1')),
  *field('kernels', 'cuda', 'none', '3'),
  *field('kernels', 'pallas_tpu', named=('config.kernels', 'TPU', 'cpu')),
  *field('kernels', 'pallas_gpu', named=('config.kernels', 'GPU', 'cpu')),
  *field('label_smoothing', '1.0', '-0.1', 'nan', 'x', 'true', 'none'),
  *field('label_smoothing', '0.1', with_=HINGE,
         named=('config.label_smoothing', 'config.loss',
                'multiclass_hinge_loss')),
  *field('label_smoothing', '0.1', config=SVM,
         named=('config.label_smoothing', 'config.loss', 'hinge_loss')),
  *field('label_smoothing', '0.1', config=LINE,
         named=('config.label_smoothing', 'config.loss')),
  *field('l1', '-0.001', 'inf', 'x', 'true', 'none'),
  *field('l2', '-0.001', 'nan', 'x', 'none'),
  *field('weight_decay_mask', '1', 'x', 'none'),
  row(
    'digits_mlp', *SGD, '--config.weight_decay_mask=true',
    named=('config.weight_decay_mask', 'true', 'sgd', 'config.l2'),
  ),
  *field('grad_clip_value', '0.0', '-1.0', 'nan', 'x', 'true'),
  *field('grad_clip_norm', '0.0', '-1.0', 'inf', 'x'),
  # Rates.
  *field('rate_multipliers', '3', 'blocks', 'none', '()'),
  *(
    row(
      'digits_mlp', f'--config.rate_multipliers={text}',
      named=('config.rate_multipliers', *named),
    )
    for text, named in (
      ("{'blocks': -1.0}", ("'blocks'", '-1.0', 'at least 0')),
      ("{'blocks': 'x'}", ("'blocks'", "'x'")),
      ("{'blocks': True}", ("'blocks'", 'True')),
      ("{'blocks': (0.0, 1.0)}", ("'blocks'", '(0.0, 1.0)')),
      ("{3: 0.5}", ('3',)),
      ("{'block/0': 0.0}", ("'block/0'", 'blocks/0/kernel')),
      ("{'kernel': 0.0}", ("'kernel'", 'blocks/0/kernel')),
      ("{'blocks': 0.5, 'heed': 0.0}", ("'heed'", 'head/bias')),
      ("{'.*': 0.0}", ('freezes', '0.0')),
      ("{'head': 0.0, 'blocks': 0}", ('freezes',)),
      ("{'(': 0.0}", ("'('", 'regular expression')),
    )
  ),
  *field('ema_decay', '0.0', '1.0', '-0.5', '1.5', 'nan', 'x', 'true'),
  *(
    row(
      'digits_mlp', '--config.ema_decay=0.9',
      f'--config.optimizer.name={name}', *CONSTANT,
      '--config.schedule.value=0.1',
      named=('config.ema_decay', '0.9', name),
    )
    for name in ('schedule_free_sgd', 'schedule_free_adamw')
  ),
  # Recipes that exclude each other.
  row(
    'digits_mlp', '--config.optimizer.name=prodigy', '--config.l1=0.001',
    named=('config.l1', '0.001', 'prodigy'),
  ),
  row(
    'digits_mlp', '--config.optimizer.name=schedule_free_sgd', *PLATEAU,
    named=('config.schedule.name', 'reduce_on_plateau', 'schedule_free_sgd'),
  ),
  row(
    'digits_mlp', '--config.optimizer.name=schedule_free_adamw', *CONSTANT,
    '--config.schedule.value=0.1', "--config.rate_multipliers={'blocks': 0.5}",
    named=('config.rate_multipliers', "'blocks'", '0.5', 'schedule_free_adamw'),
  ),
  row(
    'digits_mlp', '--config.optimizer.name=muon',
    '--config.optimizer.adam_weight_decay=0.1',
    '--config.weight_decay_mask=true',
    named=('config.weight_decay_mask', 'config.optimizer.adam_weight_decay'),
  ),
  row(
    'digits_mlp', '--config.optimizer.name=rprop',
    named=(
      'config.schedule.name', 'cosine_decay_schedule', 'rprop',
      'constant_schedule',
    ),
  ),
  *field('schedule.value', '-0.1', 'word', 'none', 'nan', 'inf', '0.0',
         with_=PLATEAU[:1], named=('config.schedule',)),
  *field('schedule.factor', '0', '1', '-0.5', '1.5', 'word', 'true',
         with_=PLATEAU, named=('config.schedule', 'factor')),
  *field('schedule.patience', '0', '-1', '1.5', 'word', with_=PLATEAU,
         named=('config.schedule', 'patience')),
  *field('schedule.cooldown', '-1', '0.5', 'word', with_=PLATEAU,
         named=('config.schedule', 'cooldown')),
  *field('schedule.min_value', '-0.1', '0.2', 'word', with_=PLATEAU,
         named=('config.schedule', 'min_value')),
  row(
    'digits_mlp', *PLATEAU[:1],
    named=('config.schedule.value', 'reduce_on_plateau'),
  ),
  # Computing.
  *field('accumulate', '0', '-2', '1.5', 'x', 'none', 'true'),
  *field('accumulate', '3', '65', '128',
         named=('config.accumulate', 'config.data.batch_size', '64')),
  *field('dtype', 'float16', 'float64', 'bf16', '', *NOT_WORDS),
  *field('tensorboard', '1', 'x', 'none'),
  # The data.
  *field('data.augment', '3', 'none', 'true'),
  *(
    row(
      'digits_cnn', f'--config.data.augment={text}',
      named=(f'config.data.augment.{place}', *named),
    )
    for text, place, named in (
      ('nosuch', '0', ("'nosuch'", 'flip', 'mixup')),
      ('flp', '0', ("'flp'", "did you mean 'flip'")),
      ('flip,nosuch', '1', ("'nosuch'", 'pad_crop')),
      ('__import__', '0', ("'__import__'", 'flip')),
      ('flip,flip', '1', ("'flip'", 'once')),
      ('mixup,cutmix', '1', ("'mixup'", "'cutmix'")),
      ('(3,)', '0', ('3', 'name')),
      ("({'padding': 1},)", '0', ("{'padding': 1}", 'name')),
      ("({'name': 'flip', 'ratio': 1},)", '0.ratio', ('probability',)),
      ("({'name': 'flip', 'probability': 2},)", '0.probability', ('2', '1')),
      ("({'name': 'pad_crop', 'padding': 8},)", '0.padding', ('8', '7')),
      ("({'name': 'mixup', 'alpha': 0},)", '0.alpha', ('0', '0.01')),
      ("({'name': 'mixup', 'alpha': 'x'},)", '0.alpha', ("'x'", 'a number')),
    )
  ),
  *field('data.augment', 'flip', config=SVM, named=('config.data.augment.0',)),
  *field('data.max_examples', '0', '-1', '1.5', 'x', '100000', 'true'),
  *field('data.max_examples', '63',
         named=('config.data.batch_size', '64')),
  *field('data.classes', '3', 'x', '(0,)', '(0, 10)', '(0, 0)', '(-1, 0)',
         '(0, 1.0)', '(True, False)'),
  *field('data.classes', '(0, 1)', config=LINE),
  *field('data.image_size', '0', '-8', '8.5', 'x', 'true'),
  *field('data.image_size', '8', config=SVM),
  *field('data.num_workers', '-1', '0.5', 'x', 'none'),
  *field('data.on_error', 'x', '3', 'none', ''),
  # Another workdir's parameters: more in the part on workdirs.
  *field('init_from', '', '3', 'true', '(1, 2)', 'nosuch', '.', '/dev/null',
         'nosuch:best', 'nosuch:3', '/proc/nowhere'),
  row(
    'digits_mlp', f'--config.init_from={"x" * 300}', named=('config.init_from',)
  ),
  *field('init_new', 'head', '3', 'none',
         named=('config.init_new',)),
]  # fmt: skip


@pytest.mark.parametrize(
  ('config', 'words', 'named'), [*UNKNOWN_FIELDS, *FIELDS, *RECIPES]
)
def test_a_field_that_cannot_be_is_named_with_its_value(
  refused, tmp_path, config, words, named
):
  line = refused(
    'launch', [f'--config={config}', f'--workdir={tmp_path / "run"}', *words]
  )
  names(line, named)


@pytest.mark.parametrize('words', [(), ('--config.total_steps=2',)])
def test_the_tables_would_notice_a_command_that_starts(
  tmp_path, monkeypatch, compiled, words
):
  monkeypatch.chdir(tmp_path)
  assert not STEPS & set(compiled)
  words = ['--config=diabetes_linear', '--config.total_steps=1', *words]
  assert command.run('launch', launch.main, words) == 0
  assert set(compiled) >= STEPS
  assert any(path.startswith('runs/') for path in snapshot(tmp_path))


def test_events_for_tensorboard_without_tensorboardx_say_how_to_install_it(
  refused, tmp_path, monkeypatch
):
  real = importlib.util.find_spec
  monkeypatch.setattr(
    importlib.util,
    'find_spec',
    lambda name, *rest: None if name == 'tensorboardX' else real(name, *rest),
  )
  line = refused(
    'launch',
    [
      '--config=digits_mlp', '--config.tensorboard=true',
      f'--workdir={tmp_path / "run"}',
    ],
  )  # fmt: skip
  names(line, ('config.tensorboard', 'tensorboardX'))
  assert 'python3 -m experiments.install tensorboard' in line


def test_a_mistake_is_one_line_in_a_process_of_its_own(run, tmp_path):
  done = run(
    'launch', '--config=digits_mlp', '--config.optimizer.name=nosuch',
    f'--workdir={tmp_path / "run"}',
  )  # fmt: skip
  assert done.returncode == 2
  assert done.stderr.count('\n') == 1
  names(done.stderr, ('config.optimizer.name', 'nosuch', 'adamw'))
  assert not (tmp_path / 'run').exists()


def test_a_batch_that_the_devices_cannot_share_names_the_nearest_size(
  run, tmp_path
):
  done = run(
    'launch', '--config=digits_linear', '--config.data.batch_size=65',
    f'--workdir={tmp_path / "run"}',
    env={
      'XLA_FLAGS': '--xla_force_host_platform_device_count=8',
      'JAX_PLATFORMS': 'cpu',
    },
  )  # fmt: skip
  assert done.returncode == 2
  assert done.stderr.count('\n') == 1
  names(done.stderr, ('config.data.batch_size', '65', '8', '64'))
  assert not (tmp_path / 'run').exists()


# ------------------------------------------------------------- config files

GOOD = """
from train import config

def get_config({takes}):
  return config.Config(total_steps=3, {arguments})
"""
CONFIG_FILES = {
  'syntax': 'def get_config(:\n',
  'not_utf8': b'\xff\xfe = 1\n',
  'null_byte': b'x = 1\x00\n',
  'raises': 'raise RuntimeError("one\\ntwo")\n',
  'raises_inside': 'def get_config():\n  return 1 / 0\n',
  'exits': 'import sys\nsys.exit(3)\n',
  'imports_nothing': 'import no_such_module\n',
  'empty': '',
  'no_function': 'get_config = 3\n',
  'returns_dict': 'def get_config():\n  return {"seed": 1}\n',
  'returns_none': 'def get_config():\n  pass\n',
  'wants_argument': 'def get_config(argument):\n  return None\n',
  'recurses': 'def get_config():\n  return get_config()\n',
  'unknown_field': GOOD.format(takes='', arguments='sed=1'),
}
# Field, what the file has for it, and what the line must name.
CONFIG_FIELDS = [
  ('seed', '"x"', "'x'"),
  ('model', '"mlp"', "'mlp'"),
  ('optimizer', 'None', 'None'),
  ('schedule', '{}', '{}'),
  ('data', '{"name": "digits"}', "'digits'"),
  ('data', 'None', 'None'),
  ('data', 'config.Data(batch_size="8")', "'8'"),
  ('model', '{"name": "mlp", "activation": print}', 'activation'),
  ('optimizer', '{"name": "adamw", "mask": lambda p: True}', 'mask'),
  ('optimizer', '{"name": "adamw", 3: 4}', '3'),
  ('early_stopping', '{"patience": 3}', "'patience'"),
  ('early_stopping', 'None', 'None'),
  ('rate_multipliers', '{"blocks": print}', 'print'),
  ('rate_multipliers', '{("blocks", 0): 0.0}', "('blocks', 0)"),
  ('init_from', 'b"runs"', "b'runs'"),
  ('init_from', '"run\\x00"', 'run'),
  ('init_from', '"no\\nsuch"', "'no\\nsuch'"),
]


@pytest.mark.parametrize('kind', CONFIG_FILES)
def test_a_config_file_that_fails_is_named_with_why(refused, tmp_path, kind):
  file = tmp_path / f'{kind}.py'
  text = CONFIG_FILES[kind]
  file.write_bytes(text if isinstance(text, bytes) else text.encode())
  names(refused('launch', [f'--config={file}']), ('--config', str(file)))


@pytest.mark.parametrize(('path', 'value', 'named'), CONFIG_FIELDS)
def test_a_config_file_with_a_field_of_another_kind_is_refused(
  refused, tmp_path, path, value, named
):
  file = tmp_path / 'odd.py'
  file.write_text(GOOD.format(takes='', arguments=f'{path}={value}'))
  line = refused('launch', [f'--config={file}'])
  assert f'config.{path}' in line
  assert named in line


@pytest.mark.parametrize(
  'value',
  [
    'nosuch', 'nosuch.py', '.', '/', 'nosuch/', 'digits_mlp:8', '', ':',
    '__init__', '../launch', '/proc/nowhere', 'x' * 300,
  ],
)  # fmt: skip
def test_a_config_that_is_no_file_is_named(refused, value):
  line = refused('launch', [f'--config={value}'])
  assert '--config' in line
  assert value.partition(':')[0][:50] in line


def test_a_config_that_is_no_python_file_is_named_as_such(refused, tmp_path):
  file = tmp_path / 'config.txt'
  file.write_text(GOOD.format(takes='', arguments=''))
  line = refused('launch', [f'--config={file}'])
  names(line, ('--config', str(file)))
  assert 'NoneType' not in line


def test_a_config_file_that_is_good_is_not_refused(tmp_path, monkeypatch):
  # The control of the tables above.
  monkeypatch.chdir(tmp_path)
  file = tmp_path / 'good.py'
  file.write_text(GOOD.format(takes='argument', arguments='seed=int(argument)'))
  config, name, notes = command.load_config(f'{file}:7', [])
  assert (config.seed, config.total_steps, name, notes) == (7, 3, 'good', [])


# -------------------------------------------------------------------- flags


@pytest.mark.parametrize(
  ('name', 'words', 'named'),
  [
    ('launch', ('digits_mlp',), ('digits_mlp',)),
    ('launch', ('--config=digits_mlp', 'stray'), ('stray',)),
    ('launch', ('--config=digits_mlp', '--', '--seed=1'), ('--seed=1',)),
    ('launch', ('--confg=digits_mlp',), ('confg', '--config')),
    ('launch', ('--config=digits_mlp', '--seed=1'), ('seed', '--config')),
    ('launch', ('--config=digits_mlp', '--verbose'), ('verbose',)),
    ('launch', ('--config=digits_mlp', '-v'), ('v',)),
    ('launch', ('--config=digits_mlp', '--noworkdir'), ('workdir',)),
    ('launch', ('--config',), ('config',)),
    ('launch', ('--config=digits_mlp', '--workdir'), ('workdir',)),
    ('launch', ('--config=digits_mlp', '--workdir='), ('--workdir',)),
    ('launch', ('--config=digits_mlp', '--config.seed'), ('--config.seed',)),
    (
      'launch',
      ('--config=digits_mlp', '--config.seed', '1'),
      ('--config.seed',),
    ),
    ('launch', ('--config=digits_mlp', '--flagfile=x'), ('flagfile',)),
    ('evaluate', (), ('--workdir',)),
    ('evaluate', ('--workdir=',), ('--workdir',)),
    ('evaluate', ('stray',), ('stray',)),
    ('evaluate', ('--config=digits_mlp',), ('config', '--workdir')),
    ('evaluate', ('--config.seed=1',), ('--config.seed', 'workdir')),
    ('evaluate', ('--workdir=x', '--step=weird'), ('--step', 'weird')),
    ('evaluate', ('--workdir=x', '--step=-1'), ('--step', '-1')),
    ('evaluate', ('--workdir=x', '--step=1.5'), ('--step', '1.5')),
    ('evaluate', ('--workdir=x', '--step='), ('--step',)),
    ('evaluate', ('--workdir=nosuch',), ('workdir', 'nosuch')),
    ('evaluate', ('--workdir=.',), ('workdir', 'config.json')),
    ('evaluate', ('--workdir=/proc/nowhere',), ('workdir', '/proc/nowhere')),
  ],
  ids=lambda value: value if isinstance(value, str) else ' '.join(value),
)
def test_a_wrong_flag_is_named(refused, name, words, named):
  names(refused(name, list(words)), named)


@pytest.mark.parametrize('words', [(), ('--workdir=run',)])
def test_launch_without_a_config_lists_commands_and_configs(
  tmp_path, monkeypatch, capsys, words
):
  monkeypatch.chdir(tmp_path)
  assert command.run('launch', launch.main, list(words)) == 2
  errors = capsys.readouterr().err
  assert errors.startswith('launch: --config is missing\n')
  folder = REPOSITORY / 'experiments'
  for name in ('launch', 'evaluate'):
    assert re.search(rf'^  {name} +\S', errors, re.MULTILINE)
  for file in folder.glob('configs/[a-z]*.py'):
    assert re.search(rf'^  {file.stem} +\S', errors, re.MULTILINE)
  assert not snapshot(tmp_path)


# --------------------------------------------------------------------- help


def imported(words, cwd):
  """(modules, exit code, stdout, CPU seconds) of python -m words."""
  before = os.times()
  done = subprocess.run(
    [sys.executable, '-X', 'importtime', '-m', *words],
    capture_output=True, text=True, cwd=cwd, timeout=60, check=False,
    env=os.environ | {'PYTHONPATH': str(REPOSITORY)},
  )  # fmt: skip
  after = os.times()
  modules = {
    line.rpartition('|')[2].strip()
    for line in done.stderr.splitlines()
    if line.startswith('import time:')
  }
  seconds = (
    after.children_user
    - before.children_user
    + after.children_system
    - before.children_system
  )
  return modules, done, seconds


@pytest.mark.parametrize(
  ('words', 'code', 'named'),
  [
    (
      ('experiments.launch', '--help'),
      0,
      (
        'config.seed', 'config.total_steps', 'config.total_epochs',
        'config.log_every', 'config.eval_every', 'config.checkpoint_every',
        'config.keep_best', 'config.best_metric', 'config.task', 'config.loss',
        'config.data.name', 'config.data.batch_size',
        'config.data.validation_fraction', 'config.data.normalize',
        'config.model.name', 'config.optimizer.name', 'config.schedule.name',
        '--workdir', '--config', '75', '130',
      ),
    ),
    (('experiments.launch', '-h'), 0, ('config.seed', '--workdir')),
    (
      ('experiments.launch', '--config=nosuch', '--help'), 0, ('config.seed',)
    ),
    (('experiments.evaluate', '--help'), 0, ('--workdir', '--step', '--split')),
    (('experiments',), 0, ('launch', 'evaluate', 'digits_mlp')),
    (('experiments.launch', '--config=digits_mlp', '--config.sed=1'), 2, ()),
    (('experiments.launch', '--config=nosuch'), 2, ()),
    (('experiments.launch',), 2, ()),
    (('experiments.evaluate', '--workdir=nosuch'), 2, ()),
  ],
  ids=lambda value: ' '.join(value) if isinstance(value, tuple) else '',
)  # fmt: skip
def test_help_and_typing_mistakes_answer_at_once_without_jax(
  tmp_path, words, code, named
):
  modules, done, seconds = imported(words, tmp_path)
  assert done.returncode == code
  assert 'train.config' in modules  # So that the next line can fail.
  heavy = {'jax', 'flax', 'optax', 'orbax', 'tensorflow_datasets', 'numpy'}
  assert not heavy & modules
  assert seconds < 1
  names(done.stdout, named)
  assert not snapshot(tmp_path)


# ----------------------------------------------------------------- workdirs


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """A workdir of three finished steps, and the words that made it."""
  workdir = tmp_path_factory.mktemp('trained') / 'run'
  words = [
    '--config=diabetes_linear', '--config.total_steps=3',
    '--config.data.batch_size=100', '--config.optimizer.name=sgd',
    '--config.optimizer.momentum=0.9',
    '--config.schedule.name=cosine_decay_schedule',
    '--config.schedule.init_value=0.05', '--config.loss=squared_error',
    '--config.best_metric=eval/mean_absolute_error',
  ]  # fmt: skip
  assert (
    command.run('launch', launch.main, [*words, f'--workdir={workdir}']) == 0
  )
  return workdir, words


@pytest.fixture
def workdir(trained, tmp_path):
  """A copy of the trained workdir, inside the test's own folder."""
  return shutil.copytree(trained[0], tmp_path / 'run')


@pytest.mark.parametrize(
  'path', ['file', 'file/run', '/proc/nowhere/run', '/dev/null', 'x' * 300]
)
def test_a_workdir_that_cannot_be_a_folder_is_named(
  refused, trained, tmp_path, path
):
  (tmp_path / 'file').write_text('')
  line = refused('launch', [*trained[1], f'--workdir={path}'])
  assert 'workdir' in line
  assert path in line


@pytest.mark.parametrize(
  ('flag', 'named'),
  [
    ('--config.seed=1', ('config.seed', '0', '1')),
    ('--config.total_steps=2', ('config.total_steps', '3', '2')),
    ('--config.data.batch_size=50', ('config.data.batch_size', '100', '50')),
    (
      '--config.data.normalize=unit',
      ('config.data.normalize',),
    ),
    (
      '--config.optimizer.momentum=0.5',
      ('config.optimizer.momentum', '0.9', '0.5'),
    ),
    (
      '--config.schedule.init_value=0.25',
      ('config.schedule.init_value', '0.05', '0.25'),
    ),
    (
      '--config.model.name=mlp',
      ('config.model.name', 'linear', 'mlp', 'config.model.widths'),
    ),
    (
      '--config.loss=huber_loss',
      ('config.loss', 'squared_error', 'huber_loss'),
    ),
    (
      '--config.best_metric=eval/loss',
      ('config.best_metric', 'eval/mean_absolute_error', 'eval/loss'),
    ),
  ],
)
def test_a_workdir_of_another_config_names_what_differs(
  refused, trained, workdir, flag, named
):
  line = refused('launch', [*trained[1], flag, f'--workdir={workdir}'])
  names(line, (str(workdir), *named))


def test_another_fold_is_another_experiment(refused, trained, workdir):
  file = workdir / 'config.json'
  data = json.loads(file.read_text())['data']
  file.write_text(
    changed(file.read_text(), data=data | {'folds': 5, 'fold': 0})
  )
  line = refused('launch', [
    *trained[1], '--config.data.folds=5', '--config.data.fold=1',
    f'--workdir={workdir}',
  ])  # fmt: skip
  names(line, (str(workdir), 'config.data.fold', '0', '1'))
  assert 'config.data.folds' not in line


def test_every_difference_is_named_at_once(refused, trained, workdir):
  line = refused('launch', [
    *trained[1], '--config.seed=8', '--config.data.batch_size=50',
    f'--workdir={workdir}',
  ])  # fmt: skip
  names(line, ('config.seed', '8', 'config.data.batch_size', '100', '50'))


DAMAGES = {
  'empty': lambda text: '',
  'cut short': lambda text: text[: len(text) // 2],
  'no JSON': lambda text: 'seed = 1',
  'binary': lambda text: b'\x80\xff\x00\x01',
  'a list': lambda text: '[1, 2]',
  'null': lambda text: 'null',
  'a number': lambda text: '3',
  'a word': lambda text: '"seed"',
  'very deep': lambda text: '[' * 100_000,
  'not finite': lambda text: changed(text, seed=float('nan')),
  'an unknown field': lambda text: changed(text, nonsense=1),
  'an unknown field of data': lambda text: changed(text, data={'nonsense': 1}),
  'data a number': lambda text: changed(text, data=3),
  'data null': lambda text: changed(text, data=None),
  'model a number': lambda text: changed(text, model=3),
  'model a list': lambda text: changed(text, model=['mlp']),
  'model without name': lambda text: changed(text, model={}),
  'optimizer null': lambda text: changed(text, optimizer=None),
  'seed a word': lambda text: changed(text, seed='one'),
  'total_steps null': lambda text: changed(text, total_steps=None),
  'total_steps a word': lambda text: changed(text, total_steps='ten'),
}


def changed(text, **values):
  return json.dumps(json.loads(text) | values)


@pytest.mark.parametrize('name', ['launch', 'evaluate'])
@pytest.mark.parametrize('kind', DAMAGES)
def test_a_damaged_config_json_is_one_line(
  refused, trained, workdir, kind, name
):
  file = workdir / 'config.json'
  damaged = DAMAGES[kind](file.read_text())
  file.write_bytes(damaged if isinstance(damaged, bytes) else damaged.encode())
  words = trained[1] if name == 'launch' else []
  line = refused(name, [*words, f'--workdir={workdir}'])
  assert 'config' in line
  assert re.search(r'config\.json|config\.\w+', line)


@pytest.mark.parametrize('name', ['launch', 'evaluate'])
def test_a_config_json_that_is_a_folder_is_one_line(
  refused, trained, workdir, name
):
  (workdir / 'config.json').unlink()
  (workdir / 'config.json').mkdir()
  words = trained[1] if name == 'launch' else []
  names(refused(name, [*words, f'--workdir={workdir}']), (str(workdir),))


@pytest.mark.parametrize('block', ['model', 'optimizer', 'schedule'])
def test_code_in_a_config_json_is_an_unknown_name(
  refused, workdir, tmp_path, block
):
  file = workdir / 'config.json'
  code = f"__import__('os').system('touch {tmp_path / 'executed'}')"
  file.write_text(changed(file.read_text(), **{block: {'name': code}}))
  line = refused('evaluate', [f'--workdir={workdir}'])  # Nothing is touched.
  assert f'config.{block}.name' in line


def test_checkpoints_without_a_config_json_are_not_trained_over(
  refused, trained, workdir
):
  (workdir / 'config.json').unlink()
  line = refused('launch', [*trained[1], f'--workdir={workdir}'])
  names(line, (str(workdir), 'config.json'))


@pytest.mark.parametrize(
  ('words', 'named'),
  [
    (('--split=weird',), ('--split', 'weird', 'train', 'test')),
    (('--split=validation',), ('--split', 'validation', 'train', 'test')),
    (('--split=',), ('--split', 'train', 'test')),
    (('--step=99',), ('--step', '99', '3')),
    (('--step=0',), ('--step', '0', '3')),
    (('--step=' + '9' * 5000,), ('--step', '3')),
  ],
  ids=lambda words: ' '.join(words)[:20],
)
def test_evaluate_names_a_step_or_split_that_is_not_there(
  refused, workdir, words, named
):
  names(refused('evaluate', [f'--workdir={workdir}', *words]), named)


@pytest.mark.parametrize('left', [(), ('checkpoints',)])
@pytest.mark.parametrize('step', ['latest', 'best', '3'])
def test_evaluate_of_a_run_without_checkpoints_is_one_line(
  refused, workdir, left, step
):
  shutil.rmtree(workdir / 'checkpoints')
  for name in left:
    (workdir / name).mkdir()
  line = refused('evaluate', [f'--workdir={workdir}', f'--step={step}'])
  names(line, ('--step', step, 'checkpoint'))


def test_best_of_a_run_that_was_never_evaluated_is_one_line(refused, workdir):
  (workdir / 'metrics.jsonl').unlink()
  line = refused('evaluate', [f'--workdir={workdir}', '--step=best'])
  names(line, ('--step', 'best'))


# ---------------------------------------------------------------- init_from


@pytest.fixture
def init_from(refused, workdir, tmp_path):
  """init_from(':best') -> the line that refuses the workdir as a source.

  What is trained is the model that the workdir has.
  """
  words = (
    '--config=diabetes_linear', '--config.data.batch_size=100',
    f'--workdir={tmp_path / "new"}',
  )  # fmt: skip

  def init_from(suffix='', *more):
    source = f'{workdir}{suffix}'
    line = refused('launch', [*words, f'--config.init_from={source}', *more])
    names(line, ('config.init_from', source))
    return line

  return init_from


@pytest.mark.parametrize(
  ('suffix', 'named'),
  [
    (':99', ('99', '3')),
    (':0', ('0', '3')),
    (':03', ('03', '3')),
    (':' + '9' * 5000, ('3',)),
    (':newest', ()),
    (':', ()),
    (':-1', ()),
    ('/checkpoints', ('config.json',)),
    ('/config.json', ('config.json',)),
  ],
  ids=lambda value: value[:20] if isinstance(value, str) else '',
)
def test_a_step_or_a_workdir_to_start_from_that_is_not_there_is_named(
  init_from, suffix, named
):
  names(init_from(suffix), named)


@pytest.mark.parametrize('left', [(), ('checkpoints',)])
@pytest.mark.parametrize('suffix', ['', ':latest', ':3'])
def test_starting_from_a_run_without_checkpoints_is_one_line(
  init_from, workdir, left, suffix
):
  shutil.rmtree(workdir / 'checkpoints')
  for name in left:
    (workdir / name).mkdir()
  assert 'there is no checkpoint yet' in init_from(suffix)


def test_starting_from_the_best_of_a_run_never_evaluated_is_one_line(
  init_from, workdir
):
  (workdir / 'metrics.jsonl').unlink()
  assert 'no saved step was evaluated' in init_from()


@pytest.mark.parametrize('kind', DAMAGES)
def test_a_damaged_config_json_to_start_from_is_one_line(
  init_from, workdir, kind
):
  file = workdir / 'config.json'
  damaged = DAMAGES[kind](file.read_text())
  file.write_bytes(damaged if isinstance(damaged, bytes) else damaged.encode())
  assert 'config.json' in init_from()


@pytest.mark.parametrize(
  'changes',
  [
    {'model': {'name': 'nosuch'}},
    {'model': {'name': 'mlp', 'widths': 'wide'}},
    {'model': {'name': 'linear', 'sed': 1}},
    {'best_metric': None},
    {'best_metric': 'eval/weird'},
    {'optimizer': {'name': 'schedule_free_sgd'}},
  ],
  ids=str,
)
def test_a_config_json_to_start_from_that_no_run_writes_is_one_line(
  init_from, workdir, changes
):
  file = workdir / 'config.json'
  file.write_text(changed(file.read_text(), **changes))
  init_from()


@pytest.mark.parametrize(
  ('words', 'named'),
  [
    # The digits have ten classes where the diabetes has one number, and all
    # that a linear model has is its head.
    (
      ('--config=digits_linear',),
      ('config.init_from', 'of which nothing is taken'),
    ),
    (
      ('--config.init_new=.*',),
      ('config.init_from', 'of which nothing is taken'),
    ),
    (
      ('--config=digits_mlp',),
      (
        'config.init_from', 'blocks/0/bias is not', '(256,)',
        '--config.init_new=blocks/0',
      ),
    ),
    (
      ('--config.init_new=blocks',),
      ('config.init_new', "'blocks'", 'head/kernel'),
    ),
    (
      ('--config.init_new=(',),
      ('config.init_new', "'('", 'regular expression'),
    ),
    (('--config.init_new=(3,)',), ('config.init_new', '3')),
  ],
  ids=lambda value: value[0],
)  # fmt: skip
def test_a_model_that_what_it_starts_from_does_not_fit_is_named(
  refused, workdir, tmp_path, words, named
):
  line = refused(
    'launch',
    [
      '--config=diabetes_linear', '--config.data.batch_size=100', *words,
      f'--config.init_from={workdir}', f'--workdir={tmp_path / "new"}',
    ],
  )  # fmt: skip
  for word in named:
    assert word in line


def test_a_workdir_cannot_start_from_itself(refused, tmp_path):
  names(
    refused(
      'launch',
      [
        '--config=digits_mlp', f'--workdir={tmp_path / "run"}',
        f'--config.init_from={tmp_path / "run"}',
      ],
    ),
    ('config.init_from', str(tmp_path / 'run')),
  )  # fmt: skip


# -------------------------------------------------------------------- cache


@pytest.mark.parametrize('path', ['file', 'file/cache', '/proc/nowhere'])
def test_a_cache_that_cannot_be_made_names_its_variable(
  refused, monkeypatch, tmp_path, path
):
  (tmp_path / 'file').write_text('')
  monkeypatch.setenv('TAISHAN_CACHE', path)
  line = refused('launch', ['--config=digits_linear', '--workdir=run'])
  names(line, ('TAISHAN_CACHE', path))
