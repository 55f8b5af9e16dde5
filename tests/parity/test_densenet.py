"""DenseNet against one in torch with torchvision's names and shapes."""

import pytest

from models import densenet
from tests.parity import weights

torch = pytest.importorskip('torch')
nn = torch.nn
pytestmark = pytest.mark.parity


class _Layer(nn.Module):
  def __init__(self, features, growth):
    super().__init__()
    self.norm1 = nn.BatchNorm2d(features)
    self.conv1 = nn.Conv2d(features, 4 * growth, 1, bias=False)
    self.norm2 = nn.BatchNorm2d(4 * growth)
    self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

  def forward(self, x):
    new = self.conv1(self.norm1(x).relu())
    new = self.conv2(self.norm2(new).relu())
    return torch.cat([x, new], 1)


class _Transition(nn.Module):
  def __init__(self, features):
    super().__init__()
    self.norm = nn.BatchNorm2d(features)
    self.conv = nn.Conv2d(features, features // 2, 1, bias=False)

  def forward(self, x):
    return nn.functional.avg_pool2d(self.conv(self.norm(x).relu()), 2)


class _DenseNet(nn.Module):
  def __init__(self, depth, growth, num_classes):
    super().__init__()
    features = 2 * growth
    self.features = nn.Sequential()
    self.features.conv0 = nn.Conv2d(
      3, features, 7, stride=2, padding=3, bias=False
    )
    self.features.norm0 = nn.BatchNorm2d(features)
    self.features.relu0 = nn.ReLU()
    self.features.pool0 = nn.MaxPool2d(3, stride=2, padding=1)
    for i, size in enumerate(depth, 1):
      if i > 1:
        transition = _Transition(features)
        self.features.add_module(f'transition{i - 1}', transition)
        features //= 2
      block = nn.Sequential()
      for j in range(1, size + 1):
        block.add_module(f'denselayer{j}', _Layer(features, growth))
        features += growth
      self.features.add_module(f'denseblock{i}', block)
    self.features.norm5 = nn.BatchNorm2d(features)
    self.classifier = nn.Linear(features, num_classes)

  def forward(self, x):
    return self.classifier(self.features(x).relu().mean((2, 3)))


@pytest.mark.parametrize('size', [64, 71])
def test_a_small_one_agrees(size):
  _agrees(size, depth=(2, 3, 2, 1), growth=8)


@pytest.mark.slow
def test_densenet_121_agrees():
  names = _agrees(64, depth=(6, 12, 24, 16), growth=32)
  assert len(names) == 727  # As many as torchvision's densenet121 has.


def _agrees(size, depth, growth):
  theirs = weights.randomise(_DenseNet(depth, growth, 10))

  def make(rngs):
    return densenet.DenseNet(
      (size, size, 3), 10, depth=depth, growth_rate=growth, rngs=rngs
    )

  ours, report = weights.moved(make, theirs, 'torchvision')
  assert not report.missing
  assert not report.unused
  image = weights.image(size)
  with torch.no_grad():
    expected = theirs(torch.from_numpy(image.transpose(0, 3, 1, 2)))
  weights.assert_close(weights.forward(ours, image)[0], expected)
  return theirs.state_dict().keys()
