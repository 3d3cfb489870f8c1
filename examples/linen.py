"""Trains a Flax (Linen) model with MeZO; linen_backprop.py uses Adam."""

from functools import partial

from flax import linen as nn
import jax
import jax.numpy as jnp
import optax

import mezo_jax


class Block(nn.Module):
  @nn.compact
  def __call__(self, x, _):
    h = nn.gelu(nn.Dense(128)(nn.LayerNorm()(x)))
    return x + nn.Dense(64)(h), None


class Model(nn.Module):
  @nn.compact
  def __call__(self, ids):
    x = nn.Embed(100, 64)(ids).mean(1)
    layers = nn.scan(Block, variable_axes={'params': 0},
                     split_rngs={'params': True}, length=4)
    x, _ = layers(name='layers')(x, None)
    return nn.Dense(2)(x)


def loss_fn(params, batch):
  logits = model.apply({'params': params}, batch['ids'])
  return optax.softmax_cross_entropy_with_integer_labels(
      logits, batch['label']).mean()


model = Model()
ids = jax.random.randint(jax.random.key(0), (64, 12), 0, 100)
batch = {'ids': ids, 'label': (ids[:, 0] > 50).astype(jnp.int32)}
params = model.init(jax.random.key(1), ids)['params']
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
