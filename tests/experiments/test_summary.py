"""The summary of a model: its layers, shapes, parameters and FLOPs."""

import contextlib
import io
import sys
from unittest import mock

from flax import nnx
import jax
import jax.numpy as jnp
import pytest

from experiments import command
from experiments import launch
from experiments import summary
import models
from train import program as program_lib


def made(name, **kwargs):
  """A model's shapes."""
  return nnx.eval_shape(lambda: models.create(name, **kwargs, rngs=nnx.Rngs(0)))


def image(*shape):
  return {'input': jax.ShapeDtypeStruct((1, *shape), jnp.float32)}


def tokens(length, *others):
  shape = jax.ShapeDtypeStruct((1, length), jnp.int32)
  return {'input': shape} | dict.fromkeys(others, shape)


def launched(*words):
  """Standard output of a launch that must finish and say nothing is wrong."""
  with (
    contextlib.redirect_stdout(io.StringIO()) as out,
    contextlib.redirect_stderr(io.StringIO()) as errors,
  ):
    code = command.run('launch', launch.main, words)
  assert (code, errors.getvalue()) == (0, '')
  return out.getvalue()


def test_each_layer_has_its_shape_parameters_and_operations():
  whole = summary.create(made('mlp'), image(28, 28, 1))
  assert [
    (part.name, part.kind, part.output, part.parameters, part.operations)
    for part in whole.parts
  ] == [
    ('blocks/0', 'Linear', (1, 256), 785 * 256, 2 * 784 * 256),
    ('blocks/1', 'Linear', (1, 128), 257 * 128, 2 * 256 * 128),
    ('head', 'Linear', (1, 10), 129 * 10, 2 * 128 * 10),
  ]
  assert (whole.kind, whole.output, whole.parameters) == (
    'MLP',
    (1, 10),
    235146,
  )


def test_layers_come_in_the_order_of_their_calls():
  whole = summary.create(made('cnn'), image(28, 28, 1))
  assert [part.name for part in whole.parts] == [
    'blocks/0', 'norms/0', 'blocks/1', 'norms/1', 'head',
  ]  # fmt: skip


CASES = {
  'mlp': ({}, image(28, 28, 1)),
  'cnn': ({'head_widths': (16,)}, image(28, 28, 1)),
  'autoencoder': ({'variant': 'variational'}, image(28, 28, 1)),
  'resnet': ({'variant': '50'}, image(224, 224, 3)),
  'vit': ({'variant': 'B/16', 'num_classes': 1000}, image(224, 224, 3)),
  'lstm': (
    {'vocab_size': 65, 'widths': (32, 32), 'bidirectional': True},
    tokens(50),
  ),
}


@pytest.mark.parametrize('name', CASES)
def test_the_layers_add_up_to_the_model(name):
  kwargs, inputs = CASES[name]
  model = made(name, **kwargs)
  whole = summary.create(model, inputs)
  assert whole.parameters == models.count_parameters(model)
  assert whole.operations > 0

  def check(layer):
    if layer.parts:
      assert sum(part.parameters for part in layer.parts) == layer.parameters
      # A layer may multiply matrices itself, as attention does.
      assert sum(p.operations for p in layer.parts) <= layer.operations
    for part in layer.parts:
      check(part)

  check(whole)
  rows = summary._rows(whole)
  assert len(rows) <= summary._ROWS
  assert all(len(row) == len(summary._COLUMNS) for row in rows)


def test_equal_neighbours_are_one_row_that_counts_all_of_them():
  kwargs, inputs = CASES['resnet']
  whole = summary.create(made('resnet', **kwargs), inputs)
  names = {part.name: part for part in whole.parts}
  run = names['blocks/2/1-5']
  assert run.kind == '5 x Block'
  assert run.output == (1, 14, 14, 1024)
  # Convolutions 1024-256-256-1024 and the scales and offsets of their norms.
  convolutions = 2 * 1024 * 256 + 9 * 256 * 256
  assert run.parameters == 5 * (convolutions + 2 * (256 + 256 + 1024))
  assert run.operations == 5 * 2 * 14 * 14 * convolutions
  assert sum(part.parameters for part in run.parts) == run.parameters


