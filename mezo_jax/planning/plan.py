"""What a run will hold and take on devices that are not there.

`plan` compiles the programs of a config, as `mezo_jax.training.build` makes
them, from shapes: of the step, of a forward pass to compare with, and of
evaluation. No weights, no data and no device are needed. Texts and tokens are
stand-ins, so what counts of them is rows and length; answers that are laid out
beside a prompt are short.
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
from mezo_jax.training import build, checks, frozen_features, methods
from mezo_jax.training import config as config_lib
from mezo_jax.transforms import losses
from mezo_jax.transforms.step import make_step

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Plan:
  """Of one device, what the programs of a run hold; see `plan`.

  Attributes:
    config: of the run, with the mesh that was planned.
    topology: such as 'v5e:4x4'.
    model: its shapes.
    tokens: of a row of a training batch.
    resident: bytes of weights and of the optimizer's state, a device.
    on_host: bytes of weights that are in the host's memory for a device.
    programs: by name: 'inference' is a forward pass of the training batch;
      'losses', 'update' and, where updates are pending, 'flush' are a step, or
      'step' of backpropagation; 'evaluation'; 'anchor' losses of SVRG's.
  """

  config: config_lib.Train
  topology: str
  model: models.Config
  tokens: int
  resident: dict[str, int]
  on_host: int
  programs: dict[str, compiled.Program]

  @property
  def limit(self) -> float:
    """Bytes that a device has."""
    return machines.split(self.topology)[0].memory * GIB

  def peak(self, *names: str) -> float:
    """Bytes at the peak of these programs, or of all; inf where a compiler did
    not say how many too many."""
    every = sum(self.resident.values())
    def of(name, p):
      if p.memory is None:
        return math.inf
      if not p.fits or name in _ALONE:
        return p.memory
      return p.memory + max(every - p.weights, 0)
    return max((of(name, p) for name, p in self.programs.items()
                if not names or name in names), default=0.0)

  @property
  def fits(self) -> bool:
    return self.peak() < self.limit and all(
        p.fits for p in self.programs.values())

  @property
  def cycles(self) -> float:
    """Of a step; NaN where the compiler does not estimate them."""
    every = self.config.spsa.fold_every
    share = {'losses': 1, 'step': 1, 'update': 1, 'flush': 1 / every}
    return sum(p.cycles * share[name] for name, p in self.programs.items()
               if name in share)

  @property
  def sent(self) -> float:
    """Bytes that the collectives of a step make."""
    return sum(size for name, p in self.programs.items()
               if name in ('losses', 'step', 'update')
               for _, size in p.collectives.values())


_ALONE = ('inference',)  # what is compared with has no optimizer's state


# --- to plan ----------------------------------------------------------------


def plan(config: config_lib.Train, topology: str, *,
         sizes: dict[str, int] | None = None, tokens: int | None = None,
         wanted: Callable[[str], bool] = lambda name: True,
         model_config: models.Config | None = None) -> Plan:
  """Compiles a config's programs for a described slice or cards.

  Args:
    config: of the run. Of several tasks, the first.
    topology: see `mezo_jax.planning.machines`.
    sizes: of the mesh's axes; None for the config's, and where that says
      nothing for `good_mesh`.
    tokens: of a row; None for the longest that the config lets through.
    wanted: which programs, by name; all by default.
    model_config: of the model, instead of what its name says.

  Raises:
    InputError: for a config, a topology or a mesh that cannot work.
  """
  config = dataclasses.replace(config, also=())
  checks.check_config(config)
  if model_config is None:
    model_config = models.find_known(str(config.model.name)) or (
        build.read_config(config))
  if config.model.offload and machines.is_card(topology):
    raise InputError(
        'model.offload cannot be planned for cards that are not there: their '
        "compiler then knows no memory of the host. A TPU's does.")
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
  resident, on_host, programs = trace(config, mesh, model_config, tokens)
  found = {}
  for name, (traced, mesh) in programs.items():
    if wanted(name):
      with jax.set_mesh(mesh):
        found[name] = compiled.read(
            traced.lower(), traced.jaxpr, mesh.size)
  return Plan(config, topology, model_config, tokens, resident, on_host, found)


def trace(config: config_lib.Train, mesh: Any, model_config: models.Config,
          tokens: int
          ) -> tuple[dict[str, int], int, dict[str, tuple[Any, ...]]]:
  """``resident, on_host, {name: (program, its mesh)}``; see `Plan`."""
  tokenizer = standins.tokenizer(config.task)
  built = build.build(
      config, abstract=True, model_config=model_config, tokenizer=tokenizer,
      rows=standins.rows(config), mesh=mesh, say=_silent)
  built = frozen_features.keep(config, built, '', _silent)
  params, frozen, splits = built.params, built.frozen, built.splits
  budget = build.privacy_plan(config, splits, mesh)
  rows = budget.capacity if budget else config.data.batch_size
  batch_of = lambda rows: build.batch_shapes(splits.train, tokens, rows, mesh)
  programs, everywhere = {}, sharding.replicated(mesh)

  def forward(params, frozen, batch):
    assert built.loss_fn is not None
    return losses.mean(built.loss_fn(peft.join(params, frozen), batch))
  def add(name, fn, *args, mesh=mesh):
    with jax.set_mesh(mesh):
      programs[name] = jax.jit(
          fn, out_shardings=sharding.replicated(mesh)).trace(*args), mesh
  if built.tx is not None:
    batch, more = batch_of(rows), {}
    if budget:
      more['noise_key'] = jax.ShapeDtypeStruct(
          (), jax.random.key(0).dtype, sharding=everywhere)
    add('inference', forward, params, frozen, batch)
    step = make_step(built.tx, built.loss_fn, mesh=mesh)
    traced = step.trace(params, built.opt_state, batch, frozen, **more)
    names = ('losses', 'update', 'flush') if len(traced) > 1 else ('step',)
    programs |= {name: (x, mesh) for name, x in zip(names, traced)}
    if methods.anchor_every(config):
      many = rows * methods.anchor_batches(config, len(splits.train.prompts))
      programs['anchor'] = step.trace(
          params, built.opt_state, batch_of(many), frozen)[0], mesh

  # As `evaluate.each_batch` does it.
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
  return (dict(weights=_bytes(weights), state=_bytes(built.opt_state)),
          _bytes(weights, on_host=True), programs)


def _bytes(tree, on_host: bool = False) -> int:
  """Of one device, or of the host for it."""
  return sum(int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize
             for x in jax.tree.leaves(tree)
             if sharding.is_on_host(x) == on_host)


def _silent(text: str) -> None:
  del text


def good_mesh(config: config_lib.Train, model: models.Config, topology: str
              ) -> dict[str, int]:
  """Sizes of a mesh of a topology on which all that is large is split.

  Weights that are split over `tensor` need not be gathered, and activations
  that are split over `fsdp` need not be added up, so both are about as large;
  of cards, whose compiler copies a stack of layers that it gathers from,
  `tensor` is as many as a host has. It divides the heads, `fsdp` the rows. What
  is left shares out directions and signs, or else copies rows.
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
    fits = model.num_kv_heads % tensor == 0 or (
        2 if model.num_heads % tensor == 0 else 4)
    cost = (rows % (data * fsdp) != 0, rest * fits,
            abs(math.log(tensor / wanted)))
    if best is None or cost < best[0]:
      best = cost, dict(
          data=data, fsdp=fsdp, tensor=tensor, direction=direction)
  assert best is not None  # one device is a mesh
  return best[1]


