r"""Few labels on MNIST: 5, 6, 7, 8, 9 from ten images, after 0, 1, 2, 3, 4.

As digits_transfer, with images of 28x28 and 30,596 of them for the source.

  python -m experiments.launch --config=mnist_few_labels:source \
      --workdir=runs/mnist_few_labels
  python -m experiments.launch --config=mnist_few_labels:finetune
  python -m experiments.launch --config=mnist_few_labels:freeze
  python -m experiments.launch --config=mnist_few_labels:features
  python -m experiments.launch --config=mnist_few_labels:scratch

Cost: 90 s for the source, then 5 s each, on two cores of an AMD EPYC.
Result, of 4,861 test images, mean and range of five seeds after one source:
finetune 62.3 % (61.6 to 63.1), freeze 62.3 % (61.4 to 63.1), features 61.1 %
(60.5 to 61.8), scratch 53.3 % (51.2 to 54.8).
Measured by python -m experiments.benchmark --suite=results \
    --configs=mnist_few_labels:finetune,mnist_few_labels:scratch,...
"""

import dataclasses

from experiments.configs import digits_transfer
from train import config


def get_config(recipe: str = 'source') -> config.Config:
  """The network that is started from, or one of digits_transfer's recipes."""
  digits = digits_transfer.get_config(recipe)
  mnist = dataclasses.replace(
    digits, data=dataclasses.replace(digits.data, name='mnist')
  )
  if recipe == 'source':
    return dataclasses.replace(
      mnist, total_epochs=2.0, eval_every='1e', checkpoint_every='1e'
    )
  if mnist.init_from is None:
    return mnist
  return dataclasses.replace(mnist, init_from='runs/mnist_few_labels:latest')
