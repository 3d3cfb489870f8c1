"""Computes rewards of generated answers with a Python function.

A reward is a function of one answer, ``reward(text, row) -> float or dict``. A
dict holds named parts, whose sum is the reward. Rewards are maximised.

The function is called in a pool of processes, so that it may be slow, hang or
crash. It is called once for each distinct answer to a row in a step.
"""

from collections.abc import Callable, Sequence
import concurrent.futures
import concurrent.futures.process
import contextlib
import functools
import importlib
import importlib.util
import inspect
import json
import multiprocessing
import os
from pathlib import Path
import signal
import sys
import traceback
from typing import Any, NamedTuple

import jax
from jax.experimental import multihost_utils
import numpy as np

from mezo_jax.core import extras
from mezo_jax.core.errors import first_line, InputError
from mezo_jax.tasks.score import texts
from mezo_jax.tasks.task import Task

# --- the function -----------------------------------------------------------


class Source(NamedTuple):
  """Says where a process finds a reward function."""

  module: str  # name of a module, or path of a file
  name: str  # name of the function in it


def source_of(function: str | Callable[..., Any]) -> Source:
  """Returns where a reward function is defined.

  Args:
    function: ``'MODULE:FUNCTION'``, ``'FILE.py:FUNCTION'``, or a function that
      is defined at the top level of a file.

  Raises:
    InputError: If it is neither.
  """
  if isinstance(function, str):
    module, colon, name = function.rpartition(':')
    if not (colon and module and name.isidentifier()):
      raise InputError(
          f'config: reward.function is {function!r}; write MODULE:FUNCTION or '
          'FILE.py:FUNCTION.')
    return Source(module, name)
  name, file = getattr(function, '__qualname__', ''), None
  with contextlib.suppress(TypeError):
    file = inspect.getsourcefile(function)
  if file is None or not name.isidentifier():
    raise InputError(
        f'config: reward.function is {function!r}, which other processes '
        'cannot import; give a function that a file defines at its top level.')
  return Source(file, name)


def load(source: Source) -> Callable[[str, dict[str, Any]], Any]:
  """Imports a reward function.

  Args:
    source: Where it is defined. A module is also searched for in the present
      directory, and a file may import the modules beside it.

  Raises:
    InputError: If the module or file cannot be imported, has no such function,
      or the function does not take two arguments.
  """
  where = f'reward.function {source.module}:{source.name}'
  try:
    if source.module.endswith('.py'):
      path = Path(source.module).expanduser().resolve()
      # A name of its own hides no other module.
      name = f'_rewards_{path.stem}'
      spec = importlib.util.spec_from_file_location(name, path)
      assert spec is not None and spec.loader is not None  # for a .py file
      module = importlib.util.module_from_spec(spec)
      # As for a script, modules in the folder of the file can be imported.
      _find_in(str(path.parent))
      sys.modules[name] = module  # dataclasses look it up
      spec.loader.exec_module(module)
    else:
      _find_in(os.getcwd())
      module = importlib.import_module(source.module)
  except Exception as e:
    raise InputError(f'config: {where} cannot be imported: {type(e).__name__}: '
                     f'{first_line(e)}.') from e
  function = getattr(module, source.name, None)
  if not callable(function):
    raise InputError(f'config: {where} does not exist: the module has no '
                     f'function {source.name!r}.')
  try:
    inspect.signature(function).bind('', {})
  except TypeError:
    raise InputError(f'config: {where} must take two arguments, the text of an '
                     'answer and the row.') from None
  except ValueError:  # A builtin may have no signature.
    pass
  return function


def _find_in(folder: str) -> None:
  """Lets Python find modules in a folder, after all others."""
  if folder not in sys.path:
    sys.path.append(folder)


# The reward function of a worker process.
_function: list[Callable[..., Any]] = []


def _start(source: Source) -> None:
  """Prepares a worker process."""
  # Ctrl-C reaches all processes of a terminal; the run itself ends the pool.
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  # A reward function that uses JAX must not take the devices of the run.
  jax.config.update('jax_platforms', 'cpu')
  _function.append(load(source))


def _call(text: str, row: dict[str, Any]) -> dict[str, float] | str:
  """Calls the reward function in a worker process.

  Returns:
    The named parts of the reward (with the name '' if there are none), or a
    description of the error.
  """
  try:
    found = _function[0](text, row)
    parts = found if isinstance(found, dict) else {'': found}
    parts = {str(name): float(value) for name, value in parts.items()}
    # Rewards are float32. The comparison is false for NaN.
    if parts and abs(sum(parts.values())) < 3e38:
      return parts
    return f'it returned {found!r}'
  except BaseException as e:  # SystemExit, too, as of code that answers contain
    at = traceback.extract_tb(e.__traceback__)[-1]
    return (f'{type(e).__name__}: {first_line(e)} ({at.filename}, line '
            f'{at.lineno})')


