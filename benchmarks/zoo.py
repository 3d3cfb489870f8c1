"""Builds models of other libraries, for other_models.py.

Each model has twelve layers and random weights, is built as its library
recommends, and is split into a function and a tree of params in the idiom of
the library. At the end there are models written by hand as difficult cases.
Packages are imported only when a model is built.
"""

import functools
import importlib
import importlib.util
import os
import sys
import types

from flax import linen as nn
from flax import nnx
import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

WIDTH, FF, HEADS, LAYERS, VOCAB = 256, 1024, 4, 12, 1024
LARGE_VOCAB = 8192  # For cases about the embedding.
ROWS, TOKENS = 2, 8
# {name: (build, pip package)}, where build(dtype) returns (apply, params).
MODELS = {}
CAUSAL = jnp.tril(jnp.ones((1, 1, TOKENS, TOKENS), bool))
POSITIONS = jnp.broadcast_to(jnp.arange(TOKENS), (ROWS, TOKENS))


def add(name: str, build, pip: str = '', **options) -> None:
  """Adds a model to `MODELS`."""
  MODELS[name] = (functools.partial(build, **options), pip)


def images(ids, size: int, dtype):
  """Returns random images [rows, size, size, 3] that depend on the ids."""
  return jax.random.normal(
      jax.random.key(ids.sum()), (ids.shape[0], size, size, 3), dtype)


def cast(tree, dtype):
  """Casts the floats of a tree, for models without an option for the dtype."""
  return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(
      x.dtype, jnp.floating) else x, tree)


# --- flax -------------------------------------------------------------------


class LinenBlock(nn.Module):
  """Applies attention and feed-forward, for `nn.scan` and for loops."""

  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x, _):
    kw = dict(dtype=self.dtype, param_dtype=self.dtype)
    h = nn.LayerNorm(**kw)(x)
    x = x + nn.MultiHeadDotProductAttention(HEADS, **kw)(h, mask=CAUSAL)
    h = nn.Dense(FF, **kw)(nn.LayerNorm(**kw)(x))
    return x + nn.Dense(WIDTH, **kw)(nn.gelu(h)), None


class Linen(nn.Module):
  """Applies layers in one of the forms 'scan', 'lstm', 'remat', ..."""

  dtype: jnp.dtype
  form: str

  @nn.compact
  def __call__(self, ids):
    kw = dict(dtype=self.dtype, param_dtype=self.dtype)
    tied = self.form == 'tied'
    embed = nn.Embed(LARGE_VOCAB if tied else VOCAB, WIDTH, **kw)
    x = embed(ids)
    if self.form == 'scan':
      scanned = nn.scan(
          LinenBlock, variable_axes={'params': 0}, split_rngs={'params': True},
          length=LAYERS)
      x, _ = scanned(self.dtype, name='layers')(x, None)
    elif self.form == 'lstm':
      for i in range(LAYERS):
        x = nn.RNN(nn.LSTMCell(
            WIDTH, recurrent_kernel_init=nn.linear.default_kernel_init, **kw),
                   name=f'layers_{i}')(x)
    else:
      block = nn.remat(LinenBlock) if self.form == 'remat' else LinenBlock
      for i in range(LAYERS):
        x, _ = block(self.dtype, name=f'layers_{i}')(x, None)
    x = nn.LayerNorm(**kw)(x)
    return embed.attend(x) if tied else nn.Dense(VOCAB, **kw)(x)


class ConvNet(nn.Module):
  """Applies convolutions with batch normalisation."""

  dtype: jnp.dtype

  @nn.compact
  def __call__(self, ids):
    kw = dict(dtype=self.dtype, param_dtype=self.dtype)
    x = nn.Conv(WIDTH, (3, 3), **kw)(images(ids, 8, self.dtype))
    for _ in range(LAYERS):
      h = nn.BatchNorm(use_running_average=False, **kw)(x)
      x = x + nn.Conv(WIDTH, (3, 3), **kw)(nn.relu(h))
    return nn.Dense(VOCAB, **kw)(x.mean((1, 2)))


def linen(dtype, form):
  """Builds a Linen model; other collections than params are not trained."""
  model = ConvNet(dtype) if form == 'conv' else Linen(dtype, form)
  variables = model.init(jax.random.key(1), jnp.ones((ROWS, TOKENS), jnp.int32))
  params = variables.pop('params')
  return lambda params, ids: model.apply(
      {'params': params, **variables}, ids, mutable=[*variables])[0], params


