"""Vision Transformer: Dosovitskiy et al. (2021).

Shapes: B batch, H W C image, P patch, N tokens, D width, K classes.
"""

from collections.abc import Sequence

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

import kernels
from kernels import sharding
from models import layers
from models import position as position_lib

# B, L, H: Dosovitskiy et al. (2021), table 1. Ti, S: Touvron et al. (2021),
# table 1. g, G: Zhai et al. (2022), table 2.
_TI = {'width': 192, 'depth': 12, 'num_heads': 3, 'mlp_width': 768}
_S = {'width': 384, 'depth': 12, 'num_heads': 6, 'mlp_width': 1536}
_B = {'width': 768, 'depth': 12, 'num_heads': 12, 'mlp_width': 3072}
_L = {'width': 1024, 'depth': 24, 'num_heads': 16, 'mlp_width': 4096}
_H = {'width': 1280, 'depth': 32, 'num_heads': 16, 'mlp_width': 5120}
_g = {'width': 1408, 'depth': 40, 'num_heads': 16, 'mlp_width': 6144}
_G = {'width': 1664, 'depth': 48, 'num_heads': 16, 'mlp_width': 8192}
# The name ends in the side of a patch.
VARIANTS = {
  'Ti/16': _TI | {'patch_size': 16},
  'S/16': _S | {'patch_size': 16},
  'S/32': _S | {'patch_size': 32},
  'B/16': _B | {'patch_size': 16},
  'B/32': _B | {'patch_size': 32},
  'L/16': _L | {'patch_size': 16},
  'L/32': _L | {'patch_size': 32},
  'H/14': _H | {'patch_size': 14},
  'g/14': _g | {'patch_size': 14},
  'G/14': _G | {'patch_size': 14},
}
POOLS = ('cls', 'mean')
POSITIONS = ('learned', 'sincos2d')

# As the authors' code has it: Glorot & Bengio (2010) for kernels, the one of
# query, key and value as if it were three [D, D].
_GLOROT = nnx.initializers.xavier_uniform()
_POSITIONS_INIT = nnx.initializers.normal(0.02)
_GLOROT_QKV = nnx.initializers.variance_scaling(1.0, 'fan_in', 'uniform')


