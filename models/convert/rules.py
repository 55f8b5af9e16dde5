"""What an array of ours is made of, by tables of names.

A table maps a module of ours to one of theirs, or an array of ours to one of
theirs. i, j and k count from 0, I, J and K from 1; odd is 2i + 1, even 2i + 2.
"""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
import dataclasses

from flax import nnx
import numpy as np

# What flax calls an array of a layer, and what PyTorch does. Its running
# variance is the unbiased one, n / (n - 1) of the one that is kept here, for n
# values of a channel in a batch. It is taken as it is.
_PYTORCH = {
  'kernel': 'weight',
  'scale': 'weight',
  'bias': 'bias',
  'mean': 'running_mean',
  'var': 'running_var',
}


@dataclasses.dataclass(frozen=True)
class Rule:
  """One array of ours.

  Attributes:
    path: ours, as 'blocks/0/conv/kernel'.
    names: theirs, each of which must be there.
    make: (array of each name) -> array.
    resize: array -> (array at the model's resolution, what to say of it), or
      None where there is none to fit.
    zero: whether it is 0 where no rule that says so finds a name, as in layers
      made without biases.
  """

  path: str
  names: tuple[str, ...]
  make: Callable[..., np.ndarray] = np.asarray
  resize: Callable[[np.ndarray], tuple[np.ndarray, str]] | None = None
  zero: bool = False


# (model, our paths) -> rules, of one family in one layout.
Family = Callable[[nnx.Module, Iterable[str]], Iterator[Rule]]


def kernel(weight: np.ndarray) -> np.ndarray:
  """[out, in] -> [in, out], and [out, in, H, W] -> [H, W, in, out]."""
  return weight.transpose(*range(2, weight.ndim), 1, 0)


def vector(array: np.ndarray) -> np.ndarray:
  """[1, 1, D] or [D, 1, 1] -> [D], also where D is 1."""
  return np.atleast_1d(np.squeeze(array))


def pytorch(names: Mapping[str, str]) -> Family:
  """The rules of every path that is in the table of names."""

  def rules(model, paths):
    del model  # What it has is in its paths.
    for path in paths:
      module, _, leaf = path.rpartition('/')
      make = kernel if leaf == 'kernel' else vector
      if theirs := find(path, names):
        yield Rule(path, (theirs,), make)
      elif theirs := find(module, names):
        yield Rule(path, (f'{theirs}.{_PYTORCH[leaf]}',), make)

  return rules


def find(path: str, names: Mapping[str, str]) -> str | None:
  """The name of one path, filled in, or None where the table has none."""
  letters, counted, pattern = iter('ijk'), {}, []
  for part in path.split('/'):
    if part.isdigit():
      letter = next(letters)
      counted |= {letter: int(part), letter.upper(): int(part) + 1}
      part = f'{{{letter}}}'
    pattern.append(part)
  if 'i' in counted:
    counted |= {'odd': 2 * counted['i'] + 1, 'even': 2 * counted['i'] + 2}
  name = names.get('/'.join(pattern))
  return None if name is None else name.format(**counted)
