"""Name -> shape of every array in the files that others publish, by rule.

As torchvision, timm 1.0 and transformers 5 name them in their files, and
google-research/vision_transformer. Arguments are sizes; the defaults are
ResNet-50's, DenseNet-121's, ConvNeXt-T's and ViT-B/16's.
"""

import numpy as np

Shapes = dict[str, tuple[int, ...]]


def arrays(shapes: Shapes) -> dict[str, np.ndarray]:
  """Random numbers of these shapes, all of them different."""
  rng = np.random.default_rng(0)
  return {
    name: rng.uniform(0.5, 1.5, shape).astype(np.float32)
    for name, shape in shapes.items()
  }


def _conv(name, out, channels, size, bias=False) -> Shapes:
  weight = {f'{name}.weight': (out, channels, size, size)}
  return weight | ({f'{name}.bias': (out,)} if bias else {})


def _dense(name, out, features) -> Shapes:
  return {f'{name}.weight': (out, features), f'{name}.bias': (out,)}


def _norm(name, width) -> Shapes:
  return {f'{name}.weight': (width,), f'{name}.bias': (width,)}


def _batch_norm(name, width) -> Shapes:
  return _norm(name, width) | {
    f'{name}.running_mean': (width,),
    f'{name}.running_var': (width,),
    f'{name}.num_batches_tracked': (),
  }


def resnet(
  depth=(3, 4, 6, 3), width=64, kernels=(1, 3, 1), *, classes=1000, channels=3,
  inner=1, groups=1, stem=7, layout='torchvision',
) -> Shapes:  # fmt: skip
  """torchvision's and timm's; or transformers'."""
  hf = layout == 'transformers'
  before = 'resnet.embedder.embedder.' if hf else ''
  shapes = _conv(
    before + ('convolution' if hf else 'conv1'), width, channels, stem
  )
  shapes |= _batch_norm(before + ('normalization' if hf else 'bn1'), width)
  features = width
  for i, blocks in enumerate(depth):
    for j in range(blocks):
      inside = width * 2**i
      out = inside * (4 if len(kernels) == 3 else 1)
      block = (
        f'resnet.encoder.stages.{i}.layers.{j}.' if hf else f'layer{i + 1}.{j}.'
      )
      size_in = features
      for k, kernel in enumerate(kernels):
        last = k == len(kernels) - 1
        size_out = out if last else inside * inner
        per_group = size_in // (groups if kernel == 3 else 1)
        conv = f'layer.{k}.convolution' if hf else f'conv{k + 1}'
        norm = f'layer.{k}.normalization' if hf else f'bn{k + 1}'
        shapes |= _conv(block + conv, size_out, per_group, kernel)
        shapes |= _batch_norm(block + norm, size_out)
        size_in = size_out
      if j == 0 and (i > 0 or features != out):
        conv = 'shortcut.convolution' if hf else 'downsample.0'
        norm = 'shortcut.normalization' if hf else 'downsample.1'
        shapes |= _conv(block + conv, out, features, 1)
        shapes |= _batch_norm(block + norm, out)
      features = out
  return shapes | _dense('classifier.1' if hf else 'fc', classes, features)


def densenet(depth=(6, 12, 24, 16), growth=32, *, classes=1000) -> Shapes:
  """torchvision's and timm's."""
  features = 2 * growth
  shapes = _conv('features.conv0', features, 3, 7)
  shapes |= _batch_norm('features.norm0', features)
  for i, size in enumerate(depth, 1):
    for j in range(1, size + 1):
      layer = f'features.denseblock{i}.denselayer{j}.'
      shapes |= _batch_norm(f'{layer}norm1', features)
      shapes |= _conv(f'{layer}conv1', 4 * growth, features, 1)
      shapes |= _batch_norm(f'{layer}norm2', 4 * growth)
      shapes |= _conv(f'{layer}conv2', growth, 4 * growth, 3)
      features += growth
    if i < len(depth):
      shapes |= _batch_norm(f'features.transition{i}.norm', features)
      shapes |= _conv(
        f'features.transition{i}.conv', features // 2, features, 1
      )
      features //= 2
  shapes |= _batch_norm('features.norm5', features)
  return shapes | _dense('classifier', classes, features)


# Where each layout keeps the parts of ConvNeXt; s counts stages, b blocks.
_CONVNEXT = {
  'torchvision': {
    'stem': ('features.0.0', 'features.0.1'),
    'down': lambda s: (f'features.{2 * s}.0', f'features.{2 * s}.1'),
    'block': lambda s, b: f'features.{2 * s + 1}.{b}.',
    'parts': ('block.0', 'block.2', 'block.3', 'block.5', 'layer_scale'),
    'end': ('classifier.0', 'classifier.2'),
  },
  'timm': {
    'stem': ('stem.0', 'stem.1'),
    'down': lambda s: (f'stages.{s}.downsample.0', f'stages.{s}.downsample.1'),
    'block': lambda s, b: f'stages.{s}.blocks.{b}.',
    'parts': ('conv_dw', 'norm', 'mlp.fc1', 'mlp.fc2', 'gamma'),
    'end': ('head.norm', 'head.fc'),
  },
  'transformers': {
    'stem': (
      'convnext.embeddings.patch_embeddings', 'convnext.embeddings.layernorm',
    ),
    'down': lambda s: (
      f'convnext.encoder.stages.{s}.downsampling_layer.0',
      f'convnext.encoder.stages.{s}.downsampling_layer.1',
    ),
    'block': lambda s, b: f'convnext.encoder.stages.{s}.layers.{b}.',
    'parts': (
      'dwconv', 'layernorm', 'pwconv1', 'pwconv2', 'layer_scale_parameter',
    ),
    'end': ('convnext.layernorm', 'classifier'),
  },
}  # fmt: skip


