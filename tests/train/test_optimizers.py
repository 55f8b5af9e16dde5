"""Every optimizer of Optax: named or refused, and taking its steps as written.

Those of the course are held, iterate by iterate, to NumPy written from their
papers; all of them must lower a convex loss through the real training step.
"""

import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from tests import runs
from train import config as config_lib
from train import optim
from train import program as program_lib
from train.data import pipeline
from train.data import sources

# Optax warns of those that it will drop; until then they are there.
pytestmark = pytest.mark.filterwarnings('ignore::DeprecationWarning')

# --------------------------------------------------------------- what there is


def _public(*modules):
  """Name -> every public callable of these modules that is no class."""
  return {
    name: value
    for module in modules
    for name, value in vars(module).items()
    if callable(value)
    and not isinstance(value, type)
    and not name.startswith('_')
  }


def _signature(function):
  """The signature, or an empty one of what has none (as an alias of types)."""
  try:
    return inspect.signature(function)
  except (TypeError, ValueError):
    return inspect.Signature()


def _is_optimizer(function) -> bool:
  """It takes a learning rate and may return a transformation."""
  signature = _signature(function)
  returns = signature.return_annotation
  takes_rate = any(
    'learning_rate' in name or name == 'lr' for name in signature.parameters
  )
  return takes_rate and (
    returns is signature.empty or 'GradientTransformation' in str(returns)
  )


def _is_schedule(name, function) -> bool:
  returns = _signature(function).return_annotation
  return name.endswith(('_schedule', '_schedules', '_decay')) or (
    returns == optax.Schedule or str(returns).endswith('Schedule')
  )


def test_every_optimizer_of_optax_is_there_or_is_refused_with_a_reason():
  found = {
    name
    for name, function in _public(optax, optax.contrib).items()
    if _is_optimizer(function)
  }
  # The course's and the newest, so that the rule cannot find nothing.
  assert {'sgd', 'adam', 'nadam', 'polyak_sgd', 'muon', 'sophia'} <= found
  parts = {name for name in found if name.startswith('scale_by_')}
  assert found - parts - set(optim.REFUSED) == set(optim.OPTIMIZERS)
  assert not set(optim.REFUSED) & set(optim.OPTIMIZERS)


def test_every_schedule_of_optax_is_there_or_is_refused_with_a_reason():
  found = {
    name
    for name, function in _public(optax.schedules).items()
    if _is_schedule(name, function)
  }
  assert {'constant_schedule', 'exponential_decay', 'join_schedules'} <= found
  ours = {'reduce_on_plateau'}  # Of optax.contrib, and no schedule there.
  assert found - set(optim.REFUSED) == set(optim.SCHEDULES) - ours


@pytest.mark.parametrize('name', sorted(optim.REFUSED))
def test_what_is_refused_is_of_optax_and_says_why(name):
  assert any(
    name in vars(module) for module in (optax.contrib, optax.schedules)
  )
  resolve = functools.partial(optim.resolve_optimizer, {'name': name})
  if name in vars(optax.schedules):
    resolve = functools.partial(optim.resolve_schedule, {'name': name}, 10)
  with pytest.raises(config_lib.UserError) as caught:
    resolve()
  line = str(caught.value)
  assert line.endswith(
    f'.name is {name!r}, which cannot be used: {optim.REFUSED[name]}'
  )
  assert '\n' not in line


# ------------------------------------------------------------ a convex problem

GENERATOR = np.random.default_rng(0)
STEPS = 40
N, D, K = 64, 6, 3
X = GENERATOR.normal(size=(N, D)).astype(np.float32)
# From a linear teacher with noise, so that no weights are right everywhere.
LABEL = (
  (X @ GENERATOR.normal(size=(D, K)) + 2 * GENERATOR.normal(size=(N, K)))
  .argmax(-1)
  .astype(np.int32)
)
SPLIT = sources.Split({'features': X, 'label': LABEL})
DATASET = sources.Dataset(
  'convex', {'train': SPLIT, 'test': SPLIT}, ('a', 'b', 'c')
)

