"""Trains a Flax (NNX) model with MeZO; nnx_backprop.py uses Adam."""

from functools import partial

from flax import nnx
import jax
import jax.numpy as jnp
import optax

import mezo_jax


class Block(nnx.Module):
  def __init__(self, rngs):
    self.norm = nnx.LayerNorm(64, rngs=rngs)
    self.up = nnx.Linear(64, 128, rngs=rngs)
    self.down = nnx.Linear(128, 64, rngs=rngs)

  def __call__(self, x):
    return x + self.down(nnx.gelu(self.up(self.norm(x))))


class Model(nnx.Module):
  def __init__(self, rngs):
    self.embed = nnx.Embed(100, 64, rngs=rngs)
    self.layers = nnx.vmap(Block)(rngs.split(4))
    self.head = nnx.Linear(64, 2, rngs=rngs)

  def __call__(self, ids):
    layer = nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0),
                     out_axes=nnx.Carry)
    return self.head(layer(self.embed(ids).mean(1), self.layers))


def loss_fn(params, batch):
  logits = nnx.merge(graphdef, params, rest, copy=True)(batch['ids'])
  return optax.softmax_cross_entropy_with_integer_labels(
      logits, batch['label']).mean()


ids = jax.random.randint(jax.random.key(0), (64, 12), 0, 100)
batch = {'ids': ids, 'label': (ids[:, 0] > 50).astype(jnp.int32)}
# `rest` has what is not trained, such as random streams and batch statistics.
graphdef, params, rest = nnx.split(Model(nnx.Rngs(1)), nnx.Param, ...)
tx = mezo_jax.mezo(1e-3, eps=1e-3, key=0)
state = tx.init(params)


@partial(jax.jit, donate_argnums=(0, 1))
def step(params, state, batch):
  updates, state = tx.update(
      None, state, params, value_fn=loss_fn, batch=batch)
  return optax.apply_updates(params, updates), state, state[0].value


for i in range(1001):
  params, state, loss = step(params, state, batch)
  if i % 100 == 0:
    print(f'step {i}: loss {loss:.4f}')
