"""From a dataset's name to a TFDS builder whose files are on the disk."""

from collections.abc import Callable
import pathlib

from train import config as config_lib
from train.data import cache


def find_or_prepare(
  name: str, data_dir: str | None, say: Callable[[str], None]
):
  """A TFDS builder whose files are there.

  Args:
    name: an embedded dataset, or TFDS's 'name', 'name/config', 'name:1.2.3'.
    data_dir: where TFDS has prepared it; None is TFDS_DATA_DIR, then TFDS's
      own folder. Embedded datasets are prepared in the cache, or here.
    say: takes lines for the user.

  Raises:
    UserError: no such dataset, or it is not prepared and cannot be.
  """
  import tensorflow_datasets as tfds

  from train.data import embedded  # TFDS and scikit-learn take a second.

  if name in embedded.BUILDERS:
    folder = pathlib.Path(data_dir) if data_dir else cache.root() / 'tfds'
    try:
      with cache.locked(folder / name):
        builder = embedded.BUILDERS[name](
          data_dir=str(folder), file_format='array_record'
        )
        if not builder.is_prepared():
          say(f'preparing {name} in {folder}')
          embedded.prepare(builder)
    except OSError as error:
      raise config_lib.UserError(
        f'{name} cannot be prepared in {folder}: {error}; set '
        'config.data.data_dir or TAISHAN_CACHE to a folder of your own'
      ) from None
    return builder
  try:
    builder = tfds.builder(name, data_dir=data_dir, try_gcs=False)
    prepared = builder.is_prepared()
  except tfds.core.DatasetNotFoundError:
    raise config_lib.UserError(
      f'config.data.name is {name!r}, which neither TFDS nor this project '
      f'knows; {", ".join(embedded.BUILDERS)} need no download'
    ) from None
  except Exception as error:  # A version or a config that TFDS does not have.
    raise config_lib.UserError(
      f'config.data.name is {name!r}: {config_lib.first_line(error)}'
    ) from None
  if not prepared:
    raise config_lib.UserError(
      f'config.data.name is {name!r}, which is not prepared at '
      f'{builder.data_path}; set config.data.data_dir or TFDS_DATA_DIR to the '
      'folder that holds it, or prepare it with tfds.builder('
      f'{name!r}, file_format="array_record").download_and_prepare()'
    )
  return builder
