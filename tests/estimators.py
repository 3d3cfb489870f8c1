"""Lists every estimator, alone and in chains, for tests that all must pass."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import mezo_jax
from mezo_jax import variants
from mezo_jax.transforms import backprop

mezo = mezo_jax.mezo


class Whole:
  """Provides each estimator as a function that returns a whole optimizer.

  For example, ``whole.hizoo(learning_rate, eps, key=0)`` is `mezo` with the
  estimator `variants.hizoo`.
  """

  def __getattr__(self, name):
    """Returns the function for an estimator's name."""
    if name == 'svrg':
      return variants.svrg
    make = mezo_jax.spsa if name == 'spsa' else getattr(variants, name)
    def made(learning_rate, eps=1e-3, **options):
      finish = {name: options.pop(name) for name in (
          'weight_decay', 'decay', 'stochastic_rounding', 'apply_every')
                if name in options}
      if name == 'conservative':
        options['learning_rate'] = learning_rate
      eps = () if name == 'forward_grad' else (eps,)
      tx = mezo(learning_rate, estimator=make(*eps, **options), **finish)
      return variants.nonnegative(tx) if name == 'qzo' else tx
    return made


whole = Whole()


def with_spsa(learning_rate, eps=1e-3, *, key, directions='normal',
              combine='two_sided', num_samples=None, over='scan',
              micro_batches=None, weight_decay=0.0, decay=None):
  """Returns `mezo` with all options of `spsa` as arguments."""
  estimator = mezo_jax.spsa(
      eps, key=key, directions=directions, combine=combine,
      num_samples=num_samples, over=over, micro_batches=micro_batches)
  return mezo(learning_rate, weight_decay=weight_decay, decay=decay,
              estimator=estimator)


def chained(rest, **kwargs):
  """Returns a maker of a chain: spsa, another optimizer, rounding."""
  def make(learning_rate, key, dtype=None, **more):
    return mezo_jax.skip_not_finite(optax.chain(
        mezo_jax.spsa(**({'eps': 1e-3} | kwargs | more), key=key),
        rest(learning_rate), mezo_jax.round_stochastically(key)))
  return make


def first_order(learning_rate, key, **kwargs):
  """Returns Adam on gradients of backpropagation."""
  del key
  return mezo_jax.skip_not_finite(optax.chain(
      backprop.backprop(**kwargs), optax.adam(learning_rate)))


def svrg(learning_rate, eps=1e-3, **kwargs):
  """Returns SVRG with the same learning rate for anchors."""
  return variants.svrg(learning_rate, eps,
                       anchor_learning_rate=learning_rate, **kwargs)


def private(learning_rate, eps=1e-3, **kwargs):
  """Returns private MeZO on one row, with almost no noise.

  The row has the loss of the whole batch, so the steps are those of MeZO.
  """
  tx = whole.private(learning_rate, eps, clip=1e4, noise_multiplier=1e-8,
                     batch_size=1, **kwargs)
  def update(updates, state, params=None, *, value_fn=None, **extra):
    if value_fn is not None:
      of_rows = lambda *args, **more: value_fn(*args, **more)[None]
      extra |= dict(value_fn=functools.wraps(value_fn)(of_rows),
                    noise_key=jax.random.key(1))
    return tx.update(updates, state, params, **extra)
  return optax.GradientTransformationExtraArgs(tx.init, update)


def of_params(make, **of):
  """Returns a maker of a variant whose arguments are trees like the params.

  Args:
    make: The variant.
    **of: {argument: function of a leaf of the params}.
  """
  def row(learning_rate, eps=1e-3, **kwargs):
    at = lambda params: make(learning_rate, eps, **kwargs, **{
        name: jax.tree.map(fn, params) for name, fn in of.items()})
    return optax.GradientTransformationExtraArgs(
        lambda params: at(params).init(params),
        lambda updates, state, params=None, **extra: at(params).update(
            updates, state, params, **extra))
  return row


# {name: make(learning_rate, key=...)}. Unless the name says otherwise, the
# updates are those of Algorithm 1 of the MeZO paper.
ROWS = {
    'mezo': mezo,
    'mezo, decayed': functools.partial(
        mezo, weight_decay=1e-4, decay=lambda p: True),
    'mezo, signs': functools.partial(mezo, directions='rademacher'),
    'mezo, four directions': functools.partial(mezo, num_samples=4),
    'mezo, one-sided': functools.partial(
        with_spsa, combine=mezo_jax.one_sided),
    'mezo, low rank': functools.partial(
        mezo, directions=mezo_jax.LowRank(rank=2)),
    'mezo, lazy low rank': functools.partial(
        mezo, directions=mezo_jax.LazyLowRank(rank=2, every=2)),
    'mezo, subzero': functools.partial(
        mezo, directions=mezo_jax.SubZero(rank=1, every=2)),
    'mezo, low rank in one pass': functools.partial(
        with_spsa, directions=mezo_jax.LowRank(rank=2), num_samples=3,
        over='batch'),
    'mezo, fzoo': functools.partial(
        with_spsa, directions='rademacher', combine=mezo_jax.fzoo,
        num_samples=4),
    'mezo, to nearest': functools.partial(mezo, stochastic_rounding=False),
    'mezo, pending': functools.partial(mezo, apply_every=2),
    'sparse': functools.partial(whole.sparse_mezo, limits=5.0),
    'momentum by history': functools.partial(
        whole.momentum_by_history, beta=0.5, window=3),
    'adam by history': functools.partial(whole.adam_by_history, window=3),
    'sign': whole.sign,
    'scalar adam': whole.scalar_adam,
    'one point': whole.one_point,
    'conservative': whole.conservative,
    'forward gradient': whole.forward_grad,
    'hizoo': functools.partial(whole.hizoo, alpha=1e-6),
    'variance modified': of_params(
        whole.variance_modified, norms=lambda x: jnp.float32(0.5)),
    'expectation modified': of_params(
        whole.expectation_modified, norms=lambda x: jnp.float32(0.5)),
    'lozo-m': functools.partial(
        whole.lozo_m, directions=mezo_jax.LazyLowRank(rank=2, every=2)),
    'mazo': of_params(whole.mazo, mask=lambda x: np.ones(
        jnp.shape(x), bool)),
    'svrg': svrg,
    'private': private,
    'spsa and sgd': chained(optax.sgd),
    'spsa and adam': chained(optax.adam),
    'backprop and adam': first_order,
}
# These change the weights only at every other step.
EVERY_OTHER = 'mezo, pending', 'svrg'
ZEROTH = [name for name in ROWS if 'backprop' not in name]
