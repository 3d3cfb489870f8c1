"""The four GLUE tasks of MeZO-SVRG (Gautam et al., 2024, Section 5): no prompt,
but a new linear layer on what the model makes of the text."""

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
