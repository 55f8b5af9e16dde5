r"""Makes .venv and installs the project into it, with any extras named.

  python3 -m experiments.install            # to run experiments
  python3 -m experiments.install dev        # to run the tests too

Needs Python and nothing else. A second call returns at once, unless
pyproject.toml or the extras have changed.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
OLDEST = (3, 11)


def main() -> int:
  """Exit code: 0 installed, 2 something is missing, 1 pip failed."""
  parser = argparse.ArgumentParser(
    prog='install',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument(
    'extras', nargs='*', help='dev, parity, cuda, tpu, tensorboard'
  )
  parser.add_argument('--venv', default='.venv', help='where (.venv)')
  args = parser.parse_args()
  if sys.version_info < OLDEST:
    return _fail(
      f'Python {OLDEST[0]}.{OLDEST[1]} or newer is needed, and this is '
      f'{sys.version.split()[0]}: call a newer one by its name, as '
      'python3.12 -m experiments.install'
    )
  venv = (ROOT / args.venv).resolve()
  python = venv / ('Scripts' if os.name == 'nt' else 'bin') / 'python'
  target = f'.[{",".join(sorted(args.extras))}]' if args.extras else '.'
  stamp, mark = venv / 'installed', _mark(target)
  if stamp.exists() and mark in stamp.read_text().split():
    return 0
  if not python.exists() and importlib.util.find_spec('ensurepip') is None:
    return _fail(
      'this Python cannot make virtual environments: '
      f'sudo apt install python3.{sys.version_info[1]}-venv (on Debian and '
      'Ubuntu), then the same command again'
    )
  print(f'installing into {venv}, a few minutes the first time', flush=True)
  if not python.exists():
    code = _run([sys.executable, '-m', 'venv', str(venv)])
    if code:
      return code
  code = _run([str(python), '-m', 'pip', 'install', '-e', target])
  if not code:
    with stamp.open('a') as file:
      file.write(f'{mark}\n')
  return code


def _mark(target: str) -> str:
  """Names what is installed: another pyproject.toml is another mark."""
  project = (ROOT / 'pyproject.toml').read_bytes()
  return hashlib.sha256(project + target.encode()).hexdigest()


def _run(command: list[str]) -> int:
  """Runs quietly; on a terminal shows the package at hand, on failure all."""
  process = subprocess.Popen(
    command,
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )
  lines = []
  for line in process.stdout:
    lines.append(line)
    if sys.stdout.isatty():
      print(f'\r\x1b[K{line.strip()[:70]}', end='', flush=True)
  if sys.stdout.isatty():
    print('\r\x1b[K', end='', flush=True)
  if process.wait():
    print(''.join(lines[-30:]), file=sys.stderr)
    return _fail(f'{" ".join(command)} failed', code=1)
  return 0


def _fail(message: str, code: int = 2) -> int:
  print(f'install: {message}', file=sys.stderr)
  return code


if __name__ == '__main__':
  sys.exit(main())
