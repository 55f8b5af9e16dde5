"""What the convolution's kernels do not take, and the sizes of their blocks."""

from collections.abc import Sequence
import math

from jax.experimental.pallas import mosaic_gpu as plgpu
import numpy as np

from kernels import dispatch

# In jax's device_kind; wgmma is of these alone.
HOPPER = ('H100', 'H200', 'H20', 'GH200')

# Elements of float32 that a TPU's products add up to at once.
TPU_ELEMENTS = 2**19
# Channels that fill the v6e's matrix unit; the v5e's has half. With fewer, all
# places go into one product: of 128, 23 thousand cycles and not 29.
TPU_DEPTH = 256
# Elements of a TPU's block of outputs.
TPU_BLOCK = 2**21
# Bytes of a TPU's memory for blocks: half, as XLA wants some for itself.
TPU_BYTES = 64 * 2**20


def refusal(
  implementation: str,
  x_shape: Sequence[int],
  w_shape: Sequence[int],
  dtype: np.dtype,
  *,
  strides: Sequence[int],
  padding: Sequence[tuple[int, int]],
  dilation: Sequence[int],
  groups: int,
) -> str | None:
  """Why a kernel cannot take these, or None."""
  if groups != 1:
    return f'groups is {groups}, and the kernel has one'
  if tuple(dilation) != (1, 1):
    return f'dilation is {tuple(dilation)}, and the kernel has none'
  if dtype == np.float64:
    return 'float64 is for xla'
  if implementation.startswith('pallas_gpu'):
    if dtype == np.float32:
      return 'the tensor cores would round float32 to 10 bits'
    platform, kind = dispatch.chip()
    if platform in ('gpu', 'cuda') and not any(name in kind for name in HOPPER):
      return f'it is for Hopper, {", ".join(HOPPER)}, and this is {kind}'
    pixels = x_shape[0] * math.prod(
      size + sum(pads) for size, pads in zip(x_shape[1:3], padding, strict=True)
    )
    if pixels >= 2**31:
      return f'{pixels} pixels are more than an index of 32 bits'
    if implementation.endswith('interpret') and not hasattr(
      plgpu, 'InterpretGPUParams'
    ):
      return 'jax interprets Mosaic GPU from 0.11 on'
    return None
  if dtype == np.float16:
    return 'Mosaic TPU loads no float16'
  needed = tpu_bytes(x_shape, w_shape, dtype, strides, padding)
  if needed > TPU_BYTES:
    return (
      f'images of {"x".join(map(str, x_shape[1:]))} and these weights need'
      f' {needed / 2**20:.0f} MiB at once, and the kernel has'
      f' {TPU_BYTES / 2**20:.0f}'
    )
  return None


def output_size(
  sizes: Sequence[int],
  kernel: Sequence[int],
  strides: Sequence[int],
  padding: Sequence[tuple[int, int]],
) -> tuple[int, ...]:
  """H', W'; without dilation."""
  return tuple(
    (size + low + high - steps) // stride + 1
    for size, steps, stride, (low, high) in zip(
      sizes, kernel, strides, padding, strict=True
    )
  )


def tpu_images(dtype: np.dtype) -> int:
  """The images of a TPU's block: rows of one tile, as H and W lie outside."""
  return 32 // dtype.itemsize


def tpu_held(rows: int, columns: int, features: int, dtype: np.dtype) -> int:
  """The rows of outputs in a TPU's block, as even as can be."""
  row = columns * tpu_images(dtype) * _lanes(features)
  blocks = math.ceil(rows * row / TPU_BLOCK)
  return math.ceil(rows / min(blocks, rows))


def tpu_rows(columns: int, features: int, dtype: np.dtype) -> int:
  """The rows of outputs that a TPU's products compute at once."""
  row = columns * tpu_images(dtype) * _lanes(features)
  return max(1, TPU_ELEMENTS // row)


def tpu_bytes(x_shape, w_shape, dtype, strides, padding) -> int:
  """The most that blocks take of a TPU's memory, all operands given."""
  rows, columns = output_size(x_shape[1:3], w_shape[:2], strides, padding)
  pixels = math.prod(x_shape[1:3])
  single = tuple(w_shape[:2]) == (1, 1) and not any(map(sum, padding))
  if single:
    rows, columns = rows * columns, 1
  held = tpu_held(rows, columns, w_shape[3], dtype)
  pixels = held if single else pixels
  images, size = tpu_images(dtype), dtype.itemsize
  channels, features = _lanes(x_shape[3]), _lanes(w_shape[3])
  # Two of each block, one of which is copied; x once more behind the prologue.
  blocks = 3 * pixels * channels + 4 * held * columns * features
  weights = 2 * math.prod(w_shape[:2]) * max(w_shape[2], 8) * features
  return (blocks * images + weights) * size + 8 * TPU_ELEMENTS


def _lanes(size):
  return max(-(-size // 128), 1) * 128
