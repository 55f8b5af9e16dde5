"""From a dataset's name to a TFDS builder whose files are on the disk."""

from collections.abc import Callable
import contextlib
import pathlib
import shutil
import sys

from train import config as config_lib
from train.data import cache
from train.data import downloads
from train.data import synthetic


def find_or_prepare(
  name: str, data_dir: str | None, say: Callable[[str], None]
):
  """A TFDS builder whose files are there.

  scikit-learn's datasets (embedded.py) are prepared where they are not; so are
  MNIST and the others of builders.py, from files that are downloaded unless
  TFDS has prepared the dataset before, or downloads.py finds them.

  Args:
    name: one of these, or TFDS's 'name', 'name/config', 'name:1.2.3'.
    data_dir: where datasets are prepared, or will be. None looks in
      TFDS_DATA_DIR or else TFDS's own folder, and prepares in the cache.
    say: takes lines for the user.

  Raises:
    UserError: no such dataset, or it is not prepared and cannot be.
  """
  # TFDS and scikit-learn take a second.
  from train.data import builders
  from train.data import embedded

  if name in embedded.BUILDERS:
    return _prepare(embedded.BUILDERS[name], data_dir, say)
  builder, prepared = find(name, data_dir)
  if prepared:
    return builder
  if ours := builders.find(name):
    return _prepare(ours, data_dir, say)
  raise not_prepared(name, builder)


def find(name: str, data_dir: str | None):
  """A TFDS builder of that name, and whether its files are there to be read.

  Args:
    name: none of embedded.BUILDERS.
    data_dir: as find_or_prepare has it.

  Raises:
    UserError: no such dataset.
  """
  import tensorflow_datasets as tfds

  from train.data import builders
  from train.data import embedded

  ours = builders.find(name)
  try:
    if ours is None:
      builder = tfds.builder(name, data_dir=data_dir, try_gcs=False)
    else:
      builder = ours(data_dir=data_dir)
    prepared = builder.is_prepared()
  except tfds.core.DatasetNotFoundError:
    raise config_lib.UserError(
      f'config.data.name is {name!r}, which neither TFDS nor this project '
      f'knows; {", ".join(builders.BUILDERS)} are downloaded, '
      f'{", ".join([*embedded.BUILDERS, *synthetic.DATASETS])} need no download'
    ) from None
  except Exception as error:  # A version or a config that TFDS does not have.
    raise config_lib.UserError(
      f'config.data.name is {name!r}: {config_lib.first_line(error)}'
    ) from None
  if ours is not None:
    # TFDS's own .tfrecord files, which need TensorFlow, count only where the
    # user asks for them by data_dir.
    readable = builder.info.file_format.value == 'array_record'
    prepared = prepared and (readable or bool(data_dir))
  return builder, prepared


def not_prepared(name: str, builder) -> config_lib.UserError:
  """What to say where a dataset that only TensorFlow can prepare is not."""
  return config_lib.UserError(
    f'config.data.name is {name!r}, which is not prepared at '
    f'{builder.data_path} ({_first_sentence(builder.info.description)}); set '
    'config.data.data_dir or TFDS_DATA_DIR to the folder that holds it, or '
    'prepare it, where TensorFlow is installed too, with tfds.builder('
    f'{name!r}, file_format="array_record").download_and_prepare()'
  )


def _first_sentence(text: str) -> str:
  return ' '.join(text.split()).partition('. ')[0]


def _prepare(kind: type, data_dir: str | None, say):
  """That builder's files in data_dir, or in the cache where it is None."""
  from train.data import embedded

  name = kind.name
  folder = cache.root() / 'tfds'
  # Not in data_dir, which a mistake must not change.
  lock = cache.root() / 'locks' / name
  if data_dir:
    folder = pathlib.Path(data_dir).expanduser()
    if not folder.is_dir():
      raise config_lib.UserError(
        f'config.data.data_dir is {data_dir!r}, which is no folder'
      )
  try:
    with downloads.hold(lock, name, say):
      builder = _open(kind, folder)
      if builder.is_prepared():
        return builder
      if name in downloads.FILES:
        builder.files = downloads.fetch(name, data_dir, say)
        builder.say = _past_silence(say)
      say(f'preparing {name} in {folder}')
      try:
        embedded.prepare(builder)
      finally:
        _tidy(folder / name, own=not data_dir)
      return builder
  except (OSError, RuntimeError) as error:  # array_record: of a full disk.
    raise config_lib.UserError(
      f'{name} cannot be prepared in {folder}: '
      f'{config_lib.first_line(error)}; set '
      'config.data.data_dir or TAISHAN_CACHE to a folder of your own'
    ) from None


def _open(kind: type, folder: pathlib.Path):
  """The builder of what is in the folder, be it prepared or not there."""
  try:
    builder = kind(data_dir=str(folder), file_format='array_record')
  except OSError:
    raise
  except Exception as error:  # As many kinds as a file can be damaged.
    raise config_lib.UserError(
      f'{folder / kind.name} is damaged: {config_lib.first_line(error)}; '
      'remove it'
    ) from None
  # TFDS takes any folder of that name for a prepared one.
  if builder.data_path.exists() and not builder.is_prepared():
    raise config_lib.UserError(
      f'{builder.data_path} is damaged: it lacks dataset_info.json; remove it'
    )
  return builder


def _past_silence(say):
  """`say`, also while embedded.prepare keeps TFDS's messages back."""
  out = sys.stdout

  def aloud(line: str):
    with contextlib.redirect_stdout(out):
      say(line)

  return aloud


def _tidy(folder: pathlib.Path, own: bool):
  """Removes what a failed or a killed preparation left."""
  if own:  # Elsewhere it may be another program's, which is still at work.
    for leftover in folder.glob('incomplete.*'):
      shutil.rmtree(leftover, ignore_errors=True)
  with contextlib.suppress(OSError):
    folder.rmdir()  # It stays where it holds anything.
