"""What a config stands for: the mesh, the state's shape, two compiled steps.

Made once and used by the loop, by evaluation and by the benchmark, so that all
of them run the same program.
"""

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses
import functools
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

import models
from train import check
from train import config as config_lib
from train import losses
from train import mesh as mesh_lib
from train import metrics
from train import optim
from train import partition
from train import paths
from train import progress
from train import resolve
from train import state as state_lib
from train import step as step_lib
from train.data import augment
from train.data import pipeline
from train.data import sources
from train.data import subset


@dataclasses.dataclass(frozen=True)
class Program:
  """A resolved config, its data, and functions over them.

  Attributes:
    config: every default written out.
    dataset: with the validation part held out.
    mesh: the devices of all processes, as config.mesh has them.
    schedule: step -> learning rate.
    model: the model's shapes and structure, without arrays.
    init: (params={}, batch_stats={}) -> TrainState before the first step, on
      the mesh; what is given takes the place of new values.
    state_shape: the TrainState's shapes, dtypes and shardings.
    train_step: (state, batch) -> (state, metrics); takes over the state.
    predict: (params, batch_stats, batch) -> (outputs, values of each example).
    eval_step: (params, batch_stats, totals, batch) -> totals.
    zero_totals: () -> totals before the first batch.
    eval_params: state -> the parameters to evaluate: their running mean, or
      schedule_free's own, where there is one.
  """

  config: config_lib.Config
  dataset: sources.Dataset
  mesh: jax.sharding.Mesh
  schedule: Callable
  model: nnx.Module
  init: Callable[..., state_lib.TrainState]
  state_shape: state_lib.TrainState
  train_step: Callable
  predict: Callable
  eval_step: Callable
  zero_totals: Callable[[], Any]
  eval_params: Callable[[state_lib.TrainState], Any]

  def merge(self, state: state_lib.TrainState) -> nnx.Module:
    """The model with the parameters that are evaluated."""
    graphdef = nnx.split(self.model)[0]
    return nnx.merge(graphdef, self.eval_params(state), state.batch_stats)

  @property
  def eval_batch_size(self) -> int:
    """The batch size, or the next that the devices can share evenly."""
    return mesh_lib.round_up(self.config.data.batch_size, self.mesh)

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
  training: bool = True,
  described: bool = False,
  devices: Sequence[jax.Device] | None = None,
  say: Callable[[str], None] = progress.say,
) -> Program:
  """Builds and checks everything; compiles nothing.

  Args:
    config: as written, or resolved.
    dataset: in place of the one that config.data names.
    training: False for a program that only evaluates: it takes any number of
      devices, all along `data` where config.mesh does not fit them.
    described: True for a program that is not run: of the dataset it needs the
      shapes alone, so that it need not be there.
    devices: in place of all those of all processes.
    say: takes a line for the user, where data must be prepared first.

  Raises:
    UserError: anything in the config that cannot be.
  """
  config = check.check(config)
  if config.kernels == 'pallas_gpu_interpret':
    mesh_lib.give_threads(mesh_lib.INTERPRETER_THREADS)
  mesh = mesh_lib.make_mesh(config.mesh, devices, strict=training)
  if training:
    mesh_lib.check(config, mesh)
  mesh_lib.check_kernels(config.kernels, mesh)
  config, dataset, model = resolved(config, dataset, described, say)
  schedule = optim.create_schedule(config.schedule, config.total_steps)
  tx = optim.create(config, schedule)
  graphdef = nnx.split(model)[0]
  rates = _rates(config, _arrays(model)[0])

  def init(params, batch_stats) -> state_lib.TrainState:
    new_params, new_stats = _arrays(_model(config, nnx.Rngs(config.seed)))
    params = paths.join(new_params, params)
    return state_lib.create(
      params,
      paths.join(new_stats, batch_stats),
      tx.init(paths.split(params, rates)[0]),
      ema=config.ema_decay is not None,
    )

  def eval_params(state: state_lib.TrainState):
    if config.ema_decay is not None:
      return state.ema_params
    trained, frozen = paths.split(state.params, rates)
    return paths.join(optim.eval_params(state.opt_state, trained), frozen)

  everywhere = partition.replicated(mesh)
  options = mesh_lib.determinism(mesh)[0] if config.deterministic else None
  compiled = functools.partial(jax.jit, compiler_options=options)
  state_shape = jax.eval_shape(init, {}, {})
  partition.check_tensor(config.model['name'], state_shape.params, mesh)
  shardings = partition.state_shardings(mesh, state_shape, state_shape.params)
  state_shape = jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=sharding
    ),
    state_shape,
    shardings,
  )
  jitted_init = jax.jit(init, out_shardings=shardings)
  parts = {
    'prepare': step_lib.make_prepare(
      dataset.input_key,
      config.data.normalize,
      jnp.promote_types(_param_dtype(config), jnp.float32),
    ),
    'measure': metrics.create(config.task, config.loss),
    'gather': partition.make_gather(shardings.params),
  }
  per_device = config.partition == 'shard_map'
  train_step = step_lib.make_train_step(
    _synchronised(model) if per_device and config.sync_batch_norm else graphdef,
    tx,
    **parts,
    augment=augment.create(config.data.augment, dataset.input_key),
    loss_fn=losses.create(config.task, config.loss, config.label_smoothing),
    schedule=schedule,
    config=config,
    rates=rates,
    unroll=mesh.devices.flat[0].platform == 'cpu',
    axis_name=mesh_lib.DATA if per_device else None,
  )
  if per_device:
    train_step = partition.per_device(mesh, train_step, pipeline.specs)
  predict = step_lib.make_predict(
    graphdef, **parts, loss_fn=losses.create(config.task, config.loss)
  )
  eval_step = step_lib.make_eval_step(
    predict, metrics.create_confusion(config.task, len(dataset.classes or ()))
  )
  train_step, predict, eval_step = (
    partition.ambient(mesh, config.kernels, step)
    for step in (train_step, predict, eval_step)
  )
  try:
    totals_shape = jax.eval_shape(
      eval_step,
      state_shape.params,
      state_shape.batch_stats,
      None,
      _batch_shape(mesh_lib.round_up(config.data.batch_size, mesh), dataset),
    )
  except ValueError as error:
    if config.kernels == 'auto':
      raise
    raise config_lib.UserError(
      f'config.kernels is {config.kernels}: {config_lib.first_line(error)}'
    ) from None
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
    init=lambda params={}, batch_stats={}: jitted_init(  # noqa: B006
      params, batch_stats
    ),
    state_shape=state_shape,
    train_step=compiled(
      train_step, donate_argnums=0, out_shardings=(shardings, everywhere)
    ),
    predict=compiled(predict),
    eval_step=compiled(
      eval_step, donate_argnums=2, out_shardings=totals_sharding
    ),
    zero_totals=jax.jit(
      lambda: jax.tree.map(lambda t: jnp.zeros(t.shape, t.dtype), totals_shape),
      out_shardings=totals_sharding,
    ),
    eval_params=eval_params,
  )


