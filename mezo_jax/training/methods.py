"""Defines the table of methods: everything that depends on `config.method`.

Each method is one entry of `METHODS`, a `Method`. The entry defines how the
optax transform is built, which options the method reads, which configs it
rejects, how many forward passes a step takes, and every other property that
the rest of the library needs. No other module compares `config.method` with a
name.

To add a method:

1. Write its transform in `mezo_jax.variants`.
2. Add an entry to `METHODS`, and its own options, if any, to `Variant`.
3. Add a row to the common test table, and describe the method in the
   documentation.

Which parameters are trained (`config.peft.method`) is a separate table,
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

# --- options ----------------------------------------------------------------


@dataclasses.dataclass
class Variant:
  """Holds the options that only some methods read, `config.variant`.

  Each comment begins with the methods that read the option. `Method.reads` is
  the authoritative list: setting an option that the method does not read is an
  error on the command line.
  """

  every: int = 2  # svrg: steps from one anchor to the next
  # svrg: learning rate of the step that sets a new anchor.
  anchor_learning_rate: float = 1e-3
  # svrg: number of training rows over which the gradient at an anchor is
  # averaged; 0 for all.
  anchor_rows: int = 0
  # momentum_by_history, adam_by_history: number of past steps that are used.
  window: int = 8
  # momentum_by_history, adam_by_history, lozo_m: decay rate of the momentum.
  b1: float = 0.9
  # adam_by_history, scalar_adam: decay rate of the second moment.
  b2: float = 0.99
  # sparse_mezo: fraction of the weights, the smallest ones, that are trained.
  # mazo: fraction of the weights that are trained in each row of a matrix.
  share: float = 0.25
  # mazo, variance_modified, expectation_modified: number of directions of the
  # scoring pass before the first step.
  num_scores: int = 16
  alpha: float = 1.0  # mazo: coefficient of the squared gradient in a score
  beta: float = 0.0  # mazo: coefficient of the weight's magnitude in a score
  clip: float = 100.0  # qzo: largest absolute projected gradient
  # hizoo: weight of a step's curvature in the moving average.
  curvature_rate: float = 1e-8


# For each option, a check of its value and a description of the allowed range
# for the error message.
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
  """Holds the inputs from which a method's transform is built.

  Attributes:
    config: The config of the run.
    params: The trained parameters before training, or their shapes.
    plan: The `mezo_jax.training.privacy.Plan` of a private run; None for other
      runs, and for a transform that only replays.
    learning_rate: A schedule, or ``{regular expression: schedule}`` with
      ``optimizer.groups``.
    eps: A number, or ``{regular expression: number}`` with
      ``optimizer.groups``.
    schedule: A function from a learning rate to a schedule of the config's
      kind, for methods with a second learning rate.
    options: Keyword arguments of `mezo_jax.spsa` and of the variants.
    finish: Further keyword arguments of `mezo_jax.mezo`: weight decay and
      rounding.
  """

  config: Any
  params: Any
  plan: Any
  learning_rate: Any
  eps: Any
  schedule: Callable
  options: dict[str, Any]
  finish: dict[str, Any]

  def without(self, *names: str) -> dict[str, Any]:
    """Returns ``options`` without the given names."""
    return {k: v for k, v in self.options.items() if k not in names}


def _forwards_of_spsa(config, rows: int) -> int:
  """Returns the forward passes of a step of `mezo_jax.spsa`."""
  del rows
  z = config.spsa
  # With over='rows' each direction evaluates its own part of the batch, so all
  # directions together take as many forward passes as one.
  if z.over == 'rows':
    return COMBINES[z.combine].evaluations(1)
  return COMBINES[z.combine].evaluations(z.num_samples)


@dataclasses.dataclass(frozen=True)
class Method:
  """Describes a method that trains a model, or a baseline.

  A method that trains sets either ``estimator`` or ``make``. A baseline, which
  trains nothing, sets ``result``.

  Attributes:
    words: Description for the model card, in which ``{optimizer}`` is replaced
      by the name of the optimizer.
    estimator: ``estimator(setup) -> Estimator``, a function of a `Setup`. The
      method is then `mezo_jax.mezo` with this estimator.
    forwards: ``forwards(config, rows) -> number``, the average number of
      forward passes of a batch per step, where ``rows`` is the number of
      training rows. The function `forwards` says what counts.
    needs: Rules, each ``rule(config) -> (holds, message)``, that the config
      must satisfy in addition to those of
      `mezo_jax.training.checks.check_config`.
    reads: Names of the options of `Variant` that the method reads.
    ignores: Regular expression that matches the names of fields outside of
      `Variant` that the method does not read.
    backprop: Whether it trains by backpropagation.
    probe: Whether it starts by fitting a linear probe.
    demonstrations: Whether labelled examples precede each prompt.
    own_head: Whether a head that is tied to the embedding is separated from it.
    part: Key in `PARTS` of the parameters that the method trains. Defaults to
      None, for ``config.peft.method``.
    usual_rates: Whether its learning rates have the order of magnitude of
      MeZO's (or of Adam's, with backpropagation). If not, no warning is given
      for an unusual one.
    mixes: Whether it can train several tasks in one run.
    private: Whether it gives the training rows the differential privacy of
      ``config.privacy``, so that nothing else about them may be reported.
    anchors: Whether every ``variant.every``-th step sets a new anchor, whose
      gradient is estimated on a larger batch.
    offloads: Whether it works with weights that are kept in host memory.
    rewards: Whether it evaluates all points of a step in one call, so that it
      works with the objective 'reward'.
    replicated: Whether it can run on several replicas, each of which evaluates
      a part of the directions.
    range_test: Whether a range test can find its learning rate.
    score: ``score(config, value_fns, params, **options) -> (memory, words)``,
      for a method with a scoring pass before the first step. ``memory`` is the
      part of the optimizer state that the pass fills, and ``words`` describes
      it in the log.
    result: ``result(ask, params, probed) -> (on_dev, on_test, answers)``, for a
      baseline. It returns the reports on the dev and test rows and the answers
      of the test rows, as ``ask.both`` does. The first is None if the dev rows
      are not evaluated. ``ask`` is a `mezo_jax.tasks.evaluate.Evaluators`, and
      ``probed`` the same triple of the linear probe, or None.
    make: ``make(setup) -> transform``, for a method that trains and is not
      `mezo_jax.mezo` with an estimator.
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
  rewards: bool = False
  replicated: bool = False
  range_test: bool = False
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
        apply_every=setup.config.spsa.apply_every, **setup.finish)

  @property
  def scores(self) -> bool:
    """Returns whether the method has a scoring pass before the first step."""
    return self.score is not None


