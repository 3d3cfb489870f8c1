"""What a run will hold and take on devices that are not there.

`plan` compiles the programs of a config, as `mezo_jax.build` makes them, from
shapes: of the step, of a forward pass to compare with, and of evaluation. No
weights, no data and no device are needed. Texts and tokens are stand-ins, so
what counts of them is rows and length; answers that are laid out beside a
prompt are short.
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import dataclasses
import math
import re
from typing import Any, NamedTuple

from absl import flags
import jax
from ml_collections import config_flags
import numpy as np

from mezo_jax import (
  _values,
  build,
  checks,
  compiled,
  evaluate,
  machines,
  methods,
  models,
  peft,
  sharding,
  standins,
  trunk,
)
from mezo_jax import config as config_lib
from mezo_jax.errors import InputError
from mezo_jax.loggers import markdown_table
from mezo_jax.step import make_step

GIB = 2**30
DOES_NOT_FIT = 3  # an exit status


@dataclasses.dataclass(frozen=True)
class Plan:
  """Of one device, what the programs of a run hold; see `plan`.

  Attributes:
    config: of the run, with the mesh that was planned.
    topology: such as 'v5e:4x4'.
    model: its shapes.
    tokens: of a row of a training batch.
    resident: bytes of weights and of the optimizer's state, a device.
    programs: by name: 'inference' is a forward pass of the training batch;
      'losses', 'update' and, where updates are pending, 'flush' are a step, or
      'step' of backpropagation; 'evaluation'; 'anchor' losses of SVRG's.
  """

  config: config_lib.Train
  topology: str
  model: models.Config
  tokens: int
  resident: dict[str, int]
  programs: dict[str, compiled.Program]

  @property
  def limit(self) -> float:
    """Bytes that a device has."""
    return machines.split(self.topology)[0].memory * GIB

  def peak(self, *names: str) -> float:
    """Bytes at the peak of these programs, or of all; inf where a compiler did
    not say how many too many."""
    every = sum(self.resident.values())
    return max((math.inf if p.memory is None
                else p.memory + max(every - p.weights, 0) * (name not in _ALONE)
                for name, p in self.programs.items()
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
    topology: see `mezo_jax.machines`.
    sizes: of the mesh's axes; None for the config's, and where that says
      nothing for `good_mesh`.
    tokens: of a row; None for the longest that the config lets through.
    wanted: which programs, by name; all by default.
    model_config: of the model, instead of what its name says.

  Raises:
    InputError: for a config, a topology or a mesh that cannot work.
  """
  config = dataclasses.replace(config, also=())
  checks.check(config)
  if model_config is None:
    model_config = models.find_known(str(config.model.name)) or (
        build.read_config(config))
  devices = machines.devices(topology)
  if sizes is None:
    sizes = dataclasses.asdict(config.mesh)
    if config.mesh == config_lib.Mesh():
      sizes = good_mesh(config, model_config, topology)
  config = dataclasses.replace(config, mesh=config_lib.Mesh(
      **{'fsdp': 1} | sizes))
  mesh = build.make_mesh(config, devices)
  if tokens is None:
    longest = config.data.max_length
    tokens = max((n for n in config.data.buckets if n <= longest),
                 default=longest)
  tokens = min(tokens, model_config.max_length)
  resident, programs = trace(config, mesh, model_config, tokens)
  found = {}
  for name, (traced, mesh) in programs.items():
    if wanted(name):
      with jax.set_mesh(mesh):
        found[name] = compiled.read(
            traced.lower(), traced.jaxpr, mesh.size)
  return Plan(config, topology, model_config, tokens, resident, found)


