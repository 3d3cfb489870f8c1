"""Fuzzes the readers of files with damaged inputs.

  python benchmarks/fuzz.py [--inputs 20000] [--kinds gguf,config,...]

Files of each kind are changed at random: bits are flipped, the end is cut off,
parts are copied, and words and numbers are replaced by unusual ones. Each file
is read in a child process with limits of 4 GiB and 20 seconds. It must be
accepted, or refused with one sentence (`InputError`). Anything else (another
exception, a hang, too much memory) is a fault and is printed. These formats
have no checksums of weights, so files with changed weights are accepted. Writes
benchmarks/results/fuzz.md and .json. Takes an hour on 2 CPU cores.
"""

import argparse
import collections
import json
import logging
import multiprocessing
from pathlib import Path
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback

import datasets
import harness
import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / 'tests'))

import conftest  # noqa: E402

import mezo_jax  # noqa: E402
from mezo_jax import models, peft
from mezo_jax.core.errors import InputError
from mezo_jax.models.formats import gguf as gguf_lib
from mezo_jax.runs import checkpoint, loggers, replay
from mezo_jax.tasks import (
  data,
  Task,  # noqa: E402
)
from mezo_jax.training import run_files
from mezo_jax.training.config import to_json, Train

WORD = re.compile(rb'-?\d+(\.\d+)?(e-?\d+)?|"[^"]*"|true|false|null')
SECONDS, MEMORY = 20, 4 * 2**30
WORDS = [b'null', b'-1', b'0', b'1e999', b'NaN', b'true', b'[]', b'{}', b'""',
         b'18446744073709551616', b'2147483648', b'"../../x"', b'0.5']


# --- the files --------------------------------------------------------------


def gguf_file(path: Path) -> None:
  """Writes a small GGUF file with a tokenizer."""
  import gguf
  writer = gguf.GGUFWriter(path, 'llama')
  writer.add_block_count(1)
  writer.add_embedding_length(32)
  writer.add_feed_forward_length(32)
  writer.add_context_length(64)
  writer.add_head_count(4)
  writer.add_head_count_kv(2)
  writer.add_layer_norm_rms_eps(1e-5)
  writer.add_tokenizer_model('gpt2')
  writer.add_tokenizer_pre('smollm')
  writer.add_token_list(['a', 'b', 'ab', '<s>'])
  writer.add_token_types([1, 1, 1, 3])
  writer.add_token_merges(['a b'])
  writer.add_bos_token_id(3)
  writer.add_eos_token_id(3)
  shapes = {'token_embd': (8, 32), 'output_norm': (32,)} | {
      f'blk.0.{k}': v for k, v in dict(
          attn_norm=(32,), ffn_norm=(32,), attn_q=(32, 32), attn_k=(16, 32),
          attn_v=(16, 32), attn_output=(32, 32), ffn_gate=(32, 32),
          ffn_up=(32, 32), ffn_down=(32, 32)).items()}
  for name, shape in shapes.items():
    writer.add_tensor(f'{name}.weight', np.ones(shape, np.float32))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


def model_directory(path: Path) -> None:
  """Writes a small Hugging Face directory."""
  conftest.write_tiny_model(path, vocab_size=32, num_hidden_layers=1)


def indexed(path: Path) -> None:
  """Writes a small Hugging Face directory with an index of its weights."""
  model_directory(path)
  (path / 'model.safetensors').rename(path / 'part.safetensors')
  from safetensors import safe_open
  with safe_open(path / 'part.safetensors', 'numpy') as opened:
    (path / 'model.safetensors.index.json').write_text(json.dumps({
        'weight_map': {name: 'part.safetensors' for name in opened.keys()}}))


def torch_directory(path: Path) -> None:
  """Writes a small Hugging Face directory with weights of PyTorch."""
  from safetensors.numpy import load_file
  import torch
  model_directory(path)
  torch.save({k: torch.tensor(v) for k, v in load_file(
      path / 'model.safetensors').items()}, path / 'pytorch_model.bin')
  (path / 'model.safetensors').unlink()


def rows(path: Path) -> None:
  """Writes a data set as JSON lines, CSV and TSV."""
  path.mkdir()
  some = [{'text': f'a film {i}', 'label': i % 2} for i in range(8)]
  (path / 'x.jsonl').write_text('\n'.join(map(json.dumps, some)) + '\n')
  (path / 'x.csv').write_text('text,label\n' + ''.join(
      f'"{r["text"]}",{r["label"]}\n' for r in some))
  (path / 'x.tsv').write_text('text\tlabel\n' + ''.join(
      f'{r["text"]}\t{r["label"]}\n' for r in some))


