"""Block sizes of the kernels, and which operands they cannot take."""

from collections.abc import Iterator

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from kernels import blocks
from kernels import sharding

DTYPES = ('float32', 'bfloat16', 'float16')
LANES = 128
# Elements of a block on a TPU: 4 MB in float32, and twice that in VMEM. With
# half of it a TPU v5e takes 1.2 times as long, by the compiler's estimate.
TPU_BLOCK = 2**20
TPU_COLUMNS = 4096
# Rows whose running statistics stay in registers: with 64 at a time a TPU v5e
# takes 1.11 times as many cycles, by the compiler's estimate.
TPU_ROWS_AT_ONCE = 32
# A warpgroup's threads, and how many elements each loads at once.
GPU_THREADS = 128
GPU_LOADS = 32


def refusal(implementation: str, logits: jax.Array) -> str | None:
  """Why a kernel cannot take logits [..., K], or None where it can."""
  dtype = jnp.dtype(logits.dtype).name
  if dtype not in DTYPES:
    return f'the logits are {dtype}; it takes {", ".join(DTYPES)}'
  if implementation == 'pallas_tpu' and dtype == 'float16':
    # It lowers, and the compiler's own check of the loads then fails.
    return 'Mosaic TPU loads no float16; it takes float32 and bfloat16'
  if implementation == 'pallas_gpu_interpret' and not hasattr(
    plgpu, 'InterpretGPUParams'
  ):
    return f'jax {jax.__version__} cannot interpret it, 0.11 and later can'
  return sharding.refusal(logits)


def tpu_block(rows: int, columns: int, dtype: jnp.dtype) -> tuple[int, int]:
  """(rows, columns) of a block: whole rows up to TPU_COLUMNS, or as tuned."""
  tuned = blocks.tuned('cross_entropy', dtype, columns)
  most, widest = tuned or (None, TPU_COLUMNS)
  columns = min(_up(columns, LANES), widest)
  most = most or max(TPU_ROWS_AT_ONCE, min(512, TPU_BLOCK // columns))
  # 16 rows are one tile of bfloat16.
  rows = _up(rows, 16)
  if rows > TPU_ROWS_AT_ONCE:
    rows = _up(rows, TPU_ROWS_AT_ONCE)
  return min(rows, most), columns


def gpu_columns(columns: int) -> int:
  """The multiple of a warpgroup's threads to which rows are padded."""
  return _up(columns, GPU_THREADS)


def gpu_tiles(columns: int, itemsize: int) -> Iterator[tuple[int, int, int]]:
  """(start, width, how many) of the runs of tiles that make up a row.

  Args:
    columns: a multiple of GPU_THREADS.
    itemsize: bytes an element.
  """
  start = 0
  # Loads of 16 bytes a thread where they fit, then of fewer.
  each = 16 // itemsize
  while each:
    width = GPU_THREADS * each
    count = (columns - start) // width
    if count:
      yield start, width, count
    start += width * count
    each //= 2


def _up(number, multiple):
  return -(-number // multiple) * multiple
