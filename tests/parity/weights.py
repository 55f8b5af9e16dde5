"""Modules of PyTorch with random weights, and ours with the same ones."""

from flax import nnx
import jax
import numpy as np

from models import convert


def randomise(module):
  """Gives every array of a torch module numbers that a mistake would show in.

  Freshly made, norms are the identity, and class tokens are zero.
  """
  import torch

  torch.manual_seed(0)
  for name, array in module.state_dict().items():
    if not array.is_floating_point():
      continue
    if name.endswith('running_var') or 'scale' in name or 'gamma' in name:
      array.uniform_(0.5, 1.5)
    elif array.ndim < 2:
      array += 0.1 * torch.randn_like(array)
    elif not array.any():
      array.normal_(std=0.02)
  return module.eval()


def moved(make, module, layout: str):
  """make(rngs) with all of the module's weights, and none of its own."""
  model = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
  report = convert.from_torch(model, module.state_dict(), layout=layout)
  return model, report


def image(size: int, batch: int = 2, channels: int = 3) -> np.ndarray:
  """[B, H, W, C] of random numbers."""
  rng = np.random.default_rng(0)
  return rng.normal(size=(batch, size, size, channels)).astype(np.float32)


def forward(model, *inputs, train: bool = False, **kwargs):
  """(outputs, the state after), compiled."""
  graphdef, state = nnx.split(model)

  @jax.jit
  def run(state, inputs, kwargs):
    model = nnx.merge(graphdef, state, copy=True)
    return model(*inputs, train=train, **kwargs), nnx.state(model)

  return run(state, inputs, kwargs)


def assert_close(found, expected, name: str = '', relative: float = 1e-4):
  """Equal to `relative` of the largest number that is expected."""
  found, expected = np.asarray(found), np.asarray(expected)
  assert found.shape == expected.shape, name
  difference = np.abs(found - expected).max()
  assert difference <= relative * np.abs(expected).max(), (name, difference)
