"""Provides directives for what the pages take from the code.

    ```{config-fields} Optimizer
    weight_decay: An explanation of a field without a comment.
    ```

    ```{methods}
    ```

    ```{command} train --help
    ```

`config-fields` is the table of a group of a config's fields, `methods` that of
the methods. The explanation of a field is its comment in the code: the lines
above it and the end of its line. The directive's content explains fields
without a comment. `command` runs ``mezo-jax`` and shows what it prints; its
option ``:status:`` is the exit status that is expected, 0 if it is left out.
"""

import collections.abc
from collections.abc import Iterable, Sequence
import dataclasses
import functools
import inspect
import os
from pathlib import Path
import re
import shlex
import subprocess
import sys
import tempfile
import tokenize
import types
import typing

import mezo_jax
from mezo_jax.core import reports
from mezo_jax.tasks import Task
from mezo_jax.training import config, methods

# The groups of fields, by the name of their class, and what their paths begin
# with on a command line.
GROUPS = {'Train': (config.Train, ''), 'Task': (Task, 'task.')} | {
    cls.__name__: (cls, f'{cls.__name__.lower()}.') for cls in (
        config.Model, config.Data, config.Optimizer, config.Spsa,
        config.Reward, config.Privacy, config.Peft, config.Mesh,
        methods.Variant)
} | {'Also': (config.Also, 'also[0].')}


@dataclasses.dataclass
class Row:
  """Holds what a table shows of a field: path, type, default, explanation."""

  path: str
  type: str
  default: str
  text: str


def rows(group: str, given: dict[str, str] | None = None) -> list[Row]:
  """Returns the fields of a group that hold a value.

  Args:
    group: A key of `GROUPS`.
    given: Explanations of fields that have no comment.

  Raises:
    ValueError: if an explanation is given for a field that does not exist.
  """
  cls, before = GROUPS[group]
  given = dict(given or {})
  hints, found = typing.get_type_hints(cls), []
  comments = _comments(cls)
  for field in dataclasses.fields(cls):
    hint = hints[field.name]
    if dataclasses.is_dataclass(hint):
      continue  # its fields have a table of their own
    default = _default(field)
    otherwise = given.pop(field.name, '')
    text = _sentence(comments.get(field.name, ''), default) or otherwise
    found.append(Row(before + field.name, _type(hint), default, text))
  if given:
    raise ValueError(f'{group} has no field {", ".join(given)}')
  return found


def table(group: str, given: dict[str, str] | None = None) -> str:
  """Returns the Markdown table of a group's fields."""
  return _table(('Field', 'Type', 'Default', 'What it does'), [
      (_code(row.path), _code(row.type), _code(row.default), row.text)
      for row in rows(group, given)])


def methods_table() -> str:
  """Returns the Markdown table of the methods."""
  found = []
  for name, method in methods.METHODS.items():
    reads = ', '.join(_code(f'variant.{field}') for field in method.reads)
    if method.private:
      reads = '`privacy.*`'
    words = method.words.format(optimizer='`optimizer.name`')
    found.append((_code(name), words[0].upper() + words[1:], reads))
  return _table(('`method`', 'What it is', 'Options that it reads'), found)


def explanations(lines: Iterable[str]) -> dict[str, str]:
  """Returns the explanations in a directive's content. A line that begins with
  a space continues the one before it."""
  text = re.sub(r'\n\s+', ' ', '\n'.join(lines))
  pairs = [line.split(': ', 1) for line in text.splitlines() if line.strip()]
  return {name: value for name, value in pairs}


# --- from the code ----------------------------------------------------------


@functools.cache
def _comments(cls: type) -> dict[str, str]:
  """Returns the comment of each field of a class: the block of comment lines
  above it, and the one at the end of its line."""
  found, above = {}, []
  lines = inspect.getsource(cls).splitlines()
  for line in lines:
    block = re.fullmatch(r'\s*# ?(.*)', line)
    field = re.match(r'  (\w+): [^=]+(=|$)', line)
    if block:
      above.append(block.group(1))
    elif field and not line.endswith('"""'):
      above = [' '.join(above), _trailing(line)]
      found[field.group(1)] = ' '.join(
          _capital(part).rstrip('.') + '.' for part in above if part)
      above = []
    elif not re.match(r'    ', line):  # not the rest of a field's value
      above = []
  return found


def _trailing(line: str) -> str:
  """Returns the comment at the end of a line of code."""
  with_newline = iter([line.strip() + '\n'])
  try:
    for token in tokenize.generate_tokens(lambda: next(with_newline, '')):
      if token.type == tokenize.COMMENT:
        return token.string.lstrip('# ')
  except tokenize.TokenError:  # the value goes on in the next line
    pass
  return ''