class ViT(nnx.Module):
  """Patches, positions, blocks, norm, head: [B, H, W, C] -> [B, K].

  Layer norms have an epsilon of 1e-6, GELU is exact, the head starts at 0.

  Args:
    image_shape: (H, W, C), H and W multiples of `patch_size`.
    num_classes: K.
    variant: a name in VARIANTS.
    patch_size: side of a patch in pixels; None for the variant's, as all below.
    width: D.
    depth: blocks.
    num_heads: heads of attention, which must divide D.
    mlp_width: hidden units of the MLPs; None for 4 D where `width` is given.
    pool: what the head reads: 'cls', a token of its own with a position of its
      own; or 'mean', the mean of the patches (Beyer et al. 2022).
    position: 'learned', or 'sincos2d', which has no parameters and gives the
      class token none.
    pre_logits: one more dense layer and tanh before the head, for training from
      scratch (Dosovitskiy et al. 2021, section 3.1).
    dropout: share dropped after the positions are added and after every dense
      layer but query, key and value (appendix B.1).
    stochastic_depth: share of the examples that skip a branch of the last block
      in training, growing in even steps from 0 at the first (Huang et al.
      2016).
    attention: 'dot_product', jax.nn's; or 'softmax', that of `kernels` between
      two products, which keeps the weights [B, heads, N, N] for the backward
      pass.
    remat: computes each block anew in the backward pass, to save memory.
    scan: compiles one block for all of them, where the compiler takes long, as
      a TPU's does; on a CPU both it and the steps are slower so. The outputs
      are the same.
  """

  def __init__(
    self,
    image_shape: Sequence[int] = (224, 224, 3),
    num_classes: int = 1000,
    *,
    variant: str = 'S/16',
    patch_size: int | None = None,
    width: int | None = None,
    depth: int | None = None,
    num_heads: int | None = None,
    mlp_width: int | None = None,
    pool: str = 'cls',
    position: str = 'learned',
    pre_logits: bool = False,
    dropout: float = 0.0,
    stochastic_depth: float = 0.0,
    attention: str = 'dot_product',
    remat: bool = False,
    scan: bool = False,
    dtype=None,
    param_dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    entry = layers.lookup('variant', variant, VARIANTS)
    if mlp_width is None:
      mlp_width = entry['mlp_width'] if width is None else 4 * width
    patch_size = entry['patch_size'] if patch_size is None else patch_size
    width = entry['width'] if width is None else width
    depth = entry['depth'] if depth is None else depth
    num_heads = entry['num_heads'] if num_heads is None else num_heads
    layers.check_sizes(
      image_shape=image_shape,
      num_classes=num_classes,
      patch_size=patch_size,
      width=width,
      depth=depth,
      num_heads=num_heads,
      mlp_width=mlp_width,
    )
    self.grid = _grid(image_shape, patch_size)
    if width % num_heads:
      raise ValueError(
        f'width is {width}, which does not divide into num_heads {num_heads}'
      )
    layers.lookup('pool', pool, dict.fromkeys(POOLS))
    layers.lookup('position', position, dict.fromkeys(POSITIONS))
    layers.lookup('attention', attention, dict.fromkeys(ATTENTIONS))
    # Judged here as a whole; the blocks get shares of it.
    layers.stochastic_depth(stochastic_depth, ndim=3)
    self.pool, self.remat, self.scan = pool, remat, scan
    self.rates = tuple(np.linspace(0, stochastic_depth, depth).tolist())
    self.draws = bool(dropout or stochastic_depth)
    rngs = layers.Keys(rngs)
    kwargs = {'dtype': dtype, 'param_dtype': param_dtype, 'rngs': rngs}
    self.embed = layers.Conv(
      image_shape[-1],
      width,
      (patch_size, patch_size),
      (patch_size, patch_size),
      padding='VALID',
      **kwargs,
    )
    self.class_token = (
      nnx.Param(jnp.zeros(width, param_dtype)) if pool == 'cls' else None
    )
    tokens = self.grid[0] * self.grid[1] + (pool == 'cls')
    if position == 'sincos2d':
      position_lib.sincos2d(self.grid, width)  # Raises where it cannot be.
    self.positions = (
      nnx.Param(_POSITIONS_INIT(rngs.params(), (tokens, width), param_dtype))
      if position == 'learned'
      else None
    )
    self.dropout = layers.dropout(dropout)
    # A list, though a scan needs its parameters stacked: so each block has
    # paths of its own, to be frozen or converted by, and a bias one dimension,
    # by which weight decay spares it.
    self.blocks = nnx.List(
      [
        Block(width, num_heads, mlp_width, dropout, attention, **kwargs)
        for _ in range(depth)
      ]
    )
    self.norm = _norm(width, **kwargs)
    self.pre_logits = nnx.Linear(width, width, **kwargs) if pre_logits else None
    self.head = nnx.Linear(
      width, num_classes, kernel_init=nnx.initializers.zeros, **kwargs
    )

  def __call__(self, image: jax.Array, *, train=False, rngs=None) -> jax.Array:
    x = self.embed(image)
    x = self._placed(x.reshape(x.shape[0], -1, x.shape[-1]))
    x = self.dropout(x, deterministic=not train, rngs=rngs)
    x = self.norm(self._through_blocks(x, train=train, rngs=rngs))
    x = x[:, 0] if self.pool == 'cls' else x.mean(1)
    if self.pre_logits is not None:
      x = jnp.tanh(self.pre_logits(x))
    return self.head(x)

  def _placed(self, x):
    """The class token in front, and positions added: [B, N, D]."""
    if self.positions is None:
      x += position_lib.sincos2d(self.grid, x.shape[-1]).astype(x.dtype)
    if self.class_token is not None:
      token = self.class_token[...].astype(x.dtype)
      token = jnp.broadcast_to(token, (x.shape[0], 1, x.shape[-1]))
      x = jnp.concatenate([token, x], axis=1)
    if self.positions is not None:
      x += self.positions[...].astype(x.dtype)
    return x

  def _through_blocks(self, x, *, train, rngs):
    keys = None
    if train and self.draws:
      # One for each block, so that a scan draws what a loop draws.
      keys = jax.random.split(rngs.dropout(), len(self.blocks))

    def apply(x, block, params, rate, key):
      block = nnx.merge(block, params)
      rngs = None if key is None else nnx.Rngs(dropout=key)
      return block(x, rate=rate, train=train, rngs=rngs)

    if train and self.remat:
      # In a scan the compiler cannot merge the two computations anyway.
      apply = jax.checkpoint(apply, static_argnums=1, prevent_cse=not self.scan)
    structures, params = zip(*map(nnx.split, self.blocks), strict=True)
    rates = jnp.asarray(self.rates)
    if not self.scan:
      for i, structure in enumerate(structures):
        key = None if keys is None else keys[i]
        x = apply(x, structure, params[i], rates[i], key)
      return x
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)
    return jax.lax.scan(
      lambda x, layer: (apply(x, structures[0], *layer), None),
      x,
      (stacked, rates, keys),
    )[0]


