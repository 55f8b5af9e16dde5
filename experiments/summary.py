"""A model's layers: output shapes, parameters and FLOPs of one example.

Nothing is computed or compiled: shapes and operations come from one trace of
the forward pass. (nnx.tabulate wants real arrays, and its FLOPs count the body
of a loop once.)
"""

import collections
from collections.abc import Iterator
import contextlib
import dataclasses
import functools
import itertools
import re
import sys
from unittest import mock

from flax import nnx
import jax
import rich.box
import rich.console
import rich.table
import rich.text

from models import layers
from train import flops
from train import program as program_lib
from train import progress
from train import step as step_lib

# Layers within layers are listed, at most so deep, while all fit a screen.
_DEPTH = 3
_ROWS = 40
_PATH = 'path_in_summary'  # On each module, so that copies keep it.
_NUMBERS = ('parameters', 'FLOPs')
_COLUMNS = ('layer', 'type', 'output', *_NUMBERS)

# Path -> the place of a module's first call among all, and its output's shape.
Calls = dict[str, tuple[int, tuple[int, ...] | None]]
_UNCALLED = (-1, None)


@dataclasses.dataclass(frozen=True)
class Layer:
  """A module, or several equal ones in a row, or a parameter of its own.

  Attributes:
    name: its path within the layer it is part of, as 'blocks/0'.
    kind: its class.
    output: the shape of what its call gives, the first of several; None where
      it was not called.
    parameters: numbers in it.
    operations: in the forward pass.
    parts: the layers with parameters in it, in the order of their calls.
  """

  name: str
  kind: str
  output: tuple[int, ...] | None
  parameters: int
  operations: int
  parts: tuple['Layer', ...]


def create(model: nnx.Module, inputs: dict[str, jax.ShapeDtypeStruct]) -> Layer:
  """The model as a tree of layers.

  Args:
    model: its shapes suffice.
    inputs: the shapes of what step.apply takes.
  """
  graphdef, state = nnx.split(model)
  model = nnx.merge(graphdef, state)  # To be marked, unlike the caller's.
  modules = {
    '/'.join(map(str, path)): module
    for path, module in nnx.iter_graph(model)
    if isinstance(module, nnx.Module)
  }
  for path, module in modules.items():
    setattr(module, _PATH, path)
  graphdef, state = nnx.split(model)
  calls = {}

  def forward(state, inputs):
    return step_lib.apply(nnx.merge(graphdef, state), inputs, train=False)[0]

  with (
    _watched({type(module) for module in modules.values()}, calls),
    mock.patch.object(layers, 'conv2d', _one_by_one),
  ):
    jaxpr = jax.make_jaxpr(forward)(state, inputs).jaxpr
  operations = collections.Counter()
  for scope, number in flops.by_scope(jaxpr).items():
    path = re.findall('<(.*?)>', scope)[-1]
    while path:
      operations[path] += number
      path = path.rpartition('/')[0]
    operations[''] += number
  for path, module in modules.items():
    if isinstance(module, nnx.List):
      _share([f'{path}/{i}' for i in range(len(module))], calls, operations)
  return _layer('', '', model, calls, operations)


def show(program: program_lib.Program):
  """Prints the program's model; a table on a terminal, else plain lines."""
  config, dataset = program.config, program.dataset
  inputs = program_lib.model_inputs(dataset, 1)
  whole = create(program.model, inputs)
  given = ', '.join(
    f'{key} {spec.dtype} {list(spec.shape)}' for key, spec in inputs.items()
  )
  progress.say(
    f'{config.model["name"]}, one example of {dataset.name}: {given}'
  )
  rows = [*_rows(whole), _row('total', whole)]
  if sys.stdout.isatty():
    _print_table(rows)
  else:
    _print_lines(rows)
  if size := _count(program.model, nnx.BatchStat):
    progress.say(f'and {size:,} running statistics, which do not count')
  progress.say(
    'FLOPs of a forward pass: 2 for each multiply-add of matrix products and '
    'convolutions; a layer has its own and those of its parts'
  )


# ------------------------------------------------------------------- layers


def _one_by_one(conv, x, norm=None, *, residual=None, activation=None):
  """layers.conv2d with a call of each module, to be listed."""
  y = conv(x)
  y = y if norm is None else norm(y)
  y = y if residual is None else y + residual
  return y if activation is None else layers.activation(activation)(y)


@contextlib.contextmanager
def _watched(classes: set[type], calls: Calls):
  """Calls run in a scope '<path>', and are written down in `calls`."""

  def watched(call):
    @functools.wraps(call)
    def wrapped(self, *args, **kwargs):
      path = getattr(self, _PATH, None)
      if path is None:  # Made during the call.
        return call(self, *args, **kwargs)
      place, _ = calls.setdefault(path, (len(calls), None))
      with jax.named_scope(f'<{path}>'):
        result = call(self, *args, **kwargs)
      if arrays := jax.tree.leaves(result):
        calls[path] = place, arrays[0].shape
      return result

    return wrapped

  originals = {cls: cls.__call__ for cls in classes if '__call__' in dir(cls)}
  with contextlib.ExitStack() as stack:
    for cls, call in originals.items():
      stack.enter_context(mock.patch.object(cls, '__call__', watched(call)))
    yield


