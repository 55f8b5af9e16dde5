"""Other libraries' weights: what becomes of each array, and what is refused.

That the outputs are then the same is proven in tests/parity.
"""

import json
import math
import pathlib
import zipfile

from flax import linen
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import models
from models import convert
from models import position
from models.convert import files
from models.convert import layouts
from tests.models import published

SMALL_RESNET = {
  'name': 'resnet', 'image_shape': (8, 8, 3), 'depth': (1, 1), 'width': 8,
}  # fmt: skip
SMALL_VIT = {
  'name': 'vit', 'image_shape': (8, 8, 3), 'num_classes': 5, 'patch_size': 2,
  'width': 12, 'depth': 2, 'num_heads': 3,
}  # fmt: skip
SMALL_VIT_SIZES = {
  'depth': 2, 'width': 12, 'patch': 2, 'tokens': 17, 'classes': 5,
}  # fmt: skip


def abstract(name, **kwargs) -> nnx.Module:
  """The model's shapes."""
  return nnx.eval_shape(lambda: models.create(name, **kwargs, rngs=nnx.Rngs(0)))


def filled(name, **kwargs) -> nnx.Module:
  """The model with the same number everywhere, which compiles nothing."""
  model = abstract(name, **kwargs)
  state = jax.tree.map(
    lambda leaf: jnp.asarray(np.full(leaf.shape, 0.25, leaf.dtype)),
    nnx.state(model),
  )
  nnx.update(model, state)
  return model


def zeros(shapes) -> dict[str, np.ndarray]:
  """Arrays of these shapes that take no memory."""
  return {
    name: np.broadcast_to(np.float32(0), shape)
    for name, shape in shapes.items()
  }


def small_resnet() -> dict[str, np.ndarray]:
  return published.arrays(published.resnet((1, 1), 8, (3, 3)))


def flat(model) -> dict[str, np.ndarray]:
  """Path -> array."""
  return {
    '/'.join(map(str, path)): np.asarray(leaf[...])
    for path, leaf in nnx.to_flat_state(nnx.state(model))
  }


def compiled(model):
  graphdef, state = nnx.split(model)
  run = jax.jit(lambda state, inputs: nnx.merge(graphdef, state)(inputs))
  return lambda inputs: np.asarray(run(state, inputs))


# -------------------------------------------------------------- what is mapped

# Model, arrays and layouts, and the published number of parameters.
PUBLISHED = {
  'resnet18': (
    {'name': 'resnet', 'variant': '18'},
    published.resnet((2, 2, 2, 2), 64, (3, 3)),
    ('torchvision', 'timm'), 11_689_512,
  ),
  'resnet50': (
    {'name': 'resnet', 'variant': '50'},
    published.resnet(), ('torchvision', 'timm'), 25_557_032,
  ),
  'resnet50_hf': (
    {'name': 'resnet', 'variant': '50'},
    published.resnet(layout='transformers'), ('transformers',), 25_557_032,
  ),
  'wide_resnet50_2': (
    {'name': 'resnet', 'variant': 'wide50_2'},
    published.resnet(inner=2), ('torchvision', 'timm'), 68_883_240,
  ),
  'resnext50_32x4d': (
    {'name': 'resnext', 'variant': '50_32x4d'},
    published.resnet(inner=2, groups=32), ('torchvision', 'timm'), 25_028_904,
  ),
  'densenet121': (
    {'name': 'densenet', 'variant': '121'},
    published.densenet(), ('torchvision', 'timm'), 7_978_856,
  ),
  **{
    f'convnext_t {layout}': (
      {'name': 'convnext', 'variant': 'T'},
      published.convnext(layout=layout), (layout,), 28_589_128,
    )
    for layout in ('torchvision', 'timm', 'transformers')
  },
  **{
    f'vit_ti_16 {layout}': (
      {'name': 'vit', 'variant': 'Ti/16'},
      published.vit(width=192, layout=layout), (layout,), 5_717_416,
    )
    for layout in ('torchvision', 'timm', 'transformers')
  },
  'vit_ti_16 google': (
    {'name': 'vit', 'variant': 'Ti/16'},
    published.vit_google(width=192, heads=3), ('google',), 5_717_416,
  ),
}  # fmt: skip


@pytest.mark.parametrize('name', PUBLISHED)
def test_a_published_file_is_used_up_and_leaves_nothing_new(name):
  model, shapes, named, parameters = PUBLISHED[name]
  counted = ('running_mean', 'running_var', 'num_batches_tracked')
  assert parameters == sum(
    math.prod(shape) for n, shape in shapes.items() if not n.endswith(counted)
  )
  assert layouts.detect(shapes) in named
  model = abstract(**model)
  for layout in named:
    values, report = convert.converted(model, zeros(shapes), layout=layout)
    assert (report.layout, report.missing, report.unused) == (layout, (), ())
    assert set(values) == {p for p, _ in nnx.to_flat_state(nnx.state(model))}
    used = {n for names in report.mapped.values() for n in names}
    assert used == {n for n in shapes if not n.endswith('_tracked')}


