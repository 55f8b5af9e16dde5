"""Autoencoders: an image to a code of a few numbers, and back.

Linear, dense, convolutional and variational, after the papers in VARIANTS, and
all of them denoising (Vincent et al. 2008).

Shapes: B batch, H W C image, D = prod(image_shape) numbers an image, Z code.
"""

from collections.abc import Sequence
import math

from flax import nnx
import jax
import jax.numpy as jnp

from models import layers

# The hidden layers of the encoder, those of the decoder in reverse; what they
# are; whether the code is a number or the mean and variance of one.
VARIANTS = {
  # Spans the same subspace as PCA: Baldi & Hornik (1989).
  'linear': {'widths': (), 'convolve': False, 'gaussian': False},
  # Hinton & Salakhutdinov (2006), figure 1, with ReLU in place of pre-training
  # layer by layer; there the units are logistic, and the code linear as here.
  'dense': {'widths': (1000, 500, 250), 'convolve': False, 'gaussian': False},
  # After Masci et al. (2011), with a dense code. The decoder resizes and
  # convolves, which leaves no checkerboard: Odena et al. (2016).
  'conv': {'widths': (32, 64), 'convolve': True, 'gaussian': False},
  # Kingma & Welling (2014), section 5 on MNIST, there with tanh.
  'variational': {'widths': (500,), 'convolve': False, 'gaussian': True},
}


