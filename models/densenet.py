"""DenseNet-BC: each layer sees all before it, after Huang et al. (2017).

Shapes: B batch, H W C image, K classes.
"""

from collections.abc import Sequence

from flax import nnx
import jax
import jax.numpy as jnp

from models import layers
from models import resnet

# Layers of each block: Huang et al. (2017), table 1. All grow by k = 32.
VARIANTS = {
  '121': {'depth': (6, 12, 24, 16), 'growth_rate': 32},
  '169': {'depth': (6, 12, 32, 32), 'growth_rate': 32},
  '201': {'depth': (6, 12, 48, 32), 'growth_rate': 32},
}


class DenseNet(nnx.Module):
  """Stem, dense blocks, a transition between, head: [B, H, W, C] -> [B, K].

  A transition halves the channels and the image. Convolutions start as He et
  al. (2015) say, and have no bias.

  Args:
    image_shape: (H, W, C); with the 7x7 stem and four blocks from 29 pixels up.
    num_classes: K.
    variant: a name in VARIANTS.
    depth: layers of each block; None for the variant's, as `growth_rate`.
    growth_rate: k, the channels that each layer adds. The stem has 2k.
    stem: '7x7' of stride 2 and a pool, which together divide H and W by 4;
      '3x3' keeps them, as the paper does on CIFAR.
    dropout: share dropped after each 3x3 convolution; the paper's is 0.2 where
      nothing is augmented.
  """

  def __init__(
    self,
    image_shape: Sequence[int] = (224, 224, 3),
    num_classes: int = 1000,
    *,
    variant: str = '121',
    depth: Sequence[int] | None = None,
    growth_rate: int | None = None,
    stem: str = '7x7',
    dropout: float = 0.0,
    dtype=None,
    param_dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    # A flag's 121 comes as a number.
    entry = layers.lookup('variant', variant, VARIANTS)
    depth = entry['depth'] if depth is None else depth
    growth_rate = entry['growth_rate'] if growth_rate is None else growth_rate
    layers.check_sizes(
      image_shape=image_shape,
      num_classes=num_classes,
      depth=depth,
      growth_rate=growth_rate,
    )
    resnet.check_shapes(image_shape, depth)
    rngs = layers.Keys(rngs)
    kwargs = {'dtype': dtype, 'param_dtype': param_dtype, 'rngs': rngs}
    features = 2 * growth_rate
    self.embed = resnet.Stem(
      image_shape[-1], features, stem=stem, norm=True, **kwargs
    )
    side = min(image_shape[:2])
    side = -(-side // 4) if self.embed.pool else side
    if side < 2 ** (len(depth) - 1):
      raise ValueError(
        f'image_shape {tuple(image_shape)} is too small for stem {stem!r} and '
        f"{len(depth)} blocks, between which it is halved; stem='3x3' keeps it"
      )
    blocks, transitions = [], []
    for i, size in enumerate(depth):
      if i > 0:
        transitions.append(Transition(features, features // 2, **kwargs))
        features //= 2
      blocks.append(nnx.List())
      for _ in range(size):
        blocks[-1].append(
          DenseLayer(features, growth_rate, dropout=dropout, **kwargs)
        )
        features += growth_rate
    self.blocks = nnx.List(blocks)
    self.transitions = nnx.List(transitions)
    self.norm = layers.Norm('batch', features, **kwargs)
    self.head = nnx.Linear(features, num_classes, **kwargs)

  def __call__(self, image: jax.Array, *, train=False, rngs=None) -> jax.Array:
    x = self.embed(image, train=train)
    for i, block in enumerate(self.blocks):
      if i > 0:
        x = self.transitions[i - 1](x, train=train)
      for layer in block:
        x = layer(x, train=train, rngs=rngs)
    x = jax.nn.relu(self.norm(x, train=train))
    return self.head(x.mean((1, 2)))


class DenseLayer(nnx.Module):
  """Adds k channels behind those there are: [B, H, W, D] -> [B, H, W, D + k].

  Norm, ReLU, 1x1 convolution to 4k channels, norm, ReLU, 3x3 to k.
  """

  def __init__(
    self, features: int, growth_rate: int, *, dropout: float, **kwargs
  ):
    inner = 4 * growth_rate
    self.norms = nnx.List(
      [
        layers.Norm('batch', features, **kwargs),
        layers.Norm('batch', inner, **kwargs),
      ]
    )
    self.convs = nnx.List(
      [
        resnet.convolution(1, features, inner, **kwargs),
        resnet.convolution(3, inner, growth_rate, **kwargs),
      ]
    )
    self.dropout = layers.dropout(dropout)

  def __call__(self, x: jax.Array, *, train: bool, rngs) -> jax.Array:
    new = x
    for norm, conv in zip(self.norms, self.convs, strict=True):
      new = conv(jax.nn.relu(norm(new, train=train)))
    new = self.dropout(new, deterministic=not train, rngs=rngs)
    return jnp.concatenate([x, new], axis=-1)


class Transition(nnx.Module):
  """Norm, ReLU, 1x1 convolution, 2x2 mean: [B, H, W, D] -> [B, H', W', D'].

  H' = H // 2: an odd row or column is left out.
  """

  def __init__(self, channels: int, features: int, **kwargs):
    self.norm = layers.Norm('batch', channels, **kwargs)
    self.conv = resnet.convolution(1, channels, features, **kwargs)

  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    x = self.conv(jax.nn.relu(self.norm(x, train=train)))
    return layers.average_pool(x)