# Where 0.01 is not sensible. Of those that find their rate, it is a factor.
RATES = {
  'adadelta': 1.0,
  'adagrad': 0.1,
  'cocob': 1.0,
  'dadapt_adamw': 1.0,
  'dog': 1.0,
  'dowg': 1.0,
  'lars': 1.0,
  'lbfgs': 1.0,
  'momo': 1.0,
  'noisy_sgd': 0.1,
  'optimistic_gradient_descent': 0.1,
  'polyak_sgd': 1.0,
  'prodigy': 1.0,
  'radam': 0.1,
  'schedule_free_sgd': 1.0,
  'sgd': 0.1,
  'sm3': 0.1,
}
# What has no default, or one that is for longer runs.
ARGUMENTS = {
  'dog': {'init_step': ('heuristic', 1e-2)},
  'noisy_sgd': {'key': 0},
  'optimistic_adam': {'optimism': 0.1},
}
# The others of Optax run with the slow tests: each compiles for a second.
USUAL = (
  'adadelta', 'adafactor', 'adagrad', 'adam', 'adamw', 'lbfgs', 'lion', 'muon',
  'nadam', 'nadamw', 'polyak_sgd', 'rmsprop', 'rprop', 'schedule_free_adamw',
  'schedule_free_sgd', 'sgd', 'sophia',
)  # fmt: skip
every_optimizer = pytest.mark.parametrize(
  'name',
  [
    pytest.param(name, marks=() if name in USUAL else pytest.mark.slow)
    for name in sorted(optim.OPTIMIZERS)
  ],
)


def _program(name, rate, **fields):
  config = {
    'data': config_lib.Data(batch_size=N, normalize=None),
    'model': {'name': 'linear'},
    'optimizer': {'name': name, **ARGUMENTS.get(name, {})},
    'schedule': {'name': 'constant_schedule', 'value': rate},
    'total_steps': STEPS,
  }
  return program_lib.create(runs.config(**config | fields), DATASET)


def _train(program, steps=STEPS):
  """The first parameters, on the host, and the last state."""
  batches = pipeline.train_batches(
    SPLIT, seed=0, batch_size=N, first_step=0, mesh=program.mesh
  )
  state = program.init()
  first = jax.device_get(state.params)
  for _ in range(steps):
    state, _ = program.train_step(state, next(batches))
  return first, state


def _softmax(weights, bias):
  powers = np.exp(X @ weights + bias)
  return powers / powers.sum(-1, keepdims=True)


def _loss(params):
  """Softmax regression's mean cross-entropy, in float64."""
  head = jax.tree.map(np.float64, jax.device_get(params['head']))
  shares = _softmax(head['kernel'], head['bias'])
  return -np.log(shares[np.arange(N), LABEL]).mean()


@every_optimizer
def test_an_optimizer_lowers_a_convex_loss_and_compiles_once(name):
  program = _program(name, RATES.get(name, 1e-2))
  first, state = _train(program)
  before, after = _loss(first), _loss(program.eval_params(state))
  assert after < 0.9 * before
  assert program.train_step._cache_size() == 1


def test_the_tables_name_optimizers_that_there_are():
  assert {*RATES, *USUAL, *ARGUMENTS} <= set(optim.OPTIMIZERS)


