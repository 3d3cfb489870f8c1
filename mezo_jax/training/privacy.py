"""What private training needs beside its transform: a secret, rows by chance,
and an account of what is told.

Of each step the secret gives, by HMAC-SHA256 of its number, which rows are in
it (each with the same probability, by itself: Poisson sampling) and the key of
the noise. Without the secret neither can be told from another; with it, a run
that is resumed makes the very same steps, so that nothing is told twice.

The account is dp-accounting's, of Poisson-sampled Gaussian or Laplace
mechanisms in privacy loss distributions, neighbours differing by one row that
is added or removed. Not in it: that floating-point noise is not exact, that
the noise of a step has a key of 64 bits, what else was tried before (learning
rates), and the dev and test rows.
"""

import dataclasses
import functools
import hmac
import math
import os
from pathlib import Path

import jax
from jax.experimental import multihost_utils
import numpy as np

from mezo_jax.core.errors import InputError, MissingError

_SHARE = 1e-3  # of delta, for a batch that has more rows than there is room for
_FILE = 'secret'


@dataclasses.dataclass(frozen=True)
class Plan:
  r"""A budget, and the noise that keeps to it.

  Attributes:
    epsilon: what may be spent in all steps.
    delta: with a probability of which more is.
    mechanism: 'gaussian' or 'laplace'.
    steps: of the run.
    rows: to train on.
    batch_size: expected in a batch.
    capacity: for which a batch has room; more are left out at random, which
      delta has a part for.
    noise_multiplier: :math:`\sigma`.
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
    """Epsilon, at the plan's delta, of so many of its steps."""
    if not steps:
      return 0.0
    account = _accountant()
    account.compose(_event(self.mechanism, self.noise_multiplier,
                           self.batch_size / self.rows, steps))
    return float(account.get_epsilon((1 - _SHARE) * self.delta))


def spell(plan: Plan, steps: int | None = None) -> str:
  """A sentence of a plan, or of what was spent by so many of its steps."""
  if steps is not None:
    return (f'privacy: {steps} steps spent epsilon {plan.spent(steps):.3f} of '
            f'{plan.epsilon:g} at delta {plan.delta:g}')
  return (f'privacy: {plan.steps} steps of about {plan.batch_size} of '
          f'{plan.rows} rows (at most {plan.capacity}), with {plan.mechanism} '
          f'noise of {plan.noise_multiplier:.4f} times the clip, spend epsilon '
          f'{plan.spent(plan.steps):.3f} at delta {plan.delta:g}; dev and test '
          'rows have no privacy')


def account(plan: Plan, steps: int) -> dict:
  """Of a result."""
  return dataclasses.asdict(plan) | {'spent': plan.spent(steps)}


@functools.lru_cache
def plan(epsilon: float, delta: float, mechanism: str, steps: int, rows: int,
         batch_size: int, multiple: int = 1) -> Plan:
  """The least noise whose ``steps`` spend no more than (epsilon, delta).

  Args:
    epsilon: of the budget.
    delta: of the budget.
    mechanism: 'gaussian' or 'laplace'.
    steps: of the run.
    rows: to train on.
    batch_size: expected in a batch.
    multiple: that the capacity is to be of.

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
  # A batch cut short costs both neighbours: delta (1 + e^epsilon) in all.
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
  """32 bytes of a run, that nobody else may read.

  Args:
    workdir: of the run; every process reads them there.
    new: whether the run was never begun, and may have a new one.

  Raises:
    MissingError: if a run that was begun has lost it.
    InputError: if it is not what was written.
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
  """The rows of step number ``step``: each with the same probability."""
  rng = np.random.Generator(np.random.Philox(
      key=int.from_bytes(_digest(secret, 'rows', step)[:16], 'little')))
  rows = np.flatnonzero(rng.random(plan.rows) < plan.batch_size / plan.rows)
  if len(rows) > plan.capacity:
    rows = np.sort(rng.choice(rows, plan.capacity, replace=False))
  return rows


def noise_key(secret: bytes, step: int) -> np.ndarray:
  """uint32 [2]: the key of the noise of step number ``step``."""
  return np.frombuffer(_digest(secret, 'noise', step)[:8], np.uint32)


def _digest(secret: bytes, purpose: str, step: int) -> bytes:
  return hmac.digest(secret, f'mezo_jax {purpose} {step}'.encode(),
                     'sha256')