def resolved(
  config: config_lib.Config,
  dataset: sources.Dataset | None = None,
  described: bool = False,
  say: Callable[[str], None] = progress.say,
) -> tuple[config_lib.Config, sources.Dataset, nnx.Module]:
  """What `create` does before it needs devices.

  Returns:
    The config with every default written out, its data with the validation part
    held out, and the model without arrays.

  Raises:
    UserError: anything in the config that cannot be on any devices.
  """
  config = check.check(config)
  _check_dtype(config.dtype)
  resolve.check_names(config)  # Before data that may take long to prepare.
  if dataset is None and described:
    from train.data import described as described_lib  # TFDS takes a second.

    dataset = described_lib.describe(config.data, say)
  elif dataset is None:
    dataset = sources.load(
      config.data.name,
      config.data.data_dir,
      image_size=config.data.image_size,
      sequence_length=config.data.sequence_length,
      on_error=config.data.on_error,
      say=say,
    )
  dataset = subset.pick_classes(dataset, config.data.classes)
  dataset = sources.hold_out(dataset, config.data.validation_fraction)
  dataset = subset.pick_fold(dataset, config.data.folds, config.data.fold)
  dataset = subset.limit(dataset, config.data.max_examples)
  config = resolve.resolve(config, dataset)
  return config, dataset, _create_model(config, dataset)


