r"""LoRA: :math:`W + \frac{\alpha}{r} A B` with W frozen (Hu et al., 2021).

A matrix ``x/kernel`` [*, I, O] gets two trained factors, ``x/lora_a`` [*, I, r]
and ``x/lora_b`` [*, r, O], and a constant ``x/lora_scale`` [*]. The star is the
layer axis of stacked matrices. `mezo_jax.models` multiplies activations by A,
then by B, and never builds the product A B. Weights are merged only by `merge`,
so every forward pass uses the current, possibly perturbed, A and B.

References:
  Hu et al. (2021), LoRA: Low-Rank Adaptation of Large Language Models.
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
  r"""Creates adapters that do not change the outputs of the model yet.

  A is uniform in :math:`[-1/\sqrt{I}, 1/\sqrt{I})` and B is zero.

  Args:
    params: Parameters of a model.
    key: PRNG key for A.
    rank: Rank r of the adapters. Defaults to 8.
    alpha: The :math:`\alpha` of the scale :math:`\alpha / r` of the product.
      Defaults to 16.
    targets: Regular expression that is searched for in the paths of matrices,
      without ``/kernel``. Defaults to the queries and values of all layers, as
      in the paper.
    rslora: Whether to scale by :math:`\alpha / \sqrt r` instead (Kalajdzievski,
      2023). Defaults to False.

  Returns:
    A nested dict of ``lora_a``, ``lora_b`` and ``lora_scale``. They are float32
    for weights of any dtype. `mezo_jax.peft.join` adds them to the parameters.

  Raises:
    InputError: If no matrix is selected, if matrices of experts are, or if the
      rank is below 1.
  """
  if rank < 1:
    raise InputError(f'the rank of LoRA must be at least 1, got {rank}.')
  scale = alpha / (rank ** 0.5 if rslora else rank)
  found = {path: x for path, x in _matrices(params).items()
           if re.search(targets, path)}
  if not found:
    raise InputError(f'the LoRA targets {targets!r} match no matrix; choose '
                     f'from {", ".join(_matrices(params))}.')
  of_experts = [path for path, x in found.items()
                if x.ndim - paths.locate(f'{path}/kernel')[2] > 2]
  if of_experts:
    raise InputError(
        f'the LoRA targets {targets!r} match {of_experts[0]}, the matrices of '
        'experts, which LoRA does not support; choose targets that leave them '
        'out.')
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
  """Returns the kernels of a model by the paths of their modules.

  A classification head is left out: it is new, and is trained in full.
  """
  return {path.removesuffix('/kernel'): x
          for path, x in paths.named_leaves(params)
          if path.endswith('/kernel') and not path.startswith('classifier/')}


def is_lora(name: str) -> bool:
  """Returns whether the last part of a parameter's path belongs to LoRA."""
  return name in ('lora_a', 'lora_b', 'lora_scale')


def merge(params: dict[str, Any]) -> dict[str, Any]:
  r"""Merges LoRA into the weights, :math:`W + s A B`.

  The sum is computed in float32 and rounded once, to the dtype of W. Keep
  ``params`` to undo the merge exactly. Under `jax.jit` with ``params`` donated
  the merge needs no second copy of the weights.

  Args:
    params: Parameters with LoRA leaves.

  Returns:
    The parameters without LoRA leaves.
  """
  return _add(params, 1.0)


def unmerge(merged: dict[str, Any], adapters: dict[str, Any]) -> dict[str, Any]:
  r"""Recovers the base weights, :math:`W' - s A B`, and joins the adapters.

  Use it if only the merged weights are available. Each weight is within one
  rounding of the original.

  Args:
    merged: Parameters from `merge`.
    adapters: Nested dict of ``lora_a``, ``lora_b`` and ``lora_scale``, as
      `init` returns it.

  Returns:
    The parameters of the base model with the adapters.
  """
  return join(_add(join(merged, adapters), -1.0), adapters)


def _add(params: dict, sign: float) -> dict:
  """Adds ``sign * s A B`` to the weights and drops the LoRA leaves."""
  flat: dict[tuple, Any] = flatten_dict(params)
  def sum_of(path, x):
    """Returns a leaf, with the product added if it has an adapter."""
    beside = lambda name: flat[*path[:-1], name]
    if path[-1] != 'kernel' or (*path[:-1], 'lora_a') not in flat:
      return x
    return _sum(x, beside('lora_a'), beside('lora_b'),
                sign * beside('lora_scale'))
  return unflatten_dict({path: sum_of(path, x) for path, x in flat.items()
                         if not is_lora(path[-1])})


@jax.jit
def _sum(w, a, b, scale):
  """Returns ``w + scale * a b``, computed in float32, in the dtype of ``w``."""
  product = jnp.einsum('...ir,...ro->...io', a, b,
                       precision=jax.lax.Precision.HIGHEST)
  return (w.astype(jnp.float32) + scale[..., None, None] * product).astype(
      w.dtype)
