"""Runs the scoring pass that some methods need before the first step."""

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
  """Runs the scoring pass of a method, for example to find sensitive weights.

  For each task it evaluates four batches' worth of training rows, or all of
  them if there are fewer. The rows are evenly spaced among the training rows.

  Args:
    config: The config of the run. Its method must have a ``score``.
    tasks: The tasks of the run.
    params: The trained parameters before training.
    mesh: The mesh that they are on.
    say: A function that reports a line to the user.

  Returns:
    The initial value of ``memory`` in the optimizer state.
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
  # The offset makes this key differ from that of the training steps.
  more = dict(key=jax.random.key(config.seed + 2**20), eps=config.spsa.eps,
              num_samples=config.variant.num_scores)
  score = methods.method_of(config).score
  assert score is not None  # the caller has checked it
  with jax.set_mesh(mesh):
    found, what = score(config, value_fns, params, **more)
    found = sharding.beside(found, params)
  say(f'scoring pass before training took {time.time() - began:.0f} s: {what}')
  return found
