"""Files of weights, read as arrays and never executed."""

import os
import pathlib
import zipfile

import numpy as np
import safetensors
import safetensors.numpy

# What is read, and what is not, because reading it can run code.
FILES = ('.safetensors', '.npz')
PICKLES = ('.pt', '.pth', '.bin', '.pkl', '.pickle', '.ckpt')


def read(file: str | os.PathLike) -> dict[str, np.ndarray]:
  """The arrays of a .safetensors or .npz file; nothing in it is executed.

  Raises:
    ValueError: any other file, or one that cannot be read.
  """
  path = pathlib.Path(file)
  if path.suffix.lower() in PICKLES:
    raise ValueError(
      f'{path} is a pickle, which can run code when it is read; where it was '
      'made, save it with safetensors.torch.save_file'
    )
  if path.suffix.lower() not in FILES:
    raise ValueError(f'{path}: weights are read from {" or ".join(FILES)}')
  if not os.path.isfile(path):
    raise ValueError(f'{path}: there is no such file')
  try:
    if _is_torch_archive(path):
      raise ValueError(
        'it is a pickle archive of PyTorch, which can run code when it is '
        'read; where it was made, save it with safetensors.torch.save_file'
      )
    if path.suffix.lower() == '.safetensors':
      return safetensors.numpy.load_file(path)
    if not zipfile.is_zipfile(path):
      raise ValueError('it is no zip archive')
    with np.load(path, allow_pickle=False) as arrays:
      return dict(arrays)
  except (
    safetensors.SafetensorError, zipfile.BadZipFile, OSError, EOFError,
    ValueError, TypeError, KeyError, NotImplementedError,
  ) as error:  # fmt: skip
    reason = (str(error) or type(error).__name__).splitlines()[0]
    raise ValueError(
      f'{path} cannot be read as {path.suffix}: {reason}'
    ) from None


def _is_torch_archive(path: pathlib.Path) -> bool:
  """Whether torch.save wrote it, whatever its name says."""
  with path.open('rb') as stream:
    if stream.read(4) != b'PK\x03\x04':
      return False
  with zipfile.ZipFile(path) as archive:
    return any(name.endswith('/data.pkl') for name in archive.namelist())
