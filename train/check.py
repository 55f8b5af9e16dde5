"""Types and ranges of a config's fields, judged without any library.

Nothing here imports jax, so that a mistyped field answers at once; what only a
library can judge (an optimizer's arguments, say) is judged in resolve.py.
"""

from collections.abc import Mapping
import math
import re
import types
import typing
from typing import Any

from train import config as config_lib


def _expected(annotation) -> str:
  words = {
    int: 'a whole number',
    float: 'a number',
    str: 'a word',
    bool: 'true or false',
    type(None): 'none',
    tuple: 'a tuple',
  }
  args = typing.get_args(annotation)
  if isinstance(annotation, types.UnionType):
    return ' or '.join(_expected(a) for a in args)
  return words.get(annotation, 'a block with a name')


def _convert(value: Any, annotation) -> Any:
  """`value` as the annotation has it; raises TypeError where it cannot be."""
  if isinstance(annotation, types.UnionType):
    for choice in typing.get_args(annotation):
      try:
        return _convert(value, choice)
      except TypeError:
        continue
    raise TypeError
  if typing.get_origin(annotation) is dict:
    annotation = dict
  if annotation is tuple and type(value) is str:
    return (value,)  # As --config.data.augment=flip.
  if annotation is float and type(value) is int and abs(value) < 2**63:
    return float(value)
  if type(value) is not annotation:
    raise TypeError
  return value


def check(config: config_lib.Config) -> config_lib.Config:
  """Types and ranges that need no library; returns the config, ints as floats.

  Raises:
    UserError: the first field that is wrong, what it is, and what it takes.
  """
  for name, cls in config_lib.PARTS.items():
    if not isinstance(getattr(config, name), cls):
      raise config_lib.UserError(
        f'config.{name} is {getattr(config, name)!r}; it takes a '
        f'train.config.{cls.__name__}'
      )
  for path, annotation in config_lib.fields().items():
    value = config_lib.get(config, path)
    try:
      config = config_lib.replace(config, path, _convert(value, annotation))
    except TypeError:
      raise config_lib.UserError(
        f'config.{path} is {value!r}; it takes {_expected(annotation)}'
      ) from None
    _check_data(f'config.{path}', value)
    if typing.get_origin(annotation) is dict and not all(
      isinstance(key, str) for key in value
    ):
      raise config_lib.UserError(
        f'config.{path} is {value!r}; its keys must be words'
      )

  def require(holds: bool, path: str, allowed: str):
    if not holds:
      raise config_lib.UserError(
        f'config.{path} is {config_lib.get(config, path)!r}; {allowed}'
      )

  require(0 <= config.seed < 2**32, 'seed', 'it must be from 0 to 2**32 - 1')
  if (config.total_steps is None) == (config.total_epochs is None):
    raise config_lib.UserError(
      f'config.total_steps is {config.total_steps} and config.total_epochs is '
      f'{config.total_epochs}; give one of the two and set the other to none'
    )
  steps, epochs = config.total_steps, config.total_epochs
  require(steps is None or 0 < steps < 2**31, 'total_steps', 'at least 1')
  require(epochs is None or epochs > 0, 'total_epochs', 'it must be above 0')
  for path in config_lib.CADENCES:
    require(
      0 < config_lib.cadence(config_lib.get(config, path)) < math.inf,
      path,
      "it takes steps (100) or epochs ('2e'), above 0",
    )
  require(config.keep_best >= 0, 'keep_best', 'it must be at least 0')
  data = config.data
  require(data.batch_size >= 1, 'data.batch_size', 'it must be at least 1')
  require(
    0 <= data.validation_fraction < 1,
    'data.validation_fraction',
    'it must be at least 0 and below 1',
  )
  require(
    not isinstance(data.normalize, str)
    or data.normalize in config_lib.NORMALIZE,
    'data.normalize',
    f'it takes {", ".join(config_lib.NORMALIZE)}, none, or a mean and a std',
  )
  if isinstance(data.normalize, dict):
    require(
      set(data.normalize) == {'mean', 'std'}, 'data.normalize',
      "it takes {'mean': (...), 'std': (...)}",
    )  # fmt: skip
  for path in (
    'data.max_examples',
    'data.image_size',
    'data.sequence_length',
    'accumulate',
  ):
    value = config_lib.get(config, path)
    require(value is None or value >= 1, path, 'it must be at least 1')
  require(data.num_workers >= 0, 'data.num_workers', 'it must be at least 0')
  _check_folds(data, require)
  _check_recipe(config, require)
  for path in config_lib.BLOCKS:
    require(
      isinstance(config_lib.get(config, path).get('name'), str),
      path,
      'it must have a name',
    )
  if 'learning_rate' in config.optimizer:
    raise config_lib.UserError(
      'config.optimizer.learning_rate: the rate has one home, '
      'config.schedule; say --config.schedule.name=constant_schedule '
      f'--config.schedule.value={config.optimizer["learning_rate"]}'
    )
  return config


