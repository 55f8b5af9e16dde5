"""A training step of each family through the loop, and the same in PyTorch."""

from collections.abc import Callable
import dataclasses
import functools
import importlib.metadata
import importlib.util
import json
import pathlib
import statistics
import tempfile
import time
from typing import Any

from experiments.benchmarks import silence
from train import config as config_lib


@dataclasses.dataclass(frozen=True)
class Case:
  """A model, what it is trained on, and the timed steps of a round."""

  model: dict[str, Any]
  steps: int
  image_shape: tuple[int, ...] = (28, 28, 1)
  batch_size: int = 128
  task: str = 'classification'


_SMALL = {'image_shape': (32, 32, 3), 'batch_size': 32}
CASES = {
  'mlp': Case({'name': 'mlp', 'widths': (256, 128)}, 1_000),
  'autoencoder': Case(
    {
      'name': 'autoencoder',
      'variant': 'dense',
      'widths': (256,),
      'code_size': 32,
    },
    1_000,
    task='reconstruction',
  ),
  'cnn': Case(
    {'name': 'cnn', 'widths': (32, 64), 'head_widths': (256,), 'norm': None},
    50,
  ),
  'resnet18': Case(
    {'name': 'resnet', 'variant': '18', 'stem': '3x3'}, 5, **_SMALL
  ),
  'vit': Case(
    {
      'name': 'vit',
      'variant': 'Ti/16',
      'patch_size': 4,
      'width': 192,
      'depth': 6,
      'num_heads': 3,
    },
    10,
    **_SMALL,
  ),
  'lstm': Case({'name': 'lstm', 'num_features': 28, 'widths': (128,)}, 100),
}
# Batches in the training split, which lies on the device as uint8.
_BATCHES = 8
_WAYS = ('ours', 'eager', 'compiled')


def main(cases: list[str], rounds: int):
  """Prints each case as JSON, then all as a table.

  Raises:
    UserError: there is no such case.
  """
  for name in cases:
    if name not in CASES:
      raise config_lib.UserError(
        f'--cases is {name!r}; there are {", ".join(CASES)}'
      )
  peak = product_rate()
  rows = []
  for name in cases or CASES:
    rows.append(measure(name, rounds, peak))
    print(json.dumps(rows[-1]), flush=True)
  print('', *table(rows), '', sep='\n')
  print(
    f'MFU: share of {peak / 1e9:.0f} GFLOP/s, the best float32 product here'
  )
  if has_torch():
    version = importlib.metadata.version('torch')
    print(f'PyTorch {version}: one batch that lies in memory, fused Adam')
  else:
    print('PyTorch is not installed: ours alone')


def has_torch() -> bool:
  """Whether PyTorch is there to compare with."""
  return importlib.util.find_spec('torch') is not None


def measure(
  name: str, rounds: int, peak: float, steps: int | None = None
) -> dict[str, Any]:
  """One case: milliseconds a step, ratio to PyTorch, MFU of both.

  Ours goes through train.loop with its logging and metrics, and its rate is the
  loop's own account; PyTorch's is a bare loop over one batch. They take turns,
  so that what slows one slows the other. Of eager and torch.compile the one
  with the better median counts: ratio is its seconds over ours, the median of
  the rounds', with their range.

  Args:
    name: in CASES.
    rounds: how many times each runs.
    peak: operations a second that count as an MFU of 1.
    steps: of a round; None for the case's own.

  Raises:
    ValueError: PyTorch's network has another number of parameters.
  """
  import models

  case = CASES[name]
  steps = case.steps if steps is None else steps
  program = create_program(case, steps)
  parameters = models.count_parameters(program.model)
  operations = count_operations(program)
  timers = {'ours': functools.partial(_loop_seconds, program)}
  if has_torch():
    timers |= _torch_timers(name, case, parameters)
  timers['ours'](steps)  # Compiles.
  seconds = {way: [] for way in timers}
  for _ in range(rounds):
    for way, timer in timers.items():
      seconds[way].append(timer(steps))
  medians = {way: statistics.median(values) for way, values in seconds.items()}
  row = {
    'case': name,
    'batch_size': case.batch_size,
    'parameters': parameters,
    'operations': operations,
    'steps': steps,
    'rounds': rounds,
    'milliseconds': {k: round(1e3 * v, 3) for k, v in medians.items()},
    'mfu': {k: round(operations / v / peak, 3) for k, v in medians.items()},
  }
  if theirs := [way for way in timers if way != 'ours']:
    best = min(theirs, key=medians.get)
    ratios = [
      their / our
      for our, their in zip(seconds['ours'], seconds[best], strict=True)
    ]
    row |= {
      'best': best,
      'ratio_median': round(statistics.median(ratios), 3),
      'ratio_min': round(min(ratios), 3),
      'ratio_max': round(max(ratios), 3),
    }
  return row


