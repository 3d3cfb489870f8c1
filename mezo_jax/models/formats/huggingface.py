"""Loads Hugging Face directories and GGUF files into sharded parameters.

Loading does not need torch. The slice of each parameter that a device needs is
read directly from the files, so loading needs no more memory on the host than
one shard of one parameter.
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
from mezo_jax.models.families import (
  bert,
  gemma,
  gpt2,
  granite,
  llama,
  mixture,
  olmo2,
  opt,
  table,
)
from mezo_jax.models.families.config_json import check_sizes
from mezo_jax.models.formats import gguf, quantize, weights
from mezo_jax.models.layers import Config

FAMILIES = {
    'bert': bert, 'gemma': gemma, 'gemma2': gemma, 'gemma3_text': gemma,
    'gpt2': gpt2, 'granite': granite, 'llama': llama, 'mistral': llama,
    'mixtral': mixture, 'olmo2': olmo2, 'olmoe': mixture, 'opt': opt,
    'qwen2': llama, 'qwen3': llama, 'qwen3_moe': mixture, 'roberta': bert}
# Names of transformers' classes: with the language model's head, and without.
ARCHITECTURES = {
    'bert': ('BertForMaskedLM', 'BertModel'),
    'gemma': ('GemmaForCausalLM', 'GemmaModel'),
    'gemma2': ('Gemma2ForCausalLM', 'Gemma2Model'),
    'gemma3_text': ('Gemma3ForCausalLM', 'Gemma3TextModel'),
    'gpt2': ('GPT2LMHeadModel', 'GPT2Model'),
    'llama': ('LlamaForCausalLM', 'LlamaModel'),
    'mistral': ('MistralForCausalLM', 'MistralModel'),
    'granite': ('GraniteForCausalLM', 'GraniteModel'),
    'mixtral': ('MixtralForCausalLM', 'MixtralModel'),
    'olmo2': ('Olmo2ForCausalLM', 'Olmo2Model'),
    'olmoe': ('OlmoeForCausalLM', 'OlmoeModel'),
    'opt': ('OPTForCausalLM', 'OPTModel'),
    'qwen2': ('Qwen2ForCausalLM', 'Qwen2Model'),
    'qwen3': ('Qwen3ForCausalLM', 'Qwen3Model'),
    'qwen3_moe': ('Qwen3MoeForCausalLM', 'Qwen3MoeModel'),
    'roberta': ('RobertaForMaskedLM', 'RobertaModel')}
# transformers has classes for classification and similar tasks. Their files
# have another head than a language model's. Only the body of such a file is
# loaded, as by transformers' AutoModel. The patterns match the names of these
# classes and of the tensors of their heads.
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

  ``model.apply({'params': params}, input_ids, attention_mask)`` then returns
  float32 logits of shape [batch, length, vocab]. With quantised weights use
  ``mezo_jax.dequantized(lambda p: model.apply({'params': p}, ...))(params)``.

  If the files have no language model's head, as those of a base class
  (``BertModel``) or of a classifier (``...ForSequenceClassification``), only
  the body is loaded: ``model.config.head`` is False, and the model returns
  features only. If the head is tied to the embedding, the files of a base class
  are complete.

  Args:
    name_or_dir: A directory with ``config.json`` and safetensors files (or
      ``pytorch_model*.bin``, as in older checkpoints), a ``.gguf`` file, or the
      id of a Hugging Face repository.
    mesh: The mesh (see `mezo_jax.sharding.make_mesh`). Parameters are sharded
      over its axes `fsdp` and `tensor` as they are read; these axes must not be
      Explicit. Defaults to None, for the default device.
    dtype: Dtype of the parameters, such as 'float32' or jnp.bfloat16. With
      'int8' and 'int4', matrices are quantised as they are read; with 'codes',
      they keep the quantised weights of a GGUF file (Q8_0, Q4_0, Q4_1). Such
      matrices are `mezo_jax.QuantizedArray`, and all other parameters are
      float32. Defaults to None, for the checkpoint's own dtype.
    progress: Whether to show a progress bar. Defaults to True.
    revision: Branch, tag or commit of a Hugging Face repository. Defaults to
      None, for its main branch.
    offload: Whether to store the layers' matrices in the host's memory, from
      which a program fetches one layer at a time (see
      `mezo_jax.sharding.on_host`). Defaults to False.

  Returns:
    ``model, params``: a `Transformer`, whose ``config`` describes the model,
    and its parameters as a plain nested dict.

  Raises:
    FileNotFoundError: If there is no such model.
    ValueError: If the model's family is not supported, or its tensors do not
      fit its config. The error names all tensors that do not fit.
  """
  float_dtype(dtype)  # Raises for an unknown dtype before any file is read.
  _check_mesh(mesh)
  path = find(name_or_dir, revision)
  config = load_config(path)
  with contextlib.ExitStack() as stack:
    if path.suffix == '.gguf':
      found = list(gguf.open_file(path)[1].items())
    else:
      found = weights.open_files(path, stack)
    if dtype == 'codes' and path.suffix != '.gguf':
      raise InputError(f"dtype 'codes' needs a .gguf file, but {path} is "
                       "a directory; choose 'int8' or 'int4'.")
    rows = table_of(config)
    tensors = _fit(rows, config, found, path)
    params = {}
    hidden = not progress or jax.process_index() > 0
    for row in tqdm(rows, f'loading {path.name}', unit='param',
                    disable=True if hidden else None):  # None: on a terminal
      form = quantize.form(row, dtype, tensors, config.num_layers)
      params[row.path] = (
          _read(row, config, tensors, mesh, float_dtype(dtype), offload)
          if form is None else quantize.read(
              row, _shape(row, config), form, tensors,
              lambda shape, row=row: _place(row, shape, mesh) or _here()))
  return transformer.Transformer(config), unflatten_dict(params, sep='/')


