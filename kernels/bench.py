"""Each op's kernel on real shapes: against the physical limit and XLA.

  python -m kernels.bench --target=here           # an accelerator: measured
  python -m kernels.bench --target=here --write   # and kept, for dispatch
  python -m kernels.bench --target=v5e            # no accelerator: estimated

Measured: the median of many rounds of the three in turn; the limit is what a
copy and a matrix product reach on the same device. Estimated: with libtpu, see
compile.py; the limit is the data sheet's. Of a convolution's kernel it is the
cycles of a block without its copies, which go beside other blocks' work.

kernel: the op's Pallas kernel. xla: the op's own XLA path, which dispatch
chooses between. plain: what XLA makes of the op as it is usually written.
"""

import argparse
from collections.abc import Iterator
from collections.abc import Sequence
import dataclasses
import functools
import itertools
import json
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

from kernels import block
from kernels import cases as cases_lib
from kernels import chips
from kernels import compile as compile_lib
from kernels import dispatch

ROUNDS = 30
OTHERS = ('xla', cases_lib.PLAIN)


@dataclasses.dataclass(frozen=True)
class Cost:
  """Of one implementation of a case.

  Attributes:
    seconds: None where the reason says why not.
    temporary: bytes beside operands and results.
    reason: one line, or ''.
  """

  seconds: float | None
  temporary: int = 0
  reason: str = ''


def estimate(result, target: str) -> Cost:
  """What compile.for_tpu found, as a cost."""
  if isinstance(result, compile_lib.Failure):
    return Cost(None, reason=result.reason)
  if result.unknown:
    names = ', '.join(result.unknown)
    return Cost(None, result.temporary, f'cycles unknown of {names}')
  return Cost(result.seconds(chips.CHIPS[target]), result.temporary)


def measured(
  case: cases_lib.Case, implementations: Sequence[str]
) -> tuple[Cost, ...]:
  """What each takes on this machine's first device, measured in turn."""
  costs, calls = [], []
  for name in implementations:
    try:
      function, operands = cases_lib.program(case, name)
      ready = jax.jit(function).lower(*operands).compile()
      arrays = _filled(operands, case.columns)
      jax.block_until_ready(ready(*arrays))
    except Exception as error:  # out of memory, or refused: the case's answer
      line = (str(error).strip().splitlines() or [''])[0]
      costs.append(Cost(None, reason=f'{type(error).__name__}: {line}'))
      continue
    costs.append(Cost(0.0, ready.memory_analysis().temp_size_in_bytes))
    calls.append(functools.partial(ready, *arrays))
  times = iter(_in_turn(calls))
  return tuple(
    cost if cost.reason else Cost(next(times), cost.temporary) for cost in costs
  )


def limits() -> tuple[float, float]:
  """(bytes, flops) a second of a copy and a matrix product on this device."""
  x = jnp.ones(2**28, cases_lib.DTYPE)
  w = jnp.ones((8192, 8192), cases_lib.DTYPE)
  copy = jax.jit(lambda x: x + 1)
  product = jax.jit(lambda w: w @ w)
  jax.block_until_ready([copy(x), product(w)])
  seconds = _in_turn([lambda: copy(x), lambda: product(w)])
  return 2 * x.nbytes / seconds[0], 2 * 8192**3 / seconds[1]


def conditions(parser: argparse.ArgumentParser, target: str) -> tuple[str, str]:
  """(the chip's kind, where figures of it come from); or the command ends."""
  if target == 'here':
    if jax.default_backend() not in ('gpu', 'tpu'):
      parser.error(
        'there is no accelerator here: --target takes '
        f'{" or ".join(chips.CHIPS)} for a static estimate'
      )
    return jax.devices()[0].device_kind, f'measured, jax {jax.__version__}'
  try:
    version = compile_lib.version()
  except compile_lib.Unavailable as error:
    parser.error(f'--target={target}: {error}')
  return chips.CHIPS[target].kind, f'static estimate, libtpu {version}'


def bucket(columns: int) -> int:
  """The widest rows for which a figure of these speaks, a power of two."""
  return 1 << (columns - 1).bit_length()


def write(records: Sequence[dict[str, Any]]):
  """Puts records into dispatch.MEASURED; those of the same chip and op go."""
  replaced = {(one['op'], one['chip']) for one in records}
  kept = [
    one
    for one in json.loads(dispatch.MEASURED.read_text())
    if (one['op'], one['chip']) not in replaced
  ]
  lines = ',\n'.join(f'  {json.dumps(one)}' for one in [*kept, *records])
  dispatch.MEASURED.write_text(f'[\n{lines}\n]\n')


