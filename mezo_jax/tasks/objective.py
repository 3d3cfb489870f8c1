"""Which objectives there are, and which of them fit a task.

What they compute is in `mezo_jax.tasks.score`.
"""

from collections.abc import Callable

from mezo_jax.errors import InputError
from mezo_jax.tasks.task import Task

OBJECTIVES = ('cross_entropy', 'lm', 'accuracy', 'f1')


def of(task: Task, chosen: str | Callable = '') -> str | Callable:
  """The one that was chosen, or the task's own, or the paper's: cross-entropy
  over classes, else LM loss on the answer."""
  return chosen or task.objective or task.traits.objective


def check(task: Task, objective: str | Callable) -> None:
  """Raises InputError for an objective that is unknown or does not fit."""
  known = callable(objective) or objective in OBJECTIVES
  fits = not (
      objective == 'cross_entropy' and task.traits.generates
      or objective == 'lm' and (task.masked or task.traits.new_head))
  if not known or not fits:
    what = 'a function' if callable(objective) else repr(objective)
    raise InputError(
        f'objective {what} does not fit a task of kind {task.kind!r}'
        f'{" with a {mask}" if task.masked else ""}; choose one of '
        f'{", ".join(o for o in OBJECTIVES if fits or o != objective)} or a '
        'function of (predictions, examples).')


def gold_only(objective: str | Callable) -> bool:
  """Whether rows are laid out with their right answers alone."""
  return objective == 'lm'


def differentiable(objective: str | Callable) -> bool:
  return objective in ('cross_entropy', 'lm')


def over_rows(task: Task, objective: str | Callable) -> bool:
  """Whether an objective is a mean over rows (or their tokens), so that parts
  of a batch can be averaged."""
  if task.traits.generates:
    return not callable(objective)
  return objective in ('cross_entropy', 'lm', 'accuracy')
