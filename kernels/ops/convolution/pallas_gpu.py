"""Convolution for Mosaic GPU: an implicit product on Hopper's tensor cores.

A block takes tiles of 256 output pixels by 64 or 128 filters in turn. For one
tap and a few channels after another it fetches the window of x that the pixels
see and the slice of w, some steps ahead and past the end of a tile, and each of
two warpgroups multiplies one half of the pixels. What a window has beyond x the
hardware fetches as zeros, so that nothing is padded or copied outside.
"""

import functools
import math

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np

from kernels.ops.convolution import activations
from kernels.ops.convolution import gpu_plan
from kernels.ops.convolution import shapes

_WGMMA = plgpu.Layout.WGMMA


def forward(
  x: jax.Array,
  w: jax.Array,
  *,
  strides: tuple[int, int],
  padding: tuple[tuple[int, int], tuple[int, int]],
  in_scale: jax.Array | None,
  in_shift: jax.Array | None,
  in_activation: str | None,
  scale: jax.Array | None,
  shift: jax.Array | None,
  residual: jax.Array | None,
  activation: str | None,
  statistics: bool,
  interpret: bool,
):
  """The convolution y [N, Ho, Wo, F] of x's dtype.

  Args:
    x: [N, H, W, C], bfloat16 or float16; in_activation(x * in_scale +
      in_shift) takes its place, rounded to its dtype.
    w: [I, J, C, F].
    strides: of the rows and of the columns.
    padding: (low, high) of zeros, of the rows and of the columns.
    in_scale: float32 [C] or None.
    in_shift: float32 [C] or None.
    in_activation: of activations.ACTIVATIONS.
    scale: float32 [F] or None; y is activation(convolution * scale + shift +
      residual), rounded once.
    shift: float32 [F] or None.
    residual: [N, Ho, Wo, F] or None.
    activation: of activations.ACTIVATIONS.
    statistics: with y return, of T tiles of pixels, how many each has, float32
      [T]; the sums of y as rounded, float32 [T, F]; and those of the squares of
      its differences from the tile's mean.
    interpret: on any platform, slowly.
  """
  count, *_, channels = x.shape
  filters = w.shape[3]
  out = shapes.output_size(x.shape[1:3], w.shape[:2], strides, padding)
  lows = tuple(low for low, _ in padding)
  prologue = not (in_scale is in_shift is in_activation is None)
  affine = gpu_plan.pair(in_scale, in_shift, channels) if prologue else None
  folded = gpu_plan.folded_shape(w.shape, strides, lows)
  if 2 * gpu_plan.terms(folded) <= gpu_plan.terms(w.shape):
    # Of the few channels of an image a step would be mostly zeros.
    if prologue:
      wide = x.astype(jnp.float32) * affine[0] + affine[1]
      x = activations.activate(in_activation, wide).astype(x.dtype)
      affine = None
    x, w, lows = gpu_plan.folded(x, w, strides, lows)
    strides = (1, 1)
  pixels = (count, *out)
  alone = w.shape[:2] == strides == (1, 1) and not any(lows)
  if alone and x.shape[:3] == pixels:
    # A pixel of y sees one of x, and all do: a product of matrices.
    pixels = (1, 1, math.prod(pixels))
    x = x.reshape(*pixels, x.shape[3])
  plan = gpu_plan.Plan(
    pixels=pixels,
    size=x.shape[1:3],
    taps=w.shape[:2],
    strides=strides,
    lows=lows,
    channels=x.shape[3],
    filters=filters,
    box=gpu_plan.box(pixels),
    in_activation=in_activation,
    activation=activation,
    prologue=affine is not None,
    affine=scale is not None or shift is not None,
    residual=residual is not None,
    statistics=statistics,
    interpret=interpret,
  )
  operands = [gpu_plan.parted(x, plan), gpu_plan.flattened(w, plan)]
  if plan.prologue:
    operands.append(
      gpu_plan.padded(affine, (0, plan.depth * plan.channel_steps))
    )
  if plan.affine:
    wide = gpu_plan.pair(scale, shift, filters)
    operands.append(gpu_plan.padded(wide, (0, plan.width * plan.column_tiles)))
  if plan.residual:
    rows = residual.reshape(*pixels, filters)
    operands.append(gpu_plan.padded(rows, (0, 0, 0, plan.stored)))
  y, *sums = _call(operands, plan)
  y = y[..., :filters].reshape(count, *out, filters)
  if not statistics:
    return y
  return y, jnp.asarray(plan.counts()), *(one[:, :filters] for one in sums)


