r"""Suggests a learning rate by a range test, with forward passes only.

A range test (Smith, 2017) is a short training in which the learning rate grows
until training fails. Smith increases it linearly; here it grows by the same
factor in each step. The test shows what local measures of curvature do not,
because the curvature changes as soon as the weights move.

The first steps have the rate 0. They give the losses of up to 64 batches before
training, with the mean L, and the projected gradients g. No useful rate is far
above L / E[g²], at which a step would remove the whole loss to first order. The
other steps begin far below that rate and use the same batches again. Comparing
each batch with its own loss before training removes most of the noise between
batches. The mean change is negative as long as training works. The *edge* is
the rate at which it reaches +|L| / 10.

A test of few steps overshoots, since the loss needs time to grow while the rate
goes on doubling. If it grows by a factor exp(c (η / η₀ - 1)) in a step of rate
η, where η₀ is the largest rate that a long training survives, then the edge is
about (1 + a / K) η₀ for a test with K steps per doubling, with a constant a.
The suggested rate is a share of η₀ that depends on the schedule and falls with
the fifth root of the number of steps, since noise adds up over the steps and a
longer run has more time to train at a low rate. A step with n directions counts
as n steps: it moves as far as n steps with the n-th part of its rate, and K is
n times as large.

The number of steps of the test is a fixed share of that of the run.

References:
  Smith, 2017, `Cyclical Learning Rates for Training Neural Networks
  <https://arxiv.org/abs/1506.01186>`_, Section 3.3.
"""

from collections.abc import Callable, Iterator
import itertools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mezo_jax.core.errors import InputError
from mezo_jax.distributed import agreement
from mezo_jax.runs import loggers
from mezo_jax.training import build, mixture, run_files
from mezo_jax.training import config as config_lib
from mezo_jax.training import optimizer as optimizer_lib
from mezo_jax.transforms.step import make_step

# Planned steps of the test as a share of those of the run, and their minimum.
# The test usually stops earlier, at the edge. It may take up to twice as many
# if the edge is far above the expected rates.
_SHARE_OF_STEPS, _FEWEST = 0.05, 20
_MOST_BATCHES = 64
# Number of doublings in the planned steps, of which the last one has the rate
# 2**_ABOVE * L / E[g²].
_DOUBLINGS, _ABOVE = 11, 2
_RISE = 0.1  # rise of the loss at the edge, relative to that before training
_WINDOW = 3  # minimum number of steps whose changes are averaged
# The constant a, from tests of 25, 100 and 1,000 steps of the quickstart's last
# layer (docs/hyperparameters.md).
_OVERSHOOT = 17
# The suggested rate of each schedule in a run of `_LONG` steps, relative to η₀.
# It is proportional to steps ** -_POWER and at most `_MOST_SHARE`. The numbers
# were fitted to the best rates of grids (docs/hyperparameters.md).
_SHARES = {'constant': 1 / 16, 'linear': 1 / 8, 'cosine': 1 / 8}
_LONG, _POWER, _MOST_SHARE = 20_000, 0.2, 0.5


class RangeTest(NamedTuple):
  """Holds what a range test measured.

  Attributes:
    rates: Learning rates of the steps with a rate above 0, float64 [S].
    changes: Loss of each of these steps' batches minus its loss before
      training, float64 [S].
    loss: Mean loss L before training.
    edge: Learning rate at which the mean change reached a tenth of the absolute
      value of L: the geometric mean of the last rates.
    steps: Number of all steps: S and those with the rate 0.
  """

  rates: np.ndarray
  changes: np.ndarray
  loss: float
  edge: float
  steps: int


