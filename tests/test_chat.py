"""Conversations: which tokens are trained, and runs that train on them."""

import dataclasses
import json

import chat_templates
from chat_templates import FORMS, MESSAGES
import conftest
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rewards_of_tests
import runs

from mezo_jax import models, training
from mezo_jax.core import fingerprint
from mezo_jax.core.errors import InputError
from mezo_jax.export.from_run import export
from mezo_jax.tasks import chat, Task
from mezo_jax.tasks import data as data_lib
from mezo_jax.tasks.encode import batch_of, encode
from mezo_jax.tasks.score import make_loss_fn
import train

CHATML = chat_templates.tokenizer(FORMS['chatml'])


def marked(data, row=0):
  """Returns the tokens of a row, and whether each is trained."""
  prompt, (rest,), (scored,) = (
      data.prompts[row], data.candidates[row], data.scored[row])
  return [*((token, False) for token in prompt), *(
      (token, i in scored) for i, token in enumerate(rest))]


def trained(data, tokenizer, row=0):
  """Returns the trained tokens of a row as a text."""
  return tokenizer.decode([token for token, is_trained in marked(data, row)
                           if is_trained])


def of(rows, tokenizer=CHATML, length=10**6, **changes):
  """Tokenises conversations for training."""
  return encode(Task(kind='chat', **changes), rows, tokenizer, length,
                gold_only=True)


@pytest.mark.parametrize('name', FORMS)
def test_the_trained_tokens_of_a_template(name):
  """Token by token, up to the last one that is trained."""
  form = FORMS[name]
  tokenizer = chat_templates.tokenizer(form)
  want = chat_templates.expected(form, tokenizer)
  while not want[-1][1]:
    want.pop()
  turns = 'all' if form.prefix else 'last'
  found = marked(of([{'messages': form.messages}], tokenizer,
                    train_turns=turns))
  assert found == want
  # The model continues exactly what precedes the last trained part.
  asked = encode(Task(kind='chat', max_new_tokens=1),
                 [{'messages': form.messages}], tokenizer, 10**6)
  start = max(i for i, (_, is_trained) in enumerate(want) if not is_trained)
  assert asked.prompts[0] == [token for token, _ in want[:start + 1]]


@pytest.mark.parametrize('name', [n for n in FORMS if not FORMS[n].prefix])
def test_a_template_that_changes_earlier_turns_is_refused(name):
  tokenizer = chat_templates.tokenizer(FORMS[name])
  with pytest.raises(InputError, match='train_turns=last') as e:
    of([{'messages': MESSAGES}], tokenizer)
  assert 'Hello, you.' in str(e.value)
  assert ('<think>' if name == 'qwen 3' else '<|return|>') in str(e.value)


def test_variables_of_a_template():
  """Without thinking, the generation prompt has the empty thought."""
  tokenizer = chat_templates.tokenizer(FORMS['qwen 3'])
  row = {'messages': [*MESSAGES[:-1], MESSAGES[-1] | {
      'reasoning_content': 'hm'}]}
  found = of([row], tokenizer, train_turns='last')
  assert trained(found, tokenizer) == (
      '<think>\nhm\n</think>\n\nSee\n\nyou<|im_end|>')
  found = of([{'messages': MESSAGES}], tokenizer, train_turns='last',
             chat_args=(('enable_thinking', False),))
  assert trained(found, tokenizer) == 'See\n\nyou<|im_end|>'
  with pytest.raises(InputError, match='chat_args'):
    # The generation prompt has no thought, but the message has one.
    of([row], tokenizer, train_turns='last',
       chat_args=(('enable_thinking', False),))


def test_the_date_does_not_change():
  """A run that is resumed on another day has the same tokens."""
  form = dataclasses.replace(
      FORMS['chatml'], template="{{ strftime_now('%Y-%m-%d') }}"
      + FORMS['chatml'].template)
  found = of([{'messages': MESSAGES}], chat_templates.tokenizer(form))
  assert CHATML.decode(found.prompts[0]).startswith('2026-01-01<|im_start|>')


