r"""Scores candidates and computes training objectives from the scores.

Let :math:`a_c` be the tokens of candidate c after the prompt x. The score of
the candidate is its length-normalised log-likelihood,

.. math:: s_c = \frac{1}{|a_c|} \sum_t \log p(a_{c,t} \mid x, a_{c,<t}).

Each objective is a ``value_fn(params, batch)``. Only some are differentiable:

* ``cross_entropy`` is the cross-entropy of softmax(s) over the candidates. The
  code of the paper calls it train_as_classification.
* ``lm`` is minus the mean log-likelihood of the tokens of the right answers.
  Each token of the batch has the same weight.
* ``accuracy`` and ``f1`` are minus the metric (Section 3.3 of the paper). This
  is accuracy or macro F1 of argmax s or, if answers are generated, exact match
  or span F1.
* A Python function ``f(predictions, examples)`` is maximised. The predictions
  are the indices of the chosen candidates or the generated texts, and the
  examples are the rows.

Objectives that Python computes run on the host within the step, through
`jax.pure_callback`, so that the rest of the step is the same for all
objectives. They work with one process only.

References:
  Malladi et al. (2023), Fine-Tuning Language Models with Just Forward Passes,
    Appendix E.
"""

import bisect
from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mezo_jax import models
from mezo_jax.tasks import head, metrics
from mezo_jax.tasks import objective as objectives
from mezo_jax.tasks.encode import Encoded, Form
from mezo_jax.tasks.task import Task

# Score of a candidate that a row does not have. It is finite so that such rows
# pass the checks for finite scores.
_NEVER = -1e30


def apply(model: Any, params: Any, batch: dict[str, Any]) -> Callable[..., Any]:
  """Returns `mezo_jax.models.apply` with the tokens of a batch as arguments.

  Args:
    model: A `mezo_jax.models.Transformer`.
    params: Parameters of the model.
    batch: Batch from `mezo_jax.tasks.encode.batch_of`.

  Returns:
    A function of the other arguments, such as ``features``.
  """
  types = batch.get('token_type_ids') if model.config.token_types > 1 else None
  return functools.partial(
      models.apply, model, params, batch['input_ids'],
      batch['attention_mask'], token_type_ids=types,
      hidden_states=batch.get('hidden_states'))


def log_likelihoods(model: Any, params: Any, batch: dict[str, Any], form: Form
                    ) -> tuple[jax.Array, jax.Array]:
  """Returns the log-likelihood of each candidate and its number of tokens.

  Args:
    model: A `mezo_jax.models.Transformer`.
    params: Parameters of the model.
    batch: Batch from `mezo_jax.tasks.encode.batch_of`.
    form: The `Encoded.form` of the rows.

  Returns:
    A pair ``(sums, counts)``, float32 [rows, C] each. Sums are over the tokens
    of an answer. If answers are read at one position, they are logits, which
    are log-likelihoods up to a constant per row. A candidate that a row does
    not have has the count 0.
  """
  of = functools.partial(
      apply(model, params, batch), answer_at=batch['answer_at'])
  if form.at_one:
    if form.token_ids is None:
      sums = head.apply(params['classifier'], of(features='body')[:, 0])
    else:
      sums = of(token_ids=jnp.array(form.token_ids))[:, 0]
    return sums, jnp.ones_like(sums)
  log_p = of(targets=batch['answer_ids'], shared_prompt=True)
  mine = batch['answer_of'][..., None] == jnp.arange(form.width)
  return (jnp.sum(jnp.where(mine, log_p[..., None], 0.0), 1),
          jnp.sum(mine, 1).astype(jnp.float32))


def scores(sums: Any, counts: Any) -> Any:
  """Returns the length-normalised log-likelihoods [rows, C].

  Args:
    sums: Log-likelihoods [rows, C] from `log_likelihoods`.
    counts: Numbers of tokens [rows, C]. A candidate with none gets -1e30.
  """
  return jnp.where(counts > 0, sums / jnp.maximum(counts, 1), _NEVER)


def generate(model: Any, params: Any, batch: dict[str, Any], task: Task,
             tokenizer: Any) -> jax.Array:
  """Generates answers by greedy decoding.

  Args:
    model: A `mezo_jax.models.Transformer`.
    params: Parameters of the model.
    batch: Batch of prompts from `mezo_jax.tasks.encode.batch_of`.
    task: Task of the rows. Its ``end`` ends an answer.
    tokenizer: Tokenizer of the model.

  Returns:
    The generated tokens, int32 [rows, max_new_tokens].
  """
  return models.generate(
      model, params, batch['input_ids'], batch['attention_mask'],
      max_new_tokens=task.max_new_tokens,
      stop_ids=stop_ids(task, tokenizer))


