"""Reads what JAX keeps private, or changes between supported versions.

JAX 0.10 and later are supported. Whatever has no public name, or has a
different form in some of these versions, is read in this module and nowhere
else, so that a new version of JAX needs changes in one place.
"""

from typing import Any

import jax
from jax._src import distributed
from jax.experimental import multihost_utils
from jax.extend import core
import jax.typing

# Whether `jax.vmap` may be given the mesh axes that rows are split over. With
# them, the partitioner of JAX 0.11 aborts the process for some programs, for
# example a step with over='rows' and low-rank directions. Without them, it
# chooses the axes itself.
ROWS_HAVE_AXES = jax.__version_info__[:2] != (0, 11)

# What `multihost_utils.live_devices` raises where a process died. JAX 0.10.0
# has no error of its own for that.
PROCESS_DIED = getattr(multihost_utils, 'ProcessFailureError', ValueError)


def scan_starts(params: dict[str, Any]) -> tuple[int, int]:
  """Returns where the carry and ``xs`` begin among a scan's operands.

  Args:
    params: Parameters of a scan equation. JAX 0.10 stores two counts; JAX 0.11
      stores the three flat trees of operands instead.
  """
  if 'ft_in' in params:
    consts, carry, _ = map(len, params['ft_in'].unpack())
  else:
    consts, carry = params['num_consts'], params['num_carry']
  return consts, consts + carry


def context_of(eqn: core.JaxprEqn) -> Any:
  """Returns a context manager that restores the context of an equation.

  The mesh in context may change within a program: `jax.sharding.auto_axes` and
  `.at[...].get(out_sharding=...)` make Explicit axes Auto for a while.
  """
  return eqn.ctx.manager


def manual_axis_type(x: jax.typing.ArrayLike) -> Any:
  """Returns over which axes of `jax.shard_map` a value varies; hashable."""
  return jax.typeof(x).mat


def distributed_state() -> Any:
  """Returns what `jax.distributed.initialize` has set up in this process.

  JAX publishes only whether it was called. The attributes used are `client`
  and `coordinator_address`.
  """
  return distributed.global_state