def split_steps(steps: int) -> tuple[int, int]:
  """Returns the planned steps of a test: with the rate 0, and with others.

  Args:
    steps: Number of steps of the run.
  """
  total = max(int(_SHARE_OF_STEPS * steps), _FEWEST)
  num_before = min(total // 4, _MOST_BATCHES)
  return num_before, total - num_before


def limit(edge: float, steps: int, n: int = 1) -> float:
  """Returns an estimate of the largest rate that a long training survives.

  Args:
    edge: Edge of the range test of a run.
    steps: Number of steps of the run.
    n: Number of directions of a step. Defaults to 1.
  """
  per_doubling = n * split_steps(steps)[1] / _DOUBLINGS
  return edge / (1 + _OVERSHOOT / per_doubling)


def share(steps: int, schedule: str, n: int = 1) -> float:
  """Returns the suggested rate of a run, relative to η₀.

  Args:
    steps: Number of steps of the run.
    schedule: Kind of the schedule: 'constant', 'linear' or 'cosine'.
    n: Number of directions of a step. Defaults to 1.
  """
  found = _SHARES[schedule] * (_LONG / (n * steps)) ** _POWER
  return min(found, _MOST_SHARE)


def suggested(edge: float, steps: int, schedule: str, n: int = 1) -> float:
  """Returns the learning rate to train with, in two digits.

  Args:
    edge: Edge of the range test of a run.
    steps: Number of steps of the run.
    schedule: Kind of the schedule: 'constant', 'linear' or 'cosine'.
    n: Number of directions of a step. Defaults to 1.
  """
  return float(f'{limit(edge, steps, n) * share(steps, schedule, n):.2g}')


def range_test(make_tx: Callable[[Any], optax.GradientTransformation],
               value_fn: Callable[..., Any], params: Any,
               batches: Callable[[], Iterator[Any]], steps: int, *,
               frozen_of: Callable[[Any], Any] = lambda batch: None,
               init: Callable[..., Any] = lambda tx, params: tx.init(params),
               after_step: Callable[..., None] = lambda *numbers: None,
               mesh: jax.sharding.Mesh | None = None) -> RangeTest:
  """Finds the learning rate at which training fails.

  The test takes the memory of training. Its steps are those of
  `mezo_jax.make_step`.

  Args:
    make_tx: Returns an optimizer with a learning rate, which is an array [].
    value_fn: The loss, ``value_fn(params, batch)``, as in `mezo_jax.make_step`.
      It must not be 0 before training.
    params: The trained params. They are donated.
    batches: A function that returns an iterator over batches, the same ones in
      each call. The first ones are used, at most 64.
    steps: Number of steps of the run.
    frozen_of: A function from a batch to the frozen params that the loss needs.
      Defaults to none.
    init: Returns the state of an optimizer, ``init(tx, params)``. Defaults to
      its own.
    after_step: A function that is called after each step with the number of the
      step, its rate and its loss. Defaults to no function.
    mesh: Mesh of the params. Defaults to None, for no mesh.

  Returns:
    What was measured. `mezo_jax.training.learning_rates.suggested` turns its
    edge into a learning rate.

  Raises:
    InputError: if the projected gradients before training are 0 or not finite,
      if the loss rises at the first rates, or if it rises at none.
  """
  # The rate is part of the optimizer's state, so all rates share one program.
  # optax finds it by the name of the argument, which `make_tx` need not have.
  tx = optax.inject_hyperparams(
      lambda learning_rate: make_tx(learning_rate),
      hyperparam_dtype=jnp.float32)(learning_rate=0.0)
  step, state = make_step(tx, value_fn, mesh=mesh), init(tx, params)
  num_before, count = split_steps(steps)
  done = 0

  def losses(rates):
    """Yields the loss and the projected gradients of steps."""
    nonlocal params, state, done
    again = itertools.chain.from_iterable(
        itertools.islice(batches(), num_before) for _ in itertools.count())
    for rate, batch in zip(rates, again):
      state.hyperparams['learning_rate'] = jnp.full_like(
          state.hyperparams['learning_rate'], rate)
      params, state, metrics = step(params, state, batch, frozen_of(batch))
      loss, done = float(metrics['loss']), done + 1
      after_step(done, rate, loss)
      yield loss, np.asarray(metrics['projected_grad'])

  before, g = zip(*losses(np.zeros(num_before)))
  loss, square = float(np.mean(before)), float(np.mean(np.square(g)))
  if not np.isfinite([loss, square]).all() or square == 0 or loss == 0:
    raise InputError(
        'no learning rate can be suggested, because the projected gradients '
        f'before training have the mean square {square:g} and the losses the '
        f'mean {loss:g}; set --config.optimizer.learning_rate to a number.')
  window = max(_WINDOW, count // (2 * _DOUBLINGS))
  factor = 2.0 ** (_DOUBLINGS / count)
  rates = abs(loss) / square * 2.0**_ABOVE * factor ** np.arange(
      1 - count, count)
  changes = []
  for (after, _), of_batch in zip(losses(rates), itertools.cycle(before)):
    changes.append(after - of_batch)
    mean = np.mean(changes[-window:])
    if len(changes) >= window and not (
        np.isfinite(mean) and mean <= _RISE * abs(loss)):
      break
  else:
    raise InputError(
        'no learning rate can be suggested, because the loss did not rise even '
        f'at the rate {rates[-1]:.1g}; set --config.optimizer.learning_rate to '
        'a number.')
  if len(changes) == window:
    raise InputError(
        'no learning rate can be suggested, because the loss rose at the '
        f'lowest rate that was tried, {rates[0]:.1g}; set '
        '--config.optimizer.learning_rate to a lower number, or check eps and '
        'the size of a batch.')
  rates = rates[:len(changes)]
  edge = np.exp(np.mean(np.log(rates[-window:])))
  return RangeTest(rates, np.array(changes), loss, float(edge), done)


# --- a run ------------------------------------------------------------------


def test_of_run(config: config_lib.Train, tasks: mixture.Mixture, params: Any,
                mesh: jax.sharding.Mesh, check: Callable[[], None],
                say: Callable[[str], None]) -> RangeTest:
  """Makes the range test of a run from given parameters.

  Args:
    config: Config of the run.
    tasks: Tasks of the run.
    params: The trained parameters. They are donated.
    mesh: Mesh of the run.
    check: Raises the errors of Python functions that the loss calls.
    say: A function that reports a line to the user.

  Raises:
    InputError: as `range_test`.
  """
  planned = sum(split_steps(config.steps))
  say(f'range test: about {planned} steps with a rising learning rate, from '
      'which the run does not continue')

  def batches():
    for _, of, _ in tasks.feed(mesh, 0, _MOST_BATCHES):
      yield of

  def after_step(step, rate, loss):
    check()
    if step % max(planned // 10, 1) == 0:
      say(f'range test: step {step}, rate {rate:.1e}, loss {loss:.3f}')
  return range_test(
      lambda rate: optimizer_lib.make_optimizer(
          config, params, learning_rate=rate),
      tasks.value_fn, params, batches, config.steps, frozen_of=tasks.frozen,
      init=lambda tx, params: build.init_state(tx, params, mesh),
      after_step=after_step, mesh=mesh)


def in_words(found: RangeTest, config: config_lib.Train) -> str:
  """Returns why the rate of a range test is suggested.

  Args:
    found: The range test.
    config: Config of the run.
  """
  kind, n = config.optimizer.schedule, config.spsa.num_samples
  part, most = share(config.steps, kind, n), limit(found.edge, config.steps, n)
  return (f'{part:.2g} (for the schedule {kind}) of the largest stable rate, '
          f'{most:.2g}. In a '
          f'range test of {found.steps} steps '
          f'({found.steps / config.steps:.1%} of the run) the loss had risen '
          f'by a tenth at {found.edge:.2g}; so short a test overshoots')


def resolved(config: config_lib.Train, workdir: Path,
             say: Callable[[str], None]) -> config_lib.Train:
  """Returns the config of a run with a number as its learning rate.

  If the learning rate is 'auto', a range test finds it and writes
  ``learning_rate.json``. A run that resumes reads the rate from there.

  Args:
    config: Config of the run.
    workdir: Directory of the run.
    say: A function that reports a line to the user.

  Returns:
    The config. It still has 'auto' if the directory contains a run that began
    with a number, which `run_files.check_workdir` then reports.

  Raises:
    InputError: as `range_test`.
  """
  if not config_lib.is_auto(config):
    return config
  known = run_files.with_found_rate(config, workdir)
  began = (workdir / 'config.json').exists()
  agreement.agree_on('the files of --workdir', {
      'learning_rate': known.optimizer.learning_rate, 'began': began},
      'start the same command again')
  if not config_lib.is_auto(known):
    say(f'learning rate {config_lib.learning_rate(known):g}, from the range '
        f'test in {workdir / run_files.RATE}')
    return known
  if began:
    return config
  silent = lambda text: None
  built = build.build(config_lib.with_learning_rate(config, 1.0), say=silent)
  tasks = mixture.make(config, built, workdir / 'hidden_states', silent)
  params, mesh, host = built.params, built.mesh, built.host
  assert host is not None  # the method trains
  built = built.without_weights()  # the test donates the parameters
  found = test_of_run(config, tasks, params, mesh, host.check, say)
  rate = suggested(found.edge, config.steps, config.optimizer.schedule,
                   config.spsa.num_samples)
  say(f'learning rate {rate:g}: {in_words(found, config)}')
  loggers.write_json(workdir / run_files.RATE, {
      'learning_rate': rate, **found._asdict(),
      'config': config_lib.bound(config)})
  config = config_lib.with_learning_rate(config, rate)
  agreement.agree_on('the learning rate that was found', {'rate': rate},
                     'set --config.optimizer.learning_rate to a number')
  return config