def test_a_token_may_join_prompt_and_answer():
  """It is trained, since the answer begins in it."""
  tokenizer = chat_templates.tokenizer(FORMS['chatml'], [('Ċ', 'Ċ')])
  row = {'messages': [MESSAGES[1], {'role': 'assistant', 'content': '\na'}]}
  assert trained(of([row], tokenizer), tokenizer) == '\n\na<|im_end|>'


ANSWERS = 'Hello, you.<|im_end|>', 'See\n\nyou<|im_end|>'


@pytest.mark.parametrize('row,changes,want', [
    ({'messages': MESSAGES}, {}, ''.join(ANSWERS)),
    ({'messages': json.dumps(MESSAGES)}, {}, ''.join(ANSWERS)),
    ({'messages': MESSAGES, 'prompt': None}, {}, ''.join(ANSWERS)),
    ({'messages': [m | {'name': None} for m in MESSAGES]}, {},
     ''.join(ANSWERS)),
    ({'messages': MESSAGES}, {'train_turns': 'last'}, ANSWERS[1]),
    ({'messages': MESSAGES[:3] + [MESSAGES[3]]}, {}, ANSWERS[0]),
    ({'messages': [m | {'weight': int(i != 2)}
                   for i, m in enumerate(MESSAGES)]}, {}, ANSWERS[1]),
    ({'prompt': 'Hi', 'completion': 'Hello, you.'}, {}, ANSWERS[0]),
    ({'prompt': MESSAGES[:4], 'completion': MESSAGES[4:]}, {}, ANSWERS[1]),
    ({'prompt': MESSAGES[:2], 'completion': 'Hello, you.'}, {}, ANSWERS[0]),
    ({'messages': [MESSAGES[1], {'role': 'assistant', 'content': [
        {'type': 'text', 'text': 'Hello, '}, {'type': 'text', 'text': 'you.'}
    ]}]}, {}, ANSWERS[0]),
    # Nobody has asked for a first message of the assistant.
    ({'messages': [MESSAGES[2], *MESSAGES[1:3]]}, {}, ANSWERS[0]),
    ({'messages': MESSAGES[1:3], 'tools': ''}, {}, ANSWERS[0]),
    ({'messages': MESSAGES}, {'train_roles': ('user',)},
     '<|im_start|>user\nHi<|im_end|><|im_start|>user\nBye\nnow<|im_end|>'),
    ({'messages': MESSAGES}, {'train_roles': ('system', 'assistant')},
     # No token precedes the first one, so it cannot be predicted.
     'system\nBe brief.<|im_end|>' + ''.join(ANSWERS))])
def test_rows_and_roles(row, changes, want):
  assert trained(of([row], **changes), CHATML) == want


def test_a_plain_template():
  """Only the contents, and the end token after an answer."""
  tokenizer = chat_templates.tokenizer(dataclasses.replace(
      FORMS['zephyr'], template=None))
  row = {'prompt': '2 + 2 = ', 'completion': '4'}
  with pytest.raises(InputError, match=r'chat_template=FILE'):
    of([row], tokenizer)
  tokenizer.chat_template = chat.read_template('plain', tokenizer)
  data = of([row, {'prompt': '', 'completion': ''}], tokenizer)
  assert [r for r, _ in data.left_out] == [1]
  assert tokenizer.decode(data.prompts[0]) == '2 + 2 = '
  assert trained(data, tokenizer) == '4</s>'


@pytest.mark.parametrize('row,message', [
    ({'text': 'a'}, "'messages', or 'prompt' and 'completion'"),
    ({'messages': []}, 'no conversation'),
    ({'messages': 'Hi'}, 'not JSON'),
    ({'messages': 3}, 'neither a list'),
    ({'messages': ['Hi']}, 'not an object'),
    ({'messages': [{'content': 'Hi'}]}, 'without a role'),
    ({'messages': [{'role': 'user'}]}, 'without a text'),
    ({'messages': [{'role': 'user', 'content': 3}]}, 'without a text'),
    ({'messages': [MESSAGES[1], {'role': 'assistant', 'content': None,
                                 'tool_calls': []}]}, 'without a text'),
    ({'messages': [{'role': 'user', 'content': [{'type': 'image'}]}]},
     'not a text'),
    ({'messages': [MESSAGES[1], MESSAGES[2] | {'weight': 0.5}]}, 'weight 0.5')])
