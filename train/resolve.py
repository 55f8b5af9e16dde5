"""From what the user wrote to a config with every default written out.

Whatever a library or the data must judge is judged here, before anything is
compiled: each mistake is one UserError.
"""

import dataclasses
import importlib.util
import math

import optax

import models
from train import blocks
from train import check
from train import config as config_lib
from train import losses
from train import metrics
from train import optim
from train.data import augment
from train.data import normalize
from train.data import sources

# Arguments of models that are no business of config.model: the program passes
# rngs and config.dtype, and parameters are float32.
_SUPPLIED = ('rngs', 'dtype', 'param_dtype')


def check_names(config: config_lib.Config):
  """Every name and argument that can be judged without the data.

  Raises:
    UserError: the first that cannot be.
  """
  task = blocks.lookup('task', config.task, losses.TASKS)
  if config.loss is not None:
    blocks.lookup('loss', config.loss, task.losses)
  given = ('image_shape', 'num_classes', 'num_features', 'vocab_size')
  blocks.resolve(
    'model',
    config.model,
    blocks.lookup('model.name', config.model['name'], models.MODELS),
    given=dict.fromkeys(given),
    supplied=_SUPPLIED,
  )
  loss = config.loss or next(iter(task.losses))
  losses.create(config.task, loss, config.label_smoothing)
  _check_optimizer(config)
  augment.check_names(config.data.augment)
  if config.tensorboard and importlib.util.find_spec('tensorboardX') is None:
    raise config_lib.UserError(
      'config.tensorboard is true, which needs tensorboardX; install it with '
      'python3 -m experiments.install tensorboard'
    )


def _check_optimizer(config: config_lib.Config):
  block = optim.resolve_optimizer(config.optimizer)
  schedule = optim.resolve_schedule(config.schedule, config.total_steps or 1)
  rate = optax.constant_schedule(schedule.get('value', 0.0))
  if config.total_steps:  # Else its length is known with the data's.
    rate = optim.create_schedule(schedule, config.total_steps)
  optim.create(dataclasses.replace(config, optimizer=block), rate)


def resolve(
  config: config_lib.Config, dataset: sources.Dataset
) -> config_lib.Config:
  """The config in full: steps for epochs, arguments for names, means for words.

  Args:
    config: as written.
    dataset: with the validation part already held out.

  Raises:
    UserError: the first field that cannot be.
  """
  config = check.check(config)
  task = blocks.lookup('task', config.task, losses.TASKS)
  loss = config.loss
  if loss is None:
    loss = next(iter(task.losses))
  blocks.lookup('loss', loss, task.losses)
  _check_labels(config.task, task, dataset)
  if (
    config.task == 'reconstruction'
    and loss == losses.OF_LOGITS
    and config.data.normalize in ('mean_std', 'symmetric')
  ):
    raise config_lib.UserError(
      f'config.data.normalize is {config.data.normalize!r}; the loss {loss} '
      "compares with inputs from 0 to 1, which 'unit' gives"
    )
  per_epoch = len(dataset.splits['train']) / config.data.batch_size
  total_steps = config.total_steps
  if total_steps is None:
    total_steps = max(1, round(config.total_epochs * per_epoch))
  if total_steps >= 2**31:
    raise config_lib.UserError(
      f'config.total_epochs is {config.total_epochs}, which makes '
      f'{total_steps} steps; there can be 2**31 - 1'
    )
  num_classes = task.num_classes(dataset)
  best_metric = _best_metric(config, num_classes)
  shape = config.model.get('image_shape', dataset.input_shape)
  if shape != dataset.input_shape:
    raise config_lib.UserError(
      f'config.model.image_shape is {shape}; {dataset.name} has '
      f'{dataset.input_shape}'
    )
  examples = len(dataset.splits['train'])
  if config.data.batch_size > examples:
    raise config_lib.UserError(
      f'config.data.batch_size is {config.data.batch_size}; {dataset.name} has '
      f'{examples} training examples'
    )
  if config.data.batch_size == 1 and augment.mixes(config.data.augment):
    raise config_lib.UserError(
      'config.data.augment mixes an example with the next of its batch, but '
      'config.data.batch_size is 1'
    )
  return dataclasses.replace(
    config,
    total_steps=total_steps,
    total_epochs=None,
    **{
      name: config_lib.in_steps(getattr(config, name), per_epoch)
      for name in config_lib.CADENCES
    },
    best_metric=best_metric,
    early_stopping=dataclasses.replace(
      config.early_stopping, metric=best_metric
    ),
    loss=loss,
    data=dataclasses.replace(
      config.data,
      sequence_length=dataset.sequence_length,
      normalize=normalize.resolve(config.data.normalize, dataset),
      augment=augment.resolve(
        config.data.augment,
        dataset.name,
        dataset.input_key,
        dataset.input_shape,
      ),
    ),
    model=blocks.resolve(
      'model',
      config.model,
      blocks.lookup('model.name', config.model['name'], models.MODELS),
      given=_inputs(config.model['name'], dataset)
      | {'num_classes': num_classes},
      supplied=_SUPPLIED,
    ),
    optimizer=optim.resolve_optimizer(config.optimizer),
    schedule=optim.resolve_schedule(config.schedule, total_steps),
  )


