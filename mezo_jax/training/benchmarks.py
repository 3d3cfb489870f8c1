"""Evaluates models on public benchmarks with lm-eval.

lm-eval (EleutherAI's language model evaluation harness) makes prompts, and
asks a model for log-likelihoods and continuations of texts. `make_lm` answers
it with a model of this library. Texts are tokenised and cut as by lm-eval's own
class for transformers, so that both give the same numbers.
"""

from collections.abc import Callable, Iterator, Sequence
import json
import os
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from mezo_jax import models
from mezo_jax.core import extras, sharding
from mezo_jax.core.errors import InputError, local
from mezo_jax.tasks import evaluate, score, Task
from mezo_jax.training import config as config_lib
from mezo_jax.training import inference, saved, trainable

# Lengths to which inputs are padded. A model is compiled once for each.
_BUCKETS = tuple(2**i for i in range(5, 21))
# Largest number of logits of a batch, 512 MiB in float32.
_LOGITS = 2**27
# Largest number of new tokens if a task does not say it, as in lm-eval.
_NEW_TOKENS = 256


def run(source: str | os.PathLike[str], tasks: Sequence[str], *,
        step: int | None = None, include: str | None = None,
        rows: int = 32, **options: Any) -> dict[str, Any]:
  """Evaluates the model of a run, an export or a hub id on benchmarks.

  Args:
    source: Working directory of a run, a directory that ``mezo-jax export``
      wrote, or a model: a directory or a hub id.
    tasks: Names of lm-eval's tasks.
    step: For a working directory, the step of the checkpoint. Defaults to None,
      for the best step on the dev rows.
    include: Directory with the YAML files of further tasks. Defaults to None.
    rows: Largest number of rows of a batch. Defaults to 32.
    **options: Further arguments of ``lm_eval.simple_evaluate``, such as
      ``num_fewshot``, ``limit`` or ``apply_chat_template``.

  Returns:
    What ``lm_eval.simple_evaluate`` returns.

  Raises:
    FileNotFoundError: If there is no such model.
    ValueError: If it cannot be read, or if a task does not exist.
  """
  extras.require('lm-eval', 'lm_eval', extra='lm-eval')
  import lm_eval
  from lm_eval.tasks import TaskManager
  if jax.process_count() > 1:
    raise InputError('lm-eval runs in one process only, but there are '
                     f'{jax.process_count()}; start it on one host.')
  if include is not None and not os.path.isdir(include):
    raise InputError(f'{include} is not a directory with the YAML files of '
                     'tasks; give another one.')
  manager = TaskManager(include_path=include)
  unknown = [name for name in tasks if not manager.match_tasks([name])]
  if unknown or not tasks:
    raise InputError(
        f'lm-eval has no task {", ".join(unknown) or "without a name"}; see '
        '`lm-eval ls tasks`, or give the directory of its YAML file.')
  config, found = load(source, step)
  soft = inference.soft_ids(config, found.model.config)
  lm = make_lm(found, soft=soft, rows=rows,
               before=trainable.tokens_before(config),
               chat_args=config.task.chat_args)
  options |= dict(tasks=[*tasks], task_manager=manager)
  return cast(Any, lm_eval.simple_evaluate)(lm, **options)


def table(results: dict[str, Any]) -> str:
  """Returns the results of `run` as a Markdown table."""
  from lm_eval.utils import make_table
  return make_table(results)


def write(path: Path, results: dict[str, Any]) -> None:
  """Writes the results of `run` as JSON, without the samples of the tasks."""
  kept = {k: v for k, v in results.items() if k != 'samples'}
  path.write_text(json.dumps(kept, indent=2, default=str) + '\n')


def load(source: str | os.PathLike[str], step: int | None = None
         ) -> tuple[config_lib.Train, saved.Trained]:
  """Loads the model of a run, an export or a hub id, with its config.

  Raises:
    InputError: If the model cannot continue texts.
  """
  source = os.fspath(source)
  if inference.is_trained(source):
    config, load_model = inference.find(local(source), step)
    found = load_model()
  else:
    config = config_lib.Train(method='zero_shot')
    config.model.name = source
    if step is not None:
      raise InputError(f'{source} is not the working directory of a run, so it '
                       'has no steps; leave out the step.')
    found = saved.untrained(config)
  if not found.model.config.causal or not found.model.config.head:
    raise InputError(f'{source} is not a causal language model, so it cannot '
                     'continue the texts of benchmarks; give another model.')
  return config, found


