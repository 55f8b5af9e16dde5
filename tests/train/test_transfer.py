"""Starting from another run's parameters, through the real loop."""

import dataclasses
import functools
import json
import os
import shutil
import signal

import jax
import numpy as np
import pytest
import safetensors.numpy

from experiments import command
from experiments import evaluate as evaluate_command
from tests import runs
from tests.models import published
from train import checkpoint
from train import config as config_lib
from train import loop
from train import paths
from train import program as program_lib
from train import signals
from train import transfer
from train import workdir as workdir_lib
from train import writer

CNN = {'name': 'cnn', 'widths': (8,)}
# The rate jumps at step 4, so that the last checkpoint is not the best.
SOURCE = runs.config(
  total_steps=8,
  eval_every=2,
  checkpoint_every=2,
  keep_best=2,
  model=CNN,
  schedule={
    'name': 'piecewise_constant_schedule',
    'init_value': 3e-3,
    'boundaries_and_scales': {4: 300.0},
  },
)
STAY = {'name': 'constant_schedule', 'value': 0.0}


@pytest.fixture(scope='module')
def source(tmp_path_factory):
  """The workdir of SOURCE's run."""
  workdir = tmp_path_factory.mktemp('source')
  loop.train_and_evaluate(SOURCE, workdir)
  return workdir


def _steps(workdir) -> list[int]:
  return sorted(int(path.name) for path in (workdir / 'checkpoints').iterdir())


def _best(workdir) -> int:
  scores = writer.scores(workdir, workdir_lib.read_config(workdir))
  return max(_steps(workdir), key=lambda step: (scores[step], -step))


@functools.cache
def _state(workdir, step=None):
  """The state of that step, or the newest, of a finished run."""
  program = program_lib.create(workdir_lib.read_config(workdir))
  with checkpoint.Checkpoints(
    workdir, program.config, {}, say=print, read_only=True
  ) as checkpoints:
    return checkpoints.restore(program, step or checkpoints.steps()[-1])


def _flat(tree) -> dict[str, np.ndarray]:
  """Path as 'blocks/0/kernel' -> array, of nested dicts."""
  return {
    paths.spelled(path): np.asarray(leaf)
    for path, leaf in paths.flatten(tree).items()
  }


def _assert_same(found, expected):
  found, expected = _flat(found), _flat(expected)
  assert found.keys() == expected.keys()
  for path, leaf in expected.items():
    np.testing.assert_array_equal(found[path], leaf, err_msg=path)


@functools.cache
def _program(*, classes=(), **fields) -> program_lib.Program:
  """The program of a config that starts from nothing."""
  data = config_lib.Data(name='digits', batch_size=64, classes=classes)
  model = {k: fields.pop(k) for k in ('widths', 'head_widths') if k in fields}
  return program_lib.create(runs.config(model=CNN | model, data=data, **fields))


def _start(workdir, suffix='', *, init_new=(), **fields):
  """(program, state before the first step, what was said) from a workdir."""
  program = _program(**fields)
  config = dataclasses.replace(
    program.config, init_from=f'{workdir}{suffix}', init_new=init_new
  )
  program = dataclasses.replace(program, config=config)
  transfer.check(program)
  said = []
  return program, transfer.initial_state(program, said.append), said


# ------------------------------------------------------------ what is taken


@pytest.mark.slow
def test_everything_of_the_best_is_taken_where_the_model_is_the_same(source):
  program, state, said = _start(source)
  there = _state(source, _best(source))
  _assert_same(state.params, there.params)
  _assert_same(state.batch_stats, there.batch_stats)
  assert len(_flat(state.batch_stats)) == 2
  count = len(_flat(state.params))
  assert said == [
    f'init_from: {count} parameters of {source}, step {_best(source)}; '
    'new: none'
  ]
  # Everything else begins: no step, no moments.
  fresh = program.init()
  assert int(state.step) == 0
  assert jax.tree.structure(state) == jax.tree.structure(fresh)
  for part in ('opt_state', 'control'):
    jax.tree.map(
      np.testing.assert_array_equal, getattr(state, part), getattr(fresh, part)
    )
  assert any(map(np.any, jax.tree.leaves(there.opt_state)))
  assert not any(map(np.any, jax.tree.leaves(state.opt_state)))
  # On the devices as the compiled step wants it.
  for leaf, wanted in zip(
    jax.tree.leaves(state), jax.tree.leaves(program.state_shape), strict=True
  ):
    assert (leaf.dtype, leaf.sharding) == (wanted.dtype, wanted.sharding)


