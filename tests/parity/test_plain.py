"""MLP and CNN against torch.nn, and a step of gradient descent of each."""

from flax import nnx
import jax
import numpy as np
import optax
import pytest

from models import cnn
from models import mlp
from tests.parity import weights

torch = pytest.importorskip('torch')
pytestmark = pytest.mark.parity

LABELS = np.array([3, 1, 4, 1])


class _CNN(torch.nn.Module):
  """3x3 convolution, norm, ReLU, pool; then the pixels row by row to a head."""

  def __init__(self, channels, widths, head_widths, features):
    super().__init__()
    sizes = (channels, *widths)
    self.blocks = torch.nn.ModuleList(
      torch.nn.Conv2d(a, b, 3, padding=1, bias=False)
      for a, b in zip(sizes[:-1], sizes[1:], strict=True)
    )
    self.norms = torch.nn.ModuleList(map(torch.nn.BatchNorm2d, widths))
    sizes = (features, *head_widths)
    self.hidden = torch.nn.ModuleList(
      torch.nn.Linear(a, b) for a, b in zip(sizes[:-1], sizes[1:], strict=True)
    )
    self.head = torch.nn.Linear(sizes[-1], 10)

  def forward(self, x):
    for block, norm in zip(self.blocks, self.norms, strict=True):
      x = torch.nn.functional.max_pool2d(norm(block(x)).relu(), 2)
    x = x.permute(0, 2, 3, 1).flatten(1)
    for hidden in self.hidden:
      x = hidden(x).relu()
    return self.head(x)


def _mlp():
  theirs = torch.nn.Sequential(
    torch.nn.Flatten(),
    torch.nn.Linear(784, 256),
    torch.nn.ReLU(),
    torch.nn.Linear(256, 128),
    torch.nn.ReLU(),
    torch.nn.Linear(128, 10),
  )
  ours = mlp.MLP(rngs=nnx.Rngs(0))
  pairs = [*zip([*ours.blocks, ours.head], theirs[1::2], strict=True)]
  return ours, theirs, pairs, (28, 28, 1)


def _cnn():
  theirs = _CNN(3, (8, 16), (12,), 16 * 5 * 4)
  ours = cnn.CNN(
    (20, 17, 3), 10, widths=(8, 16), head_widths=(12,), rngs=nnx.Rngs(0)
  )
  pairs = [
    *zip(ours.blocks, theirs.blocks, strict=True),
    *zip((n.norm for n in ours.norms), theirs.norms, strict=True),
    *zip(ours.hidden, theirs.hidden, strict=True),
    (ours.head, theirs.head),
  ]
  return ours, theirs, pairs, (20, 17, 3)


def _turned(array):
  """[out, in] as [in, out], [out, in, H, W] as [H, W, in, out]."""
  array = array.detach().numpy()
  return (
    array.transpose(*range(2, array.ndim), 1, 0) if array.ndim > 1 else array
  )


def _arrays(ours, theirs) -> list:
  """[(a variable of ours, the tensor that it corresponds to)] of one layer."""
  kernel = ours.scale if hasattr(ours, 'scale') else ours.kernel
  pairs = [(kernel, theirs.weight)]
  if ours.bias is not None:
    pairs.append((ours.bias, theirs.bias))
  return pairs


@pytest.mark.parametrize('make', [_mlp, _cnn])
def test_outputs_and_gradients_agree(make):
  ours, theirs, layers, shape = make()
  weights.randomise(theirs)
  pairs = [pair for layer in layers for pair in _arrays(*layer)]
  for variable, tensor in pairs:
    variable[...] = _turned(tensor)
  for layer, norm in layers:
    if isinstance(norm, torch.nn.BatchNorm2d):
      layer.mean[...] = norm.running_mean.numpy()
      layer.var[...] = norm.running_var.numpy()
  assert len(pairs) == len(jax.tree.leaves(nnx.state(ours, nnx.Param)))
  rng = np.random.default_rng(0)
  image = rng.normal(size=(4, *shape)).astype(np.float32)
  tensor = torch.from_numpy(image.transpose(0, 3, 1, 2))
  with torch.no_grad():
    expected = theirs(tensor)
  weights.assert_close(weights.forward(ours, image)[0], expected)

  graphdef, params, rest = nnx.split(ours, nnx.Param, ...)

  @jax.jit
  @jax.grad
  def grad(params):
    logits = nnx.merge(graphdef, params, rest, copy=True)(image, train=True)
    return optax.softmax_cross_entropy_with_integer_labels(
      logits, LABELS
    ).mean()

  nnx.update(ours, grad(params))  # The variables hold their gradients now.
  theirs.train()
  torch.nn.functional.cross_entropy(
    theirs(tensor), torch.from_numpy(LABELS)
  ).backward()
  for variable, tensor in pairs:
    weights.assert_close(variable, _turned(tensor.grad))
