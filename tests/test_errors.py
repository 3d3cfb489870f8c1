"""What is said in one sentence, and what keeps its traceback."""

import errno

import pytest

from mezo_jax.core.errors import (
  AGAIN,
  Again,
  ExistsError,
  in_one_sentence,
  InputError,
  MissingError,
)


@pytest.mark.parametrize('error,match', [
    (InputError('give more.'), r'^prog: give more\.$'),
    (MissingError('no file x.'), r'^prog: no file x\.$'),
    (ExistsError('x is full.'), r'^prog: x is full\.$'),
    (PermissionError(errno.EACCES, 'Permission denied', '/x'),
     r'^prog: .* /x: Permission denied\.$'),
    (OSError(errno.ENOSPC, 'No space left on device'),
     r'^prog: .*: No space left on device\.$')])
def test_what_the_user_can_mend(error, match):
  with pytest.raises(SystemExit, match=match), in_one_sentence('prog'):
    raise error


def test_a_run_that_was_told_to_stop_says_how_to_go_on(capsys):
  with pytest.raises(SystemExit) as e, in_one_sentence('prog'):
    raise Again('told to stop.')
  assert e.value.code == AGAIN == 75
  assert capsys.readouterr().err == 'prog: told to stop.\n'


@pytest.mark.parametrize('error', [
    ValueError('a bug'), RuntimeError('RESOURCE_EXHAUSTED: out of memory'),
    FileNotFoundError(errno.ENOENT, 'No such file or directory', '/x'),
    KeyError('x')])
def test_what_the_user_cannot(error):
  with pytest.raises(type(error)) as e, in_one_sentence('prog'):
    raise error
  assert e.value is error


def test_they_are_what_their_names_say():
  assert issubclass(InputError, ValueError)
  assert issubclass(MissingError, FileNotFoundError)
  assert issubclass(ExistsError, FileExistsError)
