"""Pictures of a sweep, from its sweep.json and its runs' metrics.jsonl."""

from collections.abc import Callable
import math
import pathlib
from typing import Any

import matplotlib
from matplotlib import ticker
from matplotlib.figure import Figure
import numpy as np

from experiments import style
from experiments.search import importances
from experiments.search import parallel
from experiments.search import results
from experiments.search import scales
from train import config as config_lib
from train import progress

Say = Callable[[str], None]

_COLUMNS = 4
# Which did not finish have no value to compare, and stand below the others.
_STRIP = 0.035
_MARKS = {'pruned': 'o', 'failed': 'x'}


def draw(folder: pathlib.Path, say: Say = progress.say) -> list[pathlib.Path]:
  """Draws what can be drawn of a sweep; says in a line what cannot, and why.

  Raises:
    UserError: `folder` holds no sweep, or a damaged one.
  """
  sweep = results.read(folder)
  pictures = {'curves': curves}
  if sweep.best_first:
    pictures = {
      'best': best,
      'parameters': parameters,
      'parallel': parallel.draw,
      'importance': importance,
    } | pictures
  else:
    say(
      f'none of {len(sweep.trials)} trials has finished: no picture but curves'
    )
  paths = []
  # Names and words of the sweep are no formulas.
  with matplotlib.rc_context({'text.parse_math': False}):
    for name, picture in pictures.items():
      figure = picture(sweep, say)
      if figure is not None:
        paths.append(style.save(figure, folder / f'{name}.png'))
  return paths


# --------------------------------------------------------------------- shared


def _put(axes, x: list[float], values: list[float], **options):
  """Points; those outside of the range to show lie at its edge, as arrows."""
  low, high = axes.get_ylim()
  x, values = np.array(x, float), np.array(values, float)
  edge = 0.02 * (high - low)
  for marker, which, at in (
    ('o', (values >= low) & (values <= high), values),
    ('v', values < low, np.full_like(values, low + edge)),
    ('^', values > high, np.full_like(values, high - edge)),
  ):
    if which.any():
      label = {}
      if marker != 'o' and 'label' in options:
        label = {'label': _of(which.sum(), 'beyond')}
      axes.scatter(
        x[which], at[which], marker=marker, **(options | label), zorder=3
      )


def _unfinished(axes, state: str, x: list[float], label: str | None = None):
  """Marks those that ended without a value, below all values."""
  options = (
    {'facecolors': 'none', 'edgecolors': style.GREY}
    if state == 'pruned'
    else {'color': style.GREY}
  )
  axes.scatter(
    x,
    [_STRIP] * len(x),
    marker=_MARKS[state],
    s=20,
    linewidths=1,
    transform=axes.get_xaxis_transform(),
    label=label,
    **options,
  )


def _room_below(axes, low: float, high: float):
  axes.set_ylim(low - 0.08 * (high - low), high)


def _title(axes, text: str, **options):
  axes.set_title(
    text, **({'loc': 'left', 'color': style.INK, 'fontsize': 10} | options)
  )


def _of(number: int, what: str) -> str:
  return f'{what} ({number})'


# ------------------------------------------------------------------- pictures