def test_malformed_conversations_are_refused(row, message):
  with pytest.raises(InputError, match=message):
    of([row])


def test_what_the_template_refuses_is_reported():
  tokenizer = chat_templates.tokenizer(FORMS['gemma'])
  with pytest.raises(InputError, match='no system') as e:
    of([{'messages': MESSAGES}], tokenizer)
  assert 'Be brief.' in str(e.value)


def ends(row):
  """Returns the tokens of a row, and the ends of its trained parts."""
  whole = marked(of([row]))
  return whole, [i + 1 for i, (_, now) in enumerate(whole) if now and (
      i + 1 == len(whole) or not whole[i + 1][1])]


@pytest.mark.parametrize('spare', [-1, 0, 1])
def test_long_conversations_lose_their_last_turns(spare):
  row = {'messages': MESSAGES}
  whole, (first, last) = ends(row)
  data = of([row], length=last + spare)
  assert data.truncated == (spare < 0)
  assert marked(data) == whole[:first if spare < 0 else last]
  other = {'messages': MESSAGES[1:3]}
  data = of([row, other], length=first + spare)
  assert [r for r, _ in data.left_out] == [0] * (spare < 0)
  assert len(data.rows) == 2 - (spare < 0)
  if spare >= 0:
    assert marked(data) == whole[:first]


@pytest.mark.parametrize('spare', [-1, 0, 1])
def test_the_last_answer_loses_the_first_turns(spare):
  """But not the message of the system."""
  whole, _ = ends({'messages': MESSAGES})
  short, _ = ends({'messages': [MESSAGES[0], *MESSAGES[3:]]})
  row = {'messages': MESSAGES}
  data = of([row], length=len(whole) + spare, train_turns='last')
  assert trained(data, CHATML) == ANSWERS[1]
  assert [t for t, _ in marked(data)] == [
      t for t, _ in (short if spare < 0 else whole)]
  if spare < 0:
    with pytest.raises(InputError, match='none of 1 conversations'):
      of([row], length=len(short) + spare, train_turns='last')
  asked = encode(Task(kind='chat', max_new_tokens=4), [row], CHATML,
                 len(whole) + 4 - len(MESSAGES[-1]['content']) - 2)
  assert CHATML.decode(asked.prompts[0]).count('user') == 1


def test_rows_without_a_trained_part_are_counted_and_named(capsys):
  rows = [{'messages': MESSAGES[1:2]}, {'messages': MESSAGES},
          {'prompt': 'x' * 300, 'completion': 'a'}]
  said = []
  splits = data_lib.encode_rows(
      data_lib.Rows(rows, rows[1:2], rows[1:2], rows), Task(kind='chat'),
      CHATML, causal=True, limit=128, buckets=(64, 128),
      gold_only=('train', 'dev', 'test'), say=said.append)
  text = '\n'.join(said)
  assert '2 of 3 train rows are left out' in text
  assert 'row 0 has no message of the role assistant' in text
  assert 'row 2 needs' in text and 'more than 128' in text
  assert '[[Hello, you.<|im_end|>]]' in text  # the first row is shown
  assert len(splits.train.rows) == 1
  with pytest.raises(InputError, match='none of 1 conversations'):
    of(rows[:1])


def test_calls_of_tools_from_a_parquet_file(tmp_path):
  """Keys that other rows have are not written as null."""
  import pyarrow
  import pyarrow.parquet
  call = lambda **arguments: [MESSAGES[1], {
      'role': 'assistant', 'content': None, 'tool_calls': [
          {'function': {'name': 'f', 'arguments': arguments}}]}]
  rows = [{'messages': call(a=1)}, {'messages': call(b=2)}]
  pyarrow.parquet.write_table(
      pyarrow.Table.from_pylist(rows), tmp_path / 'x.parquet')
  form = dataclasses.replace(FORMS['chatml'], template=FORMS[
      'chatml'].template.replace(
          'm.content', "(m.content or m.tool_calls | tojson)"))
  tokenizer = chat_templates.tokenizer(form)
  found = data_lib.load_rows(str(tmp_path / 'x.parquet'))
  assert found != rows
  for i, arguments in enumerate(('{"a": 1}', '{"b": 2}')):
    assert arguments in trained(of(found, tokenizer), tokenizer, i)


