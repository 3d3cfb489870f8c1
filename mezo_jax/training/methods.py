"""The table of methods: everything that depends on `config.method`.

A method is one `Method` in `METHODS`. Its entry says how the optax transform is
built, which options it reads, what it refuses, how many forward passes a step
takes, and whatever else the rest of the library asks. No other module compares
`config.method` with a name. To add a method, write its transform in
`mezo_jax.variants`, add an entry here (and an option to `Variant` if it has one
of its own), add a row to the common test table, and describe it in the
documentation.

What is trained (`config.peft.method`) has a table of its own,
`mezo_jax.peft.kinds.PARTS`.
"""

from collections.abc import Callable
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mezo_jax import variants
from mezo_jax.core.quantized import QUANTISED
from mezo_jax.directions.by_name import KINDS
from mezo_jax.directions.low_rank import LowRank
from mezo_jax.peft.kinds import Part, PARTS
from mezo_jax.tasks import objective
from mezo_jax.transforms.backprop import backprop
from mezo_jax.transforms.combine import COMBINES
from mezo_jax.transforms.estimator import Estimator
from mezo_jax.transforms.mezo import by_group, mezo
from mezo_jax.transforms.not_finite import skip_not_finite
from mezo_jax.transforms.spsa import spsa
from mezo_jax.variants.private import MECHANISMS

# --- options ----------------------------------------------------------------


@dataclasses.dataclass
class Variant:
  """Options of single methods, `config.variant`. The comments name the methods
  that read an option; `Method.reads` is what counts."""

  every: int = 2  # svrg: steps from one anchor to the next
  anchor_learning_rate: float = 1e-3  # svrg: learning rate of an anchor's step
  anchor_rows: int = 0  # svrg: training rows of an anchor; 0 for all
  window: int = 8  # ..._by_history: number of past steps that are used
  b1: float = 0.9  # ..._by_history, lozo_m: decay rate of the momentum
  b2: float = 0.99  # adam_by_history, scalar_adam: decay of the second moment
  # sparse_mezo: share of the weights, the smallest, that is trained. mazo:
  # share of each row that is trained.
  share: float = 0.25
  num_scores: int = 16  # mazo, ..._modified: directions of the scoring pass
  alpha: float = 1.0  # mazo: weight of the squared gradient in a score
  beta: float = 0.0  # mazo: weight of the parameter's magnitude in a score
  clip: float = 100.0  # qzo: largest absolute projected gradient
  curvature_rate: float = 1e-8  # hizoo: weight of a step's curvature


# The range of an option, and how an error describes it.
_RANGES = {
    'every': (lambda x: x >= 2, 'at least 2'),
    'anchor_learning_rate': (lambda x: x > 0, 'positive'),
    'window': (lambda x: x >= 1, 'at least 1'),
    'b1': (lambda x: 0 <= x < 1, 'from 0 to below 1'),
    'b2': (lambda x: 0 <= x < 1, 'from 0 to below 1'),
    'share': (lambda x: 0 < x <= 1, 'above 0 and at most 1'),
    'num_scores': (lambda x: x >= 1, 'at least 1'),
    'clip': (lambda x: x > 0, 'positive'),
    'curvature_rate': (lambda x: 0 <= x < 1, 'from 0 to below 1')}


# --- an entry of the table --------------------------------------------------


class Setup(NamedTuple):
  """Holds what a method's transform is built from."""

  config: Any  # of the run
  params: Any  # the trained parameters before training, or their shapes
  plan: Any  # of a private run; None where no losses are evaluated
  learning_rate: Any  # a schedule, or one for each of optimizer.groups
  eps: Any  # a number, or one for each of optimizer.groups
  schedule: Callable  # turns a learning rate into the config's schedule
  options: dict[str, Any]  # keyword arguments of `mezo_jax.spsa`
  finish: dict[str, Any]  # other keyword arguments of `mezo_jax.mezo`

  def without(self, *names: str) -> dict[str, Any]:
    """Returns the keyword arguments of `mezo_jax.spsa` except for these."""
    return {k: v for k, v in self.options.items() if k not in names}


