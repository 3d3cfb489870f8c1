"""Estimates that make their projected gradients in another way."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from mezo_jax.transforms.spsa import SpsaState
from mezo_jax.transforms.types import ZerothOrderTransformation


class Remembering(NamedTuple):
  """State of an estimate that keeps more than `SpsaState`."""

  spsa: SpsaState
  memory: Any

  @property
  def notfinite_count(self):  # by which `skip_not_finite` knows an estimator
    return self.spsa.notfinite_count


def check_one_eps(eps) -> None:
  """Raises ValueError for groups of eps: the projected gradients of a state are
  those of the first group alone."""
  if isinstance(eps, Mapping):
    raise ValueError('eps of groups cannot be used here, where one projected '
                     'gradient is for all: give one number or schedule.')


def told(estimate: ZerothOrderTransformation, make: Callable,
         after: Callable | None = None,
         init: Callable = lambda state: ()
         ) -> ZerothOrderTransformation:
  """Returns ``estimate`` with projected gradients that ``make`` makes.

  They become updates by the estimate's replay path (``projected_grad=``), so
  replay needs no losses here either.

  Args:
    estimate: from `mezo_jax.spsa`.
    make: ``(SpsaState, memory, params, extra arguments, value_fn among them)
      -> value, projected_grad [n]``.
    after: ``(SpsaState after the step, memory) -> memory``; None for no memory.
    init: ``SpsaState -> memory``.
  """
  def init_fn(params):
    state = estimate.init(params)
    return Remembering(state, init(state)) if after else state

  def update_fn(updates, state, params=None, *, value_fn=None,
                projected_grad=None, value=None, **extra_args):
    spsa_state, memory = state if after else (state, ())
    if projected_grad is None and value_fn is not None and params is not None:
      if value is not None:  # for value_fn, if it takes it
        extra_args['value'] = value
      value, projected_grad = make(
          spsa_state, memory, params, dict(value_fn=value_fn, **extra_args))
      projected_grad = jnp.where(jnp.isfinite(value), projected_grad, jnp.nan)
      value_fn, extra_args = None, {}
    if value is not None:
      extra_args['value'] = value
    updates, new = estimate.update(
        updates, spsa_state, params, value_fn=value_fn,
        projected_grad=projected_grad, **extra_args)
    return updates, Remembering(new, after(new, memory)) if after else new

  return ZerothOrderTransformation(init_fn, update_fn)
