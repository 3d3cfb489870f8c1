"""The README's lines, as a type checker sees them: pyright reads this file.

`test_the_readme_s_lines_are_the_ones_that_are_type_checked` compares them.
"""

from functools import partial
from typing import Any

import jax
import numpy as np
import optax

import mezo_jax

params: dict[str, Any] = {'w': np.ones(3, np.float32)}
batches = [np.zeros(3, np.float32)]


def loss_fn(params: Any, batch: jax.Array) -> jax.Array:
  return jax.numpy.sum((params['w'] - batch)**2)


tx = mezo_jax.mezo(learning_rate=1e-6, eps=1e-3, key=jax.random.key(0))
state = tx.init(params)

@partial(jax.jit, donate_argnums=(0, 1))
def step(params, state, batch):
  updates, state = tx.update(None, state, params, value_fn=loss_fn, batch=batch)
  return optax.apply_updates(params, updates), state


def other_transforms() -> None:
  tx = mezo_jax.mezo(1e-6, key=0, directions=mezo_jax.LowRank(rank=16),
                     num_samples=4, over='rows')  # loss_fn returns rows' values
  estimate = mezo_jax.spsa(eps=1e-3, key=0, num_samples=4)
  tx = mezo_jax.skip_not_finite(optax.chain(
      estimate, optax.adam(1e-4), mezo_jax.round_stochastically(key=0)))
  tx.update(None, tx.init(params), params, projected_grad=np.zeros(4))
  mezo_jax.mezo(1e-6, key=0, directions=mezo_jax.Normal(mask='attn/(q|v)/'))
  mezo_jax.variants.svrg(1e-6, key=0).update(
      None, state, params, value_fn=loss_fn, batch=batches[0])


def the_compiled_step() -> None:
  state = tx.init(params)
  step = mezo_jax.make_step(tx, loss_fn)
  new_params, state, metrics = step(params, state, batches[0])
  print(metrics['loss'])
  step.update(new_params, state, metrics['projected_grad'])
  step.flush(new_params, state)


def displacements(key: jax.Array) -> None:
  displacement = mezo_jax.Displacement(key, 1e-3)
  mezo_jax.perturbed(loss_fn)(params, displacement, batch=batches[0])
  mezo_jax.displace(params, displacement)
  mezo_jax.direction(params, displacement, mezo_jax.Rademacher())


def rooms() -> None:
  model, params = mezo_jax.models.load('my-model')
  tokenizer = mezo_jax.models.load_tokenizer('my-model')
  prompts = tokenizer(['The capital of France is'], return_tensors='np')
  model.apply({'params': params}, **prompts)
  tokens = mezo_jax.models.generate(model, params, **prompts, max_new_tokens=20)
  print(tokenizer.batch_decode(tokens.tolist()))
  mezo_jax.models.save('copy-of-my-model', model, params, tokenizer=tokenizer)
  mesh = mezo_jax.sharding.make_mesh(fsdp=1)
  mezo_jax.sharding.param_shardings(params, mesh)
  mezo_jax.replay.open_log
  mezo_jax.peft.join(params, mezo_jax.peft.lora.init(
      params, jax.random.key(0), rank=8))
  mezo_jax.tasks.get('sst2')
