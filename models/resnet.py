"""Residual networks: ResNet, Wide ResNet and, in groups, ResNeXt.

He et al. (2016a, b), Zagoruyko & Komodakis (2016), Xie et al. (2017).

Shapes: B batch, H W C image, D channels, K classes.
"""

from collections.abc import Sequence
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from models import layers

# Four stages on ImageNet: He et al. (2016a), table 1; its 200 layers are He et
# al. (2016b), table 5. In a block of three the stride is on the 3x3, as fb.
# resnet.torch and torchvision have it.
_BASIC = {'kernels': (3, 3), 'width': 64, 'stem': '7x7'}
_BOTTLENECK = {'kernels': (1, 3, 1), 'width': 64, 'stem': '7x7'}
# Three stages of n blocks on CIFAR, 6n + 2 layers, whose shortcuts have no
# parameters: He et al. (2016a), section 4.2. Of blocks of three, 9n + 2 layers:
# He et al. (2016b), table 4.
_CIFAR = {'kernels': (3, 3), 'width': 16, 'stem': '3x3', 'shortcut': 'pad'}
_CIFAR_V2 = {
  'kernels': (1, 3, 1),
  'width': 16,
  'stem': '3x3',
  'preactivation': True,
}
# WRN-d-k has 6n + 4 layers, k times as wide behind a stem of 16 channels:
# Zagoruyko & Komodakis (2016), table 1.
_WRN = {
  'kernels': (3, 3),
  'stem': '3x3',
  'stem_width': 16,
  'preactivation': True,
}

# depth: blocks of each stage. width: channels of the first stage's 3x3
# convolutions, which double with each stage; a block of three puts out 4 times
# as many. inner: by how much more its 3x3 alone are wider.
VARIANTS = {
  '18': _BASIC | {'depth': (2, 2, 2, 2)},
  '34': _BASIC | {'depth': (3, 4, 6, 3)},
  '50': _BOTTLENECK | {'depth': (3, 4, 6, 3)},
  '101': _BOTTLENECK | {'depth': (3, 4, 23, 3)},
  '152': _BOTTLENECK | {'depth': (3, 8, 36, 3)},
  '200': _BOTTLENECK | {'depth': (3, 24, 36, 3)},
  # torchvision's wide forms of 50 and 101.
  'wide50_2': _BOTTLENECK | {'depth': (3, 4, 6, 3), 'inner': 2},
  'wide101_2': _BOTTLENECK | {'depth': (3, 4, 23, 3), 'inner': 2},
  'cifar20': _CIFAR | {'depth': (3, 3, 3)},
  'cifar32': _CIFAR | {'depth': (5, 5, 5)},
  'cifar44': _CIFAR | {'depth': (7, 7, 7)},
  'cifar56': _CIFAR | {'depth': (9, 9, 9)},
  'cifar110': _CIFAR | {'depth': (18, 18, 18)},
  'cifar1202': _CIFAR | {'depth': (200, 200, 200)},
  'cifar164': _CIFAR_V2 | {'depth': (18, 18, 18)},
  'cifar1001': _CIFAR_V2 | {'depth': (111, 111, 111)},
  'wrn16_4': _WRN | {'depth': (2, 2, 2), 'width': 64},
  'wrn16_8': _WRN | {'depth': (2, 2, 2), 'width': 128},
  'wrn28_10': _WRN | {'depth': (4, 4, 4), 'width': 160},
  'wrn40_4': _WRN | {'depth': (6, 6, 6), 'width': 64},
}
# C x d: C groups of d channels in the first stage. Xie et al. (2017), table 1
# and section 5; 101_32x8d is torchvision's.
RESNEXTS = {
  '50_32x4d': _BOTTLENECK | {'depth': (3, 4, 6, 3), 'inner': 2, 'groups': 32},
  '101_32x4d': _BOTTLENECK | {'depth': (3, 4, 23, 3), 'inner': 2, 'groups': 32},
  '101_32x8d': _BOTTLENECK | {'depth': (3, 4, 23, 3), 'inner': 4, 'groups': 32},
  '101_64x4d': _BOTTLENECK | {'depth': (3, 4, 23, 3), 'inner': 4, 'groups': 64},
}
# The kernel and stride of the first convolution, and whether a pool follows.
STEMS = {'7x7': (7, 2, True), '3x3': (3, 1, False)}