def load_config(name_or_dir: str | os.PathLike[str], revision: str | None = None
                ) -> Config:
  """Returns the `Config` of a model without loading its weights.

  If the model's weights are on this machine, the names of their tensors
  determine whether the model has a head. Otherwise, as for a hub id,
  ``architectures`` in ``config.json`` determines it. A head that is untied
  although the config says otherwise is found only if the weights are present.

  Args:
    name_or_dir: A directory, a ``.gguf`` file or a hub id, as for `load`.
    revision: Branch, tag or commit of a Hugging Face repository. Defaults to
      None, for its main branch.

  Raises:
    FileNotFoundError: If there is no such model.
    ValueError: If a file cannot be read, or the model is not supported.
  """
  path = find(name_or_dir, revision, weights=False)
  if path.suffix == '.gguf':
    return read_config(gguf.open_file(path)[0], path)
  try:
    hf = json.loads((path / 'config.json').read_text())
  except ValueError as e:
    raise InputError(f'{path}/config.json is not valid JSON ({e}); fetch it '
                     'again.') from e
  if (path / 'adapter_config.json').is_file():
    # transformers loads the base model that adapter_config.json names and adds
    # the adapter. Reading the weights here would silently give another model.
    raise InputError(
        f'{path} has an adapter_config.json next to config.json. Load the base '
        'model that it names and add the adapter with mezo_jax.peft.load; or '
        'remove adapter_config.json if the adapter is already merged into '
        'these weights.')
  config = read_config(hf, path)
  names = weights.names(path)
  config = _with_head(config, names) if names else config
  if config.tied_head and _pairs(config, names):
    with contextlib.ExitStack() as stack:
      try:
        found = weights.open_files(path, stack)
      except MissingError:  # There is an index, but not the files it lists.
        return config
      return _with_own_head(config, found)
  return config


