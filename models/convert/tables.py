"""Where each layout keeps what a model has: ours -> theirs, as rules.py reads.

timm's and transformers' were checked against their 1.0 and 5.1 to 5.23;
torchvision's are read from its source.
"""

# timm has torchvision's names. Wide ResNet and ResNeXt have them too.
RESNET_TORCHVISION = {
  'embed/conv': 'conv1',
  'embed/norm/norm': 'bn1',
  'blocks/{i}/{j}/convs/{k}': 'layer{I}.{j}.conv{K}',
  'blocks/{i}/{j}/norms/{k}/norm': 'layer{I}.{j}.bn{K}',
  'blocks/{i}/{j}/shortcut': 'layer{I}.{j}.downsample.0',
  'blocks/{i}/{j}/shortcut_norm/norm': 'layer{I}.{j}.downsample.1',
  'head': 'fc',
}
_LAYER = 'encoder.stages.{i}.layers.{j}'
RESNET_TRANSFORMERS = {
  'embed/conv': 'embedder.embedder.convolution',
  'embed/norm/norm': 'embedder.embedder.normalization',
  'blocks/{i}/{j}/convs/{k}': f'{_LAYER}.layer.{{k}}.convolution',
  'blocks/{i}/{j}/norms/{k}/norm': f'{_LAYER}.layer.{{k}}.normalization',
  'blocks/{i}/{j}/shortcut': f'{_LAYER}.shortcut.convolution',
  'blocks/{i}/{j}/shortcut_norm/norm': f'{_LAYER}.shortcut.normalization',
  'head': 'classifier.1',
}

# timm has these names too.
_DENSE_LAYER = 'features.denseblock{I}.denselayer{J}'
DENSENET_TORCHVISION = {
  'embed/conv': 'features.conv0',
  'embed/norm/norm': 'features.norm0',
  'blocks/{i}/{j}/norms/{k}/norm': f'{_DENSE_LAYER}.norm{{K}}',
  'blocks/{i}/{j}/convs/{k}': f'{_DENSE_LAYER}.conv{{K}}',
  'transitions/{i}/norm/norm': 'features.transition{I}.norm',
  'transitions/{i}/conv': 'features.transition{I}.conv',
  'norm/norm': 'features.norm5',
  'head': 'classifier',
}

# Stages and what lies between them are numbered together, from 1.
CONVNEXT_TORCHVISION = {
  'embed/conv': 'features.0.0',
  'embed/norm': 'features.0.1',
  'blocks/{i}/{j}/conv': 'features.{odd}.{j}.block.0',
  'blocks/{i}/{j}/norm': 'features.{odd}.{j}.block.2',
  'blocks/{i}/{j}/expand': 'features.{odd}.{j}.block.3',
  'blocks/{i}/{j}/project': 'features.{odd}.{j}.block.5',
  'blocks/{i}/{j}/layer_scale': 'features.{odd}.{j}.layer_scale',
  'downsamples/{i}/norm': 'features.{even}.0',
  'downsamples/{i}/conv': 'features.{even}.1',
  'norm': 'classifier.0',
  'head': 'classifier.2',
}
CONVNEXT_TIMM = {
  'embed/conv': 'stem.0',
  'embed/norm': 'stem.1',
  'blocks/{i}/{j}/conv': 'stages.{i}.blocks.{j}.conv_dw',
  'blocks/{i}/{j}/norm': 'stages.{i}.blocks.{j}.norm',
  'blocks/{i}/{j}/expand': 'stages.{i}.blocks.{j}.mlp.fc1',
  'blocks/{i}/{j}/project': 'stages.{i}.blocks.{j}.mlp.fc2',
  'blocks/{i}/{j}/layer_scale': 'stages.{i}.blocks.{j}.gamma',
  'downsamples/{i}/norm': 'stages.{I}.downsample.0',
  'downsamples/{i}/conv': 'stages.{I}.downsample.1',
  'norm': 'head.norm',
  'head': 'head.fc',
}
CONVNEXT_TRANSFORMERS = {
  'embed/conv': 'embeddings.patch_embeddings',
  'embed/norm': 'embeddings.layernorm',
  'blocks/{i}/{j}/conv': f'{_LAYER}.dwconv',
  'blocks/{i}/{j}/norm': f'{_LAYER}.layernorm',
  'blocks/{i}/{j}/expand': f'{_LAYER}.pwconv1',
  'blocks/{i}/{j}/project': f'{_LAYER}.pwconv2',
  'blocks/{i}/{j}/layer_scale': f'{_LAYER}.layer_scale_parameter',
  'downsamples/{i}/norm': 'encoder.stages.{I}.downsampling_layer.0',
  'downsamples/{i}/conv': 'encoder.stages.{I}.downsampling_layer.1',
  'norm': 'layernorm',
  'head': 'classifier',
}

