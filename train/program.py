"""What a config stands for: the mesh, the state's shape, two compiled steps.

Made once and used by the loop, by evaluation and by the benchmark, so that all
of them run the same program.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

import models
from train import config as config_lib
from train import losses
from train import metrics
from train import optim
from train import partition
from train import progress
from train import resolve
from train import state as state_lib
from train import step as step_lib
from train.data import sources


@dataclasses.dataclass(frozen=True)
class Program:
  """A resolved config, its data, and functions over them.

  Attributes:
    config: every default written out.
    dataset: with the validation part held out.
    mesh: all local devices.
    schedule: step -> learning rate.
    model: the model's shapes and structure, without arrays.
    init: () -> TrainState before the first step, on the mesh.
    state_shape: the TrainState's shapes, dtypes and shardings.
    train_step: (state, batch) -> (state, metrics); takes over the state.
    eval_step: (params, batch_stats, totals, batch) -> totals.
    zero_totals: () -> totals before the first batch.
  """

  config: config_lib.Config
  dataset: sources.Dataset
  mesh: jax.sharding.Mesh
  schedule: Callable
  model: nnx.Module
  init: Callable[[], state_lib.TrainState]
  state_shape: state_lib.TrainState
  train_step: Callable
  eval_step: Callable
  zero_totals: Callable[[], Any]

  @property
  def eval_split(self) -> str:
    """Where `eval/*` is measured: validation if there is one, else test."""
    return 'validation' if 'validation' in self.dataset.splits else 'test'

  @property
  def test_split(self) -> str:
    """Where `test/*` is measured: test if there is one, else validation."""
    return 'test' if 'test' in self.dataset.splits else 'validation'


def create(
  config: config_lib.Config,
  dataset: sources.Dataset | None = None,
  *,
  say: Callable[[str], None] = progress.say,
) -> Program:
  """Builds and checks everything; compiles nothing.

  Args:
    config: as written, or resolved.
    dataset: in place of the one that config.data names.
    say: takes a line for the user, where data must be prepared first.

  Raises:
    UserError: anything in the config that cannot be.
  """
  config = config_lib.check(config)
  mesh = partition.make_mesh()
  partition.check_batch_size(config.data.batch_size, mesh)
  resolve.check_names(config)  # Before data that may take long to prepare.
  if dataset is None:
    dataset = sources.load(config.data.name, config.data.data_dir, say=say)
  dataset = sources.hold_out(dataset, config.data.validation_fraction)
  config = resolve.resolve(config, dataset)
  schedule = optim.create_schedule(config.schedule, config.total_steps)
  tx = optim.create(config.optimizer, schedule)
  model = _create_model(config, dataset)
  graphdef = nnx.split(model)[0]

  def init() -> state_lib.TrainState:
    params, batch_stats = _arrays(_model(config, nnx.Rngs(config.seed)))
    return state_lib.create(params, batch_stats, tx)

  everywhere = partition.replicated(mesh)
  state_shape = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=everywhere
    ),
    jax.eval_shape(init),
  )
  parts = {
    'prepare': step_lib.make_prepare(dataset.input_key, config.data.normalize),
    'loss_fn': losses.create(config.task, config.loss),
    'measure': metrics.create(config.task),
  }
  train_step = step_lib.make_train_step(
    graphdef, tx, **parts, schedule=schedule, seed=config.seed
  )
  eval_step = step_lib.make_eval_step(
    graphdef,
    **parts,
    count=metrics.create_confusion(config.task, len(dataset.classes or ())),
  )
  totals_shape = jax.eval_shape(
    eval_step,
    state_shape.params,
    state_shape.batch_stats,
    None,
    _eval_batch_shape(config, dataset),
  )
  # Lanes stay where their examples are, so that adding up moves nothing.
  totals_sharding = {
    name: everywhere if name == 'confusion' else partition.batched(mesh)
    for name in totals_shape
  }
  return Program(
    config=config,
    dataset=dataset,
    mesh=mesh,
    schedule=schedule,
    model=model,
    # Created under its final sharding: else the second step compiles again.
    init=jax.jit(init, out_shardings=everywhere),
    state_shape=state_shape,
    train_step=jax.jit(
      train_step, donate_argnums=0, out_shardings=(everywhere, everywhere)
    ),
    eval_step=jax.jit(
      eval_step, donate_argnums=2, out_shardings=totals_sharding
    ),
    zero_totals=lambda: jax.device_put(
      jax.tree.map(lambda t: jnp.zeros(t.shape, t.dtype), totals_shape),
      totals_sharding,
    ),
  )


def _model(config: config_lib.Config, rngs: nnx.Rngs) -> nnx.Module:
  block = dict(config.model)
  return models.create(block.pop('name'), **block, rngs=rngs)


def _arrays(model: nnx.Module) -> tuple[dict, dict]:
  """The model's parameters and running statistics as plain dicts."""
  _, params, batch_stats, rest = nnx.split(model, nnx.Param, nnx.BatchStat, ...)
  if jax.tree.leaves(rest):
    raise TypeError(
      f'{type(model).__name__} keeps state that TrainState has no place for: '
      f'{list(nnx.to_flat_state(rest).paths)}'
    )
  return nnx.to_pure_dict(params), nnx.to_pure_dict(batch_stats)


def _create_model(
  config: config_lib.Config, dataset: sources.Dataset
) -> nnx.Module:
  """The model's shapes, tried on one example of the data.

  Raises:
    UserError: the model refuses its arguments, the data does not fit it, or it
      gives another number of outputs than the task needs.
  """
  name = config.model['name']
  shape = jax.ShapeDtypeStruct((2, *dataset.input_shape), jnp.float32)
  wanted = losses.TASKS[config.task].num_outputs(dataset)
  try:
    model = nnx.eval_shape(lambda: _model(config, nnx.Rngs(0)))
    outputs = jax.eval_shape(lambda x: _model(config, nnx.Rngs(0))(x), shape)
  except (ValueError, TypeError, ZeroDivisionError, AttributeError) as error:
    raise config_lib.UserError(
      f'config.model: {name} cannot be made: {config_lib.first_line(error)}'
    ) from None
  if outputs.size != 2 * wanted:
    raise config_lib.UserError(
      f'config.model: {name} gives {outputs.size // 2} outputs an example; '
      f'task {config.task} on {dataset.name} needs {wanted}'
    )
  return model


def _eval_batch_shape(config, dataset):
  size = config.data.batch_size
  shapes = {
    key: jax.ShapeDtypeStruct((size, *array.shape[1:]), array.dtype)
    for key, array in dataset.splits['train'].arrays.items()
  }
  return shapes | {'mask': jax.ShapeDtypeStruct((size,), bool)}
