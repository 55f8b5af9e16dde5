r"""CNN with 32 and 64 filters and batch norm on Fashion-MNIST, mirrored too.

  python -m experiments.launch --config=fashion_cnn

Cost: twice mnist_cnn's, by its steps; the data is a download of 31 MB.
Result: not measured, because the data could not be had where we measure.
"""

from train import config


def get_config() -> config.Config:
  """10 epochs of Adam."""
  return config.Config(
    task='classification',
    total_epochs=10.0,
    log_every=50,
    eval_every='1e',
    checkpoint_every='1e',
    data=config.Data(
      name='fashion_mnist',
      batch_size=128,
      normalize='unit',
      augment=({'name': 'flip'},),
    ),
    model={'name': 'cnn', 'widths': (32, 64)},
    optimizer={'name': 'adam'},
    schedule={'name': 'cosine_decay_schedule', 'init_value': 1e-3},
  )
