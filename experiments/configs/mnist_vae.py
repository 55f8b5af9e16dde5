r"""Variational autoencoder with 500 hidden units and 20 codes on MNIST.

  python -m experiments.launch --config=mnist_vae

784 times the loss is the negative ELBO in nats an image; evaluation takes the
code's mean for the code, which makes it some 9 nats lower than the ELBO's own,
which draws the code. Its targets are grey values from 0 to 1, not black and
white, so that likelihoods on binarised MNIST are another matter.

Cost: 85 s of CPU time once imported and the data is there, on two cores of an
Intel Xeon.
Result: ELBO -102.7 nats of 10,000 test images (three seeds: -102.8 to -102.5),
of which 25.6 are the divergence; the same network in Kingma & Welling (2014),
figure 2, comes to about -100 after more passes. Squared error of the mean's
reconstruction 0.0083.
Measured by tests/experiments/test_autoencoders.py and
python -m experiments.benchmark --suite=results --configs=mnist_vae --seeds=3
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
