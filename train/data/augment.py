"""Augmentation inside the compiled step: each example drawn from its own key.

`config.data.augment` lists functions in their order. Each sees one example,
before normalization: an image [H, W, C], float32 from 0 to 255, or a
row of features [D]. What comes from outside an image is 0 (He et al. 2015; grey
in RandAugment). At most one mixes two examples, and says the other's share.

A draw is a function of the example's key and of its place in the list alone, so
that it is the same on one device and on many.

Shapes: B batch, H W C image, D features.
"""

from collections.abc import Callable
from collections.abc import Sequence
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from train import blocks as blocks_lib
from train import config as config_lib
from train.data import randaugment
from train.data import transforms

# (key, example, **arguments) -> example.
AUGMENTATIONS: dict[str, Callable] = {
  'pad_crop': transforms.pad_crop,
  'flip': transforms.flip,
  'translate': transforms.translate,
  'rotate': transforms.rotate,
  'stretch': transforms.stretch,
  'colour': transforms.colour,
  'noise': transforms.noise,
  'cutout': transforms.cutout,
  'mixup': transforms.mixup,
  'cutmix': transforms.cutmix,
  'randaugment': randaugment.randaugment,
}
# (key, example, another, **arguments) -> (example, the other's share).
MIXES = ('mixup', 'cutmix')
OF_ROWS = ('noise', 'mixup')  # What fits a row of features, too.
# What an argument can be, both ends included, whatever the data.
_LIMITS = {
  'probability': (0, 1),
  'fraction': (0, 1),
  'degrees': (0, 180),
  'min_area': (0.01, 4),
  'max_aspect': (1, 4),
  'brightness': (0, 1),
  'contrast': (0, 1),
  'saturation': (0, 1),
  'hue': (0, 0.5),
  'std': (0, 1e30),
  'alpha': (0.01, 100),
  'num_ops': (0, len(randaugment.OPERATIONS)),
  'magnitude': (0, randaugment.MAX_MAGNITUDE),
}
_FIELD = 'data.augment'
_SUPPLIED = ('key', 'image', 'x', 'other')  # What `create` passes itself.


def create(blocks: Sequence[config_lib.Block], input_key: str) -> Callable:
  """augment(keys, batch) -> batch, for the compiled training step.

  `keys` are typed keys, [B]; the batch has `input_key`, [B, H, W, C] or [B, D],
  and 'label', [B, ...]. The input becomes float32. After mixup and cutmix there
  are also 'other_label', like 'label', and 'other_share', float32 [B], 0 to 1:
  the loss is (1 - share) * loss(label) + share * loss(other_label). The other
  of place i is that of place i + 1, of the last the first.
  """

  def augment(keys, batch):
    if not blocks:
      return batch
    x = batch[input_key].astype(jnp.float32)
    mixed = {}
    for i, block in enumerate(blocks):
      function = functools.partial(
        AUGMENTATIONS[block['name']], **blocks_lib.kwargs(block)
      )
      own = jax.vmap(jax.random.fold_in, (0, None))(keys, i)
      if block['name'] not in MIXES:
        x = jax.vmap(function)(own, x)
        continue
      x, share = jax.vmap(function)(own, x, jnp.roll(x, -1, 0))
      mixed = {
        'other_label': jnp.roll(batch['label'], -1, 0),
        'other_share': share,
      }
    return batch | {input_key: x} | mixed

  return augment


# ----------------------------------------------------------------- resolve


def resolve(
  augment: str | Sequence[str | config_lib.Block],
  dataset_name: str,
  input_key: str,
  input_shape: tuple[int, ...],
) -> tuple[config_lib.Block, ...]:
  """The blocks with every argument written out.

  Any go together, RandAugment too (it is usual after `stretch`), but each once,
  and one of mixup and cutmix.

  Args:
    augment: names or blocks in their order, or names with commas between them.
    dataset_name: for messages.
    input_key: 'image' or 'features'.
    input_shape: (H, W, C) or (D,).

  Raises:
    UserError: the first that is unknown, out of range, or does not fit.
  """
  resolved = []
  for i, block in enumerate(_listed(augment)):
    field = f'{_FIELD}.{i}'
    function = blocks_lib.lookup(field, block['name'], AUGMENTATIONS)
    earlier = {b['name'] for b in resolved}
    _check_fits(field, block['name'], earlier, dataset_name, input_key)
    block = blocks_lib.resolve(
      field,
      block,
      function,
      given=_given(field, block, input_key, input_shape),
      supplied=_SUPPLIED,
    )
    _check_ranges(field, block, dataset_name, input_key, input_shape)
    resolved.append(block)
  return tuple(resolved)


