"""Finds out whether other links of an optax chain come before an estimator."""

import sys

import jax

_CHAINS = ('chain.<locals>.update_fn', 'named_chain.<locals>.update_fn')


def check_first(name: str) -> None:
  """Raises if links of a chain were called before this estimator.

  An estimator is called with None in the place of updates. Links such as
  `optax.clip_by_global_norm` map over that and return None again: they would do
  nothing, and nothing that optax passes from link to link shows that they are
  there. So this looks at the calls of `optax.chain` and `optax.named_chain`
  that are in progress: each collects the new states of the links that it has
  called so far. It is done while a program is traced, and costs nothing in a
  compiled step.

  Args:
    name: of the estimator, for the error.

  Raises:
    ValueError: if there is such a link.
  """
  frame = sys._getframe(1)
  while frame is not None:
    of_optax = frame.f_globals.get('__name__', '').partition('.')[0] == 'optax'
    if of_optax and frame.f_code.co_qualname in _CHAINS:
      called, updates = map(frame.f_locals.get, ('new_state', 'updates'))
      if called and not jax.tree.leaves(updates):
        links = ', '.join(map(repr, called)) if isinstance(called, dict) else (
            f'number {len(called) + 1}')
        where = (f'comes after {links}' if isinstance(called, dict) else
                 f'is {links}')
        raise ValueError(
            f'{name} makes the updates, so it must be the first link of a '
            f'chain, and here it {where}: the links before it have no updates '
            'to work on and would do nothing. Put them after it, as in '
            'chain(spsa(...), clip_by_global_norm(1.0), sgd(1e-6)).')
    frame = frame.f_back
