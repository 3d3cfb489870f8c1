"""Describes TPU slices and GPUs that are not available, for their compilers.

``pip install 'mezo_jax[plan]'`` installs the TPU compiler (libtpu, for Linux
x86-64). ``pip install jax-cuda12-plugin jax-cuda12-pjrt nvidia-cuda-nvcc-cu12``
installs the GPU compiler; the first two packages must have the version of jax.
Neither compiler needs a device or a driver.

The name of a topology is a kind of device and a size, separated by a colon. The
size of a TPU slice is the number of chips along each axis, as in 'v5e:4x4'. For
GPUs and CPUs it is the number of devices, as in 'h100:8'.
"""

import dataclasses
import math
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

from mezo_jax.core.errors import first_line, InputError


@dataclasses.dataclass(frozen=True)
class Kind:
  """Describes a kind of device.

  Attributes:
    memory: Memory that a program may use, in GiB. Infinite if unknown.
    clock: Clock rate, in GHz, that converts the compiler's cycles to seconds.
      NaN if the compiler does not estimate cycles.
    links: Total bandwidth from a chip to its neighbours, in GB/s. NaN if
      unknown.
    slices: Available sizes of a slice, from small to large.
  """

  memory: float = math.inf
  clock: float = math.nan
  links: float = math.nan
  slices: tuple[str, ...] = ()


_FLAT = ('1x1', '2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16')
_CUBES = ('1x1x1', '2x2x1', '2x2x2', '2x2x4', '2x4x4', '4x4x4', '4x4x8',
          '4x8x8', '8x8x8')
_GPUS = ('1', '2', '4', '8', '16', '32', '64')
# The memory is what the compilers allow. The clock rates follow from the
# published peak rates and matrix units. The bandwidths are published.
KINDS = {
    'v4': Kind(30.75, 1.05, 300, _CUBES),
    'v5e': Kind(15.75, 1.5, 200, _FLAT),
    'v5p': Kind(95.74, 1.75, 600, _CUBES),
    'v6e': Kind(31.25, 1.75, 448, _FLAT),
    'a100': Kind(79.25, slices=_GPUS),
    'h100': Kind(79.1, slices=_GPUS),
    'cpu': Kind(slices=_GPUS),
}
# A GpuTargetConfigProto in text format, with the published limits of a GPU.
_GPU = '''gpu_device_info {{ threads_per_block_limit: 1024 threads_per_warp: 32
shared_memory_per_block: 49152 shared_memory_per_core: {shared}
shared_memory_per_block_optin: {most} threads_per_core_limit: 2048
core_count: {cores} fpus_per_core: {fpus} block_dim_limit_x: 2147483647
block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: {bandwidth}
l2_cache_size: {l2} clock_rate_ghz: {clock} device_memory_size: {memory}
cuda_compute_capability {{ major: {major} }} registers_per_core_limit: 65536
registers_per_block_limit: 65536 thread_dim_limit_x: 1024
thread_dim_limit_y: 1024 thread_dim_limit_z: 64 }}
runtime_version {{ major: 12 minor: 8 }} platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }} device_description_str: "{name}"'''
_TARGETS = {
    'a100': _GPU.format(
        shared=167936, most=166912, cores=108, fpus=64, l2=41943040,
        bandwidth=2039040000000, clock=1.41, memory=85100068864, major=8,
        name='NVIDIA A100-SXM4-80GB'),
    'h100': _GPU.format(
        shared=233472, most=232448, cores=132, fpus=128, l2=52428800,
        bandwidth=3352320000000, clock=1.98, memory=84942979072, major=9,
        name='NVIDIA H100 80GB HBM3')}


CARDS = 8  # number of GPUs per host


def is_card(name: str) -> bool:
  """Returns whether a topology is one of GPUs."""
  return name.partition(':')[0] in _TARGETS


def split(name: str) -> tuple[Kind, str, str]:
  """Splits the name of a topology.

  Args:
    name: Name of a topology, such as 'v5e:4x4'. A kind alone, such as 'v5e',
      means one device.

  Returns:
    The kind of device, its name ('v5e') and the size of the slice ('4x4').

  Raises:
    InputError: If the name is not that of a topology.
  """
  kind, _, shape = name.partition(':')
  shape = shape or '1'
  if kind in KINDS and re.fullmatch(r'[1-9]\d*(x[1-9]\d*)*', shape):
    axes = KINDS[kind].slices[0].count('x')
    if shape.count('x') == axes:
      return KINDS[kind], kind, shape
    if shape == '1':
      return KINDS[kind], kind, KINDS[kind].slices[0]
  raise InputError(
      f'--topology={name!r} is unknown; examples are v5e:4x4, v6e:2x4, '
      'v5p:2x2x1, v4:2x2x2 (chips in each direction of a slice), a100:8, '
      'h100:8 (GPUs) and cpu:8.')


def size(name: str) -> int:
  """Returns the number of devices of a topology."""
  return math.prod(map(int, split(name)[2].split('x')))


def larger(name: str) -> list[str]:
  """Returns larger topologies of the same kind of device, smallest first."""
  kind, called, _ = split(name)
  return [f'{called}:{shape}' for shape in kind.slices
          if size(f'{called}:{shape}') > size(name)]


def devices(name: str) -> list[Any]:
  """Returns the devices of a topology, for which programs can be compiled.

  For TPUs and GPUs the result has descriptions of devices, on which no program
  can run. For 'cpu' it has real devices.

  Args:
    name: Name of a topology: 'v5e:4x4', 'v5p:1x1x1', 'h100:8', 'cpu:8'.

  Raises:
    InputError: If the topology does not exist, if its compiler is not
      installed, or if this process has too few CPU devices.
  """
  _, kind, shape = split(name)
  n = size(name)
  if kind == 'cpu':
    found = jax.devices('cpu')
    if len(found) < n:
      raise InputError(f'--topology={name}: this process has {len(found)} CPU '
                       f'device(s); set JAX_NUM_CPU_DEVICES={n} and restart.')
    return found[:n]
  gpu = is_card(name)
  try:
    if gpu:
      return topologies.get_topology_desc(
          platform='cuda', target_config=_TARGETS[kind],
          topology=f'1x{-(-n // CARDS)}x{min(n, CARDS)}').devices
    # Without these variables, libtpu queries the metadata of a cloud machine
    # and looks for other processes.
    for variable, value in dict(
        TPU_SKIP_MDS_QUERY='1', TPU_ACCELERATOR_TYPE='v5litepod-4',
        TPU_WORKER_HOSTNAMES='localhost', TPU_LIBRARY_LOG_LEVEL='3',
        ALLOW_MULTIPLE_LIBTPU_LOAD='1').items():
      os.environ.setdefault(variable, value)
    more: dict[str, Any] = {}
    if n == 1:
      more['chips_per_host_bounds'] = (1, 1, 1)
    if kind == 'v4':
      more['chip_config_name'] = 'megacore'  # both cores form one device
    return topologies.get_topology_desc(
        platform='tpu', topology_name=f'{kind}:{shape}', **more).devices
  except (jax.errors.JaxRuntimeError, ImportError, NotImplementedError,
          RuntimeError, ValueError) as e:
    needs = ('pip install jax-cuda12-plugin=={0} jax-cuda12-pjrt=={0} '
             'nvidia-cuda-nvcc-cu12'.format(jax.__version__) if gpu else
             "pip install 'mezo_jax[plan]'")
    raise InputError(
        f'cannot compile for --topology={name} ({first_line(e)}). Either there '
        f'is no such slice, or the compiler is missing: {needs}.') from e
