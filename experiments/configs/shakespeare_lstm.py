r"""Two LSTM layers of width 128 on Shakespeare, character by character.

  python -m experiments.launch --config=shakespeare_lstm
  python -m experiments.sample --workdir=WORKDIR --prompt='ROMEO:'

Cost: 9.5 minutes of CPU time with the imports, on an Intel Xeon.
Result: 1.504 nats a character of validation and 1.634 of test (seed 0); 1.65 of
validation after 4 epochs. Each window of 128 begins without memory.
"""

from train import config


def get_config() -> config.Config:
  """20 epochs of Adam."""
  return config.Config(
    task='token_classification',
    total_epochs=20.0,
    log_every=50,
    eval_every='1e',
    checkpoint_every='5e',
    data=config.Data(
      name='tiny_shakespeare', batch_size=32, sequence_length=128
    ),
    model={'name': 'lstm', 'widths': (128, 128), 'head': 'every'},
    optimizer={'name': 'adam'},
    schedule={'name': 'cosine_decay_schedule', 'init_value': 4e-3},
    grad_clip_norm=1.0,
  )
