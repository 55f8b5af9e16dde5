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