# --- how transforms are built -----------------------------------------------


# Optimizers for backpropagation, as functions of (learning_rate, weight_decay).
# The keys are the values of `config.optimizer.name`.
OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    'adam': lambda rate, decay: optax.adamw(rate, weight_decay=decay),
    'sgd': lambda rate, decay: optax.chain(
        optax.add_decayed_weights(decay), optax.sgd(rate))}


def _spsa(s: Setup) -> Estimator:
  """Builds the estimator of MeZO."""
  return spsa(s.eps, **s.options)


def _backprop(s: Setup):
  """Builds the transform of the methods that train by backpropagation."""
  o = s.config.optimizer
  inner = lambda rate: OPTIMIZERS[o.name](rate, o.weight_decay)
  return skip_not_finite(optax.chain(
      backprop(micro_batches=o.micro_batches),
      by_group(inner, s.learning_rate)))


def _svrg(s: Setup):
  """Builds the transform of MeZO-SVRG.

  The large batch of an anchor is evaluated in parts of ``data.batch_size``
  rows, so it takes no more memory than any other batch.
  """
  v = s.config.variant
  return variants.svrg(
      s.learning_rate, s.eps, every=v.every, rows=s.config.data.batch_size,
      anchor_learning_rate=s.schedule(v.anchor_learning_rate),
      stochastic_rounding=s.finish['stochastic_rounding'],
      **s.without('combine', 'micro_batches'))