def _inputs(name: str, dataset: sources.Dataset) -> config_lib.Block:
  """What a model is told of its inputs, by the names of its arguments.

  A sequence model reads an image row by row, and a row of numbers one by one.
  """
  shape = dataset.input_shape
  takes = blocks.arguments(models.MODELS[name])
  extras = [
    key for key in sources.EXTRAS if key in dataset.splits['train'].specs
  ]
  reads = blocks.arguments(models.MODELS[name].__call__)
  for key in extras:
    if key not in reads:
      raise config_lib.UserError(
        f'config.model.name is {name!r}, which reads no {key}; {dataset.name} '
        f'has {", ".join(extras)}'
      )
  if dataset.vocabulary is None or dataset.input_key != 'tokens':
    if 'vocab_size' in takes and 'num_features' not in takes:
      raise config_lib.UserError(
        f'config.model.name is {name!r}, which reads tokens; {dataset.name} '
        f'has numbers of shape {shape}'
      )
    return {
      'image_shape': shape,
      'num_features': math.prod(shape[1:]),
      'vocab_size': None,
    }
  if 'vocab_size' not in takes:
    raise config_lib.UserError(
      f'config.model.name is {name!r}, which reads numbers; {dataset.name} has '
      'tokens, which sequence models read'
    )
  return {'num_features': None, 'vocab_size': len(dataset.vocabulary)}


def _best_metric(config: config_lib.Config, num_outputs: int) -> str:
  """One metric judges: what is kept, when to stop, when to lower the rate."""
  given = config.best_metric
  stopping = config.early_stopping.metric
  if given is not None and stopping not in (None, given):
    raise config_lib.UserError(
      f'config.early_stopping.metric is {stopping!r} and config.best_metric is '
      f'{given!r}; early stopping returns the best checkpoint, so give one'
    )
  if given is None and stopping is not None:
    return metrics.best(
      config.task, num_outputs, stopping, 'early_stopping.metric'
    )
  return metrics.best(config.task, num_outputs, given)


def _check_labels(name: str, task: losses.Task, dataset: sources.Dataset):
  classes = len(dataset.classes) if dataset.classes else None
  specs = dataset.splits['train'].specs
  fits = {
    'classes': 'label' in specs and classes is not None,
    'two classes': 'label' in specs and classes == 2,
    'numbers': 'label' in specs and classes is None,
    'tokens': 'targets' in specs and classes is not None,
    None: dataset.input_key != 'tokens',
  }
  if not fits[task.labels]:
    if 'label' not in specs:
      has = 'targets that are tokens'
    else:
      has = f'{classes} classes' if classes else 'a number as label'
    raise config_lib.UserError(
      f'config.task is {name!r}, which needs '
      f'{task.labels or "numbers as input"}; '
      f'{dataset.name} has {has}'
    )
