r"""Evaluates finished runs together, as one ensemble; prints JSON.

  python -m experiments.ensemble --workdir=runs/a,runs/b,runs/c
  python -m experiments.ensemble --workdir=SWEEP --top=5 --split=validation

Of classes: the mean of the members' probabilities, and the majority's vote; of
classes with equally many votes that of the greater mean probability wins. Of
numbers: the mean prediction. Probabilities are the softmax of the outputs, or
the sigmoid of the one that there is, whatever the loss was. Models,
normalizations and batch sizes may differ between members; one at a time is in
memory. A sweep keeps the result as evaluations/ensemble-SPLIT.json.
"""

from __future__ import annotations

from collections.abc import Sequence
import contextlib
import json
import os
import pathlib
import typing
from typing import Any

from absl import flags

from experiments import command
from experiments import restore
from experiments.search import results
from train import config as config_lib
from train import signals

if typing.TYPE_CHECKING:  # It imports jax.
  from train import program as program_lib
  from train import state as state_lib

FLAGS = flags.FlagValues()
restore.define(FLAGS)
FLAGS['workdir'].help = "of the runs, with commas between them, or a sweep's"
FLAGS.set_default('step', 'best')
flags.DEFINE_string(
  'split', 'test', 'train, validation or test', flag_values=FLAGS
)
flags.DEFINE_integer(
  'top', None, 'how many of a sweep\'s best trials; 5, or all where there are '
  'fewer', lower_bound=1, flag_values=FLAGS,
)  # fmt: skip
_TOP = 5
_TASKS = ('classification', 'binary_classification', 'regression')


def main(argv: Sequence[str]):
  """Parses the flags, evaluates all members, prints the result."""
  command.parse(FLAGS, argv, __doc__)
  restore.check(FLAGS)
  names = [name for name in FLAGS.workdir.split(',') if name]
  sweep = len(names) == 1 and results.is_there(names[0])
  if sweep:
    folder = pathlib.Path(names[0]).absolute()
    members = _best(folder, FLAGS.top)
  elif FLAGS.top is not None:
    raise config_lib.UserError(
      f'--top is {FLAGS.top}, but --workdir is {FLAGS.workdir!r}, which is no '
      f'sweep: it holds no {results.NAME}'
    )
  else:
    members = [pathlib.Path(name).absolute() for name in names]
  if not members:
    raise config_lib.UserError(
      f'--workdir is {FLAGS.workdir!r}; it takes folders'
    )
  for member in members:
    if members.count(member) > 1:
      raise config_lib.UserError(f'--workdir names {member} twice')
  from train import workdir as workdir_lib

  configs = [workdir_lib.read_config(member) for member in members]
  command.quiet()
  programs = _programs(members, configs, FLAGS.split)
  result = evaluate(members, programs, FLAGS.split, FLAGS.step)
  for entry, member in zip(result['members'], members, strict=True):
    place = os.path.relpath(member, folder) if sweep else os.fspath(member)
    entry['workdir'] = place
  text = json.dumps(result, indent=2) + '\n'
  print(text, end='')
  if sweep:
    path = folder / 'evaluations' / f'ensemble-{FLAGS.split}.json'
    with workdir_lib.writing(path):
      path.parent.mkdir(exist_ok=True)
    workdir_lib.write(path, text)


def _best(folder: pathlib.Path, top: int | None) -> list[pathlib.Path]:
  """The workdirs of all runs of a sweep's best trials."""
  trials = results.read(folder).best_first
  if not trials or (top or 0) > len(trials):
    raise config_lib.UserError(
      f'--top is {top or _TOP}; {folder} has {len(trials)} finished trials'
    )
  return [run.workdir for trial in trials[: top or _TOP] for run in trial.runs]