def convnext(
  depth=(3, 3, 9, 3), width=96, *, classes=1000, layout='torchvision'
) -> Shapes:
  """torchvision's, timm's or transformers'."""
  names = _CONVNEXT[layout]
  conv, norm = names['stem']
  shapes = _conv(conv, width, 3, 4, bias=True) | _norm(norm, width)
  for stage, blocks in enumerate(depth):
    if stage > 0:
      norm, conv = names['down'](stage)
      shapes |= _norm(norm, width) | _conv(conv, 2 * width, width, 2, bias=True)
      width *= 2
    for b in range(blocks):
      block = names['block'](stage, b)
      conv, norm, expand, project, scale = (block + p for p in names['parts'])
      shapes |= _conv(conv, width, 1, 7, bias=True) | _norm(norm, width)
      shapes |= _dense(expand, 4 * width, width)
      shapes |= _dense(project, width, 4 * width)
      shapes[scale] = (width, 1, 1) if layout == 'torchvision' else (width,)
  norm, head = names['end']
  return shapes | _norm(norm, width) | _dense(head, classes, width)


_VIT = {
  'torchvision': {
    'cls': 'class_token',
    'positions': 'encoder.pos_embedding',
    'embed': 'conv_proj',
    'block': 'encoder.layers.encoder_layer_{}.',
    'norms': ('ln_1', 'ln_2'),
    'mlp': ('mlp.0', 'mlp.3'),
    'end': ('encoder.ln', 'heads.head'),
  },
  'timm': {
    'cls': 'cls_token',
    'positions': 'pos_embed',
    'embed': 'patch_embed.proj',
    'block': 'blocks.{}.',
    'norms': ('norm1', 'norm2'),
    'mlp': ('mlp.fc1', 'mlp.fc2'),
    'end': ('norm', 'head'),
  },
  # The names in files; in memory, later versions have others.
  'transformers': {
    'cls': 'vit.embeddings.cls_token',
    'positions': 'vit.embeddings.position_embeddings',
    'embed': 'vit.embeddings.patch_embeddings.projection',
    'block': 'vit.encoder.layer.{}.',
    'norms': ('layernorm_before', 'layernorm_after'),
    'mlp': ('intermediate.dense', 'output.dense'),
    'end': ('vit.layernorm', 'classifier'),
  },
}


def vit(
  depth=12, width=768, patch=16, tokens=197, *, classes=1000,
  layout='torchvision',
) -> Shapes:  # fmt: skip
  """torchvision's, timm's or transformers', with a class token."""
  names = _VIT[layout]
  shapes = {names['cls']: (1, 1, width), names['positions']: (1, tokens, width)}
  shapes |= _conv(names['embed'], width, 3, patch, bias=True)
  for i in range(depth):
    block = names['block'].format(i)
    for norm in names['norms']:
      shapes |= _norm(block + norm, width)
    if layout == 'torchvision':
      shapes[f'{block}self_attention.in_proj_weight'] = (3 * width, width)
      shapes[f'{block}self_attention.in_proj_bias'] = (3 * width,)
      shapes |= _dense(f'{block}self_attention.out_proj', width, width)
    elif layout == 'timm':
      shapes |= _dense(f'{block}attn.qkv', 3 * width, width)
      shapes |= _dense(f'{block}attn.proj', width, width)
    else:
      for part in ('attention.query', 'attention.key', 'attention.value'):
        shapes |= _dense(f'{block}attention.{part}', width, width)
      shapes |= _dense(f'{block}attention.output.dense', width, width)
    first, second = names['mlp']
    shapes |= _dense(block + first, 4 * width, width)
    shapes |= _dense(block + second, width, 4 * width)
  norm, head = names['end']
  return shapes | _norm(norm, width) | _dense(head, classes, width)


def vit_google(
  depth=12, width=768, heads=12, patch=16, tokens=197, *, classes=1000
) -> Shapes:
  """The .npz of google-research/vision_transformer, with a class token."""
  size = width // heads
  top = 'Transformer/'
  shapes = {
    'cls': (1, 1, width),
    f'{top}posembed_input/pos_embedding': (1, tokens, width),
    'embedding/kernel': (patch, patch, 3, width),
    'embedding/bias': (width,),
    f'{top}encoder_norm/scale': (width,),
    f'{top}encoder_norm/bias': (width,),
    'head/kernel': (width, classes),
    'head/bias': (classes,),
  }
  for i in range(depth):
    block = f'{top}encoderblock_{i}/'
    for norm in ('LayerNorm_0', 'LayerNorm_2'):
      shapes[f'{block}{norm}/scale'] = shapes[f'{block}{norm}/bias'] = (width,)
    attention = f'{block}MultiHeadDotProductAttention_1/'
    for part in ('query', 'key', 'value'):
      shapes[f'{attention}{part}/kernel'] = (width, heads, size)
      shapes[f'{attention}{part}/bias'] = (heads, size)
    shapes[f'{attention}out/kernel'] = (heads, size, width)
    shapes[f'{attention}out/bias'] = (width,)
    mlp = f'{block}MlpBlock_3/Dense_'
    shapes |= {
      f'{mlp}0/kernel': (width, 4 * width),
      f'{mlp}0/bias': (4 * width,),
      f'{mlp}1/kernel': (4 * width, width),
      f'{mlp}1/bias': (width,),
    }
  return shapes
