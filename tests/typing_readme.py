"""The README's lines, for pyright to read: nothing imports this file.

`test_package.py` checks that these are the README's lines.
"""

from functools import partial
from typing import Any

import jax
import numpy as np
import optax

import mezo_jax
from mezo_jax import models

params: dict[str, Any] = {'w': np.ones(3, np.float32)}
batch = np.zeros(3, np.float32)


def loss_fn(params: Any, batch: jax.Array) -> jax.Array:
  return jax.numpy.sum((params['w'] - batch)**2)


tx = mezo_jax.mezo(learning_rate=1e-6, eps=1e-3, key=jax.random.key(0))
state = tx.init(params)

@partial(jax.jit, donate_argnums=(0, 1))
def step(params, state, batch):
  updates, state = tx.update(None, state, params, value_fn=loss_fn, batch=batch)
  return optax.apply_updates(params, updates), state


def directions() -> None:
  estimator = mezo_jax.spsa(1e-3, key=0, directions=mezo_jax.LowRank(rank=16),
                            num_samples=4, over='rows')
  tx = mezo_jax.mezo(1e-6, estimator=estimator)
  tx.update(None, tx.init(params), params, value_fn=loss_fn, batch=batch)
  mezo_jax.mezo(1e-6, key=0, directions=mezo_jax.Rademacher())
  mezo_jax.mezo(1e-6, key=0, directions=mezo_jax.Normal(mask='attn/(q|v)/'))


def chains() -> None:
  estimate = mezo_jax.spsa(eps=1e-3, key=0, num_samples=4)
  tx = mezo_jax.skip_not_finite(optax.chain(
      estimate, optax.adam(1e-4), mezo_jax.round_stochastically(key=0)))
  g = np.zeros(4, np.float32)
  tx.update(None, state, params, projected_grad=g)
  mezo_jax.variants.svrg(1e-6, key=0).update(
      None, state, params, value_fn=loss_fn, batch=batch)


def compiled_steps() -> None:
  step = mezo_jax.make_step(tx, loss_fn)
  params_, state_, metrics = step(params, state, batch)
  g = metrics['projected_grad']
  params_, state_, metrics = step.update(params_, state_, g)
  params_, state_ = step.apply_accumulated(params_, state_)


def displacements(key: jax.Array) -> None:
  displacement = mezo_jax.Displacement(key, 1e-3)
  mezo_jax.perturbed(loss_fn)(params, displacement, batch=batch)
  mezo_jax.displace(params, displacement)
  mezo_jax.direction(params, displacement, mezo_jax.Rademacher())


def language_models() -> None:
  model, params = models.load('my-model')
  tokenizer = models.load_tokenizer('my-model')
  tokenizer.padding_side = 'left'
  prompts = tokenizer(['The capital of France is'], return_tensors='np')
  logits = model.apply({'params': params}, **prompts)
  tokens = models.generate(model, params, **prompts, max_new_tokens=20)
  print(logits, tokenizer.batch_decode(tokens.tolist()))
  models.save('copy-of-my-model', model, params, tokenizer=tokenizer)


def rooms(path: str) -> None:
  mesh = mezo_jax.sharding.make_mesh(fsdp=1)
  mezo_jax.sharding.param_shardings(params, mesh)
  log, _ = mezo_jax.replay.open_log(path, {}, 1)
  lora = mezo_jax.peft.lora.init(params, jax.random.key(0), rank=8)
  mezo_jax.peft.join(params, lora)
  print(log, mezo_jax.tasks.get('sst2').template)
