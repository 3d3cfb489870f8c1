"""What a compiler says of a program: memory, cycles, collectives; and what its
jaxpr says: floating-point operations."""

from collections.abc import Iterator
import dataclasses
import glob
import math
from pathlib import Path
import re
import tempfile
import time
from typing import Any

import jax
import numpy as np

_COLLECTIVE = re.compile(
    r' = (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|'
    r'collective-permute|collective-broadcast)(?:-start)?\(')
_BITS = re.compile(r'(\d+)')


@dataclasses.dataclass(frozen=True)
class Program:
  """Of one device, a run of a program."""

  memory: float | None  # bytes held at the peak; None if too many to say
  fits: bool = True  # whether the compiler took it
  weights: int = 0  # bytes of arguments
  kept: int = 0  # bytes of them that results take the place of
  flops: float = math.nan  # of matrix products, an equal part of all devices'
  cycles: float = math.nan  # the TPU compiler's estimate, without collectives
  # By kind: how many, and the bytes that they make, loops counted.
  collectives: dict[str, tuple[int, float]] = dataclasses.field(
      default_factory=dict)
  seconds: float = 0.0  # of compiling

  @property
  def temporaries(self) -> float:
    assert self.memory is not None  # asked for where it is known
    return self.memory - self.weights


def read(lowered: jax.stages.Lowered, jaxpr: Any = None, devices: int = 1
         ) -> Program:
  """Compiles, and reads what was found.

  A TPU's compiler refuses a program that is too large, and says by how much
  unless it is much too large; a GPU's compiles it.

  Args:
    lowered: the program.
    jaxpr: the same, for its operations.
    devices: that it runs on.
  """
  began = time.time()
  with tempfile.TemporaryDirectory() as dump:
    try:
      compiled = lowered.compile({'xla_dump_to': dump})
    except jax.errors.JaxRuntimeError as e:
      if 'RESOURCE_EXHAUSTED' not in str(e):
        raise
      found = re.search(r'Used ([\d.]+)G of|([\d.]+)G\) exceeds', str(e))
      needs = float(next(x for x in found.groups() if x)) if found else None
      return Program(needs and needs * 2**30, fits=False,
                     seconds=time.time() - began)
    # `memory_analysis` counts a TPU's fragmentation twice.
    reports = glob.glob(f'{dump}/*memory-usage-report.txt')
    total = re.search(r'Total bytes: (\d+)', Path(reports[0]).read_text()) if (
        reports) else None
  m, text = compiled.memory_analysis(), compiled.as_text()
  assert m is not None and text is not None  # each of our compilers has them
  peak, count = held(m), math.nan
  if total is not None and '"estimated_cycles"' in text:  # a TPU's
    peak, count = int(total[1]), cycles(text)
  return Program(
      peak, weights=m.argument_size_in_bytes, kept=m.alias_size_in_bytes,
      cycles=count, flops=math.nan if jaxpr is None else flops(jaxpr) / devices,
      collectives=collectives(text), seconds=time.time() - began)


def held(memory: Any) -> int:
  """Bytes that a program holds at its peak, of its `memory_analysis()`."""
  return (memory.argument_size_in_bytes + memory.output_size_in_bytes
          - memory.alias_size_in_bytes + memory.temp_size_in_bytes)


# --- HLO --------------------------------------------------------------------


def cycles(text: str) -> float:
  """Estimated cycles of a TPU program, loop bodies times their trip counts."""
  bodies = _computations(text)
  times = _times(bodies, r' while\(.*body=%?([\w.\-]+)')
  return float(sum(
      n * int(cost[1]) for name, n in times.items() for line in bodies[name]
      for cost in re.finditer(r'"estimated_cycles":"(\d+)"', line)))


