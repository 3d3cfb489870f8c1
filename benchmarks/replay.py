"""Measures whether replaying logs gives the same weights, and how fast it is.

  python benchmarks/replay.py [small] [real]

small: 2,000 steps of MeZO and its variants on a model of 0.2M parameters.
real: 200 steps of the quickstart's SmolLM2-135M. All parameters are trained, in
bfloat16 with stochastic rounding, weight decay, a schedule and skipped steps.

Each run writes its log to a file. The log is read and replayed by a step that
has no loss function, and the SHA-256 of both results are compared. Writes
benchmarks/results/replay_NAME.md and .json for each. Takes 25 minutes on 2 CPU
cores.
"""

import hashlib
from pathlib import Path
import sys
import tempfile
import time

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax

import mezo_jax
from mezo_jax import models, peft, variants
from mezo_jax.core import paths
from mezo_jax.runs import replay
from mezo_jax.tasks import quickstart_data
from mezo_jax.transforms.step import field

LINEAR = optax.linear_schedule(1e-3, 0.0, 2000)
SMALL = {  # {name: (optimizer, dtype, pattern of the trained parameters)}
    'MeZO, float32': (lambda: mezo_jax.mezo(LINEAR, key=0), 'float32', None),
    'MeZO, bfloat16, decay': (lambda: mezo_jax.mezo(
        LINEAR, key=0, weight_decay=0.1, decay='kernel'), 'bfloat16', None),
    'LoRA': (lambda: mezo_jax.mezo(LINEAR, 1e-2, key=0), 'float32',
             peft.TRAINED['lora']),
    'FZOO, 8 directions': (lambda: harness.mezo(
        LINEAR, key=0, directions='rademacher', num_samples=8,
        combine=mezo_jax.fzoo), 'float32', None),
    'rank 4, 16 directions in a batch': (lambda: harness.mezo(
        LINEAR, key=0, directions=mezo_jax.LowRank(rank=4), num_samples=16,
        over='rows'), 'float32', None),
    'LOZO': (lambda: mezo_jax.mezo(
        LINEAR, key=0, directions=mezo_jax.LazyLowRank(rank=2, every=50),
        apply_every=50), 'float32', None),
    'SVRG': (lambda: variants.svrg(
        LINEAR, key=0, every=4, anchor_learning_rate=LINEAR), 'bfloat16', None),
    'QuZO, int8': (lambda: harness.mezo(
        1e-3, 1e-2, key=0, estimator=variants.quzo), 'int8', None),
}


def digest(tree) -> str:
  """Returns the SHA-256 of all leaves of a tree and their paths."""
  out = hashlib.sha256()
  for path, x in paths.named_leaves(tree):
    for array in jax.tree.leaves(x):
      out.update(path.encode() + np.asarray(array).tobytes())
  return out.hexdigest()


def compare(name, tx, value_fn, make, frozen, batch_of, steps) -> dict:
  """Trains, replays the same steps, and returns a row of the table.

  Args:
    name: Name of the run.
    tx: The optimizer.
    value_fn: The loss function.
    make: A function that returns a copy of the initial weights.
    frozen: Parameters that are not trained, or None.
    batch_of: A function that returns the batch of a step.
    steps: Number of steps.
  """
  step, params = mezo_jax.make_step(tx, value_fn), make()
  state = tx.init(params)
  n = field(state, 'projected_grad').size
  with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / 'steps.log'
    log, _ = replay.open_log(path, {}, n)
    step.compile(params, state, batch_of(1), frozen)
    began, spent = time.perf_counter(), 0.0
    for t in range(1, steps + 1):
      params, state, metrics = step(params, state, batch_of(t), frozen)
      g, value = jax.device_get((metrics['projected_grad'], metrics['loss']))
      before = time.perf_counter()
      log.append(t, g, value)
      spent += time.perf_counter() - before
    params, state = step.apply_accumulated(params, state)
    jax.block_until_ready(params)
    trained = time.perf_counter() - began
    want, skipped = digest(params), int(metrics['skipped'])
    log.close()
    size, found = path.stat().st_size, replay.read(path).steps
  del params, state
  again, params = mezo_jax.make_step(tx, None), make()
  state = tx.init(params)
  again._program(None, again._trace_update, params, state)
  began = time.perf_counter()
  params, state = again.apply_accumulated(
      *replay.rebuild(again, params, state, found))
  jax.block_until_ready(params)
  made = time.perf_counter() - began
  return {
      'run': name, 'steps': steps, 'skipped': skipped,
      'sha256': 'equal' if digest(params) == want else 'DIFFERENT',
      'bytes a step and direction': f'{size / steps / n:.1f}',
      'ms a step': f'{1000 * trained / steps:.2f}',
      'of that, writing': f'{1000 * spent / steps:.3f}',
      'made again': f'{1000 * made / steps:.2f}',
      'times as fast': f'{trained / made:.1f}'}


def small() -> list[dict]:
  """Returns the table of the small model, one row per kind of run."""
  table = []
  model = models.Transformer(harness.TINY)
  loss_fn = harness.classification_loss(model)
  ids = np.random.RandomState(0).randint(0, 1536, (64, 16, 32))
  for name, (make_tx, dtype, trained) in SMALL.items():
    params = harness.random_params(
        model, 'float32' if dtype == 'int8' else dtype)
    if trained:
      params = peft.join(params, peft.lora.init(params, jax.random.key(4)))
    if dtype == 'int8':
      params = paths.map_named(lambda path, x: mezo_jax.quantize(x) if (
          path.endswith('kernel')) else x, params)
    host, frozen = jax.device_get(peft.split(params, trained))
    copy = lambda host=host: jax.tree.map(jnp.array, host)
    table.append(compare(name, make_tx(), loss_fn, copy, frozen if (
        trained) else None, lambda t: ids[t % 64], 2000))
    print(table[-1], flush=True)
  return table


def real() -> list[dict]:
  """Returns the table of SmolLM2-135M, with one row."""
  model, params = models.load(
      quickstart_data.model_path(), dtype='bfloat16', progress=False)
  host, loss_fn = jax.device_get(params), harness.classification_loss(model)
  del params
  ids = np.random.RandomState(0).randint(0, 49152, (200, 16, 32))
  def value_fn(params, batch):
    return jnp.where(batch['lost'], jnp.nan, loss_fn(params, batch['ids']))
  batch_of = lambda t: {'ids': ids[t - 1], 'lost': np.full(16, t in (50, 120))}
  tx = mezo_jax.mezo(optax.linear_schedule(1e-6, 0.0, 200), key=0,
                     weight_decay=0.1, decay='kernel')
  copy = lambda: jax.tree.map(jnp.array, host)
  return [compare('SmolLM2-135M, bfloat16, 16 x 32 tokens', tx, value_fn, copy,
                  None, batch_of, 200)]


def main():
  for name, make in (('small', small), ('real', real)):
    if not sys.argv[1:] or name in sys.argv[1:]:
      began = time.time()
      table = make()
      harness.write(f'replay_{name}', harness.header(
          f'{time.time() - began:.0f} s in all'), [(f'{name}:', table)])


if __name__ == '__main__':
  main()
