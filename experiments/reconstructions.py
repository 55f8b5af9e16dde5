"""A picture of what an autoencoder makes of test images."""

import pathlib

import jax
from matplotlib.figure import Figure
import numpy as np

from experiments import restore
from train import losses
from train import processes
from train import program as program_lib
from train import step as step_lib

_IMAGES = 12


def draw(
  workdir: pathlib.Path, program: program_lib.Program, step: int
) -> Figure | None:
  """The first test images above what the model gave back at that step.

  None where the task is another, the inputs are no images, or several processes
  trained.
  """
  config, dataset = program.config, program.dataset
  if config.task != 'reconstruction' or dataset.input_key != 'image':
    return None
  if processes.count() > 1:  # Restoring would wait for the others.
    return None
  state, _ = restore.restore(workdir, program, str(step))
  split = dataset.splits[program.test_split]
  batch = split.take(np.arange(min(_IMAGES, len(split))))
  prepare = step_lib.make_prepare('image', config.data.normalize)
  batch = prepare(jax.device_put(batch))
  outputs, _ = step_lib.apply(program.merge(state), batch)
  outputs = losses.widen(outputs)
  if config.loss == losses.OF_LOGITS:
    outputs = jax.nn.sigmoid(outputs)
  scale = config.data.normalize or {'mean': 0.0, 'std': 1.0}
  rows = [
    np.asarray(x).reshape(batch['image'].shape) * scale['std'] + scale['mean']
    for x in (batch['input'], outputs)
  ]
  figure = Figure(figsize=(len(rows[0]), 2.2), layout='constrained')
  for axes, image in zip(
    figure.subplots(2, len(rows[0])).flat, np.concatenate(rows), strict=True
  ):
    axes.imshow(np.clip(image / 255, 0, 1), cmap='gray', vmin=0, vmax=1)
    axes.axis('off')
  return figure
