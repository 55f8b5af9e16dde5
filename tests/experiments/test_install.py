"""The set-up command: what it says where it cannot work, and that it is lazy.

That it installs is proven by .ci/run, which begins with it.
"""

import importlib.util
import pathlib
import py_compile
import subprocess
import sys

import pytest

from experiments import install


@pytest.fixture
def commands(monkeypatch, tmp_path):
  """The commands that install would have run; its venv lies in tmp_path."""
  ran = []

  def run(command):
    ran.append(command)
    if 'venv' in command:
      pathlib.Path(command[-1]).mkdir(exist_ok=True)
    return 0

  monkeypatch.setattr(install, '_run', run)
  monkeypatch.setattr(
    sys, 'argv', ['install', 'dev', f'--venv={tmp_path / "venv"}']
  )
  return ran


def test_a_python_without_venv_gets_one_line_with_the_fix(
  commands, monkeypatch, capsys
):
  real = importlib.util.find_spec
  monkeypatch.setattr(
    importlib.util,
    'find_spec',
    lambda name: None if name == 'ensurepip' else real(name),
  )
  assert install.main() == 2
  said = capsys.readouterr().err
  assert said.count('\n') == 1
  assert 'sudo apt install python3.' in said
  assert '-venv' in said
  assert not commands


def test_an_old_python_gets_one_line_that_says_which_is_needed(
  commands, monkeypatch, capsys
):
  monkeypatch.setattr(sys, 'version_info', (3, 9, 18))
  assert install.main() == 2
  said = capsys.readouterr().err
  assert said.count('\n') == 1
  assert 'Python 3.11 or newer' in said
  assert not commands


def test_it_installs_the_extras_named_and_the_second_time_nothing(commands):
  assert install.main() == 0
  made, installed = commands
  assert made[1:3] == ['-m', 'venv']
  assert installed[1:] == ['-m', 'pip', 'install', '-e', '.[dev]']
  assert install.main() == 0
  assert len(commands) == 2


def test_other_extras_or_another_pyproject_install_again(
  commands, monkeypatch, tmp_path
):
  install.main()
  monkeypatch.setattr(sys, 'argv', [*sys.argv[:1], 'tpu', *sys.argv[2:]])
  install.main()
  assert commands[-1][-1] == '.[tpu]'
  (tmp_path / 'pyproject.toml').write_text('[project]\n')
  monkeypatch.setattr(install, 'ROOT', tmp_path)
  count = len(commands)
  install.main()
  assert len(commands) > count


def test_a_failed_install_is_not_taken_for_done(commands, monkeypatch):
  monkeypatch.setattr(
    install, '_run', lambda command: commands.append(command) or 1
  )
  assert install.main() == 1
  assert install.main() == 1
  assert len(commands) == 2


def test_it_needs_nothing_but_the_standard_library():
  ran = subprocess.run(
    [sys.executable, '-S', '-m', 'experiments.install', '--help'],
    capture_output=True,
    text=True,
    cwd=install.ROOT,
  )
  assert ran.returncode == 0, ran.stderr
  py_compile.compile(install.__file__, doraise=True)
