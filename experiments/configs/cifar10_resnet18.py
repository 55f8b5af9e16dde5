r"""ResNet-18 with a 3x3 stem on CIFAR-10, shifted and mirrored.

  python -m experiments.launch --config=cifar10_resnet18

Cost: not run here. 10 million images of 0.56 billion multiply-adds, three times
each for the gradient: a task for a GPU. A download of 170 MB.
Result, as published: 95.28 % of 10,000 test images (mean of five runs), 96.01 %
with --config.data.augment=pad_crop,flip,cutout. DeVries & Taylor (2017),
table 1, whose rate falls to a fifth at epochs 60, 120 and 160 where this is a
cosine, and whose decay does not spare biases and norms.
"""

from train import config


def get_config() -> config.Config:
  """200 epochs of SGD with Nesterov's momentum."""
  return config.Config(
    task='classification',
    total_epochs=200.0,
    log_every=100,
    eval_every='5e',
    checkpoint_every='5e',
    data=config.Data(
      name='cifar10',
      batch_size=128,
      normalize='mean_std',
      augment=('pad_crop', 'flip'),
    ),
    model={'name': 'resnet', 'variant': '18', 'stem': '3x3'},
    optimizer={'name': 'sgd', 'momentum': 0.9, 'nesterov': True},
    schedule={'name': 'cosine_decay_schedule', 'init_value': 0.1},
    l2=5e-4,
  )