def _forwards_of_spsa(config, rows: int) -> int:
  del rows
  z = config.spsa
  if z.over == 'rows':  # all directions together see each row once per sign
    return COMBINES[z.combine].evaluations(1)
  return COMBINES[z.combine].evaluations(z.num_samples)


@dataclasses.dataclass(frozen=True)
class Method:
  """A way to train a model, or a baseline.

  Attributes:
    words: Description for a model card; `{optimizer}` stands for its name.
    estimator: ``estimator(setup) -> Estimator``, with a `Setup`, of a method
      that is `mezo_jax.mezo` with that estimator.
    make: ``make(setup) -> transform`` of another method that trains.
    forwards: ``forwards(config, rows) -> number``: forward passes of a batch
      that a step takes on average; one with its tangent counts as two. ``rows``
      is the number of training rows.
    needs: Rules, ``rule(config) -> (holds, message)``, in addition to what
      `mezo_jax.training.checks.check_config` asks of every config.
    reads: The options of `Variant` that the method reads.
    ignores: Regular expression of other fields that the method does not read.
    backprop: Whether it trains by backpropagation.
    probe: Whether it begins with a linear probe.
    demonstrations: Whether solved examples precede each prompt.
    own_head: Whether the head is separated from a tied embedding.
    part: Name in `PARTS` of what is trained; None for `config.peft.method`.
    usual_rates: Whether its learning rates are as large as MeZO's (or Adam's).
    mixes: Whether it can train several tasks.
    private: Whether it keeps `config.privacy` for the training rows, so that
      nothing about them may be reported.
    anchors: Whether every `variant.every`-th batch is a large one.
    offloads: Whether weights may be in the host's memory.
    replicated: Whether replicas may share out its directions.
    score: ``score(config, value_fns, params, **options) -> (memory, words)`` of
      a method that examines the weights before the first step: the part of
      the optimizer state that it fills, and a description for the log.
    result: ``result(ask, params, probed)`` of a method that trains nothing: the
      report on the test rows, from `mezo_jax.tasks.evaluate.Evaluators` and
      the linear probe's report, if there is one.
  """

  words: str
  estimator: Callable[[Setup], Estimator] | None = None
  forwards: Callable = _forwards_of_spsa
  needs: tuple[Callable[..., Any], ...] = ()
  reads: tuple[str, ...] = ()
  ignores: str = r'optimizer\.name|model\.remat'
  backprop: bool = False
  probe: bool = False
  demonstrations: bool = False
  own_head: bool = False
  part: str | None = None
  usual_rates: bool = True
  mixes: bool = True
  private: bool = False
  anchors: bool = False
  offloads: bool = False
  replicated: bool = False
  score: Callable | None = None
  result: Callable | None = None
  make: Callable[[Setup], optax.GradientTransformation] | None = None

  @property
  def steps(self) -> bool:
    """Returns whether the method trains."""
    return self.estimator is not None or self.make is not None

  def transform(self, setup: Setup) -> optax.GradientTransformation:
    """Returns the optax transform of a method that trains."""
    if self.estimator is None:
      assert self.make is not None  # other methods do not train
      return self.make(setup)
    return mezo(
        setup.learning_rate, estimator=self.estimator(setup),
        fold_every=setup.config.spsa.fold_every, **setup.finish)

  @property
  def scores(self) -> bool:
    """Returns whether the method examines the weights before it trains."""
    return self.score is not None


# --- how transforms are built -----------------------------------------------


# ``optimizer(learning_rate, weight_decay)`` of backpropagation, by the names in
# configs.
OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    'adam': lambda rate, decay: optax.adamw(rate, weight_decay=decay),
    'sgd': lambda rate, decay: optax.chain(
        optax.add_decayed_weights(decay), optax.sgd(rate))}


def _spsa(s: Setup) -> Estimator:
  return spsa(s.eps, **s.options)


def _backprop(s: Setup):
  o = s.config.optimizer
  inner = lambda rate: OPTIMIZERS[o.name](rate, o.weight_decay)
  return skip_not_finite(optax.chain(
      backprop(micro_batches=o.micro_batches),
      by_group(inner, s.learning_rate)))


