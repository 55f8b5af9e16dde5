"""The command that lists, verifies and inspects; it starts no device."""

import shutil

import jax
import pytest

from experiments import checkpoints
from experiments import command
from experiments import evaluate
from tests import runs
from train import checkpoint
from train import config as config_lib
from train import program as program_lib


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  """A workdir with the steps 4 and 12, of which 4 is the best."""
  program = program_lib.create(runs.config())
  workdir = tmp_path_factory.mktemp('saved') / 'run'
  workdir.mkdir()
  (workdir / 'config.json').write_text(config_lib.to_json(program.config))
  lines = ''.join(
    f'{{"step": {step}, "eval/accuracy": {score}}}\n'
    for step, score in ((4, 0.75), (12, 0.5))
  )
  (workdir / 'metrics.jsonl').write_text(lines)
  with checkpoint.Checkpoints(
    workdir, program.config, {4: 0.75, 12: 0.5}, say=print
  ) as opened:
    for step in (4, 12):
      opened.save(program.init(), step)
  return workdir


@pytest.fixture
def workdir(saved, tmp_path):
  return shutil.copytree(saved, tmp_path / 'run')


@pytest.fixture
def call(capsys):
  """call(*words) -> exit code, output, errors."""

  def call(*words, main=checkpoints.main):
    code = command.run('checkpoints', main, words)
    return code, *capsys.readouterr()

  return call


def everything(workdir):
  return {
    path: path.lstat().st_mtime_ns for path in (workdir, *workdir.rglob('*'))
  }


def test_all_are_listed_verified_and_left_alone(call, workdir):
  before = everything(workdir)
  code, out, errors = call(f'--workdir={workdir}')
  assert (code, errors) == (0, '')
  head, first, second = out.splitlines()
  assert head.split() == ['step', 'score', 'MB', 'saved', 'verified']
  assert first.split()[:2] == ['4', '0.75*']
  assert second.split()[:2] == ['12', '0.5']
  assert first.endswith('  yes')
  assert second.endswith('  yes')
  assert everything(workdir) == before


def test_what_is_wrong_is_named_and_the_exit_code_is_1(call, workdir):
  folder = workdir / 'checkpoints'
  (folder / '12' / 'state' / '_METADATA').write_bytes(b'')
  (folder / '8.damaged').mkdir()
  before = everything(workdir)
  code, out, errors = call(f'--workdir={workdir}')
  assert code == 1
  assert errors == 'checkpoints: 1 of 2 do not verify\n'
  assert 'no: state/_METADATA has 0 bytes and not ' in out
  assert out.splitlines()[1].endswith('  yes')
  assert out.count('\n') == 4
  assert 'set aside: 8.damaged' in out
  assert everything(workdir) == before
  code, out, errors = call(f'--workdir={workdir}', '--step=latest')
  assert (code, out) == (1, '')
  assert errors.count('\n') == 1
  assert 'state/_METADATA' in errors


@pytest.mark.parametrize('step', ['best', '4', 'latest'])
def test_a_step_is_shown_with_its_arrays(call, saved, step):
  code, out, errors = call(f'--workdir={saved}', f'--step={step}')
  assert (code, errors) == (0, '')
  lines = {line.split()[0]: line.split() for line in out.splitlines() if line}
  kernel = lines['params/head/kernel']
  assert kernel == ['params/head/kernel', 'float32', '1,280', '(32,', '10)']
  assert 'opt_state/0/0/mu/head/kernel' in lines
  assert f'jax {jax.__version__}' in out


@pytest.mark.parametrize(
  ('words', 'named'),
  [
    ((), ('--workdir', 'missing')),
    (('--step=x',), ('--step', 'latest, best or a number')),
    (('--step=7',), ('--step is 7', '4, 12')),
    (('--step=04',), ('--step is 04', '4, 12')),
    (('--what=7',), ('what',)),
  ],
)
def test_a_mistake_is_one_line_and_exit_code_2(call, saved, words, named):
  where = (f'--workdir={saved}',) if words else ()
  code, out, errors = call(*where, *words)
  assert (code, out) == (2, '')
  assert errors.count('\n') == 1
  assert all(name in errors for name in named)


def test_a_workdir_without_checkpoints_is_one_line(call, workdir, tmp_path):
  shutil.rmtree(workdir / 'checkpoints')
  code, _, errors = call(f'--workdir={workdir}')
  assert code == 2
  assert 'no checkpoint yet' in errors
  code, _, errors = call(f'--workdir={tmp_path / "nowhere"}')
  assert code == 2
  assert 'holds no experiment' in errors


def test_no_device_is_started(run, saved):
  """A platform that is not there would end the command."""
  done = run('checkpoints', f'--workdir={saved}', env={'JAX_PLATFORMS': 'none'})
  assert (done.returncode, done.stderr) == (0, '')
  assert done.stdout.count('  yes\n') == 2


def test_evaluate_goes_on_with_an_older_one_and_says_so(call, workdir):
  (workdir / 'checkpoints' / '12' / 'manifest.json').unlink()
  code, out, errors = call(f'--workdir={workdir}', main=evaluate.main)
  assert code == 0
  assert '"step": 4' in out
  line = errors.splitlines()[0]
  assert 'checkpoints/12 cannot be restored: it has no manifest.json' in line
  assert line.endswith('; skipped')
  code, _, errors = call(
    f'--workdir={workdir}', '--step=12', main=evaluate.main
  )
  assert code == 2
  assert errors.count('\n') == 1
  assert (workdir / 'checkpoints' / '12').is_dir()
