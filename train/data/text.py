"""Text as examples for a language model: windows of characters.

Shapes: T time, V vocabulary, m windows.
"""

from collections.abc import Mapping

import numpy as np

from train import config as config_lib

_MOST_CHARACTERS = 256  # A vocabulary of one byte each.


def read(name: str, builder, split: str) -> str:
  """The whole text of a TFDS builder's split.

  Raises:
    UserError: a record of it cannot be read. Windows cross records, so that
      none of them can be passed over.
  """
  try:
    return '\n'.join(
      example['text'].decode() for example in builder.as_data_source(split)
    )
  except MemoryError:
    raise
  except Exception as error:  # array_record's, or protobuf's.
    raise config_lib.UserError(
      f'config.data.name is {name!r}, whose split {split} cannot be read: '
      f'{config_lib.first_line(error)}; of a text no record is passed over'
    ) from None


def vocabulary(texts: Mapping[str, str]) -> tuple[str, ...]:
  """The characters of all splits in their order, [V].

  Raises:
    UserError: there are more than 256.
  """
  characters = sorted(set().union(*texts.values()))
  if len(characters) > _MOST_CHARACTERS:
    raise config_lib.UserError(
      f'config.data.name: the text has {len(characters)} different characters; '
      f'character models take at most {_MOST_CHARACTERS}'
    )
  return tuple(characters)


def encode(text: str, characters: tuple[str, ...]) -> np.ndarray:
  """Each character's place in the vocabulary, uint8 [n].

  Raises:
    UserError: a character that is not in the vocabulary.
  """
  places = {character: i for i, character in enumerate(characters)}
  try:
    return np.array([places[c] for c in text], np.uint8)
  except KeyError as error:
    raise config_lib.UserError(
      f'the character {error} is not in the vocabulary: {"".join(characters)!r}'
    ) from None


def windows(tokens: np.ndarray, length: int) -> dict[str, np.ndarray]:
  """'tokens' and the ones that follow, 'targets', both uint8 [m, T].

  The windows lie end to end; what is left over at the end, less than one, is
  not read.
  """
  count = (len(tokens) - 1) // length
  return {
    'tokens': tokens[: count * length].reshape(count, length),
    'targets': tokens[1 : count * length + 1].reshape(count, length),
  }