def parquet(path: Path) -> None:
  """Writes a data set as Parquet."""
  path.mkdir()
  datasets.Dataset.from_list([{
      'text': f'a film {i}', 'label': i % 2} for i in range(8)]).to_parquet(
          path / 'x.parquet')


def adapter(path: Path) -> None:
  """Writes a small model and a LoRA adapter of it."""
  model_directory(path / 'model')
  model, params = models.load(path / 'model', progress=False)
  params = peft.join(params, peft.lora.init(params, jax.random.key(0)))
  peft.save(path / 'adapter', model, params, base=str(path / 'model'))


TX = mezo_jax.mezo(1e-3, key=0)
GRADS = np.linspace(-1, 1, 19, dtype=np.float32)


def state():
  """Returns the params and the optimizer state that are checkpointed."""
  params = {'w': np.linspace(-1, 1, 600, dtype=np.float32).reshape(30, 20),
            'b': np.ones(3, np.float32)}
  params = jax.tree.map(jax.numpy.asarray, params)
  return params, TX.init(params)


def checkpoint_directory(path: Path) -> None:
  """Writes a checkpoint."""
  kept = checkpoint.Checkpoints(path / 'checkpoints')
  kept.save(3, state(), {'score': 0.5, 'loss': 1.25})
  kept.close()


def run_directory(path: Path) -> None:
  """Writes the config, the metrics and the logs of a run."""
  (path / 'checkpoints').mkdir(parents=True)
  (path / 'config.json').write_text(json.dumps(to_json(Train()), indent=2))
  (path / 'metrics.jsonl').write_text(''.join(json.dumps(
      {'kind': 'train', 'step': i, 'loss': 0.5}) + '\n' for i in range(9)))
  log, _ = replay.open_log(path / 'steps.log', {'config': {}}, 1)
  for step, g in enumerate(GRADS, 1):
    log.append(step, g, 1.0)
  log.close()
  replay.write_shared(path / 'shared.log', {'config': {}},
                      replay.read(path / 'steps.log').steps)


# --- the readers ------------------------------------------------------------


def load(path: Path) -> None:
  """Loads a model."""
  models.load(path, progress=False)


def read_gguf(path: Path) -> None:
  """Loads a model and a tokenizer from a GGUF file."""
  gguf_lib._opened.cache_clear()
  load(path / 'm.gguf')
  models.load_tokenizer(path / 'm.gguf')


def read_adapter(path: Path) -> None:
  """Loads an adapter."""
  peft.load(path / 'adapter', models.Transformer(
      models.read_config(loggers.read_json(path / 'model' / 'config.json'))))


TASK = Task(template='{text} It was', label_words=(' a', ' b'))


def read_rows(name):
  """Returns a function that reads a data set of this name."""
  def read(path: Path) -> None:
    for row in TASK.prepare(data.load_rows(str(path / name))):
      TASK.prompt(row), TASK.golds(row)
  return read


def read_log(name):
  """Returns a function that reads a log of this name and checks its steps."""
  def read(path: Path) -> None:
    found = replay.read(path / name).steps.projected_grads[:, 0]
    np.testing.assert_array_equal(found, GRADS[:len(found)])
  return read


def read_checkpoint(path: Path) -> None:
  """Restores a checkpoint and checks its contents."""
  kept = checkpoint.Checkpoints(path / 'checkpoints')
  try:
    best, found = kept.best_step(), kept.load(3, state())
    assert best == 3
    for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(state())):
      assert (got == want).all()
  finally:
    kept.close()


def make_gguf(path: Path) -> None:
  """Writes a directory with a GGUF file."""
  path.mkdir()
  gguf_file(path / 'm.gguf')


KINDS = {  # {kind: (writer, name of the file that is changed, reader)}
    'gguf': (make_gguf, 'm.gguf', read_gguf),
    'safetensors': (model_directory, 'model.safetensors', load),
    'index': (indexed, 'model.safetensors.index.json', load),
    'torch': (torch_directory, 'pytorch_model.bin', load),
    'config': (model_directory, 'config.json', load),
    'tokenizer': (model_directory, 'tokenizer.json', models.load_tokenizer),
    'jsonl': (rows, 'x.jsonl', read_rows('x.jsonl')),
    'csv': (rows, 'x.csv', read_rows('x.csv')),
    'tsv': (rows, 'x.tsv', read_rows('x.tsv')),
    'parquet': (parquet, 'x.parquet', read_rows('x.parquet')),
    'adapter': (adapter, 'adapter/adapter_config.json', read_adapter),
    'adapter weights': (
        adapter, 'adapter/adapter_model.safetensors', read_adapter),
    'run': (run_directory, 'config.json', run_files.read_config),
    'metrics': (run_directory, 'metrics.jsonl',
                lambda path: loggers.Metrics(path, 5).close()),
    # If one of these is accepted, its contents must be what was written, or the
    # beginning of it.
    'log': (run_directory, 'steps.log', read_log('steps.log')),
    'shared log': (run_directory, 'shared.log', read_log('shared.log')),
    # '' changes any file of the directory.
    'checkpoint': (checkpoint_directory, '', read_checkpoint),
}


