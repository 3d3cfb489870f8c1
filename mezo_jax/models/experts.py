r"""Defines the mixture of experts, which may take the place of an `MLP`.

A router chooses K of E experts for each token. With the router's logits
:math:`r = W_r x` and the set C of the K largest of its probabilities p,

.. math:: y = \sum_{e \in C} w_e\, \mathrm{down}_e(
          \mathrm{act}(\mathrm{gate}_e(x)) \cdot \mathrm{up}_e(x)),

where :math:`w_e = p_e`, or :math:`p_e / \sum_{c \in C} p_c` if the config
normalises the weights.

Tokens are sorted by their experts. A loop over the experts computes the tokens
of one expert in blocks of a fixed number of rows, as many as there are. So no
token is dropped and no expert has a capacity. An expert that no token chose
takes no products. Under `mezo_jax.perturbed` the perturbed weights of one
expert are built at a time, also of experts that no token chose, and those of
none with `mezo_jax.LowRank`.

Suffixes are those of `mezo_jax.models.layers`. In addition, N is the number
B S of tokens, E that of experts and K that of experts for each token.

References:
  Fedus et al., 2021, Switch Transformers (https://arxiv.org/abs/2101.03961);
  Jiang et al., 2024, Mixtral (https://arxiv.org/abs/2401.04088).
"""

from typing import Any

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp

from mezo_jax.core.sharding import fetched
from mezo_jax.models.layers import activation, Config, init, Linear

# Numbers of rows that an expert computes at a time, at least and at most.
_LEAST, _MOST = 8, 256


class Kernels(nn.Module):
  """Holds one matrix of each expert, ``kernel`` [E, inputs, outputs]."""

  inputs: int
  outputs: int
  experts: int

  @nn.compact
  def __call__(self) -> Any:
    return fetched(self.param(
        'kernel', init, (self.experts, self.inputs, self.outputs)))


class Experts(nn.Module):
  """Applies the mixture of experts to each token."""

  config: Config

  @nn.compact
  def __call__(self, x_BxSxD: jax.Array) -> Any:
    c = self.config
    x_NxD = x_BxSxD.reshape(-1, c.width)
    logits_NxE = Linear(c.width, c.num_experts, name='router')(x_NxD)
    weights_NxK, chosen_NxK = route(c, logits_NxE)
    sizes = {'gate': (c.width, c.ff_width), 'up': (c.width, c.ff_width),
             'down': (c.ff_width, c.width)}
    kernels = {name: Kernels(inputs, outputs, c.num_experts, name=name)()
               for name, (inputs, outputs) in sizes.items()}
    y_NxKxD = mixed(c, x_NxD, chosen_NxK, kernels)
    y_NxD = jnp.sum(weights_NxK[..., None] * y_NxKxD.astype(jnp.float32), 1)
    return y_NxD.astype(x_BxSxD.dtype).reshape(x_BxSxD.shape)


def route(config: Config, logits_NxE: jax.Array
          ) -> tuple[jax.Array, jax.Array]:
  """Chooses experts.

  Args:
    config: Config of the model.
    logits_NxE: Logits of the router.

  Returns:
    The float32 weights and the indices of the experts of each token, [N, K]
    each, the largest weight first.
  """
  p_NxE = jax.nn.softmax(logits_NxE.astype(jnp.float32))
  weights_NxK, chosen_NxK = lax.top_k(p_NxE, config.experts_per_token)
  if config.normalize_experts:
    weights_NxK /= jnp.sum(weights_NxK, -1, keepdims=True)
  return weights_NxK, chosen_NxK


def mixed(config: Config, x_NxD: jax.Array, chosen_NxK: jax.Array,
          kernels: dict[str, jax.Array]) -> jax.Array:
  """Returns the output of each chosen expert for each token, [N, K, D].

  Args:
    config: Config of the model.
    x_NxD: The tokens.
    chosen_NxK: Indices of their experts.
    kernels: The matrices ``gate`` and ``up`` [E, D, F] and ``down`` [E, F, D].
  """
  (n, k), e = chosen_NxK.shape, config.num_experts
  # The pairs of a token and an expert, sorted by the expert.
  flat = chosen_NxK.reshape(-1)
  order = jnp.argsort(flat, stable=True)
  counts = jnp.zeros(e, jnp.int32).at[flat].add(1)

  @jax.custom_jvp
  def run(x, counts, order, kernels):
    return _by_blocks(config, x, counts, order // k, kernels)

  @run.defjvp
  def derivative(primals, tangents):
    # The loop above has no derivative in reverse mode.
    x, counts, order, kernels = primals
    by_groups = lambda x, kernels: _by_groups(
        config, x, counts, order // k, kernels)
    return jax.jvp(by_groups, (x, kernels), (tangents[0], tangents[3]))

  y = run(x_NxD, counts, order, kernels)
  place = jnp.zeros_like(order).at[order].set(jnp.arange(n * k))
  return y[place].reshape(n, k, -1)


def _by_blocks(config, x, counts, token, kernels):
  """Returns the outputs of the sorted pairs, one expert after the other.

  Args:
    config: Config of the model.
    x: Tokens [N, D].
    counts: Number of pairs of each expert, integers [E].
    token: Index of the token of each pair, integers [N K].
    kernels: As for `mixed`.
  """
  pairs, width = len(token), x.shape[1]
  each = max(pairs // (2 * config.num_experts), 1)
  rows = min(max(1 << (each - 1).bit_length(), _LEAST), _MOST)
  # The last block of an expert may extend into the rows of the next ones, which
  # are then written again, or beyond the end.
  token = jnp.pad(token, (0, rows))

  def expert(y, of):
    """Computes the pairs of one expert."""
    kernels, count, end = of
    def block(i, y):
      at = end - count + i * rows
      some = x[lax.dynamic_slice(token, (at,), (rows,))]
      # All indices need one dtype, and with jax_enable_x64 a literal 0 has
      # another.
      return lax.dynamic_update_slice(
          y, _mlp(config, some, kernels), (at, jnp.zeros_like(at)))
    return lax.fori_loop(0, -(-count // rows), block, y), None

  y = jnp.zeros((pairs + rows, width), x.dtype)
  y, _ = lax.scan(expert, y, (kernels, counts, jnp.cumsum(counts)))
  return y[:pairs]


def _by_groups(config, x, counts, token, kernels):
  """Returns what `_by_blocks` returns, with operations that have derivatives.

  The arguments are those of `_by_blocks`.
  """
  matmul = lambda x, w: lax.ragged_dot(x, w.astype(x.dtype), counts)
  return _mlp(config, x[token], kernels, matmul)


def _mlp(config, x, kernels, matmul=lambda x, w: x @ w.astype(x.dtype)):
  """Returns ``down(act(gate(x)) * up(x))``."""
  h = activation(config, matmul(x, kernels['gate'])) * matmul(
      x, kernels['up'])
  return matmul(h, kernels['down'])
