"""Compares evolution strategies, MeZO and a policy gradient on Countdown.

  python benchmarks/countdown.py [--runs DIR] [--seeds N] [--completions N]

A row has three digits and a target; an answer is an expression that uses each
digit once and whose value, from left to right, is the target. A character
model of 1.2 million parameters learns from generated rows by backpropagation
until it solves about 30 % of rows that are held out: those whose digits and
target have a hash divisible by five. Each method then continues from these
weights with the same number of completions: answers that are generated or, for
MeZO, rows whose cross-entropy is evaluated.

* Evolution strategies on exact match: 30 members of rank 1, 64 prompts, greedy.
* MeZO on the cross-entropy of the right answer: 2 evaluations of 64 rows.
* A policy gradient on exact match: 8 sampled answers to each of 64 prompts,
  rewards normalised within each group, Adam, one update for each sample.

Each method uses the best of three learning rates, by the dev rows of seed 0.
Writes benchmarks/results/countdown.md and .json, and the picture
docs/rewards_countdown.png.
"""

import argparse
import functools
import json
from pathlib import Path
import tempfile
import zlib

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax

import mezo_jax
from mezo_jax import LowRank, models

CHARS = '0123456789+-*=,:;'  # ':' begins an answer, ';' ends it
PROMPT, NEW, ROWS, MEMBERS, GROUP = 10, 6, 64, 30, 8
RATES = {'evolution strategies': (1e-3, 3e-3, 1e-2),
         'MeZO': (3e-5, 1e-4, 3e-4), 'policy gradient': (3e-5, 1e-4, 3e-4)}
MODEL = models.Transformer(models.Config(
    family='llama', vocab_size=32, width=160, ff_width=448, num_layers=4,
    num_heads=4, num_kv_heads=4, head_width=40, max_length=32, norm_eps=1e-5,
    tied_head=True))


def value_of(expression: str) -> int:
  """Returns the value of an expression of digits, from left to right."""
  value = int(expression[0])
  for sign, digit in zip(expression[1::2], expression[2::2]):
    value = {'+': value + int(digit), '-': value - int(digit),
             '*': value * int(digit)}[sign]
  return value


def rows_of(seed: int, count: int, held_out: bool = False
            ) -> tuple[np.ndarray, np.ndarray]:
  """Returns tokens of prompts [count, PROMPT] and of right answers [count, 6].

  A prompt ends with ':', which also pads its beginning. Held-out rows are never
  trained on.
  """
  rng, prompts, answers = np.random.RandomState(seed), [], []
  while len(prompts) < count:
    digits = rng.randint(1, 10, 3)
    a, b, c = digits
    signs = [*rng.choice([*'+-*'], 2)]
    right = f'{a}{signs[0]}{b}{signs[1]}{c}'
    target = value_of(right)
    kind = zlib.crc32(f'{sorted(digits)} {target}'.encode()) % 5 == 0
    if 0 < target < 100 and kind == held_out:
      shown = ','.join(map(str, rng.permutation(digits)))
      prompts.append(f'{shown}={target:02d}:'.rjust(PROMPT, ':'))
      answers.append(right + ';')
  ids = lambda texts: np.array(
      [[CHARS.index(c) for c in text] for text in texts], np.int32)
  return ids(prompts), ids(answers)


def rewards_of(prompts, tokens) -> np.ndarray:
  """Returns 1 for each answer that is right, else 0; tokens [..., B, NEW]."""
  out = np.zeros(tokens.shape[:-1], np.float32)
  for at in np.ndindex(out.shape):
    text = ''.join(CHARS[t] if t < len(CHARS) else '?' for t in tokens[at])
    shown = ''.join(CHARS[t] for t in prompts[at[-1]]).strip(':')
    digits, target = shown.split('=')
    form = [c.isdigit() for c in text[:5]] == [True, False] * 2 + [True]
    if text[5:] == ';' and form and set(text[1:4:2]) <= set('+-*'):
      out[at] = (sorted(text[0:5:2]) == sorted(digits.split(','))
                 and value_of(text[:5]) == int(target))
  return out


def cross_entropy(params, batch):
  """Returns the mean cross-entropy of each row's right answer, [B]."""
  prompts, answers = batch
  whole = jnp.concatenate([prompts, answers], 1)
  logits = MODEL.apply({'params': params}, whole)[:, PROMPT - 1:-1]
  log_p = jax.nn.log_softmax(logits)
  return -jnp.take_along_axis(log_p, answers[..., None], -1)[..., 0].mean(-1)


generate = functools.partial(models.generate, MODEL, max_new_tokens=NEW)


def accuracy(params, rows) -> float:
  """Returns the share of rows that greedy answers solve."""
  prompts = rows[0]
  return float(rewards_of(prompts, np.asarray(
      generate(params, prompts))).mean())


def pretrained(share: float = 0.3):
  """Returns weights that solve about this share of new rows."""
  params = MODEL.init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))['params']
  tx = optax.adam(1e-3)
  state, dev = tx.init(params), rows_of(10**6, 500, True)

  @jax.jit
  def step(params, state, batch):
    grads = jax.grad(lambda p: cross_entropy(p, batch).mean())(params)
    updates, state = tx.update(grads, state)
    return optax.apply_updates(params, updates), state
  for number in range(20_000):
    params, state = step(params, state, rows_of(number, 128))
    if number % 50 == 49 and accuracy(params, dev) >= share:
      return params, number + 1
  raise RuntimeError('the model did not learn')


