"""Defines the type of optax transforms that evaluate the loss themselves."""

from typing import Any, Protocol

import optax


class Init(Protocol):
  """Defines the type of ``init``, which returns the first state for params."""

  def __call__(self, params: Any) -> Any:
    ...


class Update(Protocol):
  """Defines the type of ``update``, which returns updates and the next state.

  Call it as ``update(None, state, params, value_fn=loss, **batch)`` to evaluate
  losses, or as ``update(None, state, params, projected_grad=g)`` to replay a
  step.
  """

  def __call__(self, updates: Any, state: Any, params: Any = None,
               **extra_args: Any) -> tuple[Any, Any]:
    ...


class ZerothOrderTransformation(optax.GradientTransformationExtraArgs):
  r"""Defines an optax transform whose ``update`` accepts None as gradients.

  .. math:: (u, \text{state}) = \text{update}(\text{None}, \text{state}, \theta,
            \mathcal{L}, \mathcal{B})

  `mezo_jax.spsa`, `mezo_jax.mezo` and all variants have this type. It differs
  from `optax.GradientTransformationExtraArgs` only for type checkers. States
  have the type Any, because optax's own type for states has no attributes.

  Attributes:
    init: ``init(params)`` returns the first state.
    update: ``update(None, state, params, value_fn=loss, **batch)`` evaluates
      losses and returns updates and the next state. ``update(None, state,
      params, projected_grad=g)`` replays a step.

  References:
    Malladi et al., 2023, `Fine-Tuning Language Models with Just Forward Passes
    <https://arxiv.org/abs/2305.17333>`_, Algorithm 1.

  Example:
    >>> import mezo_jax
    >>> tx = mezo_jax.mezo(1e-6, key=0)
    >>> isinstance(tx, mezo_jax.ZerothOrderTransformation)
    True
  """

  init: Init
  update: Update
