"""One training step against backpropagation by hand, in float64."""

import dataclasses
import re

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.datasets
import sklearn.linear_model

from tests import runs
from train import config as config_lib
from train import control
from train import losses
from train import metrics as metrics_lib
from train import optim
from train import paths
from train import program as program_lib
from train import state as state_lib
from train import step as step_lib
from train.data import pipeline
from train.data import sources

GENERATOR = np.random.default_rng(0)
IMAGE = GENERATOR.normal(size=(16, 6)).astype(np.float32)
LABEL = GENERATOR.integers(0, 3, 16).astype(np.int32)
BATCH = {'features': IMAGE, 'label': LABEL}
RATE = 0.1


def _dataset(examples, classes=('a', 'b', 'c')):
  split = sources.Split(examples)
  return sources.Dataset('hand', {'train': split, 'test': split}, classes)


def _program(dataset=None, **fields) -> program_lib.Program:
  dataset = dataset or _dataset(BATCH)
  config = {
    'data': config_lib.Data(
      batch_size=len(dataset.splits['train']), normalize=None
    ),
    'optimizer': {'name': 'sgd', 'momentum': 0.9},
    'schedule': {'name': 'constant_schedule', 'value': RATE},
  }
  return program_lib.create(runs.config(**config | fields), dataset)


def _batches(program):
  """The whole set as one batch, each time in another order."""
  split = program.dataset.splits['train']
  return pipeline.train_batches(
    split, seed=0, batch_size=len(split), first_step=0, mesh=program.mesh
  )


def _steps(program, count: int):
  """The state and the metrics after `count` steps."""
  batches = _batches(program)
  state, trace = program.init(), []
  for _ in range(count):
    state, metrics = program.train_step(state, next(batches))
    trace.append({k: float(v) for k, v in metrics.items()})
  return state, trace


def _host(tree) -> dict[str, np.ndarray]:
  """Path -> value of a tree of parameters."""
  flat = paths.flatten(jax.device_get(tree))
  return {paths.spelled(path): leaf for path, leaf in flat.items()}


def _softmax(logits):
  powers = np.exp(logits - logits.max(-1, keepdims=True))
  return powers / powers.sum(-1, keepdims=True)


def test_three_steps_of_a_two_layer_network_are_backpropagation_by_hand():
  program = _program(model={'name': 'mlp', 'widths': (4,)})
  params = jax.tree.map(np.float64, jax.device_get(program.init().params))
  w1, b1 = params['blocks'][0]['kernel'], params['blocks'][0]['bias']
  w2, b2 = params['head']['kernel'], params['head']['bias']
  state, trace = _steps(program, 3)
  weights = [w1, b1, w2, b2]
  moments = [np.zeros_like(w) for w in weights]
  # The whole set is one batch, so that its order is all the same.
  x, y = np.float64(IMAGE), np.eye(3)[LABEL]
  for step in range(3):
    w1, b1, w2, b2 = weights
    hidden = np.maximum(x @ w1 + b1, 0)
    p = _softmax(hidden @ w2 + b2)
    d_logits = (p - y) / len(x)
    d_hidden = (d_logits @ w2.T) * (hidden > 0)
    grads = [x.T @ d_hidden, d_hidden.sum(0), hidden.T @ d_logits,
             d_logits.sum(0)]  # fmt: skip
    expected = {
      'loss': -np.log(p[y > 0]).mean(),
      'accuracy': (p.argmax(-1) == LABEL).mean(),
      'grad_norm': np.sqrt(sum((g**2).sum() for g in grads)),
      'param_norm': np.sqrt(sum((w**2).sum() for w in weights)),
      'learning_rate': 0.1,
    }
    assert trace[step] == pytest.approx(expected, rel=1e-5)
    # v = 0.9 v + g; w = w - 0.1 v
    moments = [0.9 * v + g for v, g in zip(moments, grads, strict=True)]
    weights = [w - 0.1 * v for w, v in zip(weights, moments, strict=True)]
  found = jax.device_get(state.params)
  for name, value in zip(
    (('blocks', 0, 'kernel'), ('blocks', 0, 'bias'), ('head', 'kernel'),
     ('head', 'bias')),
    weights, strict=True,
  ):  # fmt: skip
    leaf = found
    for key in name:
      leaf = leaf[key]
    np.testing.assert_allclose(leaf, value, rtol=1e-5, atol=1e-6)
  assert int(state.step) == 3


