"""Errors that the user can fix, which are reported in one sentence.

Any other exception is a bug of ours, or comes from a machine that is too small,
and keeps its traceback.
"""

from collections.abc import Iterator
import contextlib
import errno
import os
from pathlib import Path
import re
import sys
from typing import Any

_OF_THE_DISK = frozenset(
    {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT,
     errno.EFBIG, errno.EIO, errno.EEXIST, errno.EISDIR, errno.ENOTDIR,
     errno.ENAMETOOLONG})
# Those of them whose text is unmistakable.
_IN_TEXT = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT,
            errno.EIO)


AGAIN = 75  # the exit status: EX_TEMPFAIL of sysexits.h, "try again"


class InputError(ValueError):
  """A config, file or argument that cannot work. It says how to fix it."""


class MissingError(InputError, FileNotFoundError):
  """A file, model or data set that does not exist."""


class Damaged(InputError):
  """A file or directory that is not what was written."""


class Stopped(InputError):
  """A run that cannot go on. What was saved is not lost."""


class Again(Stopped):
  """A run that was asked to stop. The same command resumes it."""


class ExistsError(InputError, FileExistsError):
  """A directory that exists already."""


def local(path: str | os.PathLike[str]) -> Path:
  """Returns the local path that a user names; ``~`` is the home directory.

  Raises:
    InputError: For an address, or a name that not all libraries can open.
  """
  text = os.fspath(path)
  if re.match(r'\w+:/', text):
    raise InputError(f'{text} is an address; give a local directory or file.')
  bad = [c for c in ('\\', '\0') if c in text]
  if bad or text != text.encode('utf-8', 'replace').decode():
    raise InputError(
        f'{text!r} has a character that checkpoints cannot have in their path '
        '(a backslash, NUL, or one that is not UTF-8): choose another name.')
  return Path(text).expanduser()


def first_line(error: Any) -> str:
  """Returns the first line of another library's error, for a sentence."""
  return (str(error).strip().splitlines() or [type(error).__name__])[0]


def of_the_disk(e: BaseException) -> int | None:
  """Returns the errno of a file-system error that the user can fix, such as a
  full disk; None for another exception.

  Libraries in C++ report such errors as text, so the text is searched, too.
  """
  seen, left = set(), [e]
  while left:
    e = left.pop()
    if e is None or id(e) in seen:
      continue
    seen.add(id(e))
    if isinstance(e, OSError) and e.errno in _OF_THE_DISK:
      return e.errno
    if not isinstance(e, InputError):
      for code in _IN_TEXT:
        if os.strerror(code) in str(e):
          return code
    left += [e.__cause__, *getattr(e, 'exceptions', ())]
  return None


@contextlib.contextmanager
def in_one_sentence(program: str) -> Iterator[None]:
  """Ends the program with a sentence instead of a traceback for errors that the
  user can fix: `InputError`, and errors of the file system.

  The exit status is 1, or `AGAIN` if nothing needs to be fixed.
  """
  try:
    yield
  except Again as e:
    print(f'{program}: {e}', file=sys.stderr)
    sys.exit(AGAIN)
  except InputError as e:
    sys.exit(f'{program}: {e}')
  except Exception as e:
    code = of_the_disk(e)
    if code is None:
      raise
    name = getattr(e, 'filename', None)
    where = f' {name}' if name else ''
    sys.exit(f'{program}: the system refuses{where}: {os.strerror(code)}.')