def make_lm(found: saved.Trained, soft: Sequence[int] = (), rows: int = 32,
            before: int = 0, chat_args: Sequence[tuple[str, Any]] = ()
            ) -> Any:
  """Returns a model for ``lm_eval.simple_evaluate``.

  Args:
    found: The model.
    soft: Token ids of a soft prompt, which come before each text. Defaults to
      (), for none.
    rows: Largest number of rows of a batch. Defaults to 32.
    before: Number of positions that a soft prompt or a prefix takes. Defaults
      to 0.
    chat_args: Pairs of a variable of the chat template and its value. Defaults
      to ().

  Returns:
    An ``lm_eval.api.model.TemplateLM``.
  """
  extras.require('lm-eval', 'lm_eval', extra='lm-eval')
  from lm_eval import utils
  from lm_eval.api.model import TemplateLM
  from lm_eval.models.utils import normalize_gen_kwargs
  tokenizer, c = found.tokenizer, found.model.config
  longest = c.max_length - max(before, len(soft))
  score_texts = _make_scorer(found, soft, rows, longest)
  write = _make_writer(found, soft, rows, longest)

  class MezoLM(TemplateLM):
    """Answers the requests of lm-eval.

    Attributes:
      max_length: Largest number of tokens of an input.
    """

    max_length = longest
    eot_token_id = tokenizer.eos_token_id
    prefix_token_id = (tokenizer.eos_token_id if tokenizer.bos_token_id is None
                       else tokenizer.bos_token_id)
    tokenizer_name = tokenizer.name_or_path.replace('/', '__')

    def __init__(self):
      super().__init__()
      self.tokenizer = tokenizer

    def tok_encode(self, string, add_special_tokens=None, **kwargs):
      del kwargs
      bos = tokenizer.bos_token
      if add_special_tokens is None and bos and string.startswith(bos):
        add_special_tokens = False
      return tokenizer.encode(
          string, truncation=False, padding=False, verbose=False, **(
              {} if add_special_tokens is None else
              {'add_special_tokens': add_special_tokens}))

    def _loglikelihood_tokens(self, requests, **kwargs):
      del kwargs
      return score_texts([(before, after) for _, before, after in requests])

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
      del disable_tqdm
      windows = [[utils.make_disjoint_window(window)
                  for window in utils.get_rolling_token_windows(
                      self.tok_encode(request.args[0]), self.prefix_token_id,
                      self.max_length, context_len=1)] for request in requests]
      found = iter(score_texts(
          [window for of_text in windows for window in of_text], greedy=False))
      return [sum(next(found)[0] for _ in of_text) for of_text in windows]

    def generate_until(self, requests, disable_tqdm=False):
      del disable_tqdm
      kinds: dict[str, list[int]] = {}
      for i, request in enumerate(requests):
        kinds.setdefault(repr(request.args[1]), []).append(i)
      out = [''] * len(requests)
      for same in kinds.values():
        options = normalize_gen_kwargs(requests[same[0]].args[1], _NEW_TOKENS)
        prompts = [self.tok_encode(requests[i].args[0]) for i in same]
        for i, text in zip(same, write(prompts, options)):
          out[i] = text
      return out

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
      return tokenizer.apply_chat_template(
          chat_history, tokenize=False,
          add_generation_prompt=add_generation_prompt,
          continue_final_message=not add_generation_prompt, **dict(chat_args))

  return MezoLM()


