"""Linear probing, and how the probe is written into a vocabulary head."""

from collections.abc import Callable
import warnings

import jax.numpy as jnp
import numpy as np

from mezo_jax import models
from mezo_jax.core.errors import InputError
from mezo_jax.tasks import data as data_lib
from mezo_jax.tasks.encode import Encoded
from mezo_jax.tasks.evaluate import choices_report, run_batches, Sizes
from mezo_jax.tasks.task import Task
from mezo_jax.training import config as config_lib
from mezo_jax.training import methods


def features(model, params, data: Encoded, sizes: Sizes, mesh) -> np.ndarray:
  """float32 [R, D]: what the label words' logits are linear in."""
  def read(params, batch):
    return models.apply(
        model, params, batch['input_ids'], batch['attention_mask'],
        answer_at=batch['answer_at'], features='head')[:, 0].astype(jnp.float32)
  return np.stack(run_batches(read, data, sizes, mesh)(params))


def fit_probe(x: np.ndarray, labels: np.ndarray, bias: bool):
  """scikit-learn's logistic regression, its penalty chosen by five folds.

  Settings as in the paper's code: at most 5,000 iterations, tolerance 1e-4,
  random state 0; an intercept for masked models only.

  Args:
    x: features [R, D].
    labels: [R].
    bias: whether there is an intercept.

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


def linear_probe(model, params, splits: data_lib.Splits, sizes: dict, mesh,
                 task: Task, objective: str | Callable = 'cross_entropy'):
  """Fits a probe to the train rows' features.

  Args:
    model: a `mezo_jax.models.Transformer`.
    params: its parameters.
    splits: rows whose label words are read at one position.
    sizes: of the batches, by split.
    mesh: that parameters are on.
    task: The rows' task, whose metric the report has.
    objective: Of the run; the report has its value.

  Returns:
    ``probe, report``: scikit-learn's model, and how right it is of the test
    rows.

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


def begin(config, built, params: dict, sizes: dict):
  """``params, report`` of a run that begins with a probe, which is written into
  the parameters where they are trained."""
  found, report = linear_probe(
      built.model, params, built.splits, sizes, built.mesh, config.task,
      config_lib.objective(config))
  if methods.method_of(config).steps:
    params = write_probe(params, found, built.splits.train.token_ids)
  return params, report


def probe_scores(probe, x: np.ndarray, width: int) -> np.ndarray:
  """Scores [R, C] of a probe; classes that it never saw come last."""
  found = probe.decision_function(x)
  if found.ndim == 1:
    found = np.stack([-found / 2, found / 2], -1)
  scores = np.full((len(x), width), -1e30)
  scores[:, probe.classes_] = found
  return scores


def write_probe(params: dict, probe, token_ids: np.ndarray) -> dict:
  """Parameters whose label-word logits are the probe's scores.

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