def test_schedule_free_evaluates_the_mean_and_not_what_it_trains():
  """Defazio et al. (2024), algorithm 1 without Adam, in float64.

  y = (1 - b) z + b x;  z -= rate * gradient(y);  x = (1 - c) x + c z, where
  c is rate^2 over the sum of all rate^2 so far.
  """
  program = _program('schedule_free_sgd', 0.5)
  first, state = _train(program, 20)
  onehot = np.eye(K)[LABEL]
  z = [np.float64(first['head'][key]) for key in ('kernel', 'bias')]
  x, total = [leaf.copy() for leaf in z], 0
  for _ in range(20):
    y = [0.1 * leaf + 0.9 * mean for leaf, mean in zip(z, x, strict=True)]
    error = (_softmax(*y) - onehot) / N
    z[0] -= 0.5 * X.T @ error
    z[1] -= 0.5 * error.sum(0)
    total += 0.5**2
    c = 0.5**2 / total
    x = [(1 - c) * mean + c * leaf for leaf, mean in zip(z, x, strict=True)]
  y = [0.1 * leaf + 0.9 * mean for leaf, mean in zip(z, x, strict=True)]
  evaluated = program.eval_params(state)
  for i, key in enumerate(('kernel', 'bias')):
    np.testing.assert_allclose(
      evaluated['head'][key], x[i], rtol=1e-4, atol=1e-6
    )
    np.testing.assert_allclose(
      state.params['head'][key], y[i], rtol=1e-4, atol=1e-6
    )
    assert np.abs(x[i] - y[i]).max() > 1e-3


@pytest.mark.parametrize('name', ['adamw', 'sgd'])
def test_other_optimizers_are_evaluated_with_what_they_train(name):
  program = _program(name, 0.1)
  _, state = _train(program, 2)
  evaluated = program.eval_params(state)
  assert jax.tree.all(
    jax.tree.map(np.array_equal, evaluated, jax.device_get(state.params))
  )


def test_the_rate_of_polyak_sgd_is_a_factor_on_the_rate_that_it_finds():
  """Loizou et al. (2021): the loss over the squared norm of its gradient.

  Optax's own formula, which its code departs from: scaling times the smaller
  of this and max_learning_rate.
  """
  grads = {'kernel': jnp.full((5, 3), 2.0), 'bias': jnp.full(3, 1.0)}
  squares = 15 * 4 + 3
  for loss, rate in ((3.0, 3 / squares), (1e6, 1.0)):  # 1 by max_learning_rate.
    tx = _create('polyak_sgd', 0.5)
    updates, _ = tx.update(grads, tx.init(TREE), TREE, value=jnp.asarray(loss))
    np.testing.assert_allclose(updates['kernel'], -0.5 * rate * 2, rtol=1e-6)


def test_sophia_divides_by_the_curvature_of_the_loss_that_it_gets():
  """Liu et al. (2024), whose estimate is exact where the Hessian is diagonal.

  nu = b2 nu + (1 - b2) h of every tenth step; w -= rate clip(m / (0.01 nu)).
  """
  curvature = jnp.asarray([1e3, 1e4, 1e6])

  def obj_fn(w):
    return jnp.sum(curvature * w**2) / 2

  tx = _create('sophia', 0.1, {'weight_decay': 0.0})
  w = jnp.asarray([0.01, 0.002, 0.5])
  state, moment = tx.init(w), 0
  for step in range(2):
    grad = curvature * w
    moment = 0.965 * moment + 0.035 * grad
    updates, state = tx.update(grad, state, w, obj_fn=obj_fn)
    # No curvature is known before the first step, which is therefore clipped.
    nu = step * 0.01 * curvature
    mean = moment / (1 - 0.965 ** (step + 1))
    expected = -0.1 * np.clip(mean / np.maximum(0.01 * nu, 1e-8), -1, 1)
    np.testing.assert_allclose(updates, expected, rtol=1e-4)
    w = optax.apply_updates(w, jnp.zeros(3))


# ------------------------------------------------------------------ the rules


def _config(name, rate, arguments=None, **fields):
  """A config that names this optimizer, its defaults written out."""
  block = {'name': name, **ARGUMENTS.get(name, {}), **(arguments or {})}
  return config_lib.Config(
    total_steps=STEPS,
    optimizer=optim.resolve_optimizer(block),
    schedule={'name': 'constant_schedule', 'value': rate},
    **fields,
  )


def _create(name, rate, arguments=None, **fields):
  """The optimizer at a constant rate."""
  config = _config(name, rate, arguments, **fields)
  return optim.create(config, optax.constant_schedule(rate))


