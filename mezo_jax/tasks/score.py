r"""Scores of candidates, and the objectives that training takes from them.

With :math:`a_c` the tokens of candidate c after the prompt x, its
length-normalised log-likelihood is

.. math:: s_c = \frac{1}{|a_c|} \sum_t \log p(a_{c,t} \mid x, a_{c,<t})

(Malladi et al., 2023, Appendix E). An objective is a ``value_fn(params,
batch)`` like any other, whether it has a derivative or not:

* ``cross_entropy``: of softmax(s) over the candidates (the paper's code calls
  it train_as_classification);
* ``lm``: minus the mean log-likelihood of the right answers' tokens, each token
  of the batch counting the same;
* ``accuracy``, ``f1``: minus the metric (Section 3.3 of the paper): accuracy or
  macro-F1 of argmax s; exact match or span F1 of the text that is generated;
* any Python function ``f(predictions, examples)``, to be maximised:
  predictions are the numbers of the chosen candidates or the generated texts,
  examples the rows.

What Python must compute runs on the host inside the step, through
`jax.pure_callback`, so that nothing else of the step changes; it needs one
process (on several hosts only the others work).
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

_NEVER = -1e30  # the score of a candidate that a row does not have


def apply(model: Any, params: Any, batch: dict[str, Any]) -> Callable[..., Any]:
  """Returns `models.apply` of a batch's tokens, without its other arguments."""
  types = batch.get('token_type_ids') if model.config.token_types > 1 else None
  return functools.partial(
      models.apply, model, params, batch['input_ids'],
      batch['attention_mask'], token_type_ids=types, trunk=batch.get('trunk'))