def main(argv: Sequence[str] | None = None):
  """The command."""
  parser = argparse.ArgumentParser(
    prog='python -m kernels.bench',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  parser.add_argument(
    '--target', choices=('here', *chips.CHIPS), default='here'
  )
  parser.add_argument(
    '--ops',
    type=_ops,
    default=tuple(cases_lib.OPS),
    help=f'of {",".join(cases_lib.OPS)}',
  )
  parser.add_argument(
    '--write', action='store_true', help=f'into {dispatch.MEASURED.name}'
  )
  args = parser.parse_args(argv)
  if args.write and args.target != 'here':
    parser.error('--write keeps measured times alone: --target=here')
  kind, source = conditions(parser, args.target)
  cases = [case for case in cases_lib.CASES if case.op in args.ops]
  if args.target == 'here':
    names = (f'pallas_{jax.default_backend()}', *OTHERS)
    results = (measured(case, names) for case in cases)
    bandwidth, flops = limits()
  else:
    results = _estimated(cases, args.target)
    chip = chips.CHIPS[args.target]
    bandwidth, flops = chip.bandwidth, chip.flops
  print(f'{kind}, {source}, {cases_lib.DTYPE}; ', end='')
  print(f'limits {bandwidth / 1e9:.0f} GB/s, {flops / 1e12:.0f} TFLOP/s')
  print(_HEAD, flush=True)
  records = []
  for case, costs in zip(cases, results, strict=True):
    floor = max(case.bytes / bandwidth, case.flops / flops)
    print(_line(case, floor, *costs), flush=True)
    kernel, xla, _ = costs
    if kernel.seconds and xla.seconds:
      records.append(record(case, kind, kernel, xla))
  if args.write:
    write(records)


def _estimated(cases, target) -> Iterator[tuple[Cost, ...]]:
  names = ('pallas_tpu', *OTHERS)
  results = compile_lib.for_tpu(
    [
      compile_lib.Request(
        'kernels.cases:compiled',
        {**dataclasses.asdict(case), 'implementation': name},
      )
      for case in cases
      for name in names
    ],
    target,
  )
  for case in cases:
    found = tuple(itertools.islice(results, len(names)))
    kernel, *others = (estimate(result, target) for result in found)
    if (
      case.op in cases_lib.CONVOLUTIONS and case.direction == cases_lib.FORWARD
    ):
      kernel = _of_blocks(case, target)
    yield kernel, *others


def _of_blocks(case, target):
  """A convolution's kernel by its blocks: libtpu gives no cycles of several."""
  arguments = {'op': case.op, 'shape': case.shape}
  (result,) = compile_lib.for_tpu(
    [compile_lib.Request('kernels.block:compiled', arguments)], target
  )
  one = estimate(result, target)
  if not one.seconds:
    return one
  seconds = block.count(case.shape) * one.seconds
  bandwidth = chips.CHIPS[target].bandwidth
  return Cost(max(seconds, case.bytes / bandwidth), one.temporary)


def _filled(operands, columns):
  keys = jax.random.split(jax.random.key(0), len(operands))
  return [
    jax.random.randint(key, one.shape, 0, columns)
    if jnp.issubdtype(one.dtype, jnp.integer)
    else jax.random.normal(key, one.shape, one.dtype)
    for key, one in zip(keys, operands, strict=True)
  ]


def _in_turn(calls) -> list[float]:
  """Median seconds of each call."""
  times = [[] for _ in calls]
  # Enough calls at a time that starting them does not count.
  repeats = [max(1, min(100, int(0.02 / _seconds(call, 1)))) for call in calls]
  for _ in range(ROUNDS):
    for call, repeat, found in zip(calls, repeats, times, strict=True):
      found.append(_seconds(call, repeat))
  return [statistics.median(found) for found in times]


def _seconds(call, repeat):
  start = time.perf_counter()
  for _ in range(repeat):
    result = call()
  jax.block_until_ready(result)
  return (time.perf_counter() - start) / repeat


_HEAD = (
  f'{"op, shape, direction":66}{"MB":>6}{"TFLOP":>6} |{"us: floor":>10}'
  f'{"kernel":>9}{"xla":>9}{"plain":>9} |{"floor/":>7}{"xla/":>6}'
  f'{"plain/kernel":>13} |{"temporary MB":>13}{"xla":>8}{"plain":>8}'
)


def _line(case: cases_lib.Case, floor: float, *costs: Cost) -> str:
  shape = 'x'.join(map(str, case.shape))
  seconds = [cost.seconds for cost in costs]
  kernel = seconds[0]
  times = [f'{one * 1e6:.1f}' if one else '-' for one in (floor, *seconds)]
  ratios = [
    f'{one / kernel:.2f}' if one and kernel else '-'
    for one in (floor, *seconds[1:])
  ]
  memory = [
    f'{cost.temporary / 1e6:.1f}' if cost.seconds else '-' for cost in costs
  ]
  line = (
    f'{case.op + " " + shape + " " + case.direction:66}'
    f'{case.bytes / 1e6:6.0f}{case.flops / 1e12:6.1f} |'
    f'{times[0]:>10}{times[1]:>9}{times[2]:>9}{times[3]:>9} |'
    f'{ratios[0]:>7}{ratios[1]:>6}{ratios[2]:>13} |'
    f'{memory[0]:>13}{memory[1]:>8}{memory[2]:>8}'
  )
  for name, cost in zip(('kernel', *OTHERS), costs, strict=True):
    if cost.reason:
      line += f'\n  {name}: {cost.reason[:200]}'
  return line


def record(case, kind, kernel, xla) -> dict[str, Any]:
  """A row of dispatch.MEASURED."""
  return {
    'op': case.op,
    'chip': kind,
    'dtype': cases_lib.DTYPE,
    'columns': bucket(case.columns),
    'rows': case.shape[0],
    'direction': case.direction,
    'speedup': round(xla.seconds / kernel.seconds, 3),
    'kernel_us': round(kernel.seconds * 1e6, 1),
    'xla_us': round(xla.seconds * 1e6, 1),
    'jax': jax.__version__,
  }


def _ops(text):
  names = tuple(text.split(','))
  for name in names:
    if name not in cases_lib.OPS:
      raise argparse.ArgumentTypeError(
        f'{name!r} is no op; there are {", ".join(cases_lib.OPS)}'
      )
  return names


if __name__ == '__main__':
  main()