# ViT without its positions, and where three arrays make qkv, without that.
VIT_TORCHVISION = {
  'class_token': 'class_token',
  'embed': 'conv_proj',
  'blocks/{i}/norm1': 'encoder.layers.encoder_layer_{i}.ln_1',
  'blocks/{i}/attention/qkv/kernel': (
    'encoder.layers.encoder_layer_{i}.self_attention.in_proj_weight'
  ),
  'blocks/{i}/attention/qkv/bias': (
    'encoder.layers.encoder_layer_{i}.self_attention.in_proj_bias'
  ),
  'blocks/{i}/attention/project': (
    'encoder.layers.encoder_layer_{i}.self_attention.out_proj'
  ),
  'blocks/{i}/norm2': 'encoder.layers.encoder_layer_{i}.ln_2',
  'blocks/{i}/mlp/expand': 'encoder.layers.encoder_layer_{i}.mlp.0',
  'blocks/{i}/mlp/project': 'encoder.layers.encoder_layer_{i}.mlp.3',
  'norm': 'encoder.ln',
  'pre_logits': 'heads.pre_logits',
  'head': 'heads.head',
}
VIT_TIMM = {
  'class_token': 'cls_token',
  'embed': 'patch_embed.proj',
  'blocks/{i}/norm1': 'blocks.{i}.norm1',
  'blocks/{i}/attention/qkv': 'blocks.{i}.attn.qkv',
  'blocks/{i}/attention/project': 'blocks.{i}.attn.proj',
  'blocks/{i}/norm2': 'blocks.{i}.norm2',
  'blocks/{i}/mlp/expand': 'blocks.{i}.mlp.fc1',
  'blocks/{i}/mlp/project': 'blocks.{i}.mlp.fc2',
  'norm': 'norm',
  'head': 'head',
}
VIT_TRANSFORMERS = {
  'class_token': 'embeddings.cls_token',
  'embed': 'embeddings.patch_embeddings.projection',
  'blocks/{i}/norm1': 'encoder.layer.{i}.layernorm_before',
  'blocks/{i}/attention/project': 'encoder.layer.{i}.attention.output.dense',
  'blocks/{i}/norm2': 'encoder.layer.{i}.layernorm_after',
  'blocks/{i}/mlp/expand': 'encoder.layer.{i}.intermediate.dense',
  'blocks/{i}/mlp/project': 'encoder.layer.{i}.output.dense',
  'norm': 'layernorm',
  'pre_logits': 'pooler.dense',
  'head': 'classifier',
}
VIT_GOOGLE = {
  'class_token': 'cls',
  'embed': 'embedding',
  'blocks/{i}/norm1': 'Transformer/encoderblock_{i}/LayerNorm_0',
  'blocks/{i}/attention/project': (
    'Transformer/encoderblock_{i}/MultiHeadDotProductAttention_1/out'
  ),
  'blocks/{i}/norm2': 'Transformer/encoderblock_{i}/LayerNorm_2',
  'blocks/{i}/mlp/expand': 'Transformer/encoderblock_{i}/MlpBlock_3/Dense_0',
  'blocks/{i}/mlp/project': 'Transformer/encoderblock_{i}/MlpBlock_3/Dense_1',
  'norm': 'Transformer/encoder_norm',
  'pre_logits': 'pre_logits',
  'head': 'head',
}
