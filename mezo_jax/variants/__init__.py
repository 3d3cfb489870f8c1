"""Provides the variants of MeZO. Related variants share a file.

A variant is a `mezo_jax.Estimator`. It replaces `mezo_jax.spsa` in any chain,
or in ``mezo_jax.mezo(learning_rate, estimator=...)``. Only `svrg` is a whole
optimizer. docs/variants.md compares the variants. Configs refer to them by the
names in `mezo_jax.training.methods.METHODS`.
"""

from mezo_jax.variants.conservative import conservative
from mezo_jax.variants.forward_grad import forward_grad
from mezo_jax.variants.history import adam_by_history, momentum_by_history
from mezo_jax.variants.hizoo import hizoo
from mezo_jax.variants.lozo_m import lozo_m
from mezo_jax.variants.mazo import mazo, no_scores, saliency
from mezo_jax.variants.modified import (
  expectation_modified,
  grad_norms,
  no_norms,
  variance_modified,
)
from mezo_jax.variants.private import private
from mezo_jax.variants.quzo import quzo
from mezo_jax.variants.qzo import nonnegative, qzo
from mezo_jax.variants.scalars import one_point, scalar_adam, sign
from mezo_jax.variants.sparse import smallest, sparse_mezo
from mezo_jax.variants.svrg import svrg

__all__ = ('adam_by_history', 'conservative', 'expectation_modified',
           'forward_grad', 'grad_norms', 'hizoo', 'lozo_m', 'mazo',
           'momentum_by_history', 'no_norms', 'no_scores', 'nonnegative',
           'one_point', 'private', 'quzo', 'qzo', 'saliency', 'scalar_adam',
           'sign', 'smallest', 'sparse_mezo', 'svrg', 'variance_modified')