def stop_ids(task: Task, tokenizer: Any) -> tuple[int, ...]:
  """Returns the ids of the tokens that end an answer.

  These are the end token, the token that ends a turn in the chat template if
  the task is a chat, and all tokens whose text contains ``task.end``. If
  ``task.end`` always takes several tokens, generation continues to the end
  token or to ``max_new_tokens``, and `texts` cuts the answer.

  Args:
    task: The task.
    tokenizer: Tokenizer of the model.
  """
  return tuple(sorted(
      _Written.of(tokenizer, task.end, task.in_turns).ends))


def texts(tokens: np.ndarray, task: Task, tokenizer: Any) -> list[str]:
  """Decodes generated tokens to answers.

  An answer is the text before the first ``task.end`` or end token, without
  white space around it.

  Args:
    tokens: Generated tokens, integers [R, N].
    task: The task.
    tokenizer: Tokenizer of the model.
  """
  written = _Written.of(tokenizer, task.end, task.in_turns)
  return [written.answer(row) for row in np.asarray(tokens).tolist()]


class _Written(NamedTuple):
  """Decodes tokens that continue a text and finds those that end an answer."""

  tokenizer: Any
  stop: str  # text that ends an answer
  anchor: list[int]  # tokens to put before others when they are decoded
  known: frozenset[int]  # ids of the tokenizer; a model may have more
  ends: frozenset[int]  # ids of tokens that end an answer

  @classmethod
  @functools.lru_cache(maxsize=16)  # Decoding a vocabulary takes a second.
  def of(cls, tokenizer, stop: str, chat: bool = False) -> '_Written':
    """Decodes every token of a vocabulary to find those that end an answer.

    Args:
      tokenizer: Tokenizer of transformers.
      stop: Text that ends an answer. '' for none.
      chat: Whether an answer is a turn of the chat template. Defaults to False.
    """
    ids = sorted(set(tokenizer.get_vocab().values()))
    plain = sorted({*ids} - {*tokenizer.all_special_ids})
    words = [tokenizer(text, add_special_tokens=False, padding=False,
                       truncation=False)['input_ids'] for text in ('a', '0')]
    anchor = next((w for w in words if w and set(w) <= set(plain)), plain[:1])
    found = cls(tokenizer, stop, anchor, frozenset(ids), frozenset())
    end = tokenizer.eos_token_id
    ends = set() if end is None else {end}
    if chat:
      ends |= ends_of_turn(tokenizer)
    if stop:
      ends |= {i for i, text in zip(ids, found.read([i] for i in ids))
               if stop in text}
    return found._replace(ends=frozenset(ends))

  def read(self, rows, skip_special: bool = False) -> list[str]:
    """Decodes tokens as the continuation of a text.

    Some tokenizers drop the space before the first token that they decode, but
    a stop text may begin with a space. The tokens are therefore decoded after
    an anchor, whose text is then removed.

    Args:
      rows: Token ids of each row.
      skip_special: Whether to leave out special tokens. Defaults to False.

    Returns:
      The text of each row.
    """
    rows = [[*self.anchor, *row] for row in rows]
    if self.tokenizer.is_fast:  # A fast tokenizer decodes all rows in one call.
      found = self.tokenizer.backend_tokenizer.decode_batch(
          [self.anchor, *rows], skip_special_tokens=skip_special)
    else:
      found = [self.tokenizer.decode(
          row, skip_special_tokens=skip_special,
          clean_up_tokenization_spaces=False) for row in [self.anchor, *rows]]
    before, *found = found
    return [text[len(before):] for text in found]

  def answer(self, row: list[int]) -> str:
    """Decodes the answer in a row of generated tokens."""
    end = next((i for i, t in enumerate(row) if t in self.ends), len(row))
    if end < len(row) and row[end] != self.tokenizer.eos_token_id:
      # The token that ends the answer may begin with the end of the answer.
      end += 1
    row = [t for t in row[:end] if t in self.known]
    if not self.stop:
      text, = self.read([row], skip_special=True)
      return text.strip()
    stops = lambda n: self.stop in self.read([row[:n]])[0]
    if stops(len(row)):
      # Drop all tokens after the one that completes the stop text. They cannot
      # be part of the answer but may change how it is decoded.
      row = row[:bisect.bisect_left(range(len(row)), True, key=stops)]
    text, = self.read([row], skip_special=True)
    return text.partition(self.stop)[0].strip()