def test_the_plain_template_begins_as_the_tokenizer_does():
  """With a start token only if it puts one before texts."""
  from tokenizers.processors import TemplateProcessing
  tokenizer = chat_templates.tokenizer(dataclasses.replace(
      FORMS['mistral'], template=None))
  assert '{{ bos_token }}' not in chat.read_template('plain', tokenizer)
  tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
      single='<s> $A', special_tokens=[('<s>', tokenizer.bos_token_id)])
  assert chat.read_template('plain', tokenizer).startswith('{{ bos_token }}')


def test_private_rows_are_not_logged():
  rows = [{'messages': MESSAGES}, {'messages': MESSAGES[1:2]}]
  said = []
  data_lib.encode_rows(
      data_lib.Rows(rows, rows[:1], rows[:1], rows), Task(kind='chat'), CHATML,
      causal=True, limit=128, buckets=(128,), untold=('train',),
      gold_only=('train', 'dev', 'test'), say=said.append)
  assert 'Hello' not in ''.join(said) and 'left out' not in ''.join(said)


def test_the_fingerprint_covers_what_is_trained():
  """Two conversations of equal tokens, of which different turns are trained."""
  ask = [MESSAGES[1], MESSAGES[2] | {'weight': 0}, *MESSAGES[3:]]
  three = [*MESSAGES[1:3], *ask]
  other = [*MESSAGES[1:3], MESSAGES[1], MESSAGES[2], *MESSAGES[3:]]
  one, two = of([{'messages': three}]), of([{'messages': other}])
  assert one.prompts == two.prompts and one.candidates == two.candidates
  assert fingerprint.of_rows(one) != fingerprint.of_rows(two)


def test_a_template_without_an_end_of_turn_is_reported():
  form = dataclasses.replace(FORMS['chatml'], template=(
      "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}"
      "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
  ))
  rows, said = [{'messages': MESSAGES}], []
  data_lib.encode_rows(
      data_lib.Rows(rows, rows, rows, rows), Task(kind='chat'),
      chat_templates.tokenizer(form), causal=True, limit=128, buckets=(128,),
      gold_only=('train', 'dev', 'test'), say=said.append)
  assert 'will not learn where to stop' in ''.join(said)


# --- runs -------------------------------------------------------------------


@pytest.fixture(scope='module')
def chat_dir(tmp_path_factory):
  """A tiny model with a byte-level tokenizer and the template of ChatML."""
  path = conftest.write_tiny_model(
      tmp_path_factory.mktemp('chat') / 'model', vocab_size=300)
  for file in path.glob('*token*'):
    file.unlink()
  CHATML.save_pretrained(path)
  return path


def some_rows(number):
  """Conversations of one or two turns."""
  return [{'messages': [
      {'role': 'user', 'content': f'Say {"abc"[i % 3]}.'},
      {'role': 'assistant', 'content': 'abc'[i % 3] * 2},
      *([{'role': 'user', 'content': 'Again.'},
         {'role': 'assistant', 'content': 'abc'[i % 3]}] if i % 2 else [])]}
          for i in range(number)]


@pytest.fixture
def config(chat_dir, tmp_path):
  """Returns a function that makes the config of a small run."""
  data = tmp_path / 'chat.jsonl'
  data.write_text(''.join(json.dumps(row) + '\n' for row in some_rows(60)))
  def make(**changes):
    made = runs.small_config(chat_dir, data)
    made.task = Task(kind='chat', max_new_tokens=4)
    made.data.num_train, made.data.num_dev, made.data.num_test = 40, 10, 10
    made.data.buckets = (64, 128)
    return runs.changed(made, **changes)
  return make


