"""Public benchmarks: the numbers of lm-eval's own class for transformers."""

import json

import chat_templates
import conftest
import numpy as np
import pytest
import runs

from mezo_jax.cli import commands
from mezo_jax.export.from_run import export
from mezo_jax.tasks import Task
from mezo_jax.training import benchmarks
import train

lm_eval = pytest.importorskip('lm_eval')

ROWS = [{'q': f'{"abc"[i % 3]} {"xyz"[i % 2]}{i}', 'choices': [
    ' a', ' bcd efg', ' the end of it'], 'label': i % 3,
         'text': ' '.join('abc xyz'.split() * (3 + 7 * (i % 4)))}
        for i in range(12)]
TASKS = {
    'choices': """
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: "{{choices}}"
doc_to_target: label
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
""",
    'perplexity': """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: word_perplexity}
  - {metric: bits_per_byte}
""",
    'greedy': """
output_type: loglikelihood
doc_to_text: "{{q}}"
doc_to_target: "{{choices[0]}}"
metric_list:
  - {metric: perplexity}
  - {metric: acc, aggregation: mean, higher_is_better: true}
""",
    'writing': """
output_type: generate_until
doc_to_text: "{{q}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["\\n", "e"], max_gen_toks: 8, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""}


@pytest.fixture(scope='module')
def tasks_dir(tmp_path_factory):
  """A directory with local tasks of all kinds of requests."""
  path = tmp_path_factory.mktemp('tasks')
  data = path / 'rows.jsonl'
  data.write_text(''.join(json.dumps(row) + '\n' for row in ROWS))
  for name, text in TASKS.items():
    (path / f'{name}.yaml').write_text(
        f'task: {name}\ndataset_path: json\n'
        f'dataset_kwargs: {{data_files: {{test: {data}}}}}\n'
        f'test_split: test\n{text}')
  return path


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """A finished run with a LoRA, on a tiny model with a chat template."""
  where = tmp_path_factory.mktemp('run')
  form = chat_templates.FORMS['zephyr']
  model = conftest.write_tiny_model(where / 'model', vocab_size=300)
  for file in model.glob('*token*'):
    file.unlink()
  chat_templates.tokenizer(form).save_pretrained(model)
  data = where / 'chat.jsonl'
  data.write_text(''.join(json.dumps(
      {'prompt': row['q'], 'completion': row['choices'][0]}) + '\n'
                          for row in ROWS * 10))
  config = runs.small_config(model, data, peft__method='lora', steps=20,
                             optimizer__learning_rate=3e-2, spsa__eps=1e-2)
  config.task, config.data.buckets = Task(kind='chat'), (64,)
  train.run(config, where / 'work')
  return where / 'work'


def numbers(results):
  """Returns the metrics of each task, without their errors."""
  return {(task, name): value for task, found in results['results'].items()
          for name, value in found.items()
          if isinstance(value, float) and 'stderr' not in name}


def texts(results):
  """Returns what the model wrote for each row."""
  return [sample['resps'] for sample in results['samples']['writing']]


@pytest.mark.torch
@pytest.mark.parametrize('chat', [False, True])
def test_the_numbers_of_the_class_for_transformers(
    chat, trained, tasks_dir, tmp_path):
  """Choices, perplexity of texts beyond the context, greedy answers, and what
  is written, of the run and of its export."""
  from lm_eval.models.huggingface import HFLM
  from lm_eval.tasks import TaskManager
  where = export(trained, tmp_path / 'out', merged=True, say=lambda t: None)
  names = [n for n in TASKS if not (chat and n == 'perplexity')]
  options = dict(apply_chat_template=chat, bootstrap_iters=0)
  want = lm_eval.simple_evaluate(
      HFLM(pretrained=str(where), device='cpu', dtype='float32', batch_size=4),
      tasks=names, task_manager=TaskManager(include_path=str(tasks_dir)),
      **options)
  assert max(len(row['text']) for row in ROWS) > conftest.TINY[
      'max_position_embeddings']
  for source in (trained, where):
    found = benchmarks.run(source, names, include=str(tasks_dir), rows=5,
                           **options)
    assert numbers(found).keys() == numbers(want).keys()
    for name, value in numbers(want).items():
      np.testing.assert_allclose(
          numbers(found)[name], value, rtol=1e-3, err_msg=str(name))
    assert texts(found) == texts(want)


@pytest.mark.parametrize('dtype', ['float32', 'int8'])
def test_batches_change_nothing(dtype, trained, tmp_path):
  """Against one row at a time, also with quantised weights."""
  config = runs.small_config(trained.parent / 'model',
                             trained.parent / 'chat.jsonl')
  config.method, config.model.dtype = 'zero_shot', dtype
  config.task, config.data.buckets = Task(kind='chat'), (64,)
  train.run(config, tmp_path / 'run')
  _, found = benchmarks.load(tmp_path / 'run')
  rng = np.random.RandomState(0)
  ids = lambda n: rng.randint(250, size=n).tolist()
  pairs = [(ids(n), ids(m)) for n, m in (
      (1, 1), (5, 3), (30, 2), (40, 20), (127, 1), (128, 1), (200, 5), (3, 1))]
  many = benchmarks._make_scorer(found, (), 32, 128)(pairs)
  single = benchmarks._make_scorer(found, (), 1, 128)
  alone = [single([pair])[0] for pair in pairs]
  rolling = benchmarks._make_scorer(found, (), 32, 128)(pairs, greedy=False)
  np.testing.assert_allclose(
      [p for p, _ in many], [p for p, _ in alone], rtol=1e-4)
  np.testing.assert_allclose(
      [p for p, _ in rolling], [p for p, _ in alone], rtol=1e-4)
  assert [best for _, best in many] == [best for _, best in alone]


def test_the_command(trained, tasks_dir, tmp_path, capsys):
  out = tmp_path / 'out.json'
  commands.main(['lm-eval', f'--model={trained}', '--tasks=choices,writing',
                 f'--include={tasks_dir}', '--limit=4', f'--out={out}'])
  assert '|choices' in capsys.readouterr().out
  results = json.loads(out.read_text())['results']
  assert 0 <= results['choices']['acc,none'] <= 1


@pytest.mark.parametrize('flags,message', [
    (['--tasks=nothing'], 'no task nothing'),
    (['--include=nowhere'], 'nowhere'),
    (['--step=7'], 'no checkpoint of step 7')])
def test_what_does_not_exist_is_refused(
    trained, tasks_dir, flags, message, capsys):
  given = [f'--model={trained}', '--tasks=choices', f'--include={tasks_dir}']
  names = [flag.partition('=')[0] for flag in flags]
  given = [flag for flag in given if flag.partition('=')[0] not in names]
  with pytest.raises(SystemExit) as e:
    commands.main(['lm-eval', *given, *flags])
  assert message in str(e.value)