def test_a_word_after_the_workdir_picks_the_step(source):
  steps, best = _steps(source), _best(source)
  assert len(steps) == 3
  assert best != steps[-1]
  picked = {'': best, ':best': best, ':latest': steps[-1]}
  picked |= {f':{step}': step for step in steps}
  for suffix, step in picked.items():
    _, state, said = _start(source, suffix)
    assert f'step {step};' in said[0]
    _assert_same(state.params, _state(source, step).params)


def test_at_rate_zero_the_first_step_leaves_what_was_taken(source, tmp_path):
  def snapshot():
    return {
      path: (path.stat().st_mtime_ns, path.is_file() and path.read_bytes())
      for path in source.rglob('*')
    }

  before = snapshot()
  config = runs.config(
    model=CNN, total_steps=1, schedule=STAY, init_from=str(source)
  )
  loop.train_and_evaluate(config, tmp_path)
  assert snapshot() == before  # The source is only read.
  there = _state(source, _best(source))
  found = _state(tmp_path)
  _assert_same(found.params, there.params)
  with pytest.raises(AssertionError):  # The step went through the batch norm.
    _assert_same(found.batch_stats, there.batch_stats)
  values = json.loads((tmp_path / 'config.json').read_text())
  assert values['init_from'] == str(source)
  other = dataclasses.replace(config, init_from=f'{source}:latest')
  with pytest.raises(config_lib.UserError, match='config.init_from was'):
    loop.train_and_evaluate(other, tmp_path)


def test_the_classes_of_another_task_have_a_new_head(source):
  program, state, said = _start(source, classes=(5, 6, 7))
  there = _flat(_state(source, _best(source)).params)
  fresh = _flat(program.init().params)
  found = _flat(state.params)
  assert found['head/kernel'].shape == (128, 3)
  for path, leaf in found.items():
    expected = fresh if path.startswith('head/') else there
    np.testing.assert_array_equal(leaf, expected[path], err_msg=path)
  assert said[0].endswith('new: head/bias, head/kernel')


def test_what_init_new_names_is_new_though_it_would_fit(source):
  program, state, said = _start(source, init_new=('head', 'norms/0/norm/s'))
  there = _flat(_state(source, _best(source)).params)
  fresh = _flat(program.init().params)
  new = {'head/bias', 'head/kernel', 'norms/0/norm/scale'}
  for path, leaf in _flat(state.params).items():
    expected = fresh if path in new else there
    np.testing.assert_array_equal(leaf, expected[path], err_msg=path)
  assert set(said[0].partition('new: ')[2].split(', ')) == new
  # Running statistics are of what comes before, and are named by themselves.
  _assert_same(state.batch_stats, _state(source, _best(source)).batch_stats)


def test_other_widths_are_refused_with_both_shapes_unless_they_are_new(source):
  with pytest.raises(config_lib.UserError) as caught:
    _start(source, widths=(12,))
  line = str(caught.value)
  assert '\n' not in line
  for word in (
    f'config.init_from is {str(source)!r}', 'blocks/0/kernel',
    '(3, 3, 1, 8)', '(3, 3, 1, 12)', '--config.init_new=blocks/0/kernel',
  ):  # fmt: skip
    assert word in line
  with pytest.raises(config_lib.UserError, match=r'norms/0/norm/bias is \(8,'):
    _start(source, widths=(12,), init_new=('blocks',))
  # The head, whose inputs they are, is new without a word.
  with pytest.raises(config_lib.UserError, match='nothing is taken'):
    _start(source, widths=(12,), init_new=('blocks', 'norms'), classes=(0, 1))


def test_a_layer_that_the_source_lacks_is_refused_unless_it_is_new(source):
  with pytest.raises(
    config_lib.UserError, match=r'hidden/0/bias is not; here it is \(16,\)'
  ):
    _start(source, head_widths=(16,))
  _, state, said = _start(source, head_widths=(16,), init_new=('hidden',))
  there = _flat(_state(source, _best(source)).params)
  found = _flat(state.params)
  for path in ('blocks/0/kernel', 'norms/0/norm/scale'):
    np.testing.assert_array_equal(found[path], there[path])
  assert found['hidden/0/kernel'].shape == (128, 16)
  for path in ('hidden/0/bias', 'hidden/0/kernel', 'head/kernel'):
    assert path in said[0].partition('new: ')[2]


