"""ResNet against transformers, and its running statistics against torch."""

from flax import nnx
from flax import traverse_util
import jax
import numpy as np
import optax
import pytest

from models import convert
from models import resnet
from tests.parity import weights

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
pytestmark = pytest.mark.parity

BASIC = {'layer_type': 'basic', 'hidden_sizes': [8, 16], 'depths': [2, 2]}
BOTTLENECK = {
  'layer_type': 'bottleneck', 'hidden_sizes': [32, 64], 'depths': [2, 1],
}  # fmt: skip


def _theirs(embedding_size=8, **kwargs):
  config = transformers.ResNetConfig(
    num_labels=10, embedding_size=embedding_size, **kwargs
  )
  return weights.randomise(transformers.ResNetForImageClassification(config))


def _ours(variant, size=32, **kwargs):
  return lambda rngs: resnet.ResNet(
    (size, size, 3), 10, variant=variant, rngs=rngs, **kwargs
  )


def _torch_image(image):
  return torch.from_numpy(image.transpose(0, 3, 1, 2))


@pytest.mark.parametrize(
  ('variant', 'kwargs'), [('18', BASIC), ('50', BOTTLENECK)]
)
@pytest.mark.parametrize('size', [32, 45])
def test_small_ones_agree(variant, kwargs, size):
  theirs = _theirs(**kwargs)
  ours, report = weights.moved(
    _ours(variant, size, depth=tuple(kwargs['depths']), width=8),
    theirs,
    'transformers',
  )
  assert not report.missing
  assert not report.unused
  image = weights.image(size)
  with torch.no_grad():
    expected = theirs(_torch_image(image)).logits
  weights.assert_close(weights.forward(ours, image)[0], expected)


@pytest.mark.slow
def test_resnet_50_agrees():
  theirs = _theirs(64)  # The rest of its config is ResNet-50's.
  ours, report = weights.moved(_ours('50', 224), theirs, 'transformers')
  assert len(report.mapped) == 161 + 106
  assert not report.missing
  assert not report.unused
  image = weights.image(224, batch=1)
  with torch.no_grad():
    expected = theirs(_torch_image(image)).logits
  weights.assert_close(weights.forward(ours, image)[0], expected)


@pytest.fixture(scope='module')
def step():
  """One training step of a small ResNet-50, both sides: see the tests."""
  theirs = _theirs(**BOTTLENECK)
  make = _ours('50', depth=(2, 1), width=8)
  before, _ = weights.moved(make, theirs, 'transformers')
  image = weights.image(32, batch=4)
  labels = np.array([3, 1, 4, 1])

  def loss(params, rest):
    model = nnx.merge(graphdef, params, rest, copy=True)
    logits = model(image, train=True)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return loss.mean(), nnx.state(model, nnx.BatchStat)

  graphdef, params, rest = nnx.split(before, nnx.Param, ...)
  old = nnx.to_pure_dict(rest)
  (_, new), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(
    params, rest
  )
  theirs.train()
  theirs(_torch_image(image), labels=torch.from_numpy(labels)).loss.backward()
  return {
    'module': theirs,
    'make': make,
    'grads': nnx.to_pure_dict(grads),
    'old': old,
    'new': nnx.to_pure_dict(new),
  }


def test_a_training_step_has_the_same_gradient(step):
  theirs = {
    name: parameter.grad
    for name, parameter in step['module'].named_parameters()
  }
  model = nnx.eval_shape(lambda: step['make'](nnx.Rngs(0)))
  expected, report = convert.converted(model, theirs, layout='transformers')
  found = traverse_util.flatten_dict(step['grads'])
  assert expected.keys() == found.keys()
  assert not report.unused
  for path, grad in expected.items():
    weights.assert_close(found[path], grad, path)


def test_running_statistics_differ_by_the_unbiased_variance_alone(step):
  """torch keeps n / (n - 1) of the batch's variance, flax the variance.

  With n = 4 images of 8 x 8 positions that is 0.4 %, with ImageNet's batch of
  256 and 7 x 7 positions 0.008 %.
  """
  theirs, _ = weights.moved(step['make'], step['module'], 'transformers')
  theirs = nnx.to_pure_dict(nnx.state(theirs, nnx.BatchStat))
  theirs, old, new = map(
    traverse_util.flatten_dict, (theirs, step['old'], step['new'])
  )
  assert theirs.keys() == new.keys()
  # Positions of the input of 32 after the stem, its pool and the second stage.
  sides = {'embed': 16, 0: 8, 1: 4}
  for path, found in new.items():
    if path[-1] == 'mean':
      weights.assert_close(found, theirs[path], path)
      continue
    side = sides[path[0] if path[0] == 'embed' else path[1]]
    if path[:5] == ('blocks', 1, 0, 'norms', 0):
      side = 8  # Before the stride.
    n = 4 * side * side
    unbiased = 0.9 * old[path] + (found - 0.9 * old[path]) * n / (n - 1)
    weights.assert_close(unbiased, theirs[path], path, 1e-5)
    with pytest.raises(AssertionError):
      weights.assert_close(found, theirs[path], path, 1e-5)


def test_tensors_of_bfloat16_and_with_gradients_are_taken():
  theirs = _theirs(**BASIC)
  model = nnx.eval_shape(
    lambda: _ours('18', depth=(2, 2), width=8)(nnx.Rngs(0))
  )
  tensors = dict(theirs.named_parameters()) | dict(theirs.named_buffers())
  assert any(tensor.requires_grad for tensor in tensors.values())
  for dtype in (torch.float32, torch.bfloat16, torch.float64):
    tensors = {
      name: tensor.to(dtype) if tensor.is_floating_point() else tensor
      for name, tensor in tensors.items()
    }
    values, report = convert.converted(model, tensors, layout='transformers')
    assert not report.missing
    np.testing.assert_array_equal(
      values['head', 'kernel'],
      tensors['classifier.1.weight'].detach().float().numpy().T,
    )
