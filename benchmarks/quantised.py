"""Measures memory and accuracy of training with quantised weights.

  python benchmarks/quantised.py [--runs DIR]

The memory is that of SmolLM2-135M's shape with 16 x 32 tokens, by the compiler,
relative to float32 inference. For the accuracy, the quickstart's last layer is
trained for 4,000 steps, with floats and with quantised weights, and two seeds;
everything else is as in its config. The table has the loss and accuracy on test
data before and after.

Runs are kept in DIR, and finished ones are not repeated. Writes
benchmarks/results/quantised.md and .json. Takes 30 minutes on 2 CPU cores.
"""

import argparse
from pathlib import Path
import sys
import tempfile

import harness
import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).parents[1]))

from configs import quickstart  # noqa: E402
import mezo_jax  # noqa: E402
from mezo_jax import models, variants
from mezo_jax.planning import compiled
from mezo_jax.runs.workdir import read_result
from mezo_jax.training.config import Peft
import train  # noqa: E402

SEEDS, STEPS = (0, 1), 4000
RUNS = {  # {name: (dtype, method, apply_every[, learning rate])}
    'float': ('float32', 'mezo', 1),
    'int8_mezo': ('int8', 'mezo', 1),
    'int8_quzo': ('int8', 'quzo', 1),
    'int8_fold': ('int8', 'mezo', 16),
    'int8_quzo_fold': ('int8', 'quzo', 16),
    'codes_fold': ('codes', 'mezo', 16),
    'int8_qzo': ('int8', 'qzo', 1, 2e-2),
    'codes_qzo': ('codes', 'qzo', 1, 2e-2),
}


def memory() -> list[dict]:
  """Returns the table of memory."""
  config = harness.SHAPES['SmolLM2-135M']
  model = models.Transformer(config)
  loss_fn = harness.classification_loss(model)
  ids = jax.ShapeDtypeStruct((16, 32), jnp.int32)

  peak = lambda program: compiled.held(program.memory_analysis())
  rows, base = [], None
  for dtype in ('float32', 'int8', 'int4'):
    params = models.param_shapes(config, dtype=dtype)
    weights = harness.nbytes(jax.tree.leaves(params))
    inference = peak(jax.jit(mezo_jax.dequantized(
        lambda p, ids: jnp.mean(loss_fn(p, ids)))).lower(params, ids).compile())
    base = base or (weights, inference)
    for name, make in (('mezo', mezo_jax.spsa), ('quzo', variants.quzo)):
      if dtype == 'float32' and name == 'quzo':
        continue
      tx = mezo_jax.mezo(1e-6, estimator=make(key=0))
      step = mezo_jax.make_step(tx, loss_fn)
      step.compile(params, jax.eval_shape(tx.init, params), ids)
      losses, update = map(peak, step.compiled.values())
      rows.append({
          'dtype': dtype, 'method': name,
          'weights / float32': f'{weights / base[0]:.3f}',
          'inference': f'{inference / base[1]:.3f}',
          'losses of a step': f'{losses / base[1]:.3f}',
          'its update': f'{update / base[1]:.3f}'})
  return rows


def learned(folder: Path) -> list[dict]:
  """Returns the table of losses and accuracies; runs are kept in a folder."""
  rows = []
  for name, (dtype, method, every, *rate) in RUNS.items():
    results = []
    for seed in SEEDS:
      config = quickstart.get_config()
      config.model.dtype, config.method, config.seed = dtype, method, seed
      config.spsa.apply_every = every
      if rate:
        config.peft = Peft(mask='^last_layers/', num_layers=1)
        config.spsa.eps, (config.optimizer.learning_rate,) = 1e-2, rate
      config.steps, config.eval_every = STEPS, 1000
      where = folder / f'{name}_{seed}'
      results.append(read_result(where) or train.run(config, where))
    percent = lambda x: f'{100 * x["accuracy"]:.1f}'
    before = results[0]['zero_shot']
    rows.append({
        'dtype': dtype, 'method': method, 'apply_every': every,
        'before: loss': f'{before["loss"]:.3f}',
        'before: accuracy, %': percent(before),
        'after: loss': ', '.join(f'{r["final"]["loss"]:.3f}' for r in results),
        'after: accuracy, %': ', '.join(percent(r['final']) for r in results)})
  return rows


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument('--runs')
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    tables = [
        ("Memory, SmolLM2-135M's shape, 16 x 32 tokens, over float32 "
         'inference:', memory()),
        (f"The quickstart's last layer, {STEPS} steps, seeds {SEEDS}:",
         learned(Path(args.runs or folder)))]
  harness.write('quantised', harness.header(), tables)


if __name__ == '__main__':
  main()
