"""The configuration: every field that the loop reads, with its default.

A config file returns a `Config` from `get_config()`. Nothing here imports jax,
so that `--help` and a mistyped field answer at once; what only a library can
judge (an optimizer's arguments, say) is judged in resolve.py.
"""

from collections.abc import Mapping
import dataclasses
import hashlib
import json
import re
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
  batch_size: int = 64  # Examples a step, over all devices together.
  validation_fraction: float = 0.0  # Share of the training split held out.
  # Or one of so many equal parts of it: part `fold`, from 0.
  folds: int | None = None
  fold: int | None = None
  # 'mean_std' of the training split, 'unit' for [0, 1], 'symmetric' for
  # [-1, 1], None, or {'mean': (...), 'std': (...)}: (x - mean) / std.
  normalize: str | Block | None = 'mean_std'
  # In training only, in this order: names, or blocks as
  # {'name': 'pad_crop', 'padding': 4}.
  augment: tuple = ()
  classes: tuple = ()  # Only these, numbered anew, as (0, 1); () for all.
  max_examples: int | None = None  # Only so many of the training examples.
  image_size: int | None = None  # Height and width, where images vary.
  sequence_length: int | None = None  # Of a text's windows; None: the data's.
  num_workers: int = 0  # Processes that decode a set larger than memory.
  # A damaged record, a missing file, a reader process that dies: 'raise' ends
  # the run with a line; 'skip' passes over it, says so, and counts it.
  on_error: str = 'raise'


@dataclasses.dataclass(kw_only=True, slots=True)
class EarlyStopping:
  """Ends a run that no longer improves, and returns its best parameters."""

  patience: int | None = None  # Evaluations after the best; None: never.
  metric: str | None = None  # None: best_metric, which it otherwise sets.


@dataclasses.dataclass(kw_only=True, slots=True)
class Mesh:
  """How many devices along each axis, of all processes; -1: all that are left.

  `data` shares out the examples of a batch; `fsdp` those and the parameters;
  `tensor` the widths of layers.
  """

  data: int = -1
  fsdp: int = 1
  tensor: int = 1


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
  # A checkpoint that cannot be saved: 'continue', and the run ends with exit
  # code 74 when it is done; or 'stop', with that code, at the next step.
  on_save_error: str = 'continue'
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
  early_stopping: EarlyStopping = dataclasses.field(
    default_factory=EarlyStopping
  )
  label_smoothing: float = 0.0  # In training only.
  l1: float = 0.0  # l1 * sum |w|: true zeros, by soft thresholding.
  l2: float = 0.0  # l2 / 2 * sum w^2. Both spare biases and norms.
  weight_decay_mask: bool = False  # True spares biases and norms.
  grad_clip_value: float | None = None  # Of each number, before the norm's.
  grad_clip_norm: float | None = None  # Of all gradients together.
  # Pattern -> factor on the learning rate of the parameters whose path starts
  # so, as {'blocks/0': 0.1}; the first that matches counts, and 0.0 freezes
  # (parameters: the running statistics of a frozen norm go on).
  rate_multipliers: Block = dataclasses.field(default_factory=dict)
  # Evaluates a running mean of the parameters, m = d m + (1 - d) w, where d is
  # the least of this and (1 + step) / (10 + step).
  ema_decay: float | None = None
  accumulate: int = 1  # Parts of a batch that are computed one by one.
  # 'jit': one program over the whole mesh, which the compiler divides (pjit).
  # 'shard_map': each device runs the step on its examples, and what they find
  # is averaged (pmap); along mesh.data alone.
  partition: str = 'jit'
  sync_batch_norm: bool = True  # False, with shard_map: of a device's examples.
  mesh: Mesh = dataclasses.field(default_factory=Mesh)
  # What the backward pass finds saved, a name of REMAT; what else it needs is
  # computed again. None: everything. A ViT has `model.remat` besides.
  remat: str | None = None
  # Of computing; parameters are float32. float64, with JAX_ENABLE_X64=1, is for
  # comparing programs: there parameters have it too.
  dtype: str = 'float32'
  # The same bytes from the same step each time. CPUs and TPUs give them anyway;
  # a GPU's compiler is told to, which costs speed.
  deterministic: bool = False
  # What computes the cross-entropy of classes, and the convolutions of CNN,
  # LeNet and ResNet: a name of KERNELS. 'auto' is XLA but where a kernel was
  # measured to be faster on the chip.
  kernels: str = 'auto'
  # Another workdir's best checkpoint, or DIR:latest, DIR:300; or another
  # library's weights, FILE.safetensors or FILE.npz. Read when the run begins.
  init_from: str | None = None
  init_new: tuple = ()  # Patterns of what is not taken from there.
  tensorboard: bool = False  # Writes events for TensorBoard too.


PARTS = {'data': Data, 'early_stopping': EarlyStopping, 'mesh': Mesh}
BLOCKS = ('model', 'optimizer', 'schedule')
CADENCES = ('log_every', 'eval_every', 'checkpoint_every')
KERNELS = (
  'auto',
  'xla',
  'pallas_tpu',
  'pallas_gpu',
  'pallas_tpu_interpret',
  'pallas_gpu_interpret',
)
NORMALIZE = ('mean_std', 'unit', 'symmetric')
DTYPES = ('float32', 'bfloat16', 'float64')
ON_DATA_ERROR = ('raise', 'skip')
ON_SAVE_ERROR = ('continue', 'stop')
PARTITIONS = ('jit', 'shard_map')
# Of jax.checkpoint_policies: the results of products and convolutions, all or
# those without batch dimensions (so not attention's).
REMAT = ('dots_saveable', 'dots_with_no_batch_dims_saveable')


def fields(cls=Config, prefix: str = '') -> dict[str, Any]:
  """Dotted path -> annotation of every field, those within fields included."""
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


# ---------------------------------------------------------------- cadences


def cadence(value: int | str) -> float:
  """The number in a cadence, or -1 where it is none."""
  if isinstance(value, int):
    return value
  found = re.fullmatch(r'(\d+(\.\d+)?)e', value)
  return float(found[1]) if found else -1


def in_steps(value: int | str, steps_per_epoch: float) -> int:
  """A cadence in steps: 100 is 100, '2e' is two epochs, at least one step."""
  if isinstance(value, int):
    return value
  return max(1, round(cadence(value) * steps_per_epoch))


# --------------------------------------------------------------------- JSON


def tuples(value: Any) -> Any:
  """Lists as tuples, however deep: a config holds no lists."""
  if isinstance(value, Mapping):
    return {k: tuples(v) for k, v in value.items()}
  if isinstance(value, list | tuple):
    return tuple(tuples(v) for v in value)
  return value


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
    for name in BLOCKS:
      if name in values:
        block = values[name].items()
        values[name] = {key: _numbered(value) for key, value in block}
    parts = {n: cls(**values.pop(n, {})) for n, cls in PARTS.items()}
    return Config(**parts, **values)
  except (ValueError, TypeError, AttributeError, RecursionError) as error:
    raise UserError(f'config.json cannot be read: {error}') from None


def _numbered(value: Any) -> Any:
  """JSON has string keys alone: boundaries in steps come back as numbers."""
  if not isinstance(value, dict) or not all(map(str.isdecimal, value)):
    return value
  return {int(key): item for key, item in value.items()}


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
    elif a != b or (isinstance(a, dict) and list(a) != list(b)):
      found[path] = (a, b)
  return found
