"""Lists the commands and the configs."""

from experiments import command


def text() -> str:
  """One line a command, one a config."""
  parts = []
  for title, names in (
    ('commands (python -m experiments.NAME --help)', command.command_names()),
    ('configs (--config=NAME)', command.config_names()),
  ):
    width = max(map(len, names))
    parts.append(f'{title}:')
    parts += [f'  {name:{width}}  {line}' for name, line in names.items()]
    parts.append('')
  return '\n'.join(parts).strip()


if __name__ == '__main__':
  print(text())