def test_the_loss_is_the_mean_over_trained_tokens(chat_dir):
  """Against log-softmax of the logits of each row alone."""
  model, params = models.load(chat_dir)
  data = of(some_rows(4))
  loss_fn = make_loss_fn(model, data, Task(kind='chat'), 'lm')
  batch = jax.tree.map(jnp.asarray, batch_of(data, np.arange(4), 128, 5))
  values, weights = loss_fn(params, batch)
  total = count = 0
  for row in range(4):
    found = marked(data, row)
    ids = jnp.array([[token for token, _ in found]])
    log_p = jax.nn.log_softmax(models.apply(
        model, params, ids, jnp.ones_like(ids))[0])
    for i, (token, is_trained) in enumerate(found):
      if is_trained:
        total, count = total - float(log_p[i - 1, token]), count + 1
  assert float(weights.sum()) == count
  np.testing.assert_allclose(
      float((values * weights).sum() / weights.sum()), total / count, rtol=1e-5)


def test_a_run_trains_on_conversations(config, tmp_path, capsys):
  """It is compared by its dev loss, its export answers as it does, and a run
  that was stopped goes on."""
  made = config(optimizer__learning_rate=3e-3, steps=60, eval_every=20,
                checkpoint_every=20, peft__method='lora', data__max_length=96,
                task__max_new_tokens=20)
  result = train.run(made, tmp_path / 'run')
  assert result['metric'] == 'loss'
  assert result['final']['loss'] < result['zero_shot']['loss']
  dev = [r for r in runs.records(tmp_path / 'run') if r['kind'] == 'dev']
  best = min(dev, key=lambda r: r['loss'])
  assert result['final']['step'] == best['step']
  log = capsys.readouterr().out
  assert '<|im_start|>assistant' in log and '[[' in log

  # Here answers may need more tokens than rows of training may have.
  rows = some_rows(5) + [{'messages': [{'role': 'user', 'content': 'Say a.'}]}]
  found, report = training.predict(tmp_path / 'run', rows, say=lambda t: None)
  assert [row.get('gold') for row in found] == [
      'aa', 'b', 'cc', 'a', 'bb', None]
  assert report['count'] == 5
  for merged in (False, True):
    where = export(tmp_path / 'run', tmp_path / f'out{merged}', merged=merged,
                   say=lambda t: None)
    assert training.predict(where, rows, say=lambda t: None)[0] == found


def test_a_template_from_a_file_travels_with_the_export(
    config, tmp_path, capsys):
  file = tmp_path / 'own.jinja'
  file.write_text(FORMS['phi 3'].template)
  made = config(task__chat_template=str(file), peft__method='lora')
  train.run(made, tmp_path / 'run')
  log = capsys.readouterr().out
  assert '<|assistant|>' in log and '<|im_start|>' not in log
  rows = some_rows(3)
  found = training.predict(tmp_path / 'run', rows, say=lambda t: None)[0]
  adapter, whole = (export(
      tmp_path / 'run', tmp_path / f'out{merged}', merged=merged,
      say=lambda t: None) for merged in (False, True))
  file.unlink()
  for where in (adapter, whole):
    assert training.predict(where, rows, say=lambda t: None)[0] == found


def test_conversations_as_prompts_of_rewards(config, tmp_path, capsys):
  """The model answers the conversation before the last message."""
  made = config(
      objective='reward', optimizer__learning_rate=1e-2, spsa__eps=1e-2,
      reward__function=f'{rewards_of_tests.__file__}:length', steps=2,
      eval_every=2)
  result = train.run(made, tmp_path / 'run')
  assert result['metric'] == 'reward' and 0 <= result['final']['reward'] <= 4
  assert 'assistant: aa user: Again. ->' in capsys.readouterr().out


@pytest.mark.parametrize('changes,message', [
    (dict(task__template='{text}'), 'leave task.template'),
    (dict(task__train_roles=()), 'train_roles is empty'),
    (dict(method='icl'), 'demonstrations'),
    (dict(task__kind='generation', task__template='{prompt}',
          task__train_turns='last'), "needs task.kind 'chat'"),
    (dict(task__metric='accuracy'), 'does not fit')])
def test_fields_that_do_not_fit_are_refused(config, tmp_path, changes, message):
  with pytest.raises(InputError, match=message):
    train.run(config(**changes), tmp_path / 'run')
