"""Compares `mezo_jax.models.generate` with transformers' ``generate``.

  python benchmarks/generate.py

SmolLM2-135M in float32, greedy, with 32 tokens of prompt and 64 new ones, in
JAX and in PyTorch on the same weights. No token ends a row. The runs of the two
libraries alternate, and their tokens are compared.

Writes benchmarks/results/generate.md and generate.json. Takes 4 minutes on 2
CPU cores.
"""

from pathlib import Path
import tempfile
import time

import harness
import numpy as np
import torch
from transformers import AutoModelForCausalLM

from mezo_jax import models
from mezo_jax.tasks import quickstart_data

TOKENS, NEW, ROUNDS = 32, 64, 7


def main():
  model, params = models.load(quickstart_data.model_path())
  with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / 'model'
    models.save(path, model, params)
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
  # Their `min_new_tokens` would instead forbid the end token, which changes
  # what follows.
  theirs.generation_config.eos_token_id = None
  rows = []
  for batch in (1, 8, 32):
    ids = np.random.RandomState(batch).randint(
        1000, model.config.vocab_size, (batch, TOKENS))
    def ours(ids=ids):
      return np.asarray(models.generate(
          model, params, ids, max_new_tokens=NEW))
    def torchs(ids=ids):
      with torch.no_grad():
        return theirs.generate(
            torch.tensor(ids), attention_mask=torch.ones_like(
                torch.tensor(ids)), max_new_tokens=NEW, do_sample=False,
            pad_token_id=0).numpy()[:, TOKENS:]
    equal = np.mean(ours() == torchs())
    found = {ours: [], torchs: []}
    for _ in range(ROUNDS):
      for run, times in found.items():
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    ratio = np.median(found[torchs]) / np.median(found[ours])
    rows.append({
        'rows': batch, 'generate, s': harness.median_range(found[ours]),
        'transformers, s': harness.median_range(found[torchs]),
        'theirs / ours': f'{ratio:.2f}',
        'equal tokens, %': f'{100 * equal:.1f}'})
  harness.write('generate', harness.header(
      f'torch {torch.__version__}, {torch.get_num_threads()} threads, float32, '
      f'{ROUNDS} rounds'), [
          (f'SmolLM2-135M, {TOKENS} tokens and {NEW} new ones', rows)])


if __name__ == '__main__':
  main()
