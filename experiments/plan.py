r"""Says whether a config fits on devices that are not here, and how fast it is.

  python -m experiments.plan --config=digits_cnn --target=cpu:8
  python -m experiments.plan --config=imagenet_vit_s16 --target=v5e:4x4 \
      --config.dtype=bfloat16 --picture=plan.png
  python -m experiments.plan --config=imagenet_resnet50 --target=h200:8 \
      --search_batch
  python -m experiments.plan --config=imagenet_vit_s16 --target=v5e:4x4 \
      --search_mesh

The very step that launch would run is compiled, by the target's own compiler,
without its data and without its devices: TPUs take the extra tpu, GPUs cuda.

Times are lower bounds: products at their peak, memory and links at their rates,
each behind the longest of the three. Compiling takes seconds on a CPU, and one
or two minutes for a deep network on a TPU.

Exit codes: 0 answered, be it that it does not fit; 2 your input is wrong; 1 the
compiler refused the program, or failed; 75 and 130 stopped.
"""

from collections.abc import Sequence
import json
import pathlib

from absl import flags

from experiments import command
from train import config as config_lib

FLAGS = flags.FlagValues()
flags.DEFINE_string(
  'config',
  None,
  'a config file, or the bare name of one in experiments/configs',
  flag_values=FLAGS,
)
flags.DEFINE_string(
  'target',
  None,
  'a chip and how many: v5e:4x4, v6e:8x8, v5p:2x2x1, v4:2x2x2, h100:8, h200:8, '
  'cpu:8',
  flag_values=FLAGS,
)
flags.DEFINE_bool('json', False, 'print JSON', flag_values=FLAGS)
flags.DEFINE_string(
  'picture', None, 'a .png to draw the plan into', flag_values=FLAGS
)
flags.DEFINE_bool(
  'search_batch', False, 'find the largest batch that fits', flag_values=FLAGS
)
flags.DEFINE_bool(
  'search_mesh',
  False,
  'find the mesh with the fastest step of those that fit',
  flag_values=FLAGS,
)


def main(argv: Sequence[str]):
  """Parses the flags, compiles, and prints what came out."""
  overrides = command.parse(FLAGS, argv, __doc__)
  from experiments.planning import targets

  for name in ('config', 'target'):
    if FLAGS[name].value is None:
      raise config_lib.UserError(
        f'--{name} is missing; {_takes(name, targets)}'
      )
  if FLAGS.search_batch and FLAGS.search_mesh:
    raise config_lib.UserError(
      '--search_batch and --search_mesh are two questions; give one of them'
    )
  picture = _picture(FLAGS.picture)
  config, _, notes = command.load_config(FLAGS.config, overrides)
  target = targets.parse(FLAGS.target)
  from experiments.planning import compiler as compiler_lib
  from train import progress

  if not FLAGS.json:
    for note in notes:
      progress.say(note)
  with compiler_lib.Compiler(target) as compiler:
    if FLAGS.search_batch:
      found = _search_batch(compiler, config)
    elif FLAGS.search_mesh:
      found = _search_mesh(compiler, config)
    else:
      found = _one(compiler, config)
  if picture and found is not None:
    from experiments.planning import picture as picture_lib

    picture_lib.draw(found, picture)
    if not FLAGS.json:
      print(f'picture: {picture}')


def _takes(name: str, targets) -> str:
  if name == 'target':
    return f'it takes {targets.names()}'
  return f'there are {", ".join(command.config_names())}'


def _picture(name: str | None) -> pathlib.Path | None:
  if name is None:
    return None
  path = pathlib.Path(name)
  if path.suffix != '.png':
    raise config_lib.UserError(f'--picture is {name!r}; it takes a .png')
  if not path.parent.is_dir():
    raise config_lib.UserError(
      f'--picture is {name!r}, and {path.parent} is no folder'
    )
  return path


def _one(compiler, config):
  from experiments.planning import cost
  from experiments.planning import text

  plan = cost.plan(compiler.target, compiler.ask(config))
  if FLAGS.json:
    print(json.dumps(cost.as_json(plan)))
  else:
    print('\n'.join(text.lines(plan)))
  return plan


def _search_batch(compiler, config):
  from experiments.planning import cost
  from experiments.planning import search
  from experiments.planning import text

  found = {}
  for size, plan in search.batch(compiler, config):
    found[size] = plan
    if not FLAGS.json:
      print(f'{size:>8,}  {text.verdict(plan)}', flush=True)
  size = max(size for size, plan in found.items() if plan.fits)
  plan = found[size]
  if FLAGS.json:
    print(json.dumps(cost.as_json(plan)))
    return plan
  print(f'\nthe largest that fits: --config.data.batch_size={size}\n')
  print('\n'.join(text.lines(plan)))
  return plan


def _search_mesh(compiler, config):
  from experiments.planning import cost
  from experiments.planning import search
  from experiments.planning import text

  found = []
  for mesh, plan in search.mesh(compiler, config):
    found.append((mesh, plan))
    if not FLAGS.json:
      said = plan if isinstance(plan, str) else text.verdict(plan)
      print(f'{_spelled(mesh)}: {said}', flush=True)
  found = search.fastest(found)
  if FLAGS.json:
    for mesh, plan in found:
      lengths = {'data': mesh.data, 'fsdp': mesh.fsdp, 'tensor': mesh.tensor}
      if isinstance(plan, str):
        print(json.dumps({'mesh': lengths, 'refused': plan}))
      else:
        print(json.dumps(cost.as_json(plan)))
  else:
    rows = [('mesh', *text.COLUMNS)]
    rows += [
      text.row(_spelled(mesh), plan)
      for mesh, plan in found
      if not isinstance(plan, str)
    ]
    print('', *text.table(rows), sep='\n')
  mesh, plan = found[0]
  if isinstance(plan, str) or not plan.fits:
    if not FLAGS.json:
      print('\nno mesh of these devices has room for it')
    return None
  if not FLAGS.json:
    print(
      f'\nthe fastest: --config.mesh.data={mesh.data} '
      f'--config.mesh.fsdp={mesh.fsdp} --config.mesh.tensor={mesh.tensor}'
    )
  return plan


def _spelled(mesh: config_lib.Mesh) -> str:
  return f'data {mesh.data}, fsdp {mesh.fsdp}, tensor {mesh.tensor}'


if __name__ == '__main__':
  command.start('plan', main)
