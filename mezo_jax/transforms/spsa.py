r"""SPSA: a gradient estimate from two forward passes (MeZO, Algorithm 1).

In the paper's letters, one step on the batch :math:`\mathcal{B}`:

.. math::
  z &\sim \mathcal{N}(0, I_d), \quad
  \ell_\pm = \mathcal{L}(\theta \pm \epsilon z; \mathcal{B}) \\
  \text{projected\_grad} &= (\ell_+ - \ell_-) / (2 \epsilon) \\
  \hat\nabla \mathcal{L} &= \text{projected\_grad} \cdot z

The rest of the algorithm, :math:`\theta \leftarrow \theta - \eta \hat\nabla
\mathcal{L}`, is optax's: see `mezo_jax.mezo`.
"""

from collections.abc import Mapping
from typing import Any

import jax
import optax

from mezo_jax.directions.base import Directions, Normal
from mezo_jax.transforms.combine import Combine, two_sided
from mezo_jax.transforms.estimator import Estimator, Spsa


def spsa(
    eps: float | optax.Schedule | Mapping[str, Any] = 1e-3,
    *,
    key: jax.Array | int,
    directions: Directions | str = Normal(),
    combine: Combine | str = two_sided,
    num_samples: int | None = None,
    over: str = 'scan',
    micro_batches: int | None = None,
    dtype: jax.typing.DTypeLike | None = None,
) -> Estimator:
  r"""Estimates the gradient by simultaneous perturbation.

  With n = ``num_samples`` directions the updates are

  .. math::
    \frac{1}{n} \sum_{j=1}^n g_j z_j, \qquad g_j =
    \frac{\mathcal{L}(\theta + \epsilon z_j; \mathcal{B})
    - \mathcal{L}(\theta - \epsilon z_j; \mathcal{B})}{2 \epsilon}
    \approx z_j^\top \nabla \mathcal{L},

  an estimate of :math:`E[zz^\top]\nabla\mathcal{L} = \nabla\mathcal{L}` that is
  unbiased up to :math:`O(\epsilon^2)`.

  ``update(None, state, params, value_fn=loss, **batch)`` calls ``loss(params,
  **batch)`` with those arguments of the batch that the loss takes by name. The
  loss may return a scalar, per-example losses ``[B]``, or ``(losses,
  weights)``, in float32 or float64. The estimate does not depend on updates of
  other transforms, so it must be the first link of a chain.

  ``update(None, state, params, projected_grad=g)`` is the replay path: the same
  update without evaluations, from the numbers [n] that the state of a step has.
  It serves replay, directions of other hosts, and losses computed elsewhere.
  ``value=`` is kept in the state.

  If a loss or a projected gradient is not finite, the step is skipped: updates
  are zero, and the state counts it. Leaves that are not of floating point have
  zero updates, too; PRNG keys have an update with which `optax.apply_updates`
  leaves them unchanged.

  Two more arguments of ``update`` exist for losses: ``around``, a
  `mezo_jax.Displacement`, evaluates them at displaced weights, and
  ``part=(i, r)`` evaluates part i of r equal parts of the directions, for
  replicas that exchange their numbers (docs/log.md). The numbers of the
  other parts are NaN.

  Args:
    eps: Perturbation scale :math:`\epsilon`: a number, a schedule of the step
      number, or groups ``{regular expression: number or schedule}``, of which
      the first that is found in a parameter's path counts. With
      :math:`\epsilon_i` for group i, the update there is :math:`(\ell_+ -
      \ell_-) / (2 \epsilon_i) \cdot z`, and ``projected_grad`` is that of the
      first group.
    key: A `jax.random.key` or an integer seed. It determines every direction of
      the run: step t, direction j uses ``fold_in(fold_in(key, t), j)``.
    directions: Distribution of z and the leaves that have one
      (`mezo_jax.Normal`, `Rademacher`, ...), or a name. Other leaves have zero
      updates.
    combine: How losses become :math:`g`. `two_sided` is as above. `one_sided`
      is :math:`(\mathcal{L}(\theta + \epsilon z) - \mathcal{L}(\theta)) /
      \epsilon`, with n + 1 evaluations instead of 2n and a bias of
      :math:`O(\epsilon)`. `fzoo` divides the same differences by the standard
      deviation of the n losses. A name or a `Combine` is accepted.
    num_samples: Number of directions per step. Defaults to 1. To get their sum
      instead of their mean, multiply the learning rate by n.
    over: How directions are evaluated: 'scan' for one after the other, 'batch'
      for all in one pass, with both signs, and 'rows' for one pass in which
      each direction has its own n-th of the batch's rows. See `estimate`.
    micro_batches: Number of equal parts in which the batch is evaluated, all
      with the same z (gradient accumulation). Defaults to 1. Every array with
      axes is split along its first axis; close over arrays that do not have one
      entry per row. With more than one part the loss must be per-example.
    dtype: Dtype of the updates. Defaults to None, for each parameter's own.

  Raises:
    ValueError: For an option out of range, missing ``params`` or ``value_fn``,
      updates of an earlier transform, params with `optax.MaskedNode` holes, a
      loss of another shape or of half precision, or parts of unknown weight.

  References:
    Spall, 1992, "Multivariate stochastic approximation using a simultaneous
    perturbation gradient approximation"; Malladi et al., 2023, `Fine-Tuning
    Language Models with Just Forward Passes
    <https://arxiv.org/abs/2305.17333>`_, Definition 1 and Algorithms 1 and 2.

  Example:
    >>> import jax, jax.numpy as jnp, optax
    >>> loss_fn = lambda params, x: jnp.sum((params - x) ** 2)
    >>> tx = optax.chain(spsa(1e-3, key=0), optax.adam(1e-1))
    >>> params = jnp.zeros(3)
    >>> state = tx.init(params)
    >>> updates, state = tx.update(
    ...     None, state, params, value_fn=loss_fn, x=jnp.ones(3))
    >>> params = optax.apply_updates(params, updates)

  .. warning::
    Wrappers that need a tree of updates (`optax.MultiSteps`, ``flatten``,
    ``apply_if_finite``, ``conditionally_mask``, ``conditionally_transform``,
    ``contrib.mechanize``) or that hide a part of the params (``masked``,
    ``partition``) cannot contain an estimator. Put them around what follows:
    ``chain(spsa(...), wrapper(rest))``. `optax.lookahead` passes no extra
    arguments on and cannot be used.
  """
  return Estimator(Spsa(
      eps, key=key, directions=directions, combine=combine,
      num_samples=num_samples, over=over, micro_batches=micro_batches,
      dtype=dtype))
