"""The sizes of softmax's blocks, and what its kernels do not take."""

from jax.experimental.pallas import mosaic_gpu as plgpu
import numpy as np

from kernels import blocks

LONGEST = 262144
# Elements of a TPU's block of short rows, and of a loop's body in long ones:
# 256 vector registers of float32, where a body of 16 took three times as long.
TPU_ELEMENTS = 2**18
# Elements of a TPU's largest block, six of which must fit with what is beside.
TPU_LARGEST = 2**21
# Elements of a GPU's row that one warpgroup holds in registers, 64 a thread.
GPU_ELEMENTS = 8192
WARPGROUP = 128


def refusal(
  implementation: str, columns: int, dtype: np.dtype, *, masked: bool
) -> str | None:
  """Why a kernel cannot take rows of that many columns, or None."""
  if dtype == np.float64:
    return 'float64 is for xla'
  if columns > LONGEST:
    return f'a row has {columns} columns, and the kernel holds {LONGEST}'
  if implementation == 'pallas_tpu' and dtype == np.float16:
    return 'Mosaic TPU loads no float16'
  wide = masked or dtype.itemsize > 2
  if implementation == 'pallas_tpu' and wide and columns > LONGEST // 2:
    # Eight rows and what XLA keeps beside them were more than the memory.
    return (
      f'a row of {dtype} has {columns} columns, and the kernel holds'
      f' {LONGEST // 2} of float32 or under `where`'
    )
  if implementation.startswith('pallas_gpu'):
    if columns % WARPGROUP:
      return f'{columns} columns are not a multiple of {WARPGROUP}'
    if implementation.endswith('interpret') and not hasattr(
      plgpu, 'InterpretGPUParams'
    ):
      return 'jax interprets Mosaic GPU from 0.11 on'
  return None


def tpu_rows(rows: int, columns: int, dtype: np.dtype, masked: bool) -> int:
  """The rows of a TPU's block, whose columns are the whole row.

  As tuned, or a multiple of the rows in a tile of the narrowest operand; of the
  longest eight, which are slower, as the blocks would fill the chip's memory.
  """
  if tuned := blocks.tuned('softmax', dtype, columns):
    return min(tuned[0], rows)
  lanes = -(-columns // 128) * 128
  tile = 32 if masked else 32 // dtype.itemsize
  fitting = TPU_ELEMENTS // lanes // tile * tile
  return min(fitting or (tile if tile * lanes <= TPU_LARGEST else 8), rows)


def tpu_width(rows: int, columns: int) -> int:
  """The columns of a block [rows, columns] that a loop's body takes at once."""
  if rows * columns <= 2 * TPU_ELEMENTS:
    return columns
  return max(TPU_ELEMENTS // rows // 128 * 128, 128)


def gpu_width(columns: int, *, log: bool, masked: bool) -> int:
  """The columns of a GPU's row that a loop's body takes at once."""
  # The logarithm under `where` spilled with 64 elements a thread, by the
  # compiler's count, and with a causal mask had one register left.
  most = GPU_ELEMENTS * 3 // 4 if log and masked else GPU_ELEMENTS
  return columns if columns <= most else GPU_ELEMENTS // 2
