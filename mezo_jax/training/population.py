"""Chooses how many members of a population answer prompts in one pass."""

import json
import math
import os
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np

from mezo_jax import models
from mezo_jax.core import sharding
from mezo_jax.training import config as config_lib
from mezo_jax.transforms.combine import COMBINES

# Share of the free memory of a device that a pass may use.
_SHARE = 0.8
_ALL = 2**30  # stands for all members


def at_once(config: config_lib.Train, model: models.Config, tokens: int,
            mesh: jax.sharding.Mesh, free: float | None = None) -> int | None:
  """Returns the number of members that answer in one pass.

  Args:
    config: Config of the run, whose objective is 'reward'.
    model: Config of the model.
    tokens: Largest number of tokens of a prompt.
    mesh: Mesh of the run.
    free: Free memory of a device, in bytes. Defaults to None, which measures
      it.

  Returns:
    ``reward.at_once`` or, if it is 0, the largest number that fits into the
    memory, lowered so that all passes are about equally large. With a mesh axis
    'direction', it is the number of each group. None for all members, or if
    ``spsa.over`` is 'scan'.
  """
  if config.spsa.over == 'scan':
    return None
  if config.reward.at_once:
    return config.reward.at_once
  free = free_memory() if free is None else free
  members = COMBINES[config.spsa.combine].evaluations(config.spsa.num_samples)
  members = -(-members // mesh.shape.get('direction', 1))
  fit = max(int(_SHARE * free // bytes_of_member(config, model, tokens, mesh)),
            1) if math.isfinite(free) else members
  if fit >= members:
    return None
  return -(-members // -(-members // fit))


def kept(workdir: Path, config: config_lib.Train, chosen: int | None
         ) -> int | None:
  """Returns the number of members at once, the same whenever a run goes on.

  Programs of other sizes round differently, so a run that resumes uses the
  number with which it began. Several processes use the smallest of theirs.

  Args:
    workdir: Working directory of the run.
    config: Config of the run.
    chosen: The number that this process would choose.
  """
  found = np.int32(chosen or _ALL)
  if jax.process_count() > 1:
    found = np.min(multihost_utils.process_allgather(found))
  if jax.process_index() == 0:
    path, part = workdir / 'at_once.json', workdir / 'at_once.part'
    z, kept = config.spsa.num_samples, {}
    if path.exists():
      kept = json.loads(path.read_text())
    # Another number is that of a run that ended before it wrote its config.
    if kept.get('num_samples') == z:
      found = np.int32(kept['members_at_once'])
    part.write_text(json.dumps(
        {'num_samples': z, 'members_at_once': int(found)}) + '\n')
    part.replace(path)
  if jax.process_count() > 1:
    found = multihost_utils.broadcast_one_to_all(found)
  return None if found == _ALL else int(found)


def bytes_of_member(config: config_lib.Train, model: models.Config,
                    tokens: int, mesh: jax.sharding.Mesh) -> int:
  """Estimates the memory per device that the answers of a member take.

  These are the keys and values of all tokens, once more while the loop copies
  them, the activations and attention scores of the prompts, and the logits of a
  token, as they are and sorted.

  Args:
    config: Config of the run.
    model: Config of the model.
    tokens: Largest number of tokens of a prompt.
    mesh: Mesh of the run.
  """
  rows = -(-config.data.batch_size // sharding.row_groups(mesh))
  length = tokens + config.task.max_new_tokens
  cache = 2 * model.num_layers * length * model.num_kv_heads * model.head_width
  size = jnp.dtype(models.float_dtype(config.model.dtype)).itemsize
  activations = tokens * size * max(8 * model.width, 3 * model.ff_width)
  scores = 4 * model.num_heads * tokens * length  # of attention, in float32
  return rows * (
      2 * cache * size + activations + scores + 8 * model.vocab_size)


def free_memory() -> float:
  """Returns the free memory of a device in bytes, inf if it is not known.

  On a CPU this is half of the free memory of the machine, divided by the number
  of its devices.
  """
  device = jax.local_devices()[0]
  stats: dict[str, Any] = device.memory_stats() or {}
  if 'bytes_limit' in stats:
    return stats['bytes_limit'] - stats.get('bytes_in_use', 0)
  try:
    pages = os.sysconf('SC_AVPHYS_PAGES')
  except (AttributeError, OSError, ValueError):  # macOS and Windows
    return math.inf
  return pages * os.sysconf('SC_PAGE_SIZE') / 2 / jax.local_device_count()
