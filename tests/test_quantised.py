"""Models of codes: loaded, saved, and in runs of train.py."""

import contextlib

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs

import mezo_jax
from mezo_jax import models
from mezo_jax.core import paths, quantized
from mezo_jax.export.from_run import export
from mezo_jax.models.formats import huggingface, quantize, weights
import train


@pytest.mark.slow
@pytest.mark.parametrize('dtype', ['int8', 'int4'])
def test_loaded_and_saved(tiny_dir, tmp_path, dtype):
  """A model is quantised as it is read, as `quantize` does it; written, it is
  the floats that it stands for."""
  model, params = models.load(tiny_dir, dtype=dtype, progress=False)
  _, floats = models.load(tiny_dir, dtype='float32', progress=False)
  shapes = models.param_shapes(model.config, dtype=dtype)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(
      lambda x: (x.shape, x.dtype), shapes)
  coded_ = [path for path, x in paths.named_leaves(params)
            if quantized.is_codes(x)]
  assert 'layers/attn/q/kernel' in coded_ and 'embed/embedding' in coded_
  q = floats['layers']['attn']['q']['kernel']
  helpers.assert_bitwise(
      params['layers']['attn']['q']['kernel'],
      mezo_jax.quantize(q, 8 if dtype == 'int8' else 4))
  models.save(tmp_path / 'out', model, params, progress=False)
  _, again = models.load(tmp_path / 'out', progress=False)
  helpers.assert_bitwise(again, mezo_jax.dequantize(params))
  with pytest.raises(ValueError, match="dtype 'codes' .*gguf"):
    models.load(tiny_dir, dtype='codes', progress=False)


@pytest.mark.parametrize('dtype', ['int8', 'int4'])
def test_parts_of_a_weight_that_begin_amid_a_scale(tiny_dir, dtype):
  """Eight devices read 8 rows each of a kernel of 64, which share scales."""
  row = next(row for row in huggingface.table_of(models.load_config(tiny_dir))
             if row.path == 'layers/mlp/down/kernel')
  mesh = helpers.mesh_of(1, 8)
  with contextlib.ExitStack() as stack:
    tensors = dict(weights.open_files(tiny_dir, stack))
    form = quantize.form(row, dtype)
    read = lambda spec: quantize.read(
        row, (3, 64, 32), form, tensors, lambda part: jax.NamedSharding(
            mesh, spec if part[1] % 8 == 0 else jax.P()))
    want, got = read(jax.P()), read(jax.P(None, 'fsdp'))
  assert not got.codes.sharding.is_fully_replicated
  helpers.assert_bitwise(got, want)


@pytest.mark.slow
def test_text_is_generated_by_codes(tiny_dir):
  model, params = models.load(tiny_dir, dtype='int8', progress=False)
  ids = np.array([[3, 4, 5], [6, 7, 8]])
  said = [models.generate(model, p, ids, max_new_tokens=4) for p in (
      params, mezo_jax.dequantize(params))]
  helpers.assert_bitwise(*said)


@pytest.mark.slow
def test_lora_on_codes_that_stay(tiny_dir, reviews_file, tmp_path):
  config = runs.small_config(
      tiny_dir, reviews_file, model__dtype='int8', peft__method='lora',
      peft__rank=2, steps=2, eval_every=2, zero_shot=False)
  result = train.run(config, tmp_path / 'run')
  assert result['trained'] < 3000
  export(tmp_path / 'run', tmp_path / 'merged', merged=True)
  model, params = models.load(tmp_path / 'merged', progress=False)
  _, base = models.load(tiny_dir, dtype='int8', progress=False)
  floats = mezo_jax.dequantize(base)
  same = jax.tree.map(lambda x, y: bool(jnp.all(x == y)), params, floats)
  attn = same['layers'].pop('attn')
  assert all(jax.tree.leaves(same)) and attn['k']['kernel']
  assert not attn['q']['kernel']


def test_a_run_that_goes_on(tiny_dir, reviews_file, tmp_path):
  """train.py with codes: in one go, or stopped, saved and begun again."""
  config = lambda steps: runs.small_config(
      tiny_dir, reviews_file, method='quzo', model__dtype='int8', steps=steps,
      eval_every=4, checkpoint_every=2, zero_shot=False, spsa__eps=1e-2)
  train.run(config(4), tmp_path / 'whole')
  train.run(config(2), tmp_path / 'part')
  train.run(config(4), tmp_path / 'part')
  whole = runs.saved(tmp_path / 'whole')[1]
  helpers.assert_bitwise(runs.saved(tmp_path / 'part')[1], whole)
  codes = whole['layers']['attn']['q']['kernel']['codes']
  assert codes.dtype == np.int8
