"""A suite that repeats the MeZO paper's comparison on a CPU: SmolLM2-135M, six
tasks.

  python -m mezo_jax evaluate --suite configs/cpu_suite.py
  python train.py --config=configs/cpu_suite.py:sst2/mezo     one of its runs

Reproduces benchmarks/results/cpu_suite.md. The data of the quickstart are
installed with pip. Those of the other tasks are read from data/TASK_train.jsonl
and data/TASK_test.jsonl if these files exist (the functions below show their
columns), and otherwise downloaded from the hub. The files for BoolQ have 69
rows together.
"""

import dataclasses
from pathlib import Path

from mezo_jax import tasks
from mezo_jax.tasks import Task
from mezo_jax.training.config import Data, Optimizer, Peft, Spsa, Train

_DATA = Path('data')
_MASK = 'embed|attn/(q|k|o)|mlp/(gate|up)'


# Copies of a data set name their columns differently. Each of these functions
# accepts two names.


def _sst2(row):
  return row | {'sentence': row.get('sentence', row.get('text'))}


def _trec(row):
  return row | {'kind': row.get('coarse', row.get('label_coarse_original'))}


def _boolq(row):
  return tasks.TASKS['boolq'].row(
      row | {'answer': row.get('answer', row.get('label') == 1)})


TREC = Task(
    name='trec', template='Question: {text}\nType of answer:', row=_trec,
    label_words=(' description', ' entity', ' abbreviation', ' person',
                 ' place', ' number'),
    label_column='kind', label_names=('DESC', 'ENTY', 'ABBR', 'HUM', 'LOC',
                                      'NUM'),
    hub='SetFit/TREC-QC', test_split='test')
SQUAD = tasks.get(
    'squad', max_new_tokens=12,
    template='Context: {context}\nQuestion: {question}\nAnswer:')


def _data(name: str, **kwargs) -> Data:
  """Selects the files of a task under data/.

  Without such files, it selects the hub data set that the task declares.
  """
  found = [_DATA / f'{name}_{split}.jsonl' for split in ('train', 'test')]
  train, test = (str(f) if f.is_file() else '' for f in found)
  return Data(train=train, test=test, **kwargs)


# For each task: the task, the data, the number of demonstrations of in-context
# learning (few enough for a CPU), MeZO's (batch size, steps, steps when the
# objective is the metric), and the steps of backpropagation.
_TASKS = {
    'sst2': (
        tasks.get('sst2', row=_sst2),
        _data('sst2', num_train=1000, num_dev=100, num_test=400),
        8, (16, 120, 50), 48),
    'squad': (
        SQUAD, _data('squad', num_train=200, num_dev=16, num_test=48),
        4, (8, 16, 8), 10),
    'trec': (
        TREC, _data('trec', num_train=400, num_dev=60, num_test=160),
        8, (16, 50, 20), 24),
    'reviews': (
        Task(template='{text} Recommended:', label_words=(' no', ' yes')),
        Data(train='quickstart', num_train=400, num_dev=60, num_test=160),
        8, (16, 60, 20), 24),
    'rte': (
        tasks.get('rte'),
        _data('rte', num_train=200, num_dev=40, num_test=80),
        3, (16, 12, 8), 8),
    'boolq': (
        tasks.get('boolq', row=_boolq),
        _data('boolq', num_train=24, num_dev=16, num_test=29),
        4, (8, 12, 8), 8),
}
METHODS = ('zero_shot', 'icl', 'linear_probe', 'mezo', 'mezo_metric',
           'finetune')


def _config(name: str, method: str) -> Train:
  task, data, num_demos, (rows, steps, on_metric), backprop = _TASKS[name]
  on = 'f1' if task.traits.generates else 'accuracy'
  long = name in ('squad', 'rte', 'boolq')
  optimizer = Optimizer(learning_rate=1e-4, schedule='linear')
  spsa = Spsa(distribution='rademacher')
  if method == 'mezo_metric':
    # The metric is piecewise constant: it changes only when the prediction of a
    # row changes. A larger eps and more rows make such changes likely. The
    # estimated slope is smaller, so the learning rate is larger.
    rows, steps = (rows if long else 2 * rows), on_metric
    optimizer = dataclasses.replace(optimizer, learning_rate=3e-4)
    spsa = dataclasses.replace(spsa, eps=1e-2)
  if method == 'finetune':
    rows, steps = 8, backprop
    optimizer = Optimizer(learning_rate=2e-5, schedule='linear')
    spsa = Spsa()  # backpropagation does not read it
  return Train(
      method=method.removesuffix('_metric'),
      objective=on if method == 'mezo_metric' else '',
      task=dataclasses.replace(task),
      data=dataclasses.replace(
          data, batch_size=rows, max_length=2048,
          buckets=(16, 24, 32, 48, 64, 96, *range(128, 512, 32),
                   *range(512, 2049, 128))),
      optimizer=optimizer, spsa=spsa,
      peft=Peft(mask='' if method == 'finetune' else _MASK),
      num_demos=num_demos, zero_shot=False,
      steps=steps, eval_every=steps, checkpoint_every=10_000,
      select='loss' if task.traits.generates else 'metric',
      eval_batch_size=64, eval_batch_tokens=4096)


def get_suite() -> dict[str, Train]:
  """Returns the configs of all runs, by TASK/METHOD."""
  return {f'{name}/{method}': _config(name, method)
          for name in _TASKS for method in METHODS
          if not (method == 'linear_probe' and name == 'squad')}


def get_config(name: str = 'sst2/mezo') -> Train:
  """Returns the config of one run, TASK/METHOD."""
  return get_suite()[name]
