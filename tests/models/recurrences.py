"""Recurrent layers as loops in NumPy, one sequence at a time."""

import numpy as np

from models import cells


def layers(blocks, xs):
  """What layers give for one sequence [T, F]: [T, D]."""
  for block in blocks:
    both = [unrolled(block.forward, xs)[0]]
    if block.backward is not None:
      both.append(unrolled(block.backward, xs[::-1])[0][::-1])
    xs = np.concatenate(both, axis=1)
  return xs


def unrolled(cell, xs, state=None):
  """The outputs [T, D] of one direction of a layer, and the last state."""
  if state is None:
    state = (np.zeros(cell.width),) * cell.states
  hs = []
  for x in xs:
    state = step(cell, x, state)
    hs.append(state[0])
  return np.array(hs), state


def step(cell, x, state):
  """A step of a cell on [F], as its papers write it."""
  w, u, b = (
    np.asarray(p[...]).T
    for p in (cell.kernel, cell.recurrent_kernel, cell.bias)
  )
  h = state[0]
  if isinstance(cell, cells.RNNCell):
    a = w @ x + u @ h + b
    relu = cell.activation == 'relu'
    return (np.maximum(a, 0) if relu else np.tanh(a),)
  if isinstance(cell, cells.LSTMCell):
    i, f, g, o = np.split(w @ x + u @ h + b, 4)
    c = sigmoid(f) * state[1] + sigmoid(i) * np.tanh(g)
    return sigmoid(o) * np.tanh(c), c
  (w_r, w_z, w_n), (u_r, u_z, u_n) = np.split(w, 3), np.split(u, 3)
  b_r, b_z, b_n = np.split(b, 3)
  r = sigmoid(w_r @ x + u_r @ h + b_r)
  z = sigmoid(w_z @ x + u_z @ h + b_z)
  if cell.recurrent_bias is None:
    n = np.tanh(w_n @ x + u_n @ (r * h) + b_n)
    return ((1 - z) * h + z * n,)
  more = np.asarray(cell.recurrent_bias[...])
  n = np.tanh(w_n @ x + b_n + r * (u_n @ h + more))
  return ((1 - z) * n + z * h,)


def sigmoid(x):
  """1 / (1 + exp(-x))."""
  return 1 / (1 + np.exp(-x))


def dense(layer, x):
  """[..., D] -> [..., K]."""
  y = x @ np.asarray(layer.kernel[...])
  return y if layer.bias is None else y + np.asarray(layer.bias[...])
