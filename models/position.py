"""Positions of an image's patches: fixed ones, and learned ones resized.

Shapes: N tokens, D width; a grid is (rows, columns) of patches.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np


def sincos2d(grid: tuple[int, int], width: int) -> np.ndarray:
  """Sines and cosines of x and of y, a quarter of D each: float32 [N, D].

  Waves from 2 pi to 20,000 pi patches long, in a geometric series, as Chen et
  al. (2021) and, with both ends in it, Beyer et al. (2022) have them.

  Raises:
    ValueError: D does not divide by 4, or holds no two waves.
  """
  if width % 4 or width < 8:
    raise ValueError(
      f"width is {width}; position 'sincos2d' takes multiples of 4 from 8 up"
    )
  waves = 10_000.0 ** -np.linspace(0, 1, width // 4)
  y, x = np.indices(grid).reshape(2, -1, 1) * waves
  table = np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], axis=1)
  return table.astype(np.float32)


def resize_positions(
  table: jax.Array | np.ndarray,
  from_grid: tuple[int, int],
  to_grid: tuple[int, int],
) -> jax.Array:
  """Learned positions [N, D] of one grid for another: [N', D].

  Rows before the grid's own, as a class token's, stay as they are. Bicubic, and
  smoothed first where the grid shrinks, as timm does (Dosovitskiy et al. 2021,
  section 3.2, say bilinear).

  Raises:
    ValueError: the table has fewer rows than `from_grid` has patches.
  """
  before = table.shape[0] - math.prod(from_grid)
  if before < 0:
    raise ValueError(
      f'positions of shape {table.shape} are too few for a grid of '
      f'{from_grid[0]}x{from_grid[1]}'
    )
  if tuple(from_grid) == tuple(to_grid):
    return jnp.asarray(table)
  width = table.shape[1]
  image = jnp.asarray(table[before:]).reshape(*from_grid, width)
  image = jax.image.resize(image, (*to_grid, width), 'bicubic')
  return jnp.concatenate([table[:before], image.reshape(-1, width)])
