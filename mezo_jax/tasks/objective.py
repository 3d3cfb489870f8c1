"""Which objectives there are, which of them fit a task, and under which name
their values are reported.

What they compute is in `mezo_jax.tasks.score`.
"""

from collections.abc import Callable, Sequence
import contextlib
import inspect
import traceback
from typing import Any

import numpy as np

from mezo_jax.core.errors import first_line, InputError
from mezo_jax.tasks.task import METRICS, Task

OBJECTIVES = ('cross_entropy', 'lm', 'accuracy', 'f1')
# Names in reports and records, which no function of a user's may have there.
_TAKEN = (*METRICS, 'exact_match', 'loss', 'cross_entropy', 'count', 'mean',
          'not_finite', 'step', 'kind', 'epsilon', 'score')


def of(task: Task, chosen: str | Callable[..., Any] = ''
       ) -> str | Callable[..., Any]:
  """Returns the objective that was chosen, or the task's own, or the paper's:
  cross-entropy over classes, else the LM loss of the answer."""
  return chosen or task.objective or task.traits.objective


def check_objective(task: Task, objective: str | Callable[..., Any]) -> None:
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
        'function of (predictions, examples), in a config file.')
  if callable(objective) and not _takes_two(objective):
    raise InputError(
        f'objective {name(objective)} must be a function of two arguments, '
        '(predictions, examples).')


def _takes_two(function: Callable) -> bool:
  try:
    inspect.signature(function).bind((), ())
  except TypeError:
    return False
  except ValueError:  # a builtin without a signature
    pass
  return True


def gold_only(objective: str | Callable) -> bool:
  """Returns whether rows are laid out with their right answers alone."""
  return objective == 'lm'


def needs_gold(objective: str | Callable) -> bool:
  """Returns whether an objective reads the right answers itself; a function
  may find all that it needs in the rows."""
  return not callable(objective)


def differentiable(objective: str | Callable) -> bool:
  return objective in ('cross_entropy', 'lm')


def over_rows(task: Task, objective: str | Callable[..., Any]) -> bool:
  """Returns whether an objective is a mean over rows (or their tokens), so that
  parts of a batch can be averaged."""
  if task.traits.generates:
    return not callable(objective)
  return objective in ('cross_entropy', 'lm', 'accuracy')


def name(function: Callable) -> str:
  """Returns the name under which the values of a function are reported: its
  own, or 'objective' if it has none or reports have that name already."""
  own = getattr(getattr(function, 'func', function), '__name__', '')
  taken = own in _TAKEN or own.startswith('calibrated_')
  return own if own.isidentifier() and not taken else 'objective'


def words(objective: str | Callable) -> str:
  """Returns the name of an objective for a message."""
  return name(objective) if callable(objective) else repr(objective)


def metric(task: Task, objective: str | Callable[..., Any]) -> str:
  """Returns the name of the number that stands for a result.

  A function that is trained is that number. Else it is the task's metric; if
  the task names none, it is the metric that is trained, or the kind's first.
  """
  if callable(objective):
    return name(objective)
  if task.metric:
    return task.metric
  trained = {'accuracy': 'exact_match', 'f1': 'f1'} if (
      task.traits.generates) else {'accuracy': 'accuracy', 'f1': 'macro_f1'}
  return trained.get(objective, task.main_metric)


def value(function: Callable[..., Any], predictions: Sequence[Any],
          examples: Sequence[dict[str, Any]]) -> float:
  """Returns the value of a function of a user's as a float.

  Raises:
    InputError: if it is not one number, or the function fails; it names the
      line of the failure.
  """
  try:
    found, array = function(predictions, examples), None
  except Exception as e:
    at = traceback.extract_tb(e.__traceback__)[-1]
    raise InputError(
        f'objective {name(function)} failed with {type(e).__name__}: '
        f'{first_line(e)} ({at.filename}, line {at.lineno}).') from e
  with contextlib.suppress(TypeError, ValueError):
    array = None if found is None else np.asarray(found, float)
  if array is None or array.size != 1:
    raise InputError(
        f'objective {name(function)} returned {str(found)[:100]} for '
        f'{len(predictions)} predictions and must return one number, which is '
        'maximised.')
  return float(array.reshape(()))
