r"""LoRA: :math:`W + \frac{\alpha}{r} A B` with W frozen (Hu et al., 2021).

A matrix ``x/kernel`` [*, I, O] is given ``x/lora_a`` [*, I, r] and ``x/lora_b``
[*, r, O], which are trained, and ``x/lora_scale`` [*], which is not; * is the
layer axis where there is one. `mezo_jax.models` adds their product without
building it; nothing ever merges behind one's back, so a perturbed A or B is
seen by every forward pass.
"""

import re
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict
import jax
import jax.numpy as jnp

from mezo_jax.core import paths
from mezo_jax.core.errors import InputError
from mezo_jax.core.trees import join
from mezo_jax.directions import noise


def init(params: dict[str, Any], key: jax.Array, *, rank: int = 8,
         alpha: float = 16.0, targets: str = 'attn/(q|v)$', rslora: bool = False
         ) -> dict[str, Any]:
  r"""Adapters of new matrices: A uniform in :math:`\pm 1/\sqrt{I}`, B zero.

  So the model is as it was. Adapters are float32 whatever the weights are.

  Args:
    params: of a model.
    key: of A.
    rank: r.
    alpha: :math:`\alpha`; the product is scaled by :math:`\alpha / r`.
    targets: a regular expression, searched for in the matrices' paths without
      ``/kernel``; the paper's are queries and values.
    rslora: scale by :math:`\alpha / \sqrt r` (Kalajdzievski, 2023).

  Returns:
    A nested dict of ``lora_a``, ``lora_b`` and ``lora_scale``, all float32.

  Raises:
    ValueError: if no matrix is selected, or the rank is below 1.
  """
  if rank < 1:
    raise InputError(f'the rank of LoRA must be at least 1, got {rank}.')
  scale = alpha / (rank ** 0.5 if rslora else rank)
  found = {path: x for path, x in _matrices(params).items()
           if re.search(targets, path)}
  if not found:
    raise InputError(f'the targets {targets!r} of LoRA are none of '
                     f'{", ".join(_matrices(params))}.')
  out = {}
  for path, kernel in found.items():
    *lead, inputs, outputs = kernel.shape
    bound = inputs ** -0.5
    out[f'{path}/lora_a'] = jax.random.uniform(
        noise.leaf_key(key, path), (*lead, inputs, rank), jnp.float32, -bound,
        bound)
    out[f'{path}/lora_b'] = jnp.zeros((*lead, rank, outputs), jnp.float32)
    out[f'{path}/lora_scale'] = jnp.full(lead, scale, jnp.float32)
  return unflatten_dict(out, sep='/')


def _matrices(params) -> dict[str, jax.Array]:
  """The model's matrices by the paths of their modules."""
  return {path.removesuffix('/kernel'): x
          for path, x in paths.named_leaves(params)
          if path.endswith('/kernel') and not path.startswith('classifier/')}


def is_lora(name: str) -> bool:
  return name in ('lora_a', 'lora_b', 'lora_scale')


def merge(params: dict[str, Any]) -> dict[str, Any]:
  r"""The plain parameters of a model with LoRA: :math:`W + s A B`.

  The sum is float32 and rounded once to W's dtype. ``params`` are not changed:
  they are the exact inverse. Under `jax.jit` with them donated it is in place.
  """
  return _add(params, 1.0)


def unmerge(merged: dict[str, Any], adapters: dict[str, Any]) -> dict[str, Any]:
  r"""The base of merged parameters, :math:`W' - s A B`, joined with adapters.

  For those who have the merged weights alone; each is within one rounding of
  what it was.

  Args:
    merged: from `merge`.
    adapters: ``lora_a``, ``lora_b`` and ``lora_scale`` as `init` gives them.
  """
  return join(_add(join(merged, adapters), -1.0), adapters)


def _add(params: dict, sign: float) -> dict:
  flat: dict[tuple, Any] = flatten_dict(params)
  def sum_of(path, x):
    beside = lambda name: flat[*path[:-1], name]
    if path[-1] != 'kernel' or (*path[:-1], 'lora_a') not in flat:
      return x
    return _sum(x, beside('lora_a'), beside('lora_b'),
                sign * beside('lora_scale'))
  return unflatten_dict({path: sum_of(path, x) for path, x in flat.items()
                         if not is_lora(path[-1])})


@jax.jit
def _sum(w, a, b, scale):
  product = jnp.einsum('...ir,...ro->...io', a, b,
                       precision=jax.lax.Precision.HIGHEST)
  return (w.astype(jnp.float32) + scale[..., None, None] * product).astype(
      w.dtype)
