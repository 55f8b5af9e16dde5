"""Tasks and their losses, Optax's by Optax's names.

The cross-entropy of classes is that of `kernels`, under Optax's name.

A task says how a model's outputs and a batch become predictions and targets; a
loss turns these into one number an example.

Shapes: B batch, K classes, D numbers an example, T positions of a sequence.
"""

from collections.abc import Callable
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import optax

import kernels
from train import blocks
from train import config as config_lib
from train.data import sources

PerExample = Callable[[jax.Array, jax.Array], jax.Array]


def absolute_error(predictions: jax.Array, targets: jax.Array) -> jax.Array:
  """|predictions - targets|, the one loss of the course that Optax lacks."""
  return jnp.abs(predictions - targets)


# The loss of reconstruction whose outputs are logits.
OF_LOGITS = 'sigmoid_binary_cross_entropy'
_OF_CLASSES = 'softmax_cross_entropy_with_integer_labels'


def _signed(loss: PerExample) -> PerExample:
  """For losses of margins: Optax's take -1 and 1, labels are 0 and 1."""
  return lambda predictions, targets: loss(predictions, 2 * targets - 1)


_DISTANCES = {
  'squared_error': optax.losses.squared_error,
  'l2_loss': optax.losses.l2_loss,  # Half the squared error.
  'absolute_error': absolute_error,
  'huber_loss': optax.losses.huber_loss,
  'log_cosh': optax.losses.log_cosh,
}


@dataclasses.dataclass(frozen=True)
class Task:
  """What is predicted.

  Attributes:
    losses: name -> loss of (predictions, targets); the first is the default.
      Losses of elements or positions are averaged over each example.
    num_classes: how many numbers the model gives for `dataset`: an example, or
      a position where the targets are tokens.
    pair: (outputs [B, ...], batch) -> (predictions, targets).
    labels: 'classes', 'two classes', 'numbers' or 'tokens': what the data's
      label must be, or None where it is not read.
  """

  losses: dict[str, PerExample]
  num_classes: Callable[[sources.Dataset], int]
  pair: Callable[[jax.Array, dict], tuple[jax.Array, jax.Array]]
  labels: str | None

  def num_outputs(self, dataset: sources.Dataset) -> int:
    """How many numbers the model gives for an example of `dataset`."""
    positions = 1
    if self.labels == 'tokens':
      positions = math.prod(dataset.splits['train'].specs['targets'].shape)
    return positions * self.num_classes(dataset)


# logits [B, T, K], targets int [B, T], -1 where nothing is asked.
_TOKENS = Task(
  losses={_OF_CLASSES: kernels.softmax_cross_entropy},
  num_classes=lambda dataset: len(dataset.classes),
  pair=lambda logits, batch: (logits, batch['targets'].astype(jnp.int32)),
  labels='tokens',
)

TASKS = {
  # logits [B, K], labels int [B]. The loss is -log softmax(logits)[label]: no
  # (1 - y) log(1 - p) term, which belongs to binary cross-entropy alone.
  'classification': Task(
    losses={
      _OF_CLASSES: kernels.softmax_cross_entropy,
      'multiclass_hinge_loss': optax.losses.multiclass_hinge_loss,
      'multiclass_perceptron_loss': optax.losses.multiclass_perceptron_loss,
    },
    num_classes=lambda dataset: len(dataset.classes),
    pair=lambda logits, batch: (logits, batch['label']),
    labels='classes',
  ),
  # One logit [B, 1], labels 0 and 1.
  'binary_classification': Task(
    losses={
      'sigmoid_binary_cross_entropy': optax.losses.sigmoid_binary_cross_entropy,
      'hinge_loss': _signed(optax.losses.hinge_loss),
      'perceptron_loss': _signed(optax.losses.perceptron_loss),
    },
    num_classes=lambda dataset: 1,
    pair=lambda logits, batch: (
      logits[:, 0],
      batch['label'].astype(logits.dtype),
    ),
    labels='two classes',
  ),
  # One number [B, 1], labels float [B].
  'regression': Task(
    losses=_DISTANCES,
    num_classes=lambda dataset: 1,
    pair=lambda outputs, batch: (
      outputs[:, 0],
      batch['label'].astype(outputs.dtype),
    ),
    labels='numbers',
  ),
  # The input itself, as the model sees it (normalized): [B, D].
  'reconstruction': Task(
    losses=_DISTANCES | {OF_LOGITS: optax.losses.sigmoid_binary_cross_entropy},
    num_classes=lambda dataset: math.prod(dataset.input_shape),
    pair=lambda outputs, batch: (
      outputs.reshape(outputs.shape[0], -1),
      batch['input'].reshape(outputs.shape[0], -1),
    ),
    labels=None,
  ),
  # A class for each position: tags, or the next character of a text.
  'token_classification': _TOKENS,
  # The same of another sequence than the input; judged as a whole, too.
  'sequence_to_sequence': _TOKENS,
}


def widen(outputs: jax.Array) -> jax.Array:
  """float32, or wider where the outputs are."""
  return outputs.astype(jnp.promote_types(outputs.dtype, jnp.float32))


def create(
  task: str,
  loss: str,
  label_smoothing: float = 0.0,
) -> Callable:
  """loss_fn(outputs [B, ...], batch) -> the loss of each example [B], widened.

  Args:
    task: a name in TASKS.
    loss: one of its losses.
    label_smoothing: a in the target (1 - a) onehot + a / K of Szegedy et al.
      (2016, section 7).

  Raises:
    UserError: no such task, the task has no such loss, or the loss has no
      labels to smooth.
  """
  task = blocks.lookup('task', task, TASKS)
  function = blocks.lookup('loss', loss, task.losses)
  if loss == _OF_CLASSES:
    # Takes bfloat16 as it is: no float32 logits lie in memory.
    function = functools.partial(function, label_smoothing=label_smoothing)
  elif label_smoothing:
    raise config_lib.UserError(
      f'config.label_smoothing is {label_smoothing}, which needs the loss '
      f'{_OF_CLASSES}; config.loss is {loss}'
    )

  def loss_fn(outputs, batch):
    if loss != _OF_CLASSES:
      outputs = widen(outputs)
    predictions, targets = task.pair(outputs, batch)
    if task.labels == 'tokens':
      values = function(predictions, jnp.maximum(targets, 0))
      return mean_over_positions(values, targets >= 0)
    values = widen(function(predictions, targets))
    return values.reshape(values.shape[0], -1).mean(-1)

  return loss_fn


def mean_over_positions(values: jax.Array, asked: jax.Array) -> jax.Array:
  """[B], widened, the mean of [B, T] where `asked`; 0 where nothing is."""
  total = jnp.where(asked, widen(values), 0).sum(-1)
  return total / jnp.maximum(asked.sum(-1), 1)
