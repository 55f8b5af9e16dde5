r"""LSTM on the adding problem of 100 steps (Hochreiter & Schmidhuber 1997).

  python -m experiments.launch --config=adding_lstm
  python -m experiments.launch --config=adding_lstm --config.model.name=rnn

Cost: 2 minutes of CPU time on two cores of an Intel Xeon.
Result, squared error of 2,000 test sequences, three seeds: the LSTM 0.0005
(0.0004 to 0.0005), which solves it; the tanh RNN, of width 128, in as many
steps 0.10 (0.07 to 0.15), which does not. Always to say 1 has 0.17.
Measured by python -m experiments.benchmark --suite=results \
    --configs=adding_lstm --seeds=3
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
