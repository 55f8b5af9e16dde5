"""Convolution and its gradients in float64, tap by tap, in plain NumPy.

What test_convolution.py and test_convolution_stats.py compare with; of the
code under test it shares nothing.
"""

import math

import numpy as np

_erf = np.vectorize(math.erf, otypes=[np.float64])


def wide(x):
  """x in float64."""
  return np.asarray(x).astype(np.float64)


def pads(padding, sizes, taps, strides, dilation=(1, 1)):
  """((above, below), (left, right)) of 'SAME', 'VALID' or such pairs."""
  if padding == 'VALID':
    return ((0, 0), (0, 0))
  if padding != 'SAME':
    return tuple(map(tuple, padding))
  found = []
  for size, tap, stride, apart in zip(
    sizes, taps, strides, dilation, strict=True
  ):
    outputs = math.ceil(size / stride)
    reach = (tap - 1) * apart + 1
    missing = max((outputs - 1) * stride + reach - size, 0)
    found.append((missing // 2, missing - missing // 2))
  return tuple(found)


def _numbers(x_shape, w_shape, strides, padding, dilation):
  strides, dilation = (
    (one, one) if isinstance(one, int) else tuple(one)
    for one in (strides, dilation)
  )
  around = pads(padding, x_shape[1:3], w_shape[:2], strides, dilation)
  sizes = [
    (size + sum(pad) - (taps - 1) * apart - 1) // stride + 1
    for size, pad, taps, apart, stride in zip(
      x_shape[1:3], around, w_shape[:2], dilation, strides, strict=True
    )
  ]
  return strides, around, dilation, sizes


def _taps(w, strides, dilation, sizes):
  """(i, j, the padded image's rows and columns that tap meets)."""
  for i in range(w.shape[0]):
    for j in range(w.shape[1]):
      rows = i * dilation[0] + np.arange(sizes[0]) * strides[0]
      columns = j * dilation[1] + np.arange(sizes[1]) * strides[1]
      yield i, j, rows[:, None], columns


def output_shape(
  x_shape, w_shape, strides=1, padding='SAME', dilation=1, groups=1
):
  """Of convolve's result, however many groups there are."""
  del groups
  *_, sizes = _numbers(x_shape, w_shape, strides, padding, dilation)
  return (x_shape[0], *sizes, w_shape[3])


def convolve(x, w, strides=1, padding='SAME', dilation=1, groups=1):
  """[N, H, W, C] and [I, J, C / groups, F] -> [N, H', W', F]."""
  x, w = wide(x), wide(w)
  strides, around, dilation, sizes = _numbers(
    x.shape, w.shape, strides, padding, dilation
  )
  bordered = np.pad(x, ((0, 0), *around, (0, 0)))
  y = np.zeros((len(x), *sizes, w.shape[3]))
  inside, outside = w.shape[2], w.shape[3] // groups
  for i, j, rows, columns in _taps(w, strides, dilation, sizes):
    seen = bordered[:, rows, columns]
    for group in range(groups):
      take = slice(group * inside, (group + 1) * inside)
      give = slice(group * outside, (group + 1) * outside)
      y[..., give] += seen[..., take] @ w[i, j][:, give]
  return y


def gradients(x, w, grad, strides=1, padding='SAME', dilation=1, groups=1):
  """By x and by w, of the sum of convolve times grad."""
  x, w, grad = wide(x), wide(w), wide(grad)
  strides, around, dilation, sizes = _numbers(
    x.shape, w.shape, strides, padding, dilation
  )
  bordered = np.pad(x, ((0, 0), *around, (0, 0)))
  x_grad, w_grad = np.zeros_like(bordered), np.zeros_like(w)
  inside, outside = w.shape[2], w.shape[3] // groups
  for i, j, rows, columns in _taps(w, strides, dilation, sizes):
    for group in range(groups):
      take = slice(group * inside, (group + 1) * inside)
      give = slice(group * outside, (group + 1) * outside)
      part = grad[..., give]
      seen = bordered[:, rows, columns, take]
      w_grad[i, j][:, give] += np.einsum('nhwc,nhwf->cf', seen, part)
      # No two outputs meet the same place of the image by the same tap.
      x_grad[:, rows, columns, take] += part @ w[i, j][:, give].T
  (above, _), (left, _) = around
  height, width = x.shape[1:3]
  return x_grad[:, above : above + height, left : left + width], w_grad


def activate(name, z):
  """The activation of that name."""
  if name == 'relu':
    return np.where(z > 0, z, np.where(np.isnan(z), z, 0))
  if name == 'gelu':
    return z * (1 + _erf(z / math.sqrt(2))) / 2
  if name == 'silu':
    return z / (1 + np.exp(-z))
  return z


def slope(name, z):
  """Its derivative."""
  if name == 'relu':
    return (z > 0).astype(np.float64)
  if name == 'gelu':
    density = np.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    return (1 + _erf(z / math.sqrt(2))) / 2 + z * density
  if name == 'silu':
    share = 1 / (1 + np.exp(-z))
    return share + z * share * (1 - share)
  return np.ones_like(z)


def conv2d(
  x, w, scale=None, shift=None, residual=None, activation=None, **numbers
):
  """activation(scale conv(x, w) + shift + residual)."""
  return activate(
    activation, _before(convolve(x, w, **numbers), scale, shift, residual)
  )


def conv2d_gradients(
  x,
  w,
  grad,
  scale=None,
  shift=None,
  residual=None,
  activation=None,
  **numbers,
):
  """name -> the gradient by it, of the sum of conv2d times grad."""
  plain = convolve(x, w, **numbers)
  inner = slope(activation, _before(plain, scale, shift, residual)) * wide(grad)
  multiplied = inner if scale is None else inner * wide(scale)
  x_grad, w_grad = gradients(x, w, multiplied, **numbers)
  found = {'x': x_grad, 'w': w_grad}
  if scale is not None:
    found['scale'] = _summed(inner * plain, np.shape(scale))
  if shift is not None:
    found['shift'] = _summed(inner, np.shape(shift))
  if residual is not None:
    found['residual'] = _summed(inner, np.shape(residual))
  return found


def conv2d_stats(
  x, w, in_scale=None, in_shift=None, in_activation=None, **numbers
):
  """y, its sum and its squares about the mean; the border behind them is 0."""
  z = wide(x)
  z = z if in_scale is None else z * wide(in_scale)
  z = z if in_shift is None else z + wide(in_shift)
  y = convolve(activate(in_activation, z), w, **numbers)
  return y, *statistics(y)


def statistics(y):
  """The sum [F] of [..., F], and the sum of the squares about the mean."""
  y = wide(y)
  axes = tuple(range(y.ndim - 1))
  return y.sum(axes), np.square(y - y.mean(axes)).sum(axes)


def _before(z, scale, shift, residual):
  z = z if scale is None else z * wide(scale)
  z = z if shift is None else z + wide(shift)
  return z if residual is None else z + wide(residual)


def _summed(grad, shape):
  """The gradient by what was broadcast from that shape."""
  extra = grad.ndim - len(shape)
  grad = grad.sum(tuple(range(extra)))
  ones = tuple(i for i, size in enumerate(shape) if size == 1)
  return grad.sum(ones, keepdims=True).reshape(shape)
