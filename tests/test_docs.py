"""The documentation: pages, links, and what is documented of the code."""

import importlib.util
import re
import sys
import types

import conftest
import pytest

import mezo_jax
from mezo_jax import models, peft, replay, sharding, tasks, training, variants

DOCS = conftest.ROOT / 'docs'
PAGES = sorted(DOCS.glob('*.md'))
ROOT_FILES = [conftest.ROOT / name for name in (
    'README.md', 'CONTRIBUTING.md', 'CHANGELOG.md')]


def module(name):
  """Imports a script of docs/, which are not in a package."""
  spec = importlib.util.spec_from_file_location(name, DOCS / f'{name}.py')
  found = importlib.util.module_from_spec(spec)
  sys.modules[name] = found
  spec.loader.exec_module(found)
  return found


def without_code(text):
  """Returns a page without blocks of code and included files."""
  return re.sub(r'^( *)(`{3,}|:{3,}\{eval-rst\}).*?^\1\2 *$', '', text,
                flags=re.MULTILINE | re.DOTALL)


def anchors(text):
  """Returns the names that a link to a page may end with."""
  found = {*re.findall(r'^\(([\w-]+)\)=$', text, re.MULTILINE)}
  for heading in re.findall(r'^#+ +(.+)$', without_code(text), re.MULTILINE):
    heading = re.sub(r'\[([^]]*)\]\([^)]*\)', r'\1', heading)
    heading = heading.lower()
    found.add(re.sub(r'[^\w\- ]', '', heading).replace(' ', '-'))
    found.add(re.sub(r'[^a-z0-9]+', '-', heading).strip('-'))  # its id
  return found


# --- links ------------------------------------------------------------------


@pytest.mark.parametrize('file', [*PAGES, *ROOT_FILES], ids=lambda f: f.name)
def test_links_lead_to_files_and_headings(file):
  text = without_code(file.read_text())
  text = re.sub(r'`[^`\n]*`', '', text)
  for target in re.findall(r'\]\(([^)\s]+)\)', text) + re.findall(
      r'^:link: (\S+)$', file.read_text(), re.MULTILINE):
    if re.match(r'\w+:', target):
      continue  # an address
    path, _, anchor = target.partition('#')
    found = file.parent / path if path else file
    if not found.exists() and (found.parent / f'{found.name}.md').exists():
      found = found.parent / f'{found.name}.md'  # of a card
    assert found.exists(), f'{file.name} links to {target}'
    if file in PAGES:  # other folders are not on the site
      assert found.resolve().parent == DOCS, f'{file.name} links to {target}'
    if anchor and found.suffix == '.md':
      assert anchor in anchors(found.read_text()), f'{file.name}: {target}'


def test_pages_that_the_code_names_exist():
  for folder in ('benchmarks', 'configs', 'examples', 'mezo_jax', 'tests'):
    for file in sorted((conftest.ROOT / folder).rglob('*.py')):
      for page in re.findall(r'\bdocs/\w+\.\w+', file.read_text()):
        assert (conftest.ROOT / page).exists(), f'{file} names {page}'


def test_each_page_is_in_the_table_of_contents():
  index = (DOCS / 'index.md').read_text()
  named = [line for block in re.findall(
      r'^```\{toctree\}$(.*?)^```$', index, re.MULTILINE | re.DOTALL)
           for line in re.findall(r'^\w+$', block, re.MULTILINE)]
  assert sorted(named) == sorted(
      page.stem for page in PAGES if page.stem != 'index')


def test_figures_show_the_tables_as_they_are():
  for name, draw in module('figures').FIGURES.items():
    assert draw() == (DOCS / name).read_text(), 'run python docs/figures.py'


# --- the API ----------------------------------------------------------------


def public(owner):
  """Returns the public names of a module."""
  return getattr(owner, '__all__', None) or [
      name for name, value in vars(owner).items()
      if not name.startswith('_')
      and getattr(value, '__module__', '') == owner.__name__]


@pytest.mark.parametrize('name,owner', [
    ('mezo_jax', mezo_jax), *((f'mezo_jax.{name}', owner) for name, owner in (
        ('models', models), ('peft', peft), ('replay', replay),
        ('sharding', sharding), ('tasks', tasks), ('training', training),
        ('variants', variants)))])
def test_each_public_name_is_documented_once(name, owner):
  page = (DOCS / 'api.md').read_text()
  documented = re.findall(
      r'^\.\. (?:auto\w+|py:data):: (\S+)$', page, re.MULTILINE)
  assert len(documented) == len({*documented})
  wanted = {f'{name}.{each}' for each in public(owner)}
  assert wanted <= {*documented}
  here = {each for each in documented if each.rpartition('.')[0] == name}
  # Rooms have a section instead of an entry.
  assert {each for each in here - wanted if not isinstance(
      getattr(owner, each.rpartition('.')[2], None), types.ModuleType)} == set()


# --- the configuration ------------------------------------------------------


def test_each_field_of_a_config_is_explained():
  from_code = module('from_code')
  page = (DOCS / 'configuration.md').read_text()
  blocks = dict(re.findall(
      r'^```\{config-fields\} (\w+)\n(.*?)^```$', page,
      re.MULTILINE | re.DOTALL))
  assert blocks.keys() == from_code.GROUPS.keys()
  for group, text in blocks.items():
    for row in from_code.rows(
        group, from_code.explanations(text.splitlines())):
      assert row.text, f'{row.path} has no comment'


def test_all_groups_of_fields_have_a_table():
  from_code = module('from_code')
  from mezo_jax.training.config_fields import leaves
  shown = {row.path for group in from_code.GROUPS
           for row in from_code.rows(group)}
  assert {*leaves()} == {path for path in shown if 'also[0]' not in path}
