"""Selects, checks and names training objectives.

`mezo_jax.tasks.score` computes them.
"""

from collections.abc import Callable, Sequence
import contextlib
import inspect
import traceback
from typing import Any

import numpy as np

from mezo_jax.core.errors import first_line, InputError
from mezo_jax.tasks.task import METRICS, Task

REWARD = 'reward'
OBJECTIVES = ('cross_entropy', 'lm', 'accuracy', 'f1', REWARD)
# Names that reports and records use for other numbers. The value of a user's
# function is never reported under one of these names.
_TAKEN = (*METRICS, 'exact_match', 'loss', 'cross_entropy', 'count', 'mean',
          'not_finite', 'step', 'kind', 'epsilon', 'score')


def of(task: Task, chosen: str | Callable[..., Any] = ''
       ) -> str | Callable[..., Any]:
  """Returns the objective to train.

  Args:
    task: The task.
    chosen: Objective of the config. Defaults to '', which means the task's own
      objective. If it has none, that of Malladi et al. (2023) is used:
      cross-entropy for tasks with classes, and otherwise the language-model
      loss of the answer.

  Returns:
    One of `OBJECTIVES`, or a function of (predictions, examples).
  """
  return chosen or task.objective or task.traits.objective


def check_objective(task: Task, objective: str | Callable[..., Any]) -> None:
  """Checks that an objective exists and fits a task.

  Args:
    task: The task.
    objective: Name of the objective, or a function of (predictions, examples).

  Raises:
    InputError: If the objective is unknown or does not fit the task.
  """
  known = callable(objective) or objective in OBJECTIVES
  fits = not (
      objective == 'cross_entropy' and task.traits.generates
      or objective == 'lm' and (task.masked or task.traits.new_head)
      or objective == REWARD and not task.traits.generates)
  if not known or not fits:
    what = 'a function' if callable(objective) else repr(objective)
    raise InputError(
        f'objective {what} does not fit a task of kind {task.kind!r}'
        f'{" with a {mask}" if task.masked else ""}; choose one of '
        f'{", ".join(o for o in OBJECTIVES if fits or o != objective)}, or set '
        'a function of (predictions, examples) in a config file.')
  if callable(objective) and not _takes_two(objective):
    raise InputError(
        f'objective {name(objective)} must take two arguments, (predictions, '
        'examples).')


def _takes_two(function: Callable) -> bool:
  """Returns whether a function can be called with two positional arguments."""
  try:
    inspect.signature(function).bind((), ())
  except TypeError:
    return False
  except ValueError:  # A builtin may have no signature.
    pass
  return True


def gold_only(objective: str | Callable) -> bool:
  """Returns whether training rows need only their right answer."""
  return objective == 'lm'


def needs_gold(objective: str | Callable) -> bool:
  """Returns whether an objective needs the right answers of rows.

  A user's function does not: it gets the rows and reads what it needs.
  """
  return not callable(objective) and objective != REWARD


def differentiable(objective: str | Callable) -> bool:
  """Returns whether an objective has a useful derivative."""
  return objective in ('cross_entropy', 'lm')


def over_rows(task: Task, objective: str | Callable[..., Any]) -> bool:
  """Returns whether an objective is a mean over rows or their tokens.

  The values of the parts of a batch can then be averaged.

  Args:
    task: The task.
    objective: Objective that fits the task.
  """
  if task.traits.generates:
    return needs_gold(objective)
  return objective in ('cross_entropy', 'lm', 'accuracy')


def name(function: Callable) -> str:
  """Returns the name under which the values of a function are reported.

  This is the function's own name, or 'objective' if it has none or if another
  number of the report has that name.
  """
  own = getattr(getattr(function, 'func', function), '__name__', '')
  taken = own in _TAKEN or own.startswith('calibrated_')
  return own if own.isidentifier() and not taken else 'objective'


def words(objective: str | Callable) -> str:
  """Returns the name of an objective for an error message."""
  return name(objective) if callable(objective) else repr(objective)


def metric(task: Task, objective: str | Callable[..., Any]) -> str:
  """Returns the name of the number by which results are compared.

  If a user's function is trained, it is the name of that function. Otherwise it
  is ``task.metric``. If that is empty, it is the metric that is trained, or
  else the default metric of the task's kind.

  Args:
    task: The task.
    objective: Objective that is trained.
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
  """Calls a user's objective and returns its value as a float.

  Args:
    function: Function of (predictions, examples).
    predictions: Generated texts, or the indices of the chosen candidates.
    examples: Rows of the predictions.

  Raises:
    InputError: If the function fails or does not return one number. The message
      names the line that failed.
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
        f'{len(predictions)} predictions, but must return one number (higher '
        'is better).')
  return float(array.reshape(()))
