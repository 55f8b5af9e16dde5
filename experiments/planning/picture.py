"""A plan as a picture: what fills a device, and what a step waits for."""

import pathlib

from matplotlib.figure import Figure

from experiments import style
from experiments.planning import cost
from experiments.planning import text


def draw(plan: cost.Plan, path: pathlib.Path):
  """Writes it; memory to the left, times to the right."""
  figure = Figure(figsize=(10, 3.2), layout='constrained')
  left, right = figure.subplots(1, 2, width_ratios=(3, 2))
  _memory(left, plan)
  _times(right, plan)
  account = plan.account
  figure.suptitle(
    f'{account["model"]} {account["variant"] or ""} on {plan.target.name}, '
    f'batches of {account["batch_size"]:,}: {text.verdict(plan)}',
    color=style.INK,
    fontsize=10,
  )
  style.save(figure, path)


def _memory(axes, plan):
  parts = [(name, n / 2**30) for name, n in text.memory(plan) if n > 0]
  parts.sort(key=lambda part: -part[1])
  names = [name for name, _ in parts][::-1]
  values = [value for _, value in parts][::-1]
  axes.barh(names, values, color=style.DARK)
  for place, value in enumerate(values):
    axes.text(value, place, f' {text.size(value * 2**30)}', va='center',
              color=style.INK, fontsize=8)  # fmt: skip
  if plan.available:
    axes.axvline(plan.available / 2**30, color=style.ORANGE)
  axes.margins(x=0.25)
  axes.set_title(
    'GiB of a device' + (', and all it has' if plan.available else ''),
    loc='left', color=style.INK, fontsize=10,
  )  # fmt: skip
  style.plain(axes, along='x')


def _times(axes, plan):
  if plan.step is None:
    axes.set_axis_off()
    return
  names = list(plan.seconds)[::-1]
  values = [1e3 * plan.seconds[name] for name in names]
  hues = [style.ORANGE if name == plan.bound else style.BLUE for name in names]
  axes.barh(names, values, color=hues)
  for place, value in enumerate(values):
    axes.text(value, place, f' {text.duration(value / 1e3)}', va='center',
              color=style.INK, fontsize=8)  # fmt: skip
  axes.margins(x=0.3)
  axes.set_title(
    'ms of a step, which takes the longest',
    loc='left', color=style.INK, fontsize=10,
  )  # fmt: skip
  style.plain(axes, along='x')