def _private(s: Setup):
  """Builds the estimator of private MeZO.

  A transform without a plan replays recorded steps. Their projected gradients
  already contain the noise, so the noise multiplier is not used.
  """
  p = s.config.privacy
  return variants.private(
      s.eps, clip=p.clip, mechanism=p.mechanism,
      batch_size=s.config.data.batch_size,
      noise_multiplier=s.plan.noise_multiplier if s.plan else 0.0,
      **s.without('combine', 'over'))


def _qzo(s: Setup):
  """Builds the transform of QZO, which keeps scale factors at 0 or above."""
  estimator = variants.qzo(s.eps, clip=s.config.variant.clip, **s.options)
  return variants.nonnegative(
      mezo(s.learning_rate, estimator=estimator, **s.finish))


def _modified(make: Callable) -> Callable:
  """Returns a function that builds a modified-SPSA estimator from a `Setup`.

  The norms start as ones. The scoring pass, or a checkpoint, replaces them.
  """
  return lambda s: make(
      s.eps, **s.options,
      norms=variants.no_norms(s.params, s.options['directions']))


# --- rules ------------------------------------------------------------------
#
# Each rule returns (holds, message). The message is shown after 'config: ' if
# the rule does not hold.


def _label_words(config):
  return (config.task.traits.words,
          f'method {config.method!r} needs a task with label words; set '
          'task.kind to classification, or use the method head_only')


def _derivative(config):
  name = objective.of(config.task, config.objective)
  return (objective.differentiable(name),
          f'objective {objective.words(name)} is not differentiable; use a '
          'method that needs no derivatives, or the objective cross_entropy or '
          'lm')


def _prompt(config):
  return (not (config.task.masked or config.task.traits.new_head),
          f'method {config.method!r} needs a causal model and a task with a '
          'prompt; remove {mask} from task.template, or choose another '
          'task.kind or method')


def _no_part(config):
  return (not (config.peft.method or config.peft.mask),
          f'method {config.method!r} determines the trained parameters itself; '
          'leave peft.method and peft.mask empty')


def _no_groups(config):
  return (not config.optimizer.groups,
          f'method {config.method!r} does not support optimizer.groups; leave '
          'it empty')


def _no_accumulation(config):
  return (config.spsa.apply_every == 1,
          f'method {config.method!r} does not accumulate updates; set '
          'spsa.apply_every to 1')


def _two_sided(config):
  return (config.spsa.combine == 'two_sided',
          f'method {config.method!r} defines how losses become projected '
          "gradients; leave spsa.combine at 'two_sided'")


def _one_direction(config):
  return (config.spsa.num_samples == 1,
          f'method {config.method!r} supports one direction per step; set '
          'spsa.num_samples to 1')


def _scan(config):
  return (config.spsa.over == 'scan',
          f'method {config.method!r} evaluates directions one after the other; '
          "set spsa.over to 'scan'")


def _floats(config):
  return (config.model.dtype not in QUANTISED,
          f'method {config.method!r} cannot train quantised weights; use a '
          'float model.dtype')


def _quantised(config):
  return (config.model.dtype in QUANTISED,
          f'method {config.method!r} trains quantised weights; set model.dtype '
          f'to one of {", ".join(QUANTISED)}')


def _no_decay(config):
  return (not config.optimizer.weight_decay,
          f'method {config.method!r} does not support weight decay; set '
          'optimizer.weight_decay to 0')


def _lazy_low_rank(config):
  return (config.spsa.distribution == 'lazy_low_rank',
          f'method {config.method!r} needs low-rank directions; set '
          "spsa.distribution to 'lazy_low_rank'")


