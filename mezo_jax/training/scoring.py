"""What some methods want to know of the weights before the first step."""

from collections.abc import Callable
import time
from typing import Any

import jax
import jax.numpy as jnp

from mezo_jax import peft, variants
from mezo_jax.core import sharding
from mezo_jax.tasks import data as data_lib
from mezo_jax.tasks import encode
from mezo_jax.training import mixture


def score_weights(config: Any, tasks: mixture.Mixture, params: Any,
                  mesh: jax.sharding.Mesh, say: Callable[[str], None]
                  ) -> Any:
  """Which weights matter most to rows from all over each task (MaZO), or how
  much each layer does (modified SPSA).

  Args:
    config: of the run.
    tasks: of the run.
    params: that are trained.
    mesh: that they are on.
    say: reports what was done.
  """
  v, began, value_fns = config.variant, time.time(), []
  groups = sharding.row_groups(mesh)
  for i, splits in enumerate(tasks.splits):
    train = splits.train
    rows = min(4 * config.data.batch_size, len(train.prompts))
    length, index = data_lib.spread(
        train.lengths, splits.buckets['train'], rows // groups * groups)
    batch = mixture.Of(sharding.put_batch(
        encode.batch_of(train, index, length, len(index)), mesh), i)
    value_fns.append(lambda params, batch=batch: tasks.value_fn(
        peft.join(params, tasks.frozen(batch)), batch))
  more: dict[str, Any] = dict(
      key=jax.random.key(config.seed + 2**20), eps=config.spsa.eps,
      num_samples=v.num_scores)
  with jax.set_mesh(mesh):
    if config.method == 'mazo':
      found = [m for m in jax.tree.leaves(variants.saliency(
          value_fns, params, share=v.share, alpha=v.alpha, beta=v.beta, **more))
               if jnp.ndim(m)]
      what = f'{v.share:.0%} of each row are trained'
    else:
      found = variants.param_norms(params) if v.norm == 'param' else (
          variants.grad_norms(value_fns[0], params, **more))
      what = f'norms of layers, {v.norm}'
    found = sharding.beside(found, params)
  say(f'looked at the weights in {time.time() - began:.0f} s: {what}')
  return found
