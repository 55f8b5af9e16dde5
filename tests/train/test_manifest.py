"""Damage to a checkpoint is found, named and gone around; nothing is silent."""

import json
import os
import pathlib
import pickle
import random
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import conftest
from tests import runs
from train import checkpoint
from train import commit
from train import config as config_lib
from train import loop
from train import manifest
from train import program as program_lib

OLD, NEW = 4, 12  # The steps that are kept: the best, and the newest.


@pytest.fixture(scope='module')
def program():
  return program_lib.create(runs.config())


@pytest.fixture(scope='module')
def saved(program, tmp_path_factory):
  """A workdir with two checkpoints, and the two states, on the host."""
  workdir = tmp_path_factory.mktemp('saved')
  (workdir / 'config.json').write_text(config_lib.to_json(program.config))
  state = program.init()
  states = {}
  with opened(program, workdir) as checkpoints:
    for step in (OLD, NEW):
      state = jax.tree.map(lambda x: (x + 1).astype(x.dtype), state)
      states[step] = jax.tree.map(np.array, state)
      checkpoints.save(state, step)
  return workdir, states


@pytest.fixture
def workdir(saved, tmp_path):
  """A copy of it, to damage."""
  return shutil.copytree(saved[0], tmp_path / 'run')


def opened(program, workdir, said=None, *, read_only=False):
  say = print if said is None else said.append
  scores = {OLD: 1.0}
  return checkpoint.Checkpoints(
    workdir.absolute(), program.config, scores, say=say, read_only=read_only
  )


def newest(program, workdir, *, read_only=False):
  """The step that is restored, its state on the host, and what was said."""
  said = []
  with opened(program, workdir, said, read_only=read_only) as checkpoints:
    state, step = checkpoints.restore_newest(program)
  return step, jax.tree.map(np.array, state), said


def equal(a, b) -> bool:
  return jax.tree.all(
    jax.tree.map(lambda x, y: x.tobytes() == y.tobytes(), a, b)
  )


def files(folder) -> list[pathlib.Path]:
  return sorted(path for path in folder.rglob('*') if path.is_file())


def names(folder) -> set[str]:
  return {path.name for path in (folder / 'checkpoints').iterdir()}


# --------------------------------------------------------- what is written


def test_every_array_and_file_is_in_the_manifest_as_it_was(saved, program):
  workdir, states = saved
  folder = workdir / 'checkpoints' / f'{NEW}'
  record = json.loads((folder / 'manifest.json').read_text())
  listed = {str(path.relative_to(folder)) for path in files(folder)}
  assert set(record['files']) == listed - {'manifest.json'}
  assert record['step'] == NEW
  assert set(record['versions']) >= {'jax', 'orbax-checkpoint'}
  config = config_lib.from_json(json.dumps(record['config']))
  assert config == program.config
  leaves = manifest.arrays(states[NEW])
  assert set(record['arrays']) == set(leaves)
  assert {'step', 'params/head/kernel'} <= set(leaves)
  for path, leaf in leaves.items():
    entry = record['arrays'][path]
    assert entry['shape'] == list(leaf.shape)
    assert entry['dtype'] == str(leaf.dtype)
    assert entry['sha256'] == manifest.digest(leaf)[0]
  assert names(workdir) == {f'{OLD}', f'{NEW}'}


def test_what_is_restored_is_what_was_saved(saved, program):
  step, state, said = newest(program, saved[0])
  assert step == NEW
  assert equal(state, saved[1][NEW])
  assert said == [f'resuming from step {NEW}']


def test_a_digest_knows_order_zeros_and_bfloat16():
  a = np.arange(6, dtype=np.float32).reshape(2, 3)
  digest = manifest.digest(a)
  assert manifest.digest(np.asfortranarray(a)) == digest
  assert manifest.digest(a.T)[0] != digest[0]
  assert manifest.digest(-np.zeros(2))[0] != manifest.digest(np.zeros(2))[0]
  assert manifest.digest(np.zeros((0, 3)))[1]
  for dtype in (jnp.bfloat16, jnp.float8_e4m3fn, np.complex64):
    nan = np.array([1, np.nan]).astype(dtype)
    assert [manifest.digest(x)[1] for x in (nan, nan[:1])] == [False, True]


SHARDED = """
import os, sys
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from train import commit
devices = np.array(jax.devices()).reshape(-1, 2 if {n} > 1 else 1)
mesh = Mesh(devices, ('a', 'b'))
for spec in (P(), P('a'), P('b', 'a'), P(None, ('a', 'b'))):
  x = np.arange(512.0).reshape(16, 32)
  x = jax.device_put(x, NamedSharding(mesh, spec))
  part = commit.Digests(1, {{}}, [('x', x.shape, 'f', commit._owned(x))])
  print(part.record()['arrays']['x']['sha256'])
"""


