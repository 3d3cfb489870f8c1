"""Implements privacy accounting, sampling and the secret of private training.

The rows and the noise key of a step are derived from HMAC-SHA256 of a secret
and the number of the step. Each row is in the batch with the same probability,
independently of the others (Poisson sampling). Without the secret, neither rows
nor noise can be predicted. With it, a resumed run repeats exactly the same
steps. So the same result is never released with two different noises, from
which the noise could be averaged out.

The package dp-accounting computes the privacy that is spent, with privacy loss
distributions of Poisson-sampled Gaussian or Laplace mechanisms. Neighbouring
data sets differ by one row that is added or removed.

The guarantee does not cover:

* the rounding of the noise to floating-point numbers,
* an attacker who tries all 2**64 values of a step's noise key,
* earlier runs on the same rows, such as a search for a learning rate,
* the dev and test rows.
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

_SHARE = 1e-3  # fraction of delta that is reserved for batches that overflow
_FILE = 'secret'  # name of the file in the working directory


@dataclasses.dataclass(frozen=True)
class Plan:
  r"""Holds a privacy budget and the noise with which a run stays within it.

  Attributes:
    epsilon: Budget of all steps together.
    delta: Budget of all steps together.
    mechanism: Distribution of the noise, 'gaussian' or 'laplace'.
    steps: Number of steps of the run.
    rows: Number of training rows.
    batch_size: Expected number of rows in a batch.
    capacity: Maximum number of rows in a batch. If more are sampled, some are
      left out at random. A part of delta accounts for that.
    noise_multiplier: :math:`\sigma`, the scale of the noise divided by the
      clip.
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
    """Returns the epsilon that a number of steps spend, at the plan's delta."""
    if not steps:
      return 0.0
    account = _accountant()
    account.compose(_event(self.mechanism, self.noise_multiplier,
                           self.batch_size / self.rows, steps))
    return float(account.get_epsilon((1 - _SHARE) * self.delta))


def spell(plan: Plan, steps: int | None = None) -> str:
  """Returns a log line about a plan, or about the epsilon that it has spent.

  Args:
    plan: The plan of the run.
    steps: Number of steps that were made. Defaults to None, for a line about
      the plan.
  """
  if steps is not None:
    return (f'privacy: {steps} steps spent epsilon {plan.spent(steps):.3f} of '
            f'{plan.epsilon:g} at delta {plan.delta:g}')
  return (f'privacy: {plan.steps} steps on batches of about {plan.batch_size} '
          f'of {plan.rows} rows (at most {plan.capacity}), with '
          f'{plan.mechanism} noise of {plan.noise_multiplier:.4f} times the '
          f'clip, spend epsilon {plan.spent(plan.steps):.3f} at delta '
          f'{plan.delta:g}; the dev and test rows are not protected')


def account(plan: Plan, steps: int) -> dict[str, Any]:
  """Returns the entry 'privacy' of a result: the plan and the spent epsilon.

  Args:
    plan: The plan of the run.
    steps: Number of steps that were made.
  """
  return dataclasses.asdict(plan) | {'spent': plan.spent(steps)}


