"""Tests `perturbed` and the optax step on models of other libraries.

  pip install --no-deps equinox dm-haiku keras penzai equimo mamba2-jax \
      google-tunix
  pip install jaxtyping wadler-lindig jmp tabulate h5py namex optree rich \
      ordered_set treescope einops loguru lz4 requests semver
  python benchmarks/other_models.py [NAME ...] [float32] [bfloat16] \
      [--quick] [--layers=12]

Each package is optional; the row of a model that cannot be imported says so.
NAMEs are parts of the models' names. --quick disables LLVM's optimisation,
which takes most of the compilation time. With any other argument, tables are
printed and not written.

The models are those of zoo.py: twelve layers, random weights, 2 rows of 8
tokens. So activations are small compared with weights, and a layer has about
0.08 of the weights. Temporaries are those of the compiler (`memory_analysis`)
relative to the bytes of the weights. `error` is the difference between
`perturbed(f)` and `f(displace(...))` at c = 0.01, and `effect` is that between
`f` with and without displacement, both relative to the value. A step is `mezo`
and `apply_updates` in one donated jit. `again` is the number of programs that a
second step compiles. Writes benchmarks/results/other_models.md and .json.
"""

import functools
import sys
import time
import traceback

import harness
import jax
import jax.numpy as jnp
import optax
import zoo

import mezo_jax

C = 1e-2
# LLVM's optimisation takes most of the compilation time. Without it temporaries
# differ by about the size of a leaf.
QUICK = {'xla_backend_optimization_level': 0}
DTYPES = ('float32', 'bfloat16')
COMPILED = []  # Seconds of each compilation of this process.


def compiled(fn, *args):
  """Compiles a function.

  Returns:
    (program, seconds to trace and lower it, seconds to compile it, lines of
    StableHLO).
  """
  began = time.perf_counter()
  lowered = fn.lower(*args)
  traced = time.perf_counter()
  program = lowered.compile()
  return program, traced - began, time.perf_counter() - traced, len(
      lowered.as_text().splitlines())


def measure(build, dtype, options) -> dict:
  """Returns the columns of a row for one model."""
  jit = functools.partial(jax.jit, compiler_options=options)
  apply, params = build(dtype)
  params = jax.tree.map(jnp.array, params)
  ids = jax.random.randint(
      jax.random.key(2), (zoo.ROWS, zoo.TOKENS), 0, zoo.VOCAB)
  weights = harness.nbytes(params)

  def loss_fn(params, ids):
    logits = apply(params, ids).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(
        logits, ids if logits.ndim == 3 else ids[:, 0]).mean()

  at = lambda params, key, ids: mezo_jax.perturbed(loss_fn)(
      params, mezo_jax.Displacement(key, C), ids)
  tx = mezo_jax.mezo(1e-6, key=0)

  @functools.partial(jit, donate_argnums=(0, 1))
  def step(params, state, ids):
    updates, state = tx.update(None, state, params, value_fn=loss_fn, ids=ids)
    return optax.apply_updates(params, updates), state

  key, state = jax.random.key(3), tx.init(params)
  forward, f_trace, f_compile, f_lines = compiled(jit(loss_fn), params, ids)
  near, *_ = compiled(jit(at), params, key, ids)
  stepped, s_trace, s_compile, s_lines = compiled(step, params, state, ids)

  clean, value = forward(params, ids), near(params, key, ids)
  displace = jax.jit(mezo_jax.displace, compiler_options=QUICK)
  wanted = forward(displace(params, mezo_jax.Displacement(key, C)), ids)
  params, state = step(params, state, ids)
  before = len(COMPILED)
  jax.block_until_ready(step(params, state, ids))
  again = len(COMPILED) - before

  temp = lambda program: round(
      program.memory_analysis().temp_size_in_bytes / weights, 3)
  return {
      'MB': round(weights / 1e6, 1),
      'error': float(abs(value - wanted) / abs(wanted)),
      'effect': float(abs(clean - wanted) / abs(wanted)),
      'temporaries: forward': temp(forward), 'perturbed': temp(near),
      'step': temp(stepped),
      'in place': stepped.memory_analysis().alias_size_in_bytes >= weights,
      'again': again,
      'trace s: forward': f_trace, 'step: trace': s_trace,
      'compile s: forward': f_compile, 'step: compile': s_compile,
      'lines: forward': f_lines, 'step: lines': s_lines}


def row(name: str, dtype, options) -> dict:
  """Returns the row of one model, with a note if it fails."""
  build, pip = zoo.MODELS[name]
  try:
    return {'model': name, **measure(build, dtype, options), 'note': ''}
  except ImportError as e:
    note = f'does not import (pip install {pip}): {e}'
  except Exception as e:
    traceback.print_exc()
    note = f'{type(e).__name__}: {e}'.splitlines()[0][:200]
  return {'model': name, 'note': note}


def main():
  jax.monitoring.register_event_duration_secs_listener(
      lambda event, seconds, **_: COMPILED.append(seconds)
      if event == '/jax/core/compile/backend_compile_duration' else None)
  args = sys.argv[1:]
  options = QUICK if '--quick' in args else None
  dtypes = [a for a in args if a in DTYPES] or DTYPES
  wanted = [a for a in args if a not in DTYPES and not a.startswith('--')]
  zoo.LAYERS = next((int(a.removeprefix('--layers=')) for a in args
                     if a.startswith('--layers=')), zoo.LAYERS)
  names = [name for name in zoo.MODELS
           if not wanted or any(part in name for part in wanted)]
  tables = []
  for dtype in dtypes:
    rows = []
    for name in names:
      rows.append(row(name, jnp.dtype(dtype), options))
      print(rows[-1], file=sys.stderr, flush=True)
      jax.clear_caches()
    # The first row determines the columns, so complete rows come first.
    rows.sort(key=lambda r: 'MB' not in r)
    tables.append((f'{dtype}:', rows))
  head = harness.header(f'{zoo.ROWS} x {zoo.TOKENS} tokens', *args)
  if set(args) - {'--quick'}:
    print(harness.markdown(head, tables))
  else:
    harness.write('other_models', head, tables)


if __name__ == '__main__':
  main()
