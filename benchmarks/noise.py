"""Measures the cost and the statistical quality of random directions.

  python benchmarks/noise.py

The cost is that of ``w += c * z`` in place, on a leaf of 2**24 float32: the
nanoseconds of processor time per element, and the compiler's temporary bytes.
The quality is that of 2**30 draws of each distribution with the generator
hash32, from 256 keys with 2**22 draws each. Each line of the table compares a
statistic with that of independent draws, as standard scores (chi-squares are
transformed to scores). The largest of many scores should be near the value in
the last column. Writes benchmarks/results/noise.md and .json.
"""

import functools
import math
from statistics import NormalDist
import time

import harness
import jax
import jax.numpy as jnp
import numpy as np

from mezo_jax.directions import noise, streams
from mezo_jax.directions.by_name import KINDS

KEYS, DRAWS = 256, 2**22
LEAF = (4096, 4096)


# --- cost -------------------------------------------------------------------


def cost(directions):
  """Returns the cost of adding a direction of a distribution."""
  @functools.partial(jax.jit, donate_argnums=0)
  def axpy(w, key):
    stream = streams.of_leaf(key[None], 'w', LEAF)
    return directions.of_leaf(stream, jnp.full(1, 1e-3), LEAF).add(w)
  key, w = jax.random.key(0), jnp.zeros(LEAF)
  temp = axpy.lower(w, key).compile().memory_analysis().temp_size_in_bytes
  return _ns(axpy, w, key) | {'temporary bytes / leaf': temp / w.nbytes}


def cost_of_jax_random():
  """Returns the cost of adding draws of `jax.random.normal`."""
  @functools.partial(jax.jit, donate_argnums=0)
  def axpy(w, key):
    return w + 1e-3 * jax.random.normal(key, LEAF)
  key, w = jax.random.key(0), jnp.zeros(LEAF)
  temp = axpy.lower(w, key).compile().memory_analysis().temp_size_in_bytes
  return _ns(axpy, w, key) | {'temporary bytes / leaf': temp / w.nbytes}


def _ns(axpy, w, key):
  """Returns the nanoseconds per element, the smallest of seven runs."""
  w = jax.block_until_ready(axpy(w, key))
  seconds = []
  for _ in range(7):
    began = time.process_time()
    w = jax.block_until_ready(axpy(w, key))
    seconds.append(time.process_time() - began)
  return {'ns / element': min(seconds) / w.size * 1e9}


# --- quality ----------------------------------------------------------------


def related_keys():
  """Returns 256 keys: of layers of a leaf, steps of a run, and single bits."""
  base = jax.random.key(0)
  layers = streams.of_leaf(base[None], 'layers/w', (96, 2)).keys[:, 0, 0]
  steps = jnp.stack([jax.random.key_data(noise.direction_key(base, t))
                     for t in range(96)])
  bits = jnp.array([[1 << b, 0] for b in range(32)]
                   + [[0, 1 << b] for b in range(32)], jnp.uint32)
  return jnp.concatenate([layers, steps, bits])


@jax.jit
def words_of(key):
  """Returns the random words of a key, before they become draws."""
  block = noise.Stream(key[None, None], jnp.zeros(1, jnp.uint32), (1,))
  return noise.words(block, 0, jnp.zeros(DRAWS), 'hash32')


def chi_score(counts):
  """Returns the chi-square of equally likely bins as a standard score.

  It uses the transformation of Wilson and Hilferty.
  """
  expected = counts.sum() / counts.size
  chi, free = ((counts - expected) ** 2 / expected).sum(), counts.size - 1
  return ((chi / free) ** (1 / 3) - 1 + 2 / (9 * free)) / math.sqrt(
      2 / (9 * free))


def largest(n):
  """Returns the typical size of the largest of n absolute standard scores."""
  return NormalDist().inv_cdf(1 - 0.5 / n / 2) if n > 1 else 0.67


