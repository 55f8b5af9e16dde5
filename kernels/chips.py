"""The chips that are compiled for without having them, and their peak rates."""

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
      `flops`.
  """

  kind: str
  topology: str
  accelerator: str
  bandwidth: float
  flops: float
  clock: float


# Bandwidth and flops: cloud.google.com/tpu/docs/v5e and /v6e.
CHIPS = {
  'v5e': Chip('TPU v5 lite', 'v5e:2x2', 'v5litepod-4', 819e9, 197e12, 1.5e9),
  'v6e': Chip('TPU v6 lite', 'v6e:2x2', 'v6e-4', 1640e9, 918e12, 1.75e9),
}
# What XLA compiles for, its GpuTargetConfig in text.
GPUS = {
  'h200': """
    gpu_device_info {
      cuda_compute_capability { major: 9 } core_count: 132 fpus_per_core: 128
      clock_rate_ghz: 1.98 memory_bandwidth: 4800000000000
      device_memory_size: 150754820096 l2_cache_size: 62914560
      threads_per_warp: 32 threads_per_block_limit: 1024
      threads_per_core_limit: 2048 shared_memory_per_block: 49152
      shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
      registers_per_block_limit: 65536 registers_per_core_limit: 65536
      block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
      block_dim_limit_z: 65535
    }
    runtime_version { major: 13 } dnn_version_info { major: 9 minor: 10 }
    platform_name: "CUDA" device_description_str: "NVIDIA H200"
  """,
}