def test_every_family_and_layout_is_among_the_published():
  tested = {
    (models.MODELS[model['name']], layout)
    for model, _, named, _ in PUBLISHED.values()
    for layout in named
  }
  listed = {
    (kind, layout)
    for kind, named in layouts.FAMILIES.items()
    for layout in named
  }
  assert listed - tested == {
    (models.MODELS[name], 'torch') for name in ('rnn', 'gru', 'lstm')
  }
  assert {layout for _, layout in listed} == set(layouts.LAYOUTS)


def test_arrays_are_turned_and_go_where_they_belong():
  arrays = small_resnet()
  model = filled(**SMALL_RESNET)
  report = convert.from_torch(model, arrays, layout='torchvision')
  found = flat(model)
  # [out, in, H, W] as [H, W, in, out].
  np.testing.assert_array_equal(
    found['embed/conv/kernel'][3, 5, 1, 7], arrays['conv1.weight'][7, 1, 3, 5]
  )
  np.testing.assert_array_equal(
    found['blocks/1/0/convs/1/kernel'][0, 2, 4, 9],
    arrays['layer2.0.conv2.weight'][9, 4, 0, 2],
  )
  np.testing.assert_array_equal(found['head/kernel'], arrays['fc.weight'].T)
  for ours, theirs in {
    'embed/norm/norm/scale': 'bn1.weight',
    'blocks/0/0/norms/1/norm/bias': 'layer1.0.bn2.bias',
    'blocks/1/0/norms/0/norm/mean': 'layer2.0.bn1.running_mean',
    'blocks/1/0/shortcut_norm/norm/var': 'layer2.0.downsample.1.running_var',
    'head/bias': 'fc.bias',
  }.items():
    np.testing.assert_array_equal(found[ours], arrays[theirs], err_msg=ours)
    assert report.mapped[ours] == (theirs,)
  assert not any('num_batches_tracked' in name for name in report.unused)
  for number in ('0', '1'):  # The layers' scale, whatever its shape.
    shapes = published.convnext((1, 1), 8)
    name = f'features.{2 * int(number) + 1}.0.layer_scale'
    assert shapes[name][1:] == (1, 1)
    arrays = published.arrays(shapes)
    values, _ = convert.converted(
      abstract('convnext', image_shape=(32, 32, 3), depth=(1, 1), width=8),
      arrays,
    )
    np.testing.assert_array_equal(
      values['blocks', int(number), 0, 'layer_scale'], arrays[name].ravel()
    )


def test_older_and_newer_names_are_the_same():
  model = abstract('densenet', image_shape=(32, 32, 3), depth=(2, 1))
  shapes = published.densenet((2, 1))
  older = {
    name.replace('.norm1.', '.norm.1.').replace('.conv2.', '.conv.2.'): shape
    for name, shape in shapes.items()
  }
  assert 'features.denseblock1.denselayer2.norm.1.running_var' in older
  _, report = convert.converted(model, zeros(older))
  assert not report.missing

  model = abstract(**SMALL_VIT)
  shapes = published.vit(**SMALL_VIT_SIZES)
  older = {
    name.replace('mlp.0', 'mlp.linear_1').replace('mlp.3', 'mlp.linear_2'): s
    for name, s in shapes.items()
  }
  assert 'encoder.layers.encoder_layer_1.mlp.linear_2.bias' in older
  assert not convert.converted(model, zeros(older))[1].missing
  # A model without its classes has its names without the model's.
  shapes = published.vit(**SMALL_VIT_SIZES, layout='transformers')
  bare = {
    name.removeprefix('vit.'): shape
    for name, shape in shapes.items()
    if not name.startswith('classifier')
  }
  _, report = convert.converted(model, zeros(bare))
  assert report.missing == ('head/bias', 'head/kernel')
  assert not report.unused
  with pytest.raises(ValueError, match='names of one array'):
    convert.converted(model, zeros(shapes | bare), layout='transformers')


# ------------------------------------------------------------------------- ViT


