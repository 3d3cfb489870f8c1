"""Checkpoints: Hugging Face directories and GGUF files to sharded parameters.

Nothing here needs torch. Each device's slice of each parameter is read straight
from the files: host memory above the result is one shard of one parameter.
"""

from collections.abc import Iterable
import contextlib
import dataclasses
import functools
import json
import os
from pathlib import Path
import re
from typing import Any

from flax.traverse_util import unflatten_dict
import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from mezo_jax.core import sharding
from mezo_jax.core.errors import InputError, MissingError
from mezo_jax.core.quantized import QUANTISED
from mezo_jax.models import transformer
from mezo_jax.models.families import bert, gemma, gpt2, llama, opt, table
from mezo_jax.models.families.config_json import check_sizes
from mezo_jax.models.formats import gguf, quantize, weights
from mezo_jax.models.layers import Config

FAMILIES = {
    'bert': bert, 'gemma': gemma, 'gemma2': gemma, 'gemma3_text': gemma,
    'gpt2': gpt2, 'llama': llama, 'mistral': llama, 'opt': opt, 'qwen2': llama,
    'qwen3': llama, 'roberta': bert}
ARCHITECTURES = {  # transformers' classes: with the head, and without it
    'bert': ('BertForMaskedLM', 'BertModel'),
    'gemma': ('GemmaForCausalLM', 'GemmaModel'),
    'gemma2': ('Gemma2ForCausalLM', 'Gemma2Model'),
    'gemma3_text': ('Gemma3ForCausalLM', 'Gemma3TextModel'),
    'gpt2': ('GPT2LMHeadModel', 'GPT2Model'),
    'llama': ('LlamaForCausalLM', 'LlamaModel'),
    'mistral': ('MistralForCausalLM', 'MistralModel'),
    'opt': ('OPTForCausalLM', 'OPTModel'),
    'qwen2': ('Qwen2ForCausalLM', 'Qwen2Model'),
    'qwen3': ('Qwen3ForCausalLM', 'Qwen3Model'),
    'roberta': ('RobertaForMaskedLM', 'RobertaModel')}
# transformers' classes with another head than a language model's, and the
# tensors of these heads. AutoModel reads the body of such files.
_CLASSIFIERS = re.compile(
    'For(SequenceClassification|TokenClassification|QuestionAnswering|'
    'MultipleChoice|NextSentencePrediction)$')
_OF_CLASSIFIERS = re.compile(
    r'^(score|qa_outputs|classifier(\.dense|\.out_proj)?)\.(weight|bias)$')
_OTHER_HEADS = re.compile(
    rf'{_OF_CLASSIFIERS.pattern}|'
    r'^(multiple_choice_head|v_head)\.summary\.(weight|bias)$')


def load(name_or_dir: str | os.PathLike[str],
         mesh: jax.sharding.Mesh | None = None,
         dtype: jax.typing.DTypeLike | None = None, progress: bool = True,
         revision: str | None = None, offload: bool = False
         ) -> tuple[transformer.Transformer, dict[str, Any]]:
  """Loads a language model.

  Args:
    name_or_dir: a directory with ``config.json`` and safetensors files (or, as
      older checkpoints have them, ``pytorch_model*.bin``), a ``.gguf`` file, or
      the id of a Hugging Face repository.
    mesh: parameters are sharded over its `fsdp` and `tensor` axes as they are
      read (see `mezo_jax.sharding.make_mesh`); None for the default device.
      These axes must not be Explicit.
    dtype: of the parameters, such as 'float32' or jnp.bfloat16; None for the
      checkpoint's own. With 'int8' and 'int4' matrices are quantised as they
      are read, with 'codes' they keep a GGUF file's own codes (Q8_0, Q4_0,
      Q4_1): they are `mezo_jax.QuantizedArray`, the rest is float32, and
      ``mezo_jax.dequantized(lambda p: model.apply({'params': p}, ...))``
      applies the model.
    progress: whether to show a progress bar.
    revision: branch, tag or commit of a Hugging Face repository.
    offload: put the layers' matrices into the host's memory, where a program
      takes them from one layer at a time; see `mezo_jax.sharding.on_host`.

  Returns:
    ``model, params``: a `Transformer` and its plain nested dict, so that
    ``model.apply({'params': params}, input_ids, attention_mask)`` gives float32
    logits [batch, length, vocab]; ``model.config`` is the frozen config. From
    files without the language model's head, those of a base class
    (``BertModel``) or of a classifier (``...ForSequenceClassification``), the
    body alone is read: ``config.head`` is False, and the model gives features
    only. A base class whose head is the embedding lacks nothing.

  Raises:
    FileNotFoundError: if there is no such model.
    ValueError: if its family is not supported, or its tensors do not fit the
      config (all misfits are named at once).
  """
  float_dtype(dtype)  # it is one
  _check_mesh(mesh)
  path = find(name_or_dir, revision)
  config = load_config(path)
  with contextlib.ExitStack() as stack:
    if path.suffix == '.gguf':
      found = list(gguf.open_file(path)[1].items())
    else:
      found = weights.open_files(path, stack)
    if dtype == 'codes' and path.suffix != '.gguf':
      raise InputError(f"{path} has no codes: dtype 'codes' needs a .gguf "
                       "file; take 'int8' or 'int4'.")
    rows = table_of(config)
    tensors = _fit(rows, config, found, path)
    params = {}
    for row in tqdm(rows, f'loading {path.name}', unit='param',
                    disable=not progress or jax.process_index() > 0):
      form = quantize.form(row, dtype, tensors, config.num_layers)
      params[row.path] = (
          _read(row, config, tensors, mesh, float_dtype(dtype), offload)
          if form is None else quantize.read(
              row, _shape(row, config), form, tensors,
              lambda shape, row=row: _place(row, shape, mesh) or _here()))
  return transformer.Transformer(config), unflatten_dict(params, sep='/')


