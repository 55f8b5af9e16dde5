"""Weights from elsewhere: other libraries' files for the models of this one.

model = models.create('resnet', variant='50', rngs=nnx.Rngs(0))
report = convert.from_torch(model, 'model.safetensors', layout='timm')
print(report)  # What was taken, what was left over, what stays new.

PyTorch is not needed, and no pickle is read. The published weights of others
keep their own licence.
"""

from collections.abc import Collection
from collections.abc import Iterable
from collections.abc import Mapping
import dataclasses
import functools
import os
import re
from typing import Any

from flax import nnx
import jax.numpy as jnp
import numpy as np

from models.convert import files
from models.convert import layouts
from models.convert import rules as rules_lib

Path = tuple[Any, ...]

_HEAD = 'head/'

# The rest of this door.
read = files.read
detect_layout = layouts.detect


@dataclasses.dataclass(frozen=True)
class Report:
  """What a conversion did.

  Attributes:
    layout: whose names they were.
    mapped: path of ours -> names of theirs it was made of.
    unused: names of theirs that nothing was made of.
    missing: paths of ours that nothing was found for.
    notes: what else differs, a line each.
  """

  layout: str
  mapped: Mapping[str, tuple[str, ...]]
  unused: tuple[str, ...]
  missing: tuple[str, ...]
  notes: tuple[str, ...]

  def __str__(self) -> str:
    """A few lines for a person."""
    return '\n'.join(
      [
        f'{len(self.mapped)} arrays taken, named as in {self.layout}; '
        f'new: {layouts.listed(self.missing)}',
        f'unused: {layouts.listed(self.unused)}',
        *self.notes,
        'the published weights of others keep their own licence',
      ]
    )


def from_torch(
  model: nnx.Module,
  weights: Mapping[str, Any] | str | os.PathLike,
  *,
  layout: str,
  skip: Collection[Path] = (),
) -> Report:
  """Gives `model` the weights of the same network in PyTorch.

  All or nothing: on an error the model is as it was. A head of another number
  of classes is left out, and position embeddings are resized to the model's
  grid.

  Args:
    model: a ResNet, DenseNet, ConvNeXt, ViT or RNN.
    weights: a state_dict, its values anything NumPy takes and PyTorch's
      tensors; or a .safetensors file.
    layout: whose names and shapes they are: 'torchvision', 'timm',
      'transformers', or 'torch' for torch.nn.LSTM, GRU and RNN.
    skip: paths, as ('pre_logits', 'bias'), that stay as they are.

  Raises:
    ValueError: a file that cannot be read, weights of another architecture, an
      array that does not fit, or none for an array outside the head.
  """
  return _update(model, weights, layout, skip)


def from_npz(
  model: nnx.Module,
  weights: Mapping[str, Any] | str | os.PathLike,
  *,
  skip: Collection[Path] = (),
) -> Report:
  """As from_torch, with the .npz of google-research/vision_transformer.

  Their GELU is the form with tanh; here, as in timm, it is the exact one.
  """
  return _update(model, weights, 'google', skip)


def _update(model, weights, layout, skip) -> Report:
  values, report = converted(model, weights, layout=layout, skip=skip)
  skipped = {'/'.join(map(str, path)) for path in skip}
  lacking = [
    path
    for path in report.missing
    if not path.startswith(_HEAD) and path not in skipped
  ]
  if lacking:
    raise ValueError(
      f'these weights lack {len(lacking)} arrays of this '
      f'{type(model).__name__}: {layouts.listed(lacking, 3)}; give `skip` '
      'those that are to stay new'
    )
  state = nnx.state(model)
  flat = dict(nnx.to_flat_state(state))
  for path, value in values.items():
    flat[path] = flat[path].replace(jnp.asarray(value))
  nnx.update(model, nnx.from_flat_state(flat))
  return report


