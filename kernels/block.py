"""A block of the TPU's convolution without its copies, to be compiled alone.

libtpu gives no cycles of a convolution of several blocks. In those of one it
counts the copies before and after the work, which in a longer run go beside the
work on other blocks. So here a block's operands are on the chip from the start.
"""

from collections.abc import Sequence
import math

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import numpy as np

from kernels import cases
from kernels.ops.convolution import pallas_tpu
from kernels.ops.convolution import shapes

_TILE = (8, 128)


def count(shape: Sequence[int]) -> int:
  """The blocks of a case of cases.CONVOLUTIONS."""
  images, rows, columns = _laid_out(shape)
  held = shapes.tpu_held(rows, columns, shape[4], np.dtype(cases.DTYPE))
  return math.ceil(shape[0] / images) * math.ceil(rows / held)


def compiled(devices, op, shape):
  """compile.Request's entry: the first block of a case, forward."""
  del devices
  *_, height, width, channels, features, taps = shape
  images, rows, columns = _laid_out(shape)
  dtype = jnp.dtype(cases.DTYPE)
  held = shapes.tpu_held(rows, columns, features, dtype)
  single, before, after = taps == 1, op == 'conv2d_stats', op == 'conv2d'
  settings = pallas_tpu.Settings(
    strides=(1, 1),
    padding=((taps - 1) // 2,) * 2,
    in_scale=before,
    in_shift=before,
    in_activation='relu' if before else None,
    scale=after,
    shift=after,
    residual=False,
    activation='relu' if after else None,
    statistics=before,
    sizes=(held, 1) if single else (height, width),
    images=images,
    rows=held if single else rows,
    single=single,
  )
  image = (held, 1) if single else (height, width)
  x = pltpu.VMEM((1, 1, *image, images, channels), dtype)
  y = pltpu.VMEM((held, columns, images, features), dtype)
  affine = pltpu.VMEM((1, channels if before else features), jnp.float32)
  of_tile = pltpu.VMEM((1, 1, 8, features), jnp.float32)
  scratch = [
    y, x, pltpu.VMEM((taps, taps, channels, features), dtype), affine, affine
  ]  # fmt: skip
  if before:
    scratch += [of_tile, of_tile, x]

  def body(_, out_ref, y_ref, x_ref, w_ref, scale, shift, *others):
    pallas_tpu.kernel(settings, x_ref, w_ref, scale, shift, y_ref, *others)
    out_ref[...] = y_ref[0, 0, : _TILE[0], : _TILE[1]]

  def function(anything):
    spec = pl.BlockSpec(_TILE, lambda *_: (0, 0))
    return pl.pallas_call(
      body,
      out_shape=jax.ShapeDtypeStruct(_TILE, dtype),
      grid=(1, 1),
      in_specs=[spec],
      out_specs=spec,
      scratch_shapes=scratch,
      compiler_params=pltpu.CompilerParams(
        vmem_limit_bytes=2 * shapes.TPU_BYTES - 2**24
      ),
      name=op,
    )(anything)

  return function, (jax.ShapeDtypeStruct(_TILE, dtype),)


def _laid_out(shape):
  """Images of a block, rows and columns of the output, as forward has it."""
  _, height, width, *_, taps = shape
  rows, columns = (height * width, 1) if taps == 1 else (height, width)
  return shapes.tpu_images(np.dtype(cases.DTYPE)), rows, columns
