"""The models: flax.nnx modules and the table of their names.

model = models.create('mlp', widths=(256, 128), rngs=nnx.Rngs(0))
logits = model(image)                                   # evaluation
logits = model(image, train=True, rngs=nnx.Rngs(dropout=key))
"""

from flax import nnx
import jax

from models import convert  # noqa: F401 - models.convert, with the models
from models.alexnet import AlexNet
from models.autoencoder import Autoencoder
from models.cnn import CNN
from models.convnext import ConvNeXt
from models.densenet import DenseNet
from models.lenet import LeNet
from models.linear import Linear
from models.mlp import MLP
from models.resnet import ResNet
from models.resnet import ResNeXt
from models.rnn import GRU
from models.rnn import LSTM
from models.rnn import RNN
from models.seq2seq import Seq2Seq
from models.vit import ViT

# One line a model: the name in a config, and its class.
MODELS = {
  'linear': Linear,
  'mlp': MLP,
  'cnn': CNN,
  'lenet': LeNet,
  'alexnet': AlexNet,
  'resnet': ResNet,
  'resnext': ResNeXt,
  'densenet': DenseNet,
  'convnext': ConvNeXt,
  'vit': ViT,
  'autoencoder': Autoencoder,
  'rnn': RNN,
  'gru': GRU,
  'lstm': LSTM,
  'seq2seq': Seq2Seq,
}


def create(name: str, *, rngs: nnx.Rngs, **kwargs) -> nnx.Module:
  """A new model: MODELS[name](**kwargs, rngs=rngs).

  Raises:
    ValueError: no model has that name, or the sizes do not fit together.
    TypeError: the model takes no such argument.
  """
  if name not in MODELS:
    raise ValueError(
      f'model {name!r} is unknown; there are {", ".join(MODELS)}'
    )
  return MODELS[name](**kwargs, rngs=rngs)


def count_parameters(model: nnx.Module) -> int:
  """Trainable numbers in `model`; running statistics do not count."""
  return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