def _elements(config):
  return (not issubclass(KINDS[config.spsa.distribution], LowRank),
          f'method {config.method!r} rounds each element of z, which a '
          'low-rank spsa.distribution never builds; use normal or rademacher, '
          'or the method mezo')


def _whole_model(config):
  return (not config.peft.method,
          f'method {config.method!r} trains the scales of quantised weights; '
          'leave peft.method empty')


def _anchor_rows(config):
  n = config.variant.anchor_rows
  return (not n or n >= config.data.batch_size,
          'variant.anchor_rows must be at least data.batch_size, or 0 for all '
          'training rows')


def _ends_at_anchors(config):
  every = max(config.variant.every, 1)
  return (config.steps % every == config.eval_every % every == 0,
          'steps and eval_every must be multiples of variant.every, because '
          'the weights are updated only at these steps')


def _whole_batch(config):
  return (config.optimizer.micro_batches == 1,
          f'method {config.method!r} already evaluates an anchor in parts of '
          'data.batch_size rows; set optimizer.micro_batches to 1')


def _anchor_is_a_mean(config):
  trained = objective.of(config.task, config.objective)
  return (objective.over_rows(config.task, trained)
          or config.variant.anchor_rows == config.data.batch_size,
          f'objective {objective.words(trained)} is not a mean over rows, but '
          f'an anchor of method {config.method!r} averages it over several '
          'batches; set variant.anchor_rows to data.batch_size')


def _budget(config):
  p = config.privacy
  return (p.epsilon > 0 and 0 < p.delta < 1 and p.clip > 0,
          'privacy.epsilon and privacy.clip must be positive, and '
          'privacy.delta must be between 0 and 1')


def _laplace_is_of_one(config):
  return (config.privacy.mechanism != 'laplace'
          or config.spsa.num_samples == 1,
          "privacy.mechanism 'laplace' supports one direction per step; set "
          'spsa.num_samples to 1')


def _per_example(config):
  trained = objective.of(config.task, config.objective)
  return (objective.over_rows(config.task, trained),
          f'method {config.method!r} clips per-example losses, but objective '
          f'{objective.words(trained)} is not a mean over rows; choose '
          'another objective')


# The rules that all variants share, except quzo, which can accumulate updates.
_PLAIN = _no_groups, _no_accumulation

# --- scoring passes before the first step -----------------------------------


def _score_mazo(config, value_fns, params, **options):
  """Computes the mask of the weights that MaZO trains.

  The memory is a list with the mask of each matrix. The mask of any other
  parameter is a single bool, which is not stored in the optimizer state.
  """
  v = config.variant
  mask = variants.saliency(
      value_fns, params, share=v.share, alpha=v.alpha, beta=v.beta, **options)
  return ([m for m in jax.tree.leaves(mask) if jnp.ndim(m)],
          f'{v.share:.0%} of the weights in each row of a matrix are trained')


def _score_layers(config, value_fns, params, **options):
  """Estimates the norm of each layer's gradient, for the modified SPSA."""
  del config
  # These methods train a single task, so there is one function.
  return (variants.grad_norms(value_fns[0], params, **options),
          'estimated the gradient norm of each layer')


# --- forward passes of a step -----------------------------------------------


def _directions_seen(config) -> int:
  """Returns the number of directions that are evaluated on each row."""
  return 1 if config.spsa.over == 'rows' else config.spsa.num_samples


def _forwards_of_svrg(config, rows: int) -> float:
  """Returns the average number of forward passes of a step of MeZO-SVRG.

  One of ``every`` steps sets an anchor. It takes 2 forward passes per direction
  for each batch of the anchor's rows. Each of the other steps takes 4 forward
  passes per direction: 2 at the weights and 2 at the anchor.
  """
  every = config.variant.every
  of_anchor = 2 * anchor_batches(config, rows)
  return _directions_seen(config) * (of_anchor + 4 * (every - 1)) / every


