"""A config's fields from the command line: names, types, the default file."""

import typing

import conftest
import pytest
from runs import changed

from mezo_jax import tasks
from mezo_jax.cli import command_line
from mezo_jax.cli.command_line import read_config
from mezo_jax.core.errors import InputError
from mezo_jax.tasks import Task
from mezo_jax.training import checks, config_fields
from mezo_jax.training import config as config_lib
from mezo_jax.training.config import Also, Data

OWN = str(conftest.ROOT / 'configs/own.py')
VALUES = {  # by annotation, without what `Annotated` adds: (text, value), ...
    str: [('a b', 'a b'), ('', ''), ('3', '3'), ("it's", "it's")],
    int: [('3', 3), ('-1', -1), ('20_000', 20_000)],
    float: [('1e-2', 0.01), ('3', 3.0)],
    bool: [('True', True), ('false', False)],
    tuple[int, ...]: [('(8,16)', (8, 16)), ('8,16', (8, 16)), ('8', (8,)),
                      ('()', ())],
    tuple[str, ...]: [("(' a', ' b')", (' a', ' b')), ("' a',' b'", (
        ' a', ' b')), ('a', ('a',))],
    tuple[tuple[str, int], ...]: [("(('text', 40),)", (('text', 40),))],
    tuple[tuple[str, bool | int | str], ...]: [
        ("(('a', False), ('b', 3), ('c', 'x'))",
         (('a', False), ('b', 3), ('c', 'x')))],
    tuple[tuple[str, float, float], ...]: [
        ("(('lora_a$', 1e-4, 1e-3),)", (('lora_a$', 1e-4, 1e-3),))],
    tuple[Also, ...]: [('()', ())],
    str | None: [('a b', 'a b'), ('', ''), ('None', None)],
    config_lib.Objective: [('accuracy', 'accuracy'), ('', '')],
    'row': [('None', None)]}


def _leaf(config, path):
  for name in path.split('.'):
    config = getattr(config, name)
  return config


def _hint(path):
  cls = config_lib.Train
  for name in path.split('.'):
    cls = typing.get_type_hints(cls)[name]
  return cls


def _examples(path):
  hint = _hint(path)
  if path == 'task.row':
    return VALUES['row']
  if path == 'optimizer.learning_rate':
    return [*VALUES[float], ('auto', 'auto')]
  if path in ('objective', 'reward.function'):
    return VALUES[config_lib.Objective]
  if typing.get_origin(hint) is typing.Literal:
    return [(name, name) for name in typing.get_args(hint)]
  return VALUES[hint]


def test_every_field_is_set_on_the_command_line():
  """With each of the values that its type documents."""
  paths = [*config_fields.leaves()]
  assert len(paths) > 100
  assert {'objective', 'task.row', 'task.calibration', 'also', 'spsa.eps',
          'mesh.fsdp', 'model.remat'} <= {*paths}
  for number in range(max(len(_examples(path)) for path in paths)):
    given = {path: _examples(path)[min(number, len(_examples(path)) - 1)]
             for path in paths}
    config = read_config(
        OWN, [f'--config.{path}={text}' for path, (text, _) in given.items()])
    for path, (text, value) in given.items():
      found = _leaf(config, path)
      assert found == value and type(found) is type(value), (path, text, found)
    config_fields.check_types(config)


def test_a_function_of_the_file_gives_way_to_a_name(tmp_path):
  path = tmp_path / 'c.py'
  path.write_text('''
from mezo_jax.training.config import *
from mezo_jax.tasks import Task
def get_config():
  return Train(objective=lambda p, e: 1.0, task=Task(calibration='x'),
               also=(Also('b', Task(), Data()),))
''')
  assert callable(read_config(str(path)).objective)
  config = read_config(str(path), [
      '--config.objective=f1', '--config.task.calibration=None',
      '--config.also[0].weight=2', '--config.also[0].data.num_train=7',
      '--config.model.remat'])
  assert (config.objective, config.task.calibration) == ('f1', None)
  assert (config.also[0].weight, config.also[0].data.num_train) == (2.0, 7)
  assert config.model.remat


