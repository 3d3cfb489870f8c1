"""Diagnoses a loss or a run: learning rates, noise, eps, rounding, curvature.

`diagnose` measures what `mezo_jax.training.curvature` defines, for any loss.
`of_run` does so for a config, before training or at a checkpoint of a run.
`spell` and `draw` show the result.
"""

from collections.abc import Callable, Iterator, Mapping
import itertools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mezo_jax import peft
from mezo_jax.core import fingerprint, paths, reports
from mezo_jax.core.errors import InputError
from mezo_jax.directions.base import Directions, Normal
from mezo_jax.directions.by_name import as_directions
from mezo_jax.directions.displacement import Displacement
from mezo_jax.runs import loggers
from mezo_jax.training import (
  build,
  checks,
  curvature,
  learning_rates,
  methods,
  mixture,
  run_files,
  saved,
)
from mezo_jax.training import config as config_lib
from mezo_jax.training import optimizer as optimizer_lib
from mezo_jax.transforms.step import make_step

# Groups of layers in the table, as regular expressions of paths. A parameter
# belongs to the first one that matches.
GROUPS = {
    'added': r'lora|prefix|prompt',
    'embedding and head': r'embed|positions|types|lm_head|^head|classifier',
    'norms': r'norm', 'attention': r'attn', 'MLP': r'mlp|experts'}
_SCALES = tuple(float(x) for x in np.geomspace(1e-5, 1e-1, 9))
_WRONG = 0.1  # relative error of projected gradients that is too large
# Rates that are tried, relative to the largest stable rate.
_FACTORS = tuple(2.0**i for i in range(-9, 1))


def forwards(count: int, num_samples: int, groups: int = 0) -> int:
  """Returns the forward passes of a batch that `diagnose` takes.

  Args:
    count: As for `diagnose`.
    num_samples: As for `diagnose`.
    groups: Number of groups of parameters. Defaults to 0.
  """
  return (6 * count + 6 * groups * _some(count)
          + count // 2 * (2 * num_samples + 1 + len(_FACTORS))
          + 2 * len(_SCALES) * _some(count))