class Totals:
  """Accumulates statistics of one distribution over keys."""

  def __init__(self, name):
    self.name, self.n, self.auto = name, 0, 0.0
    self.moments, self.tails = np.zeros(5), np.zeros(6)
    self.rows = []

  def see(self, z):
    """Adds the draws of one key."""
    self.n += z.size
    self.moments += [(z**p).sum() for p in range(5)]
    self.tails += [(np.abs(z) > k).sum() for k in range(1, 7)]
    power = np.abs(np.fft.rfft(z.astype(np.float64), 2 * z.size)) ** 2
    self.auto = self.auto + power
    self.rows.append(z.astype(np.float32))

  def lags(self):
    """Returns scores of the autocorrelation at lags 1 to 2**21."""
    sums = np.fft.irfft(self.auto)[1:DRAWS // 2]
    pairs = KEYS * (DRAWS - np.arange(1, DRAWS // 2))
    return sums / np.sqrt(pairs)

  def between(self):
    """Returns scores of the correlations between the draws of any two keys."""
    z = np.stack(self.rows)
    gram = sum(z[:, i:i + 2**18] @ z[:, i:i + 2**18].T
               for i in range(0, DRAWS, 2**18))
    return gram[np.triu_indices(KEYS, 1)] / math.sqrt(DRAWS)


def quality():
  """Returns the table of quality, and the number of draws."""
  normal, signs = Totals('normal'), Totals('rademacher')
  top, low, pair = (np.zeros(2**16, np.int64) for _ in range(3))
  bits = np.zeros((33, 33))
  draw = jax.jit(lambda w, d: KINDS[d]().draw(w), static_argnums=1)
  began = time.perf_counter()
  for i, key in enumerate(related_keys()):
    words = words_of(key)
    normal.see(np.asarray(draw(words, 'normal'), np.float64))
    signs.see(np.asarray(draw(words, 'rademacher'), np.float64))
    words = np.asarray(words)
    top += np.bincount(words >> 16, minlength=2**16)
    low += np.bincount(words & 0xFFFF, minlength=2**16)
    pair += np.bincount((words[:-1] >> 24 << 8) | (words[1:] >> 24),
                        minlength=2**16)
    some = words[:2**18]
    plane = np.concatenate([
        ((some[:, None] >> np.arange(32, dtype=np.uint32)) & 1) * 2.0 - 1,
        np.ones((some.size, 1))], 1).astype(np.float32)
    bits += plane.T @ plane
    if i % 32 == 31:
      print(f'{i + 1} of {KEYS} keys, {time.perf_counter() - began:.0f} s')
  rows = []
  def line(what, scores):
    scores = np.atleast_1d(scores)
    rows.append({'what': what, 'scores': scores.size,
                 'largest': float(np.abs(scores).max()),
                 'expected of chance': largest(scores.size)})
  n = normal.n
  mean, second, third, fourth = normal.moments[1:] / n
  line('normal: mean, variance, skewness, kurtosis', [
      mean * math.sqrt(n), (second - 1) * math.sqrt(n / 2),
      third * math.sqrt(n / 15), (fourth - 3) * math.sqrt(n / 96)])
  p = np.array([math.erfc(k / math.sqrt(2)) for k in range(1, 7)])
  line('normal: draws beyond 1 to 6 standard deviations',
       (normal.tails - n * p) / np.sqrt(n * p * (1 - p)))
  line('normal: correlation at each lag up to 2**21', normal.lags())
  line('normal: correlation of two keys (layers, steps, single bits)',
       normal.between())
  line('signs: mean', signs.moments[1] / math.sqrt(n))
  line('signs: correlation at each lag up to 2**21', signs.lags())
  line('signs: correlation of two keys (layers, steps, single bits)',
       signs.between())
  line('words: chi-square of the upper and of the lower 16 bits',
       [chi_score(top), chi_score(low)])
  line('words: chi-square of neighbours (8 bits each)', chi_score(pair))
  line('words: every bit, and every two bits (2**26 draws)',
       bits[np.triu_indices(33, 1)] / math.sqrt(KEYS * 2**18))
  return rows, n


def main():
  costs = [{'what': 'jax.random.normal', **cost_of_jax_random()}]
  costs += [{'what': f'{d}, {g}', **cost(KINDS[d](g))}
            for g in noise.GENERATORS
            for d in ('normal', 'rademacher', 'low_rank')]
  rows, n = quality()
  harness.write('noise', harness.header(), [
      ('Cost of `w += c * z`, float32, in place:', costs),
      (f'Quality of hash32, {n:.3g} draws of each distribution:', rows)])


if __name__ == '__main__':
  main()