def collectives(text: str) -> dict[str, tuple[int, float]]:
  """``{kind: (number, bytes of results)}``; a loop's count each time."""
  bodies, found = _computations(text), {}
  times = _times(
      bodies, r'(?:body|calls|to_apply|called_computations)=\{?%?([\w.\-]+)')
  for name, n in times.items():
    for number, line in enumerate(bodies[name]):
      m = _COLLECTIVE.search(line)
      if m:
        # A compiler that starts one early may write it down several times.
        channel = re.search(r'channel_id=(\d+)', line)
        key = channel[1] if channel else (name, number)
        found[key] = max(found.get(key, (0, '', 0)),
                         (n, m[2], max(map(_bytes, re.findall(
                             r'\w+\[[\d,]*\]', m[1])), default=0)))
  out = {}
  for n, kind, size in found.values():
    count, total = out.get(kind, (0, 0.0))
    out[kind] = count + n, total + n * size
  return dict(sorted(out.items()))


def _bytes(shape: str) -> float:
  """Of an array such as 'bf16[8,128]'."""
  dtype, dims = shape.rstrip(']').split('[')
  bits = _BITS.search(dtype)
  elements = math.prod(int(d) for d in dims.split(',') if d)
  return elements * (int(bits[1]) if bits else 8) / 8


def _computations(text: str) -> dict[str, list[str]]:
  """The lines of each computation; of the first, 'ENTRY'."""
  bodies, name = {}, None
  for line in text.splitlines():
    start = re.match(r'(ENTRY )?%?([\w.\-]+) \(.*\{$', line)
    if start:
      name = 'ENTRY' if start[1] else start[2]
      bodies[name] = []
    elif name:
      bodies[name].append(line)
  return bodies


def _times(bodies: dict[str, list[str]], calls: str) -> dict[str, int]:
  """How often each computation runs that is reached by what ``calls`` finds."""
  times = {}

  def visit(name, n):
    times[name] = times.get(name, 0) + n
    for line in bodies[name]:
      loop = re.search(r' while\(.*condition=%?([\w.\-]+)', line)
      many = n * _trips(line, bodies[loop[1]]) if loop else n
      for inner in re.findall(calls, line):
        if inner in bodies:
          visit(inner, many)
  visit('ENTRY', 1)
  return times


def _trips(line: str, condition: list[str]) -> int:
  known = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
  if known:
    return int(known[1])
  bounds = re.findall(r's32\[\][^ ]* constant\((\d+)\)', '\n'.join(condition))
  return max(map(int, bounds), default=1)


# --- jaxprs -----------------------------------------------------------------


def flops(jaxpr: Any) -> float:
  """Of the matrix products and convolutions of a closed jaxpr, loops counted;
  of branches the most, and of loops without a known end one turn."""
  return _flops(jaxpr.jaxpr)


def _flops(jaxpr) -> float:
  total = 0.0
  for eqn in jaxpr.eqns:
    p: dict[str, Any] = eqn.params
    size = np.prod(eqn.outvars[0].aval.shape) if eqn.outvars else 0
    if eqn.primitive.name == 'dot_general':
      (contracted, _), _ = p['dimension_numbers']
      shape = eqn.invars[0].aval.shape
      total += 2.0 * size * np.prod(
          [shape[a] for a in contracted], initial=1.0)
    elif eqn.primitive.name == 'conv_general_dilated':
      kernel = eqn.invars[1].aval.shape
      features = kernel[p['dimension_numbers'].rhs_spec[0]]
      total += 2.0 * size * np.prod(kernel) / features
    inner = [_flops(x) for x in _inner(p)]
    if inner and eqn.primitive.name == 'cond':
      inner = [max(inner)]
    total += sum(inner) * p.get('length', 1)
  return float(total)


def _inner(params: dict) -> Iterator:
  """The jaxprs of an equation."""
  for value in params.values():
    for x in value if isinstance(value, (tuple, list)) else (value,):
      x = getattr(x, 'jaxpr', x)
      if hasattr(x, 'eqns'):
        yield x
