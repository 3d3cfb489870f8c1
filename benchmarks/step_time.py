"""Times a MeZO step against two forward passes, and against PyTorch.

  python benchmarks/step_time.py            # against two forward passes
  python benchmarks/step_time.py --torch    # and PyTorch (torch, transformers)
  python benchmarks/step_time.py --forms    # low rank, one pass, accumulated

Within one process, two forward passes and a step of each kind alternate (and,
at 512 tokens per batch, a step of PyTorch). The table has the median and range
of the ratios within a round. Weights are random. The loss is that of two label
words at the last token, or the next-token cross-entropy at all tokens (LM).

The second table is the work of train.py on the host for one step: making the
batch, putting it on the device, and reading and writing the metrics. It
overlaps with the previous step; its share is the most that could be gained by
removing it.

The step in PyTorch is that of the original implementation: in place, seeded by
`torch.manual_seed`, with one call of `normal` per tensor, three perturbations
and an update, and with the logits of all positions. It uses the Hugging Face
model with the same weights and batch. For label words it is also timed with the
logits of the last position alone, as in this library; the original does not do
that. Writes benchmarks/results/step_time.md and .json.

`--forms` times all forms of a step on one shape, as means of 8 steps, over
which updates may be accumulated. It writes step_forms.md and .json.
"""

import functools
from pathlib import Path
import sys
import tempfile
import time

import harness
import jax
import numpy as np

import mezo_jax
from mezo_jax import models
from mezo_jax.core import sharding
from mezo_jax.runs import loggers
from mezo_jax.tasks import data, encode

ROUNDS = 5
SHAPES = ('OPT-125M', 'SmolLM2-135M')
CASES = (('label', 16, 32), ('LM', 8, 64), ('label', 16, 128))  # rows, tokens
NOISE = ('normal', 'rademacher')
LR, EPS = 1e-7, 1e-3


def step_of(loss_fn, params, noise):
  """Returns (step, state) of MeZO with this distribution."""
  tx = mezo_jax.mezo(LR, EPS, key=0, directions=noise)
  return mezo_jax.make_step(tx, loss_fn), tx.init(params)


# --- the step of the original implementation, in PyTorch --------------------


def torch_shaped(config):
  """Returns the Hugging Face model of this shape, with random weights."""
  from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
  )
  c = config
  if c.family == 'opt':
    return OPTForCausalLM(OPTConfig(
        vocab_size=c.vocab_size, hidden_size=c.width, ffn_dim=c.ff_width,
        num_hidden_layers=c.num_layers, num_attention_heads=c.num_heads,
        word_embed_proj_dim=c.width, max_position_embeddings=c.max_length,
        dropout=0.0))
  return LlamaForCausalLM(LlamaConfig(
      vocab_size=c.vocab_size, hidden_size=c.width,
      intermediate_size=c.ff_width, num_hidden_layers=c.num_layers,
      num_attention_heads=c.num_heads, num_key_value_heads=c.num_kv_heads,
      head_dim=c.head_width, rope_theta=c.rope.theta,
      rms_norm_eps=c.norm_eps, tie_word_embeddings=c.tied_head))


def torch_model(config, params):
  """Returns the Hugging Face model with the weights ``params``."""
  import torch
  c, model = config, torch_shaped(config)
  named = dict(model.named_parameters())
  for row in models.FAMILIES[c.family].table(c):
    leaf = functools.reduce(lambda t, k: t[k], row.path.split('/'), params)
    swap = row.axes != row.layout.split('->')[0].replace(' ', '')
    for l in range(c.num_layers if row.stacked else 1):
      x = np.asarray(leaf[l] if row.stacked else leaf)
      named[row.name.format(l=l)].data = torch.tensor(x.T if swap else x)
  return model.eval()


