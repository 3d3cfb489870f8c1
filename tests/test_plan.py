"""What is planned is what a run holds, and what is said of it is right."""

import dataclasses
import os
import subprocess
import sys

import conftest
import jax
import jax.numpy as jnp
import pytest
from runs import changed, small_config

from mezo_jax import models
from mezo_jax.cli import commands
from mezo_jax.core import sharding
from mezo_jax.core.errors import InputError
from mezo_jax.planning import alternatives, compiled, machines, plan
from mezo_jax.runs import loggers
from mezo_jax.tasks import Task
from mezo_jax.training.config import Data, Mesh, Model, Train
import train

SMALL = dict(steps=2, eval_every=2, zero_shot=False, eval_batch_size=16)


@pytest.fixture(scope='module')
def wide_dir(tmp_path_factory):
  """A model with leaves that are large enough to be split."""
  return conftest.write_tiny_model(
      tmp_path_factory.mktemp('wide'), hidden_size=256, intermediate_size=512)


@pytest.mark.slow
@pytest.mark.exhaustive_except(change=[dict(mesh=Mesh(1, 2, 2, 2))])
@pytest.mark.parametrize('change', [
    dict(mesh=Mesh(1, 2, 2, 2)),
    dict(peft__method='last_layers', peft__num_layers=1),
    dict(method='finetune', model__remat=True)], ids=str)
def test_a_run_holds_what_was_planned(change, wide_dir, reviews_file, tmp_path,
                                      monkeypatch):
  """To 1 %, on 8 devices: each program of the step."""
  config = small_config(wide_dir, reviews_file, **SMALL | change)
  found = plan.plan(config, 'cpu:8', sizes=dataclasses.asdict(config.mesh),
                    tokens=16)
  assert found.fits and found.peak() >= found.peak('inference')
  real = {}
  monkeypatch.setattr(
      loggers, 'spell_program', lambda batch, program, seconds: (
          real.setdefault(batch is not None, []).append(
              program.memory_analysis())))
  train.run(config, tmp_path / 'run')
  name = 'step' if config.method == 'finetune' else 'losses'
  for planned, programs in ((found.programs[name], real[True]),
                            *([] if name == 'step' else [
                                (found.programs['update'], real[False][:1])])):
    held = max(map(compiled.held, programs))
    assert held == pytest.approx(planned.memory, rel=0.01)
  assert found.programs['evaluation'].memory > 0


@pytest.mark.slow
def test_a_mesh_that_splits_all(wide_dir, reviews_file):
  model = models.find_known('facebook/opt-66b')
  def mesh_of(topology, **change):
    config = changed(Train(), data__batch_size=16, **change)
    return plan.spell_mesh(plan.good_mesh(config, model, topology))
  assert mesh_of('v5p:1x1x1') == 'data=1'
  assert mesh_of('v5e:4x4') == 'fsdp=4,tensor=4'
  config = small_config(wide_dir, reviews_file, **SMALL)
  found = plan.plan(config, 'cpu:8', sizes=commands.read_mesh(
      'fsdp=-1,tensor=2', 8), tokens=16, wanted=lambda name: False)
  assert found.config.mesh == Mesh(1, 4, 2, 1)
  assert mesh_of('v5e:8x8') == 'fsdp=8,tensor=8'
  # 16 rows and 72 heads: what is left has a sign each.
  assert mesh_of('v5e:16x16') == 'direction=2,fsdp=16,tensor=8'
  assert mesh_of('v5e:16x16', method='finetune') == 'fsdp=16,tensor=16'
  assert mesh_of('h100:8') == 'tensor=8'


@pytest.mark.slow
@pytest.mark.exhaustive
def test_what_does_not_fit_is_told_what_would(wide_dir, reviews_file,
                                              monkeypatch, capsys):
  config = small_config(wide_dir, reviews_file, **SMALL)
  sizes = dict(data=1, fsdp=1, tensor=1, direction=1)
  first = plan.plan(config, 'cpu:1', sizes=sizes, tokens=16)
  update, losses = (first.peak(x) for x in ('update', 'losses'))
  assert losses > update
  tight = machines.Kind(
      memory=(losses + update) / 2 / plan.GIB, slices=('1', '2', '4', '8'))
  monkeypatch.setitem(machines.KINDS, 'cpu', tight)
  assert not first.fits
  change, other = alternatives.what_fits(first)
  assert other.fits and other.peak() < first.peak()
  refused = dataclasses.replace(first, programs={
      'losses': compiled.Program(1000.0, fits=False)})
  assert refused.peak() == 1000.0 and not refused.fits
  tiny = machines.Kind(memory=1e-6, slices=('1', '2'))
  monkeypatch.setitem(machines.KINDS, 'cpu', tiny)
  monkeypatch.setattr(alternatives, 'plan', lambda *args, **kwargs: first)
  assert alternatives.what_fits(first) is None
  words = [c.words for c in alternatives.changes(first)]
  assert any('batch' in w for w in words)
  assert words[-1].startswith('cpu:2, with the mesh')
  assert words[-2].startswith('model.offload=True')
  backprop = dataclasses.replace(first, config=dataclasses.replace(
      first.config, method='finetune'))
  words = [c.words for c in alternatives.changes(backprop)]
  assert words[:2] == ['model.remat=True', "method='mezo'"]