class Pool:
  """Calls a reward function in several processes, with a time limit.

  The processes start at the first call, and end with this process.
  """

  def __init__(self, source: Source, timeout: float, failed: float,
               workers: int) -> None:
    """Stores the options of a pool.

    Args:
      source: Where the function is defined.
      timeout: Time limit of a call, in seconds. A process that exceeds it is
        ended and replaced.
      failed: Reward of an answer for which the function raises an exception,
        does not return finite numbers, exceeds the limit or ends its process.
      workers: Number of processes; 0 for the number of cores, at most 16.
    """
    self._source, self._timeout, self._failed = source, timeout, failed
    self._workers = workers or min(_cores(), 16)
    self._pool: Any = None  # a pebble.ProcessPool, made at the first call
    self._told: set[str] = set()  # warnings that were given
    self._works = False  # whether any call has succeeded

  def __call__(self, answers: Sequence[str], rows: Sequence[dict[str, Any]]
               ) -> tuple[list[dict[str, float]], int]:
    """Returns the parts of the reward of each answer, and how many failed.

    Args:
      answers: The texts of the answers.
      rows: The row of each answer.

    Raises:
      InputError: If the function has failed for every answer so far.
    """
    if self._pool is None:
      extras.require(__name__, 'pebble')
      import pebble
      self._pool = pebble.ProcessPool(
          self._workers, context=multiprocessing.get_context('spawn'),
          initializer=_start, initargs=(self._source,))
    # Equal answers to a row get equal rewards, from one call.
    first = {}
    index = [first.setdefault((text, id(row)), (len(first), text, row))[0]
             for text, row in zip(answers, rows)]
    futures = [self._pool.schedule(_call, (text, row), timeout=self._timeout)
               for _, text, row in first.values()]
    found = [self._result(future) for future in futures]
    errors = [x for x in found if isinstance(x, str)]
    values = [sum(x.values()) for x in found if not isinstance(x, str)]
    self._works |= bool(values)
    if errors:
      words = (f'reward.function failed for {len(errors)} of {len(found)} '
               f'answers: {errors[0]}')
      if not self._works:
        raise InputError(f'{words}.')
      self._warn('failures', f'{words}. Their reward is reward.failed, '
                 f'{self._failed:g}')
      if values and min(values) < self._failed:
        self._warn(
            'rewarded', f'reward.failed, {self._failed:g}, is better than a '
            f'reward of {min(values):g}, so the model may learn to make the '
            'function fail; set it below all rewards')
    parts = [{'': self._failed} if isinstance(x, str) else x for x in found]
    return [parts[i] for i in index], sum(
        isinstance(found[i], str) for i in index)

  def _warn(self, kind: str, words: str) -> None:
    """Prints a warning on process 0; one of each kind is enough."""
    if kind not in self._told and jax.process_index() == 0:
      self._told.add(kind)
      print(f'warning: {words}.', flush=True)

  def _result(self, future) -> dict[str, float] | str:
    """Waits for a call, and describes the error if its process ended."""
    try:
      return future.result()
    except concurrent.futures.TimeoutError:
      return f'it took more than {self._timeout:g} seconds'
    except OSError as e:  # pebble.ProcessExpired
      return f'its process ended with status {getattr(e, "exitcode", e)}'
    except concurrent.futures.process.BrokenProcessPool as e:
      raise InputError(
          'the processes that call reward.function could not start; see their '
          'errors above. A script of your own must start a run below '
          "if __name__ == '__main__':, since each process imports the script."
          ) from e


def _cores() -> int:
  """Returns the number of cores that this process may use."""
  if hasattr(os, 'sched_getaffinity'):  # not on macOS and Windows
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


# --- rewards of rollouts ----------------------------------------------------


class Answer(NamedTuple):
  """Holds an answer of an evaluation and its reward."""

  row: dict[str, Any]
  text: str
  parts: dict[str, float]

  @property
  def reward(self) -> float:
    """Returns the reward, the sum of its parts."""
    return sum(self.parts.values())


