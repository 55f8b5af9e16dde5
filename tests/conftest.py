"""Every test run has a cache of its own, and libraries that keep quiet."""

import os
import pathlib
import subprocess
import sys

import jax
from jax.experimental.pallas import mosaic_gpu
import pytest

from experiments import command
from train import mesh

if hasattr(mosaic_gpu, 'InterpretGPUParams'):
  mesh.give_threads(mesh.INTERPRETER_THREADS)  # Before jax looks for devices.

REPOSITORY = pathlib.Path(__file__).parents[1]


def environment(**variables: str) -> dict[str, str]:
  """A new process's: this one's, with the project on its path."""
  return os.environ | {'PYTHONPATH': str(REPOSITORY)} | variables


def pytest_collection_modifyitems(items):
  """The slow ones first, so that no process waits for another's at the end."""
  items.sort(key=lambda item: item.get_closest_marker('slow') is None)


@pytest.fixture(scope='session', autouse=True)
def cache(tmp_path_factory):
  """A cache folder for the session, in place of the user's own."""
  command.quiet()
  folder = tmp_path_factory.mktemp('cache')
  os.environ['TAISHAN_CACHE'] = str(folder)
  # Many tests in this process compile the same program. New processes, which
  # prove that runs end in equal bytes, compile as a user's do.
  compiled = tmp_path_factory.getbasetemp()
  if 'PYTEST_XDIST_WORKER' in os.environ:
    compiled = compiled.parent  # One for all processes.
  jax.config.update('jax_compilation_cache_dir', str(compiled / 'compiled'))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
  jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)
  return folder


@pytest.fixture
def run():
  """run('launch', '--config=...') -> CompletedProcess, in a new process."""

  def run(command, *words, env=None, cwd=REPOSITORY, timeout=120):
    return subprocess.run(
      [sys.executable, '-m', f'experiments.{command}', *words],
      capture_output=True,
      text=True,
      cwd=cwd,
      timeout=timeout,
      env=environment(**(env or {})),
    )

  return run
