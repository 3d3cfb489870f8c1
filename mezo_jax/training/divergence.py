r"""Measures how far a model has moved from the start of training.

.. math:: \frac{1}{T} \sum_t
  \mathrm{KL}\bigl(p_\theta(\cdot \mid x, a_{<t}) \,\|\,
  p_{\theta_0}(\cdot \mid x, a_{<t})\bigr)

The sum is over the T tokens of all answers a that the trained model gives to
the prompts x of the dev rows. The divergence of each token is computed over the
whole vocabulary.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mezo_jax import models
from mezo_jax.tasks import evaluate, score
from mezo_jax.tasks.encode import Encoded
from mezo_jax.tasks.task import Task


def make(model: models.Transformer, task: Task, data: Encoded, tokenizer: Any,
         sizes: evaluate.Sizes, mesh: jax.sharding.Mesh
         ) -> Callable[[Any, Any], float]:
  """Returns a function ``kl(params, start)`` of two sets of all parameters.

  The function returns the mean divergence per token in nats, as defined above.

  Args:
    model: The model.
    task: Task of the rows.
    data: The encoded prompts.
    tokenizer: Tokenizer of the model.
    sizes: Limits on the shapes of batches.
    mesh: Mesh of the parameters.
  """
  answer = score.make_rollout_fn(model, task, tokenizer)

  def of_batch(both, batch):
    """Returns the summed divergence of each row, and its number of tokens."""
    params, start = both
    found = answer(params, batch, 0)
    tokens, used = found['tokens'], found['tokens_used']
    prompt, new = batch['input_ids'].shape[1], tokens.shape[1]
    counts = jnp.arange(new) < used[:, None]
    ids = jnp.concatenate([batch['input_ids'], tokens], 1)
    mask = jnp.concatenate([batch['attention_mask'], counts], 1)
    # The token at position t is predicted at position t - 1.
    at = prompt - 1 + jnp.arange(new)

    def of_row(row):
      """Compares the distributions of one row, to hold few logits at a time."""
      ids, mask, counts = row
      log_p, log_q = (jax.nn.log_softmax(models.apply(
          model, p, ids[None], mask[None], answer_at=at[None])[0])
                      for p in (params, start))
      kl = jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1)
      return jnp.sum(jnp.where(counts, kl, 0.0))
    return jax.lax.map(of_row, (ids, mask, counts)), used

  run = evaluate.run_batches(of_batch, data, sizes, mesh)

  def kl(params, start):
    rows = run((params, start))
    return float(sum(x for x, _ in rows) / sum(n for _, n in rows))
  return kl
