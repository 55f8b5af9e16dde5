r"""Autoencoder 64-256-128-8-128-256-64 on 8x8 digits: nonlinear PCA.

  python -m experiments.launch --config=digits_autoencoder \
      --workdir=runs/digits_autoencoder

A classifier of the same widths can start from its encoder, here one that is
given 50 labels:

  python -m experiments.launch --config=digits_autoencoder:pretrained
  python -m experiments.launch --config=digits_autoencoder:scratch

Cost: 6 s of CPU time for the autoencoder, 3 s for a classifier, once imported,
on two cores of an Intel Xeon.
Result: squared error 0.0116 of 360 test images (five seeds: 0.0115 to 0.0118),
where PCA with 8 codes has 0.0246. Pretrained 81.3 % (78.6 to 83.1) of the test
images, scratch 81.1 % (78.1 to 83.1): here pre-training gains nothing.
Measured by python -m experiments.benchmark --suite=results \
    --configs=digits_autoencoder,digits_autoencoder:pretrained,...

Its codes serve for more, which tests/experiments/test_autoencoders.py shows:
the nearest code is of the same digit for 96.7 % of the test images (95.8 to
97.5; 98.6 by all 64 pixels). Trained on 0 to 4 alone, its error tells 5 to 9
from them with an area under the ROC curve of 0.988 (0.981 to 0.993).
"""

from train import config


def get_config(recipe: str = 'autoencoder') -> config.Config:
  """The autoencoder, or a classifier that starts from it or from nothing."""
  if recipe == 'autoencoder':
    return config.Config(
      task='reconstruction',
      total_epochs=100.0,
      log_every=100,
      eval_every='10e',
      checkpoint_every='50e',
      data=config.Data(name='digits', batch_size=64, normalize='unit'),
      model={'name': 'autoencoder', 'widths': (256, 128), 'code_size': 8},
      optimizer={'name': 'adam'},
      schedule={'name': 'cosine_decay_schedule', 'init_value': 2e-3},
    )
  if recipe not in ('pretrained', 'scratch'):
    raise config.UserError(
      f'--config=digits_autoencoder:{recipe}: there are autoencoder, '
      'pretrained, scratch'
    )
  return config.Config(
    task='classification',
    total_steps=200,
    log_every=50,
    eval_every=50,
    checkpoint_every=100,
    data=config.Data(
      name='digits', batch_size=10, normalize='unit', max_examples=50
    ),
    model={'name': 'mlp', 'widths': (256, 128)},
    optimizer={'name': 'adam'},
    schedule={'name': 'cosine_decay_schedule', 'init_value': 1e-3},
    init_from=(
      'runs/digits_autoencoder:latest' if recipe == 'pretrained' else None
    ),
  )
