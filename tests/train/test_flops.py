"""Operations against hand formulas and the papers' multiply-adds."""

import functools

from flax import nnx
import jax
from jax import lax
from jax.experimental import pallas as pl
import jax.numpy as jnp
import numpy as np
import pytest

import models
from train import flops


def shape(*sizes):
  return jax.ShapeDtypeStruct(sizes, jnp.float32)


def forward(name, inputs, **kwargs):
  """Operations of a model's forward pass, from shapes alone."""
  model = nnx.eval_shape(
    lambda: models.create(name, **kwargs, rngs=nnx.Rngs(0))
  )
  graphdef, state = nnx.split(model)
  return flops.count(lambda s, x: nnx.merge(graphdef, s)(x), state, inputs)


def test_an_lstm_costs_four_gates_at_each_step():
  kwargs = {'num_features': 28, 'widths': (128,), 'num_classes': 10}
  products = 28 * (28 + 128) * 4 * 128 + 128 * 10
  operations = forward('lstm', shape(5, 28, 28, 1), **kwargs)
  assert operations == 5 * 2 * products


# Thousand millions of multiply-adds of one image of 224x224, as torchvision
# publishes them with its weights (`_ops` in its models).
PUBLISHED = {
  ('alexnet', None): 0.714,
  ('resnet', '18'): 1.814,
  ('resnet', '50'): 4.089,
  ('resnext', '50_32x4d'): 4.230,
  ('densenet', '121'): 2.834,
  ('convnext', 'T'): 4.456,
  ('vit', 'B/32'): 4.409,
  ('vit', 'B/16'): 17.564,
  ('vit', 'L/16'): 61.555,
}


@pytest.mark.parametrize(('name', 'variant'), PUBLISHED)
def test_a_model_costs_what_is_published(name, variant):
  kwargs = {'image_shape': (224, 224, 3), 'num_classes': 1000}
  if variant is not None:
    kwargs['variant'] = variant
  published = PUBLISHED[name, variant] * 1e9
  operations = forward(name, shape(1, 224, 224, 3), **kwargs)
  assert operations / 2 == pytest.approx(published, rel=0.01)


def convolve(x, w, **kwargs):
  return lax.conv_general_dilated(
    x, w, dimension_numbers=('NHWC', 'HWIO', 'NHWC'), **kwargs
  )


def test_an_mlp_costs_two_operations_a_weight():
  weights = 784 * 256 + 256 * 128 + 128 * 10
  assert forward('mlp', shape(7, 28, 28, 1)) == 7 * 2 * weights


def test_a_cnn_costs_what_the_formula_of_a_convolution_says():
  products = 28 * 28 * 32 * 9 + 14 * 14 * 64 * 9 * 32 + 7 * 7 * 64 * 10
  assert forward('cnn', shape(3, 28, 28, 1)) == 3 * 2 * products


def test_a_batched_product_costs_each_of_its_products():
  def product(q, k):
    return jnp.einsum('bqhd,bkhd->bhqk', q, k)

  operations = flops.count(product, shape(2, 5, 3, 8), shape(2, 7, 3, 8))
  assert operations == 2 * (2 * 3 * 5 * 7 * 8)