def test_dropout_is_a_function_of_seed_and_step():
  """The same step draws the same mask; another step or seed another one."""
  model = {'name': 'mlp', 'widths': (64,), 'dropout': 0.5}
  programs = [_program(model=model, seed=seed) for seed in (0, 1)]

  def loss(seed, step):
    # The parameters of seed 0, so that nothing but the masks may differ.
    state = dataclasses.replace(programs[0].init(), step=jnp.int32(step))
    return float(programs[seed].train_step(state, BATCH)[1]['loss'])

  found = {(0, 0): loss(0, 0), (0, 1): loss(0, 1), (1, 0): loss(1, 0)}
  assert len(set(found.values())) == 3
  assert loss(0, 0) == found[0, 0]
  assert loss(0, 1) == found[0, 1]


def test_the_first_step_that_is_not_finite_is_remembered():
  program = _program(model={'name': 'linear'})
  state = program.init()
  assert int(state.control['nonfinite_step']) == -1
  bad = jax.tree.map(lambda leaf: leaf * np.nan, state.params)
  state = dataclasses.replace(state, params=bad)
  batches = _batches(program)
  for _ in range(3):
    state, _ = program.train_step(state, next(batches))
  assert int(state.control['nonfinite_step']) == 1


def test_every_optimizer_that_wants_the_loss_function_gets_it():
  """L-BFGS searches along a line, for which it needs value_fn."""
  program = _program(
    model={'name': 'linear'},
    optimizer={'name': 'lbfgs'},
    schedule={'name': 'constant_schedule', 'value': 1.0},
  )
  _, trace = _steps(program, 10)
  assert trace[-1]['loss'] < trace[0]['loss'] / 2


# ---------------------------------------------------- one step, by the formula


def _gradient(head, targets):
  """Softmax regression's, [D, K] and [K], in float64."""
  logits = np.float64(IMAGE) @ head['head/kernel'] + head['head/bias']
  error = (_softmax(logits) - targets) / len(IMAGE)
  return {'head/kernel': IMAGE.T @ error, 'head/bias': error.sum(0)}


def _soft_threshold(w, threshold):
  return np.sign(w) * np.maximum(np.abs(w) - threshold, 0)


def _linear(**fields):
  """One step of a linear model by plain gradient descent.

  Returns:
    The parameters before and after, their gradient, and the step's metrics.
  """
  program = _program(
    **{'model': {'name': 'linear'}, 'optimizer': {'name': 'sgd'}} | fields
  )
  before = {k: np.float64(v) for k, v in _host(program.init().params).items()}
  state, trace = _steps(program, 1)
  return before, _host(state.params), _gradient(before, np.eye(3)[LABEL]), trace


def test_gradients_are_clipped_by_value_and_then_by_norm():
  value, norm = 0.05, 0.1
  before, after, grads, trace = _linear(
    grad_clip_value=value, grad_clip_norm=norm
  )
  whole = np.sqrt(sum((g**2).sum() for g in grads.values()))
  cut = {key: np.clip(g, -value, value) for key, g in grads.items()}
  length = np.sqrt(sum((g**2).sum() for g in cut.values()))
  assert length > norm  # Both limits hold something back.
  assert length < whole * 0.9
  for key, g in cut.items():
    expected = before[key] - RATE * g * norm / length
    np.testing.assert_allclose(after[key], expected, rtol=1e-5, atol=1e-7)
  # What is reported is what the batch gave.
  assert trace[0]['grad_norm'] == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize(
  ('l1', 'l2', 'factor'),
  [(0.0, 0.0, 1.0), (0.5, 0.0, 1.0), (0.0, 0.8, 1.0), (0.5, 0.8, 0.1)],
)
def test_penalties_shrink_kernels_and_leave_biases_alone(l1, l2, factor):
  """w = S(w - r (g + l2 w), r l1), r the rate times the kernel's factor."""
  before, after, grads, trace = _linear(
    l1=l1, l2=l2, rate_multipliers={'head/kernel': factor}
  )
  w, r = before['head/kernel'], factor * RATE
  expected = _soft_threshold(w - r * (grads['head/kernel'] + l2 * w), r * l1)
  np.testing.assert_allclose(after['head/kernel'], expected, atol=1e-6)
  expected = before['head/bias'] - RATE * grads['head/bias']
  np.testing.assert_allclose(after['head/bias'], expected, atol=1e-7)
  # The loss is the data's alone, so that runs with and without compare.
  logits = IMAGE @ w + before['head/bias']
  loss = -np.log(_softmax(logits)[np.arange(16), LABEL]).mean()
  assert trace[0]['loss'] == pytest.approx(loss, rel=1e-5)