def torch_step(model, ids, kind, keep=0):
  """Returns functions that take a MeZO step, and two forward passes.

  Args:
    model: A Hugging Face model.
    ids: Token ids [B, S].
    kind: The loss, 'LM' or 'label'.
    keep: Number of last positions whose logits are computed. Defaults to 0, for
      all positions.
  """
  import torch
  parameters = list(model.parameters())
  place = dict(device=parameters[0].device)
  ids = torch.tensor(np.asarray(ids), **place).long()
  words = torch.tensor(harness.LABEL_WORDS, **place)

  def loss():
    if kind == 'LM':
      return model(ids, labels=ids).loss
    logits = model(ids, logits_to_keep=keep).logits[:, -1, words]
    return torch.nn.functional.cross_entropy(logits.float(), ids[:, 0] % 2)

  def move(seed, scale):
    torch.manual_seed(seed)
    for p in parameters:
      z = torch.normal(mean=0, std=1, size=p.size(), dtype=p.dtype, **place)
      p.data.add_(z, alpha=scale)

  @torch.no_grad()
  def step(seed):
    move(seed, EPS)
    plus = loss()
    move(seed, -2 * EPS)
    minus = loss()
    move(seed, EPS)
    g = ((plus - minus) / (2 * EPS)).item()
    move(seed, -LR * g)
    return (plus.item() + minus.item()) / 2

  @torch.no_grad()
  def two_forwards(_):
    return (loss().item() + loss().item()) / 2
  return step, two_forwards


# --- the comparison ---------------------------------------------------------


def race(shape, kind, rows, tokens, with_torch):
  """Returns rows of the first table for one shape, loss and batch."""
  model = models.Transformer(harness.SHAPES[shape])
  make_loss = {'label': harness.classification_loss, 'LM': harness.lm_loss}
  loss_fn = make_loss[kind](model)
  params = harness.random_params(model)
  ids = jax.random.randint(jax.random.key(0), (rows, tokens), 4, 40_000)
  forward = jax.jit(loss_fn).lower(params, ids).compile()
  steps = {name: step_of(loss_fn, params, name) for name in NOISE}
  states = {name: state for name, (_, state) in steps.items()}
  seconds = {name: [] for name in ('two forwards', *NOISE)}
  if with_torch:
    other = torch_model(model.config, params)
    theirs = dict(zip(('torch', 'torch forwards'),
                      torch_step(other, ids, kind)))
    if kind == 'label':
      theirs |= dict(zip(('last', 'last forwards'),
                         torch_step(other, ids, kind, keep=1)))
    seconds |= {name: [] for name in theirs}
    ours = float(np.mean(forward(params, ids)))
    for name in [x for x in theirs if 'forwards' in x]:
      np.testing.assert_allclose(theirs[name](0), ours, rtol=1e-4)
  for i in range(ROUNDS + 1):
    took = {'two forwards': harness.timed(forward, params, ids)[0]
                            + harness.timed(forward, params, ids)[0]}
    for name, (step, _) in steps.items():
      took[name], (params, states[name], _) = harness.timed(
          step, params, states[name], ids)
    if with_torch:
      for name, fn in theirs.items():
        took[name], _ = harness.timed(fn, i)
    for name, value in took.items():
      if i:  # The first round warms up.
        seconds[name].append(value)
  over = lambda a, b: harness.median_range(
      np.array(seconds[a]) / np.array(seconds[b]))
  table = []
  for name in NOISE:
    row = {'shape': shape, 'batch': f'{rows} x {tokens}', 'loss': kind,
           'z': name,
           'step / two forwards': over(name, 'two forwards')}
    if with_torch:
      row['steps a second / PyTorch'] = over('torch', name)
      row['its step / its two forwards'] = over('torch', 'torch forwards')
    if 'last' in seconds:
      row['steps a second / PyTorch, last logits'] = over('last', name)
      row['that step / its two forwards'] = over('last', 'last forwards')
    print(row, flush=True)
    table.append(row)
  return table