@pytest.mark.parametrize('name', ['optimistic_adam', 'rprop', 'sm3'])
def test_an_optimizer_of_one_rate_takes_a_constant_one_and_no_other(name):
  # The rates of these are annotated as floats and not as schedules.
  _create(name, 0.1)
  falling = {'name': 'linear_schedule', 'init_value': 0.1, 'end_value': 0.0}
  config = dataclasses.replace(_config(name, 0.1), schedule=falling)
  with pytest.raises(config_lib.UserError) as caught:
    optim.create(config, optax.linear_schedule(0.1, 0.0, STEPS))
  assert str(caught.value) == (
    f"config.schedule.name is 'linear_schedule', but {name} takes one rate "
    'for the whole run; say --config.schedule.name=constant_schedule'
  )


DECAYS = ('weight_decay', 'weight_decay_rate')
MASKS = ('mask', 'weight_decay_mask')
MASKED = [
  name
  for name, function in optim.OPTIMIZERS.items()
  if set(MASKS) & set(inspect.signature(function).parameters)
]


def test_the_optimizers_with_a_mask_are_there():
  assert {'adamw', 'nadamw', 'lion', 'muon', 'lars', 'adafactor'} <= set(MASKED)
  assert not {'sgd', 'adam', 'rmsprop'} & set(MASKED)


TREE = {
  'kernel': jnp.linspace(1.0, 2.0, 15).reshape(5, 3),
  'bias': jnp.linspace(1.0, 2.0, 3),
}


def _updates(tx):
  """What one step adds to TREE."""
  grads = jax.tree.map(lambda leaf: jnp.cos(3 * leaf), TREE)
  updates, _ = tx.update(
    grads, tx.init(TREE), TREE, obj_fn=optax.tree.norm, value=jnp.ones(())
  )
  return updates


@pytest.mark.parametrize('name', MASKED)
def test_a_masked_weight_decay_spares_biases_and_decays_kernels(name):
  takes = inspect.signature(optim.OPTIMIZERS[name]).parameters
  (decay,) = set(DECAYS) & set(takes)
  with_decay, without = (
    _updates(_create(name, 0.1, {decay: strength}, weight_decay_mask=True))
    for strength in (0.5, 0.0)
  )
  # These have one rate for all parameters, which the kernels' gradients move.
  factor = 1.0
  if name in ('dog', 'dowg'):
    factor = with_decay['bias'][0] / without['bias'][0]
  expected = factor * without['bias']
  np.testing.assert_allclose(with_decay['bias'], expected, rtol=2e-6)
  assert np.any(np.abs(with_decay['kernel'] - without['kernel']) > 1e-9)


def test_without_the_mask_biases_decay_too():
  with_decay, without = (
    _updates(_create('adamw', 0.1, {'weight_decay': strength}))
    for strength in (0.5, 0.0)
  )
  # By hand: the rate times the decay times the parameter.
  found = without['bias'] - with_decay['bias']
  np.testing.assert_allclose(found, 0.1 * 0.5 * TREE['bias'], rtol=1e-5)


def test_the_mask_covers_the_part_of_muon_that_is_adam():
  """Biases and norms are Adam's there, which has a decay of its own."""
  arguments = {'weight_decay': 0.5, 'adam_weight_decay': 0.5}
  with pytest.raises(config_lib.UserError, match='adam_weight_decay'):
    _create('muon', 0.1, arguments, weight_decay_mask=True)
  del arguments['adam_weight_decay']
  tx = _create('muon', 0.1, arguments, weight_decay_mask=True)
  plain = _updates(_create('muon', 0.1, {'weight_decay': 0.0}))
  np.testing.assert_array_equal(_updates(tx)['bias'], plain['bias'])


@pytest.mark.parametrize('name', sorted(set(optim.OPTIMIZERS) - set(MASKED)))
def test_a_mask_of_what_has_no_weight_decay_is_refused(name):
  with pytest.raises(config_lib.UserError) as caught:
    _create(name, 0.1, weight_decay_mask=True)
  line = str(caught.value)
  assert line.startswith(f'config.weight_decay_mask is true, but {name} has no')
  assert 'config.l2' in line
  assert '\n' not in line