def read_config(hf: dict[str, Any], path: Path | str = 'config.json') -> Config:
  """Returns the `Config` that a ``config.json`` describes.

  Fields are read as transformers reads them; see docs/families.md. A warning
  names the fields that neither transformers nor this reader knows.

  Args:
    hf: Contents of ``config.json``. The config keeps them for `save`.
    path: Path of the file, for errors. Defaults to 'config.json'.

  Raises:
    ValueError: If the family or the value of a field is not supported. The
      error names the field.
  """
  if not isinstance(hf, dict):
    raise InputError(f'{path} is not a JSON object; fetch it again.')
  if hf.get('model_type') == 'gemma3' and 'text_config' in hf:
    try:
      hf = gemma.text_of_gemma3(hf)
    except InputError as e:
      raise InputError(f'{path}: {e}') from None
  family = hf.get('model_type')
  if not isinstance(family, str) or family not in FAMILIES:
    raise InputError(
        f'{path}: model_type {family!r} is not supported; the supported ones '
        f'are {", ".join(FAMILIES)}.')
  try:
    config = FAMILIES[family].config_from_hf(hf)
  except InputError as e:
    raise InputError(f'{path}: {e}') from None
  except (ArithmeticError, AttributeError, LookupError, TypeError,
          ValueError) as e:
    raise InputError(f'{path}: a field has a value that is invalid for '
                     f'model_type {family!r} ({e}).') from e
  check_sizes(config, path)
  named = hf.get('architectures')
  of_base = named == [ARCHITECTURES[family][1]] and head_of(config)
  return dataclasses.replace(config, source=json.dumps(hf), head=not (
      of_base or names_classifier(named)))


def names_classifier(architectures: Any) -> bool:
  """Returns whether a config's ``architectures`` name a classifier."""
  return isinstance(architectures, list) and any(
      _CLASSIFIERS.search(str(name)) for name in architectures)


def table_of(config: Config) -> list[table.Row]:
  """Returns the rows of a model's parameters, with that of the embedding first.

  For a model without a head these are the rows of the body, with the tensors'
  names as the files of transformers' base class have them.
  """
  rows, prefix = FAMILIES[config.family].table(config), _prefix(config)
  return rows if config.head else [
      row.without_prefix(prefix) for row in rows if row.name.startswith(prefix)]


def head_of(config: Config) -> list[table.Row]:
  """Returns the rows that belong to the head and not to the base class.

  There are none if the embedding is the output matrix and the head has no other
  parameters.
  """
  return [row for row in FAMILIES[config.family].table(config)
          if not row.name.startswith(_prefix(config))]


def _prefix(config: Config) -> str:
  """Returns the prefix of the body's tensors, such as 'model.'.

  In the files of a model with a head, the names of the body's tensors begin
  with it. In the files of a base class they do not.
  """
  first, _ = FAMILIES[config.family].table(config)[0].name.split('.', 1)
  return f'{first}.'


def _with_head(config: Config, names: Iterable[str]) -> Config:
  """Returns a config with ``head`` set according to the names of tensors.

  A head that is tied to the embedding may have no tensors. Such a model lacks
  its head only if the files have a classifier's head instead.
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
  """Returns the name of the tensor of the head's matrix."""
  untied = dataclasses.replace(config, tied_head=False)
  return next(row.name for row in FAMILIES[config.family].table(untied)
              if row.path == 'lm_head/embedding')


def _pairs(config: Config, names: Iterable[str]) -> list[tuple[str, str]]:
  """Returns pairs of tensors that are equal if the model's head is tied.

  The first of a pair belongs to the body or the tied head, the second to an
  untied head. Only pairs of which both are among ``names`` are returned.
  """
  # The table of an untied model has the names of the second tensors.
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
  """Returns the config with an untied head if the tensors require one.

  The flag ``tie_word_embeddings``, or its default, may be true although the
  files have a head that differs from the embedding. As in transformers, the
  files then take precedence.
  """
  if not (config.tied_head and config.head):
    return config
  tensors = dict(found)
  if all(_equal(tensors[a], tensors[b]) for a, b in _pairs(config, tensors)):
    return config
  hf = json.loads(config.source) | {'tie_word_embeddings': False}
  return dataclasses.replace(config, tied_head=False, source=json.dumps(hf))


