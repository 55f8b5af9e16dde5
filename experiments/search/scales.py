"""Where a parameter's values lie on an axis, and how they are written."""

from collections.abc import Iterable
from collections.abc import Mapping
import math
from typing import Any

from matplotlib import ticker
import numpy as np

from experiments.search import results

_LONGEST = 18  # Letters of a label.
_MOST_CHOICES = 8  # Labels of an axis.
_DECADES = 100  # Listed numbers that differ by so much are shown by decades.


def name(path: str) -> str:
  """A parameter's path, as 'schedule.value'."""
  return shown(path, 2 * _LONGEST)


def shown(value: Any, longest: int = _LONGEST) -> str:
  """A value as a person writes it on the command line, cut where it is long."""
  if isinstance(value, tuple):
    text = ', '.join(map(shown, value)) or '()'
  elif isinstance(value, Mapping):
    text = ' '.join(f'{key}={shown(item)}' for key, item in value.items())
  elif isinstance(value, float):
    text = f'{value:.3g}'
  elif value is None or isinstance(value, bool):
    text = {None: 'none', True: 'true', False: 'false'}[value]
  else:
    text = str(value)
  # A letter that the font lacks would be a warning and a box.
  text = text.encode('ascii', 'backslashreplace').decode()
  text = ''.join(letter if letter.isprintable() else ' ' for letter in text)
  return text if len(text) <= longest else f'{text[: longest - 1]}…'


class Scale:
  """Numbers along a line or along decades, or one place for each choice.

  Attributes:
    is_log: whether places are the logarithms of numbers.
    choices: their labels in order; () of numbers.
    order: the choices themselves, by their representation.
  """

  def __init__(self, words: tuple | None, values: Iterable[Any]):
    """A scale for `values`.

    Args:
      words: what the search space has, as ('log', 0.1, 1); None: not known.
      values: all that are to be shown; at least one.
    """
    values = list(values)
    kind = words[0] if words else None
    self.choices, self.order, self.is_log = (), (), False
    if kind == 'choice' or not all(map(results.is_number, values)):
      listed = words[1:] if kind == 'choice' else ()
      labels = {repr(value): shown(value) for value in (*listed, *values)}
      self.order = tuple(labels)
      self.choices = tuple(labels.values())
      self._low, self._high = 0, len(self.choices) - 1
      return
    low, high = min(values), max(values)
    self._whole = all(isinstance(value, int) for value in values)
    self.is_log = low > 0 and (
      kind == 'log' or (kind is None and high >= _DECADES * low)
    )
    self._low, self._high = self._number(low), self._number(high)

  def _number(self, value: float) -> float:
    return math.log10(value) if self.is_log else float(value)

  def place(self, value: Any) -> float:
    """From 0 to 1; a half where there is one value alone."""
    where = (
      self.order.index(repr(value)) if self.choices else self._number(value)
    )
    if self._high == self._low:
      return 0.5
    return (where - self._low) / (self._high - self._low)

  def scattered(self, value: Any, number: int) -> float:
    """Its place; of a choice, beside it, so that trials do not hide others."""
    if not self.choices:
      return self.place(value)
    beside = number * 0.618 % 1 - 0.5  # The golden ratio fills a gap evenly.
    return self.place(value) + 0.3 * beside / len(self.choices)

  def ticks(self) -> tuple[list[float], list[str]]:
    """Places from 0 to 1, and what to write there; no more than fit."""
    if self.choices:
      step = math.ceil(len(self.choices) / _MOST_CHOICES)
      labels = list(self.choices)[::step]
      most = max(len(self.choices) - 1, 1)
      places = [i * step / most for i in range(len(labels))]
      return (
        (places, labels) if most > 1 or len(labels) > 1 else ([0.5], labels)
      )
    low, high = self._low, self._high
    if low == high:
      return [0.5], [f'{10**low if self.is_log else low:.4g}']
    if self.is_log:
      numbers = _decades(10**low, 10**high)
    else:
      locator = ticker.MaxNLocator(4, integer=self._whole)
      numbers = locator.tick_values(low, high)
    edge = 1e-6 * (high - low)
    kept = [
      number
      for number in numbers
      if low - edge <= self._number(number) <= high + edge
    ]
    return [self.place(number) for number in kept], [f'{n:g}' for n in kept]


def _decades(low: float, high: float) -> list[float]:
  """Powers of ten, every other where they are many, with others if few."""
  first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
  if high <= 101 * low:
    digits = (1, 2, 5) if high <= 10 * low else (1, 3)
    return [
      digit * 10.0**power for power in range(first, last + 1)
      for digit in digits
    ]  # fmt: skip
  step = math.ceil((last - first) / 5)
  return [10.0**power for power in range(first, last + 1, step)]


def varied(sweep: results.Sweep) -> dict[str, Scale]:
  """The parameters of more than one value, or that only some trials have."""
  trials = [
    t for t in sweep.trials if t.state in ('finished', 'pruned', 'failed')
  ]
  names = dict.fromkeys(name for t in trials for name in t.params)
  found = {}
  for name in names:
    given = [t.params[name] for t in trials if name in t.params]
    several = len(set(map(repr, given))) > 1
    if several or len(given) < len(trials) or len(trials) == 1:
      found[name] = Scale((sweep.space or {}).get(name), given)
  return found


def focus(values: list[float], maximize: bool) -> tuple[float, float]:
  """The range to show: of all but what is far worse than the others.

  That is, eight times as far from the best as the median. One trial that
  diverged would else press all others into a line.
  """
  best, worst = (max, min) if maximize else (min, max)
  end = best(values)
  far = 8 * abs(end - float(np.median(values)))
  start = worst(v for v in values if not far or abs(end - v) <= far)
  pad = 0.06 * abs(end - start) or 0.05 * abs(end) or 0.05
  return min(start, end) - pad, max(start, end) + pad


def metric(sweep: results.Sweep) -> str:
  """What judges the trials, as a title has it."""
  return name(sweep.metric.removeprefix('eval/')).replace('_', ' ')