def trace(config: config_lib.Train, mesh, model_config: models.Config,
          tokens: int) -> tuple[dict[str, int], dict[str, tuple]]:
  """``resident, {name: (program, its mesh)}``; see `Plan`."""
  tokenizer = standins.tokenizer(config.task)
  built = build.build(
      config, abstract=True, model_config=model_config, tokenizer=tokenizer,
      rows=standins.rows(config), mesh=mesh, say=_silent)
  built = trunk.keep(config, built, '', _silent)
  params, frozen, splits = built.params, built.frozen, built.splits
  rows, groups = config.data.batch_size, sharding.row_groups(mesh)
  budget = build.privacy_plan(config, splits, mesh)
  rows = budget.capacity if budget else rows
  batch_of = lambda rows: build.batch_shapes(splits.train, tokens, rows, mesh)
  programs, everywhere = {}, sharding.replicated(mesh)

  def forward(params, frozen, batch):
    return _values.mean(built.loss_fn(peft.join(params, frozen), batch))
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
      evaluate.sizes_of(config, splits)['dev'], tokens,
      len(splits.dev.prompts), groups)
  answers = evaluate.answers(
      built.model, config.task, splits.dev, tokenizer)
  add('evaluation', lambda params, frozen, batch: answers(
      peft.join(params, frozen), batch), params, frozen,
      build.batch_shapes(splits.dev, tokens, rows, alone), mesh=alone)
  return dict(weights=_bytes((params, frozen)),
              state=_bytes(built.opt_state)), programs


def _bytes(tree) -> int:
  """Of one device; what is in the host's memory is not."""
  return sum(int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize
             for x in jax.tree.leaves(tree) if not sharding.is_on_host(x))


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
  return best[1]


# --- what would fit ---------------------------------------------------------


class Change(NamedTuple):
  """A way to need less."""

  words: str
  topology: str
  sizes: dict[str, int]
  config: config_lib.Train


def changes(found: Plan) -> Iterator[Change]:
  """What may make a plan fit that does not: from what costs nothing, another
  mesh, to what costs money, more devices."""
  config, sizes = found.config, dataclasses.asdict(found.config.mesh)
  name, n = found.topology, machines.size(found.topology)
  at = lambda words, **fields: Change(
      words, name, sizes, dataclasses.replace(config, **fields))
  for tensor in (t for t in range(1, n + 1) if n % t == 0):
    other = dict(direction=1, data=1, fsdp=n // tensor, tensor=tensor)
    if other != sizes and config.data.batch_size % other['fsdp'] == 0:
      yield Change(f'the mesh {spell_mesh(other)}', name, other, config)
  if methods.method_of(config).backprop:
    if not config.model.remat:
      yield at('model.remat=True', model=dataclasses.replace(
          config.model, remat=True))
    yield at("method='mezo'", method='mezo')
  elif config.spsa.over == 'batch':
    yield at("spsa.over='scan'", spsa=dataclasses.replace(
        config.spsa, over='scan'))
  if found.peak('evaluation') >= found.peak():
    for rows in _halves(config.eval_batch_size):
      yield at(f'eval_batch_size={rows}', eval_batch_size=rows)
  else:
    groups = sizes['data'] * sizes['fsdp']
    for parts in range(2, config.data.batch_size // groups + 1):
      if config.data.batch_size % (parts * groups) == 0:
        yield at(f'optimizer.micro_batches={parts}',
                 optimizer=dataclasses.replace(
                     config.optimizer, micro_batches=parts))
    for rows in _halves(config.data.batch_size):
      if rows % groups == 0:
        yield at(f'data.batch_size={rows}', data=dataclasses.replace(
            config.data, batch_size=rows))
  for other in machines.larger(name):
    mesh = good_mesh(config, found.model, other)
    yield Change(f'{other}, with the mesh {spell_mesh(mesh)}', other, mesh,
                 config)


def _halves(n: int) -> Iterator[int]:
  while n > 1:
    n //= 2
    yield n


def what_fits(found: Plan, say: Callable[[str], None] = print
              ) -> tuple[Change, Plan] | None:
  """The first of `changes` that fits, and its plan."""
  def may(change):
    """Whether the weights alone leave room; that costs no compilation."""
    share = math.prod(change.sizes[a] for a in ('fsdp', 'tensor'))
    before = math.prod(getattr(found.config.mesh, a) for a in (
        'fsdp', 'tensor'))
    same = change.config.method == found.config.method
    resident = found.resident['weights'] + same * found.resident['state']
    return resident * before / share < found.limit
  for change in filter(may, changes(found)):
    say(f'trying {change.words}')
    try:
      other = plan(change.config, change.topology, sizes=change.sizes,
                   tokens=found.tokens, model_config=found.model)
    except InputError:  # batch and mesh, say, do not divide
      continue
    if other.fits:
      return change, other
  return None


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
      f"optimizer's state; at the peak {_gib(found.peak())} GiB."]
  if 'inference' in found.programs and found.programs['inference'].memory:
    lines.append(f'A step holds {_ratio(found)} times what inference holds.')
  if not math.isnan(found.cycles) and kind.clock == kind.clock:
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
      'peak, GiB': _gib(found.peak(name)),
      'temporaries, GiB': '' if big or not p.fits else _gib(p.temporaries),
      'collectives': ', '.join(
          f'{n} {kind} ({size / 2**20:.3g} MiB)'
          for kind, (n, size) in p.collectives.items()) or '-',
      'Tflop': '' if math.isnan(p.flops) else f'{p.flops / 1e12:.3g}',
      'Mcycles': '' if math.isnan(p.cycles) else f'{p.cycles / 1e6:.0f}',
      's to compile': f'{p.seconds:.0f}'}


