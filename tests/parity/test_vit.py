"""ViT against transformers, and against torch's own encoder layers."""

import numpy as np
import pytest

from models import convert
from models import vit
from tests.parity import weights

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
pytestmark = pytest.mark.parity


def _agrees(size, patch, width, depth, heads):
  config = transformers.ViTConfig(
    image_size=size, patch_size=patch, hidden_size=width, num_labels=10,
    num_hidden_layers=depth, num_attention_heads=heads,
    intermediate_size=4 * width,
  )  # fmt: skip
  theirs = weights.randomise(transformers.ViTForImageClassification(config))

  def make(rngs):
    return vit.ViT(
      (size, size, 3), 10, patch_size=patch, width=width, depth=depth,
      num_heads=heads, rngs=rngs,
    )  # fmt: skip

  ours, report = weights.moved(make, theirs, 'transformers')
  assert not report.missing
  assert not report.unused
  image = weights.image(size, batch=1)
  with torch.no_grad():
    expected = theirs(torch.from_numpy(image.transpose(0, 3, 1, 2))).logits
  weights.assert_close(weights.forward(ours, image)[0], expected)
  return theirs, ours, image


def test_a_small_one_agrees_as_it_is_and_as_it_is_saved(tmp_path):
  theirs, ours, image = _agrees(32, 8, 24, 3, 4)
  # The names in the file are not those in memory.
  theirs.save_pretrained(tmp_path)
  file = tmp_path / 'model.safetensors'
  values, report = convert.converted(ours, file)
  assert (report.layout, report.missing, report.unused) == (
    'transformers', (), (),
  )  # fmt: skip
  for path, array in convert.converted(
    ours, theirs.state_dict(), layout='transformers'
  )[0].items():
    np.testing.assert_array_equal(values[path], array)


@pytest.mark.slow
def test_vit_b_16_agrees():
  """To 3e-5: its norms have an epsilon of 1e-12; with 1e-6, as ours, 1e-6."""
  _agrees(224, 16, 768, 12, 12)


class _TorchViT(torch.nn.Module):
  """torchvision's names and shapes; its attention is torch.nn's."""

  def __init__(self, size, patch, width, depth, heads):
    super().__init__()
    tokens = (size // patch) ** 2 + 1
    self.class_token = torch.nn.Parameter(torch.zeros(1, 1, width))
    self.conv_proj = torch.nn.Conv2d(3, width, patch, stride=patch)
    self.encoder = torch.nn.Module()
    self.encoder.pos_embedding = torch.nn.Parameter(
      torch.zeros(1, tokens, width)
    )
    self.encoder.layers = torch.nn.Module()
    for i in range(depth):
      block = torch.nn.Module()
      block.ln_1 = torch.nn.LayerNorm(width, eps=1e-6)
      block.self_attention = torch.nn.MultiheadAttention(
        width, heads, batch_first=True
      )
      block.ln_2 = torch.nn.LayerNorm(width, eps=1e-6)
      block.mlp = torch.nn.Sequential(
        torch.nn.Linear(width, 4 * width),
        torch.nn.GELU(),
        torch.nn.Dropout(0.0),
        torch.nn.Linear(4 * width, width),
        torch.nn.Dropout(0.0),
      )
      self.encoder.layers.add_module(f'encoder_layer_{i}', block)
    self.encoder.ln = torch.nn.LayerNorm(width, eps=1e-6)
    self.heads = torch.nn.Module()
    self.heads.head = torch.nn.Linear(width, 10)

  def forward(self, x):
    x = self.conv_proj(x).flatten(2).transpose(1, 2)
    x = torch.cat([self.class_token.expand(len(x), -1, -1), x], 1)
    x = x + self.encoder.pos_embedding
    for block in self.encoder.layers.children():
      y = block.ln_1(x)
      x = x + block.self_attention(y, y, y, need_weights=False)[0]
      x = x + block.mlp(block.ln_2(x))
    return self.heads.head(self.encoder.ln(x)[:, 0])


def test_torch_attention_agrees_in_torchvision_names():
  theirs = weights.randomise(_TorchViT(32, 8, 24, 3, 4))

  def make(rngs):
    return vit.ViT(
      (32, 32, 3), 10, patch_size=8, width=24, depth=3, num_heads=4, rngs=rngs
    )

  ours, report = weights.moved(make, theirs, 'torchvision')
  assert not report.missing
  assert not report.unused
  image = weights.image(32)
  with torch.no_grad():
    expected = theirs(torch.from_numpy(image.transpose(0, 3, 1, 2)))
  weights.assert_close(weights.forward(ours, image)[0], expected)
