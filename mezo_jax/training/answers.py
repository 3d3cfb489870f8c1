"""Writes and shows answers of the model to some dev rows.

Every evaluation of the dev rows produces answers. The first ones are written to
``answers.jsonl`` in the working directory, and a few are shown in the log,
next to the right answers.
"""

import json
from pathlib import Path
from typing import Any

import jax

from mezo_jax.tasks import rewards, Task
from mezo_jax.training import config as config_lib
from mezo_jax.training import mixture

_SHOWN = 3  # number of answers that are shown after an evaluation
_LENGTH = 60  # characters of a text that are shown


def write(config: config_lib.Train, tasks: mixture.Mixture, path: Path,
          step: int) -> list[str]:
  """Writes the answers of the latest evaluation of the dev rows.

  Answers of this and later steps, which a resumed run computes again, are
  removed from the file. Process 0 writes it.

  Args:
    config: Config of the run.
    tasks: The tasks of the run.
    path: The file.
    step: Step of the evaluation.

  Returns:
    Lines that show a few of the answers.
  """
  records, lines = [], []
  for part, (_, _, own) in zip(tasks.parts, mixture.alone(config)):
    name = {'task': part.name} if len(tasks.parts) > 1 else {}
    found = [{'step': step, **name, **_record(own.task, answer)}
             for answer in part.ask.answered]
    records += found
    lines += map(_line, found[:max(_SHOWN // len(tasks.parts), 1)])
  if jax.process_index() == 0 and records:
    old = path.read_text().splitlines() if path.exists() else []
    kept = [line for line in old if json.loads(line)['step'] < step]
    temporary = path.with_suffix('.part')
    temporary.write_text('\n'.join([*kept, *map(json.dumps, records), '']))
    temporary.replace(path)
  return lines


def _record(task: Task, answer: rewards.Answer) -> dict[str, Any]:
  """Returns an answer with its prompt, the right answer and its reward."""
  row = answer.row
  found: dict[str, Any] = {
      'prompt': task.prompt(row, mask='...', sep=' '),
      'answer': answer.text}
  if task.has_gold(row):
    found['right'] = (task.references(row)[0] if task.traits.generates else
                      task.answers(row)[task.golds(row)[0]])
  if answer.parts:
    found['reward'] = answer.reward
    found |= {f'reward/{name}': x for name, x in answer.parts.items() if name}
  return found


def _line(record: dict[str, Any]) -> str:
  """Returns the line that shows a record of ``answers.jsonl``."""
  prompt = ' '.join(record['prompt'].split())
  if len(prompt) > _LENGTH:
    prompt = f'...{prompt[3 - _LENGTH:]}'  # the end, which asks for the answer
  about = [f'right: {_short(record["right"])}'] if 'right' in record else []
  about += [f'reward {record["reward"]:.3g}'] if 'reward' in record else []
  known = f' ({", ".join(about)})' if about else ''
  name = f'{record["task"]}: ' if 'task' in record else ''
  return f'  {name}{prompt} -> {_short(record["answer"])}{known}'


def _short(text: str) -> str:
  """Returns a text in quotes, cut at the end."""
  return repr(text if len(text) <= _LENGTH else f'{text[:_LENGTH - 3]}...')