def check_names(augment: Sequence[str | config_lib.Block]):
  """Raises UserError for what cannot be, whatever the data are."""
  for i, block in enumerate(_listed(augment)):
    field = f'{_FIELD}.{i}'
    function = blocks_lib.lookup(field, block['name'], AUGMENTATIONS)
    given = {'padding': 0, 'size': 0}
    blocks_lib.resolve(field, block, function, given=given, supplied=_SUPPLIED)


def mixes(augment: Sequence[str | config_lib.Block]) -> bool:
  """Whether examples are mixed with each other."""
  return any(block['name'] in MIXES for block in _listed(augment))


def _listed(augment) -> list[config_lib.Block]:
  """Each as a block, names with commas between them as several."""
  listed = []
  for block in [augment] if isinstance(augment, str) else augment:
    if isinstance(block, str):
      names = (name.strip() for name in block.split(','))
      listed += [{'name': name} for name in names if name]
      continue
    if (
      not isinstance(block, dict)
      or not isinstance(block.get('name'), str)
      or not all(isinstance(key, str) for key in block)
    ):
      raise config_lib.UserError(
        f'config.{_FIELD}.{len(listed)} is {block!r}; it takes a name, or a '
        "block as {'name': 'pad_crop', 'padding': 4}"
      )
    listed.append(block)
  return listed


def _check_fits(field, name, earlier, dataset_name, input_key):
  if input_key == 'tokens':
    raise config_lib.UserError(
      f'config.{field} is {name!r}; {dataset_name} holds tokens, which are not '
      'augmented'
    )
  if input_key != 'image' and name not in OF_ROWS:
    raise config_lib.UserError(
      f'config.{field} is {name!r}, which needs images; {dataset_name} has '
      f'rows of features, which take {" and ".join(OF_ROWS)}'
    )
  if name in earlier:
    raise config_lib.UserError(
      f'config.{field} is {name!r} once more; each can be there once'
    )
  if name in MIXES and earlier & set(MIXES):
    raise config_lib.UserError(
      f'config.{field} is {name!r} after {(earlier & set(MIXES)).pop()!r}; an '
      f'example is mixed once, by one of {" and ".join(MIXES)}'
    )


def _given(field, block, input_key, input_shape) -> dict[str, Any]:
  """What an argument is where the block leaves it out, from the data."""
  if input_key != 'image':
    if block['name'] == 'noise' and 'std' not in block:
      raise config_lib.UserError(
        f'config.{field}.std is missing; features have units of their own: '
        "{'name': 'noise', 'std': NUMBER}"
      )
    return {}
  side = min(input_shape[:2])
  padding = min(math.ceil(side / 8), side - 1)
  given = {'padding': padding, 'size': side // 2}
  if input_shape[-1] != 3:
    given |= {'saturation': 0.0, 'hue': 0.0}
  return given


def _check_ranges(field, block, dataset_name, input_key, input_shape):
  """Refuses numbers beyond what the function, or the image, can take."""
  limits = _LIMITS | {'max_area': (block.get('min_area', 0), 4)}
  of_image = {}
  if input_key == 'image':
    side = min(input_shape[:2])
    of_image = {'padding': (0, side - 1), 'size': (0, side)}
    if input_shape[-1] != 3:
      of_image |= {'saturation': (0, 0), 'hue': (0, 0)}
    limits |= of_image | {'std': (0, 255)}
  for key, value in blocks_lib.kwargs(block).items():
    low, high = limits[key]
    if low <= value <= high:
      continue
    takes = f'{low} to {high}' if low < high else f'{low} alone'
    if key in of_image:
      shape = 'x'.join(map(str, input_shape))
      takes += f' on the {shape} images of {dataset_name}'
    raise config_lib.UserError(
      f'config.{field}.{key} is {value!r}; it takes {takes}'
    )