def converted(
  model: nnx.Module,
  weights: Mapping[str, Any] | str | os.PathLike,
  *,
  layout: str | None = None,
  skip: Collection[Path] = (),
) -> tuple[dict[Path, np.ndarray], Report]:
  """Path -> array in the model's shape and dtype, and the report.

  What the report has as missing is the caller's to refuse.

  Args:
    model: its arrays may be shapes only, as nnx.eval_shape makes them.
    weights: as from_torch takes them.
    layout: None to tell it by the names.
    skip: paths that stay as they are, whether or not something would fit.
  """
  if not isinstance(weights, Mapping):
    weights = files.read(weights)
  layout = layout or layouts.detect(weights)
  ours = {
    '/'.join(map(str, path)): (path, leaf)
    for path, leaf in nnx.to_flat_state(nnx.state(model))
  }
  theirs = {}
  for name in weights:
    if not name.endswith('num_batches_tracked'):
      other = theirs.setdefault(layouts.spelling(name, layout), name)
      if other != name:
        raise ValueError(
          f'{layouts.listed([other, name])} are names of one array'
        )
  possible = [r for r in layouts.rules(model, layout, ours) if r.path in ours]
  rules = [
    rule for rule in possible if all(name in theirs for name in rule.names)
  ]
  _check_architecture(model, layout, possible, rules, ours, theirs)
  zero = [rule for rule in possible if rule.zero]
  if not _names(zero) & set(theirs):
    for rule in zero:
      zeros = functools.partial(np.zeros, ours[rule.path][1].shape)
      rules.append(rules_lib.Rule(rule.path, (), zeros))
  skipped = {'/'.join(map(str, path)) for path in skip}
  made, notes = {}, []
  for rule in rules:
    if rule.path not in skipped:
      arrays = {theirs[n]: _array(theirs[n], weights) for n in rule.names}
      made[rule.path], note = _make(rule, arrays, ours[rule.path][1])
      notes += note
  if any(rule.path in made and not rule.names for rule in rules):
    notes.append('there are no biases there: here they are 0')
  head = [path for path in ours if path.startswith(_HEAD)]
  other = [
    path
    for path in head
    if path in made and made[path].shape != ours[path][1].shape
  ]
  if other:
    there, here = made[other[0]].shape[-1], ours[other[0]][1].shape[-1]
    notes.append(f'the head has {there} outputs there, {here} here: it is new')
  elif head[0] in made and any(
    'pre_logits' in name for name in set(theirs) - _names(rules)
  ):
    other = head
    notes.append('the head reads pre_logits there, not here: it is new')
  if other or not all(path in made for path in head):  # A head is one.
    for path in head:
      made.pop(path, None)
  mapped = {
    rule.path: tuple(theirs[name] for name in rule.names)
    for rule in rules
    if rule.path in made
  }
  used = {name for names in mapped.values() for name in names}
  report = Report(
    layout,
    mapped,
    unused=tuple(sorted(set(theirs.values()) - used)),
    missing=tuple(sorted(set(ours) - set(made))),
    notes=tuple(notes),
  )
  values = {
    ours[path][0]: array.astype(ours[path][1].dtype, copy=False)
    for path, array in made.items()
  }
  return values, report


def _check_architecture(model, layout, possible, rules, ours, theirs):
  """Raises a ValueError for weights of a network that is not this one.

  Most of ours must be there; and nothing may be left over but what is part of a
  head, or harmless: a network with more in its blocks is another one.
  """
  body = [path for path in ours if not path.startswith(_HEAD)]
  found = [rule for rule in rules if not rule.path.startswith(_HEAD)]
  heads = set(
    map(_top, _names(r for r in possible if r.path.startswith(_HEAD)))
  )
  left = sorted(
    name
    for name in set(theirs) - _names(possible)
    if _top(name) not in heads and not layouts.is_harmless(name, layout)
  )
  if 2 * len(found) < len(body) or left:
    other = f'; {layouts.NPZ}' if layout == 'google' and not found else ''
    raise ValueError(
      f'weights of another architecture: as {layout} names them, {len(found)} '
      f'of the {len(body)} arrays of this {type(model).__name__} are there; '
      f'left over of {len(theirs)}: {layouts.listed(left, 2)}{other}'
    )


def _names(rules: Iterable[rules_lib.Rule]) -> set[str]:
  return {name for rule in rules for name in rule.names}


def _top(name: str) -> str:
  return re.split(r'[./]', name)[0]


def _array(name: str, weights: Mapping[str, Any]) -> np.ndarray:
  """In a dtype that NumPy computes in."""
  value = weights[name]
  if hasattr(value, 'detach'):  # PyTorch's, of which NumPy takes not all.
    value = value.detach().cpu()
    value = value.float() if value.is_floating_point() else value
  array = np.asarray(value)
  if not jnp.issubdtype(array.dtype, jnp.floating):
    raise ValueError(f'{name} holds {array.dtype}, not floating-point numbers')
  array = array.astype(np.float32) if array.dtype.itemsize < 4 else array
  if not np.isfinite(array).all():
    raise ValueError(f'{name} holds nan or infinity')
  return array


def _make(rule, arrays, wanted) -> tuple[np.ndarray, list[str]]:
  """(the array, what to say of it); a head's last axis may be any."""
  became, said = '', ''
  try:
    made = rule.make(*arrays.values())
    became = f' becomes {made.shape}, which'
    if rule.resize is not None:
      made, said = rule.resize(made)
  except ValueError:
    made = None
  sizes = len(wanted.shape) - (1 if rule.path.startswith(_HEAD) else 0)
  if (
    made is None
    or made.ndim != len(wanted.shape)
    or made.shape[:sizes] != wanted.shape[:sizes]
  ):
    shapes = ', '.join(f'{name} {a.shape}' for name, a in arrays.items())
    raise ValueError(
      f'{shapes}{became} does not fit {rule.path} {wanted.shape}'
    )
  return made, [said] if said else []