@pytest.mark.slow
def test_no_penalty_changes_the_bytes_of_a_bias():
  """In a network they are of hidden layers too; one step, so that g is one."""
  model = {'name': 'mlp', 'widths': (8,)}
  plain, _ = _steps(_program(model=model), 1)
  both, _ = _steps(_program(model=model, l1=0.3, l2=0.3), 1)
  plain, both = _host(plain.params), _host(both.params)
  for path in plain:
    same = plain[path].tobytes() == both[path].tobytes()
    assert same == path.endswith('bias'), path


# ------------------------------------------------ penalties, by scikit-learn


def _diabetes():
  """Standardized features and labels, so that float32 has all its digits."""
  x, y = sklearn.datasets.load_diabetes(return_X_y=True, scaled=False)
  x, y = (x - x.mean(0)) / x.std(0), (y - y.mean()) / y.std() + 1.0
  return x.astype(np.float32), y.astype(np.float32)


STEPS = 1500
LASSO = {'tol': 1e-12, 'max_iter': 1_000_000}


@pytest.mark.parametrize(
  ('reference', 'l1', 'l2', 'zeros'),
  [
    # Each minimizes mean (y - Xw - b)^2 + l1 |w| + l2 / 2 |w|^2: scikit-learn
    # has half of it, and Ridge the sum over the 442 rows.
    (sklearn.linear_model.Lasso(alpha=0.05, **LASSO), 2 * 0.05, 0.0, True),
    (sklearn.linear_model.Ridge(alpha=442 * 0.1 / 2), 0.0, 0.1, False),
    (
      sklearn.linear_model.ElasticNet(alpha=0.2, l1_ratio=0.4, **LASSO),
      2 * 0.2 * 0.4,
      2 * 0.2 * 0.6,
      True,
    ),
  ],
  ids=['lasso', 'ridge', 'elastic net'],
)
def test_penalized_regression_ends_where_scikit_learn_does(
  reference, l1, l2, zeros
):
  x, y = _diabetes()
  reference.fit(np.float64(x), np.float64(y))
  program = _program(
    _dataset({'features': x, 'label': y}, classes=None),
    task='regression',
    model={'name': 'linear'},
    optimizer={'name': 'sgd'},
    total_steps=STEPS,
    l1=l1,
    l2=l2,
  )
  state, batches = program.init(), _batches(program)
  for _ in range(STEPS):
    state, _ = program.train_step(state, next(batches))
  found = _host(state.params)
  kernel = found['head/kernel'][:, 0]
  # The largest weight is about 0.3.
  np.testing.assert_allclose(kernel, reference.coef_, rtol=0, atol=2e-5)
  np.testing.assert_allclose(
    found['head/bias'], reference.intercept_, rtol=0, atol=2e-5
  )
  assert (kernel == 0).tolist() == (reference.coef_ == 0).tolist()
  assert np.any(kernel == 0) == zeros


# --------------------------------------------------------- the running mean


def test_the_running_mean_is_its_recursion_and_is_what_is_evaluated():
  """m = d m + (1 - d) w, with d = min(decay, (1 + t) / (10 + t)) at step t."""
  decay = 0.4  # Reached at t = 5.
  program = _program(model={'name': 'mlp', 'widths': (4,)}, ema_decay=decay)
  batches, state = _batches(program), program.init()
  mean = {k: np.float64(v) for k, v in _host(state.params).items()}
  for path, value in _host(state.ema_params).items():
    np.testing.assert_array_equal(value, mean[path])
  for t in range(12):
    state, _ = program.train_step(state, next(batches))
    now, d = _host(state.params), min(decay, (1 + t) / (10 + t))
    mean = {k: d * m + (1 - d) * now[k] for k, m in mean.items()}
  evaluated, now = _host(program.eval_params(state)), _host(state.params)
  assert mean.keys() == evaluated.keys()
  for path, expected in mean.items():
    np.testing.assert_allclose(evaluated[path], expected, rtol=1e-5, atol=1e-7)
    assert np.abs(now[path] - expected).max() > 1e-3
  assert program.train_step._cache_size() == 1