def _svrg(s: Setup):
  v = s.config.variant
  return variants.svrg(
      s.learning_rate, s.eps, every=v.every, rows=s.config.data.batch_size,
      anchor_learning_rate=s.schedule(v.anchor_learning_rate),
      stochastic_rounding=s.finish['stochastic_rounding'],
      **s.without('combine', 'micro_batches'))


def _private(s: Setup):
  p = s.config.privacy
  return variants.private(
      s.eps, clip=p.clip, mechanism=p.mechanism,
      batch_size=s.config.data.batch_size,
      noise_multiplier=s.plan.noise_multiplier if s.plan else 0.0,
      **s.without('combine', 'over'))


def _qzo(s: Setup):
  estimator = variants.qzo(s.eps, clip=s.config.variant.clip, **s.options)
  return variants.nonnegative(
      mezo(s.learning_rate, estimator=estimator, **s.finish))


def _modified(make: Callable) -> Callable:
  return lambda s: make(
      s.eps, **s.options,
      norms=variants.no_norms(s.params, s.options['directions']))


# --- rules ------------------------------------------------------------------


def _label_words(config):
  return (config.task.traits.words,
          f'method {config.method!r} needs a task with label words; use '
          'head_only')


def _derivative(config):
  name = objective.of(config.task, config.objective)
  return (objective.differentiable(name),
          f'objective {objective.words(name)} has no derivative; use a method '
          'without differentiation, or cross_entropy or lm')


def _prompt(config):
  return (not (config.task.masked or config.task.traits.new_head),
          f'method {config.method!r} needs a causal model and a prompt')


def _no_part(config):
  return (not (config.peft.method or config.peft.mask),
          f'method {config.method!r} itself determines what is trained; leave '
          'out peft.method and peft.mask')


def _no_groups(config):
  return (not config.optimizer.groups,
          f'method {config.method!r} supports no optimizer.groups')


def _no_fold(config):
  return (config.spsa.fold_every == 1,
          f'method {config.method!r} needs spsa.fold_every of 1')


def _two_sided(config):
  return (config.spsa.combine == 'two_sided',
          f'method {config.method!r} computes projected gradients from losses '
          "in its own way; leave spsa.combine at 'two_sided'")


def _one_direction(config):
  return (config.spsa.num_samples == 1,
          f'method {config.method!r} needs spsa.num_samples of 1')


def _scan(config):
  return (config.spsa.over == 'scan',
          f"method {config.method!r} needs spsa.over of 'scan'")


def _floats(config):
  return (config.model.dtype not in QUANTISED,
          f'method {config.method!r} cannot train quantised weights; use '
          'another model.dtype')


def _quantised(config):
  return (config.model.dtype in QUANTISED,
          f'method {config.method!r} needs model.dtype of '
          f'{", ".join(QUANTISED)}')


def _no_decay(config):
  return (not config.optimizer.weight_decay,
          f'method {config.method!r} needs optimizer.weight_decay of 0')


def _lazy_low_rank(config):
  return (config.spsa.distribution == 'lazy_low_rank',
          f'method {config.method!r} needs spsa.distribution of '
          "'lazy_low_rank'")


def _elements(config):
  return (not issubclass(KINDS[config.spsa.distribution], LowRank),
          f'method {config.method!r} rounds each element of z; use a '
          'spsa.distribution that is not of low rank, or method mezo')


def _whole_model(config):
  return (not config.peft.method,
          f'method {config.method!r} trains the scales of quantised weights; '
          'leave out peft.method')


def _anchor_rows(config):
  n = config.variant.anchor_rows
  return (not n or n >= config.data.batch_size,
          'variant.anchor_rows must be 0 or at least data.batch_size')


def _ends_at_anchors(config):
  every = max(config.variant.every, 1)
  return (config.steps % every == config.eval_every % every == 0,
          'steps and eval_every must be multiples of variant.every, because '
          'weights move only every that many steps')


def _whole_batch(config):
  return (config.optimizer.micro_batches == 1,
          f'method {config.method!r} needs optimizer.micro_batches of 1: a '
          'batch is one part of an anchor')


