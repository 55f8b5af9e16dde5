"""The configuration: every field that the loop reads, with its default.

A config file returns a `Config` from `get_config()`. Nothing here imports jax,
so that `--help` and a mistyped field answer at once; what only a library can
judge (an optimizer's arguments, say) is judged in resolve.py.
"""

from collections.abc import Mapping
import dataclasses
import hashlib
import json
import math
import re
import types
import typing
from typing import Any

# A block names a function and its arguments: {'name': 'adamw', 'b1': 0.9}.
Block = dict[str, Any]


class UserError(Exception):
  """The user's mistake: one line that names the field and what it takes."""

  exit_code = 2


def first_line(error: Exception) -> str:
  """The first line of an error's text, or its kind where it has none."""
  lines = str(error).strip().splitlines()
  return lines[0] if lines else type(error).__name__


@dataclasses.dataclass(kw_only=True, slots=True)
class Data:
  """Which examples, how many a step, and how they are scaled."""

  name: str = 'digits'  # An embedded dataset, or any that TFDS has prepared.
  data_dir: str | None = None  # None: TFDS_DATA_DIR, then TFDS's own folder.
  batch_size: int = 64  # Over all devices together.
  validation_fraction: float = 0.0  # Share of the training split held out.
  # 'mean_std' of the training split, 'unit' for [0, 1], 'symmetric' for
  # [-1, 1], None, or {'mean': (...), 'std': (...)}: (x - mean) / std.
  normalize: str | Block | None = 'mean_std'


@dataclasses.dataclass(kw_only=True, slots=True)
class Config:
  """One experiment. A cadence is in steps, or in epochs as '2e'."""

  seed: int = 0
  total_steps: int | None = None  # Give this or total_epochs.
  total_epochs: float | None = None
  log_every: int | str = 50
  eval_every: int | str = '1e'
  checkpoint_every: int | str = '5e'
  keep_best: int = 1  # How many of the best checkpoints stay, with the newest.
  best_metric: str | None = None  # As 'eval/accuracy'; None: the task's own.
  task: str = 'classification'
  loss: str | None = None  # None: the task's own.
  data: Data = dataclasses.field(default_factory=Data)
  model: Block = dataclasses.field(default_factory=lambda: {'name': 'mlp'})
  optimizer: Block = dataclasses.field(
    default_factory=lambda: {'name': 'adamw'}
  )
  # The learning rate has one home. Lengths left out follow total_steps.
  schedule: Block = dataclasses.field(
    default_factory=lambda: {
      'name': 'cosine_decay_schedule',
      'init_value': 1e-3,
    }
  )


BLOCKS = ('model', 'optimizer', 'schedule')
CADENCES = ('log_every', 'eval_every', 'checkpoint_every')
NORMALIZE = ('mean_std', 'unit', 'symmetric')


def fields(cls=Config, prefix: str = '') -> dict[str, Any]:
  """Dotted path -> annotation of every field, Data's included."""
  found = {}
  for name, annotation in typing.get_type_hints(cls).items():
    if dataclasses.is_dataclass(annotation):
      found |= fields(annotation, f'{prefix}{name}.')
    else:
      found[prefix + name] = annotation
  return found


def get(config: Config, path: str) -> Any:
  """The value at a dotted path, as 'data.batch_size'."""
  value = config
  for name in path.split('.'):
    value = getattr(value, name)
  return value


def replace(config: Config, path: str, value: Any) -> Config:
  """A copy of `config` with the field at a dotted path set."""
  name, _, rest = path.partition('.')
  if rest:
    value = replace(getattr(config, name), rest, value)
  return dataclasses.replace(config, **{name: value})


# ------------------------------------------------------------------- checks