def _call(operands, plan):
  """y [N, Ho, Wo, F], F a multiple of 8, and the statistics' sums."""
  dtype = operands[0].dtype
  out_type = [jax.ShapeDtypeStruct((*plan.pixels, plan.stored), dtype)]
  names = ['x', 'w']
  names += ['in_affine'] * plan.prologue + ['affine'] * plan.affine
  names += ['residual'] * plan.residual + ['y']
  if plan.statistics:
    shape = (len(plan.counts()), plan.width * plan.column_tiles)
    out_type += [jax.ShapeDtypeStruct(shape, jnp.float32)] * 2
    names += ['sums', 'squares']
  scratch = gpu_plan.scratch(plan, dtype)
  body = functools.partial(_kernel, names=(*names, *scratch), plan=plan)
  return plgpu.kernel(
    body,
    out_type=out_type,
    scratch_types=list(scratch.values()),
    grid=(plan.programs,),
    grid_names=('program',),
    num_threads=2,
    thread_name='warpgroup',
    compiler_params=plgpu.CompilerParams(
      # The default from jax 0.12 on, Warpgroup, has no erf.
      lowering_semantics=plgpu.LoweringSemantics.Lane
    ),
    interpret=plgpu.InterpretGPUParams() if plan.interpret else None,
  )(*operands)


def _kernel(*refs, names, plan):
  refs = dict(zip(names, refs, strict=True))
  for name in ('a', 'out'):
    boxes, rows = (None, refs[name]) if plan.interpret else refs[name]
    refs |= {name: rows, f'{name}_boxes': boxes}
  warpgroup = lax.axis_index('warpgroup')
  program = lax.axis_index('program')
  tiles = gpu_plan.divided(plan.tiles - 1 - program, plan.programs)[0] + 1
  steps = tiles * plan.steps

  def fetch(step):
    before, k = gpu_plan.divided(step, plan.steps)
    _, slot = gpu_plan.divided(step, plan.slots)
    _fetch(refs, plan, program + before * plan.programs, k, slot)

  def free(step):
    """After this warpgroup's product of that step: its slot is for another."""
    _, slot = gpu_plan.divided(step, plan.slots)
    plgpu.barrier_arrive(refs['empty'].at[slot])

    # A third warpgroup that fetches would leave 168 registers to each: what
    # links the kernel ignores set_max_registers.
    @pl.when((warpgroup == 0) & (step + plan.slots < steps))
    def _():
      plgpu.barrier_wait(refs['empty'].at[slot])
      fetch(step + plan.slots)

  def compute(i, _):
    tile = program + i * plan.programs
    _compute(refs, plan, warpgroup, tile, i * plan.steps, free)

  @pl.when(warpgroup == 0)
  def _():
    first = jnp.minimum(steps, plan.slots)
    lax.fori_loop(np.int32(0), first, lambda step, _: fetch(step), None)

  if plan.statistics:

    @pl.when(warpgroup == 1)
    def _():
      plgpu.barrier_arrive(refs['turn'].at[0])

  lax.fori_loop(np.int32(0), tiles, compute, None)
  plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _fetch(refs, plan, tile, step, slot):
  """Starts the copies of a tile's step."""
  _, start, column = plan.place(tile)
  full = refs['full'].at[slot]
  tap, channel = plan.tap(step)
  first, parts = [start[0]], []
  for axis in (0, 1):
    stride, front = plan.strides[axis], plan.fronts[axis]
    at = tap[axis] + front * stride - plan.lows[axis]
    # The interpreter takes no negative index: there x is padded in front.
    before = 0 if plan.interpret else front
    at, part = gpu_plan.divided(at, stride)
    first.append(start[1 + axis] + at - before)
    parts.append(part)
  channels = pl.ds(channel, plan.depth)
  for (image, row, columns), at in plan.windows(plan.box, first):
    plgpu.copy_gmem_to_smem(
      refs['x'].at[image, row, parts[0], columns, parts[1], channels],
      _target(refs, 'a', (slot,), columns, at),
      full,
    )
  lines = pl.ds(step * plan.depth, plan.depth)
  plgpu.copy_gmem_to_smem(
    refs['w'].at[lines, pl.ds(column, plan.width)], refs['b'].at[slot], full
  )
  if plan.prologue:
    plgpu.copy_gmem_to_smem(
      refs['in_affine'].at[:, channels], refs['in_slot'].at[slot], full
    )