def _some(count: int) -> int:
  """Returns the number of directions for the less important measurements."""
  return max(count // 4, 8)


def diagnose(value_fn: Callable[..., Any], params: Any,
             batches: Iterator[Mapping[str, Any]], *, eps: float = 1e-3,
             key: jax.Array | int = 0, num_samples: int = 1,
             directions: Directions | str = Normal(), count: int = 100,
             learning_rate: float | None = None,
             groups: Mapping[str, str] | None = None,
             derivatives: int = 0) -> dict[str, Any]:
  r"""Measures what decides learning rate, batch size and eps of a loss.

  With the projected gradients g and curvatures c of
  `mezo_jax.training.curvature`, a step of rate η along n directions changes the
  loss by

  .. math:: -\eta |\nabla L|^2 + \frac{\eta^2}{2} \left( \frac{E[g_1^2 c_2]}{n}
     + \left(1 - \frac{1}{n}\right) E[\nabla L_B^\top H \nabla L_B] \right)

  on average, where all expectations are over directions and batches. This
  function measures them by forward passes. docs/hyperparameters.md explains how
  to read the result.

  Args:
    value_fn: The loss, ``value_fn(params, **batch)``, as in `mezo_jax.spsa`.
    params: The params. They are not changed.
    batches: Yields the arguments of the loss by name, for one batch after the
      other. `forwards` bounds how many are used.
    eps: Perturbation scale. Defaults to 1e-3.
    key: A PRNG key or an integer seed. Defaults to 0.
    num_samples: Number n of directions of a step. Defaults to 1.
    directions: Distribution of z in training, or its name. The curvature is
      always measured with normal directions. Defaults to ``Normal()``.
    count: Number of directions to measure. Standard errors fall with its square
      root. Defaults to 100.
    learning_rate: Learning rate of the training. Defaults to None, which leaves
      out the shares of half-precision weights that an update moves.
    groups: Groups of params for a table, ``{name: regular expression}``. A
      param belongs to the first group whose expression is found in its path.
      Defaults to None, for no table.
    derivatives: Number of batches on which to compare with gradient descent and
      to compute the largest eigenvalue. This takes the memory of
      backpropagation. Defaults to 0, for none.

  Returns:
    A dict of JSON values. A measured number is a dict of 'value' and 'error',
    its standard error.
  """
  directions = as_directions(directions)
  key = jax.random.key(key) if isinstance(key, int) else key
  keys = (jax.random.fold_in(key, i) for i in itertools.count())
  normal = Normal(mask=directions.mask)
  more = dict(eps=eps)
  samples = curvature.sample(value_fn, params, batches, count, key=next(keys),
                             directions=normal, **more)
  n = num_samples
  report: dict[str, Any] = {
      'num_samples': n, 'eps': eps, 'count': count,
      **{name: _measured(samples, lambda q, name=name: getattr(q, name))
         for name in curvature.Quantities._fields},
      'best_rate': _measured(samples, lambda q: q.best_rate(n)),
      'largest_stable_rate': _measured(
          samples, lambda q: q.largest_stable_rate(n)),
      'slowdown': _measured(samples, lambda q: q.slowdown(n)),
      'gain_of_rows': _measured(samples, lambda q: 2 / (1 + q.signal)),
      'gain_of_directions': _measured(
          samples, lambda q: q.per_step(n) / q.per_step(2 * n))}
  top = report['largest_stable_rate']['value']
  if not np.isfinite(top) or top <= 0:  # the measured curvature is negative
    top = 1e-2
  rates = [top * factor for factor in _FACTORS]
  found = curvature.decreases(
      value_fn, params, batches, rates, n, count // 2, key=next(keys),
      directions=directions, **more)
  report['steps'] = {
      'rates': rates, 'decrease': found.mean(0).tolist(),
      'error': (found.std(0) / np.sqrt(len(found))).tolist()}
  found = curvature.gradients_by_eps(
      value_fn, params, batches, _SCALES, _some(count), key=next(keys),
      directions=directions)
  errors = curvature.errors_of_eps(found)
  fits = [s for s, e in zip(_SCALES, errors) if e < _WRONG]
  report['eps_range'] = {
      'scales': list(_SCALES), 'error': errors.tolist(),
      'from': min(fits, default=None), 'to': max(fits, default=None)}
  report['configured'] = learning_rate
  if learning_rate is not None:
    g = np.sqrt(report['batch_gradient']['value'])
    update = Displacement(
        next(keys)[None], jnp.full(1, learning_rate * g, jnp.float32))
    report['moved'] = curvature.moved_shares(params, update, directions)
  report['groups'] = [
      _group(name, paths_of, value_fn, params, batches, _some(count),
             next(keys), **more)
      for name, paths_of in _members(params, normal, groups or {}).items()]
  if derivatives:
    report['derivatives'] = _with_derivatives(
        value_fn, params, [next(batches) for _ in range(derivatives)], report,
        next(keys), rates, n, directions, count // 2, eps)
  return report


def _measured(samples: curvature.Samples, function: Callable) -> dict:
  """Returns an estimate and its standard error by name."""
  return dict(zip(('value', 'error'), curvature.spread(samples, function)))


def _members(params: Any, directions: Directions, groups: Mapping[str, str]
             ) -> dict[str, set[str]]:
  """Returns the paths of the trained params of each group that has some."""
  if not groups:
    return {}
  found: dict[str, set[str]] = {}
  expressions = {expression: name for name, expression in groups.items()}
  used = paths.resolved(params, directions.mask)
  for (path, x), use in zip(paths.named_leaves(params), used):
    if use is False or not paths.is_floating(x):
      continue
    group = paths.group_of(path, expressions | {'': ''})
    found.setdefault(expressions.get(group, 'other'), set()).add(path)
  return found


def _group(name: str, members: set[str], value_fn, params, batches, count, key,
           *, eps: float) -> dict[str, Any]:
  """Returns the row of one group of params in the table."""
  mask = paths.map_named(lambda path, _: path in members, params)
  samples = curvature.sample(value_fn, params, batches, count, eps=eps, key=key,
                             directions=Normal(mask=mask))
  size = sum(x.size for path, x in paths.named_leaves(params)
             if path in members)
  return {'group': name, 'parameters': size} | {
      field: _measured(samples, lambda q, field=field: getattr(q, field))
      for field in ('batch_gradient', 'signal', 'trace')} | {
      'ratio': _measured(samples, lambda q: q.batch_gradient / q.trace)}


def _with_derivatives(value_fn, params, batches, report, key, rates, n,
                      directions, count, eps) -> dict[str, Any]:
  """Compares with gradient descent on the mean loss of some batches.

  Returns:
    A dict of 'eigenvalue' (with the norm of its residual as 'error'), 'rank'
    (tr H divided by it), 'predicted' and 'measured', which are slow-downs
    against gradient descent, and 'batches'.
  """
  loss = curvature.mean_loss(value_fn, batches)
  value, rest = curvature.largest_eigenvalue(loss, params, key=key)
  rank = report['trace']['value'] / abs(value)
  # Rates of gradient descent are larger by about the slow-down.
  best = curvature.descents(loss, params, [
      2.0**i / abs(value) for i in range(-4, 5)]).max()
  found = curvature.decreases(
      lambda params: loss(params), params, itertools.repeat({}), rates, n,
      count, eps=eps, key=key, directions=directions).mean(0).max()
  return {
      'batches': len(batches), 'eigenvalue': {'value': value, 'error': rest},
      'rank': rank, 'predicted': (n + rank + 1) / n,
      'measured': float(best / found) if found > 0 else None}


# --- a run ------------------------------------------------------------------


def of_run(config: config_lib.Train, out: Path, *,
           workdir: Path | None = None, step: int | None = None,
           count: int = 100, derivatives: int = 0,
           say: Callable[[str], None] = print) -> dict[str, Any]:
  """Diagnoses the loss that a config trains, and writes and draws the result.

  Args:
    config: Config of the run. Its method must train by forward passes.
    out: Directory for ``diagnosis.json`` and ``diagnosis.png``. It is created.
    workdir: Working directory of a run of this config, whose weights are used.
      Defaults to None, for the weights before training.
    step: Step of the checkpoint in ``workdir``. Defaults to None, for the best
      step on the dev rows.
    count: As for `diagnose`.
    derivatives: As for `diagnose`.
    say: A function that reports a line to the user. Defaults to `print`.

  Returns:
    As `diagnose`, with the keys 'step', 'steps_of_run', 'schedule' and 'rows'.

  Raises:
    InputError: if the config cannot be diagnosed.
    MissingError: if the directory has no such checkpoint.
  """
  checks.check_config(config)
  method = methods.method_of(config)
  if not method.steps or method.backprop:
    raise InputError(f'--config.method={config.method} does not train by '
                     'forward passes; diagnose --config.method=mezo.')
  if method.private:
    raise InputError('--config.method=private: the report would reveal private '
                     'rows; diagnose a config with public ones.')
  if config_lib.is_rewarded(config):
    raise InputError(
        "--config.objective: diagnose does not support 'reward'. The metrics "
        'reward_std and identical of a few steps tell how to choose spsa.eps '
        '(docs/rewards.md).')
  configured = None
  if config_lib.is_auto(config):
    config = config_lib.with_learning_rate(config, 1.0)
  else:
    configured = config_lib.learning_rate(config)
  built = build.build(config, say=say)
  tasks = mixture.make(config, built, out / 'hidden_states', say)
  params, mesh, at = built.params, built.mesh, 0
  if workdir is not None:
    run_files.check_inputs(
        config, workdir, built.model.config, built.tokenizer,
        fingerprint.of_weights(peft.join(built.params, built.frozen),
                               methods.made(config)), tasks.splits, None)
    checkpoints, at = saved.find_step(workdir, config, step)
    state = checkpoints.load(at, (built.params, built.opt_state))
    checkpoints.close()
    assert built.tx is not None  # the method trains
    params, _ = make_step(built.tx, None, mesh=mesh).apply_accumulated(*state)
  size = forwards(count, config.spsa.num_samples, len(GROUPS))
  say(f'measuring with about {size} forward passes of '
      f'{config.data.batch_size} rows')
  source = tasks.feed(mesh, 0, 10**6)
  batches = ({'of': of, 'frozen': tasks.frozen(of)} for _, of, _ in source)

  def value_fn(params, of, frozen):
    return tasks.value_fn(peft.join(params, frozen), of)
  with jax.set_mesh(mesh):
    report = diagnose(
        value_fn, params, batches, eps=config.spsa.eps,
        key=config.seed + 2**20,  # not the directions of the run
        num_samples=config.spsa.num_samples,
        directions=optimizer_lib.directions(config), count=count,
        learning_rate=configured, groups=GROUPS, derivatives=derivatives)
  report = {'step': at, 'steps_of_run': config.steps,
            'schedule': config.optimizer.schedule,
            'rows': config.data.batch_size,
            'usual': methods.part_of(config).usual} | report
  loggers.write_json(out / 'diagnosis.json', report)
  check = built.host.check if built.host else lambda: None
  built = built.without_weights()
  if methods.finds_rate(config):
    report['suggested'] = _suggested(config, tasks, params, mesh, check, say)
  loggers.write_json(out / 'diagnosis.json', report)
  draw(out / 'diagnosis.png', report)
  return report


def _suggested(config: config_lib.Train, tasks: mixture.Mixture, params: Any,
               mesh: jax.sharding.Mesh, check: Callable[[], None],
               say: Callable[[str], None]) -> dict[str, Any] | None:
  """Makes a range test; returns None if it finds no rate.

  The parameters are donated.
  """
  try:
    found = learning_rates.test_of_run(
        config, tasks, params, mesh, check, say)
  except InputError as e:
    say(f'warning: {e}')
    return None
  rate = learning_rates.suggested(
      found.edge, config.steps, config.optimizer.schedule,
      config.spsa.num_samples)
  return {'learning_rate': rate,
          'why': learning_rates.in_words(found, config)} | found._asdict()


# --- how it is shown --------------------------------------------------------


def spell(report: dict[str, Any]) -> str:
  """Returns a diagnosis as text for one screen.

  Args:
    report: A report of `of_run`.
  """
  n, steps = report['num_samples'], report['steps']
  best = int(np.argmax(steps['decrease']))
  limits = report['eps_range']
  lines = [
      f'at step {report["step"]}: loss {_number(report["loss"])}; batches of '
      f'{report["rows"]} rows, {n} direction{"s" if n > 1 else ""} a step',
      '', 'Learning rate', *_of_rates(report),
      f'  best for one step          {_number(report["best_rate"])}',
      f'  the same, by trying steps  {steps["rates"][best]:.2g} of '
      f'{steps["rates"][0]:.2g} to {steps["rates"][-1]:.2g}',
      '  a step raises the loss of its own batch from '
      f'{_number(report["largest_stable_rate"])}',
      '', 'Noise',
      f'  {_percent(report["signal"])} of the square of a projected gradient '
      'is signal of all rows; the rest is noise of the batch',
      f'  twice the rows: a step gains {_number(report["gain_of_rows"])} times '
      'as much',
      f'  twice the directions: {_number(report["gain_of_directions"])} times '
      'as much',
      '', f'eps {report["eps"]:g}']
  if limits['from'] is None:
    lines.append('  no eps from 1e-5 to 0.1 gives projected gradients with an '
                 'error below 10 %')
  else:
    lines.append(f'  {limits["from"]:.1g} to {limits["to"]:.1g} gives '
                 'projected gradients with an error below 10 %')
  if report['moved']:
    near, expected = report['moved']
    lines += ['', 'Rounding', '  an update of the configured rate moves '
              f'{near:.2%} of the half-precision weights, or {expected:.2%} '
              'with stochastic rounding']
  lines += [
      '', 'Curvature',
      f'  trace of the Hessian {_number(report["trace"])}',
      f'  effective rank along the gradient {_number(report["rank"])}; so a '
      f'step gains {_number(report["slowdown"])} times less than one of '
      'gradient descent on the same batch']
  exact = report.get('derivatives')
  if exact:
    measured = exact['measured']
    lines += [
        f'  on {exact["batches"]} batches: largest eigenvalue '
        f'{_number(exact["eigenvalue"])}, effective rank tr H / |H| '
        f'{exact["rank"]:.3g}',
        '  slow-down against gradient descent: predicted by the paper '
        f'{exact["predicted"]:.3g}, measured '
        f'{"nothing" if measured is None else f"{measured:.3g}"}']
  if report['groups']:
    total = sum(g['batch_gradient']['value'] for g in report['groups']) or 1.0
    lines += ['', reports.markdown_table([{
        'parameters': g['group'], 'number': f'{g["parameters"]:,}',
        'share of the squared gradient':
            f'{g["batch_gradient"]["value"] / total:.0%}',
        'signal': _percent(g['signal']), 'trace': _number(g['trace']),
        'relative rate': _relative(g['ratio'], report)}
        for g in report['groups']])]
  return '\n'.join(lines)


def _of_rates(report: dict[str, Any]) -> list[str]:
  """Returns the lines with the suggested, configured and usual rates."""
  lines, found = [], report.get('suggested')
  if found:
    lines += [f'  suggested                  {found["learning_rate"]:.2g}',
              f'    {found["why"]}']
  if report['configured'] is not None:
    lines.append(f'  configured                 {report["configured"]:.2g}')
  if report['usual']:
    low, high = (f'{rate:.0e}' for rate in report['usual'])
    lines.append('  of the MeZO paper          '
                 f'{low if low == high else f"{low} to {high}"}')
  return lines


def _number(measured: dict[str, float]) -> str:
  """Returns a number with its standard error, both with the same exponent."""
  return f'{measured["value"]:.3g} ± {measured["error"]:.1g}'


def _relative(ratio: dict[str, float], report: dict[str, Any]) -> str:
  """Returns the best rate of a group relative to that of all parameters.

  A step changes the loss of its own batch by -sum(eta_i G_i) + E[g^2]
  sum(eta_i^2 T_i) / 2, with the squared gradient G_i of a batch and the trace
  T_i of group i, if one direction is used and its noise dominates. So the best
  rates have the ratios of G_i / T_i.
  The result is '' if the ratio has an error of more than half its value.
  """
  whole = report['batch_gradient']['value'] / report['trace']['value']
  if not 0 < 2 * ratio['error'] < ratio['value'] or whole <= 0:
    return ''
  return f'{ratio["value"] / whole:.2g}'


def _percent(measured: dict[str, float]) -> str:
  """Returns a share with its standard error, in percent."""
  return f'{measured["value"]:.0%} ± {measured["error"]:.0%}'


def draw(path: Path, report: dict[str, Any]) -> None:
  """Draws the decrease of the loss by one step, and the error of each eps.

  If the report has a range test, a third panel shows it.

  Args:
    path: The image file to write.
    report: A report of `of_run`.
  """
  from matplotlib.figure import Figure  # slow to import
  figure = Figure(figsize=(12, 3.5), layout='constrained')
  test = report.get('suggested')
  left, right, *others = figure.subplots(1, 3 if test else 2)
  steps, n = report['steps'], report['num_samples']
  rates = np.geomspace(steps['rates'][0], steps['rates'][-1], 200)
  gradient = report['gradient']['value']
  curved = (report['cost']['value'] / n
            + (1 - 1 / n) * report['along']['value'])
  left.plot(rates, rates * gradient - rates**2 / 2 * curved, color='C0',
            label='quadratic model')
  left.errorbar(steps['rates'], steps['decrease'], steps['error'], fmt='o',
                color='C1', label='steps that were tried')
  low, high = (np.array(steps['decrease']) + np.outer(
      (-2, 2), steps['error'])).min(), max(steps['decrease'])
  if high:
    left.set_ylim(min(low, -high), 2 * abs(high))
  left.axhline(0, color='0.6', lw=0.8)
  if report.get('configured'):
    left.axvline(report['configured'], color='0.4', ls=':', label='configured')
  left.set(xscale='log', xlabel='learning rate',
           ylabel='decrease of the loss by one step')
  left.legend()
  limits = report['eps_range']
  right.plot(limits['scales'], limits['error'], 'o-')
  right.axhline(_WRONG, color='0.6', lw=0.8)
  right.axvline(report['eps'], color='0.4', ls=':', label='configured')
  right.set(xscale='log', yscale='log', xlabel='eps',
            ylabel='relative error of projected gradients')
  right.legend()
  if test:
    axis, = others
    axis.plot(test['rates'], test['changes'], '.', ms=3)
    axis.axvline(test['edge'], color='C3', label='edge')
    axis.axvline(test['learning_rate'], color='C2', label='suggested')
    axis.axhline(0, color='0.6', lw=0.8)
    axis.set(xscale='log', xlabel='learning rate in the range test',
             ylabel="change of the batch's loss",
             ylim=(-1.1 * abs(test['loss']), 2 * abs(test['loss'])))
    axis.legend()
  figure.savefig(path, dpi=110)