def _share(items: list[str], calls: Calls, operations: collections.Counter):
  """What a scan over a list does by its first item all of them have done."""
  if not items or [item for item in items if item in calls] != items[:1]:
    return
  first = items[0]
  for path in [p for p in calls if f'{p}/'.startswith(f'{first}/')]:
    operations[path] //= len(items)
    for item in items[1:]:
      other = item + path.removeprefix(first)
      calls[other], operations[other] = calls[path], operations[path]


def _layer(
  name: str,
  path: str,
  node: nnx.Module | nnx.Param,
  calls: Calls,
  operations: dict[str, int],
) -> Layer:
  """The layer of a module or parameter, with all that is in it."""
  if isinstance(node, nnx.Param):
    return Layer(name, type(node).__name__, None, node.size, 0, ())
  children = sorted(
    _children(node, path), key=lambda child: calls.get(child[0], _UNCALLED)[0]
  )
  parts = [
    _layer(below.removeprefix(f'{path}/'), below, child, calls, operations)
    for below, child in children
  ]
  parameters = _count(node)
  if not any(isinstance(child, nnx.Module) for _, child in children):
    parts = []  # A kernel and a bias say nothing that the layer does not.
  elif path and len(parts) == 1 and parts[0].parameters == parameters:
    parts = parts[0].parts  # It only wraps another.
  return Layer(
    name,
    type(node).__name__,
    calls.get(path, _UNCALLED)[1],
    parameters,
    operations[path],
    tuple(_runs(parts)),
  )


def _children(
  node: nnx.Module, path: str
) -> Iterator[tuple[str, nnx.Module | nnx.Param]]:
  """Paths and modules or parameters below a module, those in lists too."""
  for key, child in nnx.iter_children(node):
    below = f'{path}/{key}' if path else str(key)
    if isinstance(child, nnx.List | nnx.Dict):
      yield from _children(child, below)
    # A module that two others share is listed in one of them.
    elif isinstance(child, nnx.Param) or (
      getattr(child, _PATH, None) == below and _count(child)
    ):
      yield below, child


def _runs(layers: list[Layer]) -> Iterator[Layer]:
  """Equal neighbours in a list as one: 'blocks/1-2', '2 x Block'."""

  def alike(layer: Layer) -> Layer:
    head, _, place = layer.name.rpartition('/')
    return dataclasses.replace(layer, name=head) if place.isdecimal() else layer

  for _, group in itertools.groupby(layers, alike):
    run = list(group)
    first, last = run[0], run[-1].name.rpartition('/')[2]
    if len(run) > 1:
      first = dataclasses.replace(
        _multiplied(first, len(run)),
        name=f'{first.name}-{last}',
        kind=f'{len(run)} x {first.kind}',
      )
    yield first


def _multiplied(layer: Layer, times: int) -> Layer:
  return dataclasses.replace(
    layer,
    parameters=times * layer.parameters,
    operations=times * layer.operations,
    parts=tuple(_multiplied(part, times) for part in layer.parts),
  )


def _count(module: nnx.Module, kind: type = nnx.Param) -> int:
  return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(module, kind)))


# --------------------------------------------------------------------- rows


def _rows(whole: Layer) -> list[tuple[str, ...]]:
  """A row a layer, those within a layer indented below it."""
  for depth in range(_DEPTH, 0, -1):
    rows = list(_walk(whole, depth, ''))
    if len(rows) <= _ROWS:
      break
  return rows


def _walk(layer: Layer, depth: int, indent: str) -> Iterator[tuple[str, ...]]:
  for part in layer.parts if depth else ():
    yield _row(indent + part.name, part)
    yield from _walk(part, depth - 1, indent + '  ')


def _row(name: str, layer: Layer) -> tuple[str, ...]:
  if layer.output is None:
    return name, layer.kind, '', f'{layer.parameters:,}', ''
  shape = str(list(layer.output))
  return (
    name,
    layer.kind,
    shape,
    f'{layer.parameters:,}',
    f'{layer.operations:,}',
  )


def _print_table(rows: list[tuple[str, ...]]):
  table = rich.table.Table(box=rich.box.SIMPLE_HEAD)
  for column in _COLUMNS:
    justify = 'right' if column in _NUMBERS else 'left'
    table.add_column(column, justify=justify)
  *layers, total = rows
  for row in layers:
    table.add_row(*map(rich.text.Text, row))
  table.add_section()
  table.add_row(*map(rich.text.Text, total), style='bold')
  rich.console.Console(file=sys.stdout).print(table)


def _print_lines(rows: list[tuple[str, ...]]):
  lines = [_COLUMNS, *rows]
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  for row in lines:
    cells = [
      f'{cell:>{width}}' if column in _NUMBERS else f'{cell:{width}}'
      for column, cell, width in zip(_COLUMNS, row, widths, strict=True)
    ]
    progress.say('  '.join(cells).rstrip())