def by_forward_passes(name, rate, seed, params):
  """Returns a function that takes a step, and its completions per step."""
  if name == 'MeZO':
    tx = mezo_jax.mezo(rate, 1e-3, key=seed)
    step, each = mezo_jax.make_step(tx, cross_entropy), 2 * ROWS
  else:
    tx = mezo_jax.mezo(rate, estimator=mezo_jax.spsa(
        1e-2, key=seed, directions=LowRank(rank=1), over='batch',
        combine='z_score', num_samples=MEMBERS))
    step = mezo_jax.make_step(
        tx, lambda params, batch: generate(params, batch[0]),
        reward=lambda tokens, batch: rewards_of(batch[0], tokens))
    each = MEMBERS * ROWS
  state = tx.init(params)

  def take(params, number):
    nonlocal state
    params, state, _ = step(params, state, rows_of(seed * 10**7 + number, ROWS))
    return params
  return take, each


def by_policy_gradient(rate, seed, params):
  """Returns a function that takes a step, and its completions per step."""
  tx = optax.adam(rate)
  state = tx.init(params)

  @jax.jit
  def step(params, state, prompts, tokens, advantages):
    def loss(params):
      log_p = -cross_entropy(params, (prompts, tokens)) * NEW
      return -jnp.mean(advantages * log_p)
    updates, state = tx.update(jax.grad(loss)(params), state)
    return optax.apply_updates(params, updates), state

  def take(params, number):
    nonlocal state
    prompts, _ = rows_of(seed * 10**7 + number, ROWS)
    prompts = np.repeat(prompts, GROUP, 0)
    tokens = np.asarray(generate(
        params, prompts, temperature=1.0, key=seed * 10**5 + number))
    groups = rewards_of(prompts, tokens).reshape(ROWS, GROUP)
    mean, std = groups.mean(1, keepdims=True), groups.std(1, keepdims=True)
    params, state = step(params, state, prompts, tokens, (
        (groups - mean) / (std + 1e-4)).ravel())
    return params
  return take, ROWS * GROUP


def curve(name, rate, seed, start, completions, points=10):
  """Returns the accuracy on new rows after each tenth of the completions."""
  params = jax.tree.map(jnp.copy, start)
  make = by_policy_gradient if name == 'policy gradient' else (
      functools.partial(by_forward_passes, name))
  take, each = make(rate, seed, params)
  dev, steps = rows_of(2 * 10**6, 1000, True), completions // each
  out = [accuracy(params, dev)]
  for number in range(1, steps + 1):
    params = take(params, number)
    if number * points // steps > (number - 1) * points // steps:
      out.append(accuracy(params, dev))
  return out


def draw(path: Path, curves: dict, completions: int) -> None:
  """Draws accuracy against completions, the range of the seeds shaded."""
  import matplotlib
  matplotlib.use('Agg')
  from matplotlib import pyplot as plt
  figure, axis = plt.subplots(figsize=(5, 3), layout='constrained')
  for name, seeds in curves.items():
    values = 100 * np.array(seeds)
    x = np.linspace(0, completions / 1000, values.shape[1])
    axis.plot(x, values.mean(0), label=name)
    axis.fill_between(x, values.min(0), values.max(0), alpha=0.2)
  axis.set_xlabel('thousand completions')
  axis.set_ylabel('solved, %')
  axis.legend(loc='center right')
  figure.savefig(path, dpi=150)


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument('--runs', default='')
  parser.add_argument('--seeds', type=int, default=3)
  parser.add_argument('--completions', type=int, default=60_000)
  args = parser.parse_args()
  runs = Path(args.runs or tempfile.mkdtemp())
  runs.mkdir(exist_ok=True, parents=True)
  start, steps = pretrained()

  def kept(name, rate, seed):
    """Returns a curve, which is stored when it is finished."""
    path = runs / f'{name}-{rate}-{seed}-{args.completions}.json'
    if not path.exists():
      path.write_text(json.dumps(
          curve(name, rate, seed, start, args.completions)))
    return json.loads(path.read_text())
  curves, rows = {}, []
  for name, rates in RATES.items():
    first = {rate: kept(name, rate, 0) for rate in rates}
    rate = max(first, key=lambda rate: first[rate][-1])
    curves[name] = [kept(name, rate, seed) for seed in range(args.seeds)]
    rows.append({
        'method': name, 'learning rate': f'{rate:g}',
        'solved before, %': f'{100 * curves[name][0][0]:.1f}',
        'solved after, %': harness.mean_error(
            [100 * each[-1] for each in curves[name]], 1),
        'seed 0 with each rate, %': ', '.join(
            f'{100 * x[-1]:.1f} ({r:g})' for r, x in first.items())})
  draw(Path(__file__).parents[1] / 'docs' / 'rewards_countdown.png', curves,
       args.completions)
  harness.write('countdown', harness.header(
      f'{args.completions:,} completions, {args.seeds} seeds, {steps} steps of '
      'pretraining'), [('Countdown with three digits', rows)])


if __name__ == '__main__':
  main()
