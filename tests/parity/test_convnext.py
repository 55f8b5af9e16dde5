"""ConvNeXt against transformers."""

import pytest

from models import convnext
from tests.parity import weights

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
pytestmark = pytest.mark.parity


@pytest.mark.parametrize('size', [64, 84], ids=['even', 'odd'])
def test_a_small_one_agrees(size):
  """Of 84 pixels, whose 21 patches are halved with a row left out."""
  _agrees(size, depth=(1, 2, 2, 1), width=8)


@pytest.mark.slow
def test_convnext_t_agrees():
  _agrees(64, depth=(3, 3, 9, 3), width=96)


def _agrees(size, depth, width):
  config = transformers.ConvNextConfig(
    depths=list(depth), hidden_sizes=[width * 2**i for i in range(4)],
    num_labels=10,
  )  # fmt: skip
  theirs = weights.randomise(
    transformers.ConvNextForImageClassification(config)
  )

  def make(rngs):
    return convnext.ConvNeXt(
      (size, size, 3), 10, depth=depth, width=width, rngs=rngs
    )

  ours, report = weights.moved(make, theirs, 'transformers')
  assert not report.missing
  assert not report.unused
  image = weights.image(size)
  with torch.no_grad():
    expected = theirs(torch.from_numpy(image.transpose(0, 3, 1, 2))).logits
  weights.assert_close(weights.forward(ours, image)[0], expected)
