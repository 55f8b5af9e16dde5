r"""ViT on CIFAR-10 from scratch: patches of 4x4, 6 blocks of width 192.

  python -m experiments.launch --config=cifar10_vit

Cost: not run here. 5 million images of 0.18 billion multiply-adds, three times
each for the gradient: a task for a GPU. A download of 170 MB.
Result: not measured, and not published of just this recipe, which is that of
small ViTs trained from scratch: AdamW with warm-up, mixup, label smoothing and
stochastic depth (Touvron et al. 2021, table 9), on smaller patches.
"""

from train import config


def get_config() -> config.Config:
  """100 epochs of AdamW."""
  return config.Config(
    task='classification',
    total_epochs=100.0,
    log_every=50,
    eval_every='1e',
    checkpoint_every='5e',
    data=config.Data(
      name='cifar10',
      batch_size=128,
      normalize='mean_std',
      augment=('pad_crop', 'flip', {'name': 'mixup', 'alpha': 0.2}),
    ),
    model={
      'name': 'vit',
      'variant': 'Ti/16',
      'patch_size': 4,
      'depth': 6,
      'pool': 'mean',
      'stochastic_depth': 0.1,
    },
    optimizer={'name': 'adamw', 'weight_decay': 0.05},
    schedule={
      'name': 'warmup_cosine_decay_schedule',
      'init_value': 0.0,
      'peak_value': 1e-3,
      'warmup_steps': 2000,
    },
    label_smoothing=0.1,
    weight_decay_mask=True,
    grad_clip_norm=1.0,
  )