@pytest.mark.parametrize('argument,message', [
    ('optimizer.lr=1', "'optimizer.lr'.*optimizer.learning_rate"),
    ('learning_rate=1', 'optimizer.learning_rate'),
    ('spsa.learning_rate=1', 'optimizer.learning_rate'),
    ('eps=1', r'spsa\.eps\?'), ('train=x', r'data\.train\?'),
    ('optimizer.shedule=x', r'optimizer\.schedule\?'),
    ('model.nmae=x', 'model.name'),
    ('data.num_tset=5', 'data.num_test'),
    ('objectives=x', 'objective or task.objective'),
    ('zzz=1', "'zzz'"),
    ('objective.x=1', "'objective.x'"),
    ('also[0].wieght=1', r"'also\[0\].wieght'"),
    ('also[0].weight=1', r'--config\.also\[N\]'),
    ('also.weight=2', r'--config\.also\[0\]\.weight'),
    ('model=gpt2', '--config.model.name'),
    ('task.row=f', 'config.task.row=f'), ('also=rte', 'config.also=rte'),
    ('steps=many', 'config.steps=many'),
    ('', "field ''"),
    ('task.label_words=a,b', r"task.label_words .*\('a,b',\)"),
    ('task.label_names=a,b', r"task.label_names \('a,b',\)"),
    ('spsa.eps=small', 'spsa.eps=small')])
def test_what_cannot_be_set(argument, message):
  with pytest.raises(InputError, match=message):
    checks.check_config(read_config(OWN, [
        '--config.task.template={text}',
        *(["--config.task.label_words=(' no', ' yes')"] if (
            'label_words' not in argument) else []), f'--config.{argument}']))


def test_a_tuple_that_is_given_twice():
  with pytest.raises(InputError, match='data.buckets .* 2 '):
    read_config(OWN, ['--config.data.buckets=8', '--config.steps=3',
                              '--config.data.buckets=16'])
  twice = ['--config.steps=3', '--config.steps=4']
  assert read_config(OWN, twice).steps == 4


@pytest.mark.parametrize('changes', [
    dict(task__template='{text}\\nIt was'), dict(task__calibration='It\\twas')])
def test_a_backslash_where_a_line_break_is_meant(changes):
  """A shell does not read it, as Python and the flags of tuples do."""
  config = changed(_fine(), **changes)
  name, = changes
  with pytest.raises(InputError, match='backslash'):
    checks.check_given(config, [name.replace('__', '.')])
  checks.check_given(config, ['task.label_column'])
  checks.check_given(changed(_fine(), task__template='{text}\nIt'),
                     ['task.template'])


def test_a_switch_that_is_given_a_value():
  with pytest.raises(InputError, match='--noconfig.zero_shot'):
    read_config(OWN, ['--noconfig.zero_shot=1'])
  assert not read_config(OWN, ['--noconfig.zero_shot']).zero_shot


def test_the_name_of_a_declared_task_is_not_the_task():
  config = changed(_fine(), task__name='sst2')
  with pytest.raises(InputError, match='--config.task.name=sst2'):
    checks.check_given(config, ['task.name'])
  checks.check_given(changed(config, task__name='mine'), ['task.name'])
  config.task = tasks.get('sst2')
  checks.check_given(config, ['task.name'])


@pytest.mark.parametrize('body,message', [
    ('return Train(optimizer=Optimizer(lr=1))',
     "'optimizer.lr'.*optimizer.learning_rate"),
    ('return Train(step=1)', "'step'.*steps"),
    ('return {}', 'dict .*config.Train'),
    ('pass', 'NoneType .*config.Train'),
    ('return Train(steps=s)', r"c\.py, line 3 .*NameError: .*'s'"),
    ('return (]', r'c\.py .*SyntaxError: .*line 3'),
    ('return [][0]', 'line 3 .*IndexError'),
    ('return None + 1', 'line 3 .*TypeError'),
    ('raise KeyError("no variant x")', 'no variant x'),
    ('assert False', 'line 3 .*AssertionError')])
def test_what_a_config_file_gets_wrong(tmp_path, body, message):
  path = tmp_path / 'c.py'
  path.write_text('from mezo_jax.training.config import *\n'
                  f'def get_config():\n  {body}\n')
  with pytest.raises(InputError, match=message):
    read_config(str(path))


def _fine():
  return config_lib.Train(task=Task(
      template='{text} It was', label_words=(' terrible', ' great')))


