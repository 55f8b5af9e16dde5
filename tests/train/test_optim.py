"""Optax's optimizers and schedules by name, on the lectures' own figures.

The lectures descend on x^2 from 9. Two slips of theirs that are not copied:
Adam's bias correction without the power t, and Nesterov with the wrong sign.
Every optimizer of Optax, and the papers, are in test_optimizers.py.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from train import blocks
from train import check
from train import config as config_lib
from train import optim

TOTAL_STEPS = 100


def resolved_optimizer(name, **kwargs):
  return optim.resolve_optimizer({'name': name, **kwargs})


def create(block, schedule, **fields):
  """The optimizer as a config with this block gets it."""
  config = config_lib.Config(
    total_steps=TOTAL_STEPS,
    optimizer=block,
    schedule={'name': 'constant_schedule'},
    **fields,
  )
  return optim.create(config, schedule)


def schedule_of(name, total_steps=TOTAL_STEPS, **kwargs):
  """The schedule as a config that names it gets it."""
  block = optim.resolve_schedule({'name': name, **kwargs}, total_steps)
  return optim.create_schedule(block, total_steps)


def descend(steps, schedule, name, **kwargs):
  """The iterates of x^2 from 9, in float64 as the lectures have them."""
  with jax.enable_x64(True):
    tx = create(resolved_optimizer(name, **kwargs), schedule)
    x = jnp.asarray(9.0)
    state = tx.init(x)
    iterates = []
    for _ in range(steps):
      updates, state = tx.update(2 * x, state, x)
      x = optax.apply_updates(x, updates)
      iterates.append(x.item())
  return iterates


def constant(value):
  return schedule_of('constant_schedule', value=value)


# -------------------------------------------------------------- trajectories


@pytest.mark.parametrize(
  ('rate', 'expected'),
  [
    (0.1, [7.2, 5.76, 4.608]),  # W4
    (0.4, [1.8, 0.36, 0.072]),  # W5, from here on
    (0.01, [8.82, 8.6436, 8.470728]),
    (0.5, [0, 0, 0]),
    (1.0, [-9, 9, -9, 9]),
    (1.1, [-10.8, 12.96, -15.552]),
  ],
)
def test_gradient_descent_gives_the_figures_of_the_lectures(rate, expected):
  found = descend(len(expected), constant(rate), 'sgd')
  np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('rate', [1.01, 1.5])
def test_a_rate_above_1_diverges(rate):
  sizes = np.abs(descend(10, constant(rate), 'sgd'))
  assert np.all(np.diff([9, *sizes]) > 0)


def test_momentum_gives_the_figures_of_the_lectures():
  # W20.
  found = descend(5, constant(0.1), 'sgd', momentum=0.9)
  expected = [7.2, 4.14, 0.558, -2.7774, -5.22378]
  np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_nesterov_looks_ahead_and_not_back():
  # By hand: m = g + 0.9 m, x -= 0.1 (g + 0.9 m); with a minus it diverges.
  found = descend(3, constant(0.1), 'sgd', momentum=0.9, nesterov=True)
  np.testing.assert_allclose(found, [5.58, 2.0016, -0.975168], rtol=1e-12)


def test_adam_gives_the_figures_of_the_lectures():
  # W19; without the power t in its correction the second would be 8.7657.
  found = descend(3, constant(0.1), 'adam', b1=0.9, b2=0.999, eps=1e-8)
  expected = [8.9000000001, 8.8000306839, 8.7001129023]
  np.testing.assert_allclose(found, expected, rtol=0, atol=5.1e-11)


def test_adam_has_the_lectures_settings_by_default():
  block = resolved_optimizer('adam')
  assert (block['b1'], block['b2'], block['eps']) == (0.9, 0.999, 1e-8)


def test_weight_decay_is_taken_from_the_weights_and_not_the_gradient():
  # By hand: Adam's first step is the rate, AdamW's the rate times 0.5 x more.
  adam = descend(1, constant(0.1), 'adam')[0]
  adamw = descend(1, constant(0.1), 'adamw', weight_decay=0.5)[0]
  np.testing.assert_allclose(adamw, adam - 0.1 * 0.5 * 9, rtol=1e-12)


def test_the_schedule_sets_the_rate_of_every_step():
  # By hand: x (1 - 2 * 0.4) three times, then x (1 - 2 * 0.04).
  schedule = schedule_of(
    'piecewise_constant_schedule',
    init_value=0.4,
    boundaries_and_scales={3: 0.1},
  )
  found = descend(4, schedule, 'sgd')
  expected = [1.8, 0.36, 0.072, 0.072 * 0.92]
  # Optax gives this rate in float32.
  np.testing.assert_allclose(found, expected, rtol=1e-6)


# ------------------------------------------------------------------ schedules


@pytest.mark.parametrize(
  ('name', 'kwargs', 'expected'),
  [
    # W22: halve every 5; divide by 10 every 20.
    (
      'exponential_decay',
      {
        'init_value': 0.1,
        'decay_rate': 0.5,
        'transition_steps': 5,
        'staircase': True,
      },
      {0: 0.1, 4: 0.1, 5: 0.05, 9: 0.05, 10: 0.025},
    ),
    (
      'exponential_decay',
      {
        'init_value': 0.1,
        'decay_rate': 0.1,
        'transition_steps': 20,
        'staircase': True,
      },
      {19: 0.1, 20: 0.01, 39: 0.01, 40: 0.001},
    ),
    (
      'piecewise_constant_schedule',
      {'init_value': 0.1, 'boundaries_and_scales': {5: 0.5, 10: 0.5}},
      {0: 0.1, 4: 0.1, 5: 0.05, 9: 0.05, 10: 0.025, 99: 0.025},
    ),
    # These follow total_steps, which is 100.
    (
      'exponential_decay',
      {'init_value': 0.1, 'decay_rate': 0.25},
      {0: 0.1, 50: 0.05, 100: 0.025},
    ),
    (
      'cosine_decay_schedule',
      {'init_value': 0.2},
      {0: 0.2, 25: 0.1 * (1 + math.cos(math.pi / 4)), 50: 0.1, 100: 0},
    ),
    (
      'linear_schedule',
      {'init_value': 0.2, 'end_value': 0.1},
      {0: 0.2, 50: 0.15, 100: 0.1, 200: 0.1},
    ),
    (
      'polynomial_schedule',
      {'init_value': 0.2, 'end_value': 0.0, 'power': 2},
      {0: 0.2, 50: 0.05, 100: 0},
    ),
    (
      'warmup_cosine_decay_schedule',
      {'init_value': 0.0, 'peak_value': 0.2, 'warmup_steps': 20},
      {0: 0, 10: 0.1, 20: 0.2, 60: 0.1, 100: 0},
    ),
    (
      'linear_onecycle_schedule',
      {'peak_value': 0.1, 'div_factor': 10.0, 'pct_start': 0.3},
      {0: 0.01, 30: 0.1, 85: 0.01},
    ),
    ('constant_schedule', {'value': 0.3}, {0: 0.3, 99: 0.3}),
  ],
)
def test_a_schedule_has_the_rates_of_its_formula(name, kwargs, expected):
  schedule = schedule_of(name, **kwargs)
  found = [float(schedule(step)) for step in expected]
  np.testing.assert_allclose(
    found, list(expected.values()), rtol=1e-5, atol=1e-8
  )


@pytest.mark.parametrize('total_steps', [40, 1000])
@pytest.mark.parametrize(
  ('name', 'kwargs', 'length'),
  [
    ('cosine_decay_schedule', {'init_value': 1.0}, 'decay_steps'),
    (
      'warmup_cosine_decay_schedule',
      {'init_value': 0.0, 'peak_value': 1.0, 'warmup_steps': 4},
      'decay_steps',
    ),
    (
      'exponential_decay',
      {'init_value': 1.0, 'decay_rate': 0.5},
      'transition_steps',
    ),
    (
      'linear_schedule',
      {'init_value': 1.0, 'end_value': 0.0},
      'transition_steps',
    ),
    ('cosine_onecycle_schedule', {'peak_value': 1.0}, 'transition_steps'),
  ],
)
def test_a_length_left_out_follows_total_steps_and_one_given_stays(
  name, kwargs, length, total_steps
):
  block = {'name': name, **kwargs}
  assert optim.resolve_schedule(block, total_steps)[length] == total_steps
  given = block | {length: 17}
  assert optim.resolve_schedule(given, total_steps)[length] == 17


def test_a_warm_up_is_no_length_that_follows_total_steps():
  with pytest.raises(
    config_lib.UserError, match=r'config\.schedule\.warmup_steps is missing'
  ):
    schedule_of('warmup_constant_schedule', init_value=0.0, peak_value=1.0)


def test_the_rates_at_the_quarters_are_one_line():
  schedule = schedule_of('linear_schedule', init_value=0.4, end_value=0.0)
  assert optim.rates_at_quarters(schedule, TOTAL_STEPS, '') == (
    'learning rate: 0.4 at 0%, 0.3 at 25%, 0.2 at 50%, 0.1 at 75%, 0 at 100%'
  )


def refused(make, path, *args, **kwargs):
  """The one line with which `make` refuses the field at `path`."""
  with pytest.raises(config_lib.UserError) as caught:
    make(*args, **kwargs)
  line = str(caught.value)
  assert line.startswith(f'config.{path}'), line
  assert '\n' not in line
  return line


@pytest.mark.filterwarnings('ignore:overflow')
@pytest.mark.parametrize(
  ('name', 'kwargs'),
  [
    ('constant_schedule', {'value': -0.1}),
    ('constant_schedule', {'value': 1e300}),  # Infinite in float32.
    ('linear_schedule', {'init_value': 0.1, 'end_value': -0.1}),
    # Right until step 97, and at the last one.
    (
      'linear_schedule',
      {
        'init_value': 0.1,
        'end_value': -1.0,
        'transition_begin': 97,
        'transition_steps': 3,
      },
    ),
    (
      'exponential_decay',
      {'init_value': 1.0, 'decay_rate': 10.0, 'transition_steps': 1},
    ),
    (
      'exponential_decay',
      {'init_value': 1.0, 'decay_rate': -0.5, 'transition_steps': 1},
    ),
  ],
)
def test_a_rate_that_is_negative_or_not_finite_is_refused(name, kwargs):
  line = refused(schedule_of, 'schedule.name', name, **kwargs)
  assert repr(name) in line
  assert 'it must be finite and at least 0' in line


def test_a_rate_that_is_refused_is_named_with_its_step():
  line = refused(
    schedule_of,
    'schedule.name',
    'exponential_decay',
    init_value=1.0,
    decay_rate=-1.0,
    transition_steps=1,
  )
  assert 'a learning rate of -1 at step 1;' in line
  assert 'decay_rate=-1.0' in line


def test_a_rate_of_0_is_a_rate():
  assert float(constant(0.0)(5)) == 0


@pytest.mark.parametrize(
  ('name', 'kwargs'),
  [
    ('constant_schedule', {'value': 'x'}),
    ('constant_schedule', {'value': None}),
    pytest.param('constant_schedule', {'value': (0.1, 0.01)}, id='a tuple'),
    pytest.param('constant_schedule', {'value': 10**400}, id='10**400'),
    ('cosine_decay_schedule', {'init_value': 0.1, 'decay_steps': 0}),
    (
      'warmup_cosine_decay_schedule',
      {'init_value': 0.0, 'peak_value': 0.1, 'warmup_steps': 200},
    ),
    (
      'piecewise_constant_schedule',
      {'init_value': 0.1, 'boundaries_and_scales': {5: -1.0}},
    ),
    (
      'piecewise_constant_schedule',
      {'init_value': 0.1, 'boundaries_and_scales': ((5, 0.1),)},
    ),
    (
      'piecewise_interpolate_schedule',
      {
        'init_value': 0.1,
        'interpolate_type': 'no',
        'boundaries_and_scales': {5: 0.5},
      },
    ),
  ],
)
def test_arguments_that_do_not_fit_are_one_line(name, kwargs):
  line = refused(schedule_of, 'schedule.', name, **kwargs)
  # Either the argument is named, or the function with all of its arguments.
  if not line.startswith(tuple(f'config.schedule.{key} is ' for key in kwargs)):
    assert line.startswith(f'config.schedule.name is {name!r} (')
    assert all(f'{key}={value!r}' in line for key, value in kwargs.items())


def test_a_schedule_that_gives_more_than_one_rate_is_refused():
  block = {'name': 'constant_schedule', 'value': (0.1, 0.01)}
  refused(optim.create_schedule, 'schedule.name', block, TOTAL_STEPS)


# ---------------------------------------------------------------------- names

NO_NAMES = [
  '__builtins__',
  '__name__',
  '__getattr__',
  'jax',
  'optax',
  'contrib',
  'chex',
  'os.system',
  'scale_by_rprop',
  'scale_by_adam',
  'chain',
  'inject_hyperparams',
  'GradientTransformation',
  'adamm',
  'constant',
  '',
]


@pytest.mark.parametrize('name', NO_NAMES)
def test_a_name_that_is_no_optimizer_is_refused_with_those_that_are(name):
  line = refused(resolved_optimizer, 'optimizer.name', name)
  assert repr(name) in line
  assert 'there are ' in line
  assert 'adamw, ' in line
  # The same where a block was not resolved before.
  refused(create, 'optimizer.name', {'name': name}, lambda step: 0.1)


@pytest.mark.parametrize(
  'name',
  [
    *NO_NAMES,
    'inject_hyperparams',
    'inject_stateful_hyperparams',
    'InjectHyperparamsState',
    'WrappedSchedule',
    'Schedule',
  ],
)
def test_a_name_that_is_no_schedule_is_refused_with_those_that_are(name):
  line = refused(schedule_of, 'schedule.name', name)
  assert repr(name) in line
  assert 'there are constant_schedule, ' in line
  refused(optim.create_schedule, 'schedule.name', {'name': name}, 10)


def test_a_misspelt_name_has_a_hint():
  line = refused(resolved_optimizer, 'optimizer.name', 'adamm')
  assert "did you mean 'adam" in line


def test_what_the_course_names_is_there():
  assert {
    'sgd',
    'adagrad',
    'adadelta',
    'rmsprop',
    'adam',
    'adamw',
    'nadam',
  } <= set(optim.OPTIMIZERS)
  assert {
    'constant_schedule',
    'piecewise_constant_schedule',
    'exponential_decay',
    'cosine_decay_schedule',
    'warmup_cosine_decay_schedule',
    'linear_schedule',
    'reduce_on_plateau',
  } <= set(optim.SCHEDULES)
  # Nadam is Adam with Nesterov's momentum.
  assert resolved_optimizer('nadam')['nesterov'] is True
  assert resolved_optimizer('nadamw')['nesterov'] is True
  assert resolved_optimizer('adam')['nesterov'] is False


def test_every_name_stands_for_the_function_of_that_name_in_optax():
  for name, function in optim.OPTIMIZERS.items():
    home = optax if name in vars(optax) else optax.contrib
    assert getattr(home, name) is function
  for name, function in optim.SCHEDULES.items():
    if name != optim.PLATEAU:  # Optax's is no schedule: it wants a value.
      assert getattr(optax.schedules, name) is function


# ----------------------------------------------------------------- optimizers


def test_the_rate_is_no_argument_of_an_optimizer():
  assert 'learning_rate' not in resolved_optimizer('sgd')
  refused(
    resolved_optimizer, 'optimizer.learning_rate', 'sgd', learning_rate=0.1
  )


def test_a_rate_in_the_optimizer_says_where_it_belongs():
  config = config_lib.Config(
    total_steps=1, optimizer={'name': 'sgd', 'learning_rate': 0.25}
  )
  with pytest.raises(config_lib.UserError) as caught:
    check.check(config)
  assert 'config.optimizer.learning_rate' in str(caught.value)
  assert '--config.schedule.value=0.25' in str(caught.value)


def test_defaults_are_written_out_and_what_is_given_stays():
  block = resolved_optimizer('sgd', momentum=0.9)
  assert block == {
    'name': 'sgd',
    'momentum': 0.9,
    'nesterov': False,
    'accumulator_dtype': None,
  }


@pytest.mark.parametrize(
  ('name', 'kwargs'),
  [
    ('adam', {'mu_dtype': 'no_dtype'}),
    ('adam', {'eps': (1, 2)}),
    ('muon', {'ns_coeffs': 'no_preset'}),
    ('polyak_sgd', {'variant': 'no_variant'}),
    ('schedule_free_sgd', {'state_dtype': 'no_dtype'}),
  ],
)
def test_an_optimizer_that_cannot_be_used_is_refused(name, kwargs):
  block = {'name': name, **kwargs}
  line = refused(create, 'optimizer.name', block, constant(0.1))
  assert f'is {name!r}' in line
  assert 'which cannot be used so: ' in line
  assert all(f'{key}={value!r}' in line for key, value in kwargs.items())


def test_a_preset_that_optax_takes_by_its_name_is_taken():
  block = resolved_optimizer('muon', ns_coeffs='dion')
  assert block['ns_coeffs'] == 'dion'
  create(block, constant(0.1))


# As a dense layer and a convolution have them: no two of the same length.
PARAMS = {
  'dense': {'kernel': jnp.zeros((5, 3)), 'bias': jnp.zeros(3)},
  'conv': {'kernel': jnp.zeros((3, 3, 2, 4)), 'bias': jnp.zeros(4)},
}


def lacks(name):
  """1 for each argument that has no default."""
  return {
    key: 1
    for key, parameter in blocks.arguments(optim.OPTIMIZERS[name]).items()
    if parameter.default is parameter.empty and key != 'learning_rate'
  }


@pytest.mark.filterwarnings('ignore::DeprecationWarning')
@pytest.mark.filterwarnings('ignore:Specifying a key')
@pytest.mark.parametrize('name', sorted(optim.OPTIMIZERS))
def test_every_optimizer_can_update_dense_layers_and_convolutions(name):
  tx = create(resolved_optimizer(name, **lacks(name)), constant(0.1))

  def value_fn(params, obj_fn=None):
    del obj_fn
    return sum(leaf.sum() for leaf in jax.tree.leaves(params))

  def update(params):
    state = tx.init(params)
    updates, _ = tx.update(
      params,
      state,
      params,
      value=jnp.zeros(()),
      grad=params,
      value_fn=value_fn,
      obj_fn=value_fn,
    )
    return optax.apply_updates(params, updates)

  def shapes(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)

  assert shapes(jax.eval_shape(update, PARAMS)) == shapes(PARAMS)


# ------------------------------------------------------------------- clipping

GRADS = {'kernel': np.linspace(-3, 4, 15).reshape(5, 3), 'bias': np.ones(3)}


def clipped(**fields):
  """What gradient descent at rate 1 takes for GRADS, in float64."""
  with jax.enable_x64(True):
    tx = create(resolved_optimizer('sgd'), constant(1.0), **fields)
    grads = jax.tree.map(jnp.asarray, GRADS)
    updates, _ = tx.update(grads, tx.init(grads), grads)
    return jax.tree.map(lambda leaf: -np.asarray(leaf), updates)


def norm_of(tree):
  return np.sqrt(sum((leaf**2).sum() for leaf in tree.values()))


@pytest.mark.parametrize('limit', [0.5, 2.0, 100.0])
def test_clipping_by_value_cuts_every_number(limit):
  found = clipped(grad_clip_value=limit)
  for key, grad in GRADS.items():
    np.testing.assert_allclose(found[key], np.clip(grad, -limit, limit))


@pytest.mark.parametrize('limit', [0.5, 2.0, 100.0])
def test_clipping_by_norm_keeps_the_direction_of_all_together(limit):
  found = clipped(grad_clip_norm=limit)
  factor = min(1, limit / norm_of(GRADS))
  for key, grad in GRADS.items():
    np.testing.assert_allclose(found[key], factor * grad, rtol=1e-12)


def test_values_are_clipped_before_the_norm():
  found = clipped(grad_clip_value=1.5, grad_clip_norm=2.0)
  cut = {key: np.clip(grad, -1.5, 1.5) for key, grad in GRADS.items()}
  for key, grad in cut.items():
    expected = grad * 2.0 / norm_of(cut)
    np.testing.assert_allclose(found[key], expected, rtol=1e-12)
  # The other order would leave values below 1.5 alone, and other ratios.
  other = {key: grad * 2.0 / norm_of(GRADS) for key, grad in GRADS.items()}
  assert np.abs(found['kernel'] - other['kernel']).max() > 0.1


# ----------------------------------------------------------------- penalties


def test_soft_thresholding_is_its_formula_and_gives_true_zeros():
  params = {'kernel': np.array([[-2.0, -0.5, 0.0], [0.3, 0.5, 1.25]])}
  found = optim.soft_threshold(params, {'kernel': 0.5})['kernel']
  # Parikh & Boyd (2014): sign(w) max(|w| - t, 0).
  np.testing.assert_array_equal(found, [[-1.5, 0, 0], [0, 0, 0.75]])


def test_penalties_are_of_kernels_alone():
  params = {
    'dense': {'kernel': jnp.full((2, 3), 2.0), 'bias': jnp.full(3, 7.0)},
    'norm': {'scale': jnp.full(3, 5.0)},
  }
  # By hand: 0.5 / 2 * six squares of 2.
  np.testing.assert_allclose(optim.l2_penalty(params, 0.5), 6.0)
  threshold = jax.tree.map(lambda _: 1.0, params)
  found = optim.soft_threshold(params, threshold)
  np.testing.assert_array_equal(found['dense']['kernel'], np.full((2, 3), 1.0))
  np.testing.assert_array_equal(found['dense']['bias'], params['dense']['bias'])
  np.testing.assert_array_equal(found['norm']['scale'], np.full(3, 5.0))


# ------------------------------------------------------------ many schedules


def test_restarts_are_a_tuple_of_blocks_in_a_config():
  """Loshchilov & Hutter (2017): each period a cosine, from its own peak."""
  periods = tuple(
    {
      'init_value': 0.0,
      'peak_value': peak,
      'warmup_steps': warmup,
      'decay_steps': 50,
    }
    for peak, warmup in ((0.4, 10), (0.2, 0))
  )
  block = {'name': 'sgdr_schedule', 'cosine_kwargs': periods}
  config = config_lib.Config(total_steps=TOTAL_STEPS, schedule=block)
  config = check.check(config_lib.from_json(config_lib.to_json(config)))
  assert config.schedule == block
  schedule = schedule_of(**config.schedule)
  expected = {
    0: 0.0,
    5: 0.2,
    10: 0.4,
    30: 0.2,
    40: 0.2 * (1 + math.cos(0.75 * math.pi)),
    50: 0.2,  # The second period's peak: no warm-up.
    75: 0.1,
    100: 0.0,
  }
  found = [float(schedule(step)) for step in expected]
  np.testing.assert_allclose(
    found, list(expected.values()), rtol=1e-5, atol=1e-7
  )


@pytest.mark.parametrize(
  'kwargs',
  [
    {'factor': 0.0},
    {'factor': 1.0},
    {'factor': 2.0},
    {'factor': -0.5},
    {'patience': 0},
    {'cooldown': -1},
    {'min_value': -1e-9},
    {'min_value': 0.2},
    {'value': -0.1},
  ],
)
def test_a_plateau_of_no_sense_is_refused(kwargs):
  line = refused(
    schedule_of,
    'schedule.name',
    'reduce_on_plateau',
    **({'value': 0.1} | kwargs),
  )
  assert "'reduce_on_plateau'" in line


def test_a_plateau_starts_at_its_value_and_leaves_no_length_open():
  block = optim.resolve_schedule(
    {'name': 'reduce_on_plateau', 'value': 0.1}, TOTAL_STEPS
  )
  assert block == {
    'name': 'reduce_on_plateau',
    'value': 0.1,
    'factor': 0.1,
    'patience': 10,
    'min_value': 0.0,
    'cooldown': 0,
  }
  schedule = optim.create_schedule(block, TOTAL_STEPS)
  assert [float(schedule(step)) for step in (0, 50, 99)] == [0.1] * 3
