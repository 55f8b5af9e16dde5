r"""Transfer learning on 8x8 digits: from 0, 1, 2, 3, 4 to 5, 6, 7, 8, 9.

A network that has seen all of the first five classes learns the other five from
ten labelled images.

  python -m experiments.launch --config=digits_transfer:source \
      --workdir=runs/digits_transfer
  python -m experiments.launch --config=digits_transfer:finetune
  python -m experiments.launch --config=digits_transfer:freeze
  python -m experiments.launch --config=digits_transfer:features
  python -m experiments.launch --config=digits_transfer:scratch

finetune trains everything from the source's parameters, freeze all but the
first block, features the head alone; scratch starts from nothing. The running
statistics of frozen norms go on, to those of the new images.

Cost: 10 s for the source, then 2 s each, on two cores of an AMD EPYC.
Result, of 180 test images, mean and range of five seeds after one source:
finetune 60.4 % (56.1 to 68.3), freeze 60.3 % (56.1 to 68.3), features 52.3 %
(48.9 to 57.2), scratch 55.9 % (52.8 to 61.7).
Measured by python -m experiments.benchmark --suite=results \
    --configs=digits_transfer:finetune,digits_transfer:scratch,...
"""

from train import config

# What is frozen, by patterns of paths.
RECIPES = {
  'finetune': {},
  'freeze': {'blocks/0': 0.0, 'norms/0': 0.0},
  'features': {'blocks': 0.0, 'norms': 0.0},
  'scratch': {},
}


def get_config(recipe: str = 'source') -> config.Config:
  """The network that is started from, or one of RECIPES."""
  if recipe == 'source':
    return config.Config(
      task='classification',
      total_epochs=30.0,
      log_every=25,
      eval_every='5e',
      checkpoint_every='10e',
      data=config.Data(
        name='digits',
        batch_size=64,
        normalize='unit',
        classes=(0, 1, 2, 3, 4),
      ),
      model={'name': 'cnn', 'widths': (32, 64)},
      optimizer={'name': 'adam'},
      schedule={'name': 'cosine_decay_schedule', 'init_value': 3e-3},
    )
  if recipe not in RECIPES:
    raise config.UserError(
      f'--config=digits_transfer:{recipe}: there are source, '
      f'{", ".join(RECIPES)}'
    )
  return config.Config(
    task='classification',
    total_steps=100,
    log_every=25,
    eval_every=25,
    checkpoint_every=50,
    data=config.Data(
      name='digits',
      batch_size=10,
      normalize='unit',
      classes=(5, 6, 7, 8, 9),
      max_examples=10,
    ),
    model={'name': 'cnn', 'widths': (32, 64)},
    optimizer={'name': 'adam'},
    schedule={'name': 'cosine_decay_schedule', 'init_value': 1e-3},
    rate_multipliers=RECIPES[recipe],
    init_from=None if recipe == 'scratch' else 'runs/digits_transfer:latest',
    init_new=() if recipe == 'scratch' else ('head',),
  )