def forms(shape='SmolLM2-135M', rows=16, tokens=32, rounds=3, steps=8):
  """Returns a row for each form of a step: its time over two forward passes.

  The time is the mean of ``steps`` steps. The forms alternate.
  """
  loss_fn = harness.classification_loss(
      models.Transformer(harness.SHAPES[shape]))
  params = harness.random_params(models.Transformer(harness.SHAPES[shape]))
  ids = jax.random.randint(jax.random.key(0), (rows, tokens), 4, 40_000)
  forward, runs, ratios = jax.jit(loss_fn), {}, {}
  for name, options in harness.MEZO.items():
    tx = harness.mezo(LR, EPS, key=0, **options)
    runs[name] = mezo_jax.make_step(tx, loss_fn), tx.init(params)

  def some(step, params, state):
    for _ in range(steps):
      params, state, _ = step(params, state, ids)
    return params, state
  for i in range(rounds + 1):
    for name, (step, state) in runs.items():
      two = sum(harness.timed(forward, params, ids)[0] for _ in range(2))
      took, (params, state) = harness.timed(some, step, params, state)
      runs[name] = step, state
      if i:  # The first round warms up.
        ratios.setdefault(name, []).append(took / steps / two)
  return [{'shape': shape, 'batch': f'{rows} x {tokens}', 'program': name,
           'step / two forwards': harness.median_range(found)}
          for name, found in ratios.items()]


def host_share(shape='SmolLM2-135M', rows=16, tokens=32, steps=50):
  """Returns the row of the second table: the work on the host per step."""
  model = models.Transformer(harness.SHAPES[shape])
  loss_fn = harness.classification_loss(model)
  params = harness.random_params(model)
  ids = jax.random.randint(jax.random.key(0), (rows, tokens), 4, 40_000)
  step, state = step_of(loss_fn, params, 'rademacher')
  step_seconds = []
  for _ in range(4):
    took, (params, state, seen) = harness.timed(step, params, state, ids)
    step_seconds.append(took)
  prompts, none = [[5] * (tokens - i % 8) for i in range(512)], [[]] * 512
  encoded = encode.Encoded(
      none, prompts, none, none, [(0,)] * 512, 0,
      read_at=np.array([len(p) - 1 for p in prompts]),
      token_ids=np.array(harness.LABEL_WORDS))
  mesh = sharding.make_mesh()
  with tempfile.TemporaryDirectory() as folder:
    metrics = loggers.Metrics(Path(folder), 0)
    batches = data.batches(encoded.lengths, (tokens,), rows, 0)
    began = time.perf_counter()
    for i, (length, index) in zip(range(steps), batches):
      batch = encode.batch_of(encoded, index, length, rows)
      jax.block_until_ready(sharding.put_batch(batch, mesh))
      values = jax.device_get(seen)
      metrics.write('train', i, loss=float(values['loss']), seconds=0.0)
    seconds = (time.perf_counter() - began) / steps
    metrics.close()
  return [{'shape': shape, 'batch': f'{rows} x {tokens}',
           'host a step, ms': seconds * 1e3,
           'step, ms': min(step_seconds) * 1e3,
           'share': f'{seconds / min(step_seconds):.2%}'}]


def main():
  if '--forms' in sys.argv:
    harness.write('step_forms', harness.header('float32, median and range'), [
        ('', forms())])
    return
  with_torch = '--torch' in sys.argv
  rows = [row for shape in SHAPES for case in CASES
          for row in race(shape, *case, with_torch and case != CASES[-1])]
  more = ['float32']
  if with_torch:
    import torch
    import transformers
    more += [f'PyTorch {torch.__version__} on {torch.get_num_threads()} '
             f'threads, transformers {transformers.__version__}']
  harness.write('step_time', harness.header(*more), [
      (f'Median and range of {ROUNDS} rounds:', rows),
      ('The host:', host_share())])


if __name__ == '__main__':
  main()