def _expected(annotation) -> str:
  words = {
    int: 'a whole number',
    float: 'a number',
    str: 'a word',
    bool: 'true or false',
    type(None): 'none',
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
  if annotation is float and type(value) is int and abs(value) < 2**63:
    return float(value)
  if type(value) is not annotation:
    raise TypeError
  return value


def check(config: Config) -> Config:
  """Types and ranges that need no library; returns the config, ints as floats.

  Raises:
    UserError: the first field that is wrong, what it is, and what it takes.
  """
  if not isinstance(config.data, Data):
    raise UserError(
      f'config.data is {config.data!r}; it takes a train.config.Data'
    )
  for path, annotation in fields().items():
    value = get(config, path)
    try:
      config = replace(config, path, _convert(value, annotation))
    except TypeError:
      raise UserError(
        f'config.{path} is {value!r}; it takes {_expected(annotation)}'
      ) from None
    _check_data(f'config.{path}', value)
    if path in BLOCKS and not all(isinstance(key, str) for key in value):
      raise UserError(f'config.{path} is {value!r}; its keys must be words')

  def require(holds: bool, path: str, allowed: str):
    if not holds:
      raise UserError(f'config.{path} is {get(config, path)!r}; {allowed}')

  require(0 <= config.seed < 2**32, 'seed', 'it must be from 0 to 2**32 - 1')
  if (config.total_steps is None) == (config.total_epochs is None):
    raise UserError(
      f'config.total_steps is {config.total_steps} and config.total_epochs is '
      f'{config.total_epochs}; give one of the two and set the other to none'
    )
  steps, epochs = config.total_steps, config.total_epochs
  require(steps is None or 0 < steps < 2**31, 'total_steps', 'at least 1')
  require(epochs is None or epochs > 0, 'total_epochs', 'it must be above 0')
  for path in CADENCES:
    require(
      0 < _cadence(get(config, path)) < math.inf,
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
    not isinstance(data.normalize, str) or data.normalize in NORMALIZE,
    'data.normalize',
    f'it takes {", ".join(NORMALIZE)}, none, or a mean and a std',
  )
  if isinstance(data.normalize, dict):
    require(
      set(data.normalize) == {'mean', 'std'}, 'data.normalize',
      "it takes {'mean': (...), 'std': (...)}",
    )  # fmt: skip
  for path in BLOCKS:
    require(
      isinstance(get(config, path).get('name'), str),
      path,
      'it must have a name',
    )
  if 'learning_rate' in config.optimizer:
    raise UserError(
      'config.optimizer.learning_rate: the rate has one home, '
      'config.schedule; say --config.schedule.name=constant_schedule '
      f'--config.schedule.value={config.optimizer["learning_rate"]}'
    )
  return config


def _check_data(name: str, value: Any):
  """However deep it lies: what JSON can hold, and no nan or infinity."""
  if isinstance(value, Mapping):
    for key, item in value.items():
      if not isinstance(key, str | int):
        raise UserError(f'{name} has the key {key!r}; it takes words')
      _check_data(f'{name}.{key}', item)
  elif isinstance(value, tuple | list):
    for item in value:
      _check_data(name, item)
  elif isinstance(value, float) and not math.isfinite(value):
    raise UserError(f'{name} is {value}; it must be finite')
  elif not isinstance(value, str | int | float | None):
    raise UserError(
      f'{name} is {value!r}; it takes numbers, words, tuples and none'
    )


def _cadence(value: int | str) -> float:
  """A cadence's number, or -1 where it is none."""
  if isinstance(value, int):
    return value
  found = re.fullmatch(r'(\d+(\.\d+)?)e', value)
  return float(found[1]) if found else -1


def in_steps(value: int | str, steps_per_epoch: float) -> int:
  """A cadence in steps: 100 is 100, '2e' is two epochs, at least one step."""
  if isinstance(value, int):
    return value
  return max(1, round(_cadence(value) * steps_per_epoch))


# --------------------------------------------------------------------- JSON


def tuples(value: Any) -> Any:
  """Lists as tuples, however deep: a config holds no lists."""
  if isinstance(value, Mapping):
    return {_key(k): tuples(v) for k, v in value.items()}
  if isinstance(value, list | tuple):
    return tuple(tuples(v) for v in value)
  return value


def _key(key: Any) -> Any:
  """JSON has string keys alone: boundaries in steps come back as numbers."""
  whole = isinstance(key, str) and re.fullmatch(r'-?\d+', key)
  return int(key) if whole else key


def to_json(config: Config) -> str:
  """The config as text, every field in order; from_json gives it back."""
  return json.dumps(dataclasses.asdict(config), indent=2) + '\n'


def from_json(text: str) -> Config:
  """The config that to_json wrote. Nothing in it is executed.

  Raises:
    UserError: it is no JSON object, or has fields that no config has.
  """
  try:
    values = tuples(json.loads(text))
    data = Data(**values.pop('data', {}))
    return Config(data=data, **values)
  except (ValueError, TypeError, AttributeError, RecursionError) as error:
    raise UserError(f'config.json cannot be read: {error}') from None


def digest(config: Config) -> str:
  """Eight hex digits that name this config."""
  return hashlib.sha256(to_json(config).encode()).hexdigest()[:8]


def differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
  """Path -> (old, new) wherever two configs differ, blocks key by key."""
  found = {}
  for path in fields():
    a, b = get(old, path), get(new, path)
    if path in BLOCKS:
      for key in dict.fromkeys((*a, *b)):
        if a.get(key) != b.get(key):
          found[f'{path}.{key}'] = (a.get(key), b.get(key))
    elif a != b:
      found[path] = (a, b)
  return found
