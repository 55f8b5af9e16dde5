"""Pictures of a finished run, and the table that a person reads at its end."""

import json
import os
import pathlib
import shlex
from typing import Any

from matplotlib.figure import Figure
import matplotlib.ticker
import numpy as np

from experiments import command
from experiments import reconstructions
from experiments import style
from train import program as program_lib
from train import progress
from train import workdir as workdir_lib
from train import writer


def show(
  workdir: pathlib.Path, program: program_lib.Program, final: dict[str, float]
):
  """Draws the pictures of a run, then prints metrics and places.

  Args:
    workdir: of a finished run.
    program: its own.
    final: the metrics of its test.
  """
  split = program.test_split
  pictures = [curves(workdir)]
  lines = writer.read(workdir / workdir_lib.METRICS)
  step = next(line['step'] for line in lines if 'test/loss' in line)
  tested = workdir / 'evaluations' / f'{split}-{step}.json'
  if not tested.exists():
    progress.say(f'{tested} was removed: no confusion matrix is drawn')
  elif picture := confusion(workdir, json.loads(tested.read_text())):
    pictures.append(picture)
  if figure := reconstructions.draw(workdir, program, step):
    pictures.append(style.save(figure, workdir / 'reconstructions.png'))
  rows = {key: f'{value:.4f}' for key, value in final.items()}
  rows |= {
    'checkpoints': workdir / workdir_lib.CHECKPOINTS,
    'metrics': workdir / workdir_lib.METRICS,
  }
  rows |= {picture.stem: picture for picture in pictures}
  place = shlex.quote(os.fspath(workdir))
  rows['again'] = (
    f'{command.python()} -m experiments.evaluate --workdir={place}'
  )
  progress.say('')
  for key, value in rows.items():
    progress.say(f'{key:26}{value}')


def curves(workdir: pathlib.Path) -> pathlib.Path:
  """Loss and the metric that judges, over steps: workdir/curves.png."""
  config = workdir_lib.read_config(workdir)
  lines = writer.read(workdir / workdir_lib.METRICS)
  judge = config.best_metric.removeprefix('eval/')
  names = list(dict.fromkeys(['loss', judge]))
  figure = Figure(figsize=(5 * len(names), 3.6), layout='constrained')
  for axes, name in zip(
    np.ravel(figure.subplots(1, len(names), squeeze=False)), names, strict=True
  ):
    for kind, colour in (('train', style.BLUE), ('eval', style.ORANGE)):
      points = [
        (line['step'], line[f'{kind}/{name}'])
        for line in lines
        if f'{kind}/{name}' in line
      ]
      if points:
        steps, values = zip(*points, strict=True)
        axes.plot(
          steps,
          values,
          color=colour,
          linewidth=1.2 if kind == 'train' else 2,
          marker='o' if len(points) == 1 else None,
          label=f'{kind}, last {values[-1]:.4g}',
        )
    axes.set_title(name.replace('_', ' '), loc='left', color=style.INK)
    axes.set_xlabel('step', color=style.INK)
    if name == 'loss' and _positive(axes):
      axes.set_yscale('log')
      axes.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter('%g'))
      axes.yaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    style.plain(axes)
    axes.legend(frameon=False, labelcolor=style.INK)
  return style.save(figure, workdir / 'curves.png')


def confusion(
  workdir: pathlib.Path, results: dict[str, Any]
) -> pathlib.Path | None:
  """The confusion matrix, rows the label: workdir/confusion.png.

  None where there are no classes.
  """
  if 'confusion' not in results:
    return None
  counts = np.array(results['confusion'])
  names = list(results['per_class'])
  rows = counts.sum(1, keepdims=True)
  shares = counts / np.maximum(rows, 1)
  size = min(12, 2.4 + 0.36 * len(names))
  figure = Figure(figsize=(size + 0.6, size), layout='constrained')
  axes = figure.subplots()
  # Right answers in blue; mistakes, which are rarer, in orange to their most.
  right = np.eye(len(names), dtype=bool)
  mistakes = np.where(right, 0, shares)
  axes.imshow(np.ma.array(shares, mask=~right), cmap='Blues', vmin=0, vmax=1)
  axes.imshow(
    np.ma.array(mistakes, mask=mistakes == 0),
    cmap='Oranges',
    vmin=0,
    vmax=max(2 * mistakes.max(), 1e-9),
  )
  if len(names) <= 20:
    for (label, answer), count in np.ndenumerate(counts):
      if count:
        axes.text(
          answer,
          label,
          f'{count}',
          ha='center',
          va='center',
          fontsize=9,
          color='white' if right[label, answer] else style.INK,
        )
    axes.set_xticks(range(len(names)), names, rotation=90 * (len(names) > 10))
    axes.set_yticks(range(len(names)), names)
  axes.set_xlabel('answer', color=style.INK)
  axes.set_ylabel('label', color=style.INK)
  axes.set_title(
    f'{results["split"]}: {counts.trace()} of {counts.sum()} right '
    f'({results["accuracy"]:.1%})',
    loc='left',
    color=style.INK,
    fontsize=10,
  )
  axes.tick_params(length=0, colors=style.INK)
  for spine in axes.spines.values():
    spine.set_visible(False)
  return style.save(figure, workdir / 'confusion.png')


def _positive(axes) -> bool:
  return all((line.get_ydata() > 0).all() for line in axes.get_lines())
