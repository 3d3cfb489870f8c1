"""The command line beside train.py: python -m mezo_jax export ..."""

import argparse
import logging
import sys

from mezo_jax.export import export


def main(argv=None) -> None:
  parser = argparse.ArgumentParser(prog='python -m mezo_jax')
  commands = parser.add_subparsers(dest='command', required=True)
  sub = commands.add_parser(
      'export', help="a run's model as a Hugging Face directory")
  sub.add_argument('workdir', help='of the run, such as runs/quickstart')
  sub.add_argument('directory', help='to make')
  sub.add_argument('--step', type=int, help='default: the best on dev rows')
  options = parser.parse_args(argv)
  logging.getLogger('absl').setLevel(logging.WARNING)  # orbax is talkative
  try:
    print(f'wrote {export(options.workdir, options.directory, options.step)}')
  except (OSError, RuntimeError, ValueError) as e:
    sys.exit(f'python -m mezo_jax: {e}')


if __name__ == '__main__':
  main()