def make_rollout_fn(model: Any, task: Task, tokenizer: Any,
                    temperature: float = 0.0, seed: int = 0
                    ) -> Callable[..., Any]:
  """Returns a function that generates the answers that rewards are given to.

  Args:
    model: A `mezo_jax.models.Transformer`.
    task: Task of the rows.
    tokenizer: Tokenizer of the model.
    temperature: Temperature of sampling. Defaults to 0, for the likeliest
      tokens.
    seed: Seed of sampling. A step uses the same random numbers for all points
      at which the function is evaluated. Defaults to 0.

  Returns:
    A function ``rollout(params, batch, step)``. It returns a dict of the
    ``tokens`` [rows, N] of the answers, the number of ``tokens_used`` [rows]
    before padding, whether all logits were ``finite`` [rows], and the index
    ``row`` [rows] of each row.
  """
  stops = stop_ids(task, tokenizer)

  def rollout(params, batch, step):
    # The directions z of a run use the other keys of its seed.
    key = jax.random.fold_in(jax.random.key(seed), 2**31)
    key = jax.random.fold_in(key, step)
    tokens, finite = models.generate(
        model, params, batch['input_ids'], batch['attention_mask'],
        max_new_tokens=task.max_new_tokens, stop_ids=stops, check=True,
        temperature=temperature, key=key)
    ends = jnp.isin(tokens, jnp.array(stops or (-1,)))
    used = jnp.where(jnp.any(ends, 1), jnp.argmax(ends, 1) + 1, ends.shape[1])
    return {'tokens': tokens, 'tokens_used': used, 'finite': finite,
            'row': batch['row']}
  return rollout