class NnxBlock(nnx.Module):
  """Applies attention and feed-forward."""

  def __init__(self, dtype, rngs):
    kw = dict(dtype=dtype, param_dtype=dtype, rngs=rngs)
    self.norm_1, self.norm_2 = (nnx.LayerNorm(WIDTH, **kw) for _ in range(2))
    self.attn = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, **kw)
    self.up = nnx.Linear(WIDTH, FF, **kw)
    self.down = nnx.Linear(FF, WIDTH, **kw)

  def __call__(self, x):
    x = x + self.attn(self.norm_1(x), mask=CAUSAL)
    return x + self.down(nnx.gelu(self.up(self.norm_2(x))))


class Nnx(nnx.Module):
  """Applies layers from a list or in a scan."""

  def __init__(self, dtype, form, rngs):
    kw = dict(dtype=dtype, param_dtype=dtype, rngs=rngs)
    self.form, self.embed = form, nnx.Embed(VOCAB, WIDTH, **kw)
    if form == 'scan':
      self.layers = nnx.vmap(lambda key: NnxBlock(dtype, nnx.Rngs(key)))(
          jax.random.split(rngs.params(), LAYERS))
    else:
      self.layers = nnx.List([NnxBlock(dtype, rngs) for _ in range(LAYERS)])
    self.norm = nnx.LayerNorm(WIDTH, **kw)
    self.head = nnx.Linear(WIDTH, VOCAB, **kw)

  def __call__(self, ids):
    x = self.embed(ids)
    if self.form == 'scan':
      x = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0),
                   out_axes=nnx.Carry)(x, self.layers)
    else:
      for layer in self.layers:
        x = layer(x)
    return self.head(self.norm(x))


def nnx_model(dtype, form):
  """Builds an NNX model."""
  return split_nnx(Nnx(dtype, form, nnx.Rngs(1)), lambda model, ids: model(ids))


def split_nnx(model, call, dtype=None):
  """Splits an NNX model into a function and its params."""
  graph, params, rest = nnx.split(model, nnx.Param, ...)
  params = params if dtype is None else cast(params, dtype)
  return lambda params, ids: call(nnx.merge(graph, params, rest), ids), params


for form in ('unrolled', 'remat', 'scan', 'tied'):
  add(f'Linen {form}', linen, form=form)
for form in ('list', 'scan'):
  add(f'NNX {form}', nnx_model, form=form)
add('Linen LSTM', linen, form='lstm')
add('Linen CNN, batch norm', linen, form='conv')


# --- other libraries --------------------------------------------------------


def equinox(dtype, form):
  """Builds an Equinox model."""
  import equinox as eqx
  keys = iter(jax.random.split(jax.random.key(1), 100))

  class Block(eqx.Module):
    norm_1: eqx.nn.LayerNorm
    norm_2: eqx.nn.LayerNorm
    attn: eqx.nn.MultiheadAttention
    up: eqx.nn.Linear
    down: eqx.nn.Linear

    def __init__(self, key):
      keys = jax.random.split(key, 3)
      self.norm_1, self.norm_2 = (
          eqx.nn.LayerNorm(WIDTH, dtype=dtype) for _ in range(2))
      self.attn = eqx.nn.MultiheadAttention(
          HEADS, WIDTH, key=keys[0], dtype=dtype)
      self.up = eqx.nn.Linear(WIDTH, FF, key=keys[1], dtype=dtype)
      self.down = eqx.nn.Linear(FF, WIDTH, key=keys[2], dtype=dtype)

    def __call__(self, x):
      h = jax.vmap(self.norm_1)(x)
      x = x + self.attn(h, h, h, mask=CAUSAL[0, 0])
      h = jax.vmap(self.up)(jax.vmap(self.norm_2)(x))
      return x + jax.vmap(self.down)(jax.nn.gelu(h))

  class Model(eqx.Module):
    embed: eqx.nn.Embedding
    blocks: list | Block
    head: eqx.nn.Linear

    def __call__(self, ids):
      x = jax.vmap(self.embed)(ids)
      if form == 'scan':
        arrays, static = eqx.partition(self.blocks, eqx.is_array)
        x, _ = lax.scan(
            lambda x, a: (eqx.combine(a, static)(x), None), x, arrays)
      else:
        for block in self.blocks:
          x = block(x)
      return jax.vmap(self.head)(x)

  if form == 'scan':
    blocks = eqx.filter_vmap(Block)(jax.random.split(next(keys), LAYERS))
  else:
    blocks = [Block(next(keys)) for _ in range(LAYERS)]
  model = Model(
      eqx.nn.Embedding(VOCAB, WIDTH, key=next(keys), dtype=dtype), blocks,
      eqx.nn.Linear(WIDTH, VOCAB, key=next(keys), dtype=dtype))
  params, static = eqx.partition(model, eqx.is_inexact_array)
  return lambda p, ids: jax.vmap(eqx.combine(p, static))(ids), params


