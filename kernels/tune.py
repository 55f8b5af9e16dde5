"""Compares block sizes with the ops' rules, and keeps those that are better.

  python -m kernels.tune --target=here   # an accelerator: measured
  python -m kernels.tune --target=v5e    # no accelerator: estimated, libtpu

About ten seconds a candidate. What is better than the rule by GAIN goes into
tuned.json, in place of what it held of the same chip and op.
"""

import argparse
from collections.abc import Iterator
from collections.abc import Sequence
import dataclasses
import itertools
import json
from typing import Any

import jax

from kernels import bench
from kernels import blocks
from kernels import cases
from kernels import chips
from kernels import compile as compile_lib

GAIN = 1.02


@dataclasses.dataclass(frozen=True)
class Task:
  """What is tuned together.

  Attributes:
    folder: the op's, the key in tuned.json.
    op: the public function.
    shapes: (rows, columns), one for each width.
    candidates: blocks, beside the rule's own.
  """

  folder: str
  op: str
  shapes: tuple[tuple[int, int], ...]
  candidates: tuple[tuple[int, ...], ...]


TASKS = (
  Task(
    'softmax',
    'softmax',
    ((8192, 1024), (16384, 4096), (512, 32768)),
    tuple((rows,) for rows in (16, 32, 64, 128, 256, 512)),
  ),
  Task(
    'cross_entropy',
    'softmax_cross_entropy',
    ((4096, 32768), (2048, 131072)),
    tuple(itertools.product((128, 256, 512), (4096, 8192))),
  ),
)


def compiled(devices, block, **arguments):
  """compile.Request's entry: bench's, with this block, () for the rule's."""
  function, operands = cases.compiled(devices, **arguments)

  def with_block(*operands):
    with blocks.trying(tuple(block)):
      return function(*operands)

  return with_block, operands


def estimated(task: Task, target: str) -> Iterator[tuple[tuple, float | None]]:
  """(shape, block), seconds or None of every candidate."""
  tried = list(itertools.product(task.shapes, ((), *task.candidates)))
  requests = [
    compile_lib.Request(
      'kernels.tune:compiled',
      {
        **dataclasses.asdict(cases.Case(task.op, shape, cases.FORWARD)),
        'implementation': 'pallas_tpu',
        'block': block,
      },
    )
    for shape, block in tried
  ]
  results = compile_lib.for_tpu(requests, target)
  for key, result in zip(tried, results, strict=True):
    yield key, bench.estimate(result, target).seconds


def measured(task: Task) -> Iterator[tuple[tuple, float | None]]:
  """The same on this machine's first device."""
  implementation = f'pallas_{jax.default_backend()}'
  for key in itertools.product(task.shapes, ((), *task.candidates)):
    shape, block = key
    with blocks.trying(block):
      jax.clear_caches()
      case = cases.Case(task.op, shape, cases.FORWARD)
      (cost,) = bench.measured(case, [implementation])
    yield key, cost.seconds


def main(argv: Sequence[str] | None = None):
  """The command."""
  parser = argparse.ArgumentParser(
    prog='python -m kernels.tune',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  folders = [task.folder for task in TASKS]
  parser.add_argument(
    '--target', choices=('here', *chips.CHIPS), default='here'
  )
  parser.add_argument('--op', choices=folders, help='one alone')
  args = parser.parse_args(argv)
  kind, source = bench.conditions(parser, args.target)
  for task in TASKS:
    if args.op in (None, task.folder):
      times = {}
      found = (
        measured(task)
        if args.target == 'here'
        else estimated(task, args.target)
      )
      for (shape, block), seconds in found:
        times[shape, block] = seconds
        took = f'{seconds * 1e6:.1f} us' if seconds else 'failed'
        print(task.folder, shape, block or 'rule', took, flush=True)
      write(task, kind, source, times)


def write(task: Task, kind: str, source: str, times: dict[tuple, float | None]):
  """Puts the blocks that beat the rule into tuned.json."""
  rows = [
    row
    for row in json.loads(blocks.TUNED.read_text())
    if (row['chip'], row['op']) != (kind, task.folder)
  ]
  for shape in task.shapes:
    rule = times[shape, ()]
    best = min(
      task.candidates, key=lambda block: times[shape, block] or float('inf')
    )
    seconds = times[shape, best]
    if seconds and (not rule or rule / seconds >= GAIN):
      rows.append(_row(task, kind, shape, best, source, rule, seconds))
  lines = ',\n'.join(f'  {json.dumps(row)}' for row in rows)
  blocks.TUNED.write_text(f'[\n{lines}\n]\n' if rows else '[]\n')


def _row(task, kind, shape, block, source, rule, seconds) -> dict[str, Any]:
  return {
    'op': task.folder,
    'chip': kind,
    'dtype': cases.DTYPE,
    'columns': bench.bucket(shape[1]),
    'block': block,
    'source': source,
    'us': round(seconds * 1e6, 1),
    'rule_us': round(rule * 1e6, 1) if rule else None,
  }


if __name__ == '__main__':
  main()
