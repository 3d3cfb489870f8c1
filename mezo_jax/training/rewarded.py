"""Connects the objective 'reward' to a run: its steps and its evaluations."""

from collections.abc import Callable
import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from mezo_jax import peft
from mezo_jax.tasks import rewards
from mezo_jax.training import build as build_lib
from mezo_jax.training import config as config_lib
from mezo_jax.training import divergence, mixture, population


@dataclasses.dataclass(frozen=True)
class Rewarded:
  """Holds what a run with rewards needs. Use `make` to build it.

  Attributes:
    step_options: Keyword arguments of `mezo_jax.make_step`.
    evaluate: A function from the trained parameters to the report on the dev
      rows.
  """

  step_options: dict[str, Any]
  evaluate: Callable[[Any], dict[str, Any]]


def make(config: config_lib.Train, built: build_lib.Built,
         tasks: mixture.Mixture, params: Any, workdir: Path,
         say: Callable[[str], None]) -> Rewarded:
  """Builds what a run with rewards needs.

  Args:
    config: Config of the run, whose objective is 'reward'.
    built: The parts of the run.
    tasks: The tasks of the run.
    params: The trained parameters before training. With ``reward.kl``, a copy
      of them is kept on the devices.
    workdir: Working directory of the run.
    say: A function that reports a line to the user.

  Raises:
    InputError: If the reward function cannot be imported.
  """
  rewards.load(rewards.source_of(config.reward.function))
  reward = config_lib.objective(config)
  assert isinstance(reward, rewards.Reward)  # the objective is 'reward'
  task, splits = config.task, built.splits
  at_once = population.at_once(
      config, built.model.config, max(splits.buckets['train']), built.mesh)
  if config.spsa.over == 'batch' and not config.reward.at_once:
    at_once = population.kept(workdir, config, at_once)
  if at_once:
    say(f'{at_once} members of the population answer at a time')
  ask = tasks.ask().dev
  kl, start = None, {}
  if config.reward.kl:
    # Steps donate the parameters, so keep a copy.
    start = jax.tree.map(jnp.copy, params)
    kl = divergence.make(
        built.model, task, splits.dev, built.tokenizer,
        build_lib.eval_sizes(config, splits)['dev'], built.mesh)

  def evaluate(params: Any) -> dict[str, Any]:
    """Evaluates the dev rows."""
    report = ask(params)
    if kl is not None:
      frozen = tasks.parts[0].built.frozen
      report['kl'] = kl(*(peft.join(p, frozen) for p in (params, start)))
    return report

  return Rewarded(
      dict(reward=reward.of_rollouts(splits.train.rows, task, built.tokenizer),
           at_once=at_once, build=config.reward.build), evaluate)