class Autoencoder(nnx.Module):
  """Image to code and back: [B, *image_shape] -> [B, *image_shape].

  The outputs have no activation: they are logits where the loss is
  sigmoid_binary_cross_entropy. `blocks` are those of `mlp`, or of `cnn` with
  norm=None, of the same widths, so either can start from this one's.

  Args:
    image_shape: of one example; (H, W, C) for 'conv', which halves H and W at
      each of its widths, else any, as (D,) for a row of features.
    variant: a name in VARIANTS.
    code_size: Z.
    widths: units, or channels, of the hidden layers up to the code; None for
      the variant's own.
    activation: after each hidden layer; the code has none.
    corruption: share of the numbers of an image that training sets to zero,
      while the loss compares with the whole image. Each falls on its own; in
      the paper their number is fixed.
    beta: factor on the variational penalty (Higgins et al. 2017).
  """

  def __init__(
    self,
    image_shape: Sequence[int] = (28, 28, 1),
    *,
    variant: str = 'dense',
    code_size: int = 32,
    widths: Sequence[int] | None = None,
    activation: str = 'relu',
    corruption: float = 0.0,
    beta: float = 1.0,
    dtype=None,
    param_dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    entry = layers.lookup('variant', variant, VARIANTS)
    widths = entry['widths'] if widths is None else widths
    layers.check_sizes(
      image_shape=image_shape, code_size=code_size, widths=widths
    )
    if not isinstance(widths, tuple | list):
      raise ValueError(f'widths is {widths!r}; it takes a tuple, as 64,128')
    if variant == 'linear' and widths:
      raise ValueError(
        f"widths is {tuple(widths)}; variant 'linear' has no hidden layers"
      )
    _check_number('corruption', corruption, 1, 'a share from 0 to 1')
    _check_number('beta', beta, math.inf, 'a number of at least 0')
    self.image_shape = tuple(image_shape)
    self.convolve, self.gaussian = entry['convolve'], entry['gaussian']
    self.corruption, self.beta = corruption, beta
    self.activation = layers.activation(activation)
    kwargs = {'dtype': dtype, 'param_dtype': param_dtype, 'rngs': rngs}
    if self.convolve:
      self.small_shape = _small_shape(self.image_shape, widths)
      sizes = (self.image_shape[-1], *widths)
      self.blocks = nnx.List(_convolutions(sizes, **kwargs))
      flat = math.prod(self.small_shape)
      *decoder, self.head = (
        nnx.Linear(code_size, flat, **kwargs),
        *_convolutions(sizes[::-1], **kwargs),
      )
    else:
      sizes = (math.prod(self.image_shape), *widths)
      self.blocks = nnx.List(_dense(sizes, **kwargs))
      flat = sizes[-1]
      *decoder, self.head = _dense((code_size, *sizes[::-1]), **kwargs)
    codes = 2 * code_size if self.gaussian else code_size
    self.code = nnx.Linear(flat, codes, **kwargs)
    self.decoder = nnx.List(decoder)

  def encode(self, image: jax.Array) -> jax.Array:
    """[B, *image_shape] -> [B, Z]; of 'variational' the mean."""
    return self.gaussian_code(image)[0] if self.gaussian else self._code(image)

  def gaussian_code(self, image: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[B, *image_shape] -> mean and log variance [B, Z] of 'variational'."""
    return tuple(jnp.split(self._code(image), 2, axis=-1))

  def decode(self, code: jax.Array) -> jax.Array:
    """[B, Z] -> [B, *image_shape]; of a standard normal code, a new image."""
    x = code
    if not self.convolve:
      for layer in self.decoder:
        x = self.activation(layer(x))
      return self.head(x).reshape(-1, *self.image_shape)
    x = self.activation(self.decoder[0](x)).reshape(-1, *self.small_shape)
    for layer in self.decoder[1:]:
      x = self.activation(layer(_doubled(x)))
    return self.head(_doubled(x))

  def __call__(self, image: jax.Array, *, train=False, rngs=None):
    """The reconstruction, and of 'variational' also the penalty [B].

    The penalty is beta KL(code || standard normal) / D, for a loss that is a
    mean over D numbers: D times their sum is the negative ELBO in nats where
    beta is 1 and the loss sigmoid_binary_cross_entropy. In training the code is
    drawn and the image corrupted, by rngs.dropout(); in evaluation the code is
    the mean, so that the loss is the same each time (and lower than the ELBO's,
    which is an expectation over codes).
    """
    if train and self.corruption:
      kept = jax.random.bernoulli(
        rngs.dropout(), 1 - self.corruption, image.shape
      )
      image = jnp.where(kept, image, 0)
    if not self.gaussian:
      return self.decode(self.encode(image))
    mean, log_variance = self.gaussian_code(image)
    code = mean
    if train:
      noise = jax.random.normal(rngs.dropout(), mean.shape, mean.dtype)
      code = mean + jnp.exp(log_variance / 2) * noise
    penalty = self.beta * kl_divergence(mean, log_variance)
    return self.decode(code), penalty / math.prod(self.image_shape)

  def _code(self, image):
    """What the layer before the decoder gives: [B, Z], or [B, 2 Z]."""
    x = image if self.convolve else image.reshape(image.shape[0], -1)
    for block in self.blocks:
      x = self.activation(block(x))
      if self.convolve:
        x = layers.max_pool(x)
    return self.code(x.reshape(x.shape[0], -1))


def kl_divergence(mean: jax.Array, log_variance: jax.Array) -> jax.Array:
  """KL(normal(mean, variance) || normal(0, 1)) in nats: [B, Z] -> float [B].

  Kingma & Welling (2014), appendix B.
  """
  mean, log_variance = (
    x.astype(jnp.promote_types(x.dtype, jnp.float32))
    for x in (mean, log_variance)
  )
  each = jnp.square(mean) + jnp.exp(log_variance) - 1 - log_variance
  return each.sum(-1) / 2


def _dense(sizes, **kwargs) -> list[nnx.Linear]:
  pairs = zip(sizes[:-1], sizes[1:], strict=True)
  return [nnx.Linear(*pair, **kwargs) for pair in pairs]


def _convolutions(sizes, **kwargs) -> list[nnx.Conv]:
  pairs = zip(sizes[:-1], sizes[1:], strict=True)
  return [layers.Conv(*pair, (3, 3), **kwargs) for pair in pairs]


def _doubled(image):
  """[B, H, W, C] -> [B, 2 H, 2 W, C], each pixel four times."""
  return image.repeat(2, axis=1).repeat(2, axis=2)


def _small_shape(image_shape, widths) -> tuple[int, int, int]:
  """The shape of what the last block gives."""
  layers.check_image_shape(image_shape)
  if not widths:
    raise ValueError("widths is (); variant 'conv' needs one or more")
  height, width, _ = image_shape
  factor = 2 ** len(widths)
  if height % factor or width % factor:
    raise ValueError(
      f'image_shape {image_shape} cannot be halved {len(widths)} times, once '
      f'for each of widths {tuple(widths)}: height and width must be multiples '
      f'of {factor}'
    )
  return height // factor, width // factor, widths[-1]


def _check_number(name, value, highest, words):
  if type(value) not in (int, float) or not 0 <= value <= highest:
    raise ValueError(f'{name} is {value!r}; it takes {words}')
