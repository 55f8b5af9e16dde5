"""What of a split's files cannot be used, and which example takes its place.

With `config.data.on_error='skip'` a damaged record is passed over: its place in
the order is taken by the next one of the same part that is whole, in the files'
order, from the last to the first. So an example is a function of the files and
its place, and every other place keeps its own.
"""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Sequence
import itertools
import json

import numpy as np

from train import config as config_lib
from train import processes

# Of a split's records. Where more is damaged, something else is wrong.
MOST_DAMAGED = 0.1
HINT = "config.data.on_error='skip' passes over it"
_FULLY_SAID = 3  # Of a split's faults; then only each tenfold number of them.


class Fault(Exception):  # noqa: N818 - of the data, not of the program
  """Why a record cannot be used."""


class Faults:
  """The damaged records of one split's files, which its parts share.

  Worker processes get a copy that is silent: their parent says what is news.

  Attributes:
    split: TFDS's name of the split.
    length: how many records it has, damaged ones included.
    why: row -> what is wrong with that record.
  """

  def __init__(
    self,
    name: str,
    split: str,
    length: int,
    say: Callable[[str], None] | None = None,
  ):
    """None known yet; `say` takes lines for the user, None: nobody asks."""
    self.name, self.split, self.length = name, split, length
    self.why: dict[int, str] = {}
    self._damaged = np.zeros(length, bool)
    self._say, self._said = say, 0
    self._news: list[tuple[list[int], str]] = []

  def __getstate__(self):
    return self.__dict__ | {'_say': None, '_news': []}

  def add(self, rows: Iterable[int], why: str):
    """Notes that these records are damaged, in one line if it is news.

    Raises:
      UserError: too many of the split are.
    """
    rows = [row for row in rows if row not in self.why]
    if not rows:
      return
    self.why |= dict.fromkeys(rows, why)
    self._damaged[rows] = True
    if self._say is None:
      self._news.append((rows, why))
    else:
      self._tell(rows, why)
    if len(self.why) > MOST_DAMAGED * self.length:
      raise config_lib.UserError(
        f'config.data.name is {self.name!r}, of whose split {self.split} '
        f'{len(self.why):,} of {self.length:,} records are damaged, more than '
        f'a tenth; the last found, {_named(rows)}, {why}'
      )

  def _tell(self, rows: list[int], why: str):
    count = len(self.why)
    self._said += 1
    if self._said <= _FULLY_SAID:
      last = self._said == _FULLY_SAID
      self._say(
        f"config.data.on_error is 'skip': {_named(rows)} of split {self.split} "
        f'{why}{"; what follows is only counted" if last else ""}'
      )
    elif len(str(count)) > len(str(count - len(rows))):
      self._say(
        f"config.data.on_error is 'skip': {count:,} records of split "
        f'{self.split} are damaged so far'
      )

  def are_damaged(self, rows: np.ndarray) -> np.ndarray:
    """Which of these rows are known to be damaged, bool [m]."""
    return self._damaged[rows]

  def mend(self, rows: np.ndarray | None, places: np.ndarray) -> np.ndarray:
    """Each place, or the next whose record is not known to be damaged.

    Args:
      rows: of the part that the places count; None: all.
      places: in that part.

    Raises:
      UserError: none is whole.
    """
    if not self.why or not self._damaged[_rows(rows, places)].any():
      return places
    part = self._damaged if rows is None else self._damaged[rows]
    whole = np.flatnonzero(~part)
    if not len(whole):
      raise config_lib.UserError(
        f'config.data.name is {self.name!r}, of whose split {self.split} a '
        f'part of {len(part):,} records is damaged as a whole'
      )
    return whole[np.searchsorted(whole, places) % len(whole)]

  # -------------------------------------------------- from process to process

  def news(self) -> str:
    """What a silent copy has noted since it was asked last, or ''."""
    news, self._news = self._news, []
    return json.dumps(news) if news else ''

  def hear(self, news: str):
    """Notes what another process's copy has as news."""
    for rows, why in json.loads(news):
      self.add(rows, why)


def are_whole(split, places: np.ndarray) -> np.ndarray:
  """Which of a split's examples, once taken, are those of their places.

  Args:
    split: a sources.Split or a records.Records.
    places: in it, [m].
  """
  if split.faults is None:
    return np.ones(len(places), bool)
  return ~split.faults.are_damaged(_rows(split.rows, places))


def together(why: dict[int, str]) -> Iterable[tuple[list[int], str]]:
  """Rows that follow each other and have the same fault, with that fault."""
  runs = itertools.groupby(
    enumerate(sorted(why)), lambda at: (at[1] - at[0], why[at[1]])
  )
  return [([row for _, row in run], key[1]) for key, run in runs]


def say_sum(splits: Iterable, say: Callable[[str], None]):
  """How much was passed over, if any; to be called by all processes.

  Args:
    splits: of a dataset; parts of one share their faults.
    say: takes a line for the user.
  """
  known = {
    split.faults.split: (split.faults.length, sorted(split.faults.why))
    for split in splits
    if split.faults is not None
  }
  lengths, found = {}, {}
  # Each process reads examples of its own.
  for text in processes.gather('faults', json.dumps(known)):
    for split, (length, rows) in json.loads(text).items():
      lengths[split] = length
      found[split] = found.get(split, set()) | set(rows)
  counted = ', '.join(
    f'{len(rows):,} of {lengths[split]:,} records of {split}'
    for split, rows in found.items()
    if rows
  )
  if counted:
    say(f'damaged and passed over: {counted}')


def _rows(rows: np.ndarray | None, places: np.ndarray) -> np.ndarray:
  return places if rows is None else rows[places]


def _named(rows: Sequence[int]) -> str:
  if len(rows) == 1:
    return f'record {rows[0]}'
  return f'records {rows[0]} to {rows[-1]}'