def test_without_a_decay_there_is_no_running_mean():
  program = _program(model={'name': 'linear'})
  state, _ = _steps(program, 1)
  assert state.ema_params == {}
  assert program.eval_params(state)['head']['bias'] is not None


def test_the_running_mean_of_what_is_frozen_is_itself():
  """d w + (1 - d) w is not w in float32, and the error grows with the steps."""
  program = _program(
    model={'name': 'mlp', 'widths': (64,)},
    rate_multipliers={'blocks': 0.0},
    ema_decay=0.999,
  )
  first = _host(program.init().params)
  state, _ = _steps(program, 20)
  evaluated = _host(program.eval_params(state))
  for path in ('blocks/0/kernel', 'blocks/0/bias'):
    assert evaluated[path].tobytes() == first[path].tobytes()


# -------------------------------------------------------------- accumulation


@pytest.mark.parametrize(
  ('optimizer', 'rate', 'model', 'parts'),
  [
    (
      {'name': 'sgd', 'momentum': 0.9},
      RATE,
      {'name': 'mlp', 'widths': (8,), 'activation': 'tanh'},
      4,
    ),
    # It calls the loss again and again along a line: over all parts too.
    pytest.param(
      {'name': 'lbfgs'}, 1.0, {'name': 'linear'}, 2, marks=pytest.mark.slow
    ),
  ],
  ids=['sgd', 'lbfgs'],
)
def test_a_batch_in_parts_is_the_large_batch(optimizer, rate, model, parts):
  def trained(accumulate):
    program = _program(
      model=model,
      optimizer=optimizer,
      schedule={'name': 'constant_schedule', 'value': rate},
      accumulate=accumulate,
      l1=0.0 if optimizer['name'] == 'lbfgs' else 1e-3,
      l2=1e-2,
      grad_clip_norm=0.5,
    )
    state, trace = _steps(program, 5)
    assert program.train_step._cache_size() == 1
    return _host(state.params), trace

  (whole, trace), (found, trace_in_parts) = trained(1), trained(parts)
  for path in whole:
    np.testing.assert_allclose(found[path], whole[path], rtol=1e-4, atol=1e-5)
  for one, other in zip(trace, trace_in_parts, strict=True):
    assert one == pytest.approx(other, rel=1e-4)


@pytest.mark.parametrize('remat', config_lib.REMAT)
def test_what_is_computed_again_is_what_was_computed(remat):
  model = {'name': 'mlp', 'widths': (16,), 'dropout': 0.3}

  def trained(**fields):
    program = _program(model=model, **fields)
    batch = next(_batches(program))
    step = program.train_step.trace(program.state_shape, batch)
    return _host(_steps(program, 3)[0].params), 'remat' in str(step.jaxpr)

  (found, has_remat), (expected, had) = trained(remat=remat), trained()
  assert (has_remat, had) == (True, False)
  for path in expected:
    np.testing.assert_allclose(found[path], expected[path], rtol=1e-5)


@pytest.mark.parametrize('accumulate', [3, 32])
def test_a_batch_that_has_no_such_parts_is_refused(accumulate):
  with pytest.raises(config_lib.UserError) as caught:
    _program(model={'name': 'linear'}, accumulate=accumulate)
  line = str(caught.value)
  assert 'config.accumulate' in line
  assert '\n' not in line


