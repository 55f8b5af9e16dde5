"""ViT's weights: positions on another grid, and qkv from one array or three."""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
import functools
import math

import numpy as np

from models import position
from models import vit
from models.convert import rules
from models.convert import tables

_GOOGLE = 'Transformer/encoderblock_{}/MultiHeadDotProductAttention_1/{}'


def pytorch(
  names: dict[str, str], positions: str, parts: str | None = None
) -> rules.Family:
  """The rules of a ViT's paths.

  Args:
    names: the table of all else.
    positions: their name.
    parts: where query, key and value are, with the block and one of them to
      fill in; None where they are one, in `names`.
  """

  def family(model: vit.ViT, paths):
    paths = list(paths)
    yield from rules.pytorch(names)(model, paths)
    yield _positions(model, positions)
    if parts is not None:
      for i in range(len(model.blocks)):
        yield from _qkv(i, parts, ('.weight', '.bias'), rules.kernel)

  return family


def google(model: vit.ViT, paths: Iterable[str]) -> Iterator[rules.Rule]:
  """The rules of a ViT's paths: theirs are flax's too, with heads apart."""
  for path in paths:
    module, _, leaf = path.rpartition('/')
    if theirs := rules.find(path, tables.VIT_GOOGLE):
      yield rules.Rule(path, (theirs,), rules.vector)
    elif theirs := rules.find(module, tables.VIT_GOOGLE):
      is_out = path.endswith('attention/project/kernel')
      yield rules.Rule(
        path, (f'{theirs}/{leaf}',), _merged if is_out else np.asarray
      )
  yield _positions(model, 'Transformer/posembed_input/pos_embedding')
  for i in range(len(model.blocks)):
    yield from _qkv(i, _GOOGLE, ('/kernel', '/bias'), _columns)


def _qkv(block, name, leaves, columns) -> list[rules.Rule]:
  """qkv of query, key and value; `columns` turns a kernel to [D, D]."""
  found = []
  for ours, theirs in zip(('kernel', 'bias'), leaves, strict=True):
    make = columns if ours == 'kernel' else np.ravel
    found.append(
      rules.Rule(
        f'blocks/{block}/attention/qkv/{ours}',
        tuple(
          name.format(block, part) + theirs
          for part in ('query', 'key', 'value')
        ),
        functools.partial(_concatenated, make),
      )
    )
  return found


def _concatenated(make: Callable, *arrays: np.ndarray) -> np.ndarray:
  return np.concatenate([make(array) for array in arrays], axis=-1)


def _columns(kernel: np.ndarray) -> np.ndarray:
  """[D, heads, D'] -> [D, heads D']."""
  return kernel.reshape(kernel.shape[0], -1)


def _merged(kernel: np.ndarray) -> np.ndarray:
  """[heads, D', D] -> [heads D', D]."""
  return kernel.reshape(-1, kernel.shape[-1])


def _positions(model: vit.ViT, name: str) -> rules.Rule:
  def resize(table):
    """From the square grid that has so many rows, or one less for a class."""
    rows = len(table)
    before = 0 if math.isqrt(rows) ** 2 == rows else 1
    side = math.isqrt(rows - before)
    ours = int(model.class_token is not None)
    if side**2 != rows - before or ours > before:
      raise ValueError('no square grid, or no class token')
    there, here = (f'{a}x{b}' for a, b in ((side, side), model.grid))
    said = f'positions are resized from {there} to {here}'
    if there == here:
      said = ''
    table = position.resize_positions(table, (side, side), model.grid)
    return np.asarray(table)[before - ours :], said

  return rules.Rule('positions', (name,), lambda x: x.squeeze(0), resize)