def _make_scorer(found: saved.Trained, soft: Sequence[int], rows: int,
                 longest: int) -> Callable[..., list[tuple[float, bool]]]:
  """Returns a function that computes log-likelihoods of continuations.

  Returns:
    A function ``score(pairs, greedy=True)`` of pairs of the tokens of a text
    and its continuation. For each pair it returns the log-likelihood of the
    continuation and, with ``greedy``, whether each of its tokens is the
    likeliest (otherwise False).
  """
  model, most = found.model, longest + len(soft)
  vocabulary = model.config.vocab_size

  def log_p(params, batch, greedy):
    apply = lambda **kwargs: models.apply(
        model, params, batch['ids'], batch['mask'], answer_at=batch['at'],
        **kwargs)
    there = batch['targets'] >= 0
    targets = jnp.where(there, batch['targets'], 0)
    if not greedy:
      each, best = apply(targets=targets), jnp.zeros_like(there)
    else:
      logits = apply()
      each = jnp.take_along_axis(
          jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
      best = jnp.argmax(logits, -1) == targets
    return (jnp.sum(jnp.where(there, each, 0.0), 1),
            jnp.all(best | ~there, 1))

  jitted = jax.jit(log_p, static_argnames='greedy', out_shardings=(
      sharding.replicated(sharding.without_directions(found.mesh))))

  def score_pairs(pairs, greedy=True):
    # The last token of a continuation is predicted, but is not an input.
    last = longest + 1
    kept = [([*soft, *[*before, *after][-last:]], len(after))
            for before, after in pairs]
    answer = max((n for _, n in kept), default=0)
    if answer > longest:
      raise InputError(
          f'a task has an answer of {answer} tokens, but the model has only '
          f'{longest} positions; leave the task out.')
    out: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
    sizes = [(_padded(len(ids) - 1, most), _padded(n, most)) for ids, n in kept]
    for index, (length, width), count in _batches(
        sizes, rows, (vocabulary if greedy else 1), found.mesh):
      batch = {'ids': np.zeros((count, length), np.int32),
               'mask': np.zeros((count, length), np.int32),
               'at': np.zeros((count, width), np.int32),
               'targets': np.full((count, width), -1, np.int32)}
      batch['mask'][:, 0] = 1  # also of rows that only fill the batch
      for row, i in enumerate(index):
        ids, n = kept[i]
        m = len(ids) - 1
        batch['ids'][row, :m], batch['mask'][row, :m] = ids[:-1], 1
        batch['at'][row, :n] = np.arange(m - n, m)
        batch['targets'][row, :n] = ids[len(ids) - n:]
      sums, best = jax.device_get(_on(found.mesh, jitted, found.params, batch,
                                      greedy=greedy))
      for row, i in enumerate(index):
        out[i] = float(sums[row]), bool(best[row] and greedy)
    return out

  return score_pairs


def _make_writer(found: saved.Trained, soft: Sequence[int], rows: int,
                 longest: int) -> Callable[..., list[str]]:
  """Returns a function that continues texts.

  Returns:
    A function ``write(prompts, options)`` of the tokens of texts and the
    ``until``, ``max_gen_toks``, ``do_sample``, ``temperature``, ``top_p`` and
    ``top_k`` of lm-eval. It returns the continuations.
  """
  model, tokenizer, most = found.model, found.tokenizer, longest

  def write(prompts, options):
    until = [text for text in options['until'] if text]
    new = int(options['max_gen_toks'])
    if new >= most:
      raise InputError(
          f'a task asks for {new} new tokens, but the model has only {most} '
          'positions for a prompt and its continuation; lower max_gen_toks in '
          'its YAML file, or leave the task out.')
    tasks = [Task(kind='generation', template='{x}', stop=text)
             for text in until or ('',)]
    stops = sorted({i for task in tasks
                    for i in score.stop_ids(task, tokenizer)})
    how: dict[str, Any] = {}
    if options.get('do_sample') and options.get('temperature', 0) > 0:
      how = dict(temperature=options['temperature'], key=0,
                 top_k=options.get('top_k', 0), top_p=options.get('top_p', 1.0))
    kept = [[*soft, *ids[-(most - new):]] for ids in prompts]
    sizes = [(_padded(len(ids), most + len(soft) - new), 1) for ids in kept]
    generate = jax.jit(
        lambda params, batch: models.generate(
            model, params, batch['ids'], batch['mask'], max_new_tokens=new,
            stop_ids=stops, **how),
        out_shardings=sharding.replicated(
            sharding.without_directions(found.mesh)))
    out = [''] * len(prompts)
    for index, (length, _), count in _batches(sizes, rows, 1, found.mesh):
      batch = {name: np.zeros((count, length), np.int32)
               for name in ('ids', 'mask')}
      batch['mask'][:, -1] = 1
      for row, i in enumerate(index):
        batch['ids'][row, length - len(kept[i]):] = kept[i]
        batch['mask'][row, length - len(kept[i]):] = 1
      tokens = jax.device_get(_on(found.mesh, generate, found.params, batch))
      for row, i in enumerate(index):
        out[i] = _text(tokens[row].tolist(), tokenizer, until)
    return out

  return write


def _text(tokens: list[int], tokenizer, until: Sequence[str]) -> str:
  """Returns generated tokens as a text, cut where a stop text begins."""
  if tokenizer.eos_token_id in tokens:
    tokens = tokens[:tokens.index(tokenizer.eos_token_id)]
  text = tokenizer.decode(tokens, skip_special_tokens=True)
  for stop in until:
    text = text.partition(stop)[0]
  return text


def _padded(length: int, most: int) -> int:
  """Returns the smallest of `_BUCKETS` that holds a length, or ``most``."""
  return next((b for b in _BUCKETS if length <= b <= most), most)


def _batches(sizes: Sequence[tuple[int, int]], rows: int, values: int,
             mesh: jax.sharding.Mesh
             ) -> Iterator[tuple[list[int], tuple[int, int], int]]:
  """Yields batches of texts of the same padded size.

  Args:
    sizes: Padded numbers of tokens and of scored tokens of each text.
    rows: Largest number of rows of a batch.
    values: Number of values that are computed for each scored token.
    mesh: Mesh over which rows are split.

  Yields:
    Indices of the texts, their size, and the number of rows of the batch.
  """
  groups = sharding.row_groups(sharding.without_directions(mesh))
  for size in sorted(set(sizes)):
    index = [i for i, other in enumerate(sizes) if other == size]
    limit = evaluate.Sizes((), min(
        rows, max(_LOGITS // (size[1] * values), 1)))
    count = evaluate.rows_of_batch(limit, size[0], len(index), groups)
    for start in range(0, len(index), count):
      yield index[start:start + count], size, count


def _on(mesh: jax.sharding.Mesh, function: Callable, params: Any, batch: Any,
        **kwargs: Any) -> Any:
  """Calls a jitted function with a batch whose rows are split over a mesh."""
  mesh = sharding.without_directions(mesh)
  with jax.set_mesh(mesh):
    return function(params, sharding.put_batch(batch, mesh), **kwargs)
