r"""Perceptron (Rosenblatt 1958) on breast cancer: one neuron, perceptron loss.

  python -m experiments.launch --config=cancer_perceptron

Cost: 1 s once imported, on two cores of an AMD EPYC.
Result: 95.8 % of 114 test rows (five seeds: 93.9 to 96.5); scikit-learn 95.3.
Measured by python -m experiments.benchmark --suite=results.
"""

from train import config


def get_config() -> config.Config:
  """100 epochs of gradient descent."""
  return config.Config(
    task='binary_classification',
    loss='perceptron_loss',
    total_epochs=100.0,
    eval_every='10e',
    checkpoint_every='50e',
    data=config.Data(name='breast_cancer', batch_size=64, normalize='mean_std'),
    model={'name': 'linear'},
    optimizer={'name': 'sgd'},
    schedule={'name': 'cosine_decay_schedule', 'init_value': 0.1},
  )
