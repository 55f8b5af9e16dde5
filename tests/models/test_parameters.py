"""How many parameters each model has, to the digit.

From the papers where they say so to the digit, else from implementations that
are trusted (torchvision 0.29, pytorchcv, timm), else written out by hand.
"""

from flax import nnx
import pytest

import models
from models import cells
from models import layers

MNIST = {'image_shape': (28, 28, 1)}
CIFAR = {'image_shape': (32, 32, 3), 'num_classes': 10}
IMAGENET = {'image_shape': (224, 224, 3), 'num_classes': 1000}


def vit(patch, width, depth, mlp_width):
  """Of a ViT on ImageNet: a block has four D x D, an MLP and two norms."""
  embed = (patch * patch * 3 + 1) * width + ((224 // patch) ** 2 + 2) * width
  block = 4 * (width + 1) * width + 4 * width
  block += (width + 1) * mlp_width + (mlp_width + 1) * width
  return embed + depth * block + 2 * width + (width + 1) * 1000


TABLE = [
  ('linear', MNIST, (784 + 1) * 10),
  # W1: one neuron on 784 inputs, and 784-256-128-10. W2: 3-4-2.
  ('linear', MNIST | {'num_classes': 1}, 785),
  ('mlp', MNIST | {'widths': (256, 128)}, 235_146),
  ('mlp', {'image_shape': (3,), 'num_classes': 2, 'widths': (4,)}, 20 + 6),
  # 3x3 convolutions with scale and shift, and the head on 7x7x64.
  (
    'cnn',
    MNIST | {'widths': (32, 64)},
    9 * 32 + 2 * 32 + 9 * 32 * 64 + 2 * 64 + (7 * 7 * 64 + 1) * 10,
  ),
  # W9: biases in place of norms, and a hidden layer; the course's CNN.
  (
    'cnn',
    CIFAR | {'widths': (32, 64, 64), 'head_widths': (64,), 'norm': None},
    (9 * 3 + 1) * 32
    + (9 * 32 + 1) * 64
    + (9 * 64 + 1) * 64
    + (4 * 4 * 64 + 1) * 64
    + (64 + 1) * 10,
  ),
  ('lenet', MNIST, 61_706),
  # Two more channels in: 6 kernels of 5x5 for each.
  ('lenet', CIFAR, 61_706 + 2 * 6 * 25),
  # W14: one tower, torchvision.
  ('alexnet', IMAGENET, 61_100_840),
  # torchvision; 200 is timm's.
  ('resnet', IMAGENET | {'variant': '18'}, 11_689_512),
  ('resnet', IMAGENET | {'variant': '34'}, 21_797_672),
  ('resnet', IMAGENET | {'variant': '50'}, 25_557_032),
  ('resnet', IMAGENET | {'variant': '101'}, 44_549_160),
  ('resnet', IMAGENET | {'variant': '152'}, 60_192_808),
  ('resnet', IMAGENET | {'variant': '200'}, 64_673_832),
  ('resnet', IMAGENET | {'variant': 'wide50_2'}, 68_883_240),
  ('resnet', IMAGENET | {'variant': 'wide101_2'}, 126_886_696),
  ('resnet', CIFAR | {'variant': '18', 'stem': '3x3'}, 11_173_962),
  ('resnet', CIFAR | {'variant': 'cifar20'}, 269_722),
  ('resnet', CIFAR | {'variant': 'cifar32'}, 464_154),
  ('resnet', CIFAR | {'variant': 'cifar44'}, 658_586),
  ('resnet', CIFAR | {'variant': 'cifar56'}, 853_018),
  ('resnet', CIFAR | {'variant': 'cifar110'}, 1_727_962),
  # pytorchcv: PreResNet-164 (BN) and WRN-28-10.
  ('resnet', CIFAR | {'variant': 'cifar164'}, 1_703_258),
  ('resnet', CIFAR | {'variant': 'wrn28_10'}, 36_479_194),
  # torchvision; 101_32x4d is timm's.
  ('resnext', IMAGENET | {'variant': '50_32x4d'}, 25_028_904),
  ('resnext', IMAGENET | {'variant': '101_32x4d'}, 44_177_704),
  ('resnext', IMAGENET | {'variant': '101_32x8d'}, 88_791_336),
  ('resnext', IMAGENET | {'variant': '101_64x4d'}, 83_455_272),
  # torchvision.
  ('densenet', IMAGENET | {'variant': '121'}, 7_978_856),
  ('densenet', IMAGENET | {'variant': '169'}, 14_149_480),
  ('densenet', IMAGENET | {'variant': '201'}, 20_013_928),
  ('convnext', IMAGENET | {'variant': 'T'}, 28_589_128),
  ('convnext', IMAGENET | {'variant': 'S'}, 50_223_688),
  ('convnext', IMAGENET | {'variant': 'B'}, 88_591_464),
  ('convnext', IMAGENET | {'variant': 'L'}, 197_767_336),
  # torchvision; timm where it has none; H/14 of 224 pixels is timm's.
  ('vit', IMAGENET | {'variant': 'Ti/16'}, 5_717_416),
  ('vit', IMAGENET | {'variant': 'S/16'}, 22_050_664),
  ('vit', IMAGENET | {'variant': 'S/32'}, 22_878_952),
  ('vit', IMAGENET | {'variant': 'B/16'}, 86_567_656),
  ('vit', IMAGENET | {'variant': 'B/32'}, 88_224_232),
  ('vit', IMAGENET | {'variant': 'L/16'}, 304_326_632),
  ('vit', IMAGENET | {'variant': 'L/32'}, 306_535_400),
  ('vit', IMAGENET | {'variant': 'H/14'}, 632_045_800),
  ('vit', IMAGENET | {'variant': 'g/14'}, vit(14, 1408, 40, 6144)),
  ('vit', IMAGENET | {'variant': 'G/14'}, vit(14, 1664, 48, 8192)),
  # No class token, and no position of it.
  (
    'vit',
    IMAGENET | {'variant': 'S/16', 'pool': 'mean'},
    22_050_664 - 2 * 384,
  ),
  # Dense layers there and back, as (inputs + 1) * outputs.
  (
    'autoencoder',
    MNIST | {'variant': 'linear', 'code_size': 32},
    785 * 32 + 33 * 784,
  ),
  (
    'autoencoder',
    MNIST | {'variant': 'dense', 'widths': (256,), 'code_size': 32},
    785 * 256 + 257 * 32 + 33 * 256 + 257 * 784,
  ),
  # 784-1000-500-250-30 of Hinton & Salakhutdinov (2006), and back.
  (
    'autoencoder',
    MNIST | {'variant': 'dense', 'code_size': 30},
    (785 * 1000 + 1001 * 500 + 501 * 250 + 251 * 30)
    + (31 * 250 + 251 * 500 + 501 * 1000 + 1001 * 784),
  ),
  # A mean and a log variance for each of 20 codes.
  (
    'autoencoder',
    MNIST | {'variant': 'variational', 'code_size': 20},
    785 * 500 + 501 * 40 + 21 * 500 + 501 * 784,
  ),
  # 28x28x1, 14x14x32, 7x7x64 by 3x3 convolutions; a dense code.
  (
    'autoencoder',
    MNIST | {'variant': 'conv', 'code_size': 32},
    (10 * 32 + (9 * 32 + 1) * 64 + (7 * 7 * 64 + 1) * 32)
    + (33 * 7 * 7 * 64 + (9 * 64 + 1) * 32 + (9 * 32 + 1) * 1),
  ),
  # One bias a gate: of 1 gate, of 3 and of 4, and the head.
  (
    'rnn',
    {'num_features': 28, 'num_classes': 10, 'widths': (128,)},
    (28 + 128 + 1) * 128 + 129 * 10,
  ),
  (
    'gru',
    {'num_features': 28, 'num_classes': 10, 'widths': (128,)},
    3 * (28 + 128 + 1) * 128 + 129 * 10,
  ),
  # PyTorch's, whose candidate alone keeps two biases apart.
  (
    'gru',
    {
      'num_features': 28,
      'num_classes': 10,
      'widths': (128,),
      'reset_after': True,
    },
    3 * (28 + 128 + 1) * 128 + 128 + 129 * 10,
  ),
  (
    'lstm',
    {'num_features': 128, 'num_classes': 10, 'widths': (256,)},
    394_240 + 257 * 10,
  ),
  # Two layers both ways: the second reads 2 * 64.
  (
    'lstm',
    {
      'num_features': 28,
      'num_classes': 5,
      'widths': (64, 64),
      'bidirectional': True,
    },
    2 * 4 * (28 + 64 + 1) * 64 + 2 * 4 * (128 + 64 + 1) * 64 + 129 * 5,
  ),
  # A language model of 65 characters, each a row of 128 numbers.
  (
    'lstm',
    {
      'vocab_size': 65,
      'num_classes': 65,
      'widths': (128, 128),
      'head': 'every',
    },
    65 * 128 + 2 * 4 * (128 + 128 + 1) * 128 + 129 * 65,
  ),
  # Embeddings of both sides, an LSTM each, the score, the combination, the
  # head.
  (
    'seq2seq',
    {'vocab_size': 11, 'num_classes': 12, 'widths': (64,)},
    (11 + 12) * 64
    + 2 * 4 * (64 + 64 + 1) * 64
    + 64 * 64
    + 2 * 64 * 64
    + 65 * 12,
  ),
]


def count(name, **kwargs):
  # With nnx.Rngs the largest take ten times as long to trace.
  model = nnx.eval_shape(
    lambda: models.create(name, **kwargs, rngs=layers.Keys(nnx.Rngs(0)))
  )
  return models.count_parameters(model)


def test_the_table_covers_every_model():
  assert {name for name, _, _ in TABLE} == set(models.MODELS)


@pytest.mark.parametrize(
  ('name', 'kwargs', 'expected'),
  TABLE,
  ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_model_has_as_many_parameters_as_published(name, kwargs, expected):
  assert count(name, **kwargs) == expected


def test_the_formula_of_a_vit_gives_the_published_figures():
  assert vit(16, 768, 12, 3072) == 86_567_656
  assert vit(14, 1280, 32, 5120) == 632_045_800


def test_an_lstm_from_128_to_256_has_one_bias():
  cell = nnx.eval_shape(lambda: cells.LSTMCell(128, 256, rngs=nnx.Rngs(0)))
  assert models.count_parameters(cell) == 394_240


@pytest.mark.parametrize(
  ('variant', 'millions'), [('wrn16_8', 11.0), ('wrn40_4', 8.9)]
)
def test_a_wide_network_is_as_large_as_its_paper_says(variant, millions):
  # Zagoruyko & Komodakis (2016), tables 4 and 5.
  found = count('resnet', variant=variant, **CIFAR)
  assert round(found / 1e6, 1) == millions
