"""Pallas kernels, one folder an op: what others import."""

from kernels.ops.convolution.api import conv2d
from kernels.ops.convolution.stats import conv2d_stats
from kernels.ops.cross_entropy.api import softmax_cross_entropy
from kernels.ops.linear_cross_entropy.api import linear_softmax_cross_entropy
from kernels.ops.softmax.api import log_softmax
from kernels.ops.softmax.api import softmax

__all__ = [
  'conv2d',
  'conv2d_stats',
  'linear_softmax_cross_entropy',
  'log_softmax',
  'softmax',
  'softmax_cross_entropy',
]
