"""Compiles the configs of the paper's tables at their real sizes.

  pip install -e '.[plan]' && python benchmarks/aot_configs.py

The configs are opt.py, opt_f1.py, roberta.py and glue.py. Their programs are
compiled by `mezo_jax.planning.plan`, and nothing is run. What the host computes
from generated answers is not included. Writes benchmarks/results/aot_configs.md
and .json.
"""

import os
from pathlib import Path

import harness
import jax

from mezo_jax.cli.command_line import read_config
from mezo_jax.cli.commands import read_mesh
from mezo_jax.planning import machines, plan
from mezo_jax.training import config as config_lib

ROOT = Path(__file__).parents[1]
# (config with its argument, model if another, topology, mesh, tokens per row)
CASES = [
    ('roberta.py:mnli,512,100', '', 'v5p:1x1x1', 'fsdp=1', 256),
    ('glue.py:mnli', '', 'v5p:1x1x1', 'fsdp=1', 128),
    ('roberta.py:sst2,512,13,prefix', '', 'v5p:1x1x1', 'fsdp=1', 128),
    ('opt.py:sst2', '', 'v5p:1x1x1', 'fsdp=1', 64),
    ('opt.py:sst2,lora', '', 'v5p:1x1x1', 'fsdp=1', 64),
    ('opt.py:squad,prefix', '', 'v5p:1x1x1', 'fsdp=1', 512),
    ('opt.py:sst2', 'facebook/opt-30b', 'v5p:1x1x1', 'fsdp=1', 64),
    ('opt_f1.py', '', 'v5p:1x1x1', 'fsdp=1', 512),
    ('opt.py:squad', 'facebook/opt-66b', 'v5e:4x4', 'fsdp=4,tensor=4', 512),
]


def load_config(name: str, model: str) -> config_lib.Train:
  """Reads a config; ``model`` replaces its model unless it is ''."""
  return read_config(str(ROOT / 'configs' / name), [
      f'--config.model.name={model}'] if model else [])


def main():
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
  jax.config.update('jax_platforms', 'cpu')
  table = []
  for name, other, topology, mesh, tokens in CASES:
    config = load_config(name, other)
    found = plan.plan(config, topology, tokens=tokens, sizes=read_mesh(
        mesh, machines.size(topology)))
    update = found.programs['update']
    table.append({
        'config': name, 'model': config.model.name.split('/')[-1],
        'objective': config_lib.objective(config),
        'trained': config.peft.method or 'all',
        'batch': f'{config.data.batch_size} x {tokens}',
        'dtype': config.model.dtype, 'compiled for': topology,
        'a step, GiB a device': round(
            found.peak('losses', 'update') / plan.GIB, 2),
        'evaluation, GiB': round(found.peak('evaluation') / plan.GIB, 2),
        'kept in place': round(update.kept / plan.GIB, 2),
        'seconds': round(sum(p.seconds for p in found.programs.values()))})
    print(table[-1], flush=True)
    harness.write('aot_configs', harness.header(), [
        ('Each, compiled ahead of time:', table)])


if __name__ == '__main__':
  main()
