"""What one example of a dataset holds, judged by TFDS's account of it."""

import numpy as np

from train import config as config_lib
from train.data import records


def read(
  name: str,
  features,
  image_size: int | None = None,
  sequence_length: int | None = None,
) -> tuple[dict[str, records.Spec], tuple[str, ...] | None]:
  """One example's specs, and the classes' names (None: the label is a number).

  Args:
    name: of the dataset, for messages.
    features: TFDS's.
    image_size: as config.data has it, and `sequence_length`.

  Raises:
    UserError: the examples are of another form, or cannot be made to have the
      size or the length.
  """
  import tensorflow_datasets as tfds

  if sequence_length:
    raise config_lib.UserError(
      f'config.data.sequence_length is {sequence_length}; {name} has examples '
      'of their own length, so it must be None'
    )

  inputs = ('image', 'features')
  key = next((k for k in inputs if k in features and 'label' in features), None)
  if key is None:
    raise config_lib.UserError(
      f'config.data.name is {name!r}, whose examples hold '
      f'{", ".join(features)}; training needs image or features, and label, or '
      'text alone'
    )
  shape, label = features[key].shape, features['label']
  if image_size:
    if not records.is_image(features[key]):
      raise config_lib.UserError(
        f'config.data.image_size is {image_size}; {name} holds {key} that '
        'cannot be resized: only images of bytes can, so it must be None'
      )
    shape = (image_size, image_size, shape[-1] or 3)
  elif not isinstance(shape, tuple) or not shape or None in shape:
    hint = (
      '; set config.data.image_size to resize and crop all to one'
      if records.is_image(features[key])
      else ''
    )
    raise config_lib.UserError(
      f'config.data.name is {name!r}, whose {key} has the shape {shape}; '
      f'training needs one shape for all examples, (H, W, C) or (D,){hint}'
    )
  if label.shape != () or not _numbers(label) or not _numbers(features[key]):
    raise config_lib.UserError(
      f'config.data.name is {name!r}, whose {key} is {features[key]} and '
      f'whose label is {label}; training needs numbers, one a label'
    )
  pixels = np.dtype(features[key].np_dtype) == np.uint8
  whole = np.issubdtype(np.dtype(label.np_dtype), np.integer)
  specs = {
    key: records.Spec(shape, np.dtype(np.uint8 if pixels else np.float32)),
    'label': records.Spec((), np.dtype(np.int32 if whole else np.float32)),
  }
  if isinstance(label, tfds.features.ClassLabel):
    return specs, tuple(label.names)
  return specs, None


def _numbers(feature) -> bool:
  """Whether TFDS gives numbers for this feature."""
  return np.issubdtype(np.dtype(feature.np_dtype), np.number)