def _hand_made(model, *, config, augment=None, unroll=True, **functions):
  """A compiled step of any model, and its first state's parts."""
  graphdef, params = nnx.split(model)
  params = nnx.to_pure_dict(params)
  config = config_lib.Config(
    total_steps=10,
    optimizer=optim.resolve_optimizer({'name': 'sgd'}),
    schedule={'name': 'constant_schedule', 'value': RATE},
    **config,
  )
  schedule = optim.create_schedule(config.schedule, 10)
  step = step_lib.make_train_step(
    graphdef,
    optim.create(config, schedule),
    prepare=step_lib.make_prepare('features', None),
    augment=augment or (lambda keys, batch: batch),
    schedule=schedule,
    config=config,
    rates=dict.fromkeys(paths.flatten(params), 1.0),
    unroll=unroll,
    **functions,
  )
  tx = optim.create(config, schedule)
  return jax.jit(step), state_lib.create(params, {}, tx.init(params), ema=False)


class _Draw(nnx.Module):
  """Gives one number for all examples: the first that dropout would draw."""

  def __init__(self):
    self.scale = nnx.Param(jnp.ones(()))

  def __call__(self, x, *, train=False, rngs=None):
    drawn = jax.random.uniform(rngs.dropout())
    return jnp.broadcast_to(self.scale * drawn, (x.shape[0], 1))


@pytest.mark.slow
@pytest.mark.parametrize('unroll', [True, False])
def test_every_part_of_a_batch_draws_its_own_masks_and_draws_them_again(unroll):
  def draw(accumulate, seed, step):
    """The mean of what the parts drew, and their variance."""
    run, state = _hand_made(
      _Draw(),
      config={'accumulate': accumulate, 'seed': seed},
      unroll=unroll,
      loss_fn=lambda outputs, batch: outputs[:, 0],
      measure=lambda outputs, batch: {'square': outputs[:, 0] ** 2},
    )
    state = dataclasses.replace(state, step=jnp.int32(step))
    found = run(state, BATCH)[1]
    mean = float(found['loss'])
    return mean, float(found['square']) - mean**2

  assert draw(1, 0, 0)[1] == pytest.approx(0, abs=1e-6)
  assert draw(4, 0, 0)[1] > 1e-3
  assert draw(4, 0, 0) == draw(4, 0, 0)
  means = {draw(4, *place)[0] for place in ((0, 0), (0, 1), (1, 0), (1, 1))}
  assert len(means) == 4


# -------------------------------------------------- rates of single parameters

DEEP = {'name': 'mlp', 'widths': (4, 5)}
ADAMW = {'name': 'adamw', 'weight_decay': 0.1}


def _spelled_leaves(tree):
  """The places of all leaves, as 'mu/blocks/0/kernel' or so."""
  return [
    jax.tree_util.keystr(path, simple=True, separator='/')
    for path, _ in jax.tree_util.tree_leaves_with_path(tree)
  ]


def test_what_is_frozen_keeps_its_bytes_and_has_no_optimizer_state():
  fields = {
    'model': DEEP, 'optimizer': ADAMW, 'l1': 1e-3, 'l2': 1e-2,
    'grad_clip_norm': 1.0,
  }  # fmt: skip
  program = _program(rate_multipliers={'blocks/0': 0.0}, **fields)
  first = _host(program.init().params)
  state, _ = _steps(program, 5)
  last = _host(state.params)
  for path in first:
    frozen = path.startswith('blocks/0')
    assert (first[path].tobytes() == last[path].tobytes()) == frozen, path
  whole = _spelled_leaves(_program(**fields).state_shape.opt_state)
  found = _spelled_leaves(state.opt_state)
  # Two moments of one kernel and one bias are left out, and nothing else.
  assert set(whole) - set(found) == {
    place for place in whole if 'blocks/0' in place
  }
  assert len(whole) - len(found) == 4
  assert any('blocks/1/kernel' in place for place in found)


@pytest.mark.slow
def test_a_factor_is_one_on_the_rate():
  plain, multiplied = (
    _program(
      model=DEEP, optimizer={'name': 'sgd'}, rate_multipliers=multipliers
    )
    for multipliers in ({}, {'blocks/0': 0.1, 'blocks': 0.5, 'head/bias': 2})
  )
  first = _host(plain.init().params)
  one, other = (
    _host(_steps(program, 1)[0].params) for program in (plain, multiplied)
  )
  factors = {
    'blocks/0/kernel': 0.1,
    'blocks/0/bias': 0.1,
    'blocks/1/kernel': 0.5,
    'blocks/1/bias': 0.5,
    'head/kernel': 1.0,
    'head/bias': 2.0,
  }
  for path, start in first.items():
    np.testing.assert_allclose(
      other[path] - start,
      factors[path] * (one[path] - start),
      rtol=1e-5, atol=1e-7,
    )  # fmt: skip


