"""Times the compilation of an unrolled model's step and of its gradient.

  python benchmarks/compile_time.py [LAYERS ...]

The model is a Linen transformer with a Python loop over its layers. For each
number of layers, two programs are compiled: `jax.grad` of the loss, and a
donated step of `mezo` and `apply_updates`. The table has the CPU seconds of all
threads to trace, lower and compile them (other processes disturb these less
than elapsed time), the lines of the compiled program, and its distinct kernels,
each of which XLA:CPU compiles once. Ratios are within one run. Without
arguments it writes benchmarks/results/compile_time.md.
"""

import os
import re
import sys

from flax import linen as nn
import harness
import jax
import jax.numpy as jnp
import optax

import mezo_jax

WIDTH, VOCABULARY = 128, 1000


class Block(nn.Module):
  """Applies attention and feed-forward."""

  @nn.compact
  def __call__(self, x):
    h = nn.LayerNorm()(x)
    x = x + nn.MultiHeadDotProductAttention(num_heads=4)(h)
    h = nn.Dense(4 * WIDTH)(nn.LayerNorm()(x))
    return x + nn.Dense(WIDTH)(nn.gelu(h))


class Unrolled(nn.Module):
  """Applies blocks in a Python loop, with a tied head."""

  layers: int

  @nn.compact
  def __call__(self, ids):
    embed = nn.Embed(VOCABULARY, WIDTH)
    x = embed(ids)
    for i in range(self.layers):
      x = Block(name=f'layers_{i}')(x)
    return embed.attend(nn.LayerNorm()(x))


def distinct_kernels(hlo: str) -> int:
  """Returns the number of different fusions of a compiled program."""
  bodies = [part.split('\n', 1)[1] for part in hlo.split('\n\n')
            if part.startswith('%fused') and '\n' in part]
  names = re.compile(r', metadata=\{[^}]*\}|%[\w.\-]+')
  return len({names.sub('', body) for body in bodies})


def measured(fn, *args, **kwargs) -> dict:
  """Returns the seconds to compile a function, and the size of the program."""
  seconds = lambda: sum(os.times()[:2])
  began = seconds()
  traced = jax.jit(fn, **kwargs).trace(*args)
  at_traced = seconds()
  lowered = traced.lower()
  at_lowered = seconds()
  text = lowered.compile().as_text()
  return {'trace': at_traced - began, 'lower': at_lowered - at_traced,
          'compile': seconds() - at_lowered, 'lines': len(text.splitlines()),
          'kernels': distinct_kernels(text)}


def row(layers: int) -> dict:
  """Returns a row of the table."""
  model, ids = Unrolled(layers), jnp.zeros((2, 8), jnp.int32)
  params = jax.eval_shape(model.init, jax.random.key(0), ids)['params']

  def loss_fn(params, ids):
    logits = model.apply({'params': params}, ids)
    return optax.softmax_cross_entropy_with_integer_labels(logits, ids).mean()
  tx = mezo_jax.mezo(1e-6, key=0)

  def step(params, state, ids):
    updates, state = tx.update(None, state, params, value_fn=loss_fn, ids=ids)
    return optax.apply_updates(params, updates), state

  gradient = measured(jax.grad(loss_fn), params, ids)
  ours = measured(step, params, jax.eval_shape(tx.init, params), ids,
                  donate_argnums=(0, 1))
  total = lambda of: of['trace'] + of['lower'] + of['compile']
  return {'layers': layers,
          **{f'gradient: {k}': v for k, v in gradient.items()},
          **{f'step: {k}': v for k, v in ours.items()},
          'step / gradient': round(total(ours) / total(gradient), 2)}


def main():
  wanted = [*map(int, sys.argv[1:])]
  row(1)  # Initialises what a process initialises only once.
  rows = [row(layers) for layers in wanted or (4, 8, 16, 32)]
  head = harness.header('compiling unrolled layers', *sys.argv[1:])
  tables = [('CPU seconds, lines of HLO and distinct kernels:', rows)]
  if wanted:
    print(harness.markdown(head, tables))
  else:
    harness.write('compile_time', head, tables)


if __name__ == '__main__':
  main()
