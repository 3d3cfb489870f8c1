r"""Provides SPSA, which estimates a gradient from two forward passes.

In the notation of the MeZO paper (Algorithm 1), a step on the batch
:math:`\mathcal{B}` estimates

.. math::
  z &\sim \mathcal{N}(0, I_d), \quad
  \ell_\pm = \mathcal{L}(\theta \pm \epsilon z; \mathcal{B}) \\
  \text{projected\_grad} &= (\ell_+ - \ell_-) / (2 \epsilon) \\
  \hat\nabla \mathcal{L} &= \text{projected\_grad} \cdot z

The links after it in an optax chain do the rest, :math:`\theta \leftarrow
\theta - \eta \hat\nabla \mathcal{L}`; see `mezo_jax.mezo`.
"""

from collections.abc import Mapping
from typing import Any

import jax
import optax

from mezo_jax.directions.base import Directions, Normal
from mezo_jax.transforms.combine import Combine, two_sided
from mezo_jax.transforms.estimator import Estimator, Spsa
from mezo_jax.transforms.evaluate_points import Over


def spsa(
    eps: float | optax.Schedule | Mapping[str, Any] = 1e-3,
    *,
    key: jax.Array | int,
    directions: Directions | str = Normal(),
    combine: Combine | str = two_sided,
    num_samples: int | None = None,
    over: Over = 'scan',
    micro_batches: int | None = None,
    dtype: jax.typing.DTypeLike | None = None,
) -> Estimator:
  r"""Estimates the gradient by simultaneous perturbation (SPSA).

  With n = ``num_samples`` directions, the updates are

  .. math::
    \frac{1}{n} \sum_{j=1}^n g_j z_j, \qquad g_j =
    \frac{\mathcal{L}(\theta + \epsilon z_j; \mathcal{B})
    - \mathcal{L}(\theta - \epsilon z_j; \mathcal{B})}{2 \epsilon}
    \approx z_j^\top \nabla \mathcal{L}.

  Since :math:`E[zz^\top] = I`, their expectation is :math:`\nabla\mathcal{L}`
  up to a bias of :math:`O(\epsilon^2)`.

  Call ``update`` in one of two ways:

  * ``update(None, state, params, value_fn=loss, **batch)`` evaluates losses. It
    calls ``loss(params, **batch)`` with those arguments of the batch that the
    loss takes by name. The loss returns a scalar, per-example losses ``[B]``,
    or ``(losses, weights)``, both ``[B]``, in float32 or float64.
  * ``update(None, state, params, projected_grad=g)`` is the replay path. It
    makes the same update without evaluating the loss, from the float32 numbers
    [n] that ``state.projected_grad`` had after the step. It is used to replay a
    log, to apply numbers that other hosts have measured, and to apply numbers
    that were computed elsewhere. An optional ``value=`` is stored in the state
    as the loss.

  SPSA ignores the updates of other transforms, so it must be the first link of
  a chain.

  If a loss or a projected gradient is not finite, the step is skipped: its
  updates are zero, and the state counts it. Leaves that do not have a
  floating-point dtype always have zero updates. If there are PRNG keys among
  the params, `optax.apply_updates` leaves them unchanged.

  When ``update`` evaluates losses, it takes two more arguments. ``around`` is a
  `mezo_jax.Displacement` that is added to the weights for the evaluation.
  ``part=(i, r)`` evaluates part i of r equal parts of the directions, for
  replicas that exchange their numbers (docs/log.md). The numbers of the
  other parts are NaN.

  Args:
    eps: Perturbation scale :math:`\epsilon`. A positive number, a schedule of
      the step number, or groups ``{regular expression: number or schedule}``. A
      param has the eps of the first expression that is found in its path. With
      :math:`\epsilon_i` for group i, the update of a param of this group is
      :math:`(\ell_+ - \ell_-) / (2 \epsilon_i) \cdot z`, and ``projected_grad``
      is the number of the first group. Defaults to 1e-3.
    key: A `jax.random.key` or an integer seed. It determines all directions of
      the run: direction j of step t uses ``fold_in(fold_in(key, t), j)``.
    directions: Distribution of z, which also selects the leaves that have a z
      (`mezo_jax.Normal`, `mezo_jax.Rademacher`, ...), or its name. All other
      leaves have zero updates. Defaults to ``Normal()``.
    combine: A `Combine` that turns losses into :math:`g`, or its name.
      'two_sided', the default, is the equation above. 'one_sided' is
      :math:`(\mathcal{L}(\theta + \epsilon z) - \mathcal{L}(\theta)) /
      \epsilon`, which takes n + 1 evaluations instead of 2n and has a bias of
      :math:`O(\epsilon)`. 'fzoo' divides the same differences by the standard
      deviation of the n losses instead of :math:`\epsilon`.
    num_samples: Number n of directions per step. Defaults to None, for 1. To
      get the sum of their updates instead of the mean, multiply the learning
      rate by n.
    over: How directions are evaluated. 'scan', the default, evaluates one after
      the other. 'batch' evaluates all directions and both signs in one forward
      pass. 'rows' also uses one forward pass, but divides the rows of the batch
      into n equal parts and evaluates each direction on its own part. See
      `estimate`.
    micro_batches: Number of equal parts in which the batch is evaluated, all
      with the same z, as in gradient accumulation. Defaults to None, for 1.
      Every array among the arguments of the loss is split along its first axis
      (unless it is a scalar). Close over arrays that do not have one entry per
      row. With more than one part, the loss must return per-example losses.
    dtype: Dtype of the updates. Defaults to None, for the dtype of each param.

  Returns:
    An `Estimator`, which is an `optax.GradientTransformationExtraArgs`. Its
    state is an `SpsaState`.

  Raises:
    ValueError: If an option is out of range. ``update`` raises it for missing
      ``params`` or ``value_fn``, for updates of an earlier transform, for
      params with `optax.MaskedNode` in them, for a loss of another shape or of
      half precision, and for a scalar loss with ``micro_batches`` above 1.

  References:
    Spall, 1992, "Multivariate stochastic approximation using a simultaneous
    perturbation gradient approximation"; Malladi et al., 2023, `Fine-Tuning
    Language Models with Just Forward Passes
    <https://arxiv.org/abs/2305.17333>`_, Definition 1 and Algorithms 1 and 2.

  Example:
    >>> import jax, jax.numpy as jnp, mezo_jax, optax
    >>> loss_fn = lambda params, x: jnp.sum((params - x) ** 2)
    >>> tx = optax.chain(mezo_jax.spsa(1e-3, key=0), optax.adam(1e-1))
    >>> params = jnp.zeros(3)
    >>> state = tx.init(params)
    >>> updates, state = tx.update(
    ...     None, state, params, value_fn=loss_fn, x=jnp.ones(3))
    >>> params = optax.apply_updates(params, updates)

  .. warning::
    Some wrappers of optax cannot contain an estimator. They need a tree of
    updates (`optax.MultiSteps`, ``flatten``, ``apply_if_finite``,
    ``conditionally_mask``, ``conditionally_transform``, ``contrib.mechanize``)
    or hide a part of the params (``masked``, ``partition``). Wrap the links
    after the estimator instead: ``chain(spsa(...), wrapper(rest))``.
    `optax.lookahead` cannot be used at all, since it does not pass on extra
    arguments.
  """
  return Estimator(Spsa(
      eps, key=key, directions=directions, combine=combine,
      num_samples=num_samples, over=over, micro_batches=micro_batches,
      dtype=dtype))