@pytest.mark.parametrize(
  ('multipliers', 'frozen'),
  [
    ({'blocks/0/kernel': 0.0, 'blocks': 1.0}, {'blocks/0/kernel'}),
    ({'blocks': 1.0, 'blocks/0/kernel': 0.0}, set()),
    ({'.*bias': 0, 'head': 0.5},
     {'blocks/0/bias', 'blocks/1/bias', 'head/bias'}),
    ({'head/bias': 0.5, '.*bias': 0}, {'blocks/0/bias', 'blocks/1/bias'}),
  ],
)  # fmt: skip
def test_the_first_pattern_that_matches_counts(multipliers, frozen):
  program = _program(model=DEEP, rate_multipliers=multipliers)
  moments = ' '.join(_spelled_leaves(program.state_shape.opt_state))
  parameters = _spelled_leaves(program.state_shape.params)
  assert {path for path in parameters if path not in moments} == frozen


@pytest.mark.parametrize(
  ('multipliers', 'words'),
  [
    ({'no_such': 0.1}, "'no_such', which matches no parameter; there are "),
    ({'kernel': 0.1}, "'kernel', which matches no parameter; there are "),
    ({'head': 1.0, 'haed': 0.0}, "'haed', which matches no parameter"),
    ({'.*': 0.0}, 'which freezes every parameter'),
    ({'head': 0, 'blocks': 0.0}, 'which freezes every parameter'),
  ],
)
def test_a_pattern_of_nothing_or_of_everything_frozen_is_refused(
  multipliers, words
):
  with pytest.raises(config_lib.UserError) as caught:
    _program(model=DEEP, rate_multipliers=multipliers)
  line = str(caught.value)
  assert line.startswith('config.rate_multipliers ')
  assert words in line
  assert '\n' not in line


# -------------------------------------------------------- reduce on plateau


def test_evaluations_scale_the_rate_the_updates_and_the_threshold():
  """Ten evaluations without a new best: a tenth of everything."""
  program = _program(
    model={'name': 'linear'},
    optimizer={'name': 'sgd'},
    schedule={'name': 'reduce_on_plateau', 'value': RATE},
    l1=0.5,
    l2=0.8,
  )

  def after(evaluations):
    state = control.judged(
      program.init(), program.config, dict.fromkeys(range(evaluations), 0.5)
    )
    state, metrics = program.train_step(state, next(_batches(program)))
    return _host(state.params), float(metrics['learning_rate'])

  w = {k: np.float64(v) for k, v in _host(program.init().params).items()}
  grads = _gradient(w, np.eye(3)[LABEL])
  kernel = w['head/kernel']
  for evaluations, rate in ((0, 0.1), (10, 0.1), (11, 0.01), (21, 0.001)):
    found, reported = after(evaluations)
    assert reported == pytest.approx(rate, rel=1e-6)
    expected = _soft_threshold(
      kernel - rate * (grads['head/kernel'] + 0.8 * kernel), rate * 0.5
    )
    np.testing.assert_allclose(found['head/kernel'], expected, atol=1e-6)
    expected = w['head/bias'] - rate * grads['head/bias']
    np.testing.assert_allclose(found['head/bias'], expected, atol=1e-7)
  assert program.train_step._cache_size() == 1


def test_the_scale_stays_from_step_to_step():
  program = _program(
    model={'name': 'linear'},
    schedule={'name': 'reduce_on_plateau', 'value': RATE, 'patience': 1},
  )
  state = control.judged(program.init(), program.config, {1: 0.5, 2: 0.5})
  batches = _batches(program)
  for _ in range(3):
    state, metrics = program.train_step(state, next(batches))
    assert float(metrics['learning_rate']) == pytest.approx(RATE / 10)


# ------------------------------------------------------------------ bfloat16

PIXELS = GENERATOR.integers(0, 256, (16, 8, 8, 1)).astype(np.uint8)
DTYPES = [('float32', 'f32'), ('bfloat16', 'bf16')]
PRODUCTS = r':(\w+)\[[\d,]*\] = (?:dot_general|conv_general_dilated)\['