@pytest.mark.slow
def test_of_a_run_with_a_running_mean_the_mean_is_taken(tmp_path):
  config = runs.config(model=CNN, total_steps=4, ema_decay=0.9)
  loop.train_and_evaluate(config, tmp_path / 'source')
  there = _state(tmp_path / 'source')
  # Into a run that keeps a mean too, which begins at the parameters.
  _, state, _ = _start(tmp_path / 'source', ema_decay=0.99)
  _assert_same(state.params, there.ema_params)
  _assert_same(state.ema_params, there.ema_params)
  with pytest.raises(AssertionError):
    _assert_same(state.params, there.params)


def test_a_run_with_a_mean_can_start_from_one_without(source):
  _, state, _ = _start(source, ema_decay=0.99)
  there = _state(source, _best(source))
  _assert_same(state.params, there.params)
  _assert_same(state.ema_params, there.params)


def test_what_is_taken_is_what_the_source_was_evaluated_with(source, tmp_path):
  config = runs.config(
    model=CNN, total_steps=1, schedule=STAY, init_from=f'{source}:latest'
  )
  program = program_lib.create(config)
  state = transfer.initial_state(program, print)
  results = loop.evaluate.evaluate(program, state, 'test')
  line = writer.read(source / 'metrics.jsonl')[-1]
  assert loop.evaluate.scalars(results, 'test') == {
    k: v for k, v in line.items() if k != 'step'
  }


# ----------------------------------------------------------------- the source


def test_a_run_that_has_begun_needs_its_source_no_more(
  source, tmp_path, monkeypatch
):
  """And stopping changes nothing here either."""
  elsewhere = shutil.copytree(source, tmp_path / 'source')
  config = runs.config(model=CNN, init_from=str(elsewhere))
  program = program_lib.create(config)
  loop.run(program, tmp_path / 'whole')
  stepped = writer.Writer.stepped

  def stop(self, now, metrics):
    stepped(self, now, metrics)
    if now == 2:
      os.kill(os.getpid(), signal.SIGTERM)

  with monkeypatch.context() as patch:
    patch.setattr(writer.Writer, 'stepped', stop)
    with pytest.raises(signals.Stopped):
      loop.run(program, tmp_path / 'stopped')
  shutil.rmtree(elsewhere)
  loop.run(program, tmp_path / 'stopped')
  assert runs.digest(tmp_path / 'stopped') == runs.digest(tmp_path / 'whole')
  whole, stopped = (
    (tmp_path / name / 'metrics.jsonl').read_bytes()
    for name in ('whole', 'stopped')
  )
  assert whole == stopped
  # Nor does evaluating it.
  flag = f'--workdir={tmp_path / "stopped"}'
  assert command.run('evaluate', evaluate_command.main, [flag]) == 0


def test_a_source_that_is_still_training_can_be_started_from(source, tmp_path):
  config = workdir_lib.read_config(source)
  with workdir_lib.claimed(source, config, print):
    _, state, _ = _start(source)
  assert int(state.step) == 0


def test_a_damaged_checkpoint_to_start_from_is_one_line(source, tmp_path):
  elsewhere = shutil.copytree(source, tmp_path / 'source')
  step = _best(source)
  for file in (elsewhere / 'checkpoints' / f'{step}').rglob('*'):
    if file.is_file():
      file.write_bytes(b'')
  config = runs.config(model=CNN, init_from=f'{elsewhere}:{step}')
  with pytest.raises(config_lib.UserError, match=f'/{step} cannot be') as error:
    loop.train_and_evaluate(config, tmp_path / 'run')
  assert '\n' not in str(error.value)


# ---------------------------------------------------------- a file of weights

RESNET = {
  'name': 'resnet', 'variant': '18', 'depth': (1, 1), 'width': 8, 'stem': '3x3',
}  # fmt: skip
SIZES = {
  'depth': (1, 1), 'width': 8, 'kernels': (3, 3), 'channels': 1, 'stem': 3,
}  # fmt: skip


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
  """(a file as torchvision's, of a ResNet for 1000 classes; what is in it)."""
  file = tmp_path_factory.mktemp('weights') / 'resnet.safetensors'
  arrays = published.arrays(published.resnet(**SIZES))
  safetensors.numpy.save_file(arrays, file)
  return file, arrays


@functools.cache
def _resnet(depth=(1, 1)) -> program_lib.Program:
  return program_lib.create(runs.config(model=RESNET | {'depth': depth}))


def _start_from(file, depth=(1, 1), **fields):
  """As _start, from a file into a ResNet."""
  program = _resnet(depth)
  config = dataclasses.replace(program.config, init_from=str(file), **fields)
  program = dataclasses.replace(program, config=config)
  transfer.check(program)
  said = []
  return program, transfer.initial_state(program, said.append), said


