"""Wraps the parts of JAX that are private or differ between versions.

JAX 0.10 and later are supported. Anything that has no public name, or whose
form differs between these versions, is used in this module and nowhere else. So
a new version of JAX requires changes in one place only.
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
  """Returns the axes of `jax.shard_map` over which a value varies.

  The result is hashable and is only compared for equality.
  """
  return jax.typeof(x).mat


def distributed_state() -> Any:
  """Returns the state that `jax.distributed.initialize` set up in this process.

  The public API tells only whether it was called. This library uses the
  attributes `client` and `coordinator_address`.
  """
  return distributed.global_state