def best(sweep: results.Sweep, say: Say) -> Figure:
  """Each trial's value in the order of finishing, and the best so far."""
  del say
  ended = _in_order(sweep)
  places = {trial.number: i for i, trial in enumerate(ended, start=1)}
  done = [t for t in ended if t.state == 'finished' and t.value is not None]
  x, values = [places[t.number] for t in done], [t.value for t in done]
  running = np.maximum if sweep.maximize else np.minimum
  so_far = running.accumulate(values)
  figure = Figure(figsize=(7.5, 3.8), layout='constrained')
  axes = figure.subplots()
  apart = np.array([t.deviation or 0 for t in done])
  ends = [*(values - apart), *(values + apart)]
  _room_below(axes, *scales.focus(ends, sweep.maximize))
  axes.vlines(x, values - apart, values + apart, color=style.BLUE, alpha=0.5)
  _put(axes, x, values, color=style.BLUE, s=24, label=_of(len(x), 'finished'))
  axes.step(
    [*x, len(ended)],
    [*so_far, so_far[-1]],
    where='post',
    color=style.ORANGE,
    linewidth=2,
    label='best so far',
  )
  for state in _MARKS:
    marked = [places[t.number] for t in ended if t.state == state]
    if marked:
      _unfinished(axes, state, marked, _of(len(marked), state))
  first = sweep.best_first[0]
  _title(
    axes,
    f'{scales.metric(sweep)}: best {first.value:.4g}, trial {first.number}',
  )
  axes.set_xlabel('trials, in the order of finishing', **style.SMALL)
  axes.set_xlim(0.5, len(ended) + 0.5)
  axes.xaxis.set_major_locator(
    ticker.MaxNLocator(8, integer=True, min_n_ticks=1)
  )
  style.plain(axes)
  style.legend(figure)
  return figure


def _in_order(sweep: results.Sweep) -> list[results.Trial]:
  """The trials that have ended, as they ended; the others as they began."""
  ended = [t for t in sweep.trials if t.state in ('finished', *_MARKS)]
  order = sorted(
    (t for t in ended if t.place is not None), key=lambda t: t.place
  )
  for trial in ended:
    if trial.place is None:
      later = (i for i, t in enumerate(order) if t.number > trial.number)
      order.insert(next(later, len(order)), trial)
  return order


def parameters(sweep: results.Sweep, say: Say) -> Figure | None:
  """Each parameter that varies against the metric."""
  varied = scales.varied(sweep)
  if not varied:
    say('parameters.png is left out: no parameter varies')
    return None
  rows = math.ceil(len(varied) / _COLUMNS)
  columns = math.ceil(len(varied) / rows)
  figure = Figure(
    figsize=(max(4, 2.9 * columns), 2.9 * rows), layout='constrained'
  )
  panels = figure.subplots(rows, columns, squeeze=False, sharey=True)
  limits = scales.focus([t.value for t in sweep.best_first], sweep.maximize)
  for i, axes in enumerate(panels.flat):
    if i >= len(varied):
      axes.set_visible(False)
      continue
    name = list(varied)[i]
    _room_below(axes, *limits)
    _parameter(axes, sweep, name, varied[name])
    if i % columns == 0:
      axes.set_ylabel(scales.metric(sweep), **style.SMALL)
  return figure


def _parameter(axes, sweep: results.Sweep, name: str, scale: scales.Scale):
  given = [t for t in sweep.best_first[::-1] if name in t.params]
  if given:
    _put(
      axes,
      [scale.scattered(t.params[name], t.number) for t in given],
      [t.value for t in given],
      color=style.BLUE,
      s=22,
      alpha=0.7,
      linewidths=0,
    )
  if given and given[-1] is sweep.best_first[0]:
    place = scale.scattered(given[-1].params[name], given[-1].number)
    _put(axes, [place], [given[-1].value], color=style.ORANGE, s=44)
  for state in _MARKS:
    marked = [
      scale.scattered(t.params[name], t.number)
      for t in sweep.trials
      if t.state == state and name in t.params
    ]
    if marked:
      _unfinished(axes, state, marked)
  places, labels = scale.ticks()
  leaning = sum(map(len, labels)) > 26
  axes.set_xticks(
    places,
    labels,
    rotation=30 if leaning else 0,
    ha='right' if leaning else 'center',
    rotation_mode='anchor',
    fontsize=9,
  )
  axes.set_xlim(-0.12, 1.12)
  _title(axes, scales.name(name))
  style.plain(axes)


