r"""PCA as a linear autoencoder: 8 codes for 8x8 digits.

  python -m experiments.launch --config=digits_pca

Its error can be no lower than that of PCA, which is the best of all affine maps
to 8 numbers and back; its codes are PCA's turned and stretched.

Cost: 4 s of CPU time once imported, on two cores of an Intel Xeon.
Result: squared error 0.024604 of 360 test images, all of five seeds;
scikit-learn's PCA 0.024604. On the training images 0.023741, within 2 parts in
a million of PCA's and above it.
Measured by python -m experiments.benchmark --suite=results \
    --configs=digits_pca
"""

from train import config


def get_config() -> config.Config:
  """200 epochs of Adam."""
  return config.Config(
    task='reconstruction',
    total_epochs=200.0,
    log_every=100,
    eval_every='20e',
    checkpoint_every='100e',
    data=config.Data(name='digits', batch_size=64, normalize='unit'),
    model={'name': 'autoencoder', 'variant': 'linear', 'code_size': 8},
    optimizer={'name': 'adam'},
    schedule={'name': 'cosine_decay_schedule', 'init_value': 2e-2},
  )
