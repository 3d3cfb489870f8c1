"""What some methods want to know of the weights before the first step."""

from collections.abc import Callable
import time

import jax
import jax.numpy as jnp

from mezo_jax import data as data_lib
from mezo_jax import mixture, peft, sharding, variants
from mezo_jax.tasks import encode


def score_weights(config, built, params, mix, loss_fn, frozen_of,
                  say: Callable[[str], None]):
  """Which weights matter most to rows from all over each task (MaZO), or how
  much each layer does (modified SPSA).

  Args:
    config: of the run.
    built: of the run, or of its first task.
    params: that are trained.
    mix: `mixture.Mixture` of several tasks; None of one.
    loss_fn: of all parameters and a batch.
    frozen_of: ``batch -> `` the parameters that are not trained.
    say: reports what was done.
  """
  v, began, value_fns = config.variant, time.time(), []
  for i, part in enumerate(mix.parts if mix else [None]):
    train = (part.built if part else built).splits
    rows = min(4 * config.data.batch_size, len(train.train.prompts))
    length, index = data_lib.spread(
        train.train.lengths, train.buckets['train'],
        rows // sharding.row_groups(built.mesh)
        * sharding.row_groups(built.mesh))
    batch = sharding.put_batch(
        encode.batch_of(train.train, index, length, len(index)), built.mesh)
    batch = mixture.Of(batch, i) if mix else batch
    value_fns.append(lambda params, batch=batch: loss_fn(
        peft.join(params, frozen_of(batch)), batch))
  more = dict(key=jax.random.key(config.seed + 2**20), eps=config.spsa.eps,
              num_samples=v.num_scores)
  with jax.set_mesh(built.mesh):
    if config.method == 'mazo':
      found = [m for m in jax.tree.leaves(variants.saliency(
          value_fns, params, share=v.share, alpha=v.alpha, beta=v.beta, **more))
               if jnp.ndim(m)]
      what = f'{v.share:.0%} of each row are trained'
    else:
      found = variants.param_norms(params) if v.norm == 'param' else (
          variants.grad_norms(*value_fns, params, **more))
      what = f'norms of layers, {v.norm}'
    found = sharding.beside(found, params)
  say(f'looked at the weights in {time.time() - began:.0f} s: {what}')
  return found