def importance(sweep: results.Sweep, say: Say) -> Figure | None:
  """How much of the metric's variance each parameter explains, by fANOVA."""
  shares, why = importances.importances(sweep)
  if why:
    say(f'importance.png is left out: {why}')
    return None
  names = list(shares)[::-1]  # Matplotlib begins below.
  figure = Figure(figsize=(6.5, 0.7 + 0.4 * len(names)), layout='constrained')
  axes = figure.subplots()
  values = [shares[name] for name in names]
  bars = axes.barh(range(len(names)), values, 0.6, color=style.BLUE)
  axes.set_yticks(range(len(names)), [scales.name(name) for name in names])
  axes.bar_label(
    bars, [f'{value:.2f}' for value in values], padding=4, **style.SMALL
  )
  _title(axes, f'share of the variance of {scales.metric(sweep)} (fANOVA)')
  axes.set_xlim(0, max(values) * 1.12)
  axes.set_ylim(-0.5, len(names) - 0.5)
  axes.tick_params(length=0, colors=style.INK)
  axes.xaxis.set_visible(False)
  for spine in axes.spines.values():
    spine.set_visible(False)
  return figure


def curves(sweep: results.Sweep, say: Say) -> Figure | None:
  """The metric over steps of every run, the best trial's in front."""
  lines = {t.number: _lines(t, sweep.metric, say) for t in sweep.trials}
  if not any(lines.values()):
    say(f'curves.png is left out: no run has {scales.shown(sweep.metric)} yet')
    return None
  front, *near = sweep.best_first[:3] or [None]
  figure = Figure(figsize=(7.5, 4), layout='constrained')
  axes = figure.subplots()
  looks = (
    ('failed', {'color': style.GREY, 'linestyle': ':', 'linewidth': 1}),
    ('pruned', {'color': style.GREY, 'linewidth': 1, 'alpha': 0.6}),
    ('running', {'color': style.GREY, 'linestyle': '--', 'linewidth': 1}),
    ('finished', {'color': style.BLUE, 'linewidth': 1}),
  )
  for state, look in looks:
    there = [t for t in sweep.trials if t.state == state and lines[t.number]]
    there = [t for t in there if t not in (front, *near)]
    if state == 'finished':  # Of many, that none becomes a blot.
      look |= {'alpha': min(0.6, max(0.15, 15 / (len(there) + 1)))}
    for i, trial in enumerate(there):
      _curves(axes, lines[trial.number], _of(len(there), state), i == 0, look)
  names = ' and '.join(f'{t.number}' for t in near)
  for i, trial in enumerate(near):
    look = {'color': style.DARK, 'linewidth': 1.4, 'zorder': 3}
    _curves(axes, lines[trial.number], f'then: {names}', i == 0, look)
  if front:
    look = {'color': style.ORANGE, 'linewidth': 2.2, 'zorder': 4}
    label = f'best: trial {front.number}, {front.value:.4g}'
    _curves(axes, lines[front.number], label, True, look)
  shown = [t.number for t in sweep.best_first] or list(lines)
  values = [v for number in shown for line in lines[number] for v in line[1]]
  if values:
    axes.set_ylim(*scales.focus(values, sweep.maximize))
  _title(axes, scales.metric(sweep))
  axes.set_xlabel('step', **style.SMALL)
  style.plain(axes)
  style.legend(figure)
  return figure


def _curves(axes, lines, label: str, labelled: bool, look: dict[str, Any]):
  for i, (steps, values) in enumerate(lines):
    axes.plot(
      steps,
      values,
      marker='.' if len(steps) == 1 else None,
      label=label if labelled and i == 0 else None,
      **look,
    )


def _lines(trial: results.Trial, metric: str, say: Say) -> list[tuple]:
  """(steps, values) of each run that was evaluated; what is damaged is said."""
  from train import workdir as workdir_lib
  from train import writer

  found = []
  for run in trial.runs:
    try:
      read = writer.read(run.workdir / workdir_lib.METRICS)
    except (config_lib.UserError, OSError) as error:
      say(f'trial {trial.number}: {config_lib.first_line(error)}')
      continue
    points = [
      (line['step'], line[metric])
      for line in read
      if results.is_number(line['step']) and results.is_number(line.get(metric))
    ]
    if points:
      found.append(tuple(zip(*points, strict=True)))
  return found