def load_config(name_or_dir: str | os.PathLike[str], revision: str | None = None
                ) -> Config:
  """Returns the `Config` of a model without its weights.

  The arguments are those of `load`.

  The names in the model's files decide whether it has a head. Where these are
  not at hand, as for a hub id, ``architectures`` in its config decides. A head
  that only the config ties to the embedding is found where the files are.
  """
  path = find(name_or_dir, revision, weights=False)
  if path.suffix == '.gguf':
    return read_config(gguf.open_file(path)[0], path)
  try:
    hf = json.loads((path / 'config.json').read_text())
  except ValueError as e:
    raise InputError(f'{path}/config.json is not JSON ({e}).') from e
  if (path / 'adapter_config.json').is_file():
    raise InputError(
        f'{path} has an adapter_config.json next to config.json: transformers '
        'adds its adapter to the model that it names. Load that model, and '
        'the adapter with mezo_jax.peft.load; or remove adapter_config.json '
        'if the weights of the adapter are merged already.')
  config = read_config(hf, path)
  names = weights.names(path)
  config = _with_head(config, names) if names else config
  if config.tied_head and _pairs(config, names):
    with contextlib.ExitStack() as stack:
      try:
        found = weights.open_files(path, stack)
      except MissingError:  # an index came without its files
        return config
      return _with_own_head(config, found)
  return config


def read_config(hf: dict[str, Any], path: Path | str = 'config.json') -> Config:
  """Returns the `Config` of a ``config.json``, which it keeps for `save`.

  Fields are read as transformers reads them; see docs/families.md. A warning
  names the fields that neither it nor this reader knows.

  Raises:
    ValueError: For a family, or a choice within one, that is not supported; it
      names the field.
  """
  if not isinstance(hf, dict):
    raise InputError(f'{path} is no JSON object; fetch it again.')
  if hf.get('model_type') == 'gemma3' and 'text_config' in hf:
    try:
      hf = gemma.text_of_gemma3(hf)
    except InputError as e:
      raise InputError(f'{path}: {e}') from None
  family = hf.get('model_type')
  if not isinstance(family, str) or family not in FAMILIES:
    raise InputError(
        f'{path}: model_type {family!r} is not supported; supported are '
        f'{", ".join(FAMILIES)}.')
  try:
    config = FAMILIES[family].config_from_hf(hf)
  except InputError as e:
    raise InputError(f'{path}: {e}') from None
  except (ArithmeticError, AttributeError, LookupError, TypeError,
          ValueError) as e:
    raise InputError(f'{path}: a field has a value that no {family} has '
                     f'({e}).') from e
  check_sizes(config, path)
  named = hf.get('architectures')
  of_base = named == [ARCHITECTURES[family][1]] and head_of(config)
  return dataclasses.replace(config, source=json.dumps(hf), head=not (
      of_base or names_classifier(named)))


def names_classifier(architectures: Any) -> bool:
  """Returns whether a config's ``architectures`` have a classifier's head."""
  return isinstance(architectures, list) and any(
      _CLASSIFIERS.search(str(name)) for name in architectures)