def test_one_device_and_eight_give_the_same_digests():
  digests = set()
  for n in (1, 8):
    flag = f'--xla_force_host_platform_device_count={n}'
    ran = subprocess.run(
      [sys.executable, '-c', SHARDED.format(n=n)],
      capture_output=True, text=True, check=True, cwd=conftest.REPOSITORY,
      env=conftest.environment(XLA_FLAGS=flag, JAX_PLATFORMS='cpu'),
    )  # fmt: skip
    lines = ran.stdout.split()
    assert len(lines) == 4
    digests |= set(lines)
  assert len(digests) == 1


def test_digests_of_blocks_are_compared_with_a_reader_of_the_whole():
  x = jnp.arange(12.0).reshape(3, 4)
  blocks = {
    index: manifest.digest(np.asarray(x)[manifest._slices(index)])[0]
    for index in ('0:3,0:2', '0:3,2:4')
  }
  record = {'arrays': {'x': {'sha256': blocks}}}
  manifest.check_arrays({'x': x}, record)
  with pytest.raises(manifest.DamagedError, match='x is not the array'):
    manifest.check_arrays({'x': x.at[2, 3].set(0)}, record)


# ---------------------------------------------------------------- not finite


@pytest.mark.parametrize('value', [np.nan, np.inf])
@pytest.mark.parametrize('part', ['params', 'opt_state'])
def test_what_is_not_finite_is_never_written(program, tmp_path, part, value):
  state = program.init()
  tree = jax.tree.map(lambda x: x * jnp.asarray(value).astype(x.dtype)
                      if x.ndim else x, getattr(state, part))  # fmt: skip
  tree = jax.tree.map(lambda x: x + value if x.ndim else x, tree)
  bad = type(state)(**{**vars(state), part: tree})
  line = rf'step 3 is not saved: {part}/\S+ has become nan or infinite'
  with opened(program, tmp_path) as checkpoints:
    checkpoints.save(state, 2)
    checkpoints.save(bad, 3)
    with pytest.raises(commit.NonFiniteError, match=line) as error:
      checkpoints.wait()
    assert error.value.exit_code == 1
    assert checkpoints.steps() == [2]
  assert names(tmp_path) == {'2'}


def test_an_optimizers_scalar_may_be_infinite(program, tmp_path):
  state = program.init()
  opt_state = {'best': jnp.asarray(jnp.inf), 'moments': state.opt_state}
  state = type(state)(**{**vars(state), 'opt_state': opt_state})
  with opened(program, tmp_path) as checkpoints:
    checkpoints.save(state, 2)
    checkpoints.require(2)


def test_a_random_key_in_an_optimizers_state_comes_back(tmp_path):
  program = program_lib.create(runs.config(optimizer={'name': 'noisy_sgd'}))
  with opened(program, tmp_path) as checkpoints:
    checkpoints.save(program.init(), 1)
    checkpoints.require(1)
    state, _ = checkpoints.restore_newest(program)
  assert 'opt_state/0/0/rng_key' in manifest.arrays(state)


# ------------------------------------------------------------------- damage


def truncated(data, part):
  return data[: max(0, int(len(data) * part))]


DAMAGE = {
  'empty': lambda data: b'',
  'a quarter': lambda data: truncated(data, 0.25),
  'half': lambda data: truncated(data, 0.5),
  'one byte less': lambda data: data[:-1],
  'one byte more': lambda data: data + b'\0',
  'zeroed': lambda data: bytes(min(len(data), 4096)) + data[4096:],
  'a bit': lambda data: bytes([data[0] ^ 1]) + data[1:],
  'last bit': lambda data: data[:-1] + bytes([data[-1] ^ 128]),
  'deleted': None,
}


def test_all_damage_to_any_file_is_found_and_named(workdir):
  folder = workdir / 'checkpoints' / f'{NEW}'
  assert len(files(folder)) > 8
  for file in files(folder):
    data = file.read_bytes()
    for kind, change in DAMAGE.items():
      if change is None:
        file.unlink()
      else:
        file.write_bytes(change(data))
      with pytest.raises(manifest.DamagedError) as error:
        manifest.verify(folder)
      assert file.name in str(error.value), kind
      assert '\n' not in str(error.value)
      file.write_bytes(data)
  assert manifest.verify(folder)['others'] == []