def equimo(dtype):
  """Builds a vision transformer of Equimo."""
  from equimo.models.vit import VisionTransformer
  import equinox as eqx
  model = VisionTransformer(
      img_size=32, in_channels=3, dim=WIDTH, patch_size=8, num_heads=HEADS,
      depths=[LAYERS], num_classes=VOCAB, reg_tokens=0, key=jax.random.key(1))
  params, static = eqx.partition(model, eqx.is_inexact_array)
  def apply(params, ids):
    model = eqx.combine(params, static)
    return jax.vmap(lambda x: model(x, jax.random.key(0), inference=True))(
        images(ids, 32, dtype).transpose(0, 3, 1, 2))
  return apply, cast(params, dtype)


def haiku(dtype, form):
  """Builds a Haiku model."""
  import haiku as hk

  def block(x):
    norm = lambda x: hk.LayerNorm(-1, True, True)(x)
    h = norm(x)
    x = x + hk.MultiHeadAttention(
        HEADS, WIDTH // HEADS, w_init=hk.initializers.VarianceScaling())(
            h, h, h, mask=CAUSAL)
    return x + hk.Linear(WIDTH)(jax.nn.gelu(hk.Linear(FF)(norm(x))))

  def forward(ids):
    x = hk.Embed(VOCAB, WIDTH)(ids)
    if form == 'layer_stack':
      x = hk.experimental.layer_stack(LAYERS)(block)(x)
    else:
      for _ in range(LAYERS):
        x = block(x)
    return hk.Linear(VOCAB)(x)

  model = hk.without_apply_rng(hk.transform(forward))
  return model.apply, cast(model.init(
      jax.random.key(1), jnp.ones((ROWS, TOKENS), jnp.int32)), dtype)


def keras(dtype):
  """Builds a Keras model with the JAX backend."""
  os.environ['KERAS_BACKEND'] = 'jax'
  import keras as k
  k.config.set_dtype_policy(jnp.dtype(dtype).name)
  layers = k.layers
  ids = k.Input((TOKENS,), dtype='int32')
  x = layers.Embedding(VOCAB, WIDTH)(ids)
  for _ in range(LAYERS):
    h = layers.LayerNormalization()(x)
    x = x + layers.MultiHeadAttention(HEADS, WIDTH // HEADS)(
        h, h, use_causal_mask=True)
    h = layers.Dense(FF, 'gelu')(layers.LayerNormalization()(x))
    x = x + layers.Dense(WIDTH)(h)
  model = k.Model(ids, layers.Dense(VOCAB)(layers.LayerNormalization()(x)))
  rest = [v.value for v in model.non_trainable_variables]
  return (lambda params, ids: model.stateless_call(params, rest, ids)[0],
          [v.value for v in model.trainable_variables])


def penzai(dtype, stacked):
  """Builds a Penzai model."""
  from penzai import pz
  from penzai.models.transformer.variants import llamalike_common as llama
  model = llama.build_llamalike_transformer(llama.LlamalikeTransformerConfig(
      num_kv_heads=HEADS, query_head_multiplier=1, embedding_dim=WIDTH,
      projection_dim=WIDTH // HEADS, mlp_hidden_dim=FF, vocab_size=VOCAB,
      num_decoder_blocks=LAYERS, mlp_variant='swiglu', parameter_dtype=dtype,
      activation_dtype=dtype, tie_embedder_and_logits=True,
      use_layer_stack=stacked), jax.random.key(1))
  slots, params = pz.unbind_params(model, freeze=True)
  def apply(params, ids):
    model = pz.bind_variables(slots, params, unfreeze_as_copy=True)
    return model(pz.nx.wrap(ids).tag('batch', 'seq')).unwrap(
        'batch', 'seq', 'vocabulary')
  return apply, params