def _gib(size: float) -> str:
  return 'far too many' if math.isinf(size) else f'{size / GIB:.2f}'


def _ratio(found: Plan) -> str:
  peak = found.peak('losses', 'update', 'flush', 'step', 'anchor')
  return '?' if math.isinf(peak) else f'{peak / found.peak("inference"):.3f}'


# --- command line -----------------------------------------------------------


def main(file: str, topology: str, mesh: str | None, tokens: int | None,
         more: Sequence[str] = ()) -> int:
  """Prints a plan and, where it does not fit, the first change that would.

  Returns:
    The exit status: 0 if it fits, else `DOES_NOT_FIT`.
  """
  n = machines.size(topology)
  jax.config.update('jax_platforms', 'cpu')  # a device here is not asked
  if topology.startswith('cpu'):
    with contextlib.suppress(RuntimeError):  # devices are counted already
      jax.config.update('jax_num_cpu_devices', n)
  config = read_config(file, more)
  found = plan(config, topology, sizes=read_mesh(mesh, n) if mesh else None,
               tokens=tokens)
  print(spell(found))
  if found.fits:
    print('It fits.')
    return 0
  print(f'It does not fit into {found.limit / GIB:g} GiB.')
  other = what_fits(found)
  if other is None:
    print('Nothing that was tried fits.')
  else:
    change, found = other
    print(f'What fits: {change.words} ({_gib(found.peak())} of '
          f'{found.limit / GIB:g} GiB a device).')
  return DOES_NOT_FIT


def read_config(file: str, more: Sequence[str] = ()) -> config_lib.Train:
  """A config's file as train.py takes it, with ``--config.FIELD=VALUE``."""
  values = flags.FlagValues()
  argv = ['plan', f'--config={file}', *more]
  config_flags.DEFINE_config_file(
      'config', None, '', flag_values=values, sys_argv=argv)
  try:
    values(argv)
    return values.config
  except (KeyError, OSError, TypeError, flags.Error) as e:
    what = ' '.join(str(e.args[-1]).split())
    raise InputError(f'{what}. The fields of a config and their types are in '
                     'mezo_jax/config.py.') from e


def read_mesh(text: str, n: int) -> dict[str, int]:
  """'fsdp=4,tensor=2' over n devices; the first axis may be -1, the rest."""
  sizes = dict(data=1, fsdp=1, tensor=1, direction=1)
  for part in text.split(','):
    name, _, value = part.partition('=')
    if name not in sizes or not re.fullmatch(r'-1|[1-9]\d*', value):
      raise InputError(
          f'--mesh={text!r}: {part!r} is no axis and size, such as fsdp=4; the '
          f'axes are {", ".join(sizes)}.')
    sizes[name] = int(value)
  if math.prod(sizes.values()) != n and -1 not in sizes.values():
    raise InputError(f'--mesh={text}: the product is not the number of devices '
                     f'of the topology, {n}.')
  return sizes
