r"""Variational autoencoder with 500 hidden units and 20 codes on MNIST.

python -m experiments.launch --config=mnist_vae
"""

from train import config


def get_config() -> config.Config:
  """20 epochs of Adam on the negative ELBO of grey values in [0, 1]."""
  return config.Config(
    task='reconstruction',
    loss='sigmoid_binary_cross_entropy',
    total_epochs=20.0,
    log_every=100,
    eval_every='2e',
    checkpoint_every='10e',
    best_metric='eval/loss',
    data=config.Data(name='mnist', batch_size=128, normalize='unit'),
    model={'name': 'autoencoder', 'variant': 'variational', 'code_size': 20},
    optimizer={'name': 'adam'},
    schedule={'name': 'cosine_decay_schedule', 'init_value': 2e-3},
  )
