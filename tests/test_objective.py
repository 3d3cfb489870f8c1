"""Which objectives fit a task."""

import pytest

from mezo_jax.tasks import objective as objectives
from mezo_jax.tasks import Task


def test_objectives_that_fit_and_that_do_not():
  def check(objective, kind='classification', mask=''):
    task = Task(kind=kind, template='{text}' + mask)
    objectives.check_objective(task, objective)
  for objective in ('lm', 'cross_entropy', 'accuracy', 'f1', max):
    check(objective)
    assert objectives.gold_only(objective) == (objective == 'lm')
  for *args, message in (
      ('cross_entropy', 'generation', "'cross_entropy' .*'generation'"),
      ('lm', 'head', "'lm' .*'head'"),
      ('lm', 'classification', '{mask}', "'lm' .*{mask}"),
      ('bleu', "'bleu' .*'classification'")):
    with pytest.raises(ValueError, match=message):
      check(*args)
  default = lambda **changes: objectives.of(Task(**changes))
  assert [default(kind=kind) for kind in (
      'classification', 'head', 'multiple_choice', 'generation')] == [
          'cross_entropy', 'cross_entropy', 'lm', 'lm']
  assert default(objective='f1') == 'f1'
  assert objectives.of(Task(objective='f1'), 'lm') == 'lm'