def _anchor_is_a_mean(config):
  trained = objective.of(config.task, config.objective)
  return (objective.over_rows(config.task, trained)
          or config.variant.anchor_rows == config.data.batch_size,
          f'objective {objective.words(trained)} needs a whole batch, and an '
          f'anchor of method {config.method!r} averages several; set '
          'variant.anchor_rows to data.batch_size')


def _budget(config):
  p = config.privacy
  return (p.epsilon > 0 and 0 < p.delta < 1 and p.clip > 0,
          'privacy.epsilon and clip must be positive, and privacy.delta '
          'between 0 and 1')


def _mechanism(config):
  p = config.privacy
  return (p.mechanism in MECHANISMS,
          f'unknown privacy.mechanism {p.mechanism!r}; choose one of '
          f'{", ".join(MECHANISMS)}')


def _laplace_is_of_one(config):
  return (config.privacy.mechanism != 'laplace'
          or config.spsa.num_samples == 1,
          "privacy.mechanism 'laplace' needs spsa.num_samples of 1")


def _per_example(config):
  trained = objective.of(config.task, config.objective)
  return (objective.over_rows(config.task, trained),
          f'method {config.method!r} clips what each row adds, and the '
          f'objective {objective.words(trained)} needs a whole batch')


_PLAIN = _no_groups, _no_fold  # of every variant but quzo, which can fold

# --- what is found before the first step ------------------------------------


def _score_mazo(config, value_fns, params, **options):
  v = config.variant
  mask = variants.saliency(
      value_fns, params, share=v.share, alpha=v.alpha, beta=v.beta, **options)
  return ([m for m in jax.tree.leaves(mask) if jnp.ndim(m)],
          f'{v.share:.0%} of each row are trained')


def _score_layers(config, value_fns, params, **options):
  del config
  # Such a method trains one task.
  return (variants.grad_norms(value_fns[0], params, **options),
          'norms of layers, grad')


# --- forward passes of a step -----------------------------------------------


def _directions_seen(config) -> int:
  """Returns how often a step's directions see each row."""
  return 1 if config.spsa.over == 'rows' else config.spsa.num_samples


def _forwards_of_svrg(config, rows: int) -> float:
  every = config.variant.every
  of_anchor = 2 * anchor_batches(config, rows)
  return _directions_seen(config) * (of_anchor + 4 * (every - 1)) / every


# --- the table --------------------------------------------------------------


