"""Predicts the memory and time of a run on devices that are not available.

`plan` compiles the programs of a config as `mezo_jax.training.build` builds
them, but from shapes: the step, a forward pass for comparison, and evaluation.
No weights, data or devices are needed. Texts and tokens are placeholders, so of
the data only the number of rows and their length matter. Answer candidates are
short placeholders.
"""

from collections.abc import Callable
import dataclasses
import math
from typing import Any

import jax
import numpy as np

from mezo_jax import models, peft
from mezo_jax.core import sharding
from mezo_jax.core.errors import InputError
from mezo_jax.core.reports import markdown_table
from mezo_jax.planning import compiled, machines, standins
from mezo_jax.tasks import evaluate
from mezo_jax.training import (
  build,
  checks,
  frozen_features,
  methods,
  population,
)
from mezo_jax.training import config as config_lib
from mezo_jax.transforms import losses
from mezo_jax.transforms.step import make_step

GIB = 2**30  # bytes


@dataclasses.dataclass(frozen=True)
class Plan:
  """Holds the predicted cost of a run; see `plan`.

  Attributes:
    config: Config of the run, with the mesh that was planned.
    topology: The devices, such as 'v5e:4x4'.
    model: Config of the model.
    tokens: Number of tokens per row of a training batch.
    resident: Size per device of the 'weights' and of the optimizer's 'state',
      in bytes.
    on_host: Size of the weights in the host's memory, in bytes per device.
    programs: The compiled programs by name. 'inference' is a forward pass of a
      training batch. A step of MeZO consists of 'losses' and 'update' and, if
      updates accumulate, 'apply'; a step of backpropagation is 'step'.
      'evaluation' evaluates a batch of dev rows, and 'anchor' the batch of an
      SVRG anchor.
    at_once: Number of members of a population that answer in one pass. None for
      all, or if the objective is not 'reward'.
  """

  config: config_lib.Train
  topology: str
  model: models.Config
  tokens: int
  resident: dict[str, int]
  on_host: int
  programs: dict[str, compiled.Program]
  at_once: int | None = None

  @property
  def limit(self) -> float:
    """Returns the memory of a device, in bytes."""
    return machines.split(self.topology)[0].memory * GIB

  def peak(self, *names: str) -> float:
    """Returns the peak memory per device of some programs, in bytes.

    Weights and optimizer state that a program does not use are included, since
    they stay in memory.

    Args:
      *names: Names of programs. Without any, all programs count.

    Returns:
      The peak, or inf if a compiler refused a program without reporting its
      memory.
    """
    every = sum(self.resident.values())
    def of(name, p):
      """Returns the peak memory while one program runs."""
      if p.memory is None:
        return math.inf
      if not p.fits or name in _ALONE:
        return p.memory
      return p.memory + max(every - p.weights, 0)
    return max((of(name, p) for name, p in self.programs.items()
                if not names or name in names), default=0.0)

  @property
  def fits(self) -> bool:
    """Returns whether all programs fit into the memory of a device."""
    return self.peak() < self.limit and all(
        p.fits for p in self.programs.values())

  @property
  def cycles(self) -> float:
    """Returns the cycles of a step; NaN if the compiler estimates none."""
    every = self.config.spsa.apply_every
    share = {'losses': 1, 'step': 1, 'update': 1, 'apply': 1 / every}
    return sum(p.cycles * share[name] for name, p in self.programs.items()
               if name in share)

  @property
  def sent(self) -> float:
    """Returns the size of the results of a step's collectives, in bytes."""
    return sum(size for name, p in self.programs.items()
               if name in ('losses', 'step', 'update')
               for _, size in p.collectives.values())


# Programs that are compiled only for comparison. Their peak memory does not
# include the optimizer's state.
_ALONE = ('inference',)


# --- planning ---------------------------------------------------------------


