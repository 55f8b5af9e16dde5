"""Fitting: data, step, loop, checkpoints. `train.train_and_evaluate` is the
whole life of an experiment.

Names are loaded on first use, so that importing a configuration needs no jax.
"""


def __getattr__(name: str):
  if name == 'train_and_evaluate':
    from train import loop

    return loop.train_and_evaluate
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