METHODS = {
    'mezo': Method(
        'MeZO (Malladi et al., 2023), forward passes only', _spsa,
        offloads=True, replicated=True),
    'svrg': Method(
        'MeZO-SVRG (Gautam et al., 2024), forward passes only', make=_svrg,
        forwards=_forwards_of_svrg,
        needs=(*_PLAIN, _two_sided, _anchor_rows, _ends_at_anchors,
               _whole_batch, _no_decay, _anchor_is_a_mean),
        reads=('every', 'anchor_learning_rate', 'anchor_rows'),
        mixes=False, anchors=True),
    'sparse_mezo': Method(
        'Sparse-MeZO (Liu et al., 2024), forward passes only',
        lambda s: variants.sparse_mezo(
            s.eps, **s.options, limits=variants.smallest(
                s.params, s.config.variant.share)),
        needs=_PLAIN, reads=('share',)),
    'momentum_by_history': Method(
        'MeZO with momentum of its last steps, forward passes only',
        lambda s: variants.momentum_by_history(
            s.eps, beta=s.config.variant.b1, window=s.config.variant.window,
            **s.options),
        needs=_PLAIN, reads=('window', 'b1')),
    'adam_by_history': Method(
        "MeZO with Adam's moments of its last steps, forward passes only",
        lambda s: variants.adam_by_history(
            s.eps, b1=s.config.variant.b1, b2=s.config.variant.b2,
            window=s.config.variant.window, **s.options),
        needs=_PLAIN, reads=('window', 'b1', 'b2'), usual_rates=False),
    'scalar_adam': Method(
        'MeZO with one second moment (MEAZO), forward passes only',
        lambda s: variants.scalar_adam(
            s.eps, b2=s.config.variant.b2, **s.options),
        needs=_PLAIN, reads=('b2',), usual_rates=False),
    'sign': Method(
        'ZO-SGD-Sign, forward passes only',
        lambda s: variants.sign(s.eps, **s.without('combine')),
        needs=(*_PLAIN, _two_sided), usual_rates=False),
    'conservative': Method(
        'ZO-SGD-Cons, forward passes only',
        lambda s: variants.conservative(
            s.eps, learning_rate=s.learning_rate, **s.options),
        lambda config, rows: _forwards_of_spsa(config, rows) + 3,
        needs=_PLAIN),
    'one_point': Method(
        'one-point estimates by residual feedback, forward passes only',
        lambda s: variants.one_point(s.eps, **s.without('combine')),
        lambda config, rows: 1,
        needs=(*_PLAIN, _two_sided, _one_direction), usual_rates=False),
    'forward_grad': Method(
        'forward-mode directional derivatives',
        lambda s: variants.forward_grad(**s.without('combine', 'over')),
        lambda config, rows: 2 * config.spsa.num_samples,
        needs=(*_PLAIN, _two_sided, _derivative, _scan),
        ignores=r'optimizer\.name|model\.remat|spsa\.eps'),
    'mazo': Method(
        'MaZO (Zhang et al., 2025), forward passes only',
        lambda s: variants.mazo(
            s.eps, **s.options, mask=variants.no_scores(
                s.params, s.options['directions'])),
        needs=(*_PLAIN, _floats, _no_decay),
        reads=('share', 'num_scores', 'alpha', 'beta'), score=_score_mazo),
    'variance_modified': Method(
        'variance-modified SPSA (Malladi et al., 2023), forward passes only',
        _modified(variants.variance_modified), needs=(*_PLAIN, _floats),
        reads=('num_scores',), mixes=False, score=_score_layers),
    'expectation_modified': Method(
        'expectation-modified SPSA (Malladi et al., 2023), forward passes only',
        _modified(variants.expectation_modified), needs=(*_PLAIN, _floats),
        reads=('num_scores',), mixes=False, usual_rates=False,
        score=_score_layers),
    'hizoo': Method(
        'HiZOO (Zhao et al., 2024), forward passes only',
        lambda s: variants.hizoo(
            s.eps, alpha=s.config.variant.curvature_rate,
            **s.without('combine')),
        lambda config, rows: 2 * _directions_seen(config) + 1,
        needs=(*_PLAIN, _floats, _two_sided), reads=('curvature_rate',)),
    'lozo_m': Method(
        'LOZO-M (Chen et al., 2024), forward passes only',
        lambda s: variants.lozo_m(
            s.eps, beta=s.config.variant.b1, **s.options),
        needs=(*_PLAIN, _floats, _lazy_low_rank, _one_direction),
        reads=('b1',)),
    'quzo': Method(
        'QuZO (Zhou et al., 2025), forward passes only',
        lambda s: variants.quzo(s.eps, **s.options),
        needs=(_no_groups, _quantised, _elements)),
    'qzo': Method(
        'QZO (Shang et al., 2025), forward passes only',
        make=_qzo,
        needs=(*_PLAIN, _quantised, _whole_model), reads=('clip',),
        part='scales', usual_rates=False),
    'private': Method(
        'private MeZO (Zhang et al., 2024; Tang et al., 2024), forward passes '
        'only', _private,
        needs=(*_PLAIN, _two_sided, _budget, _mechanism, _laplace_is_of_one,
               _scan, _per_example),
        mixes=False, private=True),
    'zero_shot': Method(
        'no training', mixes=False,
        result=lambda ask, params, probed: ask.both(params)[1]),
    'icl': Method(
        'demonstrations in the prompt', demonstrations=True, mixes=False,
        needs=(_prompt,),
        result=lambda ask, params, probed: ask.test(params)),
    'linear_probe': Method(
        'a linear probe', probe=True, mixes=False, needs=(_label_words,),
        result=lambda ask, params, probed: probed),
    'finetune': Method(
        'backpropagation ({optimizer})', make=_backprop,
        forwards=lambda config, rows: 1,
        needs=(_derivative,), ignores=r'spsa\..*', backprop=True),
    'head_only': Method(
        'backpropagation ({optimizer}) into the head alone', make=_backprop,
        forwards=lambda config, rows: 1, needs=(_derivative, _no_part),
        ignores=r'spsa\..*', backprop=True, part='head'),
    'lp_mezo': Method(
        'MeZO (Malladi et al., 2023) after a linear probe, forward passes only',
        _spsa, needs=(_label_words, _no_part), probe=True, own_head=True,
        part='', mixes=False),
}


