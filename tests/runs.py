"""Starts small runs of train.py, in child processes or in this one."""

import functools
import json
import os
import subprocess
import sys
import time

import conftest
import jax
from orbax.checkpoint import v1 as ocp

from mezo_jax.tasks import Task
from mezo_jax.training import build
from mezo_jax.training import config as config_lib

SMALL = ['--config.task.template={text} It was',
         "--config.task.label_words=(' terrible', ' great')",
         '--config.data.num_train=40', '--config.data.num_dev=20',
         '--config.data.num_test=40', '--config.data.batch_size=8',
         '--config.data.buckets=(8,16)', '--config.peft.mask=',
         '--config.eval_batch_size=20',
         '--config.optimizer.learning_rate=1e-3', '--config.steps=30',
         '--config.eval_every=10', '--config.checkpoint_every=4']


def command(model, data, workdir, *more):
  """Returns the command line of a small run, with further flags ``more``."""
  quickstart = f'--config={conftest.ROOT / "configs/quickstart.py"}'
  return [sys.executable, str(conftest.ROOT / 'train.py'),
          *([x for x in more if x.startswith('--config=')] or [quickstart]),
          f'--config.model.name={model}', f'--config.data.train={data}',
          f'--workdir={workdir}', *SMALL,
          *(x for x in more if not x.startswith('--config='))]


def environment(devices=1):
  """Returns the environment of a child process with some CPU devices."""
  return os.environ | conftest.QUICK_ENVIRONMENT | {
      'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': str(devices)}


def start(*args, devices=1):
  """Starts a run; the arguments are those of `command`."""
  return subprocess.Popen(
      command(*args), env=environment(devices), text=True,
      stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(*args, **kwargs):
  """Runs to the end, and returns (output, exit status)."""
  process = start(*args, **kwargs)
  return process.communicate(timeout=400)[0], process.returncode


def kill_after(workdir, steps, number, *args):
  """Sends a signal to a run when it has logged a number of steps.

  Returns:
    (output, exit status).
  """
  process = start(*args)
  log = workdir / 'metrics.jsonl'
  while process.poll() is None:
    if log.exists() and log.read_text().count('"train"') >= steps:
      process.send_signal(number)
      break
    time.sleep(0.005)
  return process.communicate(timeout=400)[0], process.returncode


def records(workdir):
  """Returns the lines of a run's metrics, without their seconds."""
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  return [{k: v for k, v in json.loads(line).items() if k != 'seconds'}
          for line in lines]


def saved(workdir, state=False):
  """Returns the step of the last checkpoint, and what it has saved.

  Args:
    workdir: The directory of the run.
    state: Whether to return (params, optimizer state) instead of the params.
      Defaults to False.
  """
  directory = workdir / 'checkpoints'
  step = max(int(p.name) for p in directory.iterdir() if p.name.isdigit())
  found = ocp.load(directory / str(step), checkpointable_name='state')
  return step, found if state else found[0]


def small_config(model, data, **changes):
  """Returns the config of a small run, changed as in `changed`."""
  config = config_lib.Train(steps=6, eval_every=3, checkpoint_every=3)
  config.task = Task(
      template='{text} It was', label_words=(' terrible', ' great'))
  config.model.name, config.data.train = str(model), str(data)
  config.data.num_train, config.data.num_dev, config.data.num_test = 40, 20, 40
  config.data.batch_size, config.data.buckets = 8, (16,)
  config.eval_batch_size = 20  # Dev and test data then share a program.
  return changed(config, **changes)


def use_devices(monkeypatch, number):
  """Makes runs in this process use only the first devices."""
  monkeypatch.setattr(build, 'make_mesh', functools.partial(
      build.make_mesh, devices=jax.devices()[:number]))


def train_losses(workdir):
  """Returns the loss of each training step of a run."""
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  return [json.loads(line)['loss'] for line in lines if '"train"' in line]


def changed(config, **changes):
  """Sets fields of a config, given as ``part__field=value``; returns it."""
  for path, value in changes.items():
    *parents, field = path.split('__')
    node = config
    for parent in parents:
      node = getattr(node, parent)
    assert hasattr(node, field)
    setattr(node, field, value)
  return config