@pytest.mark.parametrize(
  ('examples', 'model', 'products'),
  [
    # For each layer the output and the gradient of its kernel, and of its
    # input where that is none of the data's.
    (BATCH, {'name': 'linear'}, 2),
    (BATCH, {'name': 'mlp', 'widths': (8,)}, 5),
    (
      {'image': PIXELS, 'label': LABEL},
      {'name': 'cnn', 'widths': (4,), 'head_widths': (8,)},
      # A convolution's gradients are there twice, and both: for a CPU, where
      # the kernel's is a sum in float32, and for others.
      11,
    ),
  ],
  ids=['linear', 'mlp', 'cnn'],
)
@pytest.mark.parametrize(('dtype', 'short'), DTYPES)
def test_models_compute_in_the_dtype_and_keep_float32(
  examples, model, products, dtype, short
):
  program = _program(
    _dataset(examples),
    data=config_lib.Data(batch_size=16, normalize='mean_std'),
    model=model,
    dtype=dtype,
    ema_decay=0.9,
  )
  step = jax.make_jaxpr(program.train_step)(program.state_shape, examples)
  found = re.findall(PRODUCTS, str(step))
  assert len(found) == products
  sums = model['name'] == 'cnn' and dtype == 'bfloat16'
  assert found.count(short) == products - sums
  state, metrics = jax.eval_shape(
    program.train_step, program.state_shape, examples
  )
  kept = {str(leaf.dtype) for leaf in jax.tree.leaves(state)}
  assert kept == {'float32', 'int32'}
  assert {str(leaf.dtype) for leaf in metrics.values()} == {'float32'}
  assert str(program.zero_totals()['loss'].dtype) == 'float32'


def test_in_bfloat16_the_loss_is_nearly_that_of_float32():
  found = {}
  for dtype, _ in DTYPES:
    program = _program(model={'name': 'mlp', 'widths': (8,)}, dtype=dtype)
    found[dtype] = [step['loss'] for step in _steps(program, 20)[1]]
  # Eight bits of mantissa: the first loss is right to about 1 %.
  assert found['bfloat16'][0] == pytest.approx(found['float32'][0], rel=0.02)
  assert found['bfloat16'][-1] == pytest.approx(found['float32'][-1], rel=0.1)
  assert found['bfloat16'] != found['float32']


# ------------------------------------------------------------- mixed examples


@pytest.mark.parametrize('accumulate', [1, 4])
def test_a_mixed_example_has_shares_of_two_labels(accumulate):
  """Zhang et al. (2018): (1 - s) loss(label) + s loss(other label)."""
  other = np.roll(LABEL, 1)
  share = GENERATOR.uniform(size=16).astype(np.float32)
  model = nnx.Linear(6, 3, rngs=nnx.Rngs(0))

  class Head(nnx.Module):
    """As models/linear.py, under the same path."""

    def __init__(self):
      self.head = model

    def __call__(self, x, *, train=False, rngs=None):
      return self.head(x)

  run, state = _hand_made(
    Head(),
    config={'accumulate': accumulate},
    augment=lambda keys, batch: (
      batch | {'other_label': other, 'other_share': share}
    ),
    loss_fn=losses.create(
      'classification', 'softmax_cross_entropy_with_integer_labels'
    ),
    measure=metrics_lib.create('classification'),
  )
  before = {k: np.float64(v) for k, v in _host(state.params).items()}
  state, metrics = run(state, BATCH)
  logs = np.log(_softmax(IMAGE @ before['head/kernel'] + before['head/bias']))
  targets = (1 - share[:, None]) * np.eye(3)[LABEL]
  targets += share[:, None] * np.eye(3)[other]
  expected = -(targets * logs).sum(-1).mean()
  assert float(metrics['loss']) == pytest.approx(expected, rel=1e-5)
  # Accuracy asks for the label that has the name.
  assert float(metrics['accuracy']) == (logs.argmax(-1) == LABEL).mean()
  after = _host(state.params)
  for key, grad in _gradient(before, targets).items():
    np.testing.assert_allclose(
      after[key], before[key] - RATE * grad, rtol=1e-5, atol=1e-6
    )
