"""Kills training runs repeatedly, and checks that nothing is lost.

  python benchmarks/kill.py [--kills 200] [--within 16] [--ways mezo,svrg]

Runs of train.py on a tiny random model are killed (kill -9) after a random time
of at most --within seconds, while they load, compile, step, save, evaluate or
replay steps, and are restarted until they end. The results are compared with
those of a run that is not disturbed: parameters and optimizer state must be
bitwise equal, and so must each line of metrics except for its seconds. Writes
benchmarks/results/kill.md and .json. 200 kills take 40 minutes on 2 CPU cores.
"""

import argparse
import collections
import json
from pathlib import Path
import re
import signal
import subprocess
import sys
import tempfile
import time

import harness
import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / 'tests'))

import conftest  # noqa: E402
import runs  # noqa: E402

STEPS = 400
MORE = [f'--config.steps={STEPS}', '--config.eval_every=40',
        '--config.checkpoint_every=30', '--config.zero_shot=False']
WAYS = {
    'mezo': [],
    'mezo, bfloat16, decayed, linear': [
        '--config.model.dtype=bfloat16', '--config.optimizer.weight_decay=0.1',
        '--config.optimizer.schedule=linear'],
    'pending, low rank': [
        '--config.spsa.apply_every=8', '--config.spsa.distribution=low_rank',
        '--config.spsa.rank=2'],
    'svrg': ['--config.method=svrg', '--config.variant.every=4'],
    'adam, backpropagation': ['--config.method=finetune'],
}


def rows(directory: Path) -> Path:
  """Writes a small data set."""
  rng = np.random.RandomState(1)
  path = directory / 'rows.jsonl'
  path.write_text('\n'.join(json.dumps({
      'text': ' '.join(rng.choice(conftest.WORDS[4:], rng.randint(2, 12))),
      'label': i % 2}) for i in range(120)))
  return path


def doing(output: str) -> str:
  """Returns what a process was doing, according to its last line of output."""
  last = output.strip().splitlines()[-1:] or ['']
  for what, pattern in (
      ('importing', r'^$'), ('making steps again', r'resumed|from the log'),
      ('stepping', r'step \d+ of|step \d+: dev'), ('compiling', 'compile')):
    if re.search(pattern, last[0]):
      return what
  return 'ending' if 'final' in output else 'loading'


def killed(args, workdir: Path, rng, kills: int, within: float) -> dict:
  """Starts a run until it ends, and kills it up to ``kills`` times.

  Returns:
    A dict: the numbers of kills and of starts, how often it was killed while
    doing what, and how many steps each restart repeated.
  """
  count, lost, during = 0, [], collections.Counter()
  started, ends = 0, workdir / 'result.json'
  while not ends.exists():
    with tempfile.TemporaryFile('w+') as out:
      before = steps_of(workdir)
      process = subprocess.Popen(
          runs.command(*args), env=ENV, text=True, stdout=out,
          stderr=subprocess.STDOUT)
      started += 1
      try:
        process.wait(rng.uniform(0, within) if count < kills else 600)
      except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
        count += 1
      out.seek(0)
      said = out.read()
    if process.returncode not in (0, -signal.SIGKILL):
      raise RuntimeError(said)
    if process.returncode:
      during[doing(said)] += 1
    for step in re.findall(r'resumed from step (\d+)', said):
      lost.append(before - int(step))
  return dict(kills=count, started=started, during=during, lost=lost)


def steps_of(workdir: Path) -> int:
  """Returns the last step in the metrics of a run, or 0."""
  file = workdir / 'metrics.jsonl'
  return max((int(x) for x in re.findall(
      r'"train", "step": (\d+)', file.read_text())), default=0) if (
          file.exists()) else 0


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument('--kills', type=int, default=200)
  parser.add_argument('--within', type=float, default=16)
  parser.add_argument('--ways', default=','.join(WAYS))
  options = parser.parse_args()
  table, began, rng = [], time.time(), np.random.default_rng(0)
  ways = [w for w in WAYS if w in options.ways]
  with tempfile.TemporaryDirectory() as folder:
    folder = Path(folder)
    model, data = conftest.write_tiny_model(folder / 'model'), rows(folder)
    for number, way in enumerate(ways):
      args = lambda where, way=way: (model, data, where, *MORE, *WAYS[way])
      whole = folder / f'{number}_whole'
      subprocess.run(runs.command(*args(whole)), env=ENV, check=True,
                     stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
      seen, wanted = [], -(-options.kills // len(ways))
      while wanted > sum(s['kills'] for s in seen):
        where = folder / f'{number}_{len(seen)}'
        left = wanted - sum(s['kills'] for s in seen)
        seen.append(killed(args(where), where, rng, left, options.within))
        same = jax.tree.all(jax.tree.map(
            lambda x, y: np.asarray(x).tobytes() == np.asarray(y).tobytes(),
            *(runs.saved(w, state=True)[1] for w in (where, whole))))
        lines = runs.records(where) == runs.records(whole)
        seen[-1] |= dict(same=same, lines=lines)
        print(way, seen[-1], flush=True)
      during = sum((s['during'] for s in seen), collections.Counter())
      table.append({
          'run': way, 'killed': sum(s['kills'] for s in seen),
          'while': ', '.join(f'{k} {v}' for k, v in during.most_common()),
          'runs': len(seen),
          'bitwise the same': sum(s['same'] for s in seen),
          'same metrics': sum(s['lines'] for s in seen),
          'steps made twice, at most': max(
              (x for s in seen for x in s['lost']), default=0)})
      harness.write('kill', harness.header(
          f'{time.time() - began:.0f} s in all'), [(
              f'{STEPS} steps, an evaluation every 40, a checkpoint every 30, '
              'started again until they ended:', table)])


ENV = runs.environment()
if __name__ == '__main__':
  main()