# --- questions about a config -----------------------------------------------


def method_of(config: Any) -> Method:
  """Returns the table's entry for the config's method."""
  return METHODS[config.method]


def names_where(holds: Callable[[Method], bool]) -> list[str]:
  """Returns the names of the methods of which ``holds(method)`` is true."""
  return [name for name, method in METHODS.items() if holds(method)]


def rules(config: Any) -> list[tuple[bool, str]]:
  """Returns the rules of a config's method as pairs ``(holds, message)``."""
  method, found = method_of(config), []
  for name in method.reads:
    if name in _RANGES:
      holds, words = _RANGES[name]
      value = getattr(config.variant, name)
      found.append((holds(value),
                    f'variant.{name} is {value!r} and must be {words}'))
  return found + [rule(config) for rule in method.needs]


def forwards(config: Any, rows: int) -> float:
  """Returns how many forward passes of a batch a step takes, on average.

  Args:
    config: The config of the run.
    rows: The number of training rows.
  """
  return method_of(config).forwards(config, rows)


def selects(config: Any) -> bool:
  """Returns whether dev rows choose the step that is the result. Otherwise the
  last step is the result."""
  return not method_of(config).private or config.privacy.public_dev


def anchor_every(config: Any) -> int:
  """Returns the number of steps from one anchor to the next, whose batch is
  `anchor_batches` large; 0 if there are no anchors."""
  return config.variant.every if method_of(config).anchors else 0


def anchor_batches(config: Any, rows: int) -> int:
  """Returns how many batches the rows of an anchor fill. Rows that do not fill
  a batch are left out.

  Args:
    config: The config of the run.
    rows: The number of training rows.
  """
  return min(config.variant.anchor_rows or rows, rows) // config.data.batch_size


def part_of(config: Any) -> Part:
  """Returns the entry of `PARTS` that describes what is trained."""
  part = method_of(config).part
  return PARTS[config.peft.method if part is None else part]


def adapts(config: Any) -> bool:
  """Returns whether the model gets parameters that its files do not have."""
  return bool(part_of(config).adapter) and (
      method_of(config).steps or bool(config.peft.adapter))


def layers_apart(config: Any) -> bool:
  """Returns whether the last ``peft.num_layers`` layers are parameters of their
  own, ``last_layers/...``, so that they can be trained alone."""
  part, p = part_of(config), config.peft
  names = p.mask, p.targets if part.added else ''
  return method_of(config).steps and (
      part.last_layers or any('last_layers' in name for name in names))


def made(config: Any) -> str:
  """Returns a regular expression of the parameters that are not in the model's
  files. Their last bits may differ between kinds of processors."""
  return '|'.join(filter(None, (part_of(config).adapter, r'^classifier/')))


def looks_first(config: Any) -> bool:
  """Returns whether the steps depend on a pass over rows before the first one,
  so that their log alone cannot replay them."""
  method = method_of(config)
  return method.probe or method.scores


def warnings(config: Any) -> list[str]:
  """Returns sentences about settings that are legal but probably a mistake."""
  method, part, o = method_of(config), part_of(config), config.optimizer
  if not (method.steps and method.usual_rates):
    return []
  if method.backprop and o.name == 'sgd':
    return []
  usual = part.usual_backprop if method.backprop else part.usual
  if not usual or usual[0] / 100 < o.learning_rate < usual[1] * 100:
    return []
  return [f'optimizer.learning_rate {o.learning_rate:g} is two orders of '
          f'magnitude or more from what is usual for '
          f'{config.peft.method or "all parameters"} with '
          f'{"backpropagation" if method.backprop else "MeZO"}, '
          f'{" to ".join(f"{x:g}" for x in dict.fromkeys(usual))}']