def shapes(config: config_lib.Config) -> tuple[dict, dict]:
  """The shapes of a resolved config's parameters and running statistics."""
  return _arrays(nnx.eval_shape(lambda: _model(config, nnx.Rngs(0))))


def _rates(config: config_lib.Config, params: dict) -> dict[paths.Path, float]:
  """Path -> factor on the learning rate, of each parameter that is trained.

  Raises:
    UserError: a pattern that matches nothing, or nothing left to train.
  """
  patterns = config.rate_multipliers
  leaves = paths.flatten(params)
  paths.check_patterns('rate_multipliers', patterns, leaves)
  rates = {}
  for path in leaves:
    matching = (f for p, f in patterns.items() if paths.matches(p, path))
    if rate := next(matching, 1.0):
      rates[path] = rate
  if not rates:
    raise config_lib.UserError(
      f'config.rate_multipliers is {patterns}, which freezes every parameter'
    )
  return rates


def _model(config: config_lib.Config, rngs: nnx.Rngs) -> nnx.Module:
  block = dict(config.model)
  return models.create(
    block.pop('name'),
    **block,
    dtype=jnp.dtype(config.dtype),
    param_dtype=_param_dtype(config),
    rngs=rngs,
  )


def _param_dtype(config: config_lib.Config) -> jnp.dtype:
  return jnp.promote_types(config.dtype, jnp.float32)


def _check_dtype(name: str):
  if name == 'float64' and not jax.config.jax_enable_x64:
    raise config_lib.UserError(
      'config.dtype is float64, which jax has where the environment says '
      'JAX_ENABLE_X64=1'
    )


def _synchronised(model: nnx.Module) -> nnx.GraphDef:
  """The model's structure, its batch norms over the devices along `data`."""
  graphdef, state = nnx.split(model)
  model = nnx.merge(graphdef, state, copy=True)
  for _, module in nnx.iter_modules(model):
    if isinstance(module, nnx.BatchNorm):
      module.axis_name = mesh_lib.DATA
  return nnx.split(model)[0]


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
  wanted = losses.TASKS[config.task].num_outputs(dataset)

  def outputs(batch):
    return step_lib.apply(_model(config, nnx.Rngs(0)), batch)[0]

  try:
    model = nnx.eval_shape(lambda: _model(config, nnx.Rngs(0)))
    outputs = jax.eval_shape(outputs, model_inputs(dataset, 2))
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


def model_inputs(
  dataset: sources.Dataset, batch_size: int
) -> dict[str, jax.ShapeDtypeStruct]:
  """The shapes of what step.apply gives the model: 'input', and the extras."""
  specs = dataset.splits['train'].specs
  numbers = jnp.int32 if dataset.input_key == 'tokens' else jnp.float32
  shapes = {'input': (dataset.input_shape, numbers)} | {
    key: (specs[key].shape, specs[key].dtype)
    for key in sources.EXTRAS
    if key in specs
  }
  return {
    key: jax.ShapeDtypeStruct((batch_size, *shape), dtype)
    for key, (shape, dtype) in shapes.items()
  }


def _batch_shape(size, dataset):
  shapes = {
    key: jax.ShapeDtypeStruct((size, *spec.shape), spec.dtype)
    for key, spec in dataset.splits['train'].specs.items()
  }
  return shapes | {'mask': jax.ShapeDtypeStruct((size,), bool)}