# --- the table --------------------------------------------------------------


METHODS = {
    'mezo': Method(
        'MeZO (Malladi et al., 2023), forward passes only', _spsa,
        offloads=True, rewards=True, replicated=True, range_test=True),
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
        needs=_PLAIN, reads=('share',), rewards=True),
    'momentum_by_history': Method(
        'MeZO with momentum of its last steps, forward passes only',
        lambda s: variants.momentum_by_history(
            s.eps, beta=s.config.variant.b1, window=s.config.variant.window,
            **s.options),
        needs=_PLAIN, reads=('window', 'b1'), rewards=True),
    'adam_by_history': Method(
        "MeZO with Adam's moments of its last steps, forward passes only",
        lambda s: variants.adam_by_history(
            s.eps, b1=s.config.variant.b1, b2=s.config.variant.b2,
            window=s.config.variant.window, **s.options),
        needs=_PLAIN, reads=('window', 'b1', 'b2'), usual_rates=False,
        rewards=True),
    'scalar_adam': Method(
        'MeZO with one second moment (MEAZO), forward passes only',
        lambda s: variants.scalar_adam(
            s.eps, b2=s.config.variant.b2, **s.options),
        needs=_PLAIN, reads=('b2',), usual_rates=False, rewards=True),
    'sign': Method(
        'ZO-SGD-Sign, forward passes only',
        lambda s: variants.sign(s.eps, **s.without('combine')),
        needs=(*_PLAIN, _two_sided), usual_rates=False, rewards=True),
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
        needs=(*_PLAIN, _two_sided, _budget, _laplace_is_of_one,
               _scan, _per_example),
        mixes=False, private=True),
    'zero_shot': Method(
        'no training', mixes=False,
        result=lambda ask, params, probed: ask.both(params)),
    'icl': Method(
        'demonstrations in the prompt', demonstrations=True, mixes=False,
        needs=(_prompt,),
        result=lambda ask, params, probed: (None, *ask.test(params))),
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


# --- properties of a config -------------------------------------------------


def method_of(config: Any) -> Method:
  """Returns the entry of `METHODS` for ``config.method``."""
  return METHODS[config.method]


def names_where(holds: Callable[[Method], bool]) -> list[str]:
  """Returns the names of the methods for which ``holds(method)`` is true."""
  return [name for name, method in METHODS.items() if holds(method)]


def rules(config: Any) -> list[tuple[bool, str]]:
  """Evaluates the rules of a config's method.

  Args:
    config: The config of the run.

  Returns:
    A list of pairs ``(holds, message)``. A rule that does not hold is an error
    with this message.
  """
  method, found = method_of(config), []
  for name in method.reads:
    if name in _RANGES:
      holds, words = _RANGES[name]
      value = getattr(config.variant, name)
      found.append((holds(value),
                    f'variant.{name} is {value!r} and must be {words}'))
  return found + [rule(config) for rule in method.needs]


def forwards(config: Any, rows: int) -> float:
  """Returns the average number of forward passes of a batch per step.

  Multiplied by the number of steps it is ``forwards`` in ``result.json``: how
  often training ran the model on a batch of ``data.batch_size`` rows. Each
  evaluation of a batch's loss counts as one, even if the batch is split into
  micro-batches, if the directions share its rows (spsa.over 'rows'), or if
  answers are generated. A forward pass with its tangent counts as two, and one
  with its backward pass as one. Only steps count: not evaluations, cached
  activations, linear probes, scoring passes or range tests.

  Args:
    config: The config of the run.
    rows: The number of training rows.
  """
  return method_of(config).forwards(config, rows)


def selects(config: Any) -> bool:
  """Returns whether the best step on the dev rows is the result of the run.

  Otherwise the last step is the result.
  """
  return not method_of(config).private or config.privacy.public_dev


def anchor_every(config: Any) -> int:
  """Returns the number of steps from one anchor to the next; 0 for no anchors.
  """
  return config.variant.every if method_of(config).anchors else 0


