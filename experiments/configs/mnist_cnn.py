r"""CNN with 32 and 64 filters and batch norm on MNIST, shifted at random.

  python -m experiments.launch --config=mnist_cnn

Cost: 6 minutes once the data is there, on two shared cores of an AMD EPYC.
Result: 99.1 % of 10,000 test images (three seeds: 99.1 to 99.2).
Measured by python -m experiments.benchmark --suite=results \
    --configs=mnist_cnn --seeds=3
"""

from train import config


def get_config() -> config.Config:
  """5 epochs of Adam."""
  return config.Config(
    task='classification',
    total_epochs=5.0,
    log_every=50,
    eval_every='1e',
    checkpoint_every='1e',
    data=config.Data(
      name='mnist',
      batch_size=128,
      normalize='unit',
      augment=({'name': 'pad_crop', 'padding': 2},),
    ),
    model={'name': 'cnn', 'widths': (32, 64)},
    optimizer={'name': 'adam'},
    schedule={'name': 'cosine_decay_schedule', 'init_value': 1e-3},
  )