def _check_folds(data: config_lib.Data, require):
  folds, fold = data.folds, data.fold
  require(
    folds is None or folds >= 2, 'data.folds', 'it must be at least 2, or none'
  )
  if (folds is None) != (fold is None):
    raise config_lib.UserError(
      f'config.data.folds is {folds} and config.data.fold is {fold}; give '
      'both, or set both to none'
    )
  if folds is None:
    return
  require(
    0 <= fold < folds, 'data.fold',
    f'of config.data.folds {folds} it takes 0 to {folds - 1}',
  )  # fmt: skip
  if data.validation_fraction:
    raise config_lib.UserError(
      f'config.data.folds is {folds} and config.data.validation_fraction is '
      f'{data.validation_fraction}; a fold is the validation part, so set one '
      'of them to none or 0'
    )


def _check_recipe(config: config_lib.Config, require):
  """The parts of fitting that are neither data nor a block."""
  require(
    config.early_stopping.patience is None
    or config.early_stopping.patience >= 1,
    'early_stopping.patience', 'it takes evaluations, at least 1, or none',
  )  # fmt: skip
  require(
    config.early_stopping.patience is None or config.keep_best >= 1,
    'keep_best', 'early stopping returns the best checkpoint: keep at least 1',
  )  # fmt: skip
  require(
    0 <= config.label_smoothing < 1,
    'label_smoothing', 'it must be at least 0 and below 1',
  )  # fmt: skip
  for path in ('l1', 'l2'):
    require(config_lib.get(config, path) >= 0, path, 'it must be at least 0')
  for path in ('grad_clip_value', 'grad_clip_norm'):
    value = config_lib.get(config, path)
    require(value is None or value > 0, path, 'it must be above 0, or none')
  for pattern, factor in config.rate_multipliers.items():
    if type(factor) not in (int, float) or not 0 <= factor < 2**63:
      raise config_lib.UserError(
        f'config.rate_multipliers has {pattern!r}: {factor!r}; it takes a '
        'number of at least 0'
      )
  decay = config.ema_decay
  require(decay is None or 0 < decay < 1, 'ema_decay', 'it must be within 0, 1')
  for path, names in (
    ('on_save_error', config_lib.ON_SAVE_ERROR),
    ('data.on_error', config_lib.ON_DATA_ERROR),
    ('dtype', config_lib.DTYPES),
    ('kernels', config_lib.KERNELS),
    ('partition', config_lib.PARTITIONS),
    ('remat', (None, *config_lib.REMAT)),
  ):
    allowed = ', '.join(name or 'none' for name in names)
    require(config_lib.get(config, path) in names, path, f'it takes {allowed}')
  for axis in ('data', 'fsdp', 'tensor'):
    length = getattr(config.mesh, axis)
    require(
      length == -1 or 0 < length < 2**31, f'mesh.{axis}',
      'it takes a number of devices, or -1 for all that are left',
    )  # fmt: skip
  if (config.mesh.data, config.mesh.fsdp, config.mesh.tensor).count(-1) > 1:
    raise config_lib.UserError(
      f'config.mesh is data {config.mesh.data}, fsdp {config.mesh.fsdp}, '
      f'tensor {config.mesh.tensor}; one axis alone can be -1'
    )
  require(
    config.sync_batch_norm or config.partition == 'shard_map',
    'sync_batch_norm',
    "partition 'jit' knows the whole batch alone; set partition to shard_map",
  )
  require(
    config.init_from is None
    or (config.init_from != '' and config.init_from.isprintable()),
    'init_from', 'it takes a workdir, or a .safetensors or .npz file',
  )  # fmt: skip
  require(
    config.init_from is not None or not config.init_new,
    'init_new', 'it says what is not taken from init_from, which is none',
  )  # fmt: skip
  for path in ('rate_multipliers', 'init_new'):
    for pattern in config_lib.get(config, path):
      try:
        re.compile(pattern)
      except (re.error, TypeError, OverflowError, RecursionError) as error:
        raise config_lib.UserError(
          f'config.{path} has the pattern {pattern!r}, which is no regular '
          f'expression: {config_lib.first_line(error)}'
        ) from None


def _check_data(name: str, value: Any):
  """However deep it lies: what JSON can hold, and no nan or infinity."""
  if isinstance(value, Mapping):
    for key, item in value.items():
      if not isinstance(key, str | int):
        raise config_lib.UserError(
          f'{name} has the key {key!r}; it takes words'
        )
      _check_data(f'{name}.{key}', item)
  elif isinstance(value, tuple | list):
    for item in value:
      _check_data(name, item)
  elif isinstance(value, str) and '\0' in value:
    raise config_lib.UserError(f'{name} is {value!r}; it takes no NUL')
  elif isinstance(value, float) and not math.isfinite(value):
    raise config_lib.UserError(f'{name} is {value}; it must be finite')
  elif not isinstance(value, str | int | float | None):
    raise config_lib.UserError(
      f'{name} is {value!r}; it takes numbers, words, tuples and none'
    )