def anchor_batches(config: Any, rows: int) -> int:
  """Returns the number of batches whose rows an anchor averages over.

  Args:
    config: The config of the run.
    rows: The number of training rows. Those that do not fill a batch are left
      out.
  """
  return min(config.variant.anchor_rows or rows, rows) // config.data.batch_size


def finds_rate(config: Any) -> bool:
  """Returns whether a range test can find the learning rate of a run.

  See `mezo_jax.training.learning_rates`. Standardised losses and rewards have
  no unit in which a rise could be measured, and metrics rise in jumps.
  """
  named = objective.of(config.task, config.objective)
  return (method_of(config).range_test and not config.optimizer.groups
          and not COMBINES[config.spsa.combine].needs_all
          and objective.differentiable(named))


def part_of(config: Any) -> Part:
  """Returns the entry of `PARTS` that describes the trained parameters."""
  part = method_of(config).part
  return PARTS[config.peft.method if part is None else part]


def adapts(config: Any) -> bool:
  """Returns whether adapters are added to the model."""
  return bool(part_of(config).adapter) and (
      method_of(config).steps or bool(config.peft.adapter))


def layers_apart(config: Any) -> bool:
  """Returns whether the last layers are separate parameters.

  If so, the last ``peft.num_layers`` layers have paths ``last_layers/...`` and
  can be trained without the others.
  """
  part, p = part_of(config), config.peft
  names = p.mask, p.targets if part.added else ''
  return method_of(config).steps and (
      part.last_layers or any('last_layers' in name for name in names))


def made(config: Any) -> str:
  """Returns a regular expression for the parameters that the run creates.

  It matches the paths of adapters and of a new classification head, which are
  not in the model's files. Their initial values are computed from a seed and
  may differ in the last bits between kinds of processors.
  """
  return '|'.join(filter(None, (part_of(config).adapter, r'^classifier/')))


def looks_first(config: Any) -> bool:
  """Returns whether a linear probe or a scoring pass precedes the first step.

  The steps of such a run depend on the result of that pass, so the log alone
  cannot replay them.
  """
  method = method_of(config)
  return method.probe or method.scores


def lowers_by_square(config: Any) -> bool:
  """Returns whether a step lowers the loss by its rate times ``g ** 2``.

  This holds to first order if an update is the sum of ``g z`` times the rate,
  and g is the slope of the loss along z. If losses are standardised or are
  metrics, or in private training, g is something else.
  """
  method, named = method_of(config), objective.of(config.task, config.objective)
  return (method.steps and method.usual_rates and not method.backprop
          and not method.anchors and not method.private
          and not config.optimizer.groups
          and not COMBINES[config.spsa.combine].needs_all
          and objective.differentiable(named))


def warnings(config: Any) -> list[str]:
  """Returns sentences about settings that are valid but unusual.

  Args:
    config: The config of the run.

  Returns:
    A list of sentences without a final period; so far at most one, about the
    learning rate.
  """
  method, part, o = method_of(config), part_of(config), config.optimizer
  if not (method.steps and method.usual_rates):
    return []
  # These combine functions standardize losses, so rates have another scale. So
  # have rewards, whose unit only the user knows.
  if not method.backprop and COMBINES[config.spsa.combine].needs_all:
    return []
  if objective.of(config.task, config.objective) == objective.REWARD:
    return []
  if method.backprop and o.name == 'sgd':
    return []
  usual = part.usual_backprop if method.backprop else part.usual
  if not usual or usual[0] / 100 < o.learning_rate < usual[1] * 100:
    return []
  return [f'optimizer.learning_rate {o.learning_rate:g} differs by two orders '
          'of magnitude or more from the usual value for '
          f'{config.peft.method or "all parameters"} with '
          f'{"backpropagation" if method.backprop else "MeZO"}, '
          f'{" to ".join(f"{x:g}" for x in dict.fromkeys(usual))}']
