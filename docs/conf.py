"""Configures the documentation site.

  pip install -e '.[train,docs]'
  sphinx-build -W --keep-going docs docs/_build/html

The first build runs the code of the pages, which takes some minutes; later ones
run only what has changed.
"""

import os
from pathlib import Path
import re
import sys

sys.path.insert(0, str(Path(__file__).parent))  # from_code
# The pages' code must not depend on the machine: no accelerator, no downloads.
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['HF_HUB_OFFLINE'] = '1'

import from_code

import mezo_jax

project = 'mezo_jax'
author = copyright = 'the mezo_jax maintainers'
version = release = mezo_jax.__version__

extensions = [
    'myst_nb', 'sphinx.ext.autodoc', 'sphinx.ext.mathjax',
    'sphinx.ext.napoleon', 'sphinx_copybutton', 'sphinx_design']
# The inventories of other sites need a network, and a build without one would
# warn about each. So only a build that asks for them links to these sites.
if os.environ.get('DOCS_LINK_OTHERS'):
  extensions.append('sphinx.ext.intersphinx')
  intersphinx_mapping = {
      'jax': ('https://docs.jax.dev/en/latest', None),
      'optax': ('https://optax.readthedocs.io/en/latest', None),
      'python': ('https://docs.python.org/3', None)}

# Docstrings name things as `mezo_jax.spsa`, which becomes a link.
default_role = 'py:obj'
autodoc_member_order = 'bysource'
autodoc_preserve_defaults = True
autodoc_typehints = 'signature'
autodoc_typehints_format = 'short'
maximum_signature_line_length = 76
python_use_unqualified_type_names = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False

myst_enable_extensions = ['amsmath', 'colon_fence', 'deflist', 'dollarmath']
myst_heading_anchors = 3
nb_execution_mode = 'cache'
nb_execution_raise_on_error = True
nb_execution_timeout = 600  # seconds of a cell
nb_merge_streams = True
copybutton_prompt_text = r'\$ |>>> '
copybutton_prompt_is_regexp = True

exclude_patterns = ['_build', 'jupyter_execute']
html_theme = 'sphinx_book_theme'
html_title = 'mezo_jax'
html_static_path = ['_static']
html_css_files = ['site.css']
html_theme_options = {
    'show_navbar_depth': 1, 'show_toc_level': 2,
    'use_download_button': True, 'use_fullscreen_button': False,
    'navbar_persistent': []}  # the sidebar has the search


def links_of_root(app, path, parent, content):
  """Makes the links of an included file of the root work on the site.

  Links to pages of docs/ and to files that have a page become links to these
  pages; the path of any other file is shown as code.
  """
  del app, parent
  if path.parts[0] != '..':
    return
  pages = {'CHANGELOG.md': 'changelog.md', 'CONTRIBUTING.md': 'contributing.md'}

  def replace(match):
    text, target = match.groups()
    if '://' in target:
      return match.group()
    if target.startswith('docs/') or target in pages:
      return f'[{text}]({pages.get(target, target.removeprefix("docs/"))})'
    return f'`{target}`'

  content[0] = re.sub(r'\[([^]]+)\]\(([^)]+)\)', replace, content[0])


def plurals(app, what, name, obj, options, lines):
  """Ends the markup of a name before a plural's s, as in `QuantizedArray`s."""
  del app, what, name, obj, options
  lines[:] = [re.sub(r'(?<!`)(`[^`]+`)s\b', r'\1\\s', line) for line in lines]


# autodoc writes type aliases out in full and uses private modules. These are
# replaced by the public names.
_ARRAY = ('~jax.jaxlib._jax.Array | ~numpy.ndarray | ~numpy.bool | '
          '~numpy.number | bool | int | float | complex')
_NAMES = {
    _ARRAY: '~jax.typing.ArrayLike',
    '~collections.abc.Callable[[~jax.typing.ArrayLike], '
    '~jax.typing.ArrayLike]': '~optax.Schedule',
    'str | type[~typing.Any] | ~numpy.dtype | ~jax._src.typing.SupportsDType':
        '~jax.typing.DTypeLike',
    '~jax.jaxlib._jax.': '~jax.',
    '~jax._src.mesh.': '~jax.sharding.',
    '~optax._src.base.': '~optax.'}


def short_signature(app, what, name, obj, options, signature, returned):
  """Writes types by their public names."""
  del app, what, name, obj, options
  for long, short in _NAMES.items():
    signature = signature and signature.replace(long, short)
    returned = returned and returned.replace(long, short)
  return signature, returned


def setup(app):
  app.connect('autodoc-process-signature', short_signature)
  app.connect('autodoc-process-docstring', plurals)
  app.connect('include-read', links_of_root)
  from_code.setup(app)
