r"""LSTM on the adding problem of 100 steps (Hochreiter & Schmidhuber 1997).

python -m experiments.launch --config=adding_lstm
"""

from train import config


def get_config() -> config.Config:
  """5 epochs of Adam."""
  return config.Config(
    task='regression',
    total_epochs=5.0,
    log_every=100,
    eval_every='1e',
    checkpoint_every='5e',
    data=config.Data(
      name='adding', batch_size=100, normalize=None, sequence_length=100
    ),
    model={'name': 'lstm', 'widths': (64,)},
    optimizer={'name': 'adam'},
    schedule={'name': 'cosine_decay_schedule', 'init_value': 3e-3},
    grad_clip_norm=1.0,
  )
