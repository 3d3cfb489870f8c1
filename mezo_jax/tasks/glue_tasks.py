"""Declares the four GLUE tasks on which MeZO-SVRG was evaluated.

They have no prompt: a new linear layer on the features of the model predicts
the class of a text or of a pair of texts.

References:
  Gautam et al. (2024), Variance-reduced Zeroth-Order Methods for Fine-Tuning
    Language Models, Section 5.
"""

from mezo_jax.tasks.task import Task

_HUB = 'nyu-mll/glue'

TASKS = (
    Task(
        name='glue_mnli', kind='head', hub=_HUB, subset='mnli',
        test_split='validation_matched', template='{premise}{sep}{hypothesis}',
        label_names=('entailment', 'neutral', 'contradiction')),
    Task(
        name='glue_qnli', kind='head', hub=_HUB, subset='qnli',
        template='{question}{sep}{sentence}',
        label_names=('entailment', 'not_entailment')),
    Task(
        name='glue_sst2', kind='head', hub=_HUB, subset='sst2',
        template='{sentence}', label_names=('negative', 'positive')),
    Task(
        name='glue_cola', kind='head', hub=_HUB, subset='cola',
        template='{sentence}', metric='matthews',
        label_names=('unacceptable', 'acceptable')),
)
