"""Who names what how: the layouts, and the models whose weights they have."""

from collections.abc import Iterable
import re

from flax import nnx

from models import convnext
from models import densenet
from models import resnet
from models import rnn
from models import vit
from models.convert import recurrent
from models.convert import rules as rules_lib
from models.convert import tables
from models.convert import transformer

# Of the names that a layout's files have, one that no other layout's have.
# timm names ResNet and DenseNet as torchvision does.
LAYOUTS = {
  'transformers': r'(\w+\.)?(embeddings|embedder)\.',
  'google': r'embedding/kernel|Transformer/',
  'torch': r'(.*\.)?(weight|bias)_[ih]h_l0',
  'timm': r'cls_token|pos_embed|patch_embed\.|stem\.0\.',
  'torchvision': r'class_token|conv_proj\.|conv1\.|features\.(0\.0|conv0)\.',
}
NPZ = (
  "of .npz files only Google's original ViT is read, as google-research/"
  'vision_transformer has it'
)

# Model -> layout -> (model, our paths) -> rules.
FAMILIES = {
  resnet.ResNet: {
    'torchvision': rules_lib.pytorch(tables.RESNET_TORCHVISION),
    'timm': rules_lib.pytorch(tables.RESNET_TORCHVISION),
    'transformers': rules_lib.pytorch(tables.RESNET_TRANSFORMERS),
  },
  densenet.DenseNet: {
    'torchvision': rules_lib.pytorch(tables.DENSENET_TORCHVISION),
    'timm': rules_lib.pytorch(tables.DENSENET_TORCHVISION),
  },
  convnext.ConvNeXt: {
    'torchvision': rules_lib.pytorch(tables.CONVNEXT_TORCHVISION),
    'timm': rules_lib.pytorch(tables.CONVNEXT_TIMM),
    'transformers': rules_lib.pytorch(tables.CONVNEXT_TRANSFORMERS),
  },
  vit.ViT: {
    'torchvision': transformer.pytorch(
      tables.VIT_TORCHVISION, 'encoder.pos_embedding'
    ),
    'timm': transformer.pytorch(tables.VIT_TIMM, 'pos_embed'),
    'transformers': transformer.pytorch(
      tables.VIT_TRANSFORMERS,
      'embeddings.position_embeddings',
      'encoder.layer.{}.attention.attention.{}',
    ),
    'google': transformer.google,
  },
  **dict.fromkeys(
    (rnn.RNN, rnn.GRU, rnn.LSTM), {'torch': recurrent.torch_rules}
  ),
}

# Older, newer and longer spellings of the same names, as (pattern, spelling).
_SPELLINGS = {
  'torchvision': (
    (r'(denselayer\d+\.(?:norm|conv))\.', r'\1'),
    (r'\.mlp\.linear_1\.', '.mlp.0.'),
    (r'\.mlp\.linear_2\.', '.mlp.3.'),
  ),
  'torch': ((r'^.*\.(?=(weight|bias)_[ih]h_l)', ''),),
  'transformers': (
    (r'^(vit|resnet|convnext)\.', ''),
    (r'^layers\.', 'encoder.layer.'),
    (r'\.attention\.q_proj\.', '.attention.attention.query.'),
    (r'\.attention\.k_proj\.', '.attention.attention.key.'),
    (r'\.attention\.v_proj\.', '.attention.attention.value.'),
    (r'\.attention\.o_proj\.', '.attention.output.dense.'),
    (r'\.mlp\.fc1\.', '.intermediate.dense.'),
    (r'\.mlp\.fc2\.', '.output.dense.'),
  ),
}

# What a file may have beside the network: what another head reads or another
# task was trained with, and the class token, which pool='mean' has not. Around
# torch.nn's layers there may be anything.
_HARMLESS = (
  r'pooler\.|pre_logits\b|decoder|'
  r'(embeddings\.)?(mask_token|cls_token|class_token|cls)$'
)
_RECURRENT = r'(.*\.)?(weight|bias)_\w+_l\d'


def detect(names: Iterable[str]) -> str:
  """Whose names these are: a key of LAYOUTS.

  Raises:
    ValueError: nobody's.
  """
  names = list(names)
  for layout, pattern in LAYOUTS.items():
    if any(re.match(pattern, name) for name in names):
      return layout
  raise ValueError(
    f'the names {listed(names, 3)} are of no known layout; there are '
    f'{", ".join(LAYOUTS)}; {NPZ}'
  )


def rules(
  model: nnx.Module, layout: str, paths: Iterable[str]
) -> Iterable[rules_lib.Rule]:
  """What each of the model's `paths` is made of.

  Raises:
    ValueError: there are no such weights.
  """
  for kind, layouts in FAMILIES.items():
    if isinstance(model, kind):
      if layout not in layouts:
        raise ValueError(
          f'layout {layout!r} has no {type(model).__name__}; there are '
          f'{", ".join(layouts)}'
        )
      return layouts[layout](model, paths)
  raise ValueError(
    f'no weights from elsewhere are known for {type(model).__name__}; they are '
    f'for {", ".join(kind.__name__ for kind in FAMILIES)}'
  )


def spelling(name: str, layout: str) -> str:
  """The name as the rules have it."""
  for pattern, replacement in _SPELLINGS.get(layout, ()):
    name = re.sub(pattern, replacement, name)
  return name


def is_harmless(name: str, layout: str) -> bool:
  """Whether a network is the same without this array."""
  if layout == 'torch':
    return re.match(_RECURRENT, name) is None
  return re.match(_HARMLESS, name) is not None


def listed(words: Iterable[str], most: int = 8) -> str:
  """The first of them, on one line whatever a file calls its arrays."""
  words = [word if word.isprintable() else repr(word) for word in words]
  more = f', ... ({len(words) - most} more)' if len(words) > most else ''
  return (', '.join(words[:most]) or 'none') + more