def table_of(config: Config) -> list[table.Row]:
  """The rows of a model's parameters, the embedding's first; without the head
  those of the body, under the names that its class's files have."""
  rows, prefix = FAMILIES[config.family].table(config), _prefix(config)
  return rows if config.head else [
      dataclasses.replace(row, name=row.name.removeprefix(prefix))
      for row in rows if row.name.startswith(prefix)]


def head_of(config: Config) -> list[table.Row]:
  """The rows that a base class lacks; none where the embedding is the head."""
  return [row for row in FAMILIES[config.family].table(config)
          if not row.name.startswith(_prefix(config))]


def _prefix(config: Config) -> str:
  """What the names of a whole model's body begin with, and no base class's."""
  first, _ = FAMILIES[config.family].table(config)[0].name.split('.', 1)
  return f'{first}.'


def _with_head(config: Config, names: Iterable[str]) -> Config:
  """Returns the config of files that have tensors of these names.

  A head that is the embedding has no tensors of its own; such a model lacks
  its head only where the files have a classifier's instead.
  """
  rows, prefix = head_of(config), _prefix(config)
  found = {_renamed(name, config) for name in names}
  own = {name for row in rows for name in (row.name, row.otherwise, row.copy)
         if name and not name.startswith(prefix)}
  if rows:
    there = not own.isdisjoint(found)
  else:
    there = _head_name(config) in found or not any(
        map(_OF_CLASSIFIERS.match, found))
  return dataclasses.replace(config, head=there)


def _head_name(config: Config) -> str:
  """Returns the name that files have for the matrix of the model's head."""
  untied = dataclasses.replace(config, tied_head=False)
  return next(row.name for row in FAMILIES[config.family].table(untied)
              if row.path == 'lm_head/embedding')


def _pairs(config: Config, names: Iterable[str]) -> list[tuple[str, str]]:
  """Returns the tensors that a tied flag says are one, where a file has both.
  """
  # Rows of the same model with a head of its own name the second of each pair.
  rows = FAMILIES[config.family].table(
      dataclasses.replace(config, tied_head=False))
  same = [(rows[0].name, row.name) for row in rows if row.path.startswith(
      'lm_head/')] + [(row.copy, row.name) for row in rows if row.copy]
  prefix, there = _prefix(config), {}
  for name in names:
    renamed = _renamed(name, config)
    there |= {renamed: name, prefix + renamed: name}
  return [(there[a], there[b]) for a, b in same if a in there and b in there]


def _with_own_head(config: Config, found: list) -> Config:
  """Returns the config without its tied flag where the file contradicts it.

  A flag (or its default) may tie the head to the embedding though the file has
  another head. As in transformers, the file is right.
  """
  if not (config.tied_head and config.head):
    return config
  tensors = dict(found)
  if all(_equal(tensors[a], tensors[b]) for a, b in _pairs(config, tensors)):
    return config
  hf = json.loads(config.source) | {'tie_word_embeddings': False}
  return dataclasses.replace(config, tied_head=False, source=json.dumps(hf))


