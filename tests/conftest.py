"""Configures eight virtual CPU devices, and provides a tiny random model."""

import contextlib
import gc
import json
import os
from pathlib import Path
import shutil
import tempfile

# All workers and child processes of a session share one directory of compiled
# programs, so each program is compiled only once.
_PROGRAMS = {
    'JAX_COMPILATION_CACHE_DIR': tempfile.mkdtemp(prefix='mezo_jax_programs_'),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
} if 'JAX_COMPILATION_CACHE_DIR' not in os.environ else {}
os.environ.update(_PROGRAMS)

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

jax.config.update('jax_num_cpu_devices', 8)
# Tracing creates many small objects, and the heap of large libraries is slow to
# traverse. With Python's default thresholds, garbage collection takes a
# fifteenth of the tests' time.
gc.set_threshold(100_000, 50, 100)
os.environ['HF_HUB_OFFLINE'] = '1'

from mezo_jax.models.families import llama  # noqa: E402

ROOT = Path(__file__).parent.parent

TINY = {
    'model_type': 'llama', 'vocab_size': 300, 'hidden_size': 32,
    'intermediate_size': 64, 'num_hidden_layers': 3, 'num_attention_heads': 4,
    'num_key_value_heads': 2, 'head_dim': 8, 'max_position_embeddings': 128,
    'rms_norm_eps': 1e-5, 'rope_theta': 1e4, 'tie_word_embeddings': True,
}
WORDS = ('great', 'terrible', 'It', 'was', 'a', 'film', 'good', 'bad', 'fun',
         'dull', 'warm', 'cold', 'story', 'cast', 'plot', 'the')


# The programs of tests are small and take longer to compile than to run, so
# they are compiled with little optimisation. Tests of compiled programs (their
# memory, their collectives, bitwise equality) are marked `as_shipped` and
# compile with the default optimisation, as users do.
_QUICK = 'jax_disable_most_optimizations'
jax.config.update(_QUICK, True)
_is_quick = [True]
QUICK_ENVIRONMENT = {'JAX_DISABLE_MOST_OPTIMIZATIONS': '1'}


def pytest_configure(config):
  """Registers the marker."""
  config.addinivalue_line(
      'markers', 'as_shipped: compile programs with the usual optimisation')


def _set_quick(quick: bool):
  """Switches between quick and usual compilation."""
  if _is_quick[0] != quick:
    jax.config.update(_QUICK, quick)
    _is_quick[0] = quick
    # The in-memory caches of `jit` ignore this option, and would return
    # programs that were compiled with the other value. The cache on disk
    # distinguishes them.
    jax.clear_caches()


@contextlib.contextmanager
def _compiled_as_shipped(node=None):
  """Compiles with the default optimisation inside a `with` block.

  With the node of a test or a module, it does so only if the node is marked
  `as_shipped`.
  """
  before = _is_quick[0]
  if node is None or node.get_closest_marker('as_shipped') is not None:
    _set_quick(False)
  try:
    yield
  finally:
    _set_quick(before)


@pytest.fixture(autouse=True, scope='module')
def optimisation_of_module(request):
  """Applies the marker of a module, also to its fixtures."""
  with _compiled_as_shipped(request.node):
    yield


@pytest.fixture(autouse=True)
def optimisation_of_test(request, optimisation_of_module):
  """Applies the marker of a test."""
  with _compiled_as_shipped(request.node):
    yield


@pytest.fixture
def as_shipped():
  """Returns the context manager, for tests that need both optimisations."""
  return _compiled_as_shipped


def pytest_itemcollected(item):
  """Marks the cases that `slow_except` and `exhaustive_except` do not list."""
  cases = item.callspec.params if hasattr(item, 'callspec') else {}
  for tier in ('slow', 'exhaustive'):
    for marker in item.iter_markers(f'{tier}_except'):
      if any(cases[name] not in kept for name, kept in marker.kwargs.items()):
        item.add_marker(tier)


def pytest_unconfigure():
  """Removes the directory of programs, in the process that created it."""
  if _PROGRAMS:
    shutil.rmtree(_PROGRAMS['JAX_COMPILATION_CACHE_DIR'], ignore_errors=True)


def write_tiny_model(path: Path, seed: int = 0, **changes) -> Path:
  """Writes a Hugging Face directory with random weights and a word tokenizer.

  Args:
    path: The directory.
    seed: Seed of the weights. Defaults to 0.
    **changes: Fields of config.json that differ from `TINY`.

  Returns:
    The directory.
  """
  from safetensors.numpy import save_file
  from tokenizers import models, pre_tokenizers, Tokenizer
  from transformers import PreTrainedTokenizerFast
  path.mkdir(parents=True, exist_ok=True)
  hf = TINY | changes
  (path / 'config.json').write_text(json.dumps(hf))
  rng, config = np.random.RandomState(seed), llama.config_from_hf(hf)
  tensors = {}
  for row in llama.table(config):
    for layer in range(config.num_layers if row.stacked else 1):
      shape = row.source_shape()
      mean = 1.0 if row.path.endswith('scale') else 0.0
      tensors[row.name.format(l=layer)] = (
          mean + 0.08 * rng.randn(*shape)).astype(np.float32)
  save_file(tensors, path / 'model.safetensors')
  vocab = {w: i for i, w in enumerate(('<unk>', '<pad>', *WORDS))}
  raw = Tokenizer(models.WordLevel(vocab, unk_token='<unk>'))
  raw.pre_tokenizer = pre_tokenizers.Whitespace()
  PreTrainedTokenizerFast(
      tokenizer_object=raw, unk_token='<unk>', pad_token='<pad>'
  ).save_pretrained(path)
  return path


@pytest.fixture(scope='session')
def tiny_dir(tmp_path_factory) -> Path:
  """Returns the directory of a tiny model, which tests must not change."""
  return write_tiny_model(tmp_path_factory.mktemp('tiny'))


@pytest.fixture(scope='session')
def reviews_file(tmp_path_factory) -> Path:
  """Returns a file with 120 reviews that a tiny model can learn.

  The last word of a review, one of three per class, determines its label.
  """
  rng = np.random.RandomState(1)
  lines = []
  for i in range(120):
    word = (('bad', 'dull', 'cold'), ('good', 'fun', 'warm'))[i % 2]
    words = list(rng.choice(WORDS[4:], rng.randint(2, 12)))
    text = ' '.join([*words, rng.choice(word)])
    lines.append(json.dumps({'text': text, 'label': i % 2}))
  path = tmp_path_factory.mktemp('data') / 'reviews.jsonl'
  path.write_text('\n'.join(lines))
  return path
