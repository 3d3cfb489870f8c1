"""Chooses the dtypes in which sums are accumulated."""

from typing import Any

import jax
import jax.numpy as jnp


def wide(dtype: Any) -> jax.typing.DTypeLike:
  """Returns float64 for float64, and float32 for any other dtype.

  For real dtypes it equals ``jnp.promote_types(dtype, jnp.float32)``, which
  cannot be used here: it refuses half precision if
  ``jax_numpy_dtype_promotion`` is 'strict'.
  """
  return jnp.float64 if dtype == jnp.float64 else jnp.float32
