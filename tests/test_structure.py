"""The doors between the rooms, and what the folders promise a reader."""

import ast
import re
import subprocess
import sys

import pytest

from tests import conftest

ROOMS = ('models', 'kernels', 'train', 'experiments')
# What a room may import of the project and of the libraries that have weight.
FOLDERS = (
  *ROOMS, 'tests', 'train/data', 'experiments/search', 'experiments/planning',
)  # fmt: skip
MAY_IMPORT = {
  'kernels': {'kernels', 'jax', 'numpy'},
  'models': {'models', 'kernels', 'flax', 'jax', 'numpy', 'safetensors'},
  'train': {
    'train', 'models', 'kernels', 'flax', 'jax', 'numpy', 'optax', 'orbax',
    'tensorflow_datasets', 'sklearn', 'PIL', 'filelock', 'platformdirs', 'rich',
    'grain', 'absl', 'tensorboardX', 'tensorstore',
  },
  'experiments': {
    *ROOMS, 'absl', 'flax', 'jax', 'numpy', 'optax', 'sklearn', 'matplotlib',
    'rich', 'optuna', 'filelock', 'ray',
  },
}  # fmt: skip


def _files(room):
  return sorted((conftest.REPOSITORY / room).rglob('*.py'))


def _imports(file) -> set[str]:
  """The top-level packages that a file imports, anywhere in it."""
  found = set()
  for node in ast.walk(ast.parse(file.read_text())):
    if isinstance(node, ast.Import):
      found |= {alias.name.split('.')[0] for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f'{file} imports relatively'
      found.add(node.module.split('.')[0])
  return found - set(sys.stdlib_module_names)


@pytest.mark.parametrize('room', ROOMS)
def test_a_room_imports_only_what_its_door_allows(room):
  assert _files(room)
  for file in _files(room):
    # The suite that compares with PyTorch, where a user has it.
    compared = {'torch'} if file.parent.name == 'benchmarks' else set()
    assert _imports(file) <= MAY_IMPORT[room] | compared, file


def _module(file) -> str:
  parts = file.relative_to(conftest.REPOSITORY).with_suffix('').parts
  return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


def test_no_modules_import_each_other_in_a_circle():
  modules = {_module(f): f for room in ROOMS for f in _files(room)}
  graph = {}
  for name, file in modules.items():
    graph[name] = set()
    for node in ast.walk(ast.parse(file.read_text())):
      if isinstance(node, ast.ImportFrom):
        for alias in node.names:
          target = f'{node.module}.{alias.name}'
          graph[name].add(target if target in modules else node.module)
      elif isinstance(node, ast.Import):
        graph[name] |= {alias.name for alias in node.names}
    graph[name] &= modules.keys() - {name}
  # Lazy packages name their own files, which is no circle.
  for name in ('train', 'experiments'):
    graph[name] = set()
  seen, path = set(), []

  def visit(name):
    assert name not in path, ' -> '.join([*path[path.index(name) :], name])
    if name not in seen:
      path.append(name)
      for target in sorted(graph[name]):
        visit(target)
      path.pop()
      seen.add(name)

  for name in graph:
    visit(name)


def test_no_file_is_called_utils_or_helpers_and_none_is_long():
  for room in ROOMS:
    for file in _files(room):
      assert file.stem not in ('utils', 'util', 'helpers', 'common', 'misc')
      assert len(file.read_text().splitlines()) <= 400, file


def test_every_folder_has_a_readme_of_one_screen():
  for room in FOLDERS:
    lines = (conftest.REPOSITORY / room / 'README.md').read_text().splitlines()
    assert 10 <= len(lines) <= 60, room


def test_every_public_function_and_class_says_what_it_does():
  for room in ROOMS:
    for file in _files(room):
      tree = ast.parse(file.read_text())
      assert ast.get_docstring(tree), file
      for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not (
          node.name.startswith('_')
        ):
          assert ast.get_docstring(node), f'{file}: {node.name}'


@pytest.mark.parametrize(
  'module',
  [
    'train',
    'train.config',
    'train.signals',
    'experiments',
    'experiments.launch',
    'experiments.evaluate',
    'experiments.ensemble',
    'experiments.plan',
    'experiments.configs.digits_cnn',
  ],
)
def test_what_help_needs_imports_no_jax(module):
  ran = subprocess.run(
    [
      sys.executable, '-c',
      f'import sys, {module}; print(*sorted(sys.modules))',
    ],
    capture_output=True, text=True, check=True,
    env=conftest.environment(), cwd=conftest.REPOSITORY,
  )  # fmt: skip
  loaded = {name.split('.')[0] for name in ran.stdout.split()}
  assert not loaded & {'jax', 'flax', 'optax', 'orbax', 'numpy', 'sklearn'}


def test_the_readme_shows_the_loop_as_it_is():
  text = (conftest.REPOSITORY / 'README.md').read_text()
  shown = text.split('```python\n')[1].partition('```')[0]
  loop = (conftest.REPOSITORY / 'train' / 'loop.py').read_text()
  assert len(shown.splitlines()) > 15
  assert shown in loop


def test_every_test_and_file_that_a_readme_names_is_there():
  readmes = [
    conftest.REPOSITORY / room / 'README.md' for room in ('', *FOLDERS)
  ]
  for file in readmes:
    text = file.read_text()
    for target in re.findall(r'\]\(([^)#]+)\)', text):
      assert (file.parent / target).exists(), f'{file}: {target}'
    tests = {
      name
      for path in (conftest.REPOSITORY / 'tests').rglob('test_*.py')
      for name in re.findall(r'def (test_\w+)', path.read_text())
    }
    for name in re.findall(r'`(test_\w+)`', text):
      assert name in tests, f'{file}: {name}'