class Reward:
  """Computes rewards of answers. Use `make` to build it.

  It can be called like a user's objective, with (predictions, examples), where
  only the mean reward is wanted; evaluation calls `report`. In a run of several
  processes, the first one computes the rewards of an evaluation, so that all
  get the same.

  Attributes:
    last: The answers of the last `report`.
  """

  __name__ = 'reward'

  def __init__(self, pool: Pool, solved: float) -> None:
    """Stores the pool and the least reward of an answer that counts as solved.
    """
    self._pool, self._solved, self.last = pool, solved, []

  def __call__(self, predictions: Sequence[str],
               examples: Sequence[dict[str, Any]]) -> float:
    """Returns the mean reward of answers."""
    return self.report(predictions, examples)['reward']

  def report(self, answers: Sequence[str], rows: Sequence[dict[str, Any]]
             ) -> dict[str, float]:
    """Returns the mean reward of answers, and the mean of each named part.

    Args:
      answers: The texts of the answers, one for each row.
      rows: The rows.
    """
    parts, failed = _by_first_process(lambda: self._pool(answers, rows))
    self.last = [*map(Answer, rows, answers, parts)]
    rewards = np.array([answer.reward for answer in self.last])
    return {'reward': float(rewards.mean()),
            'solved': float(np.mean(rewards >= self._solved)),
            **_means(parts), **_share_failed(failed, len(parts))}

  def of_rollouts(self, rows: Sequence[dict[str, Any]], task: Task,
                  tokenizer: Any) -> Callable[..., Any]:
    """Returns the ``reward`` of `mezo_jax.make_step` for generated answers.

    The function returned takes the ``outputs`` of the function `rollout` and
    returns the rewards [n, signs, B] and a dict of metrics. A row whose logits
    are not finite has the reward NaN, so that the step is skipped. In a run of
    several processes, each computes the rewards of its own share of the rows,
    and the means of named parts are those of this share.

    Args:
      rows: The training rows.
      task: Their task.
      tokenizer: Tokenizer of the model.
    """

    def reward(outputs: dict[str, np.ndarray], batch: Any
               ) -> tuple[np.ndarray, dict[str, Any]]:
      del batch
      tokens, shape = outputs['tokens'], outputs['row'].shape
      mine = np.arange(shape[-1]) % jax.process_count() == jax.process_index()
      numbers = outputs['row'][..., mine].ravel().tolist()
      said = texts(tokens[..., mine, :].reshape(-1, tokens.shape[-1]), task,
                   tokenizer)
      parts, failed = _or_all_fail(
          lambda: self._pool(said, [rows[i] for i in numbers]))
      values = np.zeros(shape, np.float32)
      values[..., mine] = np.reshape(
          [sum(each.values()) for each in parts], values[..., mine].shape)
      counts = np.array([failed, len(parts)])
      if jax.process_count() > 1:
        values, counts = (np.asarray(x).sum(0) for x in (
            multihost_utils.process_allgather((values, counts))))
      members = tokens.reshape(-1, *tokens.shape[2:])
      metrics = {
          'solved': float(np.mean(values >= self._solved)),
          'identical': identical(members),
          'answer_tokens': float(outputs['tokens_used'].mean()),
          'generated_tokens': int(outputs['tokens_used'].sum()),
          **_means(parts), **_share_failed(*counts)}
      return np.where(outputs['finite'], values, np.nan), metrics

    return reward


def identical(members: np.ndarray) -> float:
  """Returns the share of members whose answers are those of another member.

  If it is 1, all members answer alike, and their rewards show no direction.

  Args:
    members: The tokens of each member's answers, [members, B, T].
  """
  _, index, counts = np.unique(
      members.reshape(len(members), -1), axis=0, return_inverse=True,
      return_counts=True)
  return float(np.mean(counts[index.ravel()] > 1))


def _or_all_fail(compute: Callable[[], Any]) -> Any:
  """Calls a function, and raises InputError if it fails on any process.

  The other processes would otherwise wait for the one that has ended.

  Args:
    compute: The function, which may raise InputError.
  """
  error, found = None, None
  try:
    found = compute()
  except InputError as e:
    error = e
  if jax.process_count() > 1:
    failed = multihost_utils.process_allgather(np.array(error is not None))
    if np.any(failed) and error is None:
      error = InputError('reward.function failed for every answer on process '
                         f'{int(np.argmax(failed))}.')
  if error is not None:
    raise error
  return found


def _by_first_process(compute: Callable[[], Any]) -> Any:
  """Calls a function on process 0, and returns its result on all processes.

  Args:
    compute: The function. Its result consists of JSON values.
  """
  if jax.process_count() == 1:
    return compute()
  first = jax.process_index() == 0
  found = _or_all_fail(lambda: compute() if first else None)
  text = json.dumps(found).encode() if first else b''
  size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
  found = multihost_utils.broadcast_one_to_all(
      np.frombuffer(text.ljust(size), np.uint8))
  return json.loads(np.asarray(found).tobytes())


def _means(parts: Sequence[dict[str, float]]) -> dict[str, float]:
  """Returns the mean of each named part over the answers that have it."""
  names = dict.fromkeys(name for each in parts for name in each if name)
  return {f'reward/{name}': float(np.mean(
      [each[name] for each in parts if name in each])) for name in names}


def _share_failed(failed: int, total: int) -> dict[str, float]:
  """Returns the share of answers whose reward failed, or {} if none did."""
  return {'reward_failed': float(failed / total)} if failed else {}


@functools.lru_cache(maxsize=8)
def _shared(source: Source, timeout: float, failed: float, workers: int,
            solved: float) -> Reward:
  """Returns the same `Reward`, with one pool, for the same options."""
  return Reward(Pool(source, timeout, failed, workers), solved)


def make(options: Any) -> Reward:
  """Returns the `Reward` of a config.

  Args:
    options: The `mezo_jax.training.config.Reward` of a run.

  Raises:
    InputError: If its function cannot be found by other processes.
  """
  return _shared(source_of(options.function), options.timeout, options.failed,
                 options.workers, options.solved)