@pytest.mark.parametrize('kind', DAMAGE)
def test_a_damaged_newest_is_set_aside_for_the_one_before(
  saved, workdir, program, kind
):
  folder = workdir / 'checkpoints' / f'{NEW}'
  every = files(folder)
  file = every[list(DAMAGE).index(kind) * 7 % len(every)]
  if DAMAGE[kind] is None:
    file.unlink()
  else:
    file.write_bytes(DAMAGE[kind](file.read_bytes()))
  before = file.read_bytes() if file.exists() else None
  step, state, said = newest(program, workdir, read_only=True)
  assert step == OLD
  assert equal(state, saved[1][OLD])
  assert names(workdir) == {f'{OLD}', f'{NEW}'}  # A reader renames nothing.
  assert said[0].endswith('; skipped')
  step, state, said = newest(program, workdir)
  assert step == OLD
  assert equal(state, saved[1][OLD])
  assert names(workdir) == {f'{OLD}', f'{NEW}.damaged'}
  assert len(said) == 2
  assert f'checkpoint {folder} cannot be restored: ' in said[0]
  assert file.name in said[0]
  assert said[0].endswith(f'; set aside as {NEW}.damaged')
  kept = workdir / 'checkpoints' / f'{NEW}.damaged' / file.relative_to(folder)
  assert (kept.read_bytes() if kept.exists() else None) == before


def test_no_bit_flip_is_silent(saved, workdir, program):
  """60 anywhere in the checkpoint: the older one is used, each time."""
  draw = random.Random(0)
  folder = workdir / 'checkpoints' / f'{NEW}'
  bytes_of = {file: file.read_bytes() for file in files(folder)}
  sizes = [len(data) for data in bytes_of.values()]
  for i in range(60):
    # Half of them by size, half in any file.
    weights = sizes if i % 2 else None
    ((file, data),) = draw.choices(list(bytes_of.items()), weights)
    at, bit = draw.randrange(len(data)), draw.randrange(8)
    flipped = bytearray(data)
    flipped[at] ^= 1 << bit
    file.write_bytes(flipped)
    with pytest.raises(manifest.DamagedError):
      manifest.verify(folder)
    if i % 10 == 0:  # The same through Orbax, which takes longer.
      step, state, _ = newest(program, workdir, read_only=True)
      assert step == OLD
      assert equal(state, saved[1][OLD])
    file.write_bytes(data)
  step, state, _ = newest(program, workdir)
  assert step == NEW


def test_a_named_step_that_is_damaged_is_refused_and_not_replaced(
  workdir, program
):
  (workdir / 'checkpoints' / f'{NEW}' / 'state' / '_METADATA').unlink()
  before = names(workdir)
  with (
    opened(program, workdir) as checkpoints,
    pytest.raises(config_lib.UserError, match='state/_METADATA is missing'),
  ):
    checkpoints.restore_named(program, f'{NEW}')
  assert names(workdir) == before


def test_the_best_that_is_damaged_gives_way_to_no_other_where_none_is_scored(
  workdir, program
):
  (workdir / 'checkpoints' / f'{OLD}' / 'state' / '_METADATA').unlink()
  with (
    opened(program, workdir) as checkpoints,
    pytest.raises(config_lib.UserError, match=f'{OLD} cannot be restored'),
  ):
    checkpoints.restore_named(program, 'best')
  assert names(workdir) == {f'{OLD}', f'{NEW}'}


def test_where_none_verifies_one_line_says_so_and_all_stay(workdir, program):
  for step in (OLD, NEW):
    (workdir / 'checkpoints' / f'{step}' / 'manifest.json').unlink()
  with pytest.raises(config_lib.UserError) as error:
    loop.run(program, workdir)
  line = str(error.value)
  assert line.startswith('none of 2 checkpoints can be used: ')
  assert line.count('it has no manifest.json') == 2
  assert '\n' not in line
  assert names(workdir) == {f'{OLD}', f'{NEW}'}
  assert error.value.exit_code == 2


def test_a_manifest_of_another_step_or_none_at_all_is_refused(workdir):
  checkpoints = workdir / 'checkpoints'
  (checkpoints / f'{OLD}').rename(checkpoints / '5')
  with pytest.raises(manifest.DamagedError, match=f'that of step {OLD}'):
    manifest.verify(checkpoints / '5')
  for text in ('', '{', '[]', '3', '{}', '[' * 100_000, '{"format": 1}', '\0'):
    (checkpoints / '5' / 'manifest.json').write_text(text)
    with pytest.raises(manifest.DamagedError, match='manifest.json is damaged'):
      manifest.verify(checkpoints / '5')
  (checkpoints / '5' / 'manifest.json').write_bytes(b'\xff\xfe{}')
  with pytest.raises(manifest.DamagedError, match='manifest.json is damaged'):
    manifest.verify(checkpoints / '5')


def test_arrays_that_differ_though_all_files_agree_are_found(
  workdir, program, monkeypatch
):
  """As if a library read them wrongly."""
  restore = checkpoint.ocp.CheckpointManager.restore

  def wrong(self, step, **kwargs):
    found = restore(self, step, **kwargs)
    if step == NEW:
      found['state'].params['head']['bias'] += 1
    return found

  monkeypatch.setattr(checkpoint.ocp.CheckpointManager, 'restore', wrong)
  step, _, said = newest(program, workdir, read_only=True)
  assert step == OLD
  assert 'params/head/bias is not the array that was saved' in said[0]