@pytest.mark.slow
def test_a_file_gives_its_weights_and_says_so(weights):
  file, arrays = weights
  program, state, said = _start_from(file)
  found, fresh = _flat(state.params), _flat(program.init().params)
  for path in ('head/kernel', 'head/bias'):  # Of 10 classes, not 1000.
    np.testing.assert_array_equal(found[path], fresh[path])
  np.testing.assert_array_equal(
    found['blocks/1/0/shortcut/kernel'][0, 0],
    arrays['layer2.0.downsample.0.weight'][:, :, 0, 0].T,
  )
  np.testing.assert_array_equal(
    _flat(state.batch_stats)['embed/norm/norm/var'], arrays['bn1.running_var']
  )
  for part, new in (
    (state.params, program.init().params),
    (state.batch_stats, program.init().batch_stats),
  ):
    new = _flat(new)
    for path, leaf in _flat(part).items():
      if not path.startswith('head/'):
        assert not np.array_equal(leaf, new[path]), path
  assert int(state.step) == 0
  for leaf, wanted in zip(
    jax.tree.leaves(state), jax.tree.leaves(program.state_shape), strict=True
  ):
    assert (leaf.dtype, leaf.sharding) == (wanted.dtype, wanted.sharding)
  assert said == [
    'init_from: 30 arrays taken, named as in torchvision; '
    'new: head/bias, head/kernel',
    'init_from: unused: fc.bias, fc.weight',
    'init_from: the head has 1000 outputs there, 10 here: it is new',
    'init_from: the published weights of others keep their own licence',
  ]


@pytest.mark.slow
def test_what_init_new_names_is_not_taken_from_a_file(weights):
  file, arrays = weights
  wide = dict(arrays)
  wide['conv1.weight'] = np.zeros((8, 3, 3, 3), np.float32)
  other = file.with_name('wide.safetensors')
  safetensors.numpy.save_file(wide, other)
  with pytest.raises(config_lib.UserError) as caught:
    _start_from(other)
  line = str(caught.value)
  assert '\n' not in line
  for word in (
    f'config.init_from is {str(other)!r}', 'conv1.weight', 'embed/conv/kernel',
    '(8, 3, 3, 3)', '(3, 3, 1, 8)',
  ):  # fmt: skip
    assert word in line
  program, state, said = _start_from(other, init_new=('embed/conv',))
  found, fresh = _flat(state.params), _flat(program.init().params)
  path = 'embed/conv/kernel'
  np.testing.assert_array_equal(found[path], fresh[path])
  assert path in said[0].partition('new: ')[2]
  with pytest.raises(config_lib.UserError, match='matches no parameter'):
    _start_from(file, init_new=('embde',))


def test_what_a_file_lacks_is_refused_unless_it_is_new(weights):
  file, arrays = weights
  part = {k: v for k, v in arrays.items() if not k.startswith('layer2.0.conv2')}
  other = file.with_name('part.safetensors')
  safetensors.numpy.save_file(part, other)
  path = 'blocks/1/0/convs/1/kernel'
  with pytest.raises(
    config_lib.UserError, match=f'where {path} is not; .*init_new={path}'
  ):
    _start_from(other)
  _, _, said = _start_from(other, init_new=(path,))
  assert said[0].endswith(f'new: {path}, head/bias, head/kernel')


@pytest.mark.slow
def test_a_whole_block_that_a_file_lacks_is_named_by_its_pattern(weights):
  file, _ = weights
  shapes = published.resnet(**SIZES | {'depth': (1, 11)})
  part = {
    name: array
    for name, array in published.arrays(shapes).items()
    if not name.startswith(('layer2.1.', 'layer2.9.'))
  }
  other = file.with_name('blocks.safetensors')
  safetensors.numpy.save_file(part, other)
  with pytest.raises(config_lib.UserError, match='blocks/1/9/.* is not') as e:
    _start_from(other, depth=(1, 11), init_new=('blocks/1/1/',))
  assert '--config.init_new=blocks/1/9 to' in str(e.value)
  # A pattern must not pick blocks/1/10 too, which is there.
  with pytest.raises(config_lib.UserError, match='blocks/1/1/.* is not') as e:
    _start_from(other, depth=(1, 11), init_new=('blocks/1/9',))
  assert '--config.init_new=blocks/1/1/ to' in str(e.value)
  new = ('blocks/1/9', 'blocks/1/1/')
  _, state, said = _start_from(other, depth=(1, 11), init_new=new)
  np.testing.assert_array_equal(
    _flat(state.params)['blocks/1/10/norms/0/norm/bias'],
    part['layer2.10.bn1.bias'],
  )


