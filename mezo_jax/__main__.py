"""The command line: ``mezo-jax COMMAND`` or ``python -m mezo_jax COMMAND``."""

import signal
import sys


def main() -> None:
  """Runs the command that the command line names."""
  # Ctrl-C while importing needs no traceback.
  handler = signal.signal(signal.SIGINT, signal.SIG_DFL)
  try:
    from mezo_jax.cli import commands
  except ModuleNotFoundError as e:
    if (e.name or '').startswith('mezo_jax'):
      raise
    sys.exit(f'mezo-jax: {e.name} is not installed; run: pip install '
             "'mezo_jax[train]'")
  finally:
    signal.signal(signal.SIGINT, handler)
  commands.main()


if __name__ == '__main__':
  main()
