"""The scoring pass that some methods make before the first step."""

from collections.abc import Callable
import time
from typing import Any

import jax

from mezo_jax import peft
from mezo_jax.core import sharding
from mezo_jax.tasks import data as data_lib
from mezo_jax.tasks import encode
from mezo_jax.training import methods, mixture


def score_weights(config: Any, tasks: mixture.Mixture, params: Any,
                  mesh: jax.sharding.Mesh, say: Callable[[str], None]) -> Any:
  """Evaluates what a method needs to know of the weights before the first step,
  on rows from all over each task.

  Args:
    config: The config of the run.
    tasks: The tasks of the run.
    params: The trained parameters.
    mesh: The mesh that they are on.
    say: Reports what was done.

  Returns:
    The part of the optimizer state that is called ``memory``.
  """
  began, value_fns = time.time(), []
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
  more = dict(key=jax.random.key(config.seed + 2**20), eps=config.spsa.eps,
              num_samples=config.variant.num_scores)
  score = methods.method_of(config).score
  assert score is not None  # only methods that score come here
  with jax.set_mesh(mesh):
    found, what = score(config, value_fns, params, **more)
    found = sharding.beside(found, params)
  say(f'looked at the weights in {time.time() - began:.0f} s: {what}')
  return found
