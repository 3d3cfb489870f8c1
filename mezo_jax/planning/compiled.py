"""Reads the cost of compiled programs.

Memory, cycles and collectives are read from the compiler's output, and
floating-point operations from the jaxpr.
"""

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

# Matches a collective operation in HLO and captures its result types and its
# kind. An asynchronous collective is a pair of operations, ...-start and
# ...-done, of which only the first matches, so that it is counted once.
_COLLECTIVE = re.compile(
    r' = (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|'
    r'collective-permute|collective-broadcast)(?:-start)?\(')
_BITS = re.compile(r'(\d+)')  # the number of bits in the name of a dtype


@dataclasses.dataclass(frozen=True)
class Program:
  """Holds the cost of one execution of a program on one device.

  Attributes:
    memory: Peak memory, in bytes. None if the program is so much too large that
      the compiler does not report its memory.
    fits: Whether the compiler accepted the program.
    weights: Size of the arguments, in bytes.
    kept: Size of the donated arguments, whose memory the results reuse, in
      bytes.
    flops: Floating-point operations of matrix products and convolutions: those
      of the whole program divided by the number of devices. NaN if unknown.
    cycles: The TPU compiler's estimate of cycles, without collectives. NaN for
      other devices.
    collectives: Number of collectives of each kind, and total size of their
      results in bytes. A collective in a loop counts once per iteration.
    seconds: How long compiling took.
  """

  memory: float | None
  fits: bool = True
  weights: int = 0
  kept: int = 0
  flops: float = math.nan
  cycles: float = math.nan
  collectives: dict[str, tuple[int, float]] = dataclasses.field(
      default_factory=dict)
  seconds: float = 0.0

  @property
  def temporaries(self) -> float:
    """Returns the peak memory in addition to the arguments, in bytes."""
    assert self.memory is not None  # callers check this
    return self.memory - self.weights


def read(lowered: jax.stages.Lowered, jaxpr: Any = None, devices: int = 1
         ) -> Program:
  """Compiles a program and returns its cost.

  The TPU compiler refuses a program that does not fit into memory. It reports
  how much memory the program needs, unless that is far too much. The GPU
  compiler compiles such programs.

  Args:
    lowered: The lowered program.
    jaxpr: The closed jaxpr of the same program, for its floating-point
      operations. Defaults to None, which leaves them unknown.
    devices: Number of devices that the program runs on. Defaults to 1.
  """
  began = time.time()
  with tempfile.TemporaryDirectory() as dump:
    try:
      compiled = lowered.compile({'xla_dump_to': dump})
    except jax.errors.JaxRuntimeError as e:
      if 'RESOURCE_EXHAUSTED' not in str(e):
        raise
      return Program(_needed(str(e)), fits=False, seconds=time.time() - began)
    # For a TPU, `memory_analysis` counts fragmentation twice, so the peak is
    # read from the report that the compiler writes to a file.
    reports = glob.glob(f'{dump}/*memory-usage-report.txt')
    total = re.search(r'Total bytes: (\d+)', Path(reports[0]).read_text()) if (
        reports) else None
  m, text = compiled.memory_analysis(), compiled.as_text()
  assert m is not None and text is not None  # CPU, GPU and TPU provide both
  peak, count = held(m), math.nan
  if total is not None and '"estimated_cycles"' in text:  # a TPU
    peak, count = int(total[1]), cycles(text)
  return Program(
      peak, weights=m.argument_size_in_bytes, kept=m.alias_size_in_bytes,
      cycles=count, flops=math.nan if jaxpr is None else flops(jaxpr) / devices,
      collectives=collectives(text), seconds=time.time() - began)


def _needed(message: str) -> float | None:
  """Returns the bytes that the TPU compiler says a program needs, if it does.
  """
  found = re.search(
      r'Used ([\d.]+)([KMGT]) of|([\d.]+)([KMGT])\) exceeds', message)
  if found is None:
    return None
  number, unit = (x for x in found.groups() if x)
  return float(number) * 1024 ** ('KMGT'.index(unit) + 1)


def held(memory: Any) -> int:
  """Returns the peak memory of a program, in bytes.

  Args:
    memory: Result of `jax.stages.Compiled.memory_analysis`.
  """
  return (memory.argument_size_in_bytes + memory.output_size_in_bytes
          - memory.alias_size_in_bytes + memory.temp_size_in_bytes)


# --- HLO --------------------------------------------------------------------


def cycles(text: str) -> float:
  """Returns the estimated cycles of a TPU program.

  The cycles of a loop body are multiplied by the number of its iterations.

  Args:
    text: The program as HLO.
  """
  bodies = _computations(text)
  times = _times(bodies, r' while\(.*body=%?([\w.\-]+)')
  return float(sum(
      n * int(cost[1]) for name, n in times.items() for line in bodies[name]
      for cost in re.finditer(r'"estimated_cycles":"(\d+)"', line)))


def collectives(text: str) -> dict[str, tuple[int, float]]:
  """Counts the collectives of a program.

  Args:
    text: The program as HLO.

  Returns:
    ``{kind: (number, size of the results in bytes)}``. A collective in a loop
    counts once per iteration.
  """
  bodies, found = _computations(text), {}
  times = _times(
      bodies, r'(?:body|calls|to_apply|called_computations)=\{?%?([\w.\-]+)')
  for name, n in times.items():
    for number, line in enumerate(bodies[name]):
      m = _COLLECTIVE.search(line)
      if m:
        # A compiler that overlaps a collective with computation may list it
        # several times with the same channel, which is counted once.
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
  """Returns the size in bytes of an array such as 'bf16[8,128]'."""
  dtype, dims = shape.rstrip(']').split('[')
  bits = _BITS.search(dtype)
  elements = math.prod(int(d) for d in dims.split(',') if d)
  return elements * (int(bits[1]) if bits else 8) / 8


def _computations(text: str) -> dict[str, list[str]]:
  """Returns the lines of each computation in HLO text, by its name.

  The name of the main computation is replaced by 'ENTRY'.
  """
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
  """Returns how often each computation runs.

  Args:
    bodies: Lines of each computation; see `_computations`.
    calls: Regular expression that finds the names of computations that a line
      calls. Computations that are not reached are left out.
  """
  times = {}

  def visit(name, n):
    """Adds n runs to a computation and to those that it calls."""
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
  """Returns the number of iterations of a loop.

  If the compiler does not report it, the largest constant in the loop's
  condition is assumed to be the bound.

  Args:
    line: The line of the while operation.
    condition: Lines of the computation of its condition.
  """
  known = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
  if known:
    return int(known[1])
  bounds = re.findall(r's32\[\][^ ]* constant\((\d+)\)', '\n'.join(condition))
  return max(map(int, bounds), default=1)


# --- jaxprs -----------------------------------------------------------------


def flops(jaxpr: Any) -> float:
  """Returns the floating-point operations of a program.

  Matrix products and convolutions are counted, those in a scan once per
  iteration. Of the branches of a cond, the most expensive one counts. A while
  loop, whose number of iterations is unknown, counts as one iteration.

  Args:
    jaxpr: A closed jaxpr.
  """
  return _flops(jaxpr.jaxpr)


def _flops(jaxpr) -> float:
  """Returns the floating-point operations of an open jaxpr."""
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
  """Yields the jaxprs in the parameters of an equation, such as loop bodies."""
  for value in params.values():
    for x in value if isinstance(value, (tuple, list)) else (value,):
      x = getattr(x, 'jaxpr', x)
      if hasattr(x, 'eqns'):
        yield x