def test_a_checkpoint_of_another_model_is_no_damaged_one(workdir):
  other = program_lib.create(runs.config(model={'name': 'mlp', 'widths': (8,)}))
  with (
    opened(other, workdir) as checkpoints,
    pytest.raises(config_lib.UserError, match=r'params/\S+ is .* here and was'),
  ):
    checkpoints.restore_newest(other)
  assert names(workdir) == {f'{OLD}', f'{NEW}'}


def test_a_run_goes_on_from_the_older_one_and_ends_with_the_same_bytes(
  program, tmp_path, monkeypatch
):
  monkeypatch.setattr(
    checkpoint.Checkpoints,
    'should_preserve',
    lambda self, infos, *, context: [True] * len(infos),
  )
  loop.run(program, tmp_path / 'a')
  before = runs.digest(tmp_path / 'a')
  shutil.copytree(tmp_path / 'a', tmp_path / 'b')
  lines = (tmp_path / 'b' / 'metrics.jsonl').read_text().splitlines(True)
  (tmp_path / 'b' / 'metrics.jsonl').write_text(''.join(lines[:-1]))
  for step in (8, 12):
    file = tmp_path / 'b' / 'checkpoints' / f'{step}' / 'state/manifest.ocdbt'
    file.write_bytes(b'')
  loop.run(program, tmp_path / 'b')
  assert names(tmp_path / 'b') == {'4', '8', '12', '8.damaged', '12.damaged'}
  assert runs.digest(tmp_path / 'b') == before
  text = (tmp_path / 'b' / 'metrics.jsonl').read_text()
  assert text == (tmp_path / 'a' / 'metrics.jsonl').read_text()


# ------------------------------------------------- what lies there and is odd


def test_what_nobody_saved_is_told_and_neither_read_nor_followed(
  workdir, program, tmp_path
):
  folder = workdir / 'checkpoints' / f'{NEW}'
  marker = tmp_path / 'marker'
  (folder / 'state' / 'codecs.py').write_text(f'open({str(marker)!r}, "w")')
  (folder / 'a\nb').write_text('')
  (folder / 'odd.pkl').write_bytes(pickle.dumps(0))
  (folder / 'link').symlink_to(tmp_path)
  (folder / 'params').mkdir()
  os.mkfifo(folder / 'pipe')
  step, _, said = newest(program, workdir)
  assert step == NEW
  told = [line for line in said if 'which nobody saved; unread' in line]
  assert len(told) == 5
  assert not any('\n' in line for line in said)
  assert not marker.exists()


@pytest.mark.parametrize('kind', ['link', 'folder', 'pipe'])
def test_a_file_that_has_become_something_else_is_refused(
  workdir, tmp_path, kind
):
  folder = workdir / 'checkpoints' / f'{NEW}'
  for name in ('state/_METADATA', 'manifest.json'):
    file = folder / name
    elsewhere = tmp_path / file.name
    file.rename(elsewhere)
    if kind == 'link':
      file.symlink_to(elsewhere)
    elif kind == 'folder':
      file.mkdir()
    else:
      os.mkfifo(file)
    with pytest.raises(manifest.DamagedError, match=file.name):
      manifest.verify(folder)
    file.rmdir() if kind == 'folder' else file.unlink()
    elsewhere.rename(file)
  manifest.verify(folder)


def test_a_link_in_place_of_a_checkpoint_is_refused(workdir, program, tmp_path):
  folder = workdir / 'checkpoints' / f'{NEW}'
  folder.rename(tmp_path / f'{NEW}')
  folder.symlink_to(tmp_path / f'{NEW}')
  step, _, said = newest(program, workdir)
  assert step == OLD
  assert 'it is no folder' in said[0]
  assert (tmp_path / f'{NEW}' / 'manifest.json').exists()


def test_no_link_is_followed_where_leftovers_are_removed(program, tmp_path):
  elsewhere = tmp_path / 'elsewhere'
  elsewhere.mkdir()
  (elsewhere / 'kept').write_text('')
  folder = tmp_path / 'run' / 'checkpoints'
  (folder / '3.orbax-checkpoint-tmp-whole' / 'state').mkdir(parents=True)
  (folder / '3.orbax-checkpoint-tmp-whole' / 'in').symlink_to(elsewhere)
  (folder / '4.orbax-checkpoint-tmp').symlink_to(elsewhere)
  (folder / '5.orbax-checkpoint-tmp').write_text('')
  with opened(program, tmp_path / 'run') as checkpoints:
    assert checkpoints.steps() == []
  assert list(folder.iterdir()) == []
  assert (elsewhere / 'kept').exists()
