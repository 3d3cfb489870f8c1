"""The command line: ``mezo-jax COMMAND`` or ``python -m mezo_jax COMMAND``."""

import signal


def main() -> None:
  """Runs the command that the command line names."""
  # Ctrl-C while importing needs no traceback.
  handler = signal.signal(signal.SIGINT, signal.SIG_DFL)
  from mezo_jax.cli import commands
  signal.signal(signal.SIGINT, handler)
  commands.main()


if __name__ == '__main__':
  main()
