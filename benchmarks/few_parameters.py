"""Measures accuracy and cost of parameter-efficient fine-tuning with MeZO.

  python benchmarks/few_parameters.py [WORKDIR]

It runs configs/peft_suite.py; runs that WORKDIR already has are not repeated.
On the same model it times a MeZO step of each method, relative to two forward
passes of the same program without noise, and to two perturbations and an update
alone. The three alternate. Writes benchmarks/results/few_parameters.md and
.json.
"""

import functools
from pathlib import Path
import sys

import harness
import jax
import jax.numpy as jnp
import numpy as np

import mezo_jax
from mezo_jax import models, peft
from mezo_jax.cli import suite
from mezo_jax.tasks import quickstart_data

ROOT = Path(__file__).parents[1]
ROWS, TOKENS, ROUNDS = 16, 32, 10
NAMES = {'zero_shot': 'zero-shot', 'mezo': 'MeZO, most parameters',
         'lora': 'MeZO, LoRA', 'prefix': 'MeZO, prefix',
         'lora_adam': 'Adam, LoRA'}


def results(workdir: Path) -> list[dict]:
  """Returns a row for each method: its test accuracy over seeds."""
  _, failed = suite.run(ROOT / 'configs' / 'peft_suite.py', workdir)
  if failed:
    raise RuntimeError(f'{", ".join(failed)} failed.')
  sys.path.insert(0, str(ROOT))
  from configs import peft_suite
  table, found = [], {}
  for name in peft_suite.get_suite():
    result = suite.read_result(workdir / name)
    found.setdefault(name.split('/')[1], []).append(result)
  for method, label in NAMES.items():
    some = found[method]
    scores = np.array([100 * r['final']['accuracy'] for r in some])
    table.append({
        'method': label, 'trained': some[0].get('trained', 0),
        'forwards of 16': some[0]['forwards'],
        'test accuracy, %': f'{scores.mean():.1f}',
        'of each seed': ', '.join(f'{s:.1f}' for s in scores),
        'calibrated, %': ', '.join(
            f'{100 * r["final"]["calibrated_accuracy"]:.1f}' for r in some),
        'seconds': round(np.mean([r['seconds'] for r in some])),
        'GiB': f'{np.mean([r["peak_memory"] for r in some]) / 2**30:.2f}'})
  return table


def times() -> list[dict]:
  """Returns a row for each method: the time of a step and of its parts."""
  model, params = models.load(quickstart_data.model_path(), dtype='float32')
  key = jax.random.key(0)
  loss_fn = harness.classification_loss(model)
  ids = jax.random.randint(key, (ROWS, TOKENS), 0, model.config.vocab_size)
  return [
      time_of(name, loss_fn, *peft.split(peft.join(params, more), mask), ids)
      for name, more, mask in (
          ('all', {}, None),
          ('LoRA', peft.lora.init(params, key), peft.TRAINED['lora']),
          ('prefix', peft.prefix.init(model, params, key),
           peft.TRAINED['prefix']))]


def time_of(name, loss_fn, trainable, frozen, ids) -> dict:
  """Returns a row with the times of one method."""
  tx = mezo_jax.mezo(1e-9, 1e-3, key=0)
  trainable = jax.tree.map(jnp.copy, trainable)  # The step donates them.
  state = tx.init(trainable)

  step = mezo_jax.make_step(tx, loss_fn)

  @jax.jit
  def forwards(trainable, frozen, ids):
    return jax.lax.map(lambda ids: loss_fn(peft.join(trainable, frozen), ids),
                       jnp.stack([ids, ids]))

  @functools.partial(jax.jit, donate_argnums=0)
  def move(trainable, key):
    return mezo_jax.displace(
        trainable, mezo_jax.Displacement(key, 1e-9))

  seconds = {'step': [], 'forwards': [], 'move': []}
  for i in range(ROUNDS + 2):
    s, (trainable, state, _) = harness.timed(
        step, trainable, state, ids, frozen)
    f, _ = harness.timed(forwards, trainable, frozen, ids)
    m, trainable = harness.timed(move, trainable, jax.random.key(i))
    if i >= 2:  # The first rounds compile.
      for kind, value in (('step', s), ('forwards', f), ('move', m)):
        seconds[kind].append(value)
  take = {kind: np.median(values) for kind, values in seconds.items()}
  return {
      'trained': name,
      'parameters': f'{sum(x.size for x in jax.tree.leaves(trainable)):,}',
      'step, ms': round(1e3 * take['step']),
      'step / two forwards': harness.median_range(
          np.array(seconds['step']) / np.array(seconds['forwards'])),
      'two perturbations and an update / step':
          f'{300 * take["move"] / take["step"]:.2f} %'}


def main():
  workdir = Path(sys.argv[1] if len(sys.argv) > 1 else 'runs/peft_suite')
  cost = times()
  head = harness.header('SmolLM2-135M, float32')
  harness.write('few_parameters', head, [
      ('A step of 16 x 32 tokens, normal z:', cost),
      ("The quickstart's reviews, 200 test rows, mean of seeds 0 and 1:",
       results(workdir))])


if __name__ == '__main__':
  main()
