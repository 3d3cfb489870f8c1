"""Wraps the parts of JAX that are private or differ between versions.

JAX 0.10 and later are supported. Only this module uses the parts of JAX that
have no public name or that differ between these versions. A new version of JAX
therefore requires changes in one place only.
"""

from typing import Any

import jax
from jax._src import distributed
from jax.experimental import multihost_utils
from jax.extend import core
import jax.typing

# Whether to tell `jax.vmap` over which mesh axes rows are split (its argument
# ``spmd_axis_name``). If this is done with JAX 0.11, the partitioner aborts the
# process for some programs, for example a step with over='rows' and low-rank
# directions. If it is not done, the partitioner chooses the axes itself.
ROWS_HAVE_AXES = jax.__version_info__[:2] != (0, 11)

# The exception that `multihost_utils.live_devices` raises when a process has
# died. JAX 0.10.0 has no exception type of its own for that and raises
# ValueError.
PROCESS_DIED = getattr(multihost_utils, 'ProcessFailureError', ValueError)


def scan_starts(params: dict[str, Any]) -> tuple[int, int]:
  """Returns the positions of a scan's first carry and first ``xs`` operand.

  Args:
    params: Parameters of a scan equation. JAX 0.10 stores the number of
      constants and of carries; JAX 0.11 stores the flat trees of constants,
      carries and ``xs`` instead.
  """
  if 'ft_in' in params:
    consts, carry, _ = map(len, params['ft_in'].unpack())
  else:
    consts, carry = params['num_consts'], params['num_carry']
  return consts, consts + carry


def context_of(eqn: core.JaxprEqn) -> Any:
  """Returns a context manager that restores the context of an equation.

  It is needed because the mesh in context may change within a program:
  `jax.sharding.auto_axes` and `.at[...].get(out_sharding=...)` make Explicit
  axes Auto for a part of it.

  Args:
    eqn: An equation of a jaxpr.
  """
  return eqn.ctx.manager


def manual_axis_type(x: jax.typing.ArrayLike) -> Any:
  """Returns the manual axes of `jax.shard_map` over which a value varies.

  The result is a hashable object, which can be compared for equality.
  """
  return jax.typeof(x).mat


def distributed_state() -> Any:
  """Returns the state that `jax.distributed.initialize` set up in this process.

  The public API reveals only whether that function was called. This library
  uses the attributes `client` and `coordinator_address` of the state.
  """
  return distributed.global_state
