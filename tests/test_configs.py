"""Every config loads; the paper's programs trace at their real sizes."""

import importlib.util

import conftest
import jax
import pytest

from mezo_jax import models
from mezo_jax.cli.command_line import read_config
from mezo_jax.core import sharding
from mezo_jax.planning import plan
from mezo_jax.tasks import Task
from mezo_jax.training import checks
from mezo_jax.training import config as config_lib
from mezo_jax.training.config import Train

OPT = ('sst2', 'rte', 'cb', 'boolq', 'wsc', 'wic', 'multirc', 'copa', 'record',
       'squad', 'drop')
ARGUMENTS = {
    'quickstart': ['', 'whole'], 'opt_f1': [None],
    'own': ['', 'last_layer', 'lora'], 'es': ['', 'eggroll'],
    'opt': (*OPT, 'sst2,lora', 'squad,prefix', 'rte,lozo', 'sst2,quzo',
            'sst2,private'),
    'multitask': [None],
    'peft_suite': ('reviews0/lora', 'reviews1/lora_adam'),
    'roberta': [f'{t},{k},{s}' for t in ('sst2', 'sst5', 'snli', 'mnli', 'rte',
                                         'trec')
                for k in (16, 512) for s in (13, 21, 42, 87, 100)] + [
                    'trec,16,13,lora', 'mnli,512,100,prefix'],
    'quickstart_suite': ('seed1/mezo', 'seed0/whole', 'seed0/adam'),
    'glue': ('mnli', 'qnli', 'sst2', 'cola', 'mnli,svrg'),
    'cpu_suite': ('sst2/mezo', 'squad/mezo_metric', 'boolq/icl')}


def module(path):
  spec = importlib.util.spec_from_file_location(path.stem, path)
  found = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(found)
  return found


def test_every_config_loads_and_says_how_to_run_it():
  paths = list((conftest.ROOT / 'configs').glob('*.py'))
  assert {p.stem for p in paths} == ARGUMENTS.keys()
  for path in paths:
    found = module(path)
    assert 'python train.py' in found.__doc__
    for argument in ARGUMENTS[path.stem]:
      config = found.get_config(argument) if argument else found.get_config()
      assert isinstance(config, Train)
      if path.stem == 'own':  # the data and their task are the user's
        config.data.train = 'x.csv'
        config.task = Task(template='{text}', label_words=(' no', ' yes'))
      if path.stem == 'es':  # and so are these and the reward
        config.data.train, config.reward.function = 'x.jsonl', 'x:f'
      checks.check_config(config)
      assert config_lib.to_json(config)
    if hasattr(found, 'get_suite'):
      for config in found.get_suite().values():
        checks.check_config(config)


@pytest.mark.slow
@pytest.mark.parametrize('name,model,tokens', [
    ('opt.py:sst2', 'facebook/opt-13b', 32), ('opt.py:cb', '', 64),
    ('opt.py:copa', 'facebook/opt-66b', 32), ('opt.py:squad', '', 64),
    ('opt_f1.py', '', 96), ('roberta.py:sst2,16,13', '', 32),
    ('roberta.py:trec,512,42', '', 32), ('glue.py:mnli', '', 32),
    ('glue.py:mnli,svrg', '', 32), ('opt.py:sst2,private', '', 32),
    ('opt.py:sst2,lora', '', 32), ('opt.py:squad,prefix', '', 64),
    ('roberta.py:sst2,16,13,prefix', '', 32)])
def test_the_paper_s_programs_trace_with_abstract_weights(name, model, tokens):
  config = read_config(str(conftest.ROOT / 'configs' / name), [
      f'--config.model.name={model}'] if model else [])
  *_, programs = plan.trace(config, sharding.make_mesh(fsdp=8),
                           models.find_known(config.model.name), tokens)
  assert programs.keys() >= {'inference', 'losses', 'update', 'evaluation'}
  losses, update = (programs[name][0] for name in ('losses', 'update'))
  params, state, metrics = update.out_info
  want = jax.tree.map(lambda x: x.shape, losses.args_info[0][0])
  assert jax.tree.map(lambda x: x.shape, params) == want
  assert state[0].value.shape == metrics['loss'].shape == ()