def _target(refs, name, leading, columns, row):
  """Where a window lies in shared memory."""
  if row is None:
    return refs[f'{name}_boxes'].at[leading]
  if name == 'a':
    leading = (*leading, row // gpu_plan.ROWS)
  return refs[name].at[(*leading, pl.ds(row % gpu_plan.ROWS, columns.size))]


def _compute(refs, plan, warpgroup, tile, before, free):
  """A warpgroup's half of a tile, from step `before` on of the program's."""
  number, start, column = plan.place(tile)
  begin = tuple(
    first + warpgroup * (whole - part)
    for first, whole, part in zip(start, plan.box, plan.half, strict=True)
  )
  # The last tile's output has left the memory.
  plgpu.wait_smem_to_gmem(0, wait_read_only=True)
  if plan.affine:
    plgpu.copy_gmem_to_smem(
      refs['affine'].at[:, pl.ds(column, plan.width)],
      refs['out_affine'].at[warpgroup],
      refs['staged'].at[warpgroup],
    )
  for piece in range(plan.pieces if plan.residual else 0):
    filters = pl.ds(column + piece * gpu_plan.PIECE, gpu_plan.PIECE)
    for (image, row, columns), at in plan.windows(plan.half, begin):
      plgpu.copy_gmem_to_smem(
        refs['residual'].at[image, row, columns, filters],
        _target(refs, 'out', (warpgroup, piece), columns, at),
        refs['staged'].at[warpgroup],
      )

  def product(sums):
    def step(k, _):
      _, slot = gpu_plan.divided(before + k, plan.slots)
      plgpu.barrier_wait(refs['full'].at[slot])
      a = refs['a'].at[slot, warpgroup]
      if plan.prologue:
        _transform(plan, a, refs['in_slot'].at[slot], begin, plan.tap(k)[0])
      plgpu.wgmma(sums, a, refs['b'].at[slot])
      plgpu.wgmma_wait(1)

      @pl.when(k > 0)
      def _():
        free(before + k - 1)

    lax.fori_loop(0, plan.steps, step, None)
    value = sums[...]
    free(before + plan.steps - 1)
    return value

  value = pl.run_scoped(
    product, plgpu.ACC((gpu_plan.ROWS, plan.width), jnp.float32)
  )
  if plan.staged:
    plgpu.barrier_wait(refs['staged'].at[warpgroup])
  if plan.statistics:
    # The warpgroups sum over their warps in the same scratch memory.
    plgpu.barrier_wait(refs['turn'].at[warpgroup])
  for piece in range(plan.pieces):
    filters = pl.ds(column + piece * gpu_plan.PIECE, gpu_plan.PIECE)
    part = value[:, piece * gpu_plan.PIECE : (piece + 1) * gpu_plan.PIECE]
    if plan.affine:
      affine = refs['out_affine'].at[
        warpgroup, :, pl.ds(piece * gpu_plan.PIECE, gpu_plan.PIECE)
      ]
      part = part * _across(affine.at[0], part.shape)
      part = part + _across(affine.at[1], part.shape)
    out = refs['out'].at[warpgroup, piece]
    if plan.residual:
      part = part + plgpu.layout_cast(out[...], _WGMMA).astype(jnp.float32)
    y = activations.activate(plan.activation, part).astype(out.dtype)
    out[...] = y
    if plan.statistics:
      row = 2 * number + warpgroup
      total, squares = _moments(plan, y.astype(jnp.float32), begin)
      refs['sums'][row, filters] = total
      refs['squares'][row, filters] = squares
  if plan.statistics:
    plgpu.barrier_arrive(refs['turn'].at[1 - warpgroup])
  plgpu.commit_smem()
  for piece in range(plan.pieces):
    filters = pl.ds(column + piece * gpu_plan.PIECE, gpu_plan.PIECE)
    for (image, row, columns), at in plan.windows(plan.half, begin):
      plgpu.copy_smem_to_gmem(
        _target(refs, 'out', (warpgroup, piece), columns, at),
        refs['y'].at[image, row, columns, filters],
      )


def _transform(plan, a, affine, begin, tap):
  """The prologue, in place on the rows of a half."""
  shape = (64, plan.depth)

  def some(i, _):
    row = i * 64
    rows = a.at[pl.ds(row, 64)]
    x = plgpu.layout_cast(rows[...], _WGMMA).astype(jnp.float32)
    x = x * _across(affine.at[0], shape) + _across(affine.at[1], shape)
    x = activations.activate(plan.in_activation, x)
    if plan.sees_padding:
      place = _pixels(plan, shape, row)[1:]
      for axis in (0, 1):
        first = begin[1 + axis] * plan.strides[axis]
        at = place[axis] * plan.strides[axis]
        at = at + (first + tap[axis] - plan.lows[axis])
        x = jnp.where((at >= 0) & (at < plan.size[axis]), x, 0.0)
    rows[...] = x.astype(a.dtype)

  lax.fori_loop(0, gpu_plan.ROWS // 64, some, None)
  plgpu.commit_smem()


def _moments(plan, y, begin):
  """The sum of y [rows, filters] over pixels, and of squared deviations."""
  inside, count = None, 1
  for place, size, whole, length, first in zip(
    _pixels(plan, y.shape, 0),
    plan.pixels,
    plan.box,
    plan.half,
    begin,
    strict=True,
  ):
    left = size - first
    count *= jnp.clip(left, 0, length)
    if size % whole:
      seen = place < left
      inside = seen if inside is None else inside & seen

  def total(value):
    if inside is not None:
      value = jnp.where(inside, value, 0.0)
    return jnp.sum(value, 0)

  sums = total(y)
  mean = sums / jnp.maximum(count, 1).astype(jnp.float32)
  deviation = y - lax.broadcast_in_dim(mean, y.shape, (1,))
  return sums, total(deviation * deviation)


def _pixels(plan, shape, row):
  """(image, row, column) in the half's box of its rows from `row` on."""
  rows = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=_WGMMA) + row
  _, height, width = plan.half
  lines = rows >> (width.bit_length() - 1)
  images = lines >> (height.bit_length() - 1)
  return images, lines & (height - 1), rows & (width - 1)


def _across(ref, shape):
  """The vector in ref, for each row of that shape."""
  vector = plgpu.layout_cast(ref[...], _WGMMA.reduce(0))
  return lax.broadcast_in_dim(vector, shape, (1,))
