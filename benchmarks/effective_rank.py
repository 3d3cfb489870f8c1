"""Measures the local effective rank that the theory of MeZO relies on.

  python benchmarks/effective_rank.py [--directions N]

The MeZO paper (Theorem 1) predicts that a step of MeZO with n directions gains
less than one of gradient descent by (n + r + 1) / n, with the local effective
rank r = tr H / |H| of the Hessian H, and argues that pretraining and prompts
with task wording make r small. For all parameters of SmolLM2-135M on the
quickstart's reviews, this measures tr H by forward passes and |H| by power
iteration, on the same 4 batches of 16 rows: with the quickstart's prompt, with
the text alone, and with random weights. The slow-down is also measured, by
trying steps of MeZO and of gradient descent.

Writes benchmarks/results/effective_rank.md and .json. It was not run to its
end: 25 minutes on one CPU core were not enough for the first of three rows.
"""

import argparse
import itertools

import harness
import jax
import numpy as np

from configs import quickstart
from mezo_jax import peft
from mezo_jax.core import sharding
from mezo_jax.tasks import encode
from mezo_jax.training import build, curvature

BATCHES, ROWS, TOKENS = 4, 16, 24
PROMPTS = {'with task wording': '{text} Recommended:', 'text alone': '{text}'}


def problem_of(template: str, random: bool):
  """Returns a loss, its params, and the batches of one row of the table."""
  config = quickstart.get_config('whole')
  config.peft.mask, config.task.template = '', template
  built = build.build(config, say=lambda text: None)
  params = peft.join(built.params, built.frozen)
  if random:
    params = harness.random_params(built.model)
  rows = built.splits.train
  short = np.flatnonzero(rows.lengths <= TOKENS)
  batches = [{'batch': sharding.put_batch(encode.batch_of(
      rows, short[i * ROWS:(i + 1) * ROWS], TOKENS, ROWS), built.mesh)}
             for i in range(BATCHES)]
  return built.loss_fn, params, batches


def row_of(name: str, template: str, random: bool, count: int) -> dict:
  """Returns one row of the table."""
  loss_fn, params, batches = problem_of(template, random)
  more = dict(eps=1e-3, key=jax.random.key(0))
  samples = curvature.sample(
      loss_fn, params, itertools.cycle(batches), count, **more)
  trace, trace_error = curvature.spread(samples, lambda q: q.trace)
  along, along_error = curvature.spread(samples, lambda q: q.rank)
  loss = curvature.mean_loss(loss_fn, batches)
  value, rest = curvature.largest_eigenvalue(
      loss, params, key=jax.random.key(1), iterations=20)
  rank = trace / abs(value)
  rates = [2.0**i / trace for i in range(-3, 3)]
  steps = curvature.decreases(
      lambda params: loss(params), params, itertools.repeat({}), rates, 1,
      count // 4, **more)
  descent = curvature.descents(
      loss, params, [2.0**i / abs(value) for i in range(-4, 4)]).max()
  best = int(np.argmax(steps.mean(0)))
  gain = steps[:, best].mean()
  error = steps[:, best].std() / np.sqrt(len(steps))
  print(name, dict(trace=trace, value=value, rest=rest, descent=descent,
                   gain=gain, error=error), flush=True)
  return {
      'model, prompt': name, 'loss': f'{samples.loss.mean():.2f}',
      'tr H': f'{trace:.3g} ± {trace_error:.1g}',
      'largest eigenvalue': f'{value:.3g} ± {rest:.1g}',
      'r = tr H / |H|': f'{rank:.2f} ± {trace_error / abs(value):.2f}',
      'r along the gradient': f'{along:.2g} ± {along_error:.1g}',
      'predicted slow-down': f'{rank + 2:.2f}',
      'measured': f'{descent / gain:.2f} ± {descent / gain**2 * error:.2f}'}


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument('--directions', type=int, default=100)
  count = parser.parse_args().directions
  rows = [row_of(f'pretrained, {name}', template, False, count)
          for name, template in PROMPTS.items()]
  rows.append(row_of('random weights, with task wording',
                     PROMPTS['with task wording'], True, count))
  harness.write('effective_rank', harness.header(
      f'{BATCHES} batches of {ROWS} rows, {count} directions'), [
          ('SmolLM2-135M, all parameters', rows)])


if __name__ == '__main__':
  main()
