"""Compares an accelerator with the CPU of the same machine, in a minute.

  pip install -r requirements.txt 'jax[cuda13]' -e .
  python benchmarks/backends.py

It answers three questions, with a small model of random weights: whether the
directions z are the same on both; how far apart losses and projected gradients
are in each dtype, for all weights and for LoRA; and whether replaying the log
of a run gives bitwise the same weights on the accelerator. Writes
benchmarks/results/backends.md and .json.
"""

import functools

import harness
import jax
import jax.numpy as jnp
import numpy as np

import mezo_jax
from mezo_jax import models, peft

STEPS = 20
KINDS = {
    'Normal': mezo_jax.Normal(),
    "Normal, 'threefry2x32'": mezo_jax.Normal('threefry2x32'),
    'Rademacher': mezo_jax.Rademacher(),
    'LowRank(rank=4)': mezo_jax.LowRank(rank=4),
    'LazyLowRank(rank=4)': mezo_jax.LazyLowRank(rank=4),
    'SubZero(rank=4)': mezo_jax.SubZero(rank=4),
}
MODEL = models.Transformer(harness.TINY)
IDS = jnp.asarray(np.random.RandomState(0).randint(
    0, harness.TINY.vocab_size, (16, 32)), jnp.int32)


def on(device, fn, *args):
  """Returns the result of ``fn`` on a device, as NumPy arrays."""
  with jax.default_device(device):
    args = jax.device_put(args, device)
    return jax.tree.map(np.asarray, jax.jit(fn)(*args))


def directions(cpu, device) -> list[dict]:
  """Returns a row for each distribution that compares the elements of z."""
  like = {'a': jnp.zeros((300, 500)), 'layers': {'w': jnp.zeros((3, 64, 96))}}
  rows = []
  for name, kind in KINDS.items():
    def draw(params, kind=kind):
      step = mezo_jax.Displacement(jax.random.key(0), 1.0)
      return mezo_jax.direction(params, step, kind)
    here, there = (jax.tree.leaves(on(d, draw, like)) for d in (cpu, device))
    flat = lambda leaves: np.concatenate([x.ravel() for x in leaves])
    a, b = flat(here), flat(there)
    rows.append({
        'distribution': name, 'equal elements': f'{np.mean(a == b):.4%}',
        'largest difference': float(np.abs(a - b).max())})
  return rows


def weights(dtype):
  """Returns random weights of a dtype as NumPy arrays."""
  params = harness.random_params(MODEL)
  return jax.tree.map(lambda x: np.asarray(x.astype(dtype)), params)


def run(device, params, frozen=None, learning_rate=1e-4):
  """Trains for `STEPS` steps, then replays them from the projected gradients.

  Returns:
    (losses, projected gradients, the trained weights, the replayed ones).
  """
  loss_fn = harness.classification_loss(MODEL)
  tx = mezo_jax.mezo(learning_rate, key=0)
  with jax.default_device(device):
    step = mezo_jax.make_step(tx, loss_fn)
    ids = jax.device_put(IDS, device)
    start = functools.partial(jax.device_put, params, device)
    kept = None if frozen is None else jax.device_put(frozen, device)
    theta = start()
    state, losses, numbers = tx.init(theta), [], []
    for _ in range(STEPS):
      theta, state, metrics = step(theta, state, ids, kept)
      losses.append(float(metrics['loss']))
      numbers.append(np.asarray(metrics['projected_grad']))
    again = start()
    state = tx.init(again)
    for loss, g in zip(losses, numbers):
      again, state, _ = step.update(again, state, g, np.float32(loss))
  host = lambda tree: [np.asarray(x) for x in jax.tree.leaves(tree)]
  return np.asarray(losses), np.ravel(numbers), host(theta), host(again)


def far(a, b) -> float:
  """Returns the largest difference between two arrays."""
  return float(np.abs(a - b).max())


def same(a, b) -> str:
  """Returns 'yes' if all arrays are equal, else 'NO'."""
  return 'yes' if all(map(np.array_equal, a, b)) else 'NO'


def steps(cpu, device) -> list[dict]:
  """Returns a row for each dtype, with all weights trained and with LoRA."""
  rows = []
  for name in ('float32', 'bfloat16', 'float16'):
    params = weights(jnp.dtype(name))
    adapter = jax.tree.map(np.asarray, peft.lora.init(
        params, jax.random.key(1), rank=4))
    for what, args in (('all weights', (params,)),
                       ('LoRA', (adapter, params))):
      one, two = run(cpu, *args), run(device, *args)
      rows.append({
          'dtype': name, 'trained': what,
          'loss of step 1, CPU': float(one[0][0]),
          'largest difference of losses': far(one[0], two[0]),
          'of projected gradients': far(one[1], two[1]),
          'largest projected gradient': float(np.abs(one[1]).max()),
          'replay is bitwise equal': same(two[2], two[3])})
  return rows


def main():
  cpu, device = jax.devices('cpu')[0], jax.devices()[0]
  harness.write('backends', harness.header(), [
      ('z on the accelerator and on the CPU:', directions(cpu, device)),
      (f'{STEPS} steps of a model of two layers:', steps(cpu, device))])


if __name__ == '__main__':
  main()