def _capital(text: str) -> str:
  """Returns a text with a capital, unless it begins with names of methods."""
  if re.match(r'[.\w]+(, [.\w]+)*: ', text):
    return text
  return text[:1].upper() + text[1:]


def _sentence(text: str, default: str) -> str:
  """Returns a comment as Markdown: literals and the methods that read an option
  are code, and the name of a page is a link. What begins with 'or' is preceded
  by the default."""
  if re.match(r'[Oo]r ', text):
    text = f'{default} {text[0].lower()}{text[1:]}'
  text = re.sub(r"(?<!\w)'[^' ]*'", lambda m: _code(m.group()), text)
  text = re.sub(rf'(?<![\w.`])({"|".join(methods.METHODS)})(?=[,:])',
                lambda m: _code(m.group()), text)
  return re.sub(r'\bdocs/(\w+\.md)', r'[\1](\1)', text)


def _default(field: dataclasses.Field) -> str:
  """Returns the default of a field as Python code, or 'required'."""
  if field.default is not dataclasses.MISSING:
    value = field.default
    if isinstance(value, int) and not isinstance(value, bool):
      return f'{value:,}'.replace(',', '_')
    return repr(value)
  return 'required'


def _type(hint: typing.Any) -> str:
  """Returns the name of a type, as a reader of a config file thinks of it."""
  if typing.get_origin(hint) in (typing.Union, types.UnionType):
    return ' or '.join(map(_type, typing.get_args(hint)))
  if collections.abc.Callable in (hint, typing.get_origin(hint)):
    return 'function'
  if typing.get_origin(hint) is typing.Literal:
    return 'one of ' + ', '.join(map(repr, typing.get_args(hint)))
  if hint is type(None):
    return 'None'
  if isinstance(hint, type) and not typing.get_args(hint):
    return hint.__name__
  return re.sub(r'(\w+\.)+(?=\w)', '', str(hint))


def output(line: str, status: int = 0) -> str:
  """Returns a command line of ``mezo-jax`` and what it prints.

  It runs in an empty folder, so that it prints no path of this machine.

  Raises:
    ValueError: if its exit status is not the expected one.
  """
  root = str(Path(mezo_jax.__file__).parents[1])
  paths = [root, os.environ.get('PYTHONPATH', '')]
  with tempfile.TemporaryDirectory() as folder:
    done = subprocess.run(
        [sys.executable, '-m', 'mezo_jax', *shlex.split(line)], cwd=folder,
        env=os.environ | {'PYTHONPATH': os.pathsep.join(filter(None, paths))},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
  if done.returncode != status:
    raise ValueError(f'mezo-jax {line}: status {done.returncode} instead of '
                     f'{status}: {done.stdout}')
  return f'$ mezo-jax {line}\n{done.stdout}'.rstrip()


# --- as Markdown ------------------------------------------------------------


def _code(text: str) -> str:
  """Returns a text as inline code."""
  return f'`{text}`'


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
  """Returns a Markdown table whose cells may contain vertical bars."""
  return reports.markdown_table([
      dict(zip(head, (cell.replace('|', r'\|') for cell in cells)))
      for cells in body])


def setup(app):
  """Adds the directives to Sphinx."""
  from docutils import nodes
  from docutils.statemachine import StringList
  from sphinx.util.docutils import SphinxDirective

  class Table(SphinxDirective):

    def parsed(self, text: str) -> list[nodes.Node]:
      for module in (config, methods, inspect.getmodule(Task)):
        self.env.note_dependency(module.__file__)
      holder = nodes.Element()
      self.state.nested_parse(
          StringList(text.splitlines(), source=self.env.docname), 0, holder)
      return holder.children

  class ConfigFields(Table):
    required_arguments = 1
    has_content = True

    def run(self):
      return self.parsed(
          table(self.arguments[0], explanations(self.content)))

  class Methods(Table):

    def run(self):
      return self.parsed(methods_table())

  class Command(SphinxDirective):
    required_arguments = 1
    final_argument_whitespace = True
    option_spec = {'status': int}

    def run(self):
      text = output(self.arguments[0], self.options.get('status', 0))
      node = nodes.literal_block(text, text, language='console')
      node['classes'].append('command')
      return [node]

  app.add_directive('config-fields', ConfigFields)
  app.add_directive('methods', Methods)
  app.add_directive('command', Command)
