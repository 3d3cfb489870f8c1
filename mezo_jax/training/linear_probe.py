"""Fits a linear probe, and writes it into a vocabulary head."""

from collections.abc import Callable
from typing import Any
import warnings

import jax
import jax.numpy as jnp
import numpy as np

from mezo_jax import models
from mezo_jax.core.errors import InputError
from mezo_jax.tasks import data as data_lib
from mezo_jax.tasks.encode import Encoded
from mezo_jax.tasks.evaluate import choices_report, run_batches, Sizes
from mezo_jax.tasks.task import Task


def features(model: Any, params: Any, data: Encoded, sizes: Sizes,
             mesh: jax.sharding.Mesh) -> np.ndarray:
  """Returns float32 [R, D]: the inputs of the head at the label words."""
  def read(params, batch):
    return models.apply(
        model, params, batch['input_ids'], batch['attention_mask'],
        answer_at=batch['answer_at'], features='head')[:, 0].astype(jnp.float32)
  return np.stack(run_batches(read, data, sizes, mesh)(params))


def fit_probe(x: np.ndarray, labels: np.ndarray, bias: bool) -> Any:
  """Fits scikit-learn's logistic regression; five folds choose the penalty.

  The settings are those of the paper's code: at most 5,000 iterations, a
  tolerance of 1e-4, random state 0, and an intercept for masked models only.

  Args:
    x: Features [R, D].
    labels: Labels [R].
    bias: Whether to fit an intercept.

  Raises:
    ValueError: if there are fewer than two labels, or rows, to fit, or
      features that are not finite.
  """
  lost = int(np.sum(~np.isfinite(x).all(-1)))
  if lost:
    raise InputError(
        f'the linear probe cannot be fitted: features of {lost} of {len(x)} '
        'rows are not finite; try --config.model.dtype=float32.')
  from sklearn.exceptions import ConvergenceWarning
  from sklearn.linear_model import LogisticRegressionCV
  from threadpoolctl import threadpool_limits  # scikit-learn's own
  probe = LogisticRegressionCV(
      max_iter=5000, tol=1e-4, fit_intercept=bias, random_state=0)
  # On small matrices BLAS threads wait for each other more than they work.
  with warnings.catch_warnings(), threadpool_limits(1):
    warnings.simplefilter('ignore', ConvergenceWarning)
    warnings.filterwarnings('ignore', category=FutureWarning)
    warnings.filterwarnings('ignore', message='The least populated class')
    try:
      return probe.fit(x, labels)
    except ValueError as e:
      raise InputError(
          f'the linear probe cannot be fitted to {len(labels)} rows: {e}'
      ) from e


def linear_probe(model: Any, params: Any, splits: data_lib.Splits,
                 sizes: dict[str, Any], mesh: jax.sharding.Mesh,
                 task: Task,
                 objective: str | Callable[..., Any] = 'cross_entropy') -> Any:
  """Fits a probe to the train rows' features.

  Args:
    model: A `mezo_jax.models.Transformer`.
    params: Its parameters.
    splits: Rows whose label words are read at one position.
    sizes: Shapes of the batches, by split.
    mesh: Mesh that parameters are on.
    task: Task of the rows, whose metric the report has.
    objective: Objective of the run, whose value the report has.

  Returns:
    scikit-learn's model, and its report on the test rows.

  Raises:
    ValueError: for label words of several tokens, or as `fit_probe`.
  """
  if splits.train.read_at is None or splits.test.read_at is None:
    raise InputError(
        'a linear probe takes features where label words of one token each are '
        'read; choose such with --config.task.label_words, the objective '
        'cross_entropy, or the method head_only.')
  read = lambda name: features(
      model, params, getattr(splits, name), sizes[name], mesh)
  probe = fit_probe(
      read('train'), splits.train.labels, bias=not model.config.causal)
  scores = probe_scores(probe, read('test'), splits.test.width)
  return probe, choices_report(task, objective, splits.test, scores)


def probe_scores(probe: Any, x: np.ndarray, width: int) -> np.ndarray:
  """Returns the scores [R, C] of a probe; classes that it never saw are last.
  """
  found = probe.decision_function(x)
  if found.ndim == 1:
    found = np.stack([-found / 2, found / 2], -1)
  scores = np.full((len(x), width), -1e30)
  scores[:, probe.classes_] = found
  return scores


def write_probe(params: dict[str, Any], probe: Any, token_ids: np.ndarray
                ) -> dict[str, Any]:
  """Returns parameters whose label-word logits are the probe's scores.

  The rows of the label words in the head become the probe's coefficients, and
  with an intercept their biases become it.
  """
  coef, bias = probe.coef_, probe.intercept_
  if len(coef) == 1:
    coef, bias = (np.concatenate([-x, x]) / 2 for x in (coef, bias))
  ids = token_ids[probe.classes_]
  table = params['lm_head']['embedding']
  table = table.at[ids].set(jnp.asarray(coef, table.dtype))
  params = params | {'lm_head': {'embedding': table}}
  if 'head' in params:
    old = params['head']['bias']
    params['head'] = params['head'] | {
        'bias': old.at[ids].set(jnp.asarray(bias, old.dtype))}
  return params
