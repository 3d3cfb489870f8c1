"""Provides small models and reference computations that tests share."""

import contextlib
import socket

from estimators import whole
from flax import linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import AxisType
import numpy as np

from mezo_jax import models, peft
from mezo_jax.core import sharding


def tiny_config(**changes) -> models.Config:
  """Returns the config of a tiny Llama with some fields changed."""
  base = dict(
      family='llama', vocab_size=64, width=32, ff_width=64, num_layers=3,
      num_heads=4, num_kv_heads=2, head_width=8, max_length=64, norm_eps=1e-5,
      tied_head=True)
  return models.Config(**(base | changes))


def tiny_model(**changes):
  """Returns (model, random params, input ids [4, 12])."""
  model = models.Transformer(tiny_config(**changes))
  ids = jax.random.randint(jax.random.key(7), (4, 12), 0, 64)
  params = quick_jit(model.init)(jax.random.key(1), ids)['params']
  return model, params, ids


def paths(tree) -> set[str]:
  """Returns the paths of a tree's leaves, with slashes."""
  return {jax.tree_util.keystr(p, simple=True, separator='/')
          for p, _ in jax.tree_util.tree_flatten_with_path(tree)[0]}


def quick_jit(fn, **kwargs):
  """Jits a small program without LLVM's optimisation.

  The optimisation takes most of the time of compiling it.
  """
  return jax.jit(
      fn, compiler_options={'xla_backend_optimization_level': 0}, **kwargs)


def lm_loss(model):
  """Returns a next-token loss, which depends on every parameter."""
  def loss_fn(params, ids):
    log_p = jax.nn.log_softmax(model.apply({'params': params}, ids)[:, :-1])
    return -jnp.mean(jnp.take_along_axis(log_p, ids[:, 1:, None], -1))
  return loss_fn


def replay_setup(dtype='float32', trained=None, learning_rate=1e-2, mesh=None,
                 **options):
  """Returns a small training problem for tests of the replay path.

  Args:
    dtype: Dtype of the parameters.
    trained: Regular expression of the trained parameters. When it is given,
      the model has LoRA matrices too. Defaults to all parameters.
    learning_rate: Learning rate, schedule or groups.
    mesh: Mesh on which the parameters are placed. Defaults to one device.
    **options: Further arguments of ``mezo``.

  Returns:
    ``(tx, value_fn, trainable, frozen, batches)``. There are five batches, and
    the loss of the third is NaN.
  """
  model, params, ids = tiny_model()
  if trained:
    params = peft.join(params, peft.lora.init(params, jax.random.key(4)))
  params = jax.tree.map(lambda x: x.astype(dtype), params)
  if mesh is not None:
    params = jax.device_put(
        jax.device_get(params), sharding.param_shardings(params, mesh))
  def value_fn(params, batch):
    log_p = model.apply({'params': params}, batch['ids'][:, :-1],
                        targets=batch['ids'][:, 1:])
    return jnp.where(batch['lost'], jnp.nan, -jnp.mean(log_p, -1))
  batches = [{'ids': (ids + t) % 64, 'lost': jnp.full(len(ids), t == 2)}
             for t in range(5)]
  tx = whole.spsa(learning_rate, key=3, **options)
  return (tx, value_fn, *peft.split(params, trained), batches)


class Block(nn.Module):
  """Applies an ordinary residual block, which does not know about MeZO."""

  width: int
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x, _):
    h = nn.LayerNorm(dtype=self.dtype)(x)
    h = nn.Dense(2 * self.width, dtype=self.dtype)(h)
    return x + nn.Dense(self.width, dtype=self.dtype)(nn.gelu(h)), None


class ScannedLinen(nn.Module):
  """Applies scanned and rematerialised blocks, with a tied head."""

  width: int = 32
  layers: int = 4
  vocab: int = 48
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, ids):
    embed = nn.Embed(self.vocab, self.width)
    scanned = nn.scan(
        nn.remat(Block), variable_axes={'params': 0},
        split_rngs={'params': True}, length=self.layers)
    x, _ = scanned(self.width, self.dtype, name='layers')(embed(ids), None)
    return embed.attend(nn.LayerNorm()(x)).astype(jnp.float32)


def mesh_of(data: int, fsdp: int, axis_type=AxisType.Auto):
  """Returns a mesh with two axes on the first devices."""
  return jax.make_mesh(
      (data, fsdp), ('data', 'fsdp'), axis_types=(axis_type,) * 2,
      devices=jax.devices()[:data * fsdp])


@contextlib.contextmanager
def compilations():
  """Yields a list that grows by one entry with each compilation of XLA."""
  seen, active = [], [True]

  def listen(event, seconds, **kwargs):
    if active and event == '/jax/core/compile/backend_compile_duration':
      seen.append(seconds)

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    yield seen
  finally:
    active.clear()


def assert_bitwise(a, b):
  """Asserts that two trees have the same dtypes, shapes and bits."""
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    x, y = np.asarray(x), np.asarray(y)
    assert (x.dtype, x.shape) == (y.dtype, y.shape)
    np.testing.assert_array_equal(
        np.frombuffer(x.tobytes(), np.uint8),
        np.frombuffer(y.tobytes(), np.uint8))


def assert_close(a, b, rtol=1e-5, atol=1e-6):
  """Asserts that the leaves of two trees are close."""
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_allclose(x, y, rtol=rtol, atol=atol)


def free_port() -> int:
  """Returns a free TCP port of this machine."""
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    return s.getsockname()[1]