def tunix(dtype, family, **more):
  """Builds a Tunix model."""
  # The package's __init__ imports trainers and samplers with more dependencies.
  # An empty module in its place allows importing the models alone.
  if 'tunix' not in sys.modules:
    spec = importlib.util.find_spec('tunix')
    if spec is None:
      raise ModuleNotFoundError("No module named 'tunix'", name='tunix')
    sys.modules['tunix'] = types.ModuleType('tunix')
    sys.modules['tunix'].__path__ = [*spec.submodule_search_locations]
  module = importlib.import_module(f'tunix.models.{family}.model')
  if family == 'gemma3':
    more |= dict(num_embed=VOCAB, sliding_window_size=4, param_dtype=dtype)
  else:
    more |= dict(vocab_size=VOCAB, rope_theta=10_000, norm_eps=1e-6)
  if family == 'qwen3':
    more |= dict(dtype=dtype, param_dtype=dtype)
  config = module.ModelConfig(
      num_layers=LAYERS, embed_dim=WIDTH, hidden_dim=FF, num_heads=HEADS,
      head_dim=WIDTH // HEADS, num_kv_heads=2, **more)
  model = getattr(module, family.capitalize())(config, rngs=nnx.Rngs(1))
  mask = jnp.broadcast_to(CAUSAL[0], (ROWS, TOKENS, TOKENS))
  return split_nnx(
      model, lambda model, ids: model(ids, POSITIONS, None, mask)[0], dtype)


def mamba2(dtype):
  """Builds a Mamba 2 model."""
  import mamba2_jax
  model = mamba2_jax.Mamba2ForCausalLM(mamba2_jax.Mamba2Config(
      vocab_size=VOCAB, hidden_size=WIDTH, state_size=64, chunk_size=4,
      num_hidden_layers=LAYERS), rngs=nnx.Rngs(1))
  return split_nnx(model, lambda model, ids: model(ids)['logits'], dtype)


for form in ('list', 'scan'):
  add(f'equinox {form}', equinox, 'equinox', form=form)
for form in ('unrolled', 'layer_stack'):
  add(f'haiku {form}', haiku, 'dm-haiku', form=form)
add('keras', keras, 'keras')
add('penzai unrolled', penzai, 'penzai', stacked=False)
add('penzai LayerStack', penzai, 'penzai', stacked=True)
for family in ('llama3', 'qwen3', 'gemma3'):
  add(f'tunix {family}', tunix, 'google-tunix', family=family)
add('equimo ViT', equimo, 'equimo')
add('mamba2-jax', mamba2, 'mamba2-jax')


# --- by hand ----------------------------------------------------------------


def by_hand(dtype, form):
  """Builds a model with plain functions, in a form that is hard to perturb."""
  vocab = LARGE_VOCAB if form in ('tied logits', 'one-hot') else VOCAB
  axis = 1 if form == 'layer axis 1' else 0
  keys = iter(jax.random.split(jax.random.key(1), 9))
  def w(*shape):
    if len(shape) == 3:
      shape = (*shape[1:1 + axis], shape[0], *shape[1 + axis:])
    return 0.02 * jax.random.normal(next(keys), shape, dtype)
  params = dict(
      embed=w(vocab, WIDTH), head=w(WIDTH, vocab), layers=dict(
          scale=jnp.ones((LAYERS, WIDTH), dtype), up=w(LAYERS, WIDTH, FF),
          down=w(LAYERS, FF, WIDTH)))
  if form == 'tied logits':
    del params['head']
  mesh = jax.make_mesh((1,), ('data',), axis_types=(AxisType.Auto,))
  if form == 'shard_map':
    params = jax.device_put(params, NamedSharding(mesh, P()))

  def block(x, p):
    h = p['scale'] * jax.nn.standardize(x)
    return x + jax.nn.gelu(h @ p['up']) @ p['down'], None
  def run(x, layers):
    return lax.scan(block, x, layers)[0]

  def apply(params, ids):
    if form == 'barrier':
      params = lax.optimization_barrier(params)
    layers = params['layers']
    if axis:
      layers = {k: jnp.swapaxes(v, 0, 1) if v.ndim == 3 else v
                for k, v in layers.items()}
    if form == 'one-hot':
      x = jax.nn.one_hot(ids, vocab, dtype=dtype) @ params['embed']
    else:
      x = params['embed'][ids]
    if form == 'shard_map':
      x = jax.shard_map(run, mesh=mesh, in_specs=(P('data'), P()),
                        out_specs=P('data'))(x, layers)
    elif form == 'fori_loop':
      x = lax.fori_loop(0, LAYERS, lambda i, x: block(
          x, jax.tree.map(lambda v: v[i], layers))[0], x)
    elif form == 'indexed':
      for i in range(LAYERS):
        x, _ = block(x, {k: v[i] for k, v in layers.items()})
    else:
      x = run(x, layers)
    return x @ (params['head'] if 'head' in params else params['embed'].T)
  return apply, params


for form in ('scan', 'shard_map', 'barrier', 'layer axis 1', 'fori_loop',
             'indexed', 'tied logits', 'one-hot'):
  add(f'by hand: {form}', by_hand, form=form)