@pytest.mark.parametrize(
  'fields',
  [
    {'rate_multipliers': {'head/kernel': 0.1}},
    {'l1': 0.1},
    {'schedule': {'name': 'reduce_on_plateau', 'value': 0.1}},
  ],
  ids=['rate_multipliers', 'l1', 'reduce_on_plateau'],
)
@pytest.mark.parametrize('name', ['schedule_free_sgd', 'schedule_free_adamw'])
def test_schedule_free_is_refused_where_its_updates_would_be_changed(
  name, fields
):
  """It finds x from y and z, so that y must go where its update says.

  A smaller step of y alone leaves z at the full rate, and zeros in y are none
  in x, which is what is evaluated.
  """
  with pytest.raises(config_lib.UserError, match=name):
    _program(name, 0.1, **fields)


# -------------------------------------------------- trajectories of the course

SIGNS = 2.0 * GENERATOR.integers(0, 2, 20) - 1
ROWS = GENERATOR.normal(size=(20, 5)) * np.array([3.0, 1, 1, 0.3, 0.1])
START = np.array([1.0, -2.0, 0.5, 3.0, -1.0])
RATE = 0.1
TRAJECTORY = 20


def _objective(w):
  """Regularized logistic regression, badly scaled."""
  return jnp.logaddexp(0, -SIGNS * (ROWS @ w)).mean() + 0.05 * (w @ w)


def _gradient(w):
  shares = 1 / (1 + np.exp(SIGNS * (ROWS @ w)))
  return -(SIGNS * shares) @ ROWS / len(ROWS) + 0.1 * w


def _by_optax(name, arguments, rate=RATE, gradient=None, start=START):
  """The iterates by the optimizer that a config gets, in float64."""
  with jax.enable_x64(True):
    gradient = gradient or jax.grad(_objective)
    tx = _create(name, rate, arguments)
    w = jnp.asarray(start)
    state = tx.init(w)
    iterates = []
    for _ in range(TRAJECTORY):
      updates, state = tx.update(gradient(w), state, w)
      w = optax.apply_updates(w, updates)
      iterates.append(np.asarray(w))
  return np.array(iterates)


def _descend(gradient, start, step):
  """The iterates of w -= step(t, w, gradient(w)), t from 1."""
  w, iterates = np.array(start), []
  for t in range(1, TRAJECTORY + 1):
    w = w - step(t, w, gradient(w))
    iterates.append(w)
  return np.array(iterates)


def _sgd(gradient, start):
  return _descend(gradient, start, lambda t, w, g: RATE * g)


def _momentum(gradient, start):
  """Polyak (1964): v = 0.9 v + g; w -= rate v."""
  v = 0

  def step(t, w, g):
    nonlocal v
    v = 0.9 * v + g
    return RATE * v

  return _descend(gradient, start, step)


def _nesterov(gradient, start, sign=1):
  """Sutskever et al. (2013), equations 3 and 4, at the points looked at.

  v = 0.9 v - rate g(w + 0.9 v); w += v. Optax keeps w + 0.9 v.
  """
  w, v, iterates = np.array(start), np.zeros_like(start), []
  for _ in range(TRAJECTORY):
    v = 0.9 * v - RATE * gradient(w + sign * 0.9 * v)
    w = w + v
    iterates.append(w + sign * 0.9 * v)
  return np.array(iterates)


def _adagrad(gradient, start):
  """Duchi et al. (2011), from an empty sum, as the diagonal of G^(-1/2)."""
  total = 0

  def step(t, w, g):
    nonlocal total
    total = total + g**2
    return RATE * g / np.sqrt(total + 1e-7)

  return _descend(gradient, start, step)


def _adadelta(gradient, start):
  """Zeiler (2012), algorithm 1: the ratio of two running roots."""
  squares, moves = 0, 0

  def step(t, w, g):
    nonlocal squares, moves
    squares = 0.9 * squares + 0.1 * g**2
    move = np.sqrt(moves + 1e-6) / np.sqrt(squares + 1e-6) * g
    moves = 0.9 * moves + 0.1 * move**2
    return move

  return _descend(gradient, start, step)