def _equal(a, b) -> bool:
  """Compares two tensors of files, some rows at a time."""
  if list(a.get_shape()) != list(b.get_shape()):
    return False
  rows, *rest = a.get_shape()
  whole = tuple(slice(0, n) for n in rest)
  step = max(1, 2**24 // max(1, int(np.prod(rest))))
  part = lambda x, i: np.asarray(x[(slice(i, min(i + step, rows)), *whole)])
  return all(np.array_equal(part(a, i), part(b, i))
             for i in range(0, rows, step))


def _renamed(name: str, config: Config) -> str:
  for pattern, replacement in FAMILIES[config.family].RENAMES:
    name = re.sub(pattern, replacement, name)
  return name


def param_shapes(config: Config, mesh: jax.sharding.Mesh | None = None,
                 dtype: jax.typing.DTypeLike = jnp.float32,
                 offload: bool = False) -> dict[str, Any]:
  """The parameters as `jax.ShapeDtypeStruct`s, to compile without weights, on
  a mesh where `load` puts them."""
  if dtype == 'codes':
    raise InputError("the shapes of dtype 'codes' are those of a GGUF file: "
                     'load it.')
  _check_mesh(mesh)
  params = {}
  for row in table_of(config):
    shape, form = _shape(row, config), quantize.form(row, dtype)
    moved = sharding.on_host if offload and _is_offloaded(row) else lambda x: x
    place = lambda shape, row=row, moved=moved: moved(_place(row, shape, mesh))
    params[row.path] = jax.ShapeDtypeStruct(
        shape, float_dtype(dtype), sharding=place(shape)) if form is None else (
            quantize.shapes(shape, form, place))
  return unflatten_dict(params, sep='/')


def float_dtype(dtype: Any) -> Any:
  """Returns the dtype that is computed with, of parameters of this dtype.

  Raises:
    ValueError: for what is neither a floating-point dtype nor a name of
      quantised weights.
  """
  if dtype is None:
    return None
  if isinstance(dtype, str) and dtype in QUANTISED:
    return jnp.float32
  try:
    fits = jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
  except TypeError:
    fits = False
  if not fits:
    raise InputError(f'dtype {dtype!r} is not one of float32, bfloat16, '
                     f'float16, {", ".join(QUANTISED)}.')
  return dtype


def _check_mesh(mesh) -> None:
  """Raises InputError for a mesh that the layers cannot be split over."""
  if mesh is None:
    return
  for name, kind in zip(mesh.axis_names, mesh.axis_types):
    if (name in ('fsdp', 'tensor') and mesh.shape[name] > 1
        and kind == jax.sharding.AxisType.Explicit):
      raise InputError(
          f'the axis {name!r} of the mesh is Explicit, and the layers of these '
          'models leave it to the compiler how they are split: make the mesh '
          'with mezo_jax.core.make_mesh, or jax.make_mesh with axis_types that '
          'are AxisType.Auto.')


def _shape(row: table.Row, config) -> tuple[int, ...]:
  return (config.num_layers, *row.shape) if row.stacked else row.shape


def _place(row: table.Row, shape, mesh):
  if mesh is None:
    return None
  return jax.NamedSharding(
      mesh, sharding.param_spec(row.path, shape, mesh, row.axes))


def load_tokenizer(name_or_dir: str | os.PathLike[str],
                   revision: str | None = None, bos_token: str | None = None
                   ) -> Any:
  """The tokenizer beside a model: a transformers `PreTrainedTokenizerFast`.

  Args:
    name_or_dir: as for `load`.
    revision: as for `load`.
    bos_token: the token to put first, such as '<s>', where the tokenizer's own
      choice is not wanted. (OPT's is '</s>'; the paper's code has '<s>', the
      token with id 0.)

  Raises:
    FileNotFoundError: if there is no such model.
    ValueError: if it does not have that token.
  """
  path = find(name_or_dir, revision, weights=False)
  if path.suffix == '.gguf':
    tokenizer = gguf.tokenizer(path)
  else:
    from transformers import AutoTokenizer  # slow to import, needed here only
    try:
      tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as e:
      raise InputError(
          f'the tokenizer of {path} cannot be read '
          f'({" ".join(str(e).split())}).') from e
  if bos_token is None:
    return tokenizer
  if bos_token not in tokenizer.get_vocab():
    raise InputError(f'the tokenizer of {path} has no token {bos_token!r}.')
  from tokenizers.processors import TemplateProcessing
  tokenizer.bos_token = bos_token
  tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
      single=f'{bos_token} $A', pair=f'{bos_token} $A $B',
      special_tokens=[(bos_token, tokenizer.bos_token_id)])
  return tokenizer


def find(name_or_dir: str | os.PathLike[str], revision: str | None = None,
         weights: bool = True) -> Path:
  """A local directory or GGUF file, fetched from the hub if it is an id.

  Args:
    name_or_dir: as for `load`.
    revision: as for `load`.
    weights: whether to fetch them too, and not just what is beside them.

  Raises:
    FileNotFoundError: if there is no such model.
  """
  path = Path(name_or_dir).expanduser()
  if path.is_file() and path.suffix == '.gguf':
    return path
  if path.is_dir():
    if (path / 'config.json').is_file():
      return path
    raise MissingError(
        f'{path} has no config.json: it is not a Hugging Face model directory.')
  name = str(name_or_dir)
  if path.is_absolute() or name.count('/') > 1 or not re.fullmatch(
      r'[\w-][\w.-]*(/[\w.-]+)?', name) or path.suffix == '.gguf':
    raise MissingError(
        f'no model at {name}: give a directory with config.json, a .gguf file '
        'or a hub id such as "HuggingFaceTB/SmolLM2-135M".')
  from huggingface_hub import snapshot_download  # slow to import
  fetch = functools.partial(snapshot_download, name, revision=revision)
  text = ['*.json', '*.model', '*.txt', '*.jinja']
  try:
    safetensors = ['*.safetensors'] if weights else []
    # A pattern's star takes slashes too; of the directories below only that
    # of further chat templates is wanted.
    below = [f'*/{kind}' for kind in (*text, *safetensors) if kind != '*.jinja']
    path = Path(fetch(allow_patterns=[*text, *safetensors],
                      ignore_patterns=['consolidated*', *below]))
    if weights and not list(path.glob('model*.safetensors')):
      path = Path(fetch(allow_patterns=[*text, 'pytorch_model*.bin'],
                        ignore_patterns=[*below, '*/*.bin']))
  except Exception as e:
    raise MissingError(
        f'no directory {name!r} here, and the hub did not give one: '
        f'{" ".join(str(e).split())}') from e
  if not (path / 'config.json').is_file():
    raise MissingError(
        f'the hub\'s {name} has no config.json: it is not a whole model.')
  return path