class ResNet(nnx.Module):
  """Stem, stages of residual blocks, mean, head: [B, H, W, C] -> [B, K].

  Each stage but the first halves the image. Convolutions start as He et al.
  (2015) say, by their outputs, and have no bias.

  Args:
    image_shape: (H, W, C), of any size.
    num_classes: K.
    variant: a name in VARIANTS.
    depth: blocks of each stage; None for the variant's, as `width`. ResNet-1001
      is 'cifar1001', or 'cifar164' with depth=(111, 111, 111).
    width: channels of the first stage.
    stem: '7x7' of stride 2 and a pool, which together divide H and W by 4;
      '3x3' keeps them, for small images; None for the variant's.
    preactivation: norm and ReLU before each convolution, and once after the
      last block, in place of after it (He et al. 2016b); None for the
      variant's.
    dropout: share dropped before the second convolution of a block
      (Zagoruyko & Komodakis 2016).
    zero_init: each block starts as its shortcut, by a scale of 0 in its last
      norm (Goyal et al. 2017, section 5.1).
  """

  variants = VARIANTS

  def __init__(
    self,
    image_shape: Sequence[int] = (224, 224, 3),
    num_classes: int = 1000,
    *,
    variant: str = '18',
    depth: Sequence[int] | None = None,
    width: int | None = None,
    stem: str | None = None,
    preactivation: bool | None = None,
    dropout: float = 0.0,
    zero_init: bool = False,
    dtype=None,
    param_dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    # A flag's 50 comes as a number.
    entry = layers.lookup('variant', variant, self.variants)
    depth = entry['depth'] if depth is None else depth
    width = entry['width'] if width is None else width
    layers.check_sizes(
      image_shape=image_shape, num_classes=num_classes, depth=depth, width=width
    )
    check_shapes(image_shape, depth)
    if preactivation is None:
      preactivation = entry.get('preactivation', False)
    if not isinstance(preactivation, bool):
      raise ValueError(
        f'preactivation is {preactivation!r}; it takes true or false'
      )
    if preactivation and zero_init:
      raise ValueError(
        'zero_init is true, but with preactivation no norm ends a block'
      )
    inner, groups = entry.get('inner', 1) * width, entry.get('groups', 1)
    if inner % groups:
      raise ValueError(
        f'width is {width}, which makes convolutions of {inner} channels; they '
        f'must divide into {groups} groups'
      )
    kernels = entry['kernels']
    outer = 4 * width if len(kernels) == 3 else width
    rngs = layers.Keys(rngs)
    kwargs = {'dtype': dtype, 'param_dtype': param_dtype, 'rngs': rngs}
    features = entry.get('stem_width', width)
    self.embed = Stem(
      image_shape[-1],
      features,
      stem=entry['stem'] if stem is None else stem,
      norm=not preactivation,
      **kwargs,
    )
    stages = []
    for i, blocks in enumerate(depth):
      widths = (*[inner * 2**i] * (len(kernels) - 1), outer * 2**i)
      stages.append(nnx.List())
      for j in range(blocks):
        stages[-1].append(
          Block(
            features,
            kernels,
            widths,
            strides=2 if i > 0 and j == 0 else 1,
            groups=groups,
            shortcut=entry.get('shortcut', 'project'),
            preactivation=preactivation,
            dropout=dropout,
            zero_init=zero_init,
            **kwargs,
          )
        )
        features = widths[-1]
    self.blocks = nnx.List(stages)
    norm = 'batch' if preactivation else None
    self.norm = layers.Norm(norm, features, **kwargs)
    self.head = nnx.Linear(features, num_classes, **kwargs)

  def __call__(self, image: jax.Array, *, train=False, rngs=None) -> jax.Array:
    x = self.embed(image, train=train)
    for stage in self.blocks:
      for block in stage:
        x = block(x, train=train, rngs=rngs)
    # After a block's own ReLU, without a norm, this one changes nothing.
    x = jax.nn.relu(self.norm(x, train=train))
    return self.head(x.mean((1, 2)))


class ResNeXt(ResNet):
  """A ResNet whose 3x3 convolutions are in groups: [B, H, W, C] -> [B, K].

  The sum of as many small networks, aggregated (Xie et al. 2017, figure 3c).

  Args:
    image_shape, num_classes, depth, stem, zero_init: as of ResNet.
    variant: a name in RESNEXTS.
    width: 64 in all of them; the channels of a group are in proportion.
  """

  variants = RESNEXTS

  def __init__(
    self,
    image_shape: Sequence[int] = (224, 224, 3),
    num_classes: int = 1000,
    *,
    variant: str = '50_32x4d',
    depth: Sequence[int] | None = None,
    width: int | None = None,
    stem: str | None = None,
    zero_init: bool = False,
    dtype=None,
    param_dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    super().__init__(
      image_shape,
      num_classes,
      variant=variant,
      depth=depth,
      width=width,
      stem=stem,
      zero_init=zero_init,
      dtype=dtype,
      param_dtype=param_dtype,
      rngs=rngs,
    )


class Stem(nnx.Module):
  """Convolution, norm, ReLU and pool, of which '3x3' has no pool.

  [B, H, W, C] -> [B, H', W', D], H' = ceil(H / 4) or H. Without `norm` there is
  no ReLU either.
  """

  def __init__(
    self, channels: int, features: int, *, stem: str, norm: bool, **kwargs
  ):
    size, strides, self.pool = layers.lookup('stem', stem, STEMS)
    self.conv = convolution(size, channels, features, strides, **kwargs)
    self.norm = layers.Norm('batch' if norm else None, features, **kwargs)

  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    if self.norm.name is None:
      x = layers.conv2d(self.conv, x)
    elif train:
      y, affine = layers.conv2d_stats(self.conv, self.norm, x)
      x = jax.nn.relu(layers.apply_affine(y, affine))
    else:
      x = layers.conv2d(self.conv, x, self.norm, activation='relu')
    if self.pool:
      x = nnx.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
    return x


class Block(nnx.Module):
  """A residual block: [B, H, W, C] -> [B, H', W', D], H' = ceil(H / strides).

  Convolutions of 3x3 and 3x3, or of 1x1, 3x3 and 1x1, as `kernels` says, each
  to as many channels as `widths` says; the first 3x3 has the stride, and each
  3x3 the groups. Where the shape changes the shortcut is a 1x1 convolution, or
  'pad': the pixels that the stride meets, and channels of 0 behind (He et al.
  2016a, options B and A).
  """

  def __init__(
    self,
    channels: int,
    kernels: Sequence[int],
    widths: Sequence[int],
    *,
    strides: int,
    groups: int,
    shortcut: str,
    preactivation: bool,
    dropout: float,
    zero_init: bool,
    **kwargs: Any,
  ):
    sizes = (channels, *widths)
    convs, norms = [], []
    for i, size in enumerate(kernels):
      convs.append(
        convolution(
          size,
          sizes[i],
          sizes[i + 1],
          strides if i == kernels.index(3) else 1,
          groups if size == 3 else 1,
          **kwargs,
        )
      )
      normed = sizes[i] if preactivation else sizes[i + 1]
      norms.append(layers.Norm('batch', normed, **kwargs))
    if zero_init:
      norms[-1].norm.scale[...] = jnp.zeros_like(norms[-1].norm.scale[...])
    self.convs, self.norms = nnx.List(convs), nnx.List(norms)
    self.changes = strides > 1 or channels != widths[-1]
    project = self.changes and shortcut == 'project'
    self.shortcut = (
      convolution(1, channels, widths[-1], strides, **kwargs)
      if project
      else None
    )
    norm = 'batch' if project and not preactivation else None
    self.shortcut_norm = layers.Norm(norm, widths[-1], **kwargs)
    self.strides, self.preactivation = strides, preactivation
    self.dropout = layers.dropout(dropout)

  def __call__(self, x: jax.Array, *, train: bool, rngs) -> jax.Array:
    if self.preactivation:
      return self._norms_first(x, train, rngs)
    branch = x
    if self.changes:
      x = self._short(x, train)
    if not train:
      *inner, last = zip(self.convs, self.norms, strict=True)
      for conv, norm in inner:
        branch = layers.conv2d(conv, branch, norm, activation='relu')
      conv, norm = last
      return layers.conv2d(conv, branch, norm, residual=x, activation='relu')
    affine, activation = None, None
    for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
      if i == 1 and self.dropout.rate:
        branch = jax.nn.relu(layers.apply_affine(branch, affine))
        branch = self.dropout(branch, deterministic=False, rngs=rngs)
        affine, activation = None, None
      branch, affine = layers.conv2d_stats(
        conv, norm, branch, affine, activation
      )
      # Is done as the next convolution loads it.
      activation = 'relu'
    return jax.nn.relu(x + layers.apply_affine(branch, affine))

  def _norms_first(self, x, train, rngs):
    branch = x
    for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
      branch = jax.nn.relu(norm(branch, train=train))
      if i == 0 and self.changes:
        # Both paths start behind it: He et al. (2016b).
        x = self._short(branch, train)
      if i == 1:
        branch = self.dropout(branch, deterministic=not train, rngs=rngs)
      branch = layers.conv2d(conv, branch)
    return x + branch

  def _short(self, x, train):
    if self.shortcut is None:
      more = self.convs[-1].out_features - x.shape[-1]
      x = x[:, :: self.strides, :: self.strides]
      return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, more)))
    if train and self.shortcut_norm.name == 'batch':
      return layers.apply_affine(
        *layers.conv2d_stats(self.shortcut, self.shortcut_norm, x)
      )
    return layers.conv2d(self.shortcut, x, self.shortcut_norm)


def check_shapes(image_shape: Sequence[int], depth: Sequence[int]):
  """Raises a ValueError unless (H, W, C), and a depth of each stage."""
  layers.check_image_shape(image_shape)
  if not isinstance(depth, tuple | list) or not depth:
    raise ValueError(
      f'depth is {depth}; it takes the blocks of each stage, as (3, 4, 6, 3)'
    )


def convolution(
  size: int,
  channels: int,
  features: int,
  strides: int = 1,
  groups: int = 1,
  **kwargs: Any,
) -> nnx.Conv:
  """[B, H, W, C] -> [B, ceil(H / strides), ceil(W / strides), features].

  Padded by size // 2 on every side, where SAME would pad an even image with a
  stride of 2 on one side alone.
  """
  return layers.Conv(
    channels,
    features,
    (size, size),
    strides,
    padding=size // 2,
    feature_group_count=groups,
    use_bias=False,
    kernel_init=nnx.initializers.variance_scaling(2.0, 'fan_out', 'normal'),
    **kwargs,
  )
