"""The type of a transform that evaluates the loss itself."""

from typing import Any, Protocol

import optax


class Init(Protocol):
  """Returns the state of an optimizer for parameters."""

  def __call__(self, params: Any) -> Any:
    ...


class Update(Protocol):
  """Evaluates losses, and returns the updates and the next state.

  It is called as ``update(None, state, params, value_fn=loss, **batch)``, or as
  ``update(None, state, params, projected_grad=g)`` to replay a step.
  """

  def __call__(self, updates: Any, state: Any, params: Any = None,
               **extra_args: Any) -> tuple[Any, Any]:
    ...


class ZerothOrderTransformation(optax.GradientTransformationExtraArgs):
  """The type of a transform whose ``update`` accepts None instead of gradients.

  It exists for type checkers. States have the type Any, because optax's own
  type for them has no attributes.
  """

  init: Init
  update: Update
