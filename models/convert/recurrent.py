"""The weights of torch.nn.LSTM, GRU and RNN.

PyTorch adds two biases, one of the inputs and one of the state, where there is
one here: it is their sum. A GRU of reset_after=True keeps the state's apart for
its new gate. The gates have the same order: i f g o, and r z n.
Layers made with bias=False have none: it is 0.
"""

from collections.abc import Iterable
from collections.abc import Iterator

from flax import nnx
import numpy as np

from models import rnn
from models.convert import rules


def torch_rules(
  model: nnx.Module, paths: Iterable[str]
) -> Iterator[rules.Rule]:
  """The rules of every layer and direction; a head is none of theirs.

  Raises:
    ValueError: `model` is a GRU that PyTorch does not have.
  """
  paths = list(paths)
  gru = isinstance(model, rnn.GRU)
  if gru and 'blocks/0/forward/recurrent_bias' not in paths:
    raise ValueError(
      'torch.nn.GRU resets after its product; give the model reset_after=True'
    )
  for path in paths:
    if not path.startswith('blocks/'):
      continue
    _, layer, direction, leaf = path.split('/')
    end = f'_l{layer}' + ('_reverse' if direction == 'backward' else '')
    biases = (f'bias_ih{end}', f'bias_hh{end}')
    if leaf == 'kernel':
      yield rules.Rule(path, (f'weight_ih{end}',), rules.kernel)
    elif leaf == 'recurrent_kernel':
      yield rules.Rule(path, (f'weight_hh{end}',), rules.kernel)
    elif leaf == 'bias':
      make = _gru_bias if gru else np.add
      yield rules.Rule(path, biases, make, zero=True)
    elif leaf == 'recurrent_bias':
      yield rules.Rule(path, biases[1:], _new_gate, zero=True)


def _gru_bias(inputs: np.ndarray, state: np.ndarray) -> np.ndarray:
  """[3 D]: the state's is added for the gates r and z."""
  width = len(state) // 3
  return inputs + np.where(np.arange(len(state)) < 2 * width, state, 0)


def _new_gate(state: np.ndarray) -> np.ndarray:
  """[3 D] -> [D]: the last gate's."""
  return state[-(len(state) // 3) :]