def _programs(
  members: list[pathlib.Path], configs: list[config_lib.Config], split: str
) -> list[program_lib.Program]:
  """Each member's program, over the same examples as the first's.

  Raises:
    UserError: there is no such split, or they cannot answer together.
  """
  import numpy as np

  from train import program as program_lib

  programs = []
  for member, config in zip(members, configs, strict=True):
    if config.task not in _TASKS:
      raise config_lib.UserError(
        f'{member} did {config.task}; an ensemble takes {", ".join(_TASKS)}'
      )
    first = configs[0]
    for what, ours, theirs in (
      ('task', first.task, config.task),
      ('dataset', first.data.name, config.data.name),
      ('classes', first.data.classes, config.data.classes),
    ):
      _compare(members[0], ours, member, theirs, what)
    with _named(member):
      program = program_lib.create(config, training=False, say=restore.say)
    dataset = program.dataset
    if split not in dataset.splits:
      raise config_lib.UserError(
        f'--split is {split!r}; {member} has {", ".join(dataset.splits)}'
      )
    programs.append(program)
    shared = programs[0].dataset
    examples, others = shared.splits[split], dataset.splits[split]
    for what, ours, theirs in (
      ('classes', shared.classes, dataset.classes),
      (f'number of {split} examples', len(examples), len(others)),
    ):
      _compare(members[0], ours, member, theirs, what)
    if not np.array_equal(_rows(examples), _rows(others)):
      _differ(members[0], member, f'{split} examples', 'some', 'others')
  return programs


@contextlib.contextmanager
def _named(member: pathlib.Path):
  """A mistake found in the block is said to be this member's."""
  try:
    yield
  except config_lib.UserError as error:
    raise config_lib.UserError(f'{member}: {error}') from None


def _rows(split) -> Any:
  return range(len(split)) if split.rows is None else split.rows


def _compare(first, ours, member, theirs, what: str):
  if ours != theirs:
    _differ(first, member, what, f'{ours!r:.80}', f'{theirs!r:.80}')


def _differ(first, member, what: str, ours: str, theirs: str):
  raise config_lib.UserError(
    f'the members have not the same {what}: {first} has {ours}, {member} '
    f'{theirs}'
  )


def evaluate(
  members: list[pathlib.Path],
  programs: list[program_lib.Program],
  split: str,
  step: str,
) -> dict[str, Any]:
  """What the members say of a split, one by one and together.

  Args:
    members: their workdirs.
    programs: theirs, over the same examples.
    split: 'train', 'validation' or 'test'.
    step: 'best', 'latest' or a number.

  Raises:
    UserError: one has no such checkpoint, or other labels.
  """
  import numpy as np

  entries, together, labels = [], None, None
  for member, program in zip(members, programs, strict=True):
    with _named(member):
      state, found_step = restore.restore(member, program, step)
      values, found = predict(program, state, split)
    del state  # Before the next one's.
    if labels is None:
      labels = found['label']
      together = (_Numbers if 'number' in found else _Classes)(labels)
    if not np.array_equal(labels, found['label']):
      _differ(members[0], member, f'{split} labels', 'some', 'others')
    together.add(found)
    names = sorted(values, key=lambda name: name != 'loss')
    means = {name: float(values[name].mean(dtype=np.float64)) for name in names}
    entries.append({'workdir': os.fspath(member), 'step': found_step, **means})
    shown = ', '.join(f'{key} {value:.4g}' for key, value in means.items())
    restore.say(
      f'{len(entries)} of {len(members)}: {member}, step {found_step}: {shown}'
    )
  return {
    'split': split,
    'count': len(labels),
    'members': entries,
    **together.summarize({program.config.loss for program in programs}),
  }


