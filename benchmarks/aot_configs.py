"""Do the configs of the paper's tables compile at their real sizes?

  pip install -e '.[aot]' && python benchmarks/aot_configs.py

Each program of configs/opt.py, opt_f1.py, roberta.py and glue.py is traced with
abstract weights of the real model and with batches that `encode` makes of a
made-up row, and compiled for a described TPU (generation on a metric, which
calls back to the host, for this CPU). Nothing is run. Writes
benchmarks/results/aot_configs.md.
"""

import os
import sys

os.environ.update(
    JAX_PLATFORMS='cpu', TPU_SKIP_MDS_QUERY='1', TPU_LIBRARY_LOG_LEVEL='3',
    TPU_ACCELERATOR_TYPE='v5litepod-4', TPU_WORKER_HOSTNAMES='localhost',
    ALLOW_MULTIPLE_LIBTPU_LOAD='1', TF_CPP_MIN_LOG_LEVEL='3')

from pathlib import Path
import runpy
import time

from mezo_jax import build, checks, data, models, sharding
from mezo_jax import config as config_lib
from mezo_jax.step import make_step

ROOT = Path(__file__).parents[1]
OPT = {  # width, layers, heads
    'facebook/opt-13b': (5120, 40, 40), 'facebook/opt-30b': (7168, 48, 56),
    'facebook/opt-66b': (9216, 64, 72)}
# Config, its argument, other model, topology, (data, fsdp, tensor), tokens.
CASES = [
    ('roberta', 'mnli,512,100', '', 'v5p:1x1x1', (1, 1, 1), 256),
    ('glue', 'mnli', '', 'v5p:1x1x1', (1, 1, 1), 128),
    ('roberta', 'sst2,512,13,prefix', '', 'v5p:1x1x1', (1, 1, 1), 128),
    ('opt', 'sst2', '', 'v5p:1x1x1', (1, 1, 1), 64),
    ('opt', 'sst2,lora', '', 'v5p:1x1x1', (1, 1, 1), 64),
    ('opt', 'squad,prefix', '', 'v5p:1x1x1', (1, 1, 1), 512),
    ('opt', 'sst2', 'facebook/opt-30b', 'v5p:1x1x1', (1, 1, 1), 64),
    ('opt_f1', '', '', 'cpu', (1, 1, 1), 512),
    ('opt', 'squad', 'facebook/opt-66b', 'v5e:4x4', (1, 4, 4), 512),
]


def model_config(name: str) -> models.Config:
  """What the ``config.json`` of the paper's models says."""
  if name in OPT:
    width, layers, heads = OPT[name]
    return models.read_config(dict(
        model_type='opt', vocab_size=50272, hidden_size=width,
        ffn_dim=4 * width, num_hidden_layers=layers, num_attention_heads=heads,
        max_position_embeddings=2048, word_embed_proj_dim=width))
  assert name == 'FacebookAI/roberta-large', name
  return models.read_config(dict(
      model_type='roberta', vocab_size=50265, hidden_size=1024,
      intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
      max_position_embeddings=514, type_vocab_size=1, pad_token_id=1,
      layer_norm_eps=1e-5))


def load_config(name: str, argument: str, model: str) -> config_lib.Train:
  get = runpy.run_path(str(ROOT / 'configs' / f'{name}.py'))['get_config']
  config = get(argument) if argument else get()
  if model:
    config.model.name = model
  checks.check(config)
  return config


def tokenizer_of(config: config_lib.Train):
  """A word-level stand-in for the real model's tokenizer."""
  from tokenizers import models as parts
  from tokenizers import pre_tokenizers, processors, Tokenizer
  from transformers import PreTrainedTokenizerFast
  words = ('<s>', '<pad>', '</s>', '<unk>', '<mask>',
           *(w.strip() for w in config.task.label_words))
  raw = Tokenizer(parts.WordLevel(
      {w: i for i, w in enumerate(dict.fromkeys(words))}, unk_token='<unk>'))
  raw.pre_tokenizer = pre_tokenizers.Whitespace()
  raw.post_processor = processors.TemplateProcessing(
      single='<s> $A </s>' if config.task.masked else '<s> $A',
      pair='<s> $A </s> $B </s>', special_tokens=[('<s>', 0), ('</s>', 2)])
  return PreTrainedTokenizerFast(
      tokenizer_object=raw, bos_token='<s>', eos_token='</s>',
      pad_token='<pad>', unk_token='<unk>', mask_token='<mask>')


def row_of(config: config_lib.Train) -> dict:
  """A row that fits the task, already prepared."""
  row = {name: 'some words' for name in (
      'sentence', 'text', 'premise', 'hypothesis', 'passage', 'question',
      'title', 'context', 'paragraph', 'answer', 'word', 'sentence1',
      'sentence2', 'span1_text', 'span2_text', 'first', 'second')}
  names = config.task.label_names
  return row | {
      'choices': ['this', 'that one'], 'answers': ['an answer'],
      'connective': 'so', config.task.label_column: names[0] if names else 0}


def lower(config: config_lib.Train, mesh, tokens: int):
  """The programs of a config's training step, lowered for a mesh of described
  devices."""
  rows = [row_of(config)] * config.data.batch_size
  built = build.build(
      config, abstract=True, model_config=model_config(config.model.name),
      tokenizer=tokenizer_of(config), rows=data.Rows(rows, rows, rows, rows),
      mesh=mesh, say=lambda text: None)
  batch = build.batch_shapes(built.splits.train, tokens, len(rows), mesh)
  return make_step(built.tx, built.loss_fn, mesh=mesh).lower(
      built.params, built.opt_state, batch, built.frozen)


def main():
  import aot
  import harness
  table = []
  for name, argument, other, topology, sizes, tokens in CASES:
    config, began = load_config(name, argument, other), time.time()
    mesh = (sharding.make_mesh() if topology == 'cpu'
            else aot.mesh_of(topology, sizes))
    found = [x.compile().memory_analysis() for x in lower(config, mesh, tokens)]
    total = max(map(harness.held, found))
    table.append({
        'config': f'{name}.py' + (f':{argument}' if argument else ''),
        'model': config.model.name.split('/')[-1],
        'objective': config_lib.objective(config),
        'trained': config.peft.method or 'all',
        'batch': f'{config.data.batch_size} x {tokens}',
        'dtype': config.model.dtype, 'compiled for': topology,
        'GiB a device': round(total / 2**30, 2),
        'kept in place': round(found[-1].alias_size_in_bytes / 2**30, 2),
        'seconds': round(time.time() - began)})
    harness.write('aot_configs', harness.header(), [
        ('One training step of each, compiled ahead of time:', table)])


if __name__ == '__main__':
  sys.path.insert(0, str(ROOT))
  main()