def ends_of_turn(tokenizer) -> set[int]:
  """Returns the special token that follows a turn of the assistant, if any.

  Args:
    tokenizer: Tokenizer of transformers with a chat template.

  Returns:
    The ids of at most one token.
  """
  said = 'abcd'
  text = tokenizer.apply_chat_template([
      {'role': 'user', 'content': 'a'},
      {'role': 'assistant', 'content': said}], tokenize=False)
  after = tokenizer(text.rpartition(said)[2], add_special_tokens=False)
  special = {*tokenizer.all_special_ids} | {
      i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
  return {*[i for i in after['input_ids'] if i in special][:1]}


class Host:
  """Calls Python functions within a jitted step, like `jax.pure_callback`.

  An exception in a callback would leave the other devices of the step waiting
  for this one. The callback therefore returns NaN instead, and `check` raises
  the exception after the step.
  """

  def __init__(self):
    self._error = None  # first exception of a callback

  def __call__(self, function: Callable[..., Any], shape: jax.ShapeDtypeStruct,
               *args: Any) -> Any:
    """Calls a function on the host.

    Args:
      function: Function of NumPy arrays.
      shape: Shape and dtype of its result.
      *args: Arrays to pass to the function.

    Returns:
      The result of the function, or NaN if it raises an exception.
    """
    def call(*args):
      try:
        return function(*args)
      except Exception as e:
        self._error = self._error or e
        return np.full(shape.shape, np.nan, shape.dtype)
    return jax.pure_callback(call, shape, *args)

  def check(self) -> None:
    """Raises the first exception of a callback, if there was one."""
    if self._error:
      raise self._error


def make_loss_fn(model: Any, data: Encoded, task: Task,
                 objective: str | Callable[..., Any], tokenizer: Any = None,
                 ask_host: Callable[..., Any] = jax.pure_callback
                 ) -> Callable[..., Any]:
  """Returns the loss function that training minimises.

  Args:
    model: A `mezo_jax.models.Transformer`.
    data: The tokenised rows from which batches are packed, with right answers
      only if `mezo_jax.tasks.objective.gold_only` says so for the objective.
    task: Task of the rows.
    objective: One of `mezo_jax.tasks.objective.OBJECTIVES`, or a function of
      (predictions, examples) that returns a number to maximise.
    tokenizer: Tokenizer of the model. It is needed if answers are generated.
    ask_host: Function that calls Python within a step, with the arguments
      ``(function, shape, *args)``. Defaults to `jax.pure_callback`; see also
      `Host`.

  Returns:
    A function ``loss_fn(params, batch)``. It returns a pair
    ``(values, weights)`` of float32 [rows] each. If the objective is not a mean
    over rows, such as macro F1 or a user's function, it returns a scalar.

  Raises:
    InputError: If the objective does not fit the task.
  """
  objectives.check_objective(task, objective)
  likely = functools.partial(log_likelihoods, model, form=data.form)
  def cross_entropy(params, batch):
    """Returns each row's cross-entropy over its candidates, and its weight."""
    log_p = jax.nn.log_softmax(scores(*likely(params, batch)))
    nll = -jnp.take_along_axis(log_p, batch['label'][:, None], -1)[:, 0]
    return nll, batch['weight']

  def lm(params, batch):
    """Returns each row's mean negative log-likelihood, and its weight."""
    sums, counts = (jnp.sum(x, -1) for x in likely(params, batch))
    # Weighting the mean of a row by its number of tokens gives every token of
    # the batch the same weight.
    return -sums / jnp.maximum(counts, 1), counts * batch['weight']

  def predict(params, batch):
    """Returns the chosen candidates, and whether their scores are finite."""
    found = scores(*likely(params, batch))
    return jnp.argmax(found, -1), jnp.isfinite(jnp.max(found, -1))

  def accuracy(params, batch):
    """Returns -1 for each row with a right prediction, else 0, and its weight.
    """
    said, finite = predict(params, batch)
    right = jnp.take_along_axis(batch['gold'], said[:, None], -1)[:, 0]
    # A row without finite scores makes the loss NaN instead of counting as
    # wrong, so that the step can be recognised as failed.
    return jnp.where(finite, -right.astype(jnp.float32), jnp.nan), (
        batch['weight'])

  def f1(params, batch):
    """Returns minus the macro F1 of the batch, a scalar."""
    weight = batch['weight'][:, None]
    one_hot = lambda x: jax.nn.one_hot(x, data.width) * weight
    predictions, finite = predict(params, batch)
    said, true = one_hot(predictions), one_hot(batch['label'])
    # F1 of a class is 2 TP / (predicted + actual). Macro F1 is its mean over
    # the classes that are predicted or actual in the batch.
    total = jnp.sum(said + true, 0)
    each = 2 * jnp.sum(said * true, 0) / jnp.maximum(total, 1)
    value = -jnp.sum(each) / jnp.maximum(jnp.sum(total > 0), 1)
    return jnp.where(jnp.all(finite | (weight[:, 0] == 0)), value, jnp.nan)

  def on_host(measure, predict, shape):
    """Returns a loss function that computes ``-measure`` on the host.

    Args:
      measure: Function of (predictions, examples) that returns one value or a
        list with a value per row. It gets no rows of weight 0, such as padding.
      predict: Function of (params, batch) that returns the predictions.
      shape: Function from a batch to the shape of the value.
    """
    def call(predictions, row, weight):
      """Computes the loss on the host, with 0 for rows of weight 0."""
      there = np.flatnonzero(np.asarray(weight) > 0)
      value = -np.asarray(measure(np.asarray(predictions)[there], [
          data.rows[r] for r in np.asarray(row)[there]]), np.float32)
      if not value.ndim:
        return value
      out = np.zeros(weight.shape, np.float32)
      out[there] = value
      return out
    def loss_fn(params, batch):
      predictions = predict(params, batch)
      value = ask_host(
          call, jax.ShapeDtypeStruct(shape(batch), jnp.float32), predictions,
          batch['row'], batch['weight'])
      return (value, batch['weight']) if value.ndim else value
    return loss_fn

  if data.generates:
    measure = None if callable(objective) else {
        'accuracy': metrics.exact_match, 'f1': metrics.span_f1}.get(
            objective)
    def of_texts(tokens, examples):
      answers = texts(tokens, task, tokenizer)
      if callable(objective):
        return objectives.value(objective, answers, examples)
      assert measure is not None
      return [measure(a, task.references(e))
              for a, e in zip(answers, examples)]
    return on_host(
        of_texts,
        functools.partial(generate, model, task=task, tokenizer=tokenizer),
        lambda batch: batch['weight'].shape if measure else ())
  if callable(objective):
    return on_host(lambda p, rows: objectives.value(
        objective, p.tolist(), rows),
                   lambda params, batch: predict(params, batch)[0],
                   lambda batch: ())
  return dict(cross_entropy=cross_entropy, lm=lm, accuracy=accuracy,
              f1=f1)[objective]
