"""The dtypes in which sums are taken."""

from typing import Any

import jax
import jax.numpy as jnp


def wide(dtype: Any) -> jax.typing.DTypeLike:
  """Returns float64 for float64, and float32 for any other dtype.

  As `jnp.promote_types` of float32, which refuses half precision where
  ``jax_numpy_dtype_promotion`` is strict.
  """
  return jnp.float64 if dtype == jnp.float64 else jnp.float32