def _equal(a, b) -> bool:
  """Returns whether two tensors of files are equal.

  It compares about 16 million elements at a time, to bound the memory.
  """
  if list(a.get_shape()) != list(b.get_shape()):
    return False
  rows, *rest = a.get_shape()
  whole = tuple(slice(0, n) for n in rest)
  step = max(1, 2**24 // max(1, int(np.prod(rest))))
  part = lambda x, i: np.asarray(x[(slice(i, min(i + step, rows)), *whole)])
  return all(np.array_equal(part(a, i), part(b, i))
             for i in range(0, rows, step))


def _renamed(name: str, config: Config) -> str:
  """Returns a tensor's name in the spelling that the family's table uses."""
  for pattern, replacement in FAMILIES[config.family].RENAMES:
    name = re.sub(pattern, replacement, name)
  return name


def param_shapes(config: Config, mesh: jax.sharding.Mesh | None = None,
                 dtype: jax.typing.DTypeLike = jnp.float32,
                 offload: bool = False) -> dict[str, Any]:
  """Returns the parameters of a model as `jax.ShapeDtypeStruct`s.

  Programs can be compiled with them, without weights.

  Args:
    config: Config of the model.
    mesh: The shapes have the shardings that `load` gives the parameters on this
      mesh. Defaults to None, for no shardings.
    dtype: Dtype of the parameters, as for `load`, except 'codes'. Defaults to
      float32.
    offload: Whether the layers' matrices are in the host's memory. Defaults to
      False.

  Raises:
    ValueError: If the dtype is unknown or 'codes', or an axis of the mesh is
      Explicit.
  """
  if dtype == 'codes':
    raise InputError("dtype 'codes' has the shapes of a GGUF file, which are "
                     "not known here; load the file, or choose 'int8' or "
                     "'int4'.")
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
  """Returns the dtype of the arithmetic for a dtype of parameters.

  Args:
    dtype: A floating-point dtype, which is returned unchanged; the name of a
      quantised dtype, which results in float32; or None, which results in None.

  Raises:
    ValueError: If ``dtype`` is anything else.
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
    raise InputError(f'dtype {dtype!r} is unknown; choose one of float32, '
                     f'bfloat16, float16, {", ".join(QUANTISED)}.')
  return dtype


def _check_mesh(mesh) -> None:
  """Raises InputError if the layers cannot be split over a mesh."""
  if mesh is None:
    return
  for name, kind in zip(mesh.axis_names, mesh.axis_types):
    if (name in ('fsdp', 'tensor') and mesh.shape[name] > 1
        and kind == jax.sharding.AxisType.Explicit):
      raise InputError(
          f'mesh: the axis {name!r} is Explicit, but these models need the '
          'compiler to propagate shardings. Make the mesh with '
          'mezo_jax.sharding.make_mesh, or with jax.make_mesh and axis_types '
          'of AxisType.Auto.')


def _shape(row: table.Row, config) -> tuple[int, ...]:
  """Returns the shape of a parameter, with the layer axis if it is stacked."""
  return (config.num_layers, *row.shape) if row.stacked else row.shape


def _place(row: table.Row, shape, mesh):
  """Returns the sharding of a parameter on a mesh, or None without a mesh."""
  if mesh is None:
    return None
  return jax.NamedSharding(
      mesh, sharding.param_spec(row.path, shape, mesh, row.axes))


def load_tokenizer(name_or_dir: str | os.PathLike[str],
                   revision: str | None = None, bos_token: str | None = None
                   ) -> Any:
  """Loads the tokenizer of a model.

  Args:
    name_or_dir: A directory, a ``.gguf`` file or a hub id, as for `load`.
    revision: Branch, tag or commit of a Hugging Face repository. Defaults to
      None, for its main branch.
    bos_token: The token to put before each text, such as '<s>'. Defaults to
      None, for the tokenizer's own choice. (OPT's tokenizer puts '</s>' first,
      and the code of the MeZO paper puts '<s>', with id 0.)

  Returns:
    A tokenizer of transformers.

  Raises:
    FileNotFoundError: If there is no such model.
    ValueError: If the tokenizer cannot be read, or lacks ``bos_token``.
  """
  path = find(name_or_dir, revision, weights=False)
  if path.suffix == '.gguf':
    tokenizer = gguf.tokenizer(path)
  else:
    from transformers import AutoTokenizer  # Imported late, as it is slow.
    try:
      tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as e:
      raise InputError(
          f'the tokenizer of {path} cannot be read '
          f'({" ".join(str(e).split())}).') from e
  if bos_token is None:
    return tokenizer
  if bos_token not in tokenizer.get_vocab():
    raise InputError(f'the tokenizer of {path} has no token {bos_token!r}; '
                     'choose a bos_token of its vocabulary.')
  # The post-processor adds the token to every text, so it has to change along
  # with the name.
  from tokenizers.processors import TemplateProcessing
  tokenizer.bos_token = bos_token
  tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
      single=f'{bos_token} $A', pair=f'{bos_token} $A $B',
      special_tokens=[(bos_token, tokenizer.bos_token_id)])
  return tokenizer


def find(name_or_dir: str | os.PathLike[str], revision: str | None = None,
         weights: bool = True) -> Path:
  """Returns the local path of a model, which it downloads if necessary.

  Args:
    name_or_dir: A directory, a ``.gguf`` file or a hub id, as for `load`.
    revision: Branch, tag or commit of a Hugging Face repository. Defaults to
      None, for its main branch.
    weights: Whether to download the weights in addition to the config and the
      tokenizer. Defaults to True.

  Returns:
    The path of a directory with ``config.json``, or of a GGUF file.

  Raises:
    FileNotFoundError: If there is no such model.
  """
  path = Path(name_or_dir).expanduser()
  if path.is_file() and path.suffix == '.gguf':
    return path
  if path.is_dir():
    if (path / 'config.json').is_file():
      return path
    raise MissingError(
        f'{path} has no config.json; give the directory of a Hugging Face '
        'model.')
  name = str(name_or_dir)
  if path.is_absolute() or name.count('/') > 1 or not re.fullmatch(
      r'[\w-][\w.-]*(/[\w.-]+)?', name) or path.suffix == '.gguf':
    raise MissingError(
        f'no model at {name}; give a directory with config.json, a .gguf file '
        'or a hub id such as "HuggingFaceTB/SmolLM2-135M".')
  from huggingface_hub import snapshot_download  # Imported late, as it is slow.
  fetch = functools.partial(snapshot_download, name, revision=revision)
  text = ['*.json', '*.model', '*.txt', '*.jinja']
  try:
    safetensors = ['*.safetensors'] if weights else []
    # The star of a pattern matches slashes, too. Subdirectories often have
    # weights in other formats, so only further chat templates are taken from
    # them.
    below = [f'*/{kind}' for kind in (*text, *safetensors) if kind != '*.jinja']
    path = Path(fetch(allow_patterns=[*text, *safetensors],
                      ignore_patterns=['consolidated*', *below]))
    if weights and not list(path.glob('model*.safetensors')):
      path = Path(fetch(allow_patterns=[*text, 'pytorch_model*.bin'],
                        ignore_patterns=[*below, '*/*.bin']))
  except Exception as e:
    raise MissingError(
        f'there is no local directory {name!r}, and it could not be fetched '
        f'from the hub: {" ".join(str(e).split())}') from e
  if not (path / 'config.json').is_file():
    raise MissingError(
        f'{name} on the hub has no config.json; choose a repository with a '
        'complete model.')
  return path


def _fit(rows: list[table.Row], config, found: list, path: Path) -> dict:
  """Matches the tensors of files with the rows of a table.

  A name matches with or without the prefix of the body. If the head is tied to
  the embedding, the file may have the matrix under the head's name only.
  Tensors of classifiers' heads are ignored.

  Args:
    rows: The rows of the model's parameters.
    config: Config of the model.
    found: Pairs of a name and a tensor.
    path: Path of the model, for errors.

  Returns:
    {name in the table: tensor}.

  Raises:
    ValueError: If tensors are missing, duplicate or unexpected, or have other
      shapes. The error names all of them.
  """
  prefix, ignored = _prefix(config), FAMILIES[config.family].IGNORED
  wanted = {name for row in rows for name in (
      *row.names(config), *row.other_names(config))}
  tensors, problems = {}, []
  for name, tensor in found:
    name = _renamed(name, config)
    name = next((n for n in (name, prefix + name, name.removeprefix(prefix))
                 if n in wanted), name)
    if name in tensors:
      problems.append(f'duplicate {name}')
    tensors[name] = tensor
  embedding = rows[0].name
  if config.tied_head and embedding not in tensors:
    head = _head_name(config)
    if head in tensors:
      tensors[embedding] = tensors[head]
  known, together = set(), {}
  for row in rows:
    for layer in range(config.num_layers if row.stacked else 1):
      name = row.name.format(l=layer)
      if row.of_experts:
        whole, used, missing = _of_experts(row, layer, tensors)
        known |= used
        problems += [f'missing {n}' for n in missing]
        if whole is not None:
          together[name] = whole
          if tuple(whole.get_shape()) != row.source_shape():
            problems.append(f'{name} has shape {tuple(whole.get_shape())}, '
                            f'not {row.source_shape()}')
        continue
      other = row.otherwise and row.otherwise.format(l=layer)
      if name not in tensors and other in tensors:
        tensors[name] = tensors[other]
        known.add(other)
      if name in known:
        continue  # Another row is a part of the same tensor.
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
    raise InputError(f'the tensors of {path} do not fit its config.json: '
                     f'{shown}{more}.')
  return tensors | together


def _of_experts(row: table.Row, layer: int, tensors: dict
                ) -> tuple[Any, set[str], list[str]]:
  """Finds the tensors of the experts of a layer.

  Returns:
    A tensor of all experts (None if some are missing), the names of those that
    it consists of, and the names of those that are missing.
  """
  each = [row.name.format(l=layer).format(e=e) for e in range(row.shape[0])]
  missing = [name for name in each if name not in tensors]
  if not missing:
    return table.Experts([tensors[name] for name in each]), {*each}, []
  if row.together:
    name, *part = row.together
    name = name.format(l=layer)
    if name in tensors:
      return table.Part(tensors[name], *part), {name}, []
  return None, {*each}, missing


def _here():
  """Returns the sharding of arrays on the default device."""
  # jax adds this option to the class at run time, so type checkers do not know
  # the attribute.
  chosen = getattr(jax.config, 'jax_default_device')
  return jax.sharding.SingleDeviceSharding(chosen or jax.local_devices()[0])


def _is_offloaded(row: table.Row) -> bool:
  """Returns whether ``offload`` puts a parameter into the host's memory.

  It does so for matrices of layers. Vectors take little memory, and a TPU
  cannot fetch one row of a stack of vectors from the host.
  """
  return row.stacked and len(row.shape) > 1


def _read(row: table.Row, config, tensors: dict, mesh, dtype,
          offload: bool) -> jax.Array:
  """Reads one parameter; for each device only its shard is read from files."""
  shape = _shape(row, config)
  place = _place(row, shape, mesh) or _here()
  if offload and _is_offloaded(row):
    place = sharding.on_host(place)

  def read(index):
    """Returns the shard of the parameter at an index."""
    index = [slice(*i.indices(n)) for i, n in zip(index, shape)]
    if not row.stacked:
      block = row.read(tensors[row.name], tuple(index))
      return block.astype(jnp.dtype(dtype or block.dtype))
    layers, *rest = index
    # Layers are copied into `out` one by one, so that only one of them is in
    # memory in addition to the result.
    out = None
    for i, layer in enumerate(range(layers.start, layers.stop)):
      block = row.read(tensors[row.name.format(l=layer)], tuple(rest))
      if out is None:
        out = np.empty((layers.stop - layers.start, *block.shape),
                       jnp.dtype(dtype or block.dtype))
      out[i] = block
    assert out is not None  # The layer axis is never split, so it is not empty.
    return out

  return jax.make_array_from_callback(shape, place, read)