class Repeated(nnx.Module):
  """One block whose stacked parameters are scanned over."""

  def __init__(self, rngs):
    self.scale = nnx.Param(jnp.ones(8))
    blocks = [nnx.Linear(8, 8, use_bias=False, rngs=rngs) for _ in range(3)]
    graphdef, _ = nnx.split(blocks[0])
    states = [nnx.split(block)[1] for block in blocks]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    self.blocks = nnx.merge(graphdef, stacked)
    self.used_twice = nnx.Linear(8, 8, rngs=rngs)

  def __call__(self, x, *, train):
    graphdef, states = nnx.split(self.blocks)

    def body(x, state):
      return jax.checkpoint(nnx.merge(graphdef, state))(x), None

    x, _ = jax.lax.scan(body, x * self.scale, states)
    return self.used_twice(self.used_twice(x))


def test_what_is_called_often_is_one_row_and_counts_each_time():
  model = nnx.eval_shape(lambda: Repeated(nnx.Rngs(0)))
  whole = summary.create(model, image(8))
  assert [
    (part.name, part.kind, part.parameters, part.operations)
    for part in whole.parts
  ] == [
    ('scale', 'Param', 8, 0),
    ('blocks', 'Linear', 3 * 64, 3 * 2 * 64),
    ('used_twice', 'Linear', 72, 2 * 2 * 64),
  ]


def test_scanned_blocks_are_listed_as_unrolled_ones():
  kwargs = {'variant': 'Ti/16', 'depth': 12}
  unrolled, scanned = (
    summary.create(made('vit', **kwargs, scan=scan), image(224, 224, 3))
    for scan in (False, True)
  )
  assert scanned == unrolled
  blocks = next(p for p in scanned.parts if p.kind == '12 x Block')
  assert blocks.name == 'blocks/0-11'


def test_a_model_of_several_inputs_is_given_them():
  model = made('seq2seq', vocab_size=12, num_classes=12)
  inputs = tokens(20, 'decoder_tokens')
  inputs['lengths'] = jax.ShapeDtypeStruct((1,), jnp.int32)
  whole = summary.create(model, inputs)
  assert whole.output == (1, 20, 12)
  assert whole.parts[-1].name == 'head'


def test_looking_changes_neither_the_model_nor_its_classes():
  model = made('mlp')
  before = nnx.split(model)[0], nnx.Linear.__call__, models.MLP.__call__
  summary.create(model, image(28, 28, 1))
  after = nnx.split(model)[0], nnx.Linear.__call__, models.MLP.__call__
  assert after == before


# ------------------------------------------------------------------ command


def test_summary_prints_right_aligned_columns(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  text = launched('--config=digits_cnn', '--summary')
  title = 'cnn, one example of digits: input float32 [1, 8, 8, 1]'
  lines = text[text.index(title) :].splitlines()  # Data may be prepared first.
  header = lines[1]
  assert header.split() == ['layer', 'type', 'output', 'parameters', 'FLOPs']
  table = lines[1:8]
  assert {len(line) for line in table} == {len(header)}
  end = header.index('parameters') + len('parameters')
  assert all(line[end - 1].isalnum() and line[end] == ' ' for line in table)
  total = (8 * 8 * 32 * 9 + 4 * 4 * 64 * 9 * 32 + 2 * 2 * 64 * 10) * 2
  assert table[-1].split() == [
    'total', 'CNN', '[1,', '10]', '21,482', f'{total:,}',
  ]  # fmt: skip
  assert 'and 192 running statistics' in lines[8]
  assert list(tmp_path.iterdir()) == []


def test_summary_compiles_nothing():
  compiled = []
  jax.monitoring.register_event_duration_secs_listener(
    lambda event, *_, **kwargs: (
      compiled.append((event, kwargs)) if 'compile' in event else None
    )
  )
  try:
    launched('--config=digits_mlp', '--summary')
    assert not [e for e, _ in compiled if 'backend_compile' in e]
    jax.block_until_ready(jax.jit(lambda x: x * 3 + 1)(jnp.ones(7)))
    assert [e for e, _ in compiled if 'backend_compile' in e]
  finally:
    jax.monitoring.clear_event_listeners()


def test_on_a_terminal_it_is_a_table():
  program = program_lib.create(command.load_config('digits_mlp', [])[0])
  out = io.StringIO()
  out.isatty = lambda: True
  with mock.patch.object(sys, 'stdout', out):
    summary.show(program)
  text = out.getvalue()
  assert '─' in text
  assert '16,640' in text
  assert 'total' in text


def test_a_mistake_is_still_one_line(capsys):
  words = ['--config=digits_mlp', '--summary', '--config.model.widths=0,']
  assert command.run('launch', launch.main, words) == 2
  assert capsys.readouterr().err.count('\n') == 1