def plan(config: config_lib.Train, topology: str, *,
         sizes: dict[str, int] | None = None, tokens: int | None = None,
         wanted: Callable[[str], bool] = lambda name: True,
         model_config: models.Config | None = None) -> Plan:
  """Compiles a config's programs for TPUs or GPUs that are not available.

  Args:
    config: Config of the run. If it has several tasks, the first is planned.
    topology: The devices; see `mezo_jax.planning.machines`.
    sizes: Sizes of the mesh axes, by name. Defaults to None, for the mesh of
      the config, or `good_mesh` if the config has the default mesh.
    tokens: Number of tokens per row. Defaults to None, for the longest rows
      that the config allows.
    wanted: Function of a program's name that returns whether to compile it.
      Defaults to all programs.
    model_config: Config of the model. Defaults to None, for the one that the
      name of the model determines.

  Returns:
    The plan, with the programs that were wanted.

  Raises:
    InputError: If the config, the topology or the mesh is invalid, or if they
      do not fit together.
  """
  config = dataclasses.replace(config, also=())
  checks.check_config(config)
  if model_config is None:
    model_config = models.find_known(str(config.model.name)) or (
        build.read_config(config))
  if config.model.offload and machines.is_card(topology):
    raise InputError(
        'model.offload cannot be planned for GPUs, since their compiler does '
        'not support host memory without a device; choose a TPU topology.')
  devices = machines.devices(topology)
  if sizes is None:
    sizes = dataclasses.asdict(config.mesh)
    if config.mesh == config_lib.Mesh():
      sizes = good_mesh(config, model_config, topology)
  config = dataclasses.replace(config, mesh=config_lib.Mesh(
      **{'fsdp': 1} | sizes))
  mesh = build.make_mesh(config, devices)
  config = dataclasses.replace(config, mesh=config_lib.Mesh(**mesh.shape))
  if tokens is None:
    longest = config.data.max_length
    tokens = max((n for n in config.data.buckets if n <= longest),
                 default=longest)
  tokens = min(tokens, model_config.max_length)
  resident, on_host, at_once, programs = trace(
      config, mesh, model_config, tokens,
      machines.split(topology)[0].memory * GIB)
  found = {}
  for name, (traced, mesh) in programs.items():
    if wanted(name):
      with jax.set_mesh(mesh):
        found[name] = compiled.read(
            traced.lower(), traced.jaxpr, mesh.size)
  return Plan(config, topology, model_config, tokens, resident, on_host, found,
              at_once)


def trace(config: config_lib.Train, mesh: Any, model_config: models.Config,
          tokens: int, memory: float = math.inf
          ) -> tuple[dict[str, int], int, int | None,
                     dict[str, tuple[Any, ...]]]:
  """Traces the programs of a run from shapes.

  Args:
    config: Config of the run.
    mesh: The mesh. Its devices may be descriptions; see
      `mezo_jax.planning.machines.devices`.
    model_config: Config of the model.
    tokens: Number of tokens per row of a training batch.
    memory: Memory of a device, in bytes. Defaults to infinity.

  Returns:
    ``resident, on_host, at_once, {name: (traced program, its mesh)}``; see
    `Plan`.
  """
  if config_lib.is_auto(config):  # memory does not depend on it
    config = config_lib.with_learning_rate(config, 1.0)
  tokenizer = standins.tokenizer(config.task)
  built = build.build(
      config, abstract=True, model_config=model_config, tokenizer=tokenizer,
      rows=standins.rows(config), mesh=mesh, say=_silent)
  built = frozen_features.keep(config, built, '', _silent)
  params, frozen, splits = built.params, built.frozen, built.splits
  budget = build.privacy_plan(config, splits, mesh)
  # A private run samples batches of varying size and pads them to a capacity.
  rows = budget.capacity if budget else config.data.batch_size
  batch_of = lambda rows: build.batch_shapes(splits.train, tokens, rows, mesh)
  programs, everywhere, at_once = {}, sharding.replicated(mesh), None

  rewarded = config_lib.is_rewarded(config)
  def forward(params, frozen, batch):
    """Returns the mean loss of a batch, or its rollouts."""
    assert built.loss_fn is not None
    whole = peft.join(params, frozen)
    if rewarded:
      return built.loss_fn(whole, batch, 0)
    return losses.mean(built.loss_fn(whole, batch))
  def add(name, fn, *args, mesh=mesh):
    """Traces a function and adds it to the programs."""
    with jax.set_mesh(mesh):
      programs[name] = jax.jit(
          fn, out_shardings=sharding.replicated(mesh)).trace(*args), mesh
  if built.tx is not None:
    batch, more = batch_of(rows), {}
    if budget:
      more['noise_key'] = jax.ShapeDtypeStruct(
          (), jax.random.key(0).dtype, sharding=everywhere)
    add('inference', forward, params, frozen, batch)
    if rewarded:
      held = _bytes((params, frozen, built.opt_state))
      at_once = population.at_once(
          config, model_config, tokens, mesh, memory - held)
    step = make_step(
        built.tx, built.loss_fn, mesh=mesh, at_once=at_once,
        build=config.reward.build,
        reward=(lambda outputs, batch: 0) if rewarded else None)
    traced = step.trace(params, built.opt_state, batch, frozen, **more)
    names = ('losses', 'update', 'apply') if len(traced) > 1 else ('step',)
    programs |= {name: (x, mesh) for name, x in zip(names, traced)}
    if methods.anchor_every(config):
      many = rows * methods.anchor_batches(config, len(splits.train.prompts))
      programs['anchor'] = step.trace(
          params, built.opt_state, batch_of(many), frozen)[0], mesh

  # The same mesh and batch size as in `evaluate.each_batch`.
  alone = sharding.without_directions(mesh)
  groups = sharding.row_groups(alone)
  rows = evaluate.rows_of_batch(
      build.eval_sizes(config, splits)['dev'], tokens,
      len(splits.dev.prompts), groups)
  answers = evaluate.answers(
      built.model, config.task, splits.dev, tokenizer)
  add('evaluation', lambda params, frozen, batch: answers(
      peft.join(params, frozen), batch), params, frozen,
      build.batch_shapes(splits.dev, tokens, rows, alone), mesh=alone)
  weights = params, frozen
  # With `reward.kl`, a run keeps a copy of the parameters before training.
  start = params if rewarded and config.reward.kl else {}
  return (dict(weights=_bytes(weights),
               state=_bytes((built.opt_state, start))),
          _bytes(weights, on_host=True), at_once, programs)


