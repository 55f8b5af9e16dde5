"""The chips that are compiled for without having them, and their peak rates."""

from collections.abc import Mapping
import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
  """One device.

  Attributes:
    kind: as jax's device_kind says it.
    topology: the smallest slice of them that libtpu compiles for.
    accelerator: the same for libtpu's environment.
    bandwidth: of its memory, bytes a second.
    flops: of bfloat16 products, a second.
    clock: of the cycles in libtpu's static profile, a second: the rate at which
      a product of 4096 x 4096 x 4096 comes to 97 % (v5e) and 94 % (v6e) of
      `flops`; 0 where it was not found out.
    memory: bytes, those of a TPU that a program can have.
    link: one of its links to a neighbour, one way, bytes a second.
    slower: dtype -> the rate of its products, where it is another.
    most: chips of the largest slice, or GPUs of a host.
  """

  kind: str
  topology: str
  accelerator: str
  bandwidth: float
  flops: float
  clock: float
  memory: float = 0
  link: float = 0
  slower: Mapping[str, float] = dataclasses.field(default_factory=dict)
  most: int = 1


# cloud.google.com/tpu/docs/v4, /v5e, /v5p and /v6e. They give what all links of
# a chip carry both ways (v5e 400 GB/s, v6e 800, v5p 1200; v4 2400 Gb/s one way)
# over 4 links in two dimensions (v5e, v6e) or 6 in three. Of their memory it is
# what libtpu leaves to a program. By default products of float32 are computed
# as those of bfloat16.
TPUS = {
  'v4': Chip(
    'TPU v4', 'v4:2x2x1', 'v4-8', 1228e9, 275e12, 0, 30.75 * 2**30, 50e9,
    most=4096,
  ),
  'v5e': Chip(
    'TPU v5 lite', 'v5e:2x2', 'v5litepod-4', 819e9, 197e12, 1.5e9,
    15.75 * 2**30, 50e9, most=256,
  ),
  'v5p': Chip(
    'TPU v5', 'v5p:2x2x1', 'v5p-8', 2765e9, 459e12, 0, 95 * 2**30, 100e9,
    most=6144,
  ),
  'v6e': Chip(
    'TPU v6 lite', 'v6e:2x2', 'v6e-4', 1640e9, 918e12, 1.75e9, 31.24 * 2**30,
    100e9, most=256,
  ),
}  # fmt: skip
# Those whose cycles are known.
CHIPS = {name: chip for name, chip in TPUS.items() if chip.clock}
# NVIDIA's data sheets of H100 SXM and H200 SXM, dense; products of float32 are
# TF32's by default. Of NVLink's 900 GB/s, both ways, half is one way.
_TENSOR_CORES = {'float32': 494.5e12, 'float64': 67e12}
GPU_CHIPS = {
  'h100': Chip(
    'NVIDIA H100 80GB HBM3', '', '', 3350e9, 989e12, 0, 80e9, 450e9,
    _TENSOR_CORES, most=8,
  ),
  'h200': Chip(
    'NVIDIA H200', '', '', 4800e9, 989e12, 0, 141e9, 450e9, _TENSOR_CORES,
    most=8,
  ),
}  # fmt: skip
_HOPPER = """
    gpu_device_info {
      cuda_compute_capability { major: 9 } core_count: 132 fpus_per_core: 128
      clock_rate_ghz: 1.98 memory_bandwidth: %d
      device_memory_size: %d l2_cache_size: %d
      threads_per_warp: 32 threads_per_block_limit: 1024
      threads_per_core_limit: 2048 shared_memory_per_block: 49152
      shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
      registers_per_block_limit: 65536 registers_per_core_limit: 65536
      block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
      block_dim_limit_z: 65535
    }
    runtime_version { major: 13 } dnn_version_info { major: 9 minor: 10 }
    platform_name: "CUDA" device_description_str: "%s"
"""
# What XLA compiles for, its GpuTargetConfig in text.
GPUS = {
  'h200': _HOPPER
  % (4_800_000_000_000, 150_754_820_096, 62_914_560, 'NVIDIA H200'),
  'h100': _HOPPER
  % (3_350_000_000_000, 84_942_979_072, 52_428_800, 'NVIDIA H100 80GB HBM3'),
}