@pytest.mark.slow
def test_running_statistics_that_a_file_lacks_are_refused_too(weights):
  file, arrays = weights
  part = {k: v for k, v in arrays.items() if k != 'bn1.running_var'}
  other = file.with_name('statistics.safetensors')
  safetensors.numpy.save_file(part, other)
  path = 'embed/norm/norm/var'
  with pytest.raises(
    config_lib.UserError, match=f'where {path} is not; .*init_new={path}'
  ):
    _start_from(other)
  program, state, _ = _start_from(other, init_new=(path,))
  np.testing.assert_array_equal(
    _flat(state.batch_stats)[path], _flat(program.init().batch_stats)[path]
  )


@pytest.mark.parametrize('name', ['folder.safetensors', 'weihgts', 'a.npzz'])
def test_what_is_neither_a_workdir_nor_a_file_says_what_files_are_read(
  tmp_path, name
):
  if name.startswith('folder'):
    (tmp_path / name).mkdir()
  with pytest.raises(
    config_lib.UserError, match='no experiment.* ends in .safetensors or .npz'
  ):
    _start_from(tmp_path / name)


@pytest.mark.parametrize(
  'name', ['weights.pth', 'weights.bin', 'x.npz', 'no.safetensors']
)
def test_a_file_that_cannot_be_read_is_one_line_and_nothing_is_written(
  tmp_path, name
):
  file = tmp_path / name
  if name != 'no.safetensors':
    file.write_bytes(b'cos\nsystem\n(S"false"\ntR.')
  program = _resnet()
  config = dataclasses.replace(program.config, init_from=str(file))
  program = dataclasses.replace(program, config=config)
  with pytest.raises(config_lib.UserError, match='config.init_from') as caught:
    loop.run(program, tmp_path / 'run')
  assert '\n' not in str(caught.value)
  assert str(file) in str(caught.value)
  assert not (tmp_path / 'run').exists()


def test_weights_of_another_architecture_are_refused(tmp_path):
  file = tmp_path / 'vit.safetensors'
  arrays = published.arrays(published.vit(1, 8, layout='timm'))
  safetensors.numpy.save_file(arrays, file)
  with pytest.raises(config_lib.UserError, match='another architecture'):
    _start_from(file)


@pytest.mark.slow
def test_a_run_that_has_begun_needs_its_file_no_more(weights, tmp_path):
  file = shutil.copy(weights[0], tmp_path / 'copy.safetensors')
  config = runs.config(
    model=RESNET, total_steps=4, init_from=str(file), schedule=STAY
  )
  loop.train_and_evaluate(config, tmp_path / 'run')
  os.remove(file)
  loop.train_and_evaluate(config, tmp_path / 'run')
  found = _flat(_state(tmp_path / 'run').params)
  kernel = weights[1]['layer1.0.conv1.weight'].transpose(2, 3, 1, 0)
  np.testing.assert_array_equal(found['blocks/0/0/convs/0/kernel'], kernel)


# ------------------------------------------------------------------- freezing


def test_what_is_frozen_stays_as_it_was_taken_to_the_last_bit(source, tmp_path):
  """Whatever else pulls at parameters: decay, penalties, a running mean."""
  config = runs.config(
    model=CNN,
    optimizer={'name': 'adamw', 'weight_decay': 0.1},
    l1=1e-3,
    l2=1e-2,
    ema_decay=0.5,
    accumulate=2,
    rate_multipliers={'blocks': 0.0, 'norms': 0.1},
    init_from=str(source),
  )
  loop.train_and_evaluate(config, tmp_path)
  there = _flat(_state(source, _best(source)).params)
  state = _state(tmp_path)
  for params in (state.params, state.ema_params):
    for path, leaf in _flat(params).items():
      same = leaf.tobytes() == there[path].tobytes()
      assert same == path.startswith('blocks'), path
  # And nothing is remembered of it.
  sizes = {leaf.shape for leaf in jax.tree.leaves(state.opt_state)}
  assert there['head/kernel'].shape in sizes
  assert there['blocks/0/kernel'].shape not in sizes


@pytest.mark.slow
def test_fine_tuning_begins_better_than_from_nothing(tmp_path):
  source = runs.config(total_steps=100, eval_every=100, checkpoint_every=100)
  loop.train_and_evaluate(source, tmp_path / 'source')
  first = {}
  for name in ('tuned', 'scratch'):
    config = runs.config(
      total_steps=5,
      eval_every=5,
      init_from=str(tmp_path / 'source') if name == 'tuned' else None,
    )
    final = loop.train_and_evaluate(config, tmp_path / name)
    first[name] = final['test/accuracy']
  assert first['tuned'] > first['scratch'] + 0.1
