"""Implements the commands of ``mezo-jax``.

The docstring of a command is its help text. Each command checks its arguments
and calls one function of another package of mezo_jax.
"""

from collections.abc import Callable, Sequence
import contextlib
import difflib
import inspect
import math
from pathlib import Path
import re
import sys
from typing import Any

from absl import logging
import jax

from mezo_jax.cli import command_line, grid, suite, train_command
from mezo_jax.cli import report as report_lib
from mezo_jax.cli import sweep as sweep_lib
from mezo_jax.cli.command_line import parse
from mezo_jax.core.errors import in_one_sentence, InputError, local
from mezo_jax.distributed import hosts
from mezo_jax.export import from_run
from mezo_jax.planning import alternatives, machines
from mezo_jax.planning import plan as planning
from mezo_jax.tasks import predictions
from mezo_jax.tasks.evaluate import spell
from mezo_jax.training import run_files

DOES_NOT_FIT = 3  # exit status of `plan` if the run does not fit

_MERGED = (bool, 'Merge LoRA into the weights and write a complete model.')


def _doc(command: Callable[..., Any]) -> str:
  """Returns the docstring of a command, which is its help text."""
  return inspect.getdoc(command) or ''


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the command that a command line names, and exits if it fails.

  Args:
    argv: The name of the command and its arguments. Defaults to ``sys.argv``
      without the program name.
  """
  name, *argv = (sys.argv[1:] if argv is None else argv) or ['--help']
  if name in ('-h', '--help', 'help'):
    print('Fine-tunes language models with forward passes only (MeZO).\n')
    for known, command in _COMMANDS.items():
      about = _doc(command).splitlines()[0]
      print(f'  mezo-jax {known:10}{about}')
    print('\nmezo-jax COMMAND --help describes the flags of a command.')
    sys.exit()
  if name not in _COMMANDS:
    near = difflib.get_close_matches(name, _COMMANDS)
    sys.exit(f'mezo-jax: unknown command {name!r}; ' + (
        f'did you mean {near[0]}?' if near else
        f'choose one of {", ".join(_COMMANDS)}.'))
  program = f'mezo-jax {name}'
  logging.set_verbosity(logging.WARNING)  # orbax logs a lot
  with in_one_sentence(program):
    try:
      status = _COMMANDS[name]([program, *argv])
    except KeyboardInterrupt:
      sys.exit(f'{program}: interrupted.')
  if status:
    sys.exit(status)


def train(argv: Sequence[str]) -> None:
  """Fine-tunes a model, or evaluates a baseline."""
  from mezo_jax.training import run
  train_command.main(run, program=argv[0], argv=argv[1:])


def export(argv: Sequence[str]) -> None:
  """Exports the model of a run as a Hugging Face directory.

    mezo-jax export WORKDIR DIRECTORY

  WORKDIR is the working directory of the run, such as runs/quickstart.
  DIRECTORY is created.
  """
  values, (workdir, directory) = parse(argv, _doc(export), {
      'step': (int, 'The step to export. Defaults to the best step on the dev '
               'rows, or for a private run to the last step.'),
      'merged': _MERGED,
      'log': (bool, 'Export the log of steps instead of the weights. '
              '`mezo-jax replay` rebuilds the weights from it.'),
      'base': (str, 'The base model, if it has moved: a directory or a hub id. '
               'Defaults to the model of the config.'),
  }, arguments=('WORKDIR', 'DIRECTORY'))
  hosts.check_devices()
  found = from_run.export(workdir, directory, values.step, bool(values.merged),
                          bool(values.log), values.base)
  print(f'wrote {found}')


def predict(argv: Sequence[str]) -> None:
  """Predicts the rows of a file with a trained model.

    mezo-jax predict RUN_OR_DIRECTORY --data=FILE

  RUN_OR_DIRECTORY is the working directory of a run, such as runs/quickstart,
  or a directory that `mezo-jax export` wrote. One JSON object is written for
  each row, as in predictions.jsonl of a run.
  """
  from mezo_jax.training import inference
  values, (source,) = parse(argv, _doc(predict), {
      'data': (str, 'The rows: a .jsonl, .csv, .tsv or .parquet file with the '
               'columns of the task. If it has right answers, the metric is '
               'reported.'),
      'out': (str, 'The file to write. Defaults to the standard output.'),
      'step': (int, 'The step of a run. Defaults to the best step on the dev '
               'rows, or for a private run to the last step.'),
  }, arguments=('RUN_OR_DIRECTORY',), required=('data',))
  out = _file(values.out)
  say = lambda text: print(text, file=sys.stderr)
  hosts.check_devices()
  rows, report = inference.predict(
      source, values.data, step=values.step, say=say)
  if out:
    predictions.write(out, rows)
  else:
    sys.stdout.writelines(map(predictions.line, rows))
  if report:
    say(f'{spell(report)} on {report["count"]} rows')


def replay(argv: Sequence[str]) -> None:
  """Rebuilds a fine-tuned model from its base model and a log of steps.

    mezo-jax replay --base=MODEL --log=RUN/steps.log --out=DIRECTORY

  This needs neither data nor forward passes.
  """
  values, _ = parse(argv, _doc(replay), {
      'base': (str, 'The base model: a directory or a hub id.'),
      'log': (str, 'The log of steps, such as RUN/steps.log.'),
      'out': (str, 'The directory to write to. It is created.'),
      'adapter': (str, 'The directory of the adapter that the run started '
                  'from, if there was one (config.peft.adapter).'),
      'until': (int, 'The last step to replay. Defaults to the last step of '
                'the log.'),
      'merged': _MERGED,
  }, required=('base', 'log', 'out'))
  hosts.check_devices()
  found = from_run.rebuild(values.base, values.log, values.out, values.until,
                           bool(values.merged), adapter=values.adapter)
  print(f'wrote {found}')


def evaluate(argv: Sequence[str]) -> None:
  """Runs many configs and writes one table of their results.

    mezo-jax evaluate --suite=cpu_suite --config.FIELD=VALUE

  Each run is a separate process. A run that was stopped is resumed, and a run
  that is finished is not repeated. --config.FIELD=VALUE overrides a field in
  all runs.
  """
  is_override = command_line.OVERRIDE.match
  own = [word for word in argv if not is_override(word)]
  values, _ = parse(own, _doc(evaluate), {
      'suite': (str, 'The suite: FILE.py, or the name of a suite that comes '
                'with mezo_jax, such as cpu_suite.'),
      'workdir': (str, 'The directory of the table and of the runs. Defaults '
                  'to runs/<suite>.'),
      'tasks': (list, 'The tasks to run, as A,B. Defaults to all.'),
      'methods': (list, 'The methods to run, as A,B. Defaults to all.'),
  }, required=('suite',))
  table, failed = suite.run(
      values.suite, values.workdir or f'runs/{Path(values.suite).stem}',
      values.tasks or (), values.methods or (),
      [word for word in argv if is_override(word)])
  if table.is_file():
    print(f'{table.read_text()}wrote {table}')
  if failed:
    raise InputError(f'{", ".join(failed)} failed. Run the same command again '
                     'to retry.')


def sweep(argv: Sequence[str]) -> None:
  """Trains on a grid of settings and seeds, and finds the best on dev rows.

    mezo-jax sweep --config=mine.py --workdir=DIR --seeds=3
        --grid.optimizer.learning_rate=1e-5,1e-4,1e-3 --config.FIELD=VALUE

  --grid.FIELD=V1,V2 lists the values of a field. Several fields make a grid. A
  value with a comma is put in quotes or brackets. Each run is a separate
  process with a directory in DIR. A run that was stopped is resumed, and a run
  that is finished is not repeated, also after values were added to the grid. A
  run that fails is listed and does not stop the others.

  The score of a run is that of its best step on the dev rows. The settings with
  the best mean over seeds are tested on the test rows. DIR gets table.md,
  table.json and sweep.png.
  """
  jax.config.update('jax_platforms', 'cpu')  # leave the devices to the runs
  own = {
      'workdir': (str, 'The directory of the table and of the runs.'),
      'seeds': (int, 'The number of seeds, counted from config.seed. Defaults '
                'to 1.'),
      'jobs': (int, 'The number of runs at a time. Defaults to 1. If it is '
               'more, each run gets one GPU. A TPU always has one at a time.')}
  rest, values_of = grid.take_grid(argv)
  values, _ = parse(rest, _doc(sweep), own, required=('workdir',),
                    configs=command_line.CONFIGS)
  table = sweep_lib.run(
      command_line.without(rest[1:], [*own]), values.workdir, values_of,
      1 if values.seeds is None else values.seeds,
      1 if values.jobs is None else values.jobs)
  print(f'{table.read_text()}\nwrote {table}, table.json and sweep.png')


def report(argv: Sequence[str]) -> None:
  """Compares runs: curves, results, and the differences of their configs.

    mezo-jax report RUN... --out=DIR

  RUN is the working directory of a run, or the directory of a sweep or a suite,
  which stands for all of its runs. Runs need not be finished. DIR gets
  report.md, report.html and the pictures. The HTML is one file, which needs no
  network.
  """
  values, runs = parse(argv, _doc(report), {
      'out': (str, 'The directory to write to. Defaults to runs/report.')},
      arguments=('RUN...',))
  page = report_lib.write(runs, values.out or 'runs/report')
  print(f'wrote {page}, report.md and the pictures')


def plan(argv: Sequence[str]) -> int:
  """Estimates memory and time of a run on hardware that you do not have.

    mezo-jax plan --config=opt:sst2 --topology=v5e:4x4 --config.FIELD=VALUE

  The exit status is 3 if the run does not fit.
  """
  jax.config.update('jax_platforms', 'cpu')  # do not occupy a local device
  values, _ = parse(argv, _doc(plan), {
      'topology': (str, 'The devices: v5e:4x4, v5p:2x2x1, v6e:2x4, v4:2x2x2 '
                   '(chips), h100:8, a100:8 or cpu:8.'),
      'mesh': (str, 'The sizes of the mesh axes, as fsdp=4,tensor=2. Defaults '
               'to the mesh of the config if it sets one, and otherwise to a '
               'mesh that splits all large arrays.'),
      'tokens': (int, 'The sequence length. Defaults to the longest that the '
                 'config allows.'),
  }, required=('topology',), configs=command_line.CONFIGS)
  n = machines.size(values.topology)
  if values.topology.startswith('cpu'):
    # JAX raises RuntimeError if its backend is already initialised. Planning
    # then uses the CPU devices that exist.
    with contextlib.suppress(RuntimeError):
      jax.config.update('jax_num_cpu_devices', n)
  found = planning.plan(
      values.config, values.topology, tokens=values.tokens,
      sizes=read_mesh(values.mesh, n) if values.mesh else None)
  print(planning.spell(found))
  if found.fits:
    if math.isinf(found.limit):
      print('The memory of these devices is unknown; compare it with the peak.')
    else:
      print('It fits.')
    return 0
  print(f'It does not fit into {found.limit / planning.GIB:g} GiB.')
  other = alternatives.what_fits(found)
  if other is None:
    print('No alternative that was tried fits.')
  else:
    change, found = other
    print(f'An alternative that fits: {change.words} '
          f'({planning.gib(found.peak())} of {found.limit / planning.GIB:g} '
          'GiB per device).')
  return DOES_NOT_FIT


def diagnose(argv: Sequence[str]) -> None:
  """Measures what decides the learning rate, the batch size and eps.

    mezo-jax diagnose --config=NAME --config.FIELD=VALUE
    mezo-jax diagnose --run=WORKDIR

  This takes forward passes only. It trains for a short test, and keeps no
  weights. It writes diagnosis.json and diagnosis.png, and prints what they say
  (docs/hyperparameters.md).
  """
  from mezo_jax.training import diagnosis
  values, _ = parse(argv, _doc(diagnose), {
      'run': (str, 'The working directory of a run, to measure at one of its '
              'checkpoints instead of at the start.'),
      'step': (int, 'The step of the checkpoint. Defaults to the best step on '
               'the dev rows.'),
      'directions': (int, 'The number of directions to measure. Standard '
                     'errors fall with its square root. Defaults to 100.'),
      'derivatives': (int, 'The number of batches on which to compare with '
                      'gradient descent and to compute the largest eigenvalue '
                      'of the Hessian. This needs the memory of '
                      'backpropagation. Defaults to 0.'),
      'out': (str, 'The directory to write to. Defaults to WORKDIR of --run, '
              'and otherwise to diagnosis.'),
  }, configs=command_line.CONFIGS)
  config, workdir = values.config, None
  if values.run:
    given = command_line.given(argv)
    if given or any(word.startswith('--config') for word in argv):
      raise InputError('--run: the config is that of the run; omit --config.')
    workdir = local(values.run)
    config = run_files.read_config(workdir)
  elif values.step is not None:
    raise InputError('--step is a step of a run; pass the run as --run.')
  count = 100 if values.directions is None else values.directions
  if count < 8:
    raise InputError(f'--directions is {count}; give at least 8.')
  hosts.check_devices()
  out = local(values.out or workdir or 'diagnosis')
  report = diagnosis.of_run(
      config, out, workdir=workdir, step=values.step, count=count,
      derivatives=values.derivatives or 0)
  print(f'\n{diagnosis.spell(report)}\n\nwrote {out}/diagnosis.json and .png')


def lm_eval(argv: Sequence[str]) -> None:
  """Evaluates a model on public benchmarks with lm-eval.

    mezo-jax lm-eval --model=RUN_OR_DIRECTORY --tasks=hellaswag,gsm8k

  RUN_OR_DIRECTORY is the working directory of a run, a directory that
  `mezo-jax export` wrote, or a model: a directory or a hub id. This needs
  `pip install 'mezo_jax[lm-eval]'`, and the data of a task are read from the
  Hugging Face hub unless its YAML file names local ones.
  """
  from mezo_jax.training import benchmarks
  values, _ = parse(argv, _doc(lm_eval), {
      'model': (str, 'The run, the exported directory or the model.'),
      'tasks': (list, "The tasks, as A,B; `lm-eval ls tasks` lists lm-eval's."),
      'include': (str, 'A directory with the YAML files of further tasks.'),
      'step': (int, 'The step of a run. Defaults to the best step on the dev '
               'rows, or for a private run to the last step.'),
      'fewshot': (int, 'The number of examples in the prompt. Defaults to that '
                  'of the task.'),
      'limit': (int, 'The number of rows of each task. Defaults to all.'),
      'chat': (bool, "Put prompts into the tokenizer's chat template."),
      'rows': (int, 'The largest number of rows of a batch. Defaults to 32.'),
      'out': (str, 'A JSON file to write the results to.'),
  }, required=('model', 'tasks'))
  out = _file(values.out)
  hosts.check_devices()
  found = benchmarks.run(
      values.model, values.tasks, step=values.step, include=values.include,
      rows=32 if values.rows is None else values.rows,
      num_fewshot=values.fewshot, limit=values.limit,
      apply_chat_template=bool(values.chat))
  print(benchmarks.table(found))
  if out:
    benchmarks.write(out, found)
    print(f'wrote {out}')


def _file(name: str | None) -> Path | None:
  """Returns the path of a file to write, or None.

  Raises:
    InputError: If it is a directory, or is not in one.
  """
  out = name and Path(name).expanduser()
  if out and (out.is_dir() or not out.parent.is_dir()):
    raise InputError(f'--out={out} is not a file in an existing directory; '
                     'give another one.')
  return out or None


def read_mesh(text: str, n: int) -> dict[str, int]:
  """Parses the value of --mesh.

  Args:
    text: Sizes of axes, such as 'fsdp=4,tensor=2'. Axes that are not named have
      size 1. One size may be -1, for the remaining devices.
    n: Number of devices.

  Returns:
    The sizes of all four axes, by name.

  Raises:
    InputError: for an unknown axis, or sizes that do not fit the devices.
  """
  sizes = dict(data=1, fsdp=1, tensor=1, direction=1)
  for part in text.split(','):
    name, _, value = part.partition('=')
    if name not in sizes or not re.fullmatch(r'-1|[1-9]\d*', value):
      raise InputError(
          f'--mesh={text!r}: {part!r} is not of the form AXIS=SIZE, such as '
          f'fsdp=4, with one of the axes {", ".join(sizes)}.')
    sizes[name] = int(value)
  if math.prod(sizes.values()) != n and -1 not in sizes.values():
    raise InputError(f'--mesh={text}: the product of the sizes must be the '
                     f'number of devices of the topology, {n}.')
  return sizes


_COMMANDS = {'train': train, 'predict': predict, 'export': export,
             'replay': replay, 'evaluate': evaluate, 'sweep': sweep,
             'report': report, 'plan': plan, 'diagnose': diagnose,
             'lm-eval': lm_eval}
