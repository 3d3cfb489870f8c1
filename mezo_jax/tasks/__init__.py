"""Turns rows of data into prompts, answers, scores and losses.

A `Task` declares how a row becomes a prompt and what its answers are. `TASKS`
holds the declared tasks by name, and `get` returns one of them. The other
modules read rows (`data`), tokenise them (`encode`), score answers (`score`)
and evaluate predictions (`metrics`, `evaluate`).
"""

import dataclasses
from typing import Any

from mezo_jax.core.errors import InputError
from mezo_jax.tasks import glue_tasks, opt_tasks, roberta_tasks
from mezo_jax.tasks.task import Task

TASKS = {task.name: task
         for task in (*opt_tasks.TASKS, *roberta_tasks.TASKS,
                      *glue_tasks.TASKS)}


def get(name: str, **changes: Any) -> Task:
  """Returns a declared task.

  Args:
    name: Name of the task, a key of `TASKS`.
    **changes: Fields of `Task` to change in the result.

  Raises:
    InputError: If no task has the name.
  """
  if name not in TASKS:
    raise InputError(
        f'unknown task {name!r}; choose one of {", ".join(TASKS)}.')
  return dataclasses.replace(TASKS[name], **changes)


__all__ = ('Task', 'TASKS', 'get')
