"""Plans of four models on 4 to 256 chips of v5e, so many examples a chip."""

from collections.abc import Sequence
import json
import pathlib
import resource
import time
from typing import Any

from experiments import command
from train import config as config_lib
from train import workdir as workdir_lib

FOLDER = pathlib.Path(__file__).parents[1] / 'results'
_FILE = FOLDER / 'scaling.json'
SLICES = {4: '2x2', 16: '4x4', 64: '8x8', 256: '16x16'}
_SCANNED = [('model.scan', 'true'), ('model.remat', 'true')]
# RandAugment, which computes all its operations, takes long to compile.
_MIRRORED = [*_SCANNED, ('data.augment', 'flip,')]
# name -> (config, what it changes, examples of a chip, most of mesh.fsdp).
CASES = {
  'ViT-B/16': (
    'imagenet_vit_s16', [('model.variant', 'B/16'), *_SCANNED], 64, 1,
  ),
  'ViT-L/16': (
    'imagenet_vit_s16', [('model.variant', 'L/16'), *_MIRRORED], 64, 4,
  ),
  'ViT-H/14': (
    'imagenet_vit_s16', [('model.variant', 'H/14'), *_MIRRORED], 32, 16,
  ),
  'ResNet-50': ('imagenet_resnet50', [], 128, 1),
}  # fmt: skip
_HEAD = """\
# Four models on 4 to 256 chips of v5e, planned

Compiled by libtpu for chips that were not there, and timed on none, by `python
-m experiments.benchmark --suite=scaling` with the extra `tpu`, which goes on
where `scaling.json` ends. bfloat16, a fixed batch for each chip, the ViTs
scanned and rematerialised; ViT-L and ViT-H see images mirrored alone, the other
two all that their recipes do.

Milliseconds are lower bounds: products at 197 TFLOP/s, the memory at 819 GB/s,
links at 50 GB/s. A step is said twice: its exchanges hidden behind the rest,
and on top. Efficiency is that of the step on 4 chips over it, both ways; the
share is the exchanges' where nothing is hidden.

"""
_NAMES = (
  'model',
  'chips',
  'data x fsdp',
  'batch',
  'GiB a chip',
  'compute',
  'memory',
  'exchanges',
  'step',
  'efficiency',
  'share',
)
_COLUMNS = (f'| {" | ".join(_NAMES)} |', '|---' * len(_NAMES) + '|')


def main(cases: Sequence[str]):
  """Plans what results/scaling.json has not yet, and writes the table anew.

  Raises:
    UserError: there is no such case, or libtpu is not installed.
  """
  for name in cases:
    if name not in CASES:
      raise config_lib.UserError(
        f'--cases is {name!r}; there are {", ".join(CASES)}'
      )
  for name in cases or CASES:
    for chips in SLICES:
      if any((r['model'], r['chips']) == (name, chips) for r in rows()):
        continue
      row = plan(name, chips)
      print(json.dumps(row), flush=True)
      found = [*rows(), row]  # Another process may have added some.
      lines = ',\n'.join(' ' + json.dumps(row) for row in found)
      workdir_lib.write(_FILE, f'[\n{lines}\n]\n'.encode())
      workdir_lib.write(FOLDER / 'scaling.md', text(found).encode())


def rows() -> list[dict[str, Any]]:
  """What was planned so far."""
  return json.loads(_FILE.read_text()) if _FILE.exists() else []


def plan(name: str, chips: int) -> dict[str, Any]:
  """One row: bytes of a chip, seconds of a step."""
  from experiments.planning import compiler as compiler_lib
  from experiments.planning import cost
  from experiments.planning import targets

  config_name, changes, each, fsdp = CASES[name]
  changes = [
    *changes,
    ('dtype', 'bfloat16'),
    ('total_epochs', 'none'),
    ('total_steps', '100000'),  # More than a warm-up, however large the batch.
    ('data.batch_size', str(each * chips)),
    ('mesh.fsdp', str(min(fsdp, chips))),
  ]
  config, _, _ = command.load_config(config_name, changes)
  target = targets.parse(f'v5e:{SLICES[chips]}')
  started, before = time.monotonic(), _child_seconds()
  with compiler_lib.Compiler(target) as compiler:
    found = cost.plan(target, compiler.ask(config))
  return {
    'model': name,
    'chips': chips,
    'mesh': found.account['mesh'],
    'batch_size': each * chips,
    'needed': found.needed,
    'over': found.over,
    'seconds': dict(found.seconds),
    'flops': found.account['flops'],
    'answer_seconds': round(time.monotonic() - started, 1),
    'answer_cpu_seconds': round(_child_seconds() - before, 1),
  }


def _child_seconds() -> float:
  used = resource.getrusage(resource.RUSAGE_CHILDREN)
  return used.ru_utime + used.ru_stime


def text(rows: Sequence[dict[str, Any]]) -> str:
  """The table, in Markdown."""
  lines = [*_HEAD.splitlines(), *_COLUMNS]
  first = {}
  for row in sorted(rows, key=lambda r: (list(CASES).index(r['model']),
                                         r['chips'])):  # fmt: skip
    lines.append(_line(row, first.setdefault(row['model'], row)))
  return '\n'.join(lines) + '\n'


def _line(row, first) -> str:
  mesh, gib = row['mesh'], row['needed'] / 2**30
  start = (
    f'| {row["model"]} | {row["chips"]} | {mesh["data"]} x {mesh["fsdp"]} | '
    f'{row["batch_size"]:,} | {gib:.2f} '
  )
  if row['over']:
    over = row['over'] / 2**30
    return start + f'| does not fit: {over:.2f} GiB too much | | | | | |'
  hidden, added = steps(row)
  if not first['over']:
    base = steps(first)
    efficiency = f'{base[0] / hidden:.0%}, {base[1] / added:.0%}'
  else:
    efficiency = ''
  ms = {k: f'{1e3 * v:.1f}' for k, v in row['seconds'].items()}
  return start + (
    f'| {ms["compute"]} | {ms["memory"]} | {ms["interconnect"]} | '
    f'{1e3 * hidden:.1f}, {1e3 * added:.1f} | {efficiency} | '
    f'{row["seconds"]["interconnect"] / added:.1%} |'
  )


def steps(row) -> tuple[float, float]:
  """Seconds of a step, its exchanges hidden behind the rest, and on top."""
  seconds = row['seconds']
  own = max(seconds['compute'], seconds['memory'])
  return max(own, seconds['interconnect']), own + seconds['interconnect']
