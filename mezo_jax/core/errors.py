"""Defines errors that the user can fix, and reports them in one sentence.

Any other exception keeps its traceback, since its cause is a bug of this
library or a lack of memory.
"""

from collections.abc import Iterator
import contextlib
import errno
import os
from pathlib import Path
import re
import sys
from typing import Any

# Error numbers of file-system problems that the user can fix.
_OF_THE_DISK = frozenset(
    {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT,
     errno.EFBIG, errno.EIO, errno.EEXIST, errno.EISDIR, errno.ENOTDIR,
     errno.ENAMETOOLONG})
# The subset whose message text is specific enough to be recognised inside the
# message of another library's exception.
_IN_TEXT = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT,
            errno.EIO)


# Exit status of a run that can be resumed: EX_TEMPFAIL of sysexits.h, which
# means "try again".
AGAIN = 75


class InputError(ValueError):
  """Reports an invalid config, file or argument, and how to fix it."""


class MissingError(InputError, FileNotFoundError):
  """Reports a file, model or data set that does not exist."""


class Damaged(InputError):
  """Reports a damaged file or directory, such as one that was cut off."""


class Stopped(InputError):
  """Reports that a run cannot continue. Saved checkpoints are kept."""


class Again(Stopped):
  """Reports that a run stopped early. The same command resumes it."""


class ExistsError(InputError, FileExistsError):
  """Reports that an output path exists already."""


def local(path: str | os.PathLike[str]) -> Path:
  """Returns a local path that the user gave, with ``~`` expanded.

  Args:
    path: Path of a local file or directory, which need not exist.

  Raises:
    InputError: If the path is an address such as ``gs://...``, or contains a
      character that orbax or another library cannot handle.
  """
  text = os.fspath(path)
  if re.match(r'\w+:/', text):
    raise InputError(f'{text} is an address; pass a local directory or file.')
  bad = [c for c in ('\\', '\0') if c in text]
  if bad or text != text.encode('utf-8', 'replace').decode():
    raise InputError(
        f'{text!r} contains a character that the path of a checkpoint cannot '
        'have (a backslash, NUL, or one that is not UTF-8); choose another '
        'name.')
  return Path(text).expanduser()


def first_line(error: Any) -> str:
  """Returns the first line of an error's message, or else the error's type."""
  return (str(error).strip().splitlines() or [type(error).__name__])[0]


def of_the_disk(e: BaseException) -> int | None:
  """Returns the errno of a file-system error that the user can fix, or None.

  An example of such an error is a full disk. The function also searches the
  causes of the exception and the members of exception groups. Libraries in C++
  report such errors as text only, so the function searches messages for the
  operating system's description of the error.

  Args:
    e: The exception.
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
  """Prints one sentence instead of a traceback if the user can fix an error.

  The user can fix an `InputError` and most file-system errors. After such an
  error the program exits with status 1, or with `AGAIN` if the same command
  resumes the run. Other exceptions pass through.

  Args:
    program: Name of the program, which begins the sentence.
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
    sys.exit(f'{program}: cannot read or write{where}: {os.strerror(code)}.')