def vit_in_every_layout() -> dict[str, dict[str, np.ndarray]]:
  """The same random weights as each library would store them."""
  layouts = ('torchvision', 'timm', 'transformers')
  names = {
    layout: published.vit(**SMALL_VIT_SIZES, layout=layout)
    for layout in layouts
  }
  timm = published.arrays(names['timm'])
  stored = {'timm': timm, 'torchvision': {}, 'transformers': {}, 'google': {}}
  # Their tables list the same arrays in the same order, but for qkv.
  plain = {
    layout: [n for n in names[layout] if not ('attn.qkv' in n or 'in_proj' in n
             or 'attention.attention' in n)]
    for layout in layouts
  }  # fmt: skip
  for layout in ('torchvision', 'transformers'):
    for theirs, name in zip(plain[layout], plain['timm'], strict=True):
      stored[layout][theirs] = timm[name]
  google = {
    'cls_token': 'cls',
    'pos_embed': 'Transformer/posembed_input/pos_embedding',
    'patch_embed.proj': 'embedding',
    'norm': 'Transformer/encoder_norm',
    'head': 'head',
  }
  for i in range(2):
    block = f'Transformer/encoderblock_{i}/'
    google |= {
      f'blocks.{i}.norm1': f'{block}LayerNorm_0',
      f'blocks.{i}.norm2': f'{block}LayerNorm_2',
      f'blocks.{i}.mlp.fc1': f'{block}MlpBlock_3/Dense_0',
      f'blocks.{i}.mlp.fc2': f'{block}MlpBlock_3/Dense_1',
    }
    weight, bias = (
      timm[f'blocks.{i}.attn.qkv.{p}'] for p in ('weight', 'bias')
    )
    vision = f'encoder.layers.encoder_layer_{i}.self_attention.in_proj'
    stored['torchvision'] |= {
      f'{vision}_weight': weight,
      f'{vision}_bias': bias,
    }
    attention = f'{block}MultiHeadDotProductAttention_1/'
    for part, w, b in zip(
      ('query', 'key', 'value'), np.split(weight, 3), np.split(bias, 3),
      strict=True,
    ):  # fmt: skip
      hf = f'vit.encoder.layer.{i}.attention.attention.{part}'
      stored['transformers'] |= {f'{hf}.weight': w, f'{hf}.bias': b}
      stored['google'] |= {
        f'{attention}{part}/kernel': w.T.reshape(12, 3, 4),
        f'{attention}{part}/bias': b.reshape(3, 4),
      }
    out = timm[f'blocks.{i}.attn.proj.weight']
    stored['google'] |= {
      f'{attention}out/kernel': out.T.reshape(3, 4, 12),
      f'{attention}out/bias': timm[f'blocks.{i}.attn.proj.bias'],
    }
  for name, theirs in google.items():
    if name in timm:
      stored['google'][theirs] = timm[name]
      continue
    weight = timm[f'{name}.weight']
    kernel = weight.transpose(
      *range(2, weight.ndim), *range(min(2, weight.ndim))[::-1]
    )
    leaf = 'scale' if weight.ndim == 1 else 'kernel'
    stored['google'] |= {
      f'{theirs}/{leaf}': kernel, f'{theirs}/bias': timm[f'{name}.bias'],
    }  # fmt: skip
  return stored


def test_a_vit_is_the_same_from_every_layout():
  model = abstract(**SMALL_VIT)
  stored = vit_in_every_layout()
  assert {n: a.shape for n, a in stored['google'].items()} == (
    published.vit_google(2, 12, 3, 2, 17, classes=5)
  )
  wanted, report = convert.converted(model, stored['timm'])
  assert not report.missing
  for layout in layouts.FAMILIES[models.MODELS['vit']]:
    found, report = convert.converted(model, stored[layout])
    assert (report.layout, report.missing, report.unused) == (layout, (), ())
    for path, array in wanted.items():
      np.testing.assert_array_equal(found[path], array, err_msg=path)


class _Block(linen.Module):
  @linen.compact
  def __call__(self, x):
    y = linen.LayerNorm()(x)
    y = linen.MultiHeadDotProductAttention(
      num_heads=3, name='MultiHeadDotProductAttention_1'
    )(y, y)
    x = x + y
    y = linen.LayerNorm(name='LayerNorm_2')(x)
    return x + _MLP(name='MlpBlock_3')(y)


class _MLP(linen.Module):
  @linen.compact
  def __call__(self, x):
    width = x.shape[-1]
    x = linen.gelu(linen.Dense(4 * width)(x), approximate=False)
    return linen.Dense(width)(x)


class _Encoder(linen.Module):
  @linen.compact
  def __call__(self, x):
    x = _Positions(name='posembed_input')(x)
    for i in range(2):
      x = _Block(name=f'encoderblock_{i}')(x)
    return linen.LayerNorm(name='encoder_norm')(x)


class _Positions(linen.Module):
  @linen.compact
  def __call__(self, x):
    init = linen.initializers.normal(0.02)
    return x + self.param('pos_embedding', init, (1, *x.shape[1:]))


class _GoogleViT(linen.Module):
  """The names and the arithmetic of google-research/vision_transformer."""

  @linen.compact
  def __call__(self, image):
    x = linen.Conv(12, (2, 2), (2, 2), padding='VALID', name='embedding')(image)
    x = x.reshape(x.shape[0], -1, 12)
    cls = self.param('cls', linen.initializers.normal(0.02), (1, 1, 12))
    x = jnp.concatenate([jnp.tile(cls, (x.shape[0], 1, 1)), x], axis=1)
    x = _Encoder(name='Transformer')(x)
    return linen.Dense(5, name='head')(x[:, 0])


def test_googles_npz_gives_flax_linens_outputs(tmp_path):
  theirs = vit_in_every_layout()['google']
  theirs = {name: 0.3 * array for name, array in theirs.items()}
  np.savez(tmp_path / 'ViT.npz', **theirs)
  model = filled(**SMALL_VIT)
  report = convert.from_npz(model, tmp_path / 'ViT.npz')
  assert not report.missing
  image = np.random.default_rng(0).normal(size=(2, 8, 8, 3))
  tree = {}
  for name, array in theirs.items():
    *parts, leaf = name.split('/')
    node = tree
    for part in parts:
      node = node.setdefault(part, {})
    node[leaf] = array
  expected = jax.jit(_GoogleViT().apply)({'params': tree}, image)
  np.testing.assert_allclose(
    compiled(model)(image), expected, rtol=1e-4, atol=1e-5
  )