def _rmsprop(gradient, start):
  """Hinton (2012), lecture 6e."""
  squares = 0

  def step(t, w, g):
    nonlocal squares
    squares = 0.9 * squares + 0.1 * g**2
    return RATE * g / np.sqrt(squares + 1e-8)

  return _descend(gradient, start, step)


def _adam(gradient, start, decay=0.0, nesterov=False, power=True):
  """Kingma & Ba (2015), algorithm 1.

  Args:
    gradient: w -> gradient.
    start: the first w.
    decay: of Loshchilov & Hutter (2019), algorithm 2, times the rate.
    nesterov: as Dozat (2016) has the first moment, with one mu for all steps.
    power: False for the lectures' slip, 1 - b in place of 1 - b^t.
  """
  m, v = 0, 0

  def step(t, w, g):
    nonlocal m, v
    m = 0.9 * m + 0.1 * g
    v = 0.999 * v + 0.001 * g**2
    t = t if power else 1
    mean = m / (1 - 0.9**t)
    if nesterov:
      mean = 0.9 * m / (1 - 0.9 ** (t + 1)) + 0.1 * g / (1 - 0.9**t)
    return RATE * (mean / (np.sqrt(v / (1 - 0.999**t)) + 1e-8) + decay * w)

  return _descend(gradient, start, step)


PAPERS = {
  'sgd': ('sgd', {}, _sgd),
  'momentum': ('sgd', {'momentum': 0.9}, _momentum),
  'nesterov': ('sgd', {'momentum': 0.9, 'nesterov': True}, _nesterov),
  'adagrad': ('adagrad', {'initial_accumulator_value': 0.0}, _adagrad),
  'adadelta': ('adadelta', {}, _adadelta),
  'rmsprop': ('rmsprop', {}, _rmsprop),
  'adam': ('adam', {}, _adam),
  'adamw': (
    'adamw',
    {'weight_decay': 0.3},
    functools.partial(_adam, decay=0.3),
  ),
  'nadam': ('nadam', {}, functools.partial(_adam, nesterov=True)),
}


@pytest.mark.parametrize('paper', PAPERS)
def test_twenty_steps_are_those_of_the_paper(paper):
  name, arguments, by_paper = PAPERS[paper]
  rate = 1.0 if name == 'adadelta' else RATE  # Zeiler's has none.
  found = _by_optax(name, arguments, rate)
  expected = by_paper(_gradient, START)
  assert found.dtype == np.float64
  np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


def test_no_two_optimizers_of_the_course_go_the_same_way():
  """Else a test above might hold one to another's paper."""
  ends = [by_paper(_gradient, START)[-1] for *_, by_paper in PAPERS.values()]
  for i, one in enumerate(ends):
    for other in ends[:i]:
      assert np.abs(one - other).max() > 1e-3


def test_adam_is_not_the_one_whose_correction_forgets_the_power():
  slip = _adam(lambda x: 2 * x, np.array(9.0), power=False)
  np.testing.assert_allclose(slip[1], 8.7657, atol=5e-5)
  found = _by_optax('adam', {}, gradient=lambda x: 2 * x, start=9.0)
  np.testing.assert_allclose(found[1], 8.8000, atol=5e-5)
  assert np.abs(found - slip)[1:].min() > 0.03


def test_nesterov_is_not_the_one_that_looks_back():
  """Looking back makes the swings grow; looking ahead makes them die."""
  slip = _nesterov(lambda x: 2 * x, np.array(9.0), sign=-1)
  arguments = {'momentum': 0.9, 'nesterov': True}
  found = _by_optax('sgd', arguments, gradient=lambda x: 2 * x, start=9.0)
  assert np.abs(slip).max() > 9 > np.abs(found).max()
  assert np.abs(found[-5:]).max() < 1
