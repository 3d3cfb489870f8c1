"""The training step, written once: two forwards and one update in place."""

from collections.abc import Callable
import contextlib
import time

import jax
from jax.sharding import NamedSharding
import optax

from mezo_jax import sharding


def make_step(tx: optax.GradientTransformationExtraArgs, value_fn: Callable, *,
              mesh=None, on_compile: Callable | None = None) -> Callable:
  """A step of fine-tuning, compiled once for each shape of its batches.

  Args:
    tx: a transform whose updates come from ``value_fn``, such as
      `mezo_jax.mezo`, a chain that `mezo_jax.spsa` begins, or
      `mezo_jax.backprop.backprop`.
    value_fn: ``value_fn(params, batch)``, the loss; see `mezo_jax.spsa`.
    mesh: that everything is on; None where there is none.
    on_compile: ``on_compile(batch, compiled, seconds)`` is called after each
      compilation.

  Returns:
    ``step(params, state, batch, frozen=None) -> params, state, metrics``.
    ``params`` and ``state`` are donated, and lie afterwards where they did.
    With ``frozen``, which is neither changed nor donated, ``value_fn`` is given
    `mezo_jax.peft.join` of the two. Metrics are arrays on the device: ``loss``,
    ``projected_grad`` or ``grad_norm``, and of the steps whose loss was not
    finite how many were ``skipped``, and ``skipped_in_a_row``.
    ``step.lower`` takes the same arguments, abstract ones too, and
    ``step.compiled`` has the compiled forms.
  """
  def run(params, state, batch, frozen):
    def value_of(params, batch):
      return value_fn(_join(params, frozen), batch)
    updates, state = tx.update(
        None, state, params, value_fn=value_of, batch=batch)
    return optax.apply_updates(params, updates), state, _metrics(state)

  def lower(params, state, batch, frozen=None):
    placed = jax.tree.map(_place, (params, state))
    jitted = jax.jit(
        run, donate_argnums=(0, 1),
        out_shardings=(*placed, mesh and sharding.replicated(mesh)))
    with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
      return jitted.lower(params, state, batch, frozen)

  def step(params, state, batch, frozen=None):
    leaves, tree = jax.tree.flatten(batch)
    shape = tree, *((x.shape, x.dtype) for x in leaves)
    if shape not in step.compiled:
      began = time.time()
      step.compiled[shape] = lower(params, state, batch, frozen).compile()
      if on_compile:
        on_compile(batch, step.compiled[shape], time.time() - began)
    return step.compiled[shape](params, state, batch, frozen)

  step.lower, step.compiled = lower, {}
  return step


def _join(params, frozen):
  if frozen is None:
    return params
  from mezo_jax import peft  # its models import flax, which a step need not
  return peft.join(params, frozen)


def _place(x):
  """Where an array is to lie; None, for the compiler to say, off a mesh."""
  place = getattr(x, 'sharding', None)
  return place if isinstance(place, NamedSharding) else None


def _metrics(state) -> dict:
  def get(name, default=None):
    # A parameter, say, may have that name too: only fields are meant.
    return optax.tree.get(state, name, default, filtering=lambda path, _: (
        isinstance(path[-1], optax.tree_utils.NamedTupleKey)))
  found = {'loss': get('value'), 'projected_grad': get('projected_grad'),
           'grad_norm': get('grad_norm'), 'skipped': get('total_notfinite'),
           'skipped_in_a_row': get('notfinite_count')}
  return {name: x for name, x in found.items() if x is not None}
