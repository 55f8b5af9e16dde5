"""ConvNeXt, a convolutional network drawn as a Transformer: Liu et al. (2022).

Shapes: B batch, H W C image, D width, K classes.
"""

from collections.abc import Sequence

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from models import layers
from models import resnet

# Blocks of each stage, and channels of the first: Liu et al. (2022), section 3.
VARIANTS = {
  'T': {'depth': (3, 3, 9, 3), 'width': 96},
  'S': {'depth': (3, 3, 27, 3), 'width': 96},
  'B': {'depth': (3, 3, 27, 3), 'width': 128},
  'L': {'depth': (3, 3, 27, 3), 'width': 192},
}
# All kernels; biases start at 0. The authors cut it at 2, far beyond.
_KERNEL_INIT = nnx.initializers.normal(0.02)


class ConvNeXt(nnx.Module):
  """Patches, stages of blocks, mean, norm, head: [B, H, W, C] -> [B, K].

  Each stage but the first halves the image and has twice the channels. Layer
  norms have an epsilon of 1e-6.

  Args:
    image_shape: (H, W, C), multiples of `patch_size`.
    num_classes: K.
    variant: a name in VARIANTS.
    depth: blocks of each stage; None for the variant's, as `width`.
    width: channels of the first stage.
    patch_size: side of the stem's patches; smaller ones are for small images.
    stochastic_depth: share of the examples that skip the last block in
      training, growing in even steps from 0 at the first. In the paper 0.1,
      0.4, 0.5 and 0.5 for T, S, B and L.
    layer_scale: what each channel of a block's branch is first multiplied by.
  """

  def __init__(
    self,
    image_shape: Sequence[int] = (224, 224, 3),
    num_classes: int = 1000,
    *,
    variant: str = 'T',
    depth: Sequence[int] | None = None,
    width: int | None = None,
    patch_size: int = 4,
    stochastic_depth: float = 0.0,
    layer_scale: float = 1e-6,
    dtype=None,
    param_dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    entry = layers.lookup('variant', variant, VARIANTS)
    depth = entry['depth'] if depth is None else depth
    width = entry['width'] if width is None else width
    layers.check_sizes(
      image_shape=image_shape,
      num_classes=num_classes,
      depth=depth,
      width=width,
      patch_size=patch_size,
    )
    resnet.check_shapes(image_shape, depth)
    *sides, channels = image_shape
    if any(side % patch_size for side in sides):
      raise ValueError(
        f'image_shape {tuple(image_shape)} does not divide into patches of '
        f'patch_size {patch_size}'
      )
    if min(sides) < patch_size * 2 ** (len(depth) - 1):
      raise ValueError(
        f'image_shape {tuple(image_shape)} is too small for patch_size '
        f'{patch_size} and {len(depth)} stages, between which it is halved'
      )
    # Judged here as a whole; the blocks get shares of it.
    layers.stochastic_depth(stochastic_depth, ndim=4)
    rates = np.linspace(0, stochastic_depth, sum(depth)).tolist()
    rngs = layers.Keys(rngs)
    kwargs = {'dtype': dtype, 'param_dtype': param_dtype, 'rngs': rngs}
    self.embed = Embed(channels, width, patch_size, **kwargs)
    stages, downsamples = [], []
    for i, blocks in enumerate(depth):
      if i > 0:
        downsamples.append(Downsample(width, 2 * width, **kwargs))
        width *= 2
      stages.append(nnx.List())
      for _ in range(blocks):
        stages[-1].append(Block(width, rates.pop(0), layer_scale, **kwargs))
    self.blocks = nnx.List(stages)
    self.downsamples = nnx.List(downsamples)
    self.norm = nnx.LayerNorm(width, **kwargs)
    self.head = _dense(width, num_classes, **kwargs)

  def __call__(self, image: jax.Array, *, train=False, rngs=None) -> jax.Array:
    x = self.embed(image)
    for i, stage in enumerate(self.blocks):
      if i > 0:
        x = self.downsamples[i - 1](x)
      for block in stage:
        x = block(x, train=train, rngs=rngs)
    return self.head(self.norm(x.mean((1, 2))))


class Embed(nnx.Module):
  """Patches without overlap, then norm: [B, H, W, C] -> [B, H/P, W/P, D]."""

  def __init__(self, channels: int, width: int, patch_size: int, **kwargs):
    self.conv = _convolution(channels, width, patch_size, **kwargs)
    self.norm = nnx.LayerNorm(width, **kwargs)

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.norm(self.conv(x))


class Downsample(nnx.Module):
  """Norm, then 2x2 convolution of stride 2: [B, H, W, D] -> [B, H/2, W/2, D'].

  An odd row or column is left out.
  """

  def __init__(self, channels: int, width: int, **kwargs):
    self.norm = nnx.LayerNorm(channels, **kwargs)
    self.conv = _convolution(channels, width, 2, **kwargs)

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.conv(self.norm(x))


class Block(nnx.Module):
  """[B, H, W, D] -> the like: 7x7 convolution of each channel, norm, MLP.

  The MLP is D, 4D, D with exact GELU; its output is scaled and added.
  """

  def __init__(self, width: int, rate: float, layer_scale: float, **kwargs):
    self.conv = layers.Conv(
      width,
      width,
      (7, 7),
      feature_group_count=width,
      kernel_init=_KERNEL_INIT,
      **kwargs,
    )
    self.norm = nnx.LayerNorm(width, **kwargs)
    self.expand = _dense(width, 4 * width, **kwargs)
    self.project = _dense(4 * width, width, **kwargs)
    self.layer_scale = nnx.Param(
      jnp.full(width, layer_scale, kwargs['param_dtype'])
    )
    self.stochastic_depth = layers.stochastic_depth(rate, ndim=4)

  def __call__(self, x: jax.Array, *, train: bool, rngs) -> jax.Array:
    branch = self.expand(self.norm(self.conv(x)))
    branch = self.project(layers.gelu(branch))
    branch *= self.layer_scale[...].astype(branch.dtype)
    return x + self.stochastic_depth(branch, deterministic=not train, rngs=rngs)


def _convolution(channels, width, size, **kwargs) -> nnx.Conv:
  return layers.Conv(
    channels,
    width,
    (size, size),
    (size, size),
    padding='VALID',
    kernel_init=_KERNEL_INIT,
    **kwargs,
  )


def _dense(size_in, size_out, **kwargs) -> nnx.Linear:
  return nnx.Linear(size_in, size_out, kernel_init=_KERNEL_INIT, **kwargs)
