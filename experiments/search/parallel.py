"""Parallel coordinates: each finished trial a line through its parameters."""

from collections.abc import Callable

from matplotlib import collections
from matplotlib import colors
from matplotlib import patheffects
from matplotlib import ticker
from matplotlib.figure import Figure
import numpy as np

from experiments import style
from experiments.search import results
from experiments.search import scales

_ABSENT = -0.12  # Where a line goes that lacks the parameter.
# From the worst of the trials to the best.
_RAMP = colors.LinearSegmentedColormap.from_list(
  'ramp', ['#e4e4e4', '#a9d3ee', style.BLUE, style.DARK]
)


def draw(sweep: results.Sweep, say: Callable[[str], None]) -> Figure | None:
  """Each finished trial as a line through its parameters to its value."""
  varied = scales.varied(sweep)
  if not varied:
    say('parallel.png is left out: no parameter varies')
    return None
  trials = sweep.best_first[::-1]  # The best is drawn last, above the others.
  low, high = scales.focus([t.value for t in trials], sweep.maximize)
  figure = Figure(
    figsize=(max(5.5, 1.6 * (len(varied) + 1)), 4.2), layout='constrained'
  )
  axes = figure.subplots()
  heights = [np.clip((t.value - low) / (high - low), 0, 1) for t in trials]
  lines = [
    [
      (i, scale.place(t.params[name]) if name in t.params else _ABSENT)
      for i, (name, scale) in enumerate(varied.items())
    ]
    + [(len(varied), height)]
    for t, height in zip(trials, heights, strict=True)
  ]
  axes.add_collection(
    collections.LineCollection(
      lines[:-1],
      colors=_RAMP(np.linspace(0, 1, len(lines))[:-1] ** 2),
      linewidths=1.2 if len(lines) < 60 else 0.8,
    )
  )
  axes.plot(*zip(*lines[-1], strict=True), color=style.ORANGE, linewidth=2.4)
  ticks = [scale.ticks() for scale in varied.values()]
  values = ticker.MaxNLocator(5).tick_values(low, high)
  values = [value for value in values if low <= value <= high]
  places = [(value - low) / (high - low) for value in values]
  ticks.append((places, [f'{value:g}' for value in values]))
  lowest = min(line[i][1] for line in lines for i in range(len(varied)))
  for i, (places, labels) in enumerate(ticks):
    if any(line[i][1] == _ABSENT for line in lines):
      places, labels = [_ABSENT, *places], ['absent', *labels]
    _upright(axes, i, places, labels)
  names = [_in_two_lines(name) for name in varied]
  axes.set_xticks(range(len(ticks)), [*names, scales.metric(sweep)], fontsize=9)
  axes.xaxis.set_ticks_position('top')
  axes.tick_params(length=0, colors=style.INK, pad=6)
  axes.set_xlim(-0.1, len(varied) + 0.45)
  axes.set_ylim(min(lowest, 0) - 0.04, 1.04)
  axes.yaxis.set_visible(False)
  for spine in axes.spines.values():
    spine.set_visible(False)
  first = sweep.best_first[0]
  figure.text(
    0.01,
    0.01,
    f'orange: the best, trial {first.number}, {first.value:.4g}',
    **style.SMALL,
  )
  figure.get_layout_engine().set(rect=(0, 0.06, 1, 0.94))
  return figure


def _in_two_lines(name: str) -> str:
  block, dot, field = name.rpartition('.')
  return f'{scales.shown(block)}\n{scales.shown(dot + field)}'.strip()


def _upright(axes, x: float, places: list[float], labels: list[str]):
  """An axis of its own, with what stands on it."""
  axes.plot([x, x], [0, 1], color=style.GREY, linewidth=1, zorder=3)
  for place, label in zip(places, labels, strict=True):
    axes.text(
      x + 0.04,
      place,
      label,
      fontsize=8,
      color=style.INK,
      va='center',
      zorder=4,
      path_effects=[patheffects.withStroke(linewidth=2.5, foreground='white')],
    )
