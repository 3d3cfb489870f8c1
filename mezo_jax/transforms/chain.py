"""Checks that an estimator is the first link of its optax chain."""

import sys

import jax

# Qualified names of the functions that call the links of a chain.
_CHAINS = ('chain.<locals>.update_fn', 'named_chain.<locals>.update_fn')


def check_first(name: str) -> None:
  """Checks that no link of a chain was called before this estimator.

  A chain that contains an estimator is called with None in place of updates. A
  link before the estimator, such as `optax.clip_by_global_norm`, maps over None
  and returns None, so it has no effect. The estimator cannot learn of such a
  link from its arguments, so this function inspects the Python stack. It looks
  for calls of `optax.chain` and `optax.named_chain` that are in progress. Their
  local variables contain the new states of all links that were called before.
  The check runs while a program is traced, and costs nothing in a compiled
  step.

  Args:
    name: Name of the estimator, for the error message.

  Raises:
    ValueError: If there is such a link.
  """
  frame = sys._getframe(1)
  while frame is not None:
    of_optax = frame.f_globals.get('__name__', '').partition('.')[0] == 'optax'
    if of_optax and frame.f_code.co_qualname in _CHAINS:
      called, updates = map(frame.f_locals.get, ('new_state', 'updates'))
      if called and not jax.tree.leaves(updates):
        if isinstance(called, dict):
          where = f'comes after {", ".join(map(repr, called))}'
        else:
          where = f'is number {len(called) + 1}'
        raise ValueError(
            f'{name} must be the first link of a chain, but here it {where}. '
            'It computes the updates, so links before it would have no effect. '
            'Put them after it, as in chain(spsa(...), '
            'clip_by_global_norm(1.0), sgd(1e-6)).')
    frame = frame.f_back
