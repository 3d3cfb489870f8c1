"""The command line beside train.py: python -m mezo_jax export | replay |
evaluate | plan."""

import argparse
import logging
from pathlib import Path
import signal
import sys

if __name__ == '__main__':  # Ctrl-C while importing needs no traceback
  ctrl_c = signal.signal(signal.SIGINT, signal.SIG_DFL)

from mezo_jax.cli import suite
from mezo_jax.core.errors import in_one_sentence
from mezo_jax.distributed import hosts
from mezo_jax.export.from_run import export, rebuild
from mezo_jax.planning import cli


def main(argv=None) -> None:
  parser = argparse.ArgumentParser(prog='python -m mezo_jax')
  commands = parser.add_subparsers(dest='command', required=True)
  sub = commands.add_parser(
      'export', help="a run's model as a Hugging Face directory")
  sub.add_argument('workdir', help='of the run, such as runs/quickstart')
  sub.add_argument('directory', help='to make')
  sub.add_argument('--step', type=int, help='default: the best on dev rows, or '
                   'of a private run the last')
  sub.add_argument('--merged', action='store_true',
                   help='LoRA added to the weights: a whole model')
  sub.add_argument('--log', action='store_true',
                   help='no weights but the steps that make them again')
  sub.add_argument('--base', help='where the base model is now; default: where '
                   'it was during the run')
  sub = commands.add_parser(
      'replay', help="the model that a log's steps make of the base model")
  sub.add_argument('--base', required=True, help='directory or hub id')
  sub.add_argument('--log', required=True, help='such as RUN/steps.log')
  sub.add_argument('--out', required=True, help='directory to make')
  sub.add_argument('--adapter', help='directory of the adapter that the run '
                   'began with, if it began with one')
  sub.add_argument('--until', type=int, help='the last step; default: all')
  sub.add_argument('--merged', action='store_true',
                   help='LoRA added to the weights: a whole model')
  sub = commands.add_parser(
      'evaluate', help='many runs of train.py, and one table of their results')
  sub.add_argument('--suite', required=True, help='file, such as '
                   'configs/cpu_suite.py')
  sub.add_argument('--workdir', help='default: runs/<suite>')
  names = lambda text: text.split(',')
  sub.add_argument('--tasks', type=names, default=(), help='a,b; default: all')
  sub.add_argument('--methods', type=names, default=(), help='the same')
  sub = commands.add_parser(
      'plan', help='what a run will hold and take on devices that are not '
      'there; also --config.FIELD=VALUE')
  sub.add_argument('--config', required=True,
                   help='FILE.py or FILE.py:ARGUMENT')
  sub.add_argument('--topology', required=True, help='v5e:4x4, v5p:2x2x1, '
                   'v6e:2x4, v4:2x2x2 (chips), h100:8, a100:8 or cpu:8')
  sub.add_argument('--mesh', help='fsdp=4,tensor=2; default: the config\'s, or '
                   'one that splits all that is large')
  sub.add_argument('--tokens', type=int, help='of a row; default: the longest '
                   'that the config lets through')
  options, rest = parser.parse_known_args(argv)
  other = [x for x in rest if not x.startswith('--config.')]
  if other or rest and options.command != 'plan':
    parser.error(f'unrecognized arguments: {" ".join(other or rest)}')
  options.rest = rest
  logging.getLogger('absl').setLevel(logging.WARNING)  # orbax is talkative
  with in_one_sentence('python -m mezo_jax'):
    try:
      run(options)
    except KeyboardInterrupt:
      sys.exit('python -m mezo_jax: interrupted.')


def run(options: argparse.Namespace) -> None:
  if options.command == 'plan':
    sys.exit(cli.main(options.config, options.topology, options.mesh,
                       options.tokens, options.rest))
  if options.command in ('export', 'replay'):
    hosts.check_devices()
  if options.command == 'export':
    found = export(options.workdir, options.directory, options.step,
                   options.merged, options.log, options.base)
    print(f'wrote {found}')
    return
  if options.command == 'replay':
    found = rebuild(options.base, options.log, options.out, options.until,
                    options.merged, adapter=options.adapter)
    print(f'wrote {found}')
    return
  table, failed = suite.run(
      options.suite, options.workdir or f'runs/{Path(options.suite).stem}',
      options.tasks, options.methods)
  if table.is_file():
    print(f'{table.read_text()}wrote {table}')
  if failed:
    sys.exit(f'python -m mezo_jax: {", ".join(failed)} failed; run the same '
             'command again to go on.')


if __name__ == '__main__':
  signal.signal(signal.SIGINT, ctrl_c)
  main()
