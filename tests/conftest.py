"""Eight virtual CPU devices, and a tiny random model with its tokenizer."""

import contextlib
import functools
import gc
import json
import os
from pathlib import Path
import shutil
import tempfile

# A program is compiled once for all workers and runs of a session.
_PROGRAMS = {
    'JAX_COMPILATION_CACHE_DIR': tempfile.mkdtemp(prefix='mezo_jax_programs_'),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
} if 'JAX_COMPILATION_CACHE_DIR' not in os.environ else {}
os.environ.update(_PROGRAMS)

import jax  # noqa: E402
from jax._src import compiler  # noqa: E402
from jax._src.interpreters import mlir  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

jax.config.update('jax_num_cpu_devices', 8)
# Tracing makes many small objects, and a heap of large libraries is long to
# walk: collecting at Python's rate takes a fifteenth of the tests' time.
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


# Small programs take longer to compile than to run. Where no promise is about
# what a compiler makes of them (their memory, the bits of two), they are
# compiled with little optimisation, by the quicker of XLA's code generators.
_SMALL = tuple(f'test_{name}' for name in (
    'arguments', 'backprop', 'baselines', 'bodies', 'build',
    'classifier_files', 'common', 'data', 'disk', 'distributed', 'estimate',
    'evaluate', 'exchange', 'export', 'families', 'fields', 'files', 'flags',
    'float16', 'generate', 'gguf', 'guards', 'hub', 'labels', 'layouts',
    'lowrank', 'mazo', 'meshes', 'methods', 'mixture', 'model_arguments',
    'models', 'modified', 'not_finite', 'objective', 'own_data', 'package',
    'parts', 'paths', 'peft', 'peft_fields', 'peft_parity', 'pending',
    'perturb', 'plan', 'preemption', 'private', 'properties', 'quantised',
    'quzo', 'qzo', 'replay', 'replicas', 'reported', 'rows', 'scores',
    'sharding', 'spsa', 'subspaces', 'suite', 'tokenizers', 'train',
    'trainable', 'trunk', 'variants', 'wrappers'))
_AS_SHIPPED = (
    'test_directions_are_bitwise_equal_on_every_mesh',
    'test_directions_in_one_batch_share_each_product',
    'test_embedding_rows_only',
    'test_equal_layers_share_the_kernels_of_their_noise',
    'test_memory_is_that_of_inference',
    'test_memory_is_that_of_quantised_inference',
    'test_memory_stays_at_inference',
    'test_no_weights_are_built',
    'test_no_weights_are_built_nor_copied',
    'test_the_door_gives_the_same_weights',
    'test_scoring_keeps_nothing_of_the_weights_size_but_the_mask',
    'test_the_forward_and_three_layers',
    'test_the_noise_of_a_sharded_step_does_not_communicate',
    'test_the_program_of_an_unrolled_model_grows_slowly',
    'test_the_strict_path_stays_at_inference_memory',
    'test_the_update_needs_no_dense_tree',
    'test_views_are_what_numpy_does',
    'test_what_is_built_of_subspaces_needs_no_dense_tree')
QUICK = {'xla_cpu_use_fusion_emitters': False,
         'xla_cpu_parallel_codegen_split_count': 1}
QUICK_FLAGS = ' '.join(f'--{k}={v}' for k, v in QUICK.items())
_compile_options = compiler.get_compile_options
# To make MLIR's context anew for each program takes a twentieth of the tests'
# time; programs of a module share one.
mlir.make_ir_context = functools.cache(mlir.make_ir_context)


def _compile_quickly(quick: bool) -> None:
  def options(*args, env_options_overrides=None, **kwargs):
    return _compile_options(
        *args, env_options_overrides=QUICK | (env_options_overrides or {}),
        **kwargs)
  jax.config.update('jax_disable_most_optimizations', quick)
  compiler.get_compile_options = options if quick else _compile_options


_compile_quickly(True)  # what test modules compute while they are read


@contextlib.contextmanager
def as_shipped():
  """For some programs of a test whose others are compiled quickly."""
  _compile_quickly(False)
  try:
    yield
  finally:
    _compile_quickly(True)


@pytest.fixture(autouse=True, scope='module')
def quick_programs(request):
  mlir.make_ir_context.cache_clear()
  _compile_quickly(request.module.__name__ in _SMALL)
  yield
  _compile_quickly(False)


@pytest.fixture(autouse=True)
def programs_as_shipped(request, quick_programs):
  shipped = getattr(request.node, 'originalname', None) in _AS_SHIPPED
  if shipped:
    _compile_quickly(False)
  yield
  if shipped:
    _compile_quickly(request.module.__name__ in _SMALL)


def pytest_itemcollected(item):
  """Marks as slow the cases of a test that its `slow_except` does not name."""
  cases = item.callspec.params if hasattr(item, 'callspec') else {}
  for marker in item.iter_markers('slow_except'):
    if any(cases[name] not in kept for name, kept in marker.kwargs.items()):
      item.add_marker('slow')


def pytest_unconfigure():
  if _PROGRAMS:  # made by this process, not by one that it is a worker of
    shutil.rmtree(_PROGRAMS['JAX_COMPILATION_CACHE_DIR'], ignore_errors=True)


def write_tiny_model(path: Path, seed: int = 0, **changes) -> Path:
  """A Hugging Face directory with random weights, and a word tokenizer."""
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
  return write_tiny_model(tmp_path_factory.mktemp('tiny'))


@pytest.fixture(scope='session')
def reviews_file(tmp_path_factory) -> Path:
  """120 rows that a tiny model can learn: four good words and four bad."""
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
