"""A plan, and a search's plans, as lines for a person."""

from collections.abc import Iterator

from experiments.planning import cost

_BYTES = ('B', 'KiB', 'MiB', 'GiB', 'TiB')
_COUNTS = ('', 'k', 'M', 'G', 'T', 'P', 'E')


def size(count: float) -> str:
  """Bytes, with three digits: '1.50 GiB'."""
  return _scaled(count, 1024, _BYTES)


def number(count: float) -> str:
  """A large number, with three digits: '1.50 T'."""
  return _scaled(count, 1000, _COUNTS)


def _scaled(count: float, base: int, units: tuple[str, ...]) -> str:
  for unit in units:
    if abs(count) < base * 0.9995 or unit == units[-1]:
      digits = 0 if unit == units[0] or count >= 99.95 else 1
      digits = 2 if count < 9.995 and unit != units[0] else digits
      return f'{count:.{digits}f} {unit}'.strip()
    count /= base
  raise AssertionError


def duration(seconds: float) -> str:
  """'31.2 ms', '4.5 s', '6.2 h'."""
  if seconds < 1e-3:
    return f'{1e6 * seconds:.3g} us'
  if seconds < 1:
    return f'{1e3 * seconds:.3g} ms'
  if seconds < 120:
    return f'{seconds:.3g} s'
  if seconds < 7200:
    return f'{seconds / 60:.3g} minutes'
  return f'{seconds / 3600:,.1f} h'


def verdict(plan: cost.Plan) -> str:
  """Whether it fits, in one line."""
  needed, available = size(plan.needed), size(plan.available)
  if not plan.available:
    return f'needs {needed} a device; how much there is is not known'
  if plan.fits:
    share = plan.needed / plan.available
    return f'fits: {needed} of {available} a device ({share:.0%})'
  return (
    f'does not fit: {needed} a device, where there are {available}: '
    f'{size(plan.over)} too much'
  )


def lines(plan: cost.Plan) -> Iterator[str]:
  """The whole plan."""
  account, target = plan.account, plan.target
  model = ' '.join(filter(None, (account['model'], account['variant'])))
  mesh = ', '.join(f'{a} {n}' for a, n in account['mesh'].items() if n > 1)
  yield (
    f'{model}, {number(account["parameters"])} parameters, '
    f'{account["dtype"]}, batches of {account["batch_size"]:,} of '
    f'{account["data"]}'
  )
  yield (
    f'{target.name}: {target.devices} x {account["kind"]}'
    f'{f", mesh: {mesh}" if mesh else ""}'
  )
  yield verdict(plan)
  yield ''
  yield 'memory of a device'
  for name, count in memory(plan):
    yield f'  {name:28}{size(count):>12}'
  yield ''
  if plan.step is None:
    yield 'no times: a program that does not fit is not compiled to its end'
    return
  yield 'a step takes the longest of the three'
  yield from _times(plan)
  yield ''
  yield from _whole(plan)


def memory(plan: cost.Plan) -> list[tuple[str, float]]:
  """What a device's memory is needed for, in parts."""
  account = plan.account
  rows = [(name, n) for name, n in account['bytes'].items() if n]
  if account['ahead']:
    rows.append(('batches read ahead', account['ahead']))
  if 'memory' not in account:
    rest = plan.needed - sum(n for _, n in rows)
    return [*rows, ('activations, temporaries', rest)]
  found = account['memory']
  known = sum(account['bytes'].values())
  # Tiles that are padded, less what the step does not read.
  if padding := found['arguments'] - known:
    rows.append(('as they lie in memory', padding))
  return [
    *rows,
    ('activations, temporaries', found['temporaries']),
    *((k, found[k]) for k in ('outputs', 'code') if found[k]),
  ]


def _times(plan: cost.Plan) -> Iterator[str]:
  account, target = plan.account, plan.target
  seconds = {name: duration(s) for name, s in plan.seconds.items()}
  flops = account['flops'] / target.devices
  yield (
    f'  compute       {seconds["compute"]:>12}  {number(flops)}FLOP a device '
    f'at {number(target.rate(account["dtype"]))}FLOP/s'
  )
  yield (
    f'  memory        {seconds["memory"]:>12}  {number(account["moved"])}B '
    f'read and written at {number(target.bandwidth(plan.needed))}B/s'
  )
  yield f'  interconnect  {seconds["interconnect"]:>12}  ' + (
    'nothing is exchanged' if not plan.collectives else 'of which'
  )
  for one in plan.collectives:
    yield (
      f'    {one["kind"]:20}{duration(one["seconds"]):>10}  '
      f'{one["count"]} of {size(one["bytes"])} together'
    )
  if account['kernels']:
    names = ', '.join(sorted(set(account['kernels'])))
    yield f'  kernels       {len(account["kernels"]):>12}  {names}'


def _whole(plan: cost.Plan) -> Iterator[str]:
  yield (
    f'at least {duration(plan.step)} a step ({plan.bound}), at most '
    f'{plan.share_of_peak:.0%} of peak (MFU) and {plan.examples:,.0f} examples '
    'a second'
  )
  chip_hours = plan.hours * plan.target.devices
  paid = f', {chip_hours:,.{0 if chip_hours >= 100 else 2}f} chip-hours'
  yield (
    f'all {plan.account["total_steps"]:,} steps: at least '
    f'{duration(3600 * plan.hours)}{paid * (plan.target.platform != "cpu")}; '
    'evaluating, saving and reading data come on top'
  )


def table(rows: list[tuple[str, ...]]) -> Iterator[str]:
  """Columns, the first to the left; the first row is their names."""
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  for row in rows:
    first, *rest = zip(row, widths, strict=True)
    cells = [f'{first[0]:{first[1]}}', *(f'{c:>{w}}' for c, w in rest)]
    yield '  '.join(cells).rstrip()


def row(name: str, plan: cost.Plan) -> tuple[str, ...]:
  """One plan among several, under COLUMNS."""
  if plan.step is None:
    return name, verdict(plan), '', '', '', ''
  return (
    name,
    size(plan.needed) if plan.fits else f'{size(plan.over)} too much',
    duration(plan.step),
    plan.bound,
    f'{plan.share_of_peak:.0%}',
    f'{plan.examples:,.0f}',
  )


COLUMNS = ('a device', 'a step', 'bound by', 'of peak', 'examples/s')
