"""MeZO's relatives, one file each: docs/relatives.md says which to take when.

Each is built of what `mezo_jax.mezo` is built of (a `Displacement`,
`Directions`, losses, the door), and is an `optax.GradientTransformation` with
the same ``update(None, state, params, value_fn=...)``.
"""

from mezo_jax.variants.conservative import conservative
from mezo_jax.variants.forward_grad import forward_grad
from mezo_jax.variants.history import adam_by_history, momentum_by_history
from mezo_jax.variants.mazo import mazo, saliency
from mezo_jax.variants.private import private
from mezo_jax.variants.quzo import quzo
from mezo_jax.variants.scalars import one_point, scalar_adam, sign
from mezo_jax.variants.sparse import smallest, sparse_mezo
from mezo_jax.variants.svrg import svrg

__all__ = ('adam_by_history', 'conservative', 'forward_grad', 'mazo',
           'momentum_by_history', 'one_point', 'private', 'quzo', 'saliency',
           'scalar_adam', 'sign', 'smallest', 'sparse_mezo', 'svrg')
