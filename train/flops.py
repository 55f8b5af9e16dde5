"""Floating-point operations of a function, counted from its jaxpr.

Matrix products and convolutions count, 2 for each multiply-add, as papers count
them: twice the published multiply-adds. Elementwise operations, sums and pools
do not: they are a few percent, and bound by memory. What zero padding touches
counts, as in the papers; the holes of a dilated input do not, so that the
gradient of a strided convolution costs what the convolution cost. What is
computed twice, as under jax.checkpoint, counts twice.

XLA's own count takes a loop's body once; here it counts each time it runs.
"""

import collections
from collections.abc import Callable
from collections.abc import Iterator
import itertools
import math

import jax
from jax.extend import core
from jax.interpreters import partial_eval

# Their bodies run as often as only the program itself knows.
_OPEN_ENDED = ('while', 'core_map')


def count(function: Callable, *args) -> int:
  """Operations of function(*args); nothing is computed or compiled.

  Args:
    function: takes trees of arrays, or of their shapes (jax.ShapeDtypeStruct).
    *args: what it takes.

  Raises:
    ValueError: products in a loop whose length the jaxpr does not say.
  """
  jaxpr = jax.make_jaxpr(function)(*args).jaxpr
  # As the compiler does, which computes nothing that nobody reads.
  jaxpr, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
  return sum(by_scope(jaxpr).values())


def by_scope(jaxpr: core.Jaxpr) -> dict[str, int]:
  """Names of jax.named_scope, joined by '/' -> operations directly in there.

  Of the branches of a `cond` the most expensive counts; what shard_map does
  counts on every device.

  Raises:
    ValueError: products in a loop whose length the jaxpr does not say.
  """
  total = collections.Counter()
  for eqn in jaxpr.eqns:
    scope = str(eqn.source_info.name_stack)
    name = eqn.primitive.name
    if name == 'dot_general':
      total[scope] += _dot_general(eqn)
    elif name == 'conv_general_dilated':
      total[scope] += _convolution(eqn)
    else:
      parts = [by_scope(inner) for inner in _inner(eqn)]
      if name == 'cond':
        parts = [max(parts, key=lambda part: sum(part.values()))]
      times = _times(eqn) if any(parts) else 0
      for inner, operations in itertools.chain(*(p.items() for p in parts)):
        path = '/'.join(filter(None, (scope, inner)))
        total[path] += times * operations
  return dict(total)


def _inner(eqn) -> Iterator[core.Jaxpr]:
  """The jaxprs that an operation calls, whatever its kind."""
  for value in eqn.params.values():
    for item in value if isinstance(value, tuple | list) else (value,):
      if isinstance(item, core.ClosedJaxpr):
        yield item.jaxpr
      elif isinstance(item, core.Jaxpr):
        yield item


def _times(eqn) -> int:
  """How often an operation runs the jaxprs that it calls."""
  name = eqn.primitive.name
  if name in _OPEN_ENDED:
    raise ValueError(
      f'{name} multiplies matrices as often as its jaxpr does not say'
    )
  if name == 'scan':
    return eqn.params['length']
  if name == 'pallas_call':
    return math.prod(eqn.params['grid_mapping'].grid)
  if name == 'shard_map':
    sizes = eqn.params['mesh'].shape
    return math.prod(sizes[axis] for axis in eqn.params['newly_manual_axes'])
  return 1


def _dot_general(eqn) -> int:
  lhs = eqn.invars[0].aval.shape
  (contracted, _), _ = eqn.params['dimension_numbers']
  outputs = eqn.outvars[0].aval.size
  return 2 * outputs * math.prod(lhs[axis] for axis in contracted)


def _convolution(eqn) -> int:
  """Each output is a sum over the kernel's taps and input channels.

  The kernel's shape has the channels of one group, so groups need no more.
  """
  params = eqn.params
  numbers = params['dimension_numbers']
  kernel = eqn.invars[1].aval.shape
  out = eqn.outvars[0].aval.shape
  operations = 2 * out[numbers.out_spec[0]] * out[numbers.out_spec[1]]
  operations *= kernel[numbers.rhs_spec[1]]
  for axis, (out_axis, kernel_axis) in enumerate(
    zip(numbers.out_spec[2:], numbers.rhs_spec[2:], strict=True)
  ):
    operations *= _taps(
      out[out_axis],
      kernel[kernel_axis],
      stride=params['window_strides'][axis],
      padding=params['padding'][axis][0],
      hole=params['lhs_dilation'][axis],
      dilation=params['rhs_dilation'][axis],
    )
  return operations


def _taps(
  outputs: int,
  kernel: int,
  *,
  stride: int,
  padding: int,
  hole: int,
  dilation: int,
) -> int:
  """Pairs of an output and a tap, along one axis, that fall into no hole."""
  if hole == 1:
    return outputs * kernel
  return sum(
    (place * stride + tap * dilation - padding) % hole == 0
    for place in range(outputs)
    for tap in range(kernel)
  )