def log_likelihoods(model: Any, params: Any, batch: dict[str, Any], form: Form
                    ) -> tuple[jax.Array, jax.Array]:
  """(sums, counts) over the answers' tokens, float32 [rows, C] each.

  Where label words are read at one position, sums are logits: log-likelihoods
  up to a constant per row. A candidate that a row does not have has count 0.

  Args:
    model: a `mezo_jax.models.Transformer`.
    params: its parameters.
    batch: of the rows, see `mezo_jax.tasks.encode.batch_of`.
    form: of the rows, `Encoded.form`.
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
  """Length-normalised log-likelihoods [rows, C]."""
  return jnp.where(counts > 0, sums / jnp.maximum(counts, 1), _NEVER)


def generate(model: Any, params: Any, batch: dict[str, Any], task: Task,
             tokenizer: Any) -> jax.Array:
  """Continues prompts greedily up to a stop: int32 [rows, max_new_tokens]."""
  return models.generate(
      model, params, batch['input_ids'], batch['attention_mask'],
      max_new_tokens=task.max_new_tokens,
      stop_ids=stop_ids(task, tokenizer))


def stop_ids(task: Task, tokenizer: Any) -> tuple[int, ...]:
  """Returns the tokens that end an answer: every token of the vocabulary with
  ``task.stop`` in its text, and the end token.

  Where no single token has all of ``task.stop`` in it, a row goes on to its
  end token or to ``max_new_tokens``, and `texts` cuts the answer.
  """
  return tuple(sorted(_Written.of(tokenizer, task.stop).ends))


def texts(tokens: np.ndarray, task: Task, tokenizer: Any) -> list[str]:
  """Returns the answers in generated tokens [R, N]: each row's text before its
  first ``task.stop`` or end token, without outer white space."""
  written = _Written.of(tokenizer, task.stop)
  return [written.answer(row) for row in np.asarray(tokens).tolist()]


class _Written(NamedTuple):
  """Reads tokens as a text that goes on, and knows which of them end it."""

  tokenizer: Any
  stop: str
  anchor: list[int]  # tokens of a text that others follow
  known: frozenset[int]  # a model may have more tokens than its tokenizer
  ends: frozenset[int]

  @classmethod
  @functools.lru_cache(maxsize=16)  # reading a vocabulary takes a second
  def of(cls, tokenizer, stop: str) -> '_Written':
    ids = sorted(set(tokenizer.get_vocab().values()))
    plain = sorted({*ids} - {*tokenizer.all_special_ids})
    words = [tokenizer(text, add_special_tokens=False, padding=False,
                       truncation=False)['input_ids'] for text in ('a', '0')]
    anchor = next((w for w in words if w and set(w) <= set(plain)), plain[:1])
    found = cls(tokenizer, stop, anchor, frozenset(ids), frozenset())
    end = tokenizer.eos_token_id
    ends = set() if end is None else {end}
    if stop:
      ends |= {i for i, text in zip(ids, found.read([i] for i in ids))
               if stop in text}
    return found._replace(ends=frozenset(ends))

  def read(self, rows, skip_special: bool = False) -> list[str]:
    """Returns the text that each row of tokens adds to one before it.

    A tokenizer of words leaves out the space before the first token that it
    decodes, and a stop text may begin with one: so there is a token before.
    """
    rows = [[*self.anchor, *row] for row in rows]
    if self.tokenizer.is_fast:  # all at once
      found = self.tokenizer.backend_tokenizer.decode_batch(
          [self.anchor, *rows], skip_special_tokens=skip_special)
    else:
      found = [self.tokenizer.decode(
          row, skip_special_tokens=skip_special,
          clean_up_tokenization_spaces=False) for row in [self.anchor, *rows]]
    before, *found = found
    return [text[len(before):] for text in found]

  def answer(self, row: list[int]) -> str:
    """Returns the answer in a row of generated tokens."""
    end = next((i for i, t in enumerate(row) if t in self.ends), len(row))
    if end < len(row) and row[end] != self.tokenizer.eos_token_id:
      # The token that stops may have a part of the answer before its stop.
      end += 1
    row = [t for t in row[:end] if t in self.known]
    if not self.stop:
      text, = self.read([row], skip_special=True)
      return text.strip()
    stops = lambda n: self.stop in self.read([row[:n]])[0]
    if stops(len(row)):  # what comes after the token that completes it goes
      row = row[:bisect.bisect_left(range(len(row)), True, key=stops)]
    text, = self.read([row], skip_special=True)
    return text.partition(self.stop)[0].strip()


class Host:
  """Calls Python functions from within a step, as `jax.pure_callback` does.

  An exception in such a call would leave the other devices of the step waiting
  for this one. So the call returns NaN instead, and `check` raises the
  exception.
  """

  def __init__(self):
    self._error = None

  def __call__(self, function: Callable[..., Any], shape: jax.ShapeDtypeStruct,
               *args: Any) -> Any:
    def call(*args):
      try:
        return function(*args)
      except Exception as e:
        self._error = self._error or e
        return np.full(shape.shape, np.nan, shape.dtype)
    return jax.pure_callback(call, shape, *args)

  def check(self) -> None:
    """Raises the first exception of a call, if there was one."""
    if self._error:
      raise self._error


def make_loss_fn(model: Any, data: Encoded, task: Task,
                 objective: str | Callable[..., Any], tokenizer: Any = None,
                 ask_host: Callable[..., Any] = jax.pure_callback
                 ) -> Callable[..., Any]:
  """``loss_fn(params, batch)`` of batches of ``data``, a `value_fn`: the rows'
  ``(values, weights)``, float32 [rows] each, or a scalar where the objective is
  no mean over rows (macro-F1, what Python computes of a batch).

  Args:
    model: a `mezo_jax.models.Transformer`.
    data: the rows that batches are made of, with their right answers alone
      where `mezo_jax.tasks.objective.gold_only`.
    task: the rows' task.
    objective: one of `mezo_jax.tasks.objective.OBJECTIVES`, or
      ``f(predictions, examples)`` that returns a number to be maximised.
    tokenizer: needed where the answer is generated.
    ask_host: calls a Python function; see `jax.pure_callback`.

  Raises:
    ValueError: for an objective that does not fit the task.
  """
  objectives.check_objective(task, objective)
  likely = functools.partial(log_likelihoods, model, form=data.form)
  def cross_entropy(params, batch):
    log_p = jax.nn.log_softmax(scores(*likely(params, batch)))
    nll = -jnp.take_along_axis(log_p, batch['label'][:, None], -1)[:, 0]
    return nll, batch['weight']

  def lm(params, batch):
    sums, counts = (jnp.sum(x, -1) for x in likely(params, batch))
    return -sums / jnp.maximum(counts, 1), counts * batch['weight']

  def predict(params, batch):
    found = scores(*likely(params, batch))
    return jnp.argmax(found, -1), jnp.isfinite(jnp.max(found, -1))

  def accuracy(params, batch):
    said, finite = predict(params, batch)
    right = jnp.take_along_axis(batch['gold'], said[:, None], -1)[:, 0]
    return jnp.where(finite, -right.astype(jnp.float32), jnp.nan), (
        batch['weight'])

  def f1(params, batch):
    weight = batch['weight'][:, None]
    one_hot = lambda x: jax.nn.one_hot(x, data.width) * weight
    predictions, finite = predict(params, batch)
    said, true = one_hot(predictions), one_hot(batch['label'])
    total = jnp.sum(said + true, 0)
    each = 2 * jnp.sum(said * true, 0) / jnp.maximum(total, 1)
    value = -jnp.sum(each) / jnp.maximum(jnp.sum(total > 0), 1)
    return jnp.where(jnp.all(finite | (weight[:, 0] == 0)), value, jnp.nan)

  def on_host(measure, predict, shape):
    """``-measure(predictions, examples)`` of the rows that have a weight."""
    def call(predictions, row, weight):
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
