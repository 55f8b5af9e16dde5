"""How many rows' logits there are at once."""

# Logits of a chunk: 64 MB in float32.
ELEMENTS = 2**24


def chunks(rows: int, width: int, classes: int) -> tuple[int, int]:
  """(how many, rows of each), which together may hold more than there are.

  A chunk's logits take 64 MB, or, where the kernel [width, classes] is larger,
  a quarter of its gradient in float32: a product of fewer rows would wait for
  the kernel to be read.
  """
  most = max(ELEMENTS // classes, width // 4, 1)
  count = max(-(-rows // most), 1)
  # Without a remainder nothing is padded.
  for more in range(count, 2 * count):
    if rows % more == 0:
      return more, rows // more
  return count, -(-rows // count)
