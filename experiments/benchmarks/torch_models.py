"""The networks of the suite 'models' in PyTorch, as one would write them there.

The same layers, sizes and number of trained parameters as ours.
"""

from collections.abc import Callable
import os
import time

import numpy as np
import torch
from torch import nn
from torch.nn import functional


def create(name: str) -> nn.Module:
  """The network of a case: float32 [B, C, H, W] -> [B, K], or [B, D]."""
  return MODELS[name]()


def count_parameters(model: nn.Module) -> int:
  """Numbers that are trained."""
  return sum(p.numel() for p in model.parameters() if p.requires_grad)


def timer(
  model: nn.Module,
  image: np.ndarray,
  label: np.ndarray | None,
  *,
  compiled: bool,
) -> Callable[[int], float]:
  """(steps) -> seconds a step, of a model that is compiled and warm by then.

  A step is Adam's (fused) on one batch that lies in memory
  as float32, on as many threads as there are cores.

  Args:
    model: trained in place.
    image: float32 [B, H, W, C].
    label: int [B], for cross-entropy; None to reconstruct the image.
    compiled: by torch.compile, model and loss together.
  """
  torch.set_num_threads(len(os.sched_getaffinity(0)))
  inputs = torch.from_numpy(image.transpose(0, 3, 1, 2).copy())
  targets = None if label is None else torch.from_numpy(label).long()
  optimizer = torch.optim.Adam(
    [p for p in model.parameters() if p.requires_grad], lr=1e-3, fused=True
  )

  def loss():
    outputs = model(inputs)
    if targets is None:
      return functional.mse_loss(outputs, inputs.flatten(1))
    return functional.cross_entropy(outputs, targets)

  if compiled:
    loss = torch.compile(loss)

  def run(steps: int) -> float:
    start = time.perf_counter()
    for _ in range(steps):
      optimizer.zero_grad()
      loss().backward()
      optimizer.step()
    return (time.perf_counter() - start) / steps

  run(3)
  return run


def product_rate(size: int, repeats: int) -> float:
  """The best rate of a float32 product [size, size], operations a second."""
  torch.set_num_threads(len(os.sched_getaffinity(0)))
  x = torch.ones(size, size)
  best = float('inf')
  for _ in range(repeats):
    start = time.perf_counter()
    x @ x
    best = min(best, time.perf_counter() - start)
  return 2 * size**3 / best


# ------------------------------------------------------------------- models


def _mlp() -> nn.Module:
  return nn.Sequential(
    nn.Flatten(),
    nn.Linear(784, 256), nn.ReLU(),
    nn.Linear(256, 128), nn.ReLU(),
    nn.Linear(128, 10),
  )  # fmt: skip


def _autoencoder() -> nn.Module:
  return nn.Sequential(
    nn.Flatten(),
    nn.Linear(784, 256), nn.ReLU(),
    nn.Linear(256, 32),
    nn.Linear(32, 256), nn.ReLU(),
    nn.Linear(256, 784),
  )  # fmt: skip


def _cnn() -> nn.Module:
  return nn.Sequential(
    nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
    nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
    nn.Flatten(),
    nn.Linear(7 * 7 * 64, 256), nn.ReLU(),
    nn.Linear(256, 10),
  )  # fmt: skip


def _convolution(channels: int, features: int, size: int, stride: int = 1):
  return nn.Sequential(
    nn.Conv2d(channels, features, size, stride, size // 2, bias=False),
    nn.BatchNorm2d(features),
  )


class _BasicBlock(nn.Module):
  def __init__(self, channels: int, features: int, stride: int):
    super().__init__()
    self.first = _convolution(channels, features, 3, stride)
    self.second = _convolution(features, features, 3)
    self.shortcut = nn.Identity()
    if stride > 1 or channels != features:
      self.shortcut = _convolution(channels, features, 1, stride)

  def forward(self, x):
    branch = self.second(functional.relu(self.first(x)))
    return functional.relu(branch + self.shortcut(x))


def _resnet18() -> nn.Module:
  blocks, channels = [], 64
  for features, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
    blocks += [
      _BasicBlock(channels, features, stride),
      _BasicBlock(features, features, 1),
    ]
    channels = features
  return nn.Sequential(
    _convolution(3, 64, 3), nn.ReLU(),
    *blocks,
    nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    nn.Linear(512, 10),
  )  # fmt: skip


class _Attention(nn.Module):
  def __init__(self, width: int, num_heads: int):
    super().__init__()
    self.num_heads = num_heads
    self.qkv = nn.Linear(width, 3 * width)
    self.out = nn.Linear(width, width)

  def forward(self, x):
    qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    x = functional.scaled_dot_product_attention(q, k, v)
    return self.out(x.transpose(1, 2).flatten(2))


class _EncoderBlock(nn.Module):
  def __init__(self, width: int, num_heads: int):
    super().__init__()
    self.attention = nn.Sequential(
      nn.LayerNorm(width, eps=1e-6), _Attention(width, num_heads)
    )
    self.mlp = nn.Sequential(
      nn.LayerNorm(width, eps=1e-6),
      nn.Linear(width, 4 * width), nn.GELU(),
      nn.Linear(4 * width, width),
    )  # fmt: skip

  def forward(self, x):
    x = x + self.attention(x)
    return x + self.mlp(x)


class _ViT(nn.Module):
  def __init__(self, width: int = 192, depth: int = 6, num_heads: int = 3):
    super().__init__()
    self.patches = nn.Conv2d(3, width, 4, 4)
    self.token = nn.Parameter(torch.zeros(1, 1, width))
    self.positions = nn.Parameter(0.02 * torch.randn(1, 1 + 8 * 8, width))
    self.blocks = nn.Sequential(
      *(_EncoderBlock(width, num_heads) for _ in range(depth))
    )
    self.norm = nn.LayerNorm(width, eps=1e-6)
    self.head = nn.Linear(width, 10)

  def forward(self, image):
    x = self.patches(image).flatten(2).transpose(1, 2)
    x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
    return self.head(self.norm(self.blocks(x))[:, 0])


class _LSTM(nn.Module):
  def __init__(self):
    super().__init__()
    self.lstm = nn.LSTM(28, 128, batch_first=True)
    self.lstm.bias_hh_l0.requires_grad_(False).zero_()  # One bias, as ours.
    self.head = nn.Linear(128, 10)

  def forward(self, image):
    return self.head(self.lstm(image.squeeze(1))[0][:, -1])


MODELS = {
  'mlp': _mlp,
  'autoencoder': _autoencoder,
  'cnn': _cnn,
  'resnet18': _resnet18,
  'vit': _ViT,
  'lstm': _LSTM,
}