def _bytes(tree, on_host: bool = False) -> int:
  """Returns the size of a tree's arrays per device, in bytes.

  Args:
    tree: A tree of shapes with shardings.
    on_host: Whether to count arrays in the host's memory instead of those in
      the device's. Defaults to False.
  """
  return sum(int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize
             for x in jax.tree.leaves(tree)
             if sharding.is_on_host(x) == on_host)


def _silent(text: str) -> None:
  """Reports nothing."""
  del text


def good_mesh(config: config_lib.Train, model: models.Config, topology: str
              ) -> dict[str, int]:
  """Chooses the sizes of a mesh that shards all large arrays.

  * The product of `tensor` and `fsdp` is the number of shards of the weights.
    A larger `fsdp` means that more weights are all-gathered, and a larger
    `tensor` that more activations are all-reduced. Both sizes should therefore
    be about equal.
  * For GPUs, `tensor` should be the number of GPUs of a host instead. Their
    compiler copies all stacked layers before it all-gathers one of them.
  * `tensor` should divide the numbers of heads, and `fsdp` must divide the
    number of rows of a batch.
  * The remaining devices hold copies of the weights. They share the directions
    and signs of a step (`direction`) if the method allows it, and otherwise
    the rows (`data`).

  Args:
    config: Config of the run.
    model: Config of the model.
    topology: The devices; see `mezo_jax.planning.machines`.

  Returns:
    The size of each mesh axis, by name.
  """
  n = machines.size(topology)
  wanted = min(n, machines.CARDS) if machines.is_card(topology) else n**0.5
  rows, best = config.data.batch_size, None
  points = config.spsa.num_samples * 2
  steps = not methods.method_of(config).backprop and config.spsa.over != 'rows'
  for tensor in (t for t in range(1, n + 1) if n % t == 0):
    fsdp = math.gcd(rows, n // tensor)
    rest = n // tensor // fsdp
    direction = math.gcd(rest, points) if steps else 1
    data = rest // direction
    # A penalty for `tensor`: 1 (True) if it divides the key and value heads, 2
    # if only the query heads, 4 if neither.
    fits = model.num_kv_heads % tensor == 0 or (
        2 if model.num_heads % tensor == 0 else 4)
    # The criteria in order of importance: the rows can be split evenly, there
    # are few copies of the weights, and `tensor` is close to the wanted size.
    cost = (rows % (data * fsdp) != 0, rest * fits,
            abs(math.log(tensor / wanted)))
    if best is None or cost < best[0]:
      best = cost, dict(
          data=data, fsdp=fsdp, tensor=tensor, direction=direction)
  assert best is not None  # tensor = 1 is always tried
  return best[1]


# --- reporting --------------------------------------------------------------


def spell_mesh(sizes: dict[str, int]) -> str:
  """Formats the sizes of a mesh, such as 'fsdp=4,tensor=2'."""
  return ','.join(f'{name}={sizes[name]}' for name in sharding.AXES
                  if sizes.get(name, 1) > 1) or 'data=1'


def spell(found: Plan) -> str:
  """Formats a plan as a table and some sentences.

  Args:
    found: The plan.
  """
  c, kind = found.config, machines.split(found.topology)[0]
  n, limit = machines.size(found.topology), found.limit / GIB
  weights, state = (found.resident[k] / GIB for k in ('weights', 'state'))
  of = 'of unknown memory' if math.isinf(limit) else f'of {limit:g} GiB'
  rows = [_row(name, found, p) for name, p in found.programs.items()]
  total = sum(math.prod(x.shape) for x in jax.tree.leaves(
      models.param_shapes(found.model)))
  lines = [
      f'{c.model.name}: {total:,} parameters in '
      f'{c.model.dtype}; method {c.method}; batches of {c.data.batch_size} '
      f'rows of {found.tokens} tokens',
      f'{found.topology}: {n} device(s) {of}; mesh '
      f'{spell_mesh(dataclasses.asdict(c.mesh))}',
      '', markdown_table(rows), '',
      f'Memory per device: {weights:.2f} GiB of weights, {state:.2f} GiB of '
      f'optimizer state, {gib(found.peak())} GiB at the peak.']
  if found.on_host:
    lines.append(
        f'{gib(found.on_host)} GiB of layers per device are in the memory of '
        'the host; the time to transfer them is not included.')
  if found.at_once:
    lines.append(f'{found.at_once} members of the population answer at a time.')
  if 'inference' in found.programs and found.programs['inference'].memory:
    lines.append(f'A step needs {_ratio(found)} times the memory of inference.')
  if not math.isnan(found.cycles) and not math.isnan(kind.clock):
    seconds = found.cycles / kind.clock / 1e9
    sent = found.sent / kind.links / 1e9
    lines.append(
        'The compiler estimates that a step takes '
        f'{found.cycles / 1e6:.0f} million cycles ({seconds:.3g} s at '
        f'{kind.clock} GHz), without communication between chips '
        f'({found.sent / GIB:.3g} GiB, at least {sent:.2g} s). '
        f'{c.steps:,} steps take at least '
        f'{c.steps * max(seconds, sent) / 3600:.3g} h, without evaluations.')
  return '\n'.join(lines)


def _row(name: str, found: Plan, p: compiled.Program) -> dict[str, Any]:
  """Returns the row of the table for one program."""
  big = p.memory is None
  return {
      'program': name,
      'peak, GiB': gib(found.peak(name)),
      'temporaries, GiB': '' if big or not p.fits else gib(p.temporaries),
      'collectives': ', '.join(
          f'{n} {kind} ({size / 2**20:.3g} MiB)'
          for kind, (n, size) in p.collectives.items()) or '-',
      'Tflop': '' if math.isnan(p.flops) else f'{p.flops / 1e12:.3g}',
      'Mcycles': '' if math.isnan(p.cycles) else f'{p.cycles / 1e6:.0f}',
      's to compile': f'{p.seconds:.0f}'}


def gib(size: float) -> str:
  """Formats a size in bytes as GiB; inf as 'far too many'."""
  return 'far too many' if math.isinf(size) else f'{size / GIB:.2f}'


def _ratio(found: Plan) -> str:
  """Formats the peak memory of a step, relative to that of inference."""
  peak = found.peak('losses', 'update', 'apply', 'step', 'anchor')
  return '?' if math.isinf(peak) else f'{peak / found.peak("inference"):.3f}'
