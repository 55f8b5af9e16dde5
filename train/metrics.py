"""Metrics: a number for each example, whose mean over a split is reported.

Evaluation adds up such numbers, the count and the confusion matrix on the
devices, and divides once at the end: every example counts once.

Shapes: B batch, K classes, T positions of a sequence.
"""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from train import config as config_lib
from train import losses


def _classification(logits, labels):
  found = {'accuracy': logits.argmax(-1) == labels}
  if logits.shape[-1] > 10:
    _, best = jax.lax.top_k(logits, 5)
    found['top5_accuracy'] = (best == labels[:, None]).any(-1)
  return found


def _distance(predictions, targets):
  error = (predictions - targets).reshape(predictions.shape[0], -1)
  return {
    'mean_squared_error': jnp.square(error).mean(-1),
    'mean_absolute_error': jnp.abs(error).mean(-1),
  }


def _tokens(logits, targets):
  right = logits.argmax(-1) == targets
  return {'accuracy': losses.mean_over_positions(right, targets >= 0)}


def _sequences(logits, targets):
  # Each answer is given after the right ones before it, so that all are right
  # just where a decoder that reads its own answers would give them.
  right = (logits.argmax(-1) == targets) | (targets < 0)
  return _tokens(logits, targets) | {'sequence_accuracy': right.all(-1)}


# task -> (predictions, targets) -> metric -> [B].
METRICS = {
  'classification': _classification,
  'binary_classification': lambda logits, labels: {
    'accuracy': (logits > 0) == (labels > 0.5)
  },
  'regression': _distance,
  'reconstruction': _distance,
  'token_classification': _tokens,
  'sequence_to_sequence': _sequences,
}

# The metric that judges a task, unless config.best_metric names another.
_JUDGE = {
  'classification': 'accuracy',
  'binary_classification': 'accuracy',
  'regression': 'mean_squared_error',
  'reconstruction': 'mean_squared_error',
  'token_classification': 'accuracy',
  'sequence_to_sequence': 'sequence_accuracy',
}

# task -> predictions -> the predicted class int [B]; tasks of classes alone.
DECISIONS = {
  'classification': lambda logits: logits.argmax(-1),
  'binary_classification': lambda logits: (logits > 0).astype(jnp.int32),
}


def create(task: str, loss: str | None = None) -> Callable:
  """measure(outputs [B, ...], batch) -> metric -> float32 [B].

  Where the loss takes the outputs for logits of an input from 0 to 1, errors
  are those of their sigmoids.
  """
  pair = losses.TASKS[task].pair
  logits = task == 'reconstruction' and loss == losses.OF_LOGITS

  def measure(outputs, batch):
    outputs = losses.widen(outputs)
    outputs = jax.nn.sigmoid(outputs) if logits else outputs
    values = METRICS[task](*pair(outputs, batch))
    return {key: value.astype(jnp.float32) for key, value in values.items()}

  return measure


def create_confusion(task: str, num_classes: int) -> Callable | None:
  """count(outputs, batch) -> int32 [K, K], rows the label, columns the answer.

  Padded examples (mask False) count nowhere. None where the task has no
  classes.
  """
  if task not in DECISIONS:
    return None
  pair = losses.TASKS[task].pair

  def count(outputs, batch):
    predictions, _ = pair(outputs, batch)
    cells = jnp.zeros((num_classes, num_classes), jnp.int32)
    return cells.at[batch['label'], DECISIONS[task](predictions)].add(
      batch['mask'].astype(jnp.int32)
    )

  return count


def names(task: str, num_outputs: int) -> tuple[str, ...]:
  """What is reported of a task, its loss first."""
  labels = (1, 1) if losses.TASKS[task].labels == 'tokens' else (1,)
  logits = task == 'classification' or len(labels) == 2
  outputs = (*labels, num_outputs) if logits else labels
  found = jax.eval_shape(
    METRICS[task], jnp.zeros(outputs), jnp.zeros(labels, jnp.int32)
  )
  return ('loss', *found)


def best(
  task: str,
  num_outputs: int,
  best_metric: str | None,
  field: str = 'best_metric',
) -> str:
  """The metric that judges, as 'eval/accuracy'.

  Raises:
    UserError: the task has no such metric; it names config.FIELD.
  """
  allowed = [f'eval/{name}' for name in names(task, num_outputs)]
  metric = f'eval/{_JUDGE[task]}' if best_metric is None else best_metric
  if metric not in allowed:
    raise config_lib.UserError(
      f'config.{field} is {metric!r}; task {task} has {", ".join(allowed)}'
    )
  return metric


def higher_is_better(metric: str) -> bool:
  """True of accuracies; losses and errors are better low."""
  return metric.endswith('accuracy')


def best_first(
  metric: str, scores: Mapping[int, float], steps: Iterable[int]
) -> list[int]:
  """Those of `steps` that are scored: the best first, the earlier of equals."""
  sign = -1 if higher_is_better(metric) else 1
  return sorted(
    (step for step in steps if step in scores),
    key=lambda step: (sign * scores[step], step),
  )


def summarize(
  totals: Mapping[str, np.ndarray], classes: tuple[str, ...] | None
) -> dict[str, Any]:
  """What evaluation reports, from the totals of a whole split on the host.

  Returns:
    Each metric's mean (a float64 sum over the lanes of a batch, divided once),
    `count`, and for classes `per_class` and `confusion`: a row a label.
  """
  lanes = dict(totals)
  confusion = lanes.pop('confusion', None)
  count = int(lanes.pop('count').sum())
  results = {
    key: float(value.sum(dtype=np.float64)) / count
    for key, value in lanes.items()
  }
  results['count'] = count
  if confusion is None:
    return results
  results['per_class'] = {}
  for k, name in enumerate(classes):
    row, column = int(confusion[k].sum()), int(confusion[:, k].sum())
    right = int(confusion[k, k])
    results['per_class'][name] = {
      'count': row,
      'accuracy': right / row if row else None,
      'precision': right / column if column else None,
    }
  results['confusion'] = confusion.tolist()
  return results
