"""Keeps the budget of private training: a secret, sampling and accounting.

HMAC-SHA256 of the secret and of a step's number gives the rows of the step and
the key of its noise. Each row is in the step with the same probability,
independently of the others (Poisson sampling). Without the secret, neither rows
nor noise can be predicted. With it, a resumed run makes exactly the same steps,
so nothing is released twice.

dp-accounting computes what is spent, by privacy loss distributions of
Poisson-sampled Gaussian or Laplace mechanisms. Neighbouring data sets differ by
one row that is added or removed. The account does not cover that floating-point
noise is not exact, that the noise of a step has a key of 64 bits, that other
settings (such as learning rates) were tried before, and the dev and test rows.
"""

import dataclasses
import functools
import hmac
import math
import os
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np

from mezo_jax.core.errors import InputError, MissingError

_SHARE = 1e-3  # share of delta for batches that exceed the capacity
_FILE = 'secret'


@dataclasses.dataclass(frozen=True)
class Plan:
  r"""A budget, and the noise that keeps to it.

  Attributes:
    epsilon: Epsilon of all steps together.
    delta: Delta of all steps together.
    mechanism: 'gaussian' or 'laplace'.
    steps: Number of steps of the run.
    rows: Number of training rows.
    batch_size: Expected number of rows of a batch.
    capacity: Largest number of rows of a batch. If more are sampled, some are
      left out at random; a part of delta covers that.
    noise_multiplier: :math:`\sigma`, in units of the clip.
  """

  epsilon: float
  delta: float
  mechanism: str
  steps: int
  rows: int
  batch_size: int
  capacity: int
  noise_multiplier: float

  def spent(self, steps: int) -> float:
    """Returns the epsilon, at the plan's delta, of so many of its steps."""
    if not steps:
      return 0.0
    account = _accountant()
    account.compose(_event(self.mechanism, self.noise_multiplier,
                           self.batch_size / self.rows, steps))
    return float(account.get_epsilon((1 - _SHARE) * self.delta))


def spell(plan: Plan, steps: int | None = None) -> str:
  """Returns a sentence about a plan, or about what its first steps spent."""
  if steps is not None:
    return (f'privacy: {steps} steps spent epsilon {plan.spent(steps):.3f} of '
            f'{plan.epsilon:g} at delta {plan.delta:g}')
  return (f'privacy: {plan.steps} steps of about {plan.batch_size} of '
          f'{plan.rows} rows (at most {plan.capacity}), with {plan.mechanism} '
          f'noise of {plan.noise_multiplier:.4f} times the clip, spend epsilon '
          f'{plan.spent(plan.steps):.3f} at delta {plan.delta:g}; dev and test '
          'rows have no privacy')


def account(plan: Plan, steps: int) -> dict[str, Any]:
  """Returns what a result says about a plan and what its steps spent."""
  return dataclasses.asdict(plan) | {'spent': plan.spent(steps)}


@functools.lru_cache
def plan(epsilon: float, delta: float, mechanism: str, steps: int, rows: int,
         batch_size: int, multiple: int = 1) -> Plan:
  """Returns the plan with the least noise that keeps (epsilon, delta).

  Args:
    epsilon: Epsilon of the budget.
    delta: Delta of the budget.
    mechanism: 'gaussian' or 'laplace'.
    steps: Number of steps of the run.
    rows: Number of training rows.
    batch_size: Expected number of rows of a batch.
    multiple: The capacity is a multiple of this number. Defaults to 1.

  Raises:
    MissingError: without dp-accounting.
    InputError: for more rows in a batch than there are, or a budget that no
      noise keeps to.
  """
  if batch_size > rows:
    raise InputError(f'data.batch_size {batch_size} is more than the {rows} '
                     'training rows that batches are samples of.')
  from scipy import stats  # slow to import
  rate = batch_size / rows
  # A batch that is cut short costs delta for both neighbours, (1 + e^epsilon)
  # times in all.
  most = _SHARE * delta / ((1 + math.exp(min(epsilon, 700.0))) * steps)
  capacity = int(stats.binom.isf(most, rows + 1, rate))  # a neighbour's too
  capacity = -(-max(capacity, 1) // multiple) * multiple
  dp = _library()
  try:
    noise = dp.calibrate_dp_mechanism(
        _accountant, lambda noise: _event(mechanism, noise, rate, steps),
        epsilon, (1 - _SHARE) * delta)
  except Exception as e:
    raise InputError(
        f'no noise keeps {steps} steps within privacy.epsilon {epsilon:g} and '
        f'privacy.delta {delta:g} ({e}).') from e
  return Plan(epsilon, delta, mechanism, steps, rows, batch_size, capacity,
              float(noise))


def _event(mechanism: str, noise: float, rate: float, steps: int):
  dp = _library()
  one = {'gaussian': dp.GaussianDpEvent, 'laplace': dp.LaplaceDpEvent}[
      mechanism](noise)
  return dp.SelfComposedDpEvent(dp.PoissonSampledDpEvent(rate, one), steps)


def _accountant():
  _library()
  from dp_accounting import pld
  # An upper bound at any interval, and at this one in a tenth of the time.
  return pld.PLDAccountant(value_discretization_interval=1e-3)


def _library():
  try:
    import dp_accounting
  except ImportError as e:
    raise MissingError('private training needs dp-accounting: pip install '
                       'dp-accounting.') from e
  return dp_accounting


# --- the secret -------------------------------------------------------------


def secret(workdir: Path, new: bool) -> bytes:
  """Returns the secret of a run, 32 bytes that only its user may read.

  Args:
    workdir: Directory of the run, where every process reads the secret.
    new: Whether the run is new, so that it may get a new secret.

  Raises:
    MissingError: if a run that was begun has lost its secret.
    InputError: if the secret is not what was written.
  """
  file = workdir / _FILE
  if not file.exists() and not new:
    raise MissingError(
        f'{file} is gone, without which steps that were made already would be '
        'made again with other noise, and be told twice: put it back, or give '
        'another --workdir.')
  if not file.exists() and jax.process_index() == 0:
    workdir.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix('.part')
    part.unlink(missing_ok=True)
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600),
                   'wb') as f:
      f.write(os.urandom(32))
      f.flush()
      os.fsync(f.fileno())
    part.replace(file)
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices('secret')
  found = file.read_bytes()
  if len(found) != 32:
    raise InputError(f'{file} has {len(found)} bytes, not 32: it is not that '
                     'of a run; put it back, or give another --workdir.')
  return found


def sample(secret: bytes, step: int, plan: Plan) -> np.ndarray:
  """Returns the rows that are sampled for a step."""
  rng = np.random.Generator(np.random.Philox(
      key=int.from_bytes(_digest(secret, 'rows', step)[:16], 'little')))
  rows = np.flatnonzero(rng.random(plan.rows) < plan.batch_size / plan.rows)
  if len(rows) > plan.capacity:
    rows = np.sort(rng.choice(rows, plan.capacity, replace=False))
  return rows


def noise_key(secret: bytes, step: int) -> np.ndarray:
  """Returns uint32 [2]: the key of the noise of a step."""
  return np.frombuffer(_digest(secret, 'noise', step)[:8], np.uint32)


def _digest(secret: bytes, purpose: str, step: int) -> bytes:
  return hmac.digest(secret, f'mezo_jax {purpose} {step}'.encode(),
                     'sha256')