@pytest.mark.parametrize(
  ('groups', 'strides', 'dilation', 'size'),
  [(1, 1, 1, 12), (4, 1, 1, 12), (2, 2, 1, 6), (1, 1, 2, 12), (8, 3, 2, 4)],
)
def test_a_convolution_costs_its_taps_at_each_output(
  groups, strides, dilation, size
):
  function = functools.partial(
    convolve,
    window_strides=(strides, strides),
    padding='SAME',
    rhs_dilation=(dilation, dilation),
    feature_group_count=groups,
  )
  operations = flops.count(
    function, shape(2, 12, 12, 8), shape(3, 3, 8 // groups, 16)
  )
  assert operations == 2 * 2 * size * size * 16 * 9 * 8 // groups


@pytest.mark.parametrize(
  ('kernel', 'strides'), [(3, 1), (3, 2), (1, 2), (7, 2)]
)
@pytest.mark.parametrize('groups', [1, 4])
def test_each_gradient_of_a_convolution_costs_what_it_cost(
  kernel, strides, groups
):
  function = functools.partial(
    convolve,
    window_strides=(strides, strides),
    padding='SAME',
    feature_group_count=groups,
  )
  args = shape(2, 16, 16, 8), shape(kernel, kernel, 8 // groups, 12)
  cost = flops.count(function, *args)
  for argument in (0, 1):
    gradient = jax.grad(lambda *a: function(*a).sum(), argument)
    jaxpr = jax.make_jaxpr(gradient)(*args).jaxpr
    backward = sum(flops.by_scope(jaxpr).values())
    # The forward pass is there too, though nothing needs its result.
    assert backward in (cost, 2 * cost)


def test_a_training_step_spares_the_gradient_of_the_first_input():
  graphdef, state = nnx.split(
    nnx.eval_shape(lambda: models.create('mlp', rngs=nnx.Rngs(0)))
  )

  def loss(state, x):
    return jnp.square(nnx.merge(graphdef, state)(x)).sum()

  first, others = 784 * 256, 256 * 128 + 128 * 10
  operations = flops.count(jax.grad(loss), state, shape(5, 28, 28, 1))
  assert operations == 5 * 2 * (2 * first + 3 * others)


def test_a_scan_costs_its_body_each_time():
  def body(carry, x):
    return jnp.tanh(carry @ jnp.ones((6, 6)) + x @ jnp.ones((4, 6))), None

  def recurrence(first, xs):
    return lax.scan(body, first, xs)[0]

  operations = flops.count(recurrence, shape(3, 6), shape(28, 3, 4))
  assert operations == 28 * 2 * 3 * 6 * (6 + 4)


def test_nested_loops_multiply():
  def body(_, x):
    return lax.fori_loop(0, 3, lambda _, y: y @ y, x)

  operations = flops.count(lambda x: lax.fori_loop(0, 5, body, x), shape(4, 4))
  assert operations == 15 * 2 * 4**3


def test_the_most_expensive_branch_counts():
  def function(x):
    return lax.cond(x.sum() > 0, lambda x: x @ x @ x, lambda x: x @ x, x)

  assert flops.count(function, shape(4, 4)) == 2 * 2 * 4**3


def test_a_loop_of_unknown_length_is_refused_only_if_it_multiplies():
  def repeat(step, x):
    return lax.while_loop(lambda x: x.sum() > 0, step, x)

  assert flops.count(lambda x: repeat(lambda x: x - 1, x), shape(4, 4)) == 0
  with pytest.raises(ValueError, match='while'):
    flops.count(lambda x: repeat(lambda x: x @ x, x), shape(4, 4))


def with_own_jvp(function):
  wrapped = jax.custom_jvp(function)
  wrapped.defjvps(lambda tangent, *_: tangent)
  return wrapped


def with_own_vjp(function):
  wrapped = jax.custom_vjp(function)
  wrapped.defvjp(lambda x: (function(x), x), lambda x, g: (g + x,))
  return wrapped


@pytest.mark.parametrize(
  'wrap', [jax.jit, jax.checkpoint, jax.vmap, with_own_jvp, with_own_vjp]
)
def test_a_function_costs_the_same_however_it_is_wrapped(wrap):
  operations = flops.count(wrap(lambda x: x @ x), shape(6, 4, 4))
  assert operations == 6 * 2 * 4**3


def test_what_is_computed_again_counts_again():
  def layer(x, w):
    return jnp.tanh(x @ w)

  def gradient(layer):
    return jax.grad(lambda x, w: layer(layer(x, w), w).sum(), (0, 1))

  args = shape(8, 8), shape(8, 8)
  once = flops.count(gradient(layer), *args)
  again = flops.count(gradient(jax.checkpoint(layer)), *args)
  assert once == 6 * 2 * 8**3
  # Both layers once more, but what the second gave first nobody reads.
  assert again == 7 * 2 * 8**3


def test_what_every_device_does_counts_on_every_device():
  mesh = jax.sharding.AbstractMesh(
    (4, 2), ('data', 'fsdp'), axis_types=(jax.sharding.AxisType.Auto,) * 2
  )
  spec = jax.sharding.PartitionSpec('data')
  function = jax.shard_map(
    lambda x, w: x @ w,
    mesh=mesh,
    in_specs=(spec, jax.sharding.PartitionSpec()),
    out_specs=spec,
    axis_names={'data'},
  )
  operations = flops.count(jax.jit(function), shape(8, 3), shape(3, 5))
  assert operations == 2 * 8 * 3 * 5


def test_operations_are_told_apart_by_their_scope():
  def product(x):
    return jnp.einsum('ij,jk->ik', x, x)

  def function(x):
    with jax.named_scope('first'):
      x = product(x)
      with jax.named_scope('inner'):
        x, _ = lax.scan(lambda x, _: (product(x), None), x, length=3)
    return product(x)

  found = flops.by_scope(jax.make_jaxpr(function)(shape(4, 4)).jaxpr)
  once = 2 * 4**3
  totals = {
    scope: sum(n for path, n in found.items() if path.startswith(scope))
    for scope in ('first', 'first/inner', '')
  }
  assert totals == {'first': 4 * once, 'first/inner': 3 * once, '': 5 * once}


def test_the_count_is_xlas_own_where_nothing_loops():
  """XLA adds the elementwise operations, which are few here."""
  x, w = np.ones((64, 256), np.float32), np.ones((256, 512), np.float32)
  compiled = jax.jit(jnp.matmul).lower(x, w).compile()
  assert flops.count(jnp.matmul, x, w) == compiled.cost_analysis()['flops']


def test_a_pallas_kernel_costs_its_body_at_every_place_of_its_grid():
  def product(x, w):
    def body(x_ref, w_ref, out_ref):
      out_ref[...] = x_ref[...] @ w_ref[...]

    return pl.pallas_call(
      body,
      out_shape=jax.ShapeDtypeStruct((32, 24), jnp.float32),
      grid=(4, 3),
      in_specs=[
        pl.BlockSpec((8, 16), lambda i, j: (i, 0)),
        pl.BlockSpec((16, 8), lambda i, j: (0, j)),
      ],
      out_specs=pl.BlockSpec((8, 8), lambda i, j: (i, j)),
    )(x, w)

  operations = flops.count(product, shape(32, 16), shape(16, 24))
  assert operations == 2 * 32 * 16 * 24
