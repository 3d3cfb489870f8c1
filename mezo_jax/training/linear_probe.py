"""Fits a linear probe to features of a model, and writes it into its head."""

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
  """Returns the inputs of the head at the position of the label words.

  Args:
    model: A `mezo_jax.models.Transformer`.
    params: Its parameters.
    data: Encoded rows whose label words are read at one position.
    sizes: Sizes of the batches.
    mesh: Mesh that the parameters are on.

  Returns:
    Features, an array of shape [rows, width] and dtype float32.
  """
  def read(params, batch):
    """Returns the features [rows, width] of a batch."""
    return models.apply(
        model, params, batch['input_ids'], batch['attention_mask'],
        answer_at=batch['answer_at'], features='head')[:, 0].astype(jnp.float32)
  return np.stack(run_batches(read, data, sizes, mesh)(params))


def fit_probe(x: np.ndarray, labels: np.ndarray, bias: bool) -> Any:
  """Fits scikit-learn's logistic regression with a cross-validated penalty.

  The settings are those of the paper's code: at most 5,000 iterations, a
  tolerance of 1e-4, random state 0, and an intercept for masked models only.
  The penalty is chosen by cross-validation with five folds.

  Args:
    x: Features, of shape [rows, width].
    labels: Class of each row, of shape [rows].
    bias: Whether to fit an intercept.

  Returns:
    The fitted `sklearn.linear_model.LogisticRegressionCV`.

  Raises:
    InputError: if features are not finite, or if there are too few rows or
      classes for a fit.
  """
  lost = int(np.sum(~np.isfinite(x).all(-1)))
  if lost:
    raise InputError(
        f'the linear probe cannot be fitted: the features of {lost} of '
        f'{len(x)} rows are not finite; try --config.model.dtype=float32.')
  from sklearn.exceptions import ConvergenceWarning
  from sklearn.linear_model import LogisticRegressionCV
  from threadpoolctl import threadpool_limits  # a dependency of scikit-learn
  probe = LogisticRegressionCV(
      max_iter=5000, tol=1e-4, fit_intercept=bias, random_state=0)
  # The matrices are small. With several threads BLAS would spend more time on
  # synchronisation than on arithmetic.
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
  """Fits a linear probe to the training rows, and tests it on the test rows.

  Args:
    model: A `mezo_jax.models.Transformer`.
    params: Its parameters.
    splits: Encoded rows whose label words are read at one position.
    sizes: Sizes of the batches, by the name of the split.
    mesh: Mesh that the parameters are on.
    task: Task of the rows. The report contains its metrics.
    objective: Objective of the run. The report contains its value. Defaults to
      'cross_entropy'.

  Returns:
    scikit-learn's model, the report on the test rows, and their scores.

  Raises:
    InputError: if label words have several tokens, or as `fit_probe`.
  """
  if splits.train.read_at is None or splits.test.read_at is None:
    raise InputError(
        'a linear probe needs label words of one token each and the objective '
        'cross_entropy; change --config.task.label_words or '
        '--config.objective, or use the method head_only.')
  read = lambda name: features(
      model, params, getattr(splits, name), sizes[name], mesh)
  probe = fit_probe(
      read('train'), splits.train.labels, bias=not model.config.causal)
  scores = probe_scores(probe, read('test'), splits.test.width)
  report = choices_report(task, objective, splits.test, scores)
  return probe, report, scores


def probe_scores(probe: Any, x: np.ndarray, width: int) -> np.ndarray:
  """Returns the scores of a probe, of shape [rows, classes].

  Classes without a training row get a score of -1e30, below all others.

  Args:
    probe: scikit-learn's model.
    x: Features, of shape [rows, width].
    width: Number of classes.
  """
  found = probe.decision_function(x)
  # With two classes scikit-learn returns one number per row, the difference of
  # the two scores.
  if found.ndim == 1:
    found = np.stack([-found / 2, found / 2], -1)
  scores = np.full((len(x), width), -1e30)
  scores[:, probe.classes_] = found
  return scores


def write_probe(params: dict[str, Any], probe: Any, token_ids: np.ndarray
                ) -> dict[str, Any]:
  """Returns parameters whose logits of the label words are the probe's scores.

  The probe's coefficients replace the rows of the label words in the head, and
  its intercept replaces their biases, if the head has biases.

  Args:
    params: Parameters of a model with an untied head.
    probe: scikit-learn's model.
    token_ids: Token id of each class's label word, of shape [classes].
  """
  coef, bias = probe.coef_, probe.intercept_
  if len(coef) == 1:  # two classes; see `probe_scores`
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