def predict(
  program: program_lib.Program, state: state_lib.TrainState, split: str
) -> tuple[dict[str, Any], dict[str, Any]]:
  """What a member gives for the n examples of a split, each once.

  Returns:
    The loss and each metric [n]; and 'label' [n] with 'number' [n], or with
    'log_p' [n, K], the logarithms of probabilities, and 'class' [n].
  """
  import jax
  import numpy as np

  from train.data import pipeline

  params = program.eval_params(state)
  batches = pipeline.eval_batches(
    program.dataset.splits[split],
    program.eval_batch_size,
    program.mesh,
    num_workers=program.config.data.num_workers,
  )
  parts = []
  with contextlib.closing(batches):  # Worker processes end with it.
    for batch in batches:
      outputs, values = program.predict(params, state.batch_stats, batch)
      found = _answers(program.config.task, outputs, batch)
      values, found, mask = jax.device_get((values, found, batch['mask']))
      parts.append(jax.tree.map(lambda x, mask=mask: x[mask], (values, found)))
      signals.check('stopped; no result was written')
  return jax.tree.map(lambda *xs: np.concatenate(xs), *parts)


def _answers(task: str, outputs, batch) -> dict[str, Any]:
  """As predict has them, of a batch."""
  import jax
  import jax.numpy as jnp

  from train import losses
  from train import metrics

  found = {'label': batch['label']}
  answers, _ = losses.TASKS[task].pair(losses.widen(outputs), batch)
  if task == 'regression':
    return found | {'number': answers}
  logits = answers
  if task == 'binary_classification':  # softmax([0, z]) is [1 - p, p].
    logits = jnp.stack([jnp.zeros_like(answers), answers], -1)
  return found | {
    'log_p': jax.nn.log_softmax(logits),
    'class': metrics.DECISIONS[task](answers),
  }


class _Classes:
  """The mean of probabilities and the votes, as members are added."""

  def __init__(self, labels):
    self._labels, self._members = labels, 0

  def add(self, found: dict[str, Any]):
    """Adds a member's 'log_p' and 'class'."""
    import numpy as np

    log_p = found['log_p'].astype(np.float64)
    places = np.arange(len(log_p))
    if not self._members:
      self._sum, self._votes = np.zeros_like(log_p), np.zeros_like(log_p)
      self._log_label = np.full(len(log_p), -np.inf)
    self._members += 1
    self._sum += np.exp(log_p)
    self._votes[places, found['class']] += 1
    # In logarithms: what all members hold to be impossible is not 0.
    own = log_p[places, self._labels]
    self._log_label = np.logaddexp(self._log_label, own)

  def summarize(self, losses: set[str]) -> dict[str, Any]:
    """Of the mean of probabilities, and of the majority."""
    import numpy as np

    del losses
    most = self._votes == self._votes.max(-1, keepdims=True)
    majority = np.where(most, self._sum, -1).argmax(-1)
    cross_entropy = np.log(self._members) - self._log_label.mean()
    return {
      'mean': {
        'accuracy': float((self._sum.argmax(-1) == self._labels).mean()),
        'cross_entropy': float(cross_entropy),
      },
      'majority': {'accuracy': float((majority == self._labels).mean())},
    }


class _Numbers:
  """The mean prediction, as members are added."""

  def __init__(self, labels):
    self._labels, self._sum, self._members = labels, 0.0, 0

  def add(self, found: dict[str, Any]):
    """Adds a member's 'number'."""
    import numpy as np

    self._sum = self._sum + found['number'].astype(np.float64)
    self._members += 1

  def summarize(self, losses: set[str]) -> dict[str, Any]:
    """Its errors, and the loss where all members had the same."""
    import numpy as np

    from train import losses as losses_lib
    from train import metrics

    mean = (self._sum / self._members)[:, None]
    batch = {'label': self._labels}
    values = metrics.create('regression')(mean, batch)
    if len(losses) == 1:
      loss = losses_lib.create('regression', *losses)(mean, batch)
      values = {'loss': loss} | values
    return {
      'mean': {
        key: float(np.asarray(value, np.float64).mean())
        for key, value in values.items()
      }
    }


if __name__ == '__main__':
  command.start('ensemble', main)