@pytest.mark.processes
def test_the_command(tmp_path, capsys):
  """Its text and its exit status; a hub id that is known needs no network."""
  file = tmp_path / 'config.py'
  file.write_text(
      'from mezo_jax.training.config import Data, Model, Train\n'
      'from mezo_jax.tasks import Task\n'
      'def get_config(name="opt-125m"):\n'
      '  return Train(model=Model(name), data=Data(train="nowhere"),\n'
      '               task=Task(template="{review} It was",\n'
      '                         label_words=(" bad", " good")))\n')
  code = commands.plan([
      'mezo-jax plan', f'--config={file}:opt-125m', '--topology=cpu:4',
      '--tokens=16', '--mesh=fsdp=2,tensor=2',
      '--config.model.dtype=bfloat16'])
  text = capsys.readouterr().out
  assert code == 0, text
  for part in ('opt-125m: 125,239,296 parameters in bfloat16', 'unknown',
               'mesh fsdp=2,tensor=2', '| losses |', '| evaluation |',
               '16 rows of 16 tokens'):
    assert part in text, text
  done = subprocess.run(
      [sys.executable, '-m', 'mezo_jax', 'plan', f'--config={file}',
       '--topology=v9:2'], capture_output=True, text=True, cwd=conftest.ROOT,
      env=os.environ | {'JAX_PLATFORMS': 'cpu'})
  assert done.returncode == 1 and 'Traceback' not in done.stderr, done.stderr
  assert done.stderr.splitlines()[-1].startswith('mezo-jax plan: --topology=')
  for args, part in (
      (['--topology=v9:2'], '--topology='),
      (['--topology=cpu:4', '--mesh=fsdp=3'], '--mesh=fsdp=3'),
      (['--topology=cpu:4', '--mesh=x=3'], '--mesh=.*x=3'),
      (['--topology=cpu:4', '--config.model.nmae=x'], 'model.nmae'),
      ([], '--topology')):
    with pytest.raises(InputError, match=part):
      commands.plan(['mezo-jax plan', f'--config={file}', *args])


@pytest.mark.parametrize('name,billions', [
    ('facebook/opt-30b', 29.975), ('opt-175b', 174.604),
    ('meta-llama/Meta-Llama-3-8B', 8.030), ('Qwen/Qwen3-32B', 32.762),
    ('google/gemma-3-27b-pt', 27.009), ('mistralai/Mistral-7B-v0.3', 7.248),
    ('FacebookAI/roberta-large', 0.355)])
def test_known_models_have_the_published_sizes(name, billions):
  shapes = models.param_shapes(models.find_known(name), dtype=jnp.bfloat16)
  total = sum(x.size for x in jax.tree.leaves(shapes))
  assert round(total / 1e9, 3) == billions
  assert models.find_known('of nobody') is None


def test_topologies():
  assert machines.size('v5p:2x2x1') == 4 and machines.size('v5e') == 1
  assert machines.larger('v5e:8x8') == ['v5e:8x16', 'v5e:16x16']
  assert len(machines.devices('cpu:8')) == 8
  for name in ('v5e:4', 'v5p:2x2', 'tpu:2x2', 'h100:2x2', 'v5e:0x4'):
    with pytest.raises(InputError, match=name):
      machines.split(name)
  with pytest.raises(InputError, match='JAX_NUM_CPU_DEVICES=64'):
    machines.devices('cpu:64')
  config = Train(model=Model('opt-125m', offload=True), data=Data(
      train='nowhere'), task=Task(template='{x}', label_words=(' a', ' b')))
  with pytest.raises(InputError, match='model.offload'):
    plan.plan(config, 'h100:1')


def test_operations_are_counted_with_loops():
  w = jnp.ones((5, 16, 16))
  def fn(w, x):
    def body(x, w):
      return jax.lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: x @ w @ w), None
    return jax.lax.scan(body, x, w)[0]
  jaxpr = jax.jit(fn).trace(w, jnp.ones((4, 16))).jaxpr
  assert compiled.flops(jaxpr) == 5 * (2 * 4 * 16 * 16) * 2
  conv = jax.jit(lambda x, k: jax.lax.conv(x, k, (1, 1), 'SAME')).trace(
      jnp.ones((1, 3, 8, 8)), jnp.ones((6, 3, 3, 3))).jaxpr
  assert compiled.flops(conv) == 2 * (6 * 8 * 8) * (3 * 3 * 3)


def test_collectives_are_counted_with_loops():
  mesh = sharding.make_mesh(1, 8)
  at = jax.NamedSharding(mesh, jax.P(None, 'fsdp'))
  w = jax.ShapeDtypeStruct((6, 64, 64), jnp.float32, sharding=at)
  x_place = jax.NamedSharding(mesh, jax.P('fsdp'))
  x = jax.ShapeDtypeStruct((8, 64), jnp.float32, sharding=x_place)
  def fn(w, x):
    def body(x, w):
      return jax.lax.with_sharding_constraint(jnp.tanh(x @ w), x_place), None
    return jax.lax.scan(body, x, w)[0]
  text = jax.jit(fn).lower(w, x).compile().as_text()
  (kind, (number, size)), = compiled.collectives(text).items()
  assert kind == 'all-gather' and number == 6 and size == 6 * 64 * 64 * 4


def test_the_memory_that_a_compiler_names_is_read_in_any_unit():
  for message, want in (
      ('Used 20.5G of 15.75G hbm', 20.5 * 2**30),
      ('(512.0M) exceeds the limit', 512 * 2**20), ('no number', None)):
    assert compiled._needed(message) == want
