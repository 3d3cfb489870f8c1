"""Turns a row of data into a prompt, answers, scores and a loss.

A `Task` declares how a row reads and what its answers are; `get` returns one of
those that are declared, by its name. The other modules read rows (`data`), make
tokens of them (`encode`), score answers (`score`) and measure predictions
(`metrics`, `evaluate`).
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
  """A declared task, with changes.

  Raises:
    ValueError: if there is none of that name.
  """
  if name not in TASKS:
    raise InputError(
        f'no task is called {name!r}; declared are {", ".join(TASKS)}.')
  return dataclasses.replace(TASKS[name], **changes)


__all__ = ('Task', 'TASKS', 'get')
