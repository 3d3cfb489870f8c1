r"""Suggests a learning rate by a range test, with forward passes only.

A range test (Smith, 2017) is a short training in which the learning rate grows
by the same factor in each step. It shows where training fails, which local
measures of curvature do not: the curvature changes as soon as the weights move.

Here the first steps have the rate 0. They give the losses of up to 64 batches
before training, L, and the projected gradients g. No useful rate is far above
L / E[g²], at which a step would remove the whole loss to first order. So the
other steps begin far below that rate, and use the same batches again. The
difference of the two losses of a batch hardly contains the noise of batches.
Its mean is negative as long as training works. The *edge* is the rate at which
it has become a rise by a tenth of L, and the suggested rate a fixed share of
the edge.

The number of steps of the test is a fixed share of that of the run. So a longer
run gets more time to see a rate fail.

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
from mezo_jax.runs import loggers
from mezo_jax.training import build, mixture
from mezo_jax.training import config as config_lib
from mezo_jax.training import optimizer as optimizer_lib
from mezo_jax.transforms.step import make_step

FILE = 'learning_rate.json'  # file of a working directory with the result

# Share of the run's steps that the test is planned to take, unless these are
# fewer than _FEWEST steps. It stops earlier at the edge, and takes up to twice
# as many if the edge is far above the expected rates.
SHARE = 0.05
_FEWEST = 20
_BATCHES = 64  # maximum number of different batches
# The rate doubles so often in the planned steps, up to 2**_ABOVE * L / E[g²].
_DOUBLINGS, _ABOVE = 11, 2
_RISE = 0.1  # rise of the loss at the edge, relative to that before training
# The suggested rate of each schedule, relative to the edge.
OF_EDGE = {'constant': 1 / 24, 'linear': 1 / 12, 'cosine': 1 / 12}


class RangeTest(NamedTuple):
  """Holds what a range test measured.

  Attributes:
    rates: Learning rate of each step, float64 [S].
    changes: Loss of each step's batch minus its loss before training, float64
      [S].
    loss: Mean loss before training.
    edge: Learning rate at which the mean change was a rise by a tenth of
      ``loss``.
    steps: Number of steps that the test took, with those of rate 0.
  """

  rates: np.ndarray
  changes: np.ndarray
  loss: float
  edge: float
  steps: int

  def suggested(self, schedule: str) -> float:
    """Returns the learning rate to start from, a share of the edge.

    Args:
      schedule: Kind of the schedule of the run: 'constant', 'linear' or
        'cosine'.
    """
    return float(f'{self.edge * OF_EDGE[schedule]:.2g}')

  def in_words(self, config: config_lib.Train) -> str:
    """Returns why this rate is suggested.

    Args:
      config: Config of the run.
    """
    kind = config.optimizer.schedule
    return (f'1/{1 / OF_EDGE[kind]:g} (for the schedule {kind}) of '
            f'{self.edge:.2g}, at which training failed in a range test of '
            f'{self.steps} steps ({self.steps / config.steps:.1%} of the run)')


def steps_of(steps: int) -> tuple[int, int]:
  """Returns the numbers of steps of a test with the rate 0, and with others.

  Args:
    steps: Number of steps of the run.
  """
  total = max(int(SHARE * steps), _FEWEST)
  still = min(total // 4, _BATCHES)
  return still, total - still


def range_test(make_tx: Callable[[Any], optax.GradientTransformation],
               value_fn: Callable[..., Any], params: Any,
               batches: Iterator[Any], steps: int, *,
               frozen_of: Callable[[Any], Any] = lambda batch: None,
               init: Callable[..., Any] = lambda tx, params: tx.init(params),
               mesh: jax.sharding.Mesh | None = None) -> RangeTest:
  """Finds the learning rate at which training fails.

  The test takes the memory of training. Its steps are those of
  `mezo_jax.make_step`.

  Args:
    make_tx: Returns an optimizer with a learning rate, which is an array [].
    value_fn: The loss, ``value_fn(params, batch)``, as in `mezo_jax.make_step`.
      It must not be 0 before training.
    params: The trained params. They are donated.
    batches: Yields batches.
    steps: Number of steps of the run.
    frozen_of: A function from a batch to the frozen params that the loss needs.
      Defaults to none.
    init: Returns the state of an optimizer, ``init(tx, params)``. Defaults to
      its own.
    mesh: Mesh of the params. Defaults to None, for no mesh.

  Raises:
    InputError: if the projected gradients are 0 or not finite, or if the loss
      does not rise at any rate.
  """
  tx = optax.inject_hyperparams(
      lambda learning_rate: make_tx(learning_rate))(learning_rate=0.0)
  step, state = make_step(tx, value_fn, mesh=mesh), init(tx, params)
  still, count = steps_of(steps)
  seen = [*itertools.islice(batches, still)]

  def losses(rates):
    """Yields the loss and the projected gradients of steps."""
    nonlocal params, state
    for rate, batch in zip(rates, itertools.cycle(seen)):
      state.hyperparams['learning_rate'] = jnp.full_like(
          state.hyperparams['learning_rate'], rate)
      params, state, metrics = step(params, state, batch, frozen_of(batch))
      yield float(metrics['loss']), np.asarray(metrics['projected_grad'])

  before, g = map(np.array, zip(*losses(np.zeros(still))))
  loss, square = float(np.mean(before)), float(np.mean(g**2))
  if not (np.isfinite(square) and square and loss):
    raise InputError(
        'no learning rate can be suggested, because the projected gradients '
        f'before training have the mean square {square:g} and the losses the '
        f'mean {loss:g}; set --config.optimizer.learning_rate to a number.')
  factor = 2.0 ** (_DOUBLINGS / count)
  rates = abs(loss) / square * 2.0**_ABOVE * factor ** np.arange(
      1 - count, count)
  changes, window = [], max(1, count // (2 * _DOUBLINGS))
  for (after, _), was in zip(losses(rates), itertools.cycle(before)):
    changes.append(after - was)
    if not np.mean(changes[-window:]) <= _RISE * abs(loss):  # or not finite
      rates = rates[:len(changes)]
      edge = np.exp(np.mean(np.log(rates[-window:])))
      return RangeTest(rates, np.array(changes), loss, float(edge),
                       still + len(changes))
  raise InputError(
      'no learning rate can be suggested, because the loss did not rise even '
      f'at the rate {rates[-1]:.1g}; set --config.optimizer.learning_rate to a '
      'number.')


# --- a run ------------------------------------------------------------------


def of_params(config: config_lib.Train, tasks: mixture.Mixture, params: Any,
              mesh: jax.sharding.Mesh) -> RangeTest:
  """Makes the range test of a run from given parameters.

  Args:
    config: Config of the run.
    tasks: Tasks of the run.
    params: The trained parameters. They are donated.
    mesh: Mesh of the run.

  Raises:
    InputError: as `range_test`.
  """
  batches = (of for _, of, _ in tasks.feed(mesh, 0, _BATCHES))
  return range_test(
      lambda rate: optimizer_lib.make_optimizer(
          config, params, learning_rate=rate),
      tasks.value_fn, params, batches, config.steps, frozen_of=tasks.frozen,
      init=lambda tx, params: build.init_state(tx, params, mesh), mesh=mesh)


def resolved(config: config_lib.Train, workdir: Path,
             say: Callable[[str], None]) -> config_lib.Train:
  """Returns a config with a number as its learning rate.

  If the learning rate is 'auto', a range test finds it and writes
  ``learning_rate.json``. The run that resumes in the same directory reads the
  rate from this file.

  Args:
    config: Config of the run.
    workdir: Directory of the run.
    say: A function that reports a line to the user.

  Returns:
    The config. It is unchanged if it has a number, or if the directory contains
    a run that began with a number.

  Raises:
    InputError: as `range_test`.
  """
  if not config_lib.is_auto(config):
    return config
  file = workdir / FILE
  if file.exists():
    rate = loggers.read_json(file)['learning_rate']
    say(f'learning rate {rate:g}, from the range test in {file}')
    return config_lib.with_learning_rate(config, rate)
  if (workdir / 'config.json').exists():
    return config
  say('range test: training with a rising learning rate, to find the rate of '
      'this run')
  silent = lambda text: None
  built = build.build(config_lib.with_learning_rate(config, 1.0), say=silent)
  tasks = mixture.make(config, built, workdir / 'hidden_states', silent)
  params, mesh = built.params, built.mesh
  built = built.without_weights()  # the test donates the parameters
  found = of_params(config, tasks, params, mesh)
  rate = found.suggested(config.optimizer.schedule)
  say(f'learning rate {rate:g}: {found.in_words(config)}')
  loggers.write_json(file, {'learning_rate': rate} | found._asdict())
  return config_lib.with_learning_rate(config, rate)