def changed(original: bytes, rng) -> bytes:
  """Returns the bytes of a file with one to three random changes."""
  out = bytearray(original)
  for _ in range(rng.integers(1, 4)):
    at = int(rng.integers(len(out) + 1))
    # Half of the changes are in the first 4 KiB, since readers mostly depend on
    # the headers of files.
    at = at if rng.random() < 0.5 else at % min(4096, len(out) + 1)
    match rng.integers(6):
      case 0 if at < len(out):
        out[at] ^= 1 << rng.integers(8)
      case 1 if at < len(out):
        out[at] = rng.integers(256)
      case 2:
        del out[at:]
      case 3:
        other = int(rng.integers(len(out) + 1))
        out[at:at] = out[other:other + int(rng.integers(1, 64))]
      case 4:
        size = int(rng.choice([4, 8]))
        out[at:at + size] = int(rng.choice([0, 1, 2**31, 2**32 - 1])).to_bytes(
            8, 'little')[:size]
      case _:
        found = [*WORD.finditer(bytes(out[:2**16]))]
        if found:
          which = found[rng.integers(len(found))]
          out[which.start():which.end()] = WORDS[rng.integers(len(WORDS))]
  return bytes(out)


def worker(kind: str, seed: int, count: int, pipe) -> None:
  """Reads ``count`` changed files of one kind, in a child process.

  For each it sends a message before it begins and another with the outcome.
  """
  logging.disable()
  datasets.disable_progress_bars()
  resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
  make, name, read = KINDS[kind]
  with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / 'x'
    make(path)
    files = [path / name] if name else sorted(
        file for file in path.rglob('*') if file.is_file())
    read(path)
    shutil.copytree(path, Path(folder) / 'whole')
    for i in range(count):
      rng = np.random.default_rng([seed, i])
      shutil.rmtree(path)
      shutil.copytree(Path(folder) / 'whole', path)
      file = files[rng.integers(len(files))]
      file.write_bytes(changed(file.read_bytes(), rng))
      pipe.send((i, 'began', ''))
      signal.alarm(SECONDS)
      try:
        read(path)
        found = 'accepted', ''
      except InputError as e:
        found = 'refused', str(e)
      except BaseException:
        found = 'fault', traceback.format_exc(limit=-3)
      signal.alarm(0)
      pipe.send((i, *found))
    pipe.send((count, 'peak', resource.getrusage(
        resource.RUSAGE_SELF).ru_maxrss * 1024))


def fuzz(kind: str, count: int) -> dict:
  """Reads ``count`` changed files of one kind, and returns a row of the table.
  """
  counts, seed, peak = collections.Counter(), 0, 0
  context = multiprocessing.get_context('spawn')
  while counts.total() < count:
    ours, theirs = context.Pipe(False)
    process = context.Process(target=worker, args=(
        kind, seed, count - counts.total(), theirs))
    process.start()
    theirs.close()
    began = None
    try:
      while True:
        i, what, more = ours.recv()
        if what == 'began':
          began = i
          continue
        if what == 'peak':
          peak = max(peak, more)
          break
        began = None
        counts[what] += 1
        if what == 'fault':
          print(f'{kind} {seed} {i}: {more}', flush=True)
    except EOFError:  # The alarm killed the child, or the memory limit did.
      process.join()
      if began is None:
        raise RuntimeError(f'{kind}: the child ended with {process.exitcode}')
      print(f'{kind} {seed} {began}: ended with {process.exitcode}', flush=True)
      counts['fault'] += 1
    process.join()
    seed += 1
  return {'file': kind, 'inputs': counts.total(), **{
      k: counts[k] for k in ('accepted', 'refused', 'fault')},
          'peak of the process, MiB': round(peak / 2**20)}


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument('--inputs', type=int, default=20_000)
  parser.add_argument('--kinds', default=','.join(KINDS))
  options = parser.parse_args()
  kinds = [k for k in KINDS if k in options.kinds.split(',')]
  began, table = time.time(), []
  for kind in kinds:
    table.append(fuzz(kind, -(-options.inputs // len(kinds))))
    print(table[-1], flush=True)
  harness.write('fuzz', harness.header(f'{time.time() - began:.0f} s in all'), [
      ('Files with one to three changes:', table)])


if __name__ == '__main__':
  main()
