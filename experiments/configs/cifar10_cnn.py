r"""The course's CNN on CIFAR-10: three convolutions, one hidden layer.

  python -m experiments.launch --config=cifar10_cnn

Cost: 13 minutes on two shared cores of an AMD EPYC; a download of 170 MB.
Result: not measured on CIFAR-10 itself. On its images stored as JPEG at quality
75, which is another task: 72.5 % of 10,000 test images (one seed).
Measured by python -m experiments.benchmark --suite=results \
    --configs=cifar10_cnn --seeds=1
"""

from train import config


def get_config() -> config.Config:
  """10 epochs of Adam at 0.001 with batches of 64, as in the lectures."""
  return config.Config(
    task='classification',
    total_epochs=10.0,
    log_every=50,
    eval_every='1e',
    checkpoint_every='1e',
    data=config.Data(name='cifar10', batch_size=64, normalize='unit'),
    model={
      'name': 'cnn',
      'widths': (32, 64, 64),
      'head_widths': (64,),
      'norm': None,
    },
    optimizer={'name': 'adam'},
    schedule={'name': 'constant_schedule', 'value': 1e-3},
  )
