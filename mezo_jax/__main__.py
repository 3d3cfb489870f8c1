"""Runs ``mezo-jax COMMAND``, also as ``python -m mezo_jax COMMAND``."""

import signal
import sys


def main() -> None:
  """Runs the command that the command line names."""
  # Imports take seconds. Ctrl-C should end them without a traceback, so the
  # default action of SIGINT applies until they are done.
  handler = signal.signal(signal.SIGINT, signal.SIG_DFL)
  from mezo_jax.core import extras
  try:
    from mezo_jax.cli import commands
  except extras.MissingExtraError as e:
    sys.exit(f'mezo-jax: {e}.')
  finally:
    signal.signal(signal.SIGINT, handler)
  commands.main()


if __name__ == '__main__':
  main()