class Block(nnx.Module):
  """x + attention(norm(x)), then x + MLP(norm(x)): [B, N, D] -> the like.

  In training an example skips either branch with probability `rate`.
  """

  def __init__(
    self,
    width: int,
    num_heads: int,
    mlp_width: int,
    dropout: float,
    attention: str,
    **kwargs,
  ):
    self.norm1 = _norm(width, **kwargs)
    self.attention = Attention(width, num_heads, attention, **kwargs)
    self.norm2 = _norm(width, **kwargs)
    self.mlp = MLP(width, mlp_width, dropout, **kwargs)
    self.dropout = layers.dropout(dropout)

  def __call__(self, x: jax.Array, *, rate, train: bool, rngs) -> jax.Array:
    def drop(branch):
      branch = self.dropout(branch, deterministic=not train, rngs=rngs)
      return _skip(branch, rate, rngs) if rngs is not None else branch

    # A branch's width may be divided over devices; what it adds to is not.
    x = sharding.by_rows(x + drop(self.attention(_each(self.norm1, x))))
    branch = self.mlp(_each(self.norm2, x), train=train, rngs=rngs)
    return sharding.by_rows(x + drop(branch))


class Attention(nnx.Module):
  """Every token attends to every token: [B, N, D] -> [B, N, D].

  `qkv` makes queries, keys and values, D columns each, of which each head has
  as many in a row.
  """

  def __init__(self, width: int, num_heads: int, attention: str, **kwargs):
    self.qkv = nnx.Linear(width, 3 * width, kernel_init=_GLOROT_QKV, **kwargs)
    self.project = nnx.Linear(width, width, kernel_init=_GLOROT, **kwargs)
    self.num_heads, self.attend = num_heads, ATTENTIONS[attention]

  def __call__(self, x: jax.Array) -> jax.Array:
    qkv = _each(self.qkv, x)
    heads = (*x.shape[:2], self.num_heads, -1)
    query, key, value = (
      part.reshape(heads) for part in jnp.split(qkv, 3, axis=-1)
    )
    x = self.attend(query, key, value)
    return _each(self.project, x.reshape(*x.shape[:2], -1))


class MLP(nnx.Module):
  """Dense, GELU, dense: [B, N, D] -> [B, N, D]."""

  def __init__(self, width: int, mlp_width: int, dropout: float, **kwargs):
    inits = {
      'kernel_init': _GLOROT,
      'bias_init': nnx.initializers.normal(1e-6),
    }
    self.expand = nnx.Linear(width, mlp_width, **inits, **kwargs)
    self.project = nnx.Linear(mlp_width, width, **inits, **kwargs)
    self.dropout = layers.dropout(dropout)

  def __call__(self, x: jax.Array, *, train: bool, rngs) -> jax.Array:
    x = layers.gelu(_each(self.expand, x))
    x = self.dropout(x, deterministic=not train, rngs=rngs)
    return _each(self.project, x)


def _softmax_attention(query, key, value):
  """As jax.nn.dot_product_attention, [B, N, heads, D'] each."""
  wide = jnp.promote_types(query.dtype, jnp.float32)
  scores = jnp.einsum(
    'bqhd,bkhd->bhqk', query, key, preferred_element_type=wide
  )
  weights = kernels.softmax(scores, scale=query.shape[-1] ** -0.5)
  return jnp.einsum('bhqk,bkhd->bqhd', weights.astype(value.dtype), value)


ATTENTIONS = {
  'dot_product': jax.nn.dot_product_attention,
  'softmax': _softmax_attention,
}


def _each(layer, x):
  """layer(x) of each token [B, N, D]; as rows, whose gradients are faster."""
  return layer(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)


def _norm(width, **kwargs) -> nnx.LayerNorm:
  return nnx.LayerNorm(width, epsilon=1e-6, **kwargs)


def _skip(branch, rate, rngs):
  """[B, N, D], 0 for a share of `rate` of the examples, the rest scaled up."""
  stays = jax.random.bernoulli(
    rngs.dropout(), 1 - rate, (branch.shape[0], 1, 1)
  )
  return branch * (stays / (1 - rate)).astype(branch.dtype)


def _grid(image_shape, patch_size) -> tuple[int, int]:
  """Rows and columns of patches."""
  layers.check_image_shape(image_shape)
  height, width, _ = image_shape
  if height % patch_size or width % patch_size:
    raise ValueError(
      f'image_shape {tuple(image_shape)} does not divide into patches of '
      f'patch_size {patch_size}'
    )
  return height // patch_size, width // patch_size
