"""Plans of real configs, by the compiler of a CPU."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import jax
from PIL import Image
import pytest

from experiments import command
from experiments import plan as plan_command
from experiments.planning import compiler as compiler_lib
from experiments.planning import compiling
from experiments.planning import cost
from experiments.planning import search
from experiments.planning import targets
from experiments.planning import text
import models
from tests import conftest
from tests import process
from tests import runs
from train import config as config_lib
from train import program as program_lib
from train.data import pipeline


def planned(*words):
  """Exit code of a plan, in this process."""
  return command.run('plan', plan_command.main, words)


@pytest.fixture(scope='module')
def two(cache):
  """Compiles for two CPU devices, all in one process."""
  with compiler_lib.Compiler(targets.parse('cpu:2')) as compiler:
    yield compiler


def test_a_config_is_planned(two):
  config = runs.config(mesh=config_lib.Mesh(data=1, fsdp=2))
  account = two.ask(config)
  plan = cost.plan(two.target, account)
  assert plan.fits
  weights = 64 * 32 + 32 * 10
  assert account['forward'] == 2 * weights
  # Forward, and the gradients of the weights and of the hidden layer's output.
  assert account['flops'] == 64 * 2 * (2 * weights + 32 * 10)
  found = account['bytes']
  assert found['parameters'] == 4 * (weights + 32 + 10)
  assert found['moments'] == 2 * found['parameters'] + 2 * 4
  # The digits, the order of 256 steps of which each device has its half, and
  # the number of the first.
  assert found['batch'] == 1437 * (64 + 4) + 256 * 32 * 4 + 4
  assert account['memory']['arguments'] == sum(found.values())
  assert account['memory']['temporaries'] > 64 / 2 * 32 * 4
  gradients = [one for one in plan.collectives if one['kind'] == 'all-reduce']
  assert sum(one['bytes'] for one in gradients) >= found['parameters']
  assert account['kernels'] == []
  said = '\n'.join(text.lines(plan))
  assert 'fits: ' in said
  assert 'all-reduce' in said
  assert all(len(line) <= 120 for line in said.splitlines())


def test_what_launch_would_refuse_is_refused_in_its_words(two):
  for fields, named in (
    ({'data': config_lib.Data(batch_size=63)}, '62 or 64'),
    ({'mesh': config_lib.Mesh(data=3)}, 'nearest is data 2'),
    ({'model': {'name': 'none_such'}}, 'none_such'),
    ({'data': config_lib.Data(name='none_such')}, 'cifar10'),
    ({'data': config_lib.Data(name='oxford_flowers102')}, 'not prepared'),
    ({'kernels': 'pallas_tpu'}, 'TPU'),
  ):
    with pytest.raises(config_lib.UserError) as error:
      two.ask(runs.config(**fields))
    assert named in str(error.value)
    assert '\n' not in str(error.value)


def test_every_mesh_has_its_plan_or_says_why_it_cannot(two):
  config = runs.config(
    model={'name': 'mlp', 'widths': (5, 5)}, partition='shard_map'
  )
  (mesh, plan), *refused = search.fastest(list(search.mesh(two, config)))
  assert (mesh.data, mesh.fsdp, mesh.tensor) == (2, 1, 1)
  assert plan.fits
  said = {(m.fsdp, m.tensor): why for m, why in refused}
  assert 'config.mesh.fsdp is 2; set it to 1' in said[2, 1]
  assert 'divides no width' in said[1, 2] or 'set it to 1' in said[1, 2]


@pytest.mark.slow
def test_a_compiler_that_dies_is_one_line_and_the_next_question_has_another(
  two,
):
  for signum, said in ((signal.SIGABRT, 'SIGABRT'), (signal.SIGKILL, 'memory')):
    two.ask(runs.config(), compiled=False)  # It runs.
    end = threading.Timer(0.5, two._process.send_signal, [signum])
    end.start()
    with pytest.raises(compiler_lib.CompileError) as error:
      _ask_for_ever(two)
    assert said in str(error.value)
    assert '\n' not in str(error.value)
    assert error.value.exit_code == 1
  assert two.ask(runs.config(), compiled=False)['devices'] == 2


def _ask_for_ever(compiler):
  while True:
    compiler.ask(runs.config())


# ------------------------------------------------------------------ figures


@pytest.mark.parametrize(
  ('model', 'multiply_adds'),
  [
    pytest.param(
      {'name': 'resnet', 'variant': '50'},
      4.09e9,
      marks=[pytest.mark.slow, pytest.mark.long],
    ),
    ({'name': 'vit', 'variant': 'B/16'}, 17.56e9),
    pytest.param(
      {'name': 'vit', 'variant': 'L/16', 'scan': True, 'remat': True},
      61.55e9,
      marks=pytest.mark.slow,
    ),
  ],
)
def test_a_plan_counts_the_published_multiply_adds(model, multiply_adds):
  config, _, _ = command.load_config('imagenet_resnet50', [])
  config.model, config.l2 = model, 0.0
  program = program_lib.create(config, described=True)
  account = compiling.account(program, compiled=False)
  assert account['forward'] / 2 == pytest.approx(multiply_adds, rel=0.01)
  assert account['examples'] == 1_281_167
  assert account['parameters'] == models.count_parameters(program.model)
  # The gradient costs twice as much, less the images'; what blocks compute
  # anew, once more.
  share = account['flops'] / (256 * account['forward'])
  assert 3.5 < share < 4 if model.get('remat') else 2.9 < share < 3


@pytest.mark.parametrize('name', command.config_names())
def test_sixteen_devices_can_share_the_batch_of_every_config(name):
  config, _, _ = command.load_config(name, [])
  assert config.data.batch_size % (16 * config.accumulate) == 0


@pytest.mark.slow
@pytest.mark.long
def test_every_config_is_planned_on_eight_devices():
  target = targets.parse('cpu:8')
  with compiler_lib.Compiler(target) as compiler:
    for name in command.config_names():
      config, _, _ = command.load_config(name, [])
      plan = cost.plan(target, compiler.ask(config))
      assert plan.step > 0, name
      # A small machine may have no room for ImageNet's, and is told so.
      assert plan.fits or name.startswith('imagenet'), name


def arguments(model, devices, **fields) -> list[list[int]]:
  """[planned, live] bytes on the first device: all, then parts."""
  config = runs.config(
    model=model,
    mesh=config_lib.Mesh(data=-1, fsdp=min(len(devices), 4)),
    **fields,
  )
  planned = compiling.account(
    program_lib.create(config, described=True, devices=devices)
  )
  program = program_lib.create(config, devices=devices)
  state = program.init()
  batch = next(
    pipeline.train_batches(
      program.dataset.splits['train'],
      seed=0,
      batch_size=64,
      first_step=0,
      mesh=program.mesh,
    )
  )

  def live(tree):
    return sum(
      shard.data.nbytes
      for leaf in jax.tree.leaves(tree)
      for shard in leaf.addressable_shards
      if shard.device == devices[0]
    )

  found = planned['bytes']
  return [
    [sum(found.values()), live((state, batch))],
    [planned['memory']['arguments'], live((state, batch))],
    [found['parameters'], live(state.params)],
    [found['moments'], live(state.opt_state)],
    [found['statistics'], live(state.batch_stats)],
    [found['running mean'], live(state.ema_params)],
    [found['batch'], live(batch)],
  ]


CNN = {'name': 'cnn', 'widths': (32, 64)}


def test_a_plans_arguments_are_the_live_arrays_to_the_byte():
  found = arguments(CNN, jax.devices()[:1], ema_decay=0.9)
  for planned, live in found:
    assert planned == live > 0


@pytest.mark.slow
def test_so_they_are_on_each_of_eight_devices():
  script = (
    'import jax, json; from experiments import command; command.quiet(); '
    'from tests.experiments import test_plan; '
    'print(json.dumps(test_plan.arguments('
    'test_plan.CNN, jax.devices(), ema_decay=0.9)))'
  )
  ran = subprocess.run(
    [sys.executable, '-c', script],
    capture_output=True,
    text=True,
    timeout=300,
    cwd=conftest.REPOSITORY,
    env=conftest.environment(JAX_NUM_CPU_DEVICES='8', JAX_PLATFORMS='cpu'),
  )
  assert ran.returncode == 0, ran.stderr
  found = json.loads(ran.stdout.splitlines()[-1])
  for planned, live in found:
    assert planned == live > 0
  alone = arguments(CNN, jax.devices()[:1], ema_decay=0.9)
  parameters, divided = 2, 3 * 3 * 32 * 64  # By fsdp, of 4.
  assert alone[parameters][0] - found[parameters][0] == 4 * divided * 3 // 4


# ------------------------------------------------------------------ command


@pytest.mark.slow
def test_the_command_answers_in_text_in_json_and_in_a_picture(
  run, tmp_path, cache
):
  picture = tmp_path / 'plan.png'
  words = ['--config=cifar10_cnn', '--target=cpu:2', f'--picture={picture}']
  env = {'TFDS_DATA_DIR': str(tmp_path), 'TAISHAN_CACHE': str(tmp_path / 'c')}
  said = run('plan', *words, env=env, cwd=tmp_path)
  assert (said.returncode, said.stderr) == (0, '')
  assert 'cnn, ' in said.stdout
  assert 'all 7,812 steps' in said.stdout  # 10 epochs of 50,000 in 64s.
  assert Image.open(picture).size[0] > 1000
  assert not (tmp_path / 'c' / 'decoded').exists()  # No data was needed.
  said = run('plan', *words[:2], '--json', env=env, cwd=tmp_path)
  answer = json.loads(said.stdout)
  assert answer['fits'] is True
  assert answer['bytes_a_device']['arguments']['parameters'] == (
    4 * answer['parameters']
  )
  assert answer['step_seconds'] == max(answer['seconds'].values())


@pytest.mark.slow
@pytest.mark.long
def test_the_largest_batch_is_said_with_the_ones_tried(capsys, monkeypatch):
  monkeypatch.setattr(targets, '_cpu', lambda: _with_memory(4 * 2**20))
  words = ['--config=digits_mlp', '--target=cpu:1', '--search_batch']
  assert planned(*words) == 0
  said = capsys.readouterr().out
  (line,) = [one for one in said.splitlines() if 'largest that fits' in one]
  size = int(line.rpartition('=')[2])
  verdicts = {
    int(one.split()[0].replace(',', '')): 'does not' not in one
    for one in said.splitlines()
    if one.strip()[:1].isdigit()
  }
  assert verdicts[size]
  assert all(fits == (tried <= size) for tried, fits in verdicts.items())


def _with_memory(size):
  import dataclasses

  return dataclasses.replace(targets.CPU, memory=size)


@pytest.mark.parametrize(
  ('words', 'named'),
  [
    (['--target=cpu:1'], '--config'),
    (['--config=digits_mlp'], 'v5e:4x4'),
    (['--config=digits_mlp', '--target=tpu'], 'v5e:4x4'),
    (['--config=none_such', '--target=cpu:1'], 'digits_mlp'),
    (['--config=digits_mlp', '--target=cpu:1', '--picture=x.gif'], '.png'),
    (['--config=digits_mlp', '--target=cpu:1', '--picture=no/x.png'], 'no'),
    (
      ['--config=digits_mlp', '--target=cpu:1', '--search_batch',
       '--search_mesh'],
      'one of them',
    ),
  ],
)  # fmt: skip
def test_a_mistake_is_one_line(words, named, capsys):
  assert planned(*words) == 2
  errors = capsys.readouterr().err
  assert errors.count('\n') == 1
  assert named in errors


@pytest.mark.parametrize('name', ['v5e:4x4', 'h200:8'])
def test_where_a_compiler_is_missing_a_line_says_what_to_install(
  name, capsys, monkeypatch
):
  def missing(package):
    raise compiler_lib.importlib.metadata.PackageNotFoundError(package)

  monkeypatch.setattr(compiler_lib.importlib.metadata, 'version', missing)
  assert planned('--config=digits_mlp', f'--target={name}') == 2
  errors = capsys.readouterr().err
  assert errors.count('\n') == 1
  extra = 'tpu' if name == 'v5e:4x4' else 'cuda'
  assert f'python3 -m experiments.install {extra}' in errors


def _children(pid):
  """Of that process, those alive."""
  found = []
  for status in pathlib.Path('/proc').glob('[0-9]*/stat'):
    try:
      fields = status.read_text().rpartition(')')[2].split()
    except OSError:
      continue
    if int(fields[1]) == pid and fields[0] != 'Z':
      found.append(int(status.parent.name))
  return found


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir('/proc'), reason='/proc is not here')
@pytest.mark.parametrize(
  ('signum', 'code'), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_with_the_command_its_compiler_ends(signum, code):
  words = ['--config=cifar10_resnet18', '--target=cpu:4']
  with process.Process('plan', *words) as one:
    one.wait_until_it_listens()
    end = time.monotonic() + 60
    while not (children := _children(one.pid)):
      assert time.monotonic() < end
      time.sleep(0.1)
    time.sleep(3)
    one.send(signum)
    assert one.end(30) == code
    end = time.monotonic() + 10
    while any(pathlib.Path(f'/proc/{child}').exists() for child in children):
      assert time.monotonic() < end
      time.sleep(0.1)
