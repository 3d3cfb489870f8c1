"""Measures the memory of an unrolled model's step, by TPU and CUDA compilers.

  pip install -e '.[plan]'
  pip install jax-cuda12-plugin jax-cuda12-pjrt nvidia-cuda-nvcc-cu12
  python benchmarks/aot_unrolled.py

The CUDA packages must have the version of jax. The model has twelve pairs of
Dense layers in Linen, which are not scanned, and a tied head; bfloat16, 16 x 32
tokens. The table has the temporaries of the forward pass, and of a MeZO step in
one donated jit, relative to the bytes of the weights. Nothing is run. Writes
benchmarks/results/aot_unrolled.md and .json.
"""

import sys

from flax import linen as nn
import harness
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import mezo_jax
from mezo_jax.core import sharding
from mezo_jax.planning import machines

LAYERS, WIDTH, VOCAB, ROWS, TOKENS = 12, 1024, 16_000, 16, 32
TOPOLOGIES = ('v5p:1x1x1', 'a100:1')


class Model(nn.Module):
  """Applies pairs of Dense layers in a Python loop."""

  @nn.compact
  def __call__(self, ids):
    half = dict(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    embed = nn.Embed(VOCAB, WIDTH, **half)
    x = embed(ids)
    for i in range(LAYERS):
      h = nn.LayerNorm(**half, name=f'norm_{i}')(x)
      h = nn.gelu(nn.Dense(4 * WIDTH, **half, name=f'layers_{i}_up')(h))
      x = x + nn.Dense(WIDTH, **half, name=f'layers_{i}_down')(h)
    return embed.attend(x[:, -1]).astype(jnp.float32)


def measure(topology: str) -> dict:
  """Returns a row of the table, compiled for one device."""
  place = NamedSharding(sharding.make_mesh(
      devices=machines.devices(topology)), P())
  put = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=place), tree)
  model, ids = Model(), jnp.zeros((ROWS, TOKENS), jnp.int32)
  params = put(jax.eval_shape(model.init, jax.random.key(0), ids)['params'])
  loss_fn = lambda p, ids: jnp.mean(model.apply({'params': p}, ids) ** 2)
  weights = harness.nbytes(params)
  over = lambda lowered: (lowered.compile().memory_analysis()
                          .temp_size_in_bytes / weights)
  row = {'compiled for': topology, 'forward': over(
      jax.jit(loss_fn).lower(params, put(ids)))}
  for z in ('normal', 'rademacher'):
    tx = mezo_jax.mezo(1e-3, key=0, directions=z)
    programs = mezo_jax.make_step(tx, loss_fn).lower(
        params, put(jax.eval_shape(tx.init, params)), put(ids))
    row[f'step, {z} z'] = max(map(over, programs))
  return row


def main():
  jax.config.update('jax_platforms', 'cpu')
  rows = []
  for topology in sys.argv[1:] or TOPOLOGIES:
    rows.append(measure(topology))
    print(rows[-1], flush=True)
  if not sys.argv[1:]:
    harness.write('aot_unrolled', harness.header(
        f'{LAYERS} unrolled pairs of width {WIDTH}', 'nothing was run'),
                  [('Temporaries over weights:', rows)])


if __name__ == '__main__':
  main()