def product_rate(size: int = 2048, repeats: int = 10) -> float:
  """Operations a second of the fastest float32 product, ours or PyTorch's.

  [size, size] times [size, size] on all threads; the best of the repeats.
  """
  import jax
  import jax.numpy as jnp

  x = jnp.ones((size, size), jnp.float32)
  product = jax.jit(jnp.matmul)
  times = []
  for _ in range(1 + repeats):
    start = time.perf_counter()
    jax.block_until_ready(product(x, x))
    times.append(time.perf_counter() - start)
  rate = 2 * size**3 / min(times)
  if has_torch():
    from experiments.benchmarks import torch_models

    rate = max(rate, torch_models.product_rate(size, repeats))
  return rate


def table(rows: list[dict[str, Any]]) -> list[str]:
  """The rows as lines of text, milliseconds a step and shares of the peak."""
  lines = [
    ('case', 'ours ms', 'eager ms', 'compiled ms', 'ratio', 'range',
     'MFU', 'PyTorch MFU')
  ]  # fmt: skip
  for row in rows:
    times, mfu = row['milliseconds'], row['mfu']
    line = [row['case']]
    line += [f'{times[k]:.2f}' if k in times else '-' for k in _WAYS]
    if 'best' in row:
      line += [
        f'{row["ratio_median"]:.2f}',
        f'{row["ratio_min"]:.2f} to {row["ratio_max"]:.2f}',
        f'{mfu["ours"]:.2f}',
        f'{mfu[row["best"]]:.2f}',
      ]
    else:
      line += ['-', '-', f'{mfu["ours"]:.2f}', '-']
    lines.append(tuple(line))
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  return [
    '  '.join(f'{c:>{w}}' for c, w in zip(line, widths, strict=True))
    for line in lines
  ]


# --------------------------------------------------------------------- ours


def create_program(case: Case, steps: int):
  """The case's program, of one step more than is timed: it compiles."""
  from train import program as program_lib

  never = 1_000_000
  config = config_lib.Config(
    task=case.task,
    total_steps=steps + 1,
    log_every=never,
    eval_every=never,
    checkpoint_every=never,
    keep_best=0,
    data=config_lib.Data(
      name='noise', batch_size=case.batch_size, normalize='unit'
    ),
    model=case.model,
    optimizer={'name': 'adam'},
    schedule={'name': 'constant_schedule', 'value': 1e-3},
  )
  return program_lib.create(config, noise(case))


def noise(case: Case):
  """A dataset of the case's shape: what the pixels are changes no time."""
  import numpy as np

  from train.data import sources

  generator = np.random.default_rng(0)
  splits = {}
  for split, batches in (('train', _BATCHES), ('test', 1)):
    size = batches * case.batch_size
    shape = (size, *case.image_shape)
    splits[split] = sources.Split({
      'image': generator.integers(0, 256, shape, dtype=np.uint8),
      'label': generator.integers(0, 10, size).astype(np.int32),
    })  # fmt: skip
  return sources.Dataset('noise', splits, tuple('0123456789'))


def _loop_seconds(program, steps: int) -> float:
  """Seconds a step, by the loop's own account, which omits the first step."""
  from train import loop
  from train import workdir
  from train import writer

  with tempfile.TemporaryDirectory() as folder:
    with silence.silence():
      loop.run(program, folder)
    lines = writer.read(pathlib.Path(folder) / workdir.TIMING)
  assert sum(line['steps'] for line in lines) == steps
  return sum(line['seconds'] for line in lines) / steps


def count_operations(program) -> int:
  """Floating-point operations of a training step, forward and backward."""
  from train import flops
  from train.data import pipeline

  batches = pipeline.train_batches(
    program.dataset.splits['train'],
    seed=0,
    batch_size=program.config.data.batch_size,
    first_step=0,
    mesh=program.mesh,
  )
  return flops.count(program.train_step, program.state_shape, next(batches))


# ------------------------------------------------------------------ PyTorch


def _torch_timers(
  name: str, case: Case, parameters: int
) -> dict[str, Callable[[int], float]]:
  """'eager' and, where a compiler is there, 'compiled' -> its timer."""
  import numpy as np

  from experiments.benchmarks import torch_models

  batch = noise(case).splits['train'].take(np.arange(case.batch_size))
  image = batch['image'].astype(np.float32) / 255
  label = None if case.task == 'reconstruction' else batch['label']
  timers = {}
  for way in ('eager', 'compiled'):
    model = torch_models.create(name)
    found = torch_models.count_parameters(model)
    if found != parameters:
      raise ValueError(
        f'{name} has {parameters} parameters, and {found} in PyTorch'
      )
    try:
      timers[way] = torch_models.timer(
        model, image, label, compiled=way == 'compiled'
      )
    except RuntimeError as error:  # No C++ compiler, say.
      if way == 'eager':
        raise
      print(f'torch.compile fails: {config_lib.first_line(error)}')
  return timers