# --- to read ----------------------------------------------------------------


def spell_mesh(sizes: dict[str, int]) -> str:
  return ','.join(f'{name}={sizes[name]}' for name in sharding.AXES
                  if sizes.get(name, 1) > 1) or 'data=1'


def spell(found: Plan) -> str:
  """A table and some sentences."""
  c, kind = found.config, machines.split(found.topology)[0]
  n, limit = machines.size(found.topology), found.limit / GIB
  weights, state = (found.resident[k] / GIB for k in ('weights', 'state'))
  of = 'of no stated memory' if math.isinf(limit) else f'of {limit:g} GiB'
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
      f'Of one device: {weights:.2f} GiB of weights, {state:.2f} of the '
      f"optimizer's state; at the peak {gib(found.peak())} GiB."]
  if found.on_host:
    lines.append(
        f'{gib(found.on_host)} GiB of layers are in the memory of the host '
        'for each device; the time that they take to it and back is not '
        'counted.')
  if 'inference' in found.programs and found.programs['inference'].memory:
    lines.append(f'A step holds {_ratio(found)} times what inference holds.')
  if not math.isnan(found.cycles) and not math.isnan(kind.clock):
    seconds = found.cycles / kind.clock / 1e9
    sent = found.sent / kind.links / 1e9
    lines.append(
        f'By the compiler a step takes {found.cycles / 1e6:.0f} million cycles,'
        f' {seconds:.3g} s at {kind.clock} GHz, without what chips send each '
        f'other ({found.sent / GIB:.3g} GiB, at least {sent:.2g} s); '
        f'{c.steps:,} steps {c.steps * max(seconds, sent) / 3600:.3g} h, '
        'without evaluations.')
  return '\n'.join(lines)


def _row(name: str, found: Plan, p: compiled.Program) -> dict[str, Any]:
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
  return 'far too many' if math.isinf(size) else f'{size / GIB:.2f}'


def _ratio(found: Plan) -> str:
  peak = found.peak('losses', 'update', 'flush', 'step', 'anchor')
  return '?' if math.isinf(peak) else f'{peak / found.peak("inference"):.3f}'