@functools.lru_cache
def plan(epsilon: float, delta: float, mechanism: str, steps: int, rows: int,
         batch_size: int, multiple: int = 1) -> Plan:
  """Returns the plan with the least noise that stays within (epsilon, delta).

  Args:
    epsilon: Budget of all steps together.
    delta: Budget of all steps together.
    mechanism: Distribution of the noise, 'gaussian' or 'laplace'.
    steps: Number of steps of the run.
    rows: Number of training rows.
    batch_size: Expected number of rows in a batch.
    multiple: Number of which the capacity must be a multiple, so that a batch
      can be split evenly. Defaults to 1.

  Raises:
    MissingError: if the package dp-accounting is not installed.
    InputError: if a batch is larger than the number of rows, or if no amount of
      noise stays within the budget.
  """
  if batch_size > rows:
    raise InputError(f'data.batch_size {batch_size} is larger than the {rows} '
                     'training rows that batches are sampled from; lower it.')
  from scipy import stats  # slow to import
  rate = batch_size / rows
  # If more rows are sampled than fit, some are left out, which the accountant
  # does not model. The capacity is therefore so large that this happens with a
  # probability of at most `most` per step. The guarantee compares two
  # neighbouring data sets, and the larger one has rows + 1 rows. An overflow
  # with either of them adds to delta, in total (1 + e^epsilon) * `most` per
  # step, so that all steps together add at most `_SHARE` * delta. min() keeps
  # exp() finite.
  most = _SHARE * delta / ((1 + math.exp(min(epsilon, 700.0))) * steps)
  capacity = int(stats.binom.isf(most, rows + 1, rate))
  capacity = -(-max(capacity, 1) // multiple) * multiple
  dp = _library()
  try:
    noise = dp.calibrate_dp_mechanism(
        _accountant, lambda noise: _event(mechanism, noise, rate, steps),
        epsilon, (1 - _SHARE) * delta)
  except Exception as e:
    raise InputError(
        f'no amount of noise keeps {steps} steps within privacy.epsilon '
        f'{epsilon:g} and privacy.delta {delta:g}; raise them, or lower steps '
        f'({e}).') from e
  return Plan(epsilon, delta, mechanism, steps, rows, batch_size, capacity,
              float(noise))


def _event(mechanism: str, noise: float, rate: float, steps: int):
  """Returns the dp-accounting event of a number of steps."""
  dp = _library()
  one = {'gaussian': dp.GaussianDpEvent, 'laplace': dp.LaplaceDpEvent}[
      mechanism](noise)
  return dp.SelfComposedDpEvent(dp.PoissonSampledDpEvent(rate, one), steps)


def _accountant():
  """Returns a new dp-accounting accountant."""
  _library()
  from dp_accounting import pld
  # The result is an upper bound for any interval. This one takes a tenth of the
  # time of the default.
  return pld.PLDAccountant(value_discretization_interval=1e-3)


def _library():
  """Imports and returns dp-accounting, an optional dependency."""
  try:
    import dp_accounting
  except ImportError as e:
    raise MissingError('method private needs the package dp-accounting; '
                       'install it with pip install dp-accounting.') from e
  return dp_accounting


# --- the secret -------------------------------------------------------------


def secret(workdir: Path, new: bool) -> bytes:
  """Returns the secret of a run, and creates it for a new run.

  The secret is a file of 32 bytes that only its owner can read.

  Args:
    workdir: Directory of the run. All processes read the secret there.
    new: Whether the run is new and may get a new secret.

  Returns:
    The 32 bytes.

  Raises:
    MissingError: if the run is not new and its secret is missing.
    InputError: if the secret has the wrong length.
  """
  file = workdir / _FILE
  if not file.exists() and not new:
    raise MissingError(
        f'the secret {file} is missing. With a new one, steps would be '
        'repeated with other noise, which spends the privacy budget twice; '
        'restore the file, or choose another --workdir.')
  if not file.exists() and jax.process_index() == 0:
    workdir.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix('.part')
    part.unlink(missing_ok=True)  # of a process that was killed
    # Create the file with permissions for the owner only, flush it to disk, and
    # then rename it. So the secret is never incomplete or readable by others.
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
    raise InputError(f'the secret {file} has {len(found)} bytes instead of 32; '
                     'restore the file, or choose another --workdir.')
  return found


def sample(secret: bytes, step: int, plan: Plan) -> np.ndarray:
  """Returns the sorted indices of the rows that are sampled for a step.

  Args:
    secret: Secret of the run.
    step: Number of the step.
    plan: Plan of the run.
  """
  rng = np.random.Generator(np.random.Philox(
      key=int.from_bytes(_digest(secret, 'rows', step)[:16], 'little')))
  rows = np.flatnonzero(rng.random(plan.rows) < plan.batch_size / plan.rows)
  if len(rows) > plan.capacity:
    rows = np.sort(rng.choice(rows, plan.capacity, replace=False))
  return rows


def noise_key(secret: bytes, step: int) -> np.ndarray:
  """Returns the noise key of a step, an array of shape [2] and dtype uint32.

  Args:
    secret: Secret of the run.
    step: Number of the step.
  """
  return np.frombuffer(_digest(secret, 'noise', step)[:8], np.uint32)


def _digest(secret: bytes, purpose: str, step: int) -> bytes:
  """Returns 32 pseudorandom bytes for one purpose of one step."""
  return hmac.digest(secret, f'mezo_jax {purpose} {step}'.encode(),
                     'sha256')