@pytest.mark.parametrize(
  ('shape', 'pool', 'said'),
  [
    ((12, 12, 3), 'cls', 'positions are resized from 4x4 to 6x6'),
    ((4, 16, 3), 'cls', 'positions are resized from 4x4 to 2x8'),
    ((8, 8, 3), 'mean', ''),
    ((4, 4, 3), 'mean', 'positions are resized from 4x4 to 2x2'),
  ],
)
def test_positions_are_resized_to_the_models_grid(shape, pool, said):
  """Also where there are as many, in another grid."""
  arrays = published.arrays(published.vit(**SMALL_VIT_SIZES, layout='timm'))
  table = arrays['pos_embed'][0]
  model = abstract(**SMALL_VIT | {'image_shape': shape, 'pool': pool})
  values, report = convert.converted(model, arrays)
  assert report.notes == ((said,) if said else ())
  grid = (shape[0] // 2, shape[1] // 2)
  expected = position.resize_positions(table[1:], (4, 4), grid)
  found = values[('positions',)]
  if pool == 'cls':
    np.testing.assert_array_equal(found[0], table[0])
    found = found[1:]
  else:
    assert report.unused == ('cls_token',)
  np.testing.assert_allclose(found, expected, rtol=1e-6)


# --------------------------------------------------------------------- the RNNs


def recurrent(gates, layers=1, directions=1, features=5, width=4):
  """torch.nn's names and shapes."""
  shapes = {}
  for layer in range(layers):
    for end in ('', '_reverse')[:directions]:
      size = features if layer == 0 else directions * width
      shapes |= {
        f'weight_ih_l{layer}{end}': (gates * width, size),
        f'weight_hh_l{layer}{end}': (gates * width, width),
        f'bias_ih_l{layer}{end}': (gates * width,),
        f'bias_hh_l{layer}{end}': (gates * width,),
      }
  arrays = published.arrays(shapes)
  return {name: array - 1 for name, array in arrays.items()}


def _sigmoid(x):
  return 1 / (1 + np.exp(-x))


def _lstm(arrays, xs):
  """torch.nn.LSTM's documented equations in float64: the last h."""
  h = c = np.zeros(4)
  for x in xs:
    gates = arrays['weight_ih_l0'] @ x + arrays['bias_ih_l0']
    gates = gates + arrays['weight_hh_l0'] @ h + arrays['bias_hh_l0']
    i, f, g, o = np.split(gates, 4)
    c = _sigmoid(f) * c + _sigmoid(i) * np.tanh(g)
    h = _sigmoid(o) * np.tanh(c)
  return h


def _gru(arrays, xs):
  """torch.nn.GRU's, whose new gate has the state's bias within the reset."""
  h = np.zeros(4)
  for x in xs:
    x_r, x_z, x_n = np.split(
      arrays['weight_ih_l0'] @ x + arrays['bias_ih_l0'], 3
    )
    h_r, h_z, h_n = np.split(
      arrays['weight_hh_l0'] @ h + arrays['bias_hh_l0'], 3
    )
    r, z = _sigmoid(x_r + h_r), _sigmoid(x_z + h_z)
    n = np.tanh(x_n + r * h_n)
    h = (1 - z) * n + z * h
  return h


@pytest.mark.parametrize(
  ('name', 'gates', 'kwargs', 'formula'),
  [('lstm', 4, {}, _lstm), ('gru', 3, {'reset_after': True}, _gru)],
)
def test_a_recurrent_net_has_the_sum_of_two_biases(
  name, gates, kwargs, formula
):
  arrays = recurrent(gates)
  model = filled(name, num_features=5, widths=(4,), **kwargs)
  report = convert.from_torch(model, arrays, layout='torch')
  assert report.missing == ('head/bias', 'head/kernel')
  assert not report.unused
  model.head.kernel[...] = jnp.asarray(np.eye(4, 10, dtype=np.float32))
  xs = np.random.default_rng(1).normal(size=(6, 5))
  found = compiled(model)(xs[None].astype(np.float32))[0, :4] - 0.25
  double = {name: array.astype(np.float64) for name, array in arrays.items()}
  np.testing.assert_allclose(found, formula(double, xs), rtol=1e-5, atol=1e-6)


def test_every_layer_and_direction_is_taken_whatever_holds_them():
  arrays = recurrent(4, layers=2, directions=2)
  arrays = {f'net.lstm.{name}': array for name, array in arrays.items()}
  model = abstract(
    'lstm', num_features=5, widths=(4, 4), bidirectional=True, num_classes=3
  )
  values, report = convert.converted(model, arrays)
  assert (report.layout, report.unused) == ('torch', ())
  np.testing.assert_array_equal(
    values['blocks', 1, 'backward', 'kernel'],
    arrays['net.lstm.weight_ih_l1_reverse'].T,
  )


@pytest.mark.parametrize(
  ('name', 'gates', 'kwargs', 'formula'),
  [('lstm', 4, {}, _lstm), ('gru', 3, {'reset_after': True}, _gru)],
)
def test_layers_made_without_biases_have_zeros(name, gates, kwargs, formula):
  arrays = recurrent(gates)
  zero = {n: 0 * array for n, array in arrays.items() if 'bias' in n}
  bare = {n: array for n, array in arrays.items() if n not in zero}
  model = filled(name, num_features=5, widths=(4,), **kwargs)
  report = convert.from_torch(model, bare, layout='torch')
  assert report.missing == ('head/bias', 'head/kernel')
  assert report.mapped['blocks/0/forward/bias'] == ()
  assert report.notes == ('there are no biases there: here they are 0',)
  model.head.kernel[...] = jnp.asarray(np.eye(4, 10, dtype=np.float32))
  xs = np.random.default_rng(1).normal(size=(6, 5))
  found = compiled(model)(xs[None].astype(np.float32))[0, :4] - 0.25
  double = {n: a.astype(np.float64) for n, a in (bare | zero).items()}
  np.testing.assert_allclose(found, formula(double, xs), rtol=1e-5, atol=1e-6)
  # Of two biases, one alone is a damaged file.
  del arrays['bias_hh_l0']
  with pytest.raises(ValueError, match='lack'):
    convert.from_torch(model, arrays, layout='torch')


def test_the_papers_gru_has_no_weights_elsewhere():
  model = abstract('gru', num_features=5, widths=(4,))
  with pytest.raises(ValueError, match='give the model reset_after=True'):
    convert.from_torch(model, recurrent(3), layout='torch')


# ---------------------------------------------------------- what is left as new


def test_a_head_of_other_classes_stays_new_and_the_report_says_it():
  model = filled(**SMALL_RESNET, num_classes=7)
  before = flat(model)
  arrays = small_resnet() | {'fc.scale': np.zeros(3, np.float32)}
  report = convert.from_torch(model, arrays, layout='timm')
  after = flat(model)
  for path, array in before.items():
    assert np.array_equal(array, after[path]) == path.startswith('head/'), path
  assert report.missing == ('head/bias', 'head/kernel')
  assert report.unused == ('fc.bias', 'fc.scale', 'fc.weight')
  assert len(report.mapped) == 30
  assert str(report).splitlines() == [
    '30 arrays taken, named as in timm; new: head/bias, head/kernel',
    'unused: fc.bias, fc.scale, fc.weight',
    'the head has 1000 outputs there, 7 here: it is new',
    'the published weights of others keep their own licence',
  ]


def test_a_head_without_its_bias_is_all_new():
  arrays = small_resnet()
  del arrays['fc.bias']
  _, report = convert.converted(abstract(**SMALL_RESNET), arrays)
  assert report.missing == ('head/bias', 'head/kernel')
  assert report.unused == ('fc.weight',)


def test_a_head_of_one_output_is_taken():
  arrays = published.arrays(published.resnet((1, 1), 8, (3, 3), classes=1))
  values, report = convert.converted(
    abstract(**SMALL_RESNET, num_classes=1), arrays
  )
  assert not report.missing
  np.testing.assert_array_equal(values['head', 'bias'], arrays['fc.bias'])
  # Into another number of classes too, whose head stays new.
  _, report = convert.converted(abstract(**SMALL_RESNET), arrays)
  assert report.missing == ('head/bias', 'head/kernel')
  assert report.notes == ('the head has 1 outputs there, 1000 here: it is new',)


@pytest.mark.parametrize(
  ('layout', 'names'),
  [
    ('timm', ('mask_token', 'decoder_blocks.0.norm1.weight', 'head.fc1.bias')),
    ('transformers', ('vit.pooler.dense.bias', 'vit.embeddings.mask_token')),
    ('torchvision', ('heads.other.weight',)),
  ],
)
def test_what_changes_no_output_is_left_over_in_peace(layout, names):
  shapes = published.vit(**SMALL_VIT_SIZES, layout=layout)
  shapes |= dict.fromkeys(names, (12,))
  _, report = convert.converted(abstract(**SMALL_VIT), zeros(shapes))
  assert report.missing == ()
  assert report.unused == tuple(sorted(names))


def test_a_head_that_reads_another_layer_is_new():
  shapes = published.vit_google(2, 12, 3, 2, 17, classes=5)
  shapes |= {'pre_logits/kernel': (12, 12), 'pre_logits/bias': (12,)}
  _, report = convert.converted(abstract(**SMALL_VIT), zeros(shapes))
  assert report.missing == ('head/bias', 'head/kernel')
  assert report.notes == (
    'the head reads pre_logits there, not here: it is new',
  )
  model = abstract(**SMALL_VIT, pre_logits=True)
  assert not convert.converted(model, zeros(shapes))[1].missing


def test_values_take_the_models_dtype():
  arrays = {n: a.astype(np.float64) for n, a in small_resnet().items()}
  model = abstract(**SMALL_RESNET, param_dtype=jnp.bfloat16)
  values, _ = convert.converted(model, arrays)
  assert {str(array.dtype) for array in values.values()} == {
    'bfloat16',
    'float32',
  }
  model = abstract(**SMALL_RESNET)
  values, _ = convert.converted(model, arrays)
  assert {str(array.dtype) for array in values.values()} == {'float32'}


# -------------------------------------------------------------------- refusals


def refused(model, arrays, layout='torchvision') -> str:
  """The one line that refuses them; the model is as it was."""
  before = flat(model)
  with pytest.raises(ValueError) as caught:  # noqa: PT011
    convert.from_torch(model, arrays, layout=layout)
  after = flat(model)
  for path, array in before.items():
    np.testing.assert_array_equal(array, after[path])
  line = str(caught.value)
  assert '\n' not in line
  return line


@pytest.fixture(scope='module')
def model():
  return filled(**SMALL_RESNET)


@pytest.mark.parametrize(
  ('name', 'shape', 'named'),
  [
    ('layer2.0.conv2.weight', (16, 8, 3, 3),
     ('(16, 8, 3, 3)', 'blocks/1/0/convs/1/kernel', '(3, 3, 16, 16)')),
    ('layer2.0.conv2.weight', (16, 16),
     ('(16, 16)', 'blocks/1/0/convs/1/kernel', '(3, 3, 16, 16)')),
    ('layer2.0.conv2.weight', (), ('()', '(3, 3, 16, 16)')),
    ('bn1.running_var', (9,), ('(9,)', 'embed/norm/norm/var', '(8,)')),
    ('fc.weight', (1000, 17), ('(1000, 17)', 'head/kernel', '(16, 1000)')),
  ],
)  # fmt: skip
def test_one_array_of_another_shape_refuses_all(model, name, shape, named):
  arrays = small_resnet() | {name: np.zeros(shape, np.float32)}
  line = refused(model, arrays)
  for word in (name, *named):
    assert word in line


@pytest.mark.parametrize(
  ('arrays', 'layout', 'named'),
  [
    (published.vit(2, 12, layout='timm'), 'timm', ('architecture', 'ResNet')),
    (published.resnet((1, 1), 8, (3, 3)), 'transformers', ('0 of the 30',)),
    (published.resnet((2, 3), 8, (3, 3)), 'timm', ('layer1.1.bn1.bias',)),
    ({}, 'timm', ('0 of the 30',)),
    (published.resnet((1, 1), 8, (3, 3)), 'torch',
     ("'torch'", 'ResNet', 'torchvision, timm, transformers')),
    (published.resnet((1, 1), 8, (3, 3)), 'pytorch', ("'pytorch'",)),
    ({'a\nb': (1,)}, 'timm', ("'a\\nb'",)),
  ],
)  # fmt: skip
def test_weights_of_another_architecture_are_named(
  model, arrays, layout, named
):
  line = refused(model, zeros(arrays), layout)
  for word in named:
    assert word in line


@pytest.mark.parametrize(
  ('model', 'arrays', 'named'),
  [
    ({'name': 'resnet', 'variant': '50'}, published.resnet((3, 4, 23, 3)),
     'layer3.10.bn1.bias'),
    ({'name': 'resnet', 'variant': '18'}, published.resnet(),
     'layer1.0.bn3.bias'),
    (SMALL_VIT, published.vit(**SMALL_VIT_SIZES | {'depth': 3}),
     'encoder.layers.encoder_layer_2'),
    ({'name': 'lstm', 'num_features': 5, 'widths': (4,)},
     {n: a.shape for n, a in recurrent(4, directions=2).items()},
     'bias_hh_l0_reverse'),
  ],
  ids=['resnet101', 'bottlenecks', 'vit', 'bidirectional'],
)  # fmt: skip
def test_a_larger_network_is_not_cut_to_fit(model, arrays, named):
  with pytest.raises(ValueError, match='another architecture') as caught:
    convert.converted(abstract(**model), zeros(arrays))
  assert named in str(caught.value)


VIT_TIMM = published.vit(**SMALL_VIT_SIZES, layout='timm')
RESNET_50 = published.resnet()


@pytest.mark.parametrize(
  ('model', 'arrays', 'extra'),
  [
    (SMALL_VIT, VIT_TIMM, {'blocks.0.ls1.gamma': (12,)}),
    (SMALL_VIT, VIT_TIMM, {'blocks.1.attn.q_norm.weight': (4,)}),
    (SMALL_VIT, VIT_TIMM, {'reg_token': (1, 4, 12)}),
    (SMALL_VIT, VIT_TIMM, {'norm_pre.weight': (12,)}),
    (SMALL_VIT, VIT_TIMM, {'blocks.0.pooler.weight': (12,)}),
    (SMALL_VIT, published.vit(**SMALL_VIT_SIZES, layout='transformers'),
     {'encoder.layer.0.layer_scale1.lambda1': (12,)}),
    (SMALL_VIT, published.vit_google(2, 12, 3, 2, 17, classes=5),
     {'block1/unit1/conv1/kernel': (1, 1, 3, 12)}),
    ({'name': 'resnet', 'variant': '50'}, RESNET_50,
     {'layer1.0.se.fc1.weight': (16, 256, 1, 1)}),
    ({'name': 'lstm', 'num_features': 5, 'widths': (4,)},
     {n: a.shape for n, a in recurrent(4).items()},
     {'net.weight_hr_l0': (2, 4)}),
  ],
  ids=lambda value: next(iter(value)) if len(value) == 1 else '',
)  # fmt: skip
def test_more_in_the_blocks_is_another_architecture(model, arrays, extra):
  model = abstract(**model)
  assert convert.converted(model, zeros(arrays))[1].mapped
  with pytest.raises(ValueError, match='another architecture') as caught:
    convert.converted(model, zeros(arrays | extra))
  assert next(iter(extra)) in str(caught.value)


def test_learned_positions_need_a_model_that_has_some():
  model = abstract(**SMALL_VIT, position='sincos2d')
  arrays = dict(VIT_TIMM)
  with pytest.raises(ValueError, match='architecture.*left over.*: pos_embed'):
    convert.converted(model, zeros(arrays))
  del arrays['pos_embed']
  assert not convert.converted(model, zeros(arrays))[1].missing


@pytest.mark.parametrize(
  ('model', 'arrays', 'layout', 'named'),
  [
    ({'name': 'resnet', 'variant': '101'}, RESNET_50, 'timm',
     ('lack 255', 'ResNet', 'blocks/2/10/convs/0/kernel')),
    ({'name': 'resnet', 'variant': '34'},
     published.resnet((2, 2, 2, 2), 64, (3, 3)), 'timm',
     ('lack', 'blocks/0/2/convs/0/kernel')),
    ({'name': 'lstm', 'num_features': 5, 'widths': (4, 4)},
     {n: a.shape for n, a in recurrent(4).items()}, 'torch',
     ('lack 3', 'LSTM', 'blocks/1/forward/kernel')),
    (SMALL_VIT | {'depth': 3}, VIT_TIMM, 'timm',
     ('lack 12', 'ViT', 'blocks/2/attention/project/bias')),
    (SMALL_VIT | {'pre_logits': True}, VIT_TIMM, 'timm',
     ('lack 2', 'pre_logits/bias', 'pre_logits/kernel')),
    # A ResNet of group norms.
    (SMALL_RESNET,
     {n: s for n, s in published.resnet((1, 1), 8, (3, 3)).items()
      if 'running' not in n}, 'timm', ('lack 12', 'norm/mean', 'norm/var')),
  ],
  ids=['resnet101', 'resnet34', 'lstm', 'vit', 'pre_logits', 'statistics'],
)  # fmt: skip
def test_a_smaller_network_is_refused(model, arrays, layout, named):
  with pytest.raises(ValueError, match='these weights lack') as caught:
    convert.from_torch(abstract(**model), zeros(arrays), layout=layout)
  for word in named:
    assert word in str(caught.value)


def test_what_the_caller_skips_need_not_be_there_and_stays():
  arrays = published.arrays(VIT_TIMM)
  model = filled(**SMALL_VIT, pre_logits=True)
  before = flat(model)
  skip = [('pre_logits', 'kernel'), ('pre_logits', 'bias')]
  report = convert.from_torch(model, arrays, layout='timm', skip=skip)
  assert report.missing == ('pre_logits/bias', 'pre_logits/kernel')
  after = flat(model)
  for path in before:
    assert np.array_equal(before[path], after[path]) == (path in report.missing)


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize('dtype', ['float64', 'float32', 'bfloat16'])
def test_what_is_not_finite_is_refused(model, value, dtype):
  arrays = small_resnet()
  array = arrays['bn1.running_var'].astype(jnp.dtype(dtype))
  array[3] = value
  arrays['bn1.running_var'] = array
  assert refused(model, arrays) == 'bn1.running_var holds nan or infinity'


def test_what_does_not_fit_says_what_it_becomes():
  arrays = recurrent(4, width=16)
  model = abstract('lstm', num_features=5, widths=(128,))
  with pytest.raises(ValueError, match='becomes') as caught:
    convert.converted(model, {n: arrays[n] for n in sorted(arrays)})
  assert str(caught.value) == (
    'bias_ih_l0 (64,), bias_hh_l0 (64,) becomes (64,), which does not fit '
    'blocks/0/forward/bias (512,)'
  )


def test_what_is_no_floating_point_number_is_refused(model):
  arrays = small_resnet()
  arrays['conv1.weight'] = arrays['conv1.weight'].astype(np.int8)
  assert 'conv1.weight holds int8' in refused(model, arrays)


def test_a_model_that_nobody_publishes_says_which_are():
  line = refused(filled('mlp'), small_resnet())
  assert 'MLP' in line
  assert 'ResNet, DenseNet, ConvNeXt, ViT, RNN, GRU, LSTM' in line


def test_names_of_no_layout_are_listed():
  with pytest.raises(ValueError, match='a, b, c, ... .1 more. are of no known'):
    convert.detect_layout(['a', 'b', 'c', 'd'])


def test_big_visions_npz_is_told_from_the_original():
  shapes = published.vit_google(2, 12, 3, 2, 17, classes=5)
  arrays = zeros({f'params/{name}': shape for name, shape in shapes.items()})
  said = "only Google's original ViT is read"
  with pytest.raises(ValueError, match=said):
    convert.converted(abstract(**SMALL_VIT), arrays)
  with pytest.raises(ValueError, match=said):
    convert.from_npz(abstract(**SMALL_VIT), arrays)


# ----------------------------------------------------------------------- files


def safetensors_bytes(arrays) -> bytes:
  """The format by its specification: a header in JSON, then the numbers."""
  header, data = {}, b''
  for name, array in arrays.items():
    dtype = {'float32': 'F32', 'float16': 'F16', 'bfloat16': 'BF16'}
    header[name] = {
      'dtype': dtype[str(array.dtype)],
      'shape': list(array.shape),
      'data_offsets': [len(data), len(data) + array.nbytes],
    }
    data += array.tobytes()
  header = json.dumps(header).encode()
  return len(header).to_bytes(8, 'little') + header + data


@pytest.mark.parametrize('dtype', ['float32', 'float16', 'bfloat16'])
def test_a_safetensors_file_is_read_in_every_precision(tmp_path, dtype):
  arrays = small_resnet()
  narrow = {n: a.astype(jnp.dtype(dtype)) for n, a in arrays.items()}
  file = tmp_path / 'model.SAFETENSORS'
  file.write_bytes(safetensors_bytes(narrow))
  model = filled(**SMALL_RESNET)
  convert.from_torch(model, file, layout='timm')
  found = flat(model)['blocks/0/0/convs/0/kernel']
  assert found.dtype == np.float32
  expected = narrow['layer1.0.conv1.weight'].astype(np.float32)
  np.testing.assert_array_equal(found, expected.transpose(2, 3, 1, 0))


def test_an_npz_is_read_as_arrays(tmp_path):
  np.savez(tmp_path / 'a.npz', **{'x/kernel': np.arange(3.0)})
  np.testing.assert_array_equal(
    convert.read(tmp_path / 'a.npz')['x/kernel'], [0, 1, 2]
  )


@pytest.mark.parametrize('suffix', [*files.PICKLES, '.PT'])
def test_a_pickle_is_refused_unopened(tmp_path, suffix):
  file = tmp_path / f'weights{suffix}'
  with pytest.raises(ValueError, match='is a pickle') as caught:
    convert.read(file)
  assert str(file) in str(caught.value)
  assert '\n' not in str(caught.value)


class _Bomb:
  """Makes a file when it is unpickled."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return (pathlib.Path.touch, (self.path,))


def _object_npz(file):
  np.savez(file, a=np.array([_Bomb(file.with_name('executed'))], object))


def _object_npy(file):
  with file.open('wb') as stream:
    np.save(stream, np.array([_Bomb(file.with_name('executed'))], object))


def _torch_archive(file):
  with zipfile.ZipFile(file, 'w') as archive:
    archive.writestr('fake/data.pkl', b'cos\nsystem\n(S"false"\ntR.')
    archive.writestr('fake/data/0', bytes(8))


def _truncated(file):
  data = safetensors.numpy.save({'a': np.zeros(9, np.float32)})
  file.write_bytes(data[:-1])


@pytest.mark.parametrize(
  ('name', 'write'),
  [
    ('a.npz', _object_npz),
    ('a.npz', _object_npy),
    ('a.npz', _torch_archive),
    ('a.safetensors', _torch_archive),
    ('a.npz', lambda file: file.write_bytes(b'')),
    ('a.npz', lambda file: file.write_bytes(b'PK\x03\x04 no zip')),
    ('a.safetensors', _truncated),
    ('a.safetensors', _object_npy),
    ('a.safetensors', lambda file: file.write_bytes(b'')),
    ('a.safetensors', lambda file: file.write_text('<html>not found</html>')),
    ('a.safetensors', lambda file: file.mkdir()),
    ('a.safetensors', lambda file: None),
    ('a.npy', _object_npy),
    ('a.h5', lambda file: file.write_bytes(b'')),
    ('a', lambda file: file.write_bytes(b'')),
  ],
)
def test_what_is_no_file_of_weights_is_one_line_and_never_run(
  tmp_path, name, write
):
  file = tmp_path / name
  write(file)
  with pytest.raises(ValueError) as caught:  # noqa: PT011
    convert.read(file)
  assert '\n' not in str(caught.value)
  assert str(file) in str(caught.value)
  assert not (tmp_path / 'executed').exists()


@pytest.mark.parametrize('suffix', files.FILES)
def test_an_archive_of_pytorch_is_called_a_pickle(tmp_path, suffix):
  file = tmp_path / f'weights{suffix}'
  _torch_archive(file)
  with pytest.raises(ValueError, match='is a pickle archive of PyTorch'):
    convert.read(file)
