r"""LSTM on the chaotic series of Mackey & Glass (1977), 6 steps ahead of 32.

  python -m experiments.launch --config=series_lstm

Cost: 20 s of CPU time with the imports, on an Intel Xeon.
Result: mean squared error 1.6e-5 to 2.9e-5 on the 963 test windows (seeds 0 to
2). Saying the last value again has 3.4e-2, and scikit-learn's LinearRegression
on the same 32 values 7.3e-4.
"""

from train import config


def get_config() -> config.Config:
  """50 epochs of Adam."""
  return config.Config(
    task='regression',
    total_epochs=50.0,
    log_every=50,
    eval_every='5e',
    checkpoint_every='25e',
    data=config.Data(
      name='mackey_glass', batch_size=64, normalize=None, sequence_length=32
    ),
    model={'name': 'lstm', 'widths': (64,)},
    optimizer={'name': 'adam'},
    schedule={'name': 'cosine_decay_schedule', 'init_value': 3e-3},
    grad_clip_norm=1.0,
  )
