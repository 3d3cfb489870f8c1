"""Compares ways to evaluate a layer of experts, on the backend that is here.

  python benchmarks/experts.py

Each way computes the outputs of the experts that tokens chose, for random
choices: by blocks of sorted tokens (what the library does), with
`jax.lax.ragged_dot` on sorted tokens, and with every expert on every token. The
time is the shortest of five calls. Writes benchmarks/results/experts.md and
.json.
"""

import time

import harness
import jax
import jax.numpy as jnp
import numpy as np

from mezo_jax.models import experts
from mezo_jax.models.layers import Config

# (width, width of an expert, experts, experts of each token, tokens)
CASES = [(512, 256, 16, 2, 512), (512, 256, 64, 8, 512),
         (1024, 512, 8, 2, 256), (512, 256, 64, 8, 16)]


def by_groups(config, x, chosen, kernels):
  """Returns what `experts.mixed` returns, by `jax.lax.ragged_dot`."""
  flat = chosen.reshape(-1)
  order = jnp.argsort(flat, stable=True)
  counts = jnp.zeros(config.num_experts, jnp.int32).at[flat].add(1)
  y = experts._by_groups(
      config, x, counts, order // chosen.shape[1], kernels)
  place = jnp.zeros_like(order).at[order].set(jnp.arange(len(flat)))
  return y[place].reshape(*chosen.shape, -1)


def by_all(config, x, chosen, kernels):
  """Returns what `experts.mixed` returns, with every expert on every token."""
  mine = jax.nn.one_hot(chosen, config.num_experts, axis=0, dtype=x.dtype)
  def one(total, of):
    some, mine = of
    return total + mine[..., None] * experts._mlp(config, x, some)[:, None], (
        None)
  start = jnp.zeros((*chosen.shape, x.shape[1]), x.dtype)
  return jax.lax.scan(one, start, (kernels, mine))[0]


WAYS = {'blocks': experts.mixed, 'ragged_dot': by_groups,
        'all experts': by_all}


def row_of(width, inner, count, per_token, tokens) -> dict:
  """Measures one case."""
  config = Config('olmoe', 64, width, inner, 1, 4, 4, width // 4, 64, 1e-5,
                  num_experts=count, experts_per_token=per_token)
  random = np.random.RandomState(0)
  make = lambda *shape: jnp.array(
      random.randn(*shape) / shape[-2]**0.5, jnp.float32)
  kernels = {'gate': make(count, width, inner), 'up': make(
      count, width, inner), 'down': make(count, inner, width)}
  x = make(tokens, width)
  chosen = jnp.array(
      np.argsort(random.rand(tokens, count), 1)[:, :per_token], jnp.int32)
  row: dict = {'width': width, 'inner width': inner, 'experts': count,
               'of each token': per_token, 'tokens': tokens}
  results = []
  for name, way in WAYS.items():
    program = jax.jit(lambda *args, way=way: way(config, *args)).lower(
        x, chosen, kernels).compile()
    results.append(np.asarray(program(x, chosen, kernels)))
    np.testing.assert_allclose(results[-1], results[0], atol=1e-3)
    seconds = []
    for _ in range(5):
      began = time.perf_counter()
      jax.block_until_ready(program(x, chosen, kernels))
      seconds.append(time.perf_counter() - began)
    temporaries = program.memory_analysis().temp_size_in_bytes
    row |= {f'{name}, ms': f'{1e3 * min(seconds):.1f}',
            f'{name}, MiB': f'{temporaries / 2**20:.1f}'}
  return row


def main():
  harness.write('experts', harness.header('float32'), [
      ('Time and temporaries of one layer', [row_of(*case) for case in CASES])])


if __name__ == '__main__':
  main()