def _fit(rows: list[table.Row], config, found: list, path: Path) -> dict:
  """Finds the tensor of each row in files, with the body's prefix or without.

  A head that is the embedding may have the matrix under its own name alone.
  Tensors of classifiers' heads are left out.

  Returns:
    {name in the table: tensor}.

  Raises:
    ValueError: names every missing, misshapen, double and unexpected tensor.
  """
  prefix, ignored = _prefix(config), FAMILIES[config.family].IGNORED
  wanted = {row.name.format(l=l) for row in rows
            for l in range(config.num_layers if row.stacked else 1)}
  tensors, problems = {}, []
  for name, tensor in found:
    name = _renamed(name, config)
    name = next((n for n in (name, prefix + name, name.removeprefix(prefix))
                 if n in wanted), name)
    if name in tensors:
      problems.append(f'{name} is there twice')
    tensors[name] = tensor
  embedding = rows[0].name
  if config.tied_head and embedding not in tensors:
    head = _head_name(config)
    if head in tensors:
      tensors[embedding] = tensors[head]
  known = set()
  for row in rows:
    for layer in range(config.num_layers if row.stacked else 1):
      name = row.name.format(l=layer)
      if name not in tensors and row.otherwise in tensors:
        tensors[name] = tensors[row.otherwise]
      if name in known:
        continue  # another part of the same tensor
      if name not in tensors:
        problems.append(f'missing {name}')
      elif tuple(tensors[name].get_shape()) != row.source_shape():
        problems.append(
            f'{name} has shape {tuple(tensors[name].get_shape())}, not '
            f'{row.source_shape()}')
      known |= {name, row.copy}
  problems += [f'unexpected {n}' for n in tensors
               if n not in known and not re.search(ignored, n)
               and not _OTHER_HEADS.match(n)]
  if problems:
    shown = '; '.join(problems[:20])
    more = f'; and {len(problems) - 20} more' if len(problems) > 20 else ''
    raise InputError(f'{path} does not fit its config: {shown}{more}.')
  return tensors


def _here():
  # jax adds its options to the class when it runs.
  chosen = getattr(jax.config, 'jax_default_device')
  return jax.sharding.SingleDeviceSharding(chosen or jax.local_devices()[0])


def _is_offloaded(row: table.Row) -> bool:
  """Vectors are few, and no TPU takes a row of a stack of them."""
  return row.stacked and len(row.shape) > 1


def _read(row: table.Row, config, tensors: dict, mesh, dtype,
          offload: bool) -> jax.Array:
  """One parameter, assembled per device from the slices that it needs."""
  shape = _shape(row, config)
  place = _place(row, shape, mesh) or _here()
  if offload and _is_offloaded(row):
    place = sharding.on_host(place)

  def read(index):
    index = [slice(*i.indices(n)) for i, n in zip(index, shape)]
    if not row.stacked:
      block = row.read(tensors[row.name], tuple(index))
      return block.astype(jnp.dtype(dtype or block.dtype))
    layers, *rest = index
    out = None  # filled layer by layer: one layer is alive beside it
    for i, layer in enumerate(range(layers.start, layers.stop)):
      block = row.read(tensors[row.name.format(l=layer)], tuple(rest))
      if out is None:
        out = np.empty((layers.stop - layers.start, *block.shape),
                       jnp.dtype(dtype or block.dtype))
      out[i] = block
    assert out is not None  # no device has a part without layers
    return out

  return jax.make_array_from_callback(shape, place, read)
