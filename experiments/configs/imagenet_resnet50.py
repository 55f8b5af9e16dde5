r"""ResNet-50 on ImageNet, by the recipe of Goyal et al. (2017).

  python -m experiments.launch --config=imagenet_resnet50

Cost: not run here. 115 million images of 4.1 billion multiply-adds, three times
each for the gradient: a task for several GPUs or a pod. ImageNet is prepared
by TFDS, from files that image-net.org gives to those who register.
Result, as published: 76.40 % of 50,000 validation images (mean of five runs,
+-0.12), Goyal et al. (2017), table 1, batches of 256. There crops are of the
whole image, and 224 of 256 pixels are tested; here both start from the middle
224x224 of an image whose shorter side is 224.
"""

from train import config

# Steps of an epoch: 1,281,167 images in batches of 256.
_EPOCH = 1_281_167 / 256


def get_config() -> config.Config:
  """90 epochs of SGD with Nesterov's momentum."""
  return config.Config(
    task='classification',
    total_epochs=90.0,
    log_every=100,
    eval_every='1e',
    checkpoint_every='1e',
    data=config.Data(
      name='imagenet2012',
      batch_size=256,
      image_size=224,
      normalize={
        'mean': (123.675, 116.28, 103.53),
        'std': (58.395, 57.12, 57.375),
      },
      augment=({'name': 'stretch', 'min_area': 0.08}, 'flip'),
      num_workers=8,
    ),
    model={'name': 'resnet', 'variant': '50', 'zero_init': True},
    optimizer={'name': 'sgd', 'momentum': 0.9, 'nesterov': True},
    schedule={
      'name': 'piecewise_constant_schedule',
      'init_value': 0.1,
      'boundaries_and_scales': {
        round(30 * _EPOCH): 0.1,
        round(60 * _EPOCH): 0.1,
        round(80 * _EPOCH): 0.1,
      },
    },
    l2=1e-4,
  )