@pytest.mark.parametrize('changes,message', [
    (dict(steps='5'), "steps .*'5'"),
    (dict(steps=True), 'steps .*True'),
    (dict(data__buckets=('a', 'b')), "data.buckets .*'a', 'b'"),
    (dict(data__buckets=16), 'data.buckets .*16'),
    (dict(task__label_words=(1, 2)), 'task.label_words .*1, 2'),
    (dict(task__label_words='ab'), "task.label_words .*'ab'"),
    (dict(task__calibration=3), 'task.calibration .*3'),
    (dict(task__row='f'), "task.row .*'f'"),
    (dict(objective=3), 'objective .*3'),
    (dict(spsa__eps='1e-3'), "spsa.eps .*'1e-3'"),
    (dict(model__remat=1), 'model.remat .*1'),
    (dict(model='gpt2'), "model .*'gpt2'"),
    (dict(also=(Data(),)), r'also .*\(Data\('),
    (dict(objective=lambda p: 0), r'objective .*\(predictions, examples\)')])
def test_values_of_another_type(changes, message):
  checks.check_config(_fine())
  with pytest.raises(InputError, match=message):
    checks.check_config(changed(_fine(), **changes))


def test_a_field_that_a_config_file_invents():
  config = _fine()
  config.optimizer.lr = 1e-4
  with pytest.raises(InputError, match="'optimizer.lr'.*learning_rate"):
    checks.check_config(config)
  config = changed(_fine(), also=(Also('b', _fine().task, Data()),))
  config.also[0].data.train_rows = 3
  with pytest.raises(InputError, match=r"'also\[0\].data.train_rows'"):
    checks.check_config(config)


@pytest.mark.parametrize('changes,given,message', [
    (dict(method='finetune'), 'spsa.eps', "method 'finetune'"),
    (dict(), 'optimizer.name', "method 'mezo'"),
    (dict(), 'variant.every', 'svrg'),
    (dict(), 'privacy.epsilon', 'only private'),
    (dict(), 'spsa.rank', "spsa.distribution 'normal'"),
    (dict(), 'num_demos', 'only icl'),
    (dict(), 'peft.rank', 'lora'),
    (dict(), 'peft.num_tokens', 'prefix, prompt'),
    (dict(), 'task.max_new_tokens', "task.kind 'classification'"),
    (dict(), 'task.choices', "task.kind 'classification'"),
    (dict(data__k_shot=4), 'data.num_train', 'data.k_shot')])
def test_fields_that_change_nothing(changes, given, message):
  config = changed(_fine(), **changes)
  with pytest.raises(InputError, match=f'--config.{given} .*'
                     + message):
    checks.check_given(config, ['steps', given])
  checks.check_given(config, ['steps', 'optimizer.learning_rate', 'task.kind'])


def test_fields_that_do_apply():
  for changes, given in (
      (dict(), 'spsa.eps'), (dict(method='finetune'), 'optimizer.name'),
      (dict(method='svrg'), 'variant.every'),
      (dict(peft__method='lora'), 'peft.rank'),
      (dict(spsa__distribution='low_rank'), 'spsa.rank'),
      (dict(method='icl'), 'num_demos'),
      (dict(method='zero_shot'), 'spsa.eps')):  # to compare with training
    checks.check_given(changed(_fine(), **changes), [given])


@pytest.mark.parametrize('given,name', [
    ([], 'quickstart'), (['--config.steps=3'], 'quickstart'),
    (['--config.data.train=quickstart'], 'quickstart'),
    (['--config.data.train', 'quickstart'], 'quickstart'),
    (['--config.data.train=x.csv'], 'own'),
    (['-config.data.train=x.csv'], 'own'),
    (['--config.data.train', 'x.csv'], 'own'),
    (['--config.task.hub=nyu-mll/glue'], 'own')])
def test_the_default_config(given, name):
  argv = command_line._config_first(
      conftest.ROOT / 'configs', ['train.py', *given])
  assert argv == ['train.py', f'--config={conftest.ROOT}/configs/{name}.py',
                  *given]


@pytest.mark.parametrize('flag', [
    ['--config=x.py'], ['--config', 'x.py'], ['-config=x.py']])
def test_the_config_s_file_comes_first(flag, tmp_path, monkeypatch):
  (tmp_path / 'x.py').touch()
  monkeypatch.chdir(tmp_path)
  argv = command_line._config_first(conftest.ROOT, [
      'train.py', '--config.data.train=a', *flag, '--workdir=w'])
  assert argv[1].endswith('config=x.py') and argv[2:] == [
      '--config.data.train=a', '--workdir=w']
