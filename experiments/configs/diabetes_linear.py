r"""Linear regression on diabetes: one neuron, squared error.

  python -m experiments.launch --config=diabetes_linear

Cost: 1.3 s once imported, on two cores of an AMD EPYC.
Result: squared error 3424.23 on 89 test rows (five seeds: 3424.18 to 3424.28);
scikit-learn 3424.26.
The batch is all of the 353 training rows but one, which 8 devices can share.
Measured by python -m experiments.benchmark --suite=results.
"""

from train import config


def get_config() -> config.Config:
  """2,000 steps of gradient descent with momentum on nearly all of the data."""
  return config.Config(
    task='regression',
    loss='squared_error',
    total_steps=2000,
    log_every=100,
    eval_every=200,
    checkpoint_every=1000,
    data=config.Data(name='diabetes', batch_size=352, normalize='mean_std'),
    model={'name': 'linear'},
    optimizer={'name': 'sgd', 'momentum': 0.9},
    schedule={'name': 'cosine_decay_schedule', 'init_value': 0.05},
  )
