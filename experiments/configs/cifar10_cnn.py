r"""The course's CNN on CIFAR-10: three convolutions, one hidden layer.

  python -m experiments.launch --config=cifar10_cnn

Cost: TODO
Result: TODO
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
