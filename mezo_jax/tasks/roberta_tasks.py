"""Declares the six tasks on which the MeZO paper fine-tunes RoBERTa-large.

The prompts are for masked models, which predict a label word at ``{mask}``. The
paper uses k training rows and k dev rows of each label, with k = 16 or 512 and
the seeds in `SEEDS`. Set k as ``data.k_shot`` and the seed as ``data.seed``.

References:
  Malladi et al. (2023), Fine-Tuning Language Models with Just Forward Passes,
    Table 13.
  Gao et al. (2021), Making Pre-trained Language Models Better Few-shot Learners
    (LM-BFF), whose prompts these are.
"""

from mezo_jax.tasks.task import Task

SEEDS = (13, 21, 42, 87, 100)
_PAIR = '{first}?{mask}, {second}'


def _pair(first: str, second: str):
  """Returns a function that prepares the two texts of a row for `_PAIR`.

  The first text loses its last character, which is usually a full stop, since
  the template adds a question mark. The second begins in lower case, since it
  continues a sentence.

  Args:
    first: Column of the first text.
    second: Column of the second text.
  """
  def row_of(row):
    a, b = row[first].strip(), row[second].strip()
    if str(row['label']) == '-1':  # In SNLI, the annotators did not agree.
      return None
    return row | {'first': a[:-1], 'second': b[:1].lower() + b[1:]}
  return row_of


TASKS = (
    Task(
        name='roberta_sst2', hub='nyu-mll/glue', subset='sst2',
        template='{sentence} It was{mask}.',
        label_words=(' terrible', ' great')),
    Task(
        name='roberta_sst5', hub='SetFit/sst5', test_split='test',
        template='{text} It was{mask}.', limits=(('text', 110),),
        label_words=(' terrible', ' bad', ' okay', ' good', ' great')),
    Task(
        name='roberta_snli', hub='stanfordnlp/snli', template=_PAIR,
        row=_pair('premise', 'hypothesis'), label_words=(
            ' Yes', ' Maybe', ' No')),  # entailment, neutral, contradiction
    Task(
        name='roberta_mnli', hub='nyu-mll/glue', subset='mnli', template=_PAIR,
        test_split='validation_matched', row=_pair('premise', 'hypothesis'),
        limits=(('first', 240),), label_words=(' Yes', ' Maybe', ' No')),
    Task(
        name='roberta_rte', hub='nyu-mll/glue', subset='rte', template=_PAIR,
        row=_pair('sentence1', 'sentence2'), limits=(('first', 240),),
        label_words=(' Yes', ' No')),
    Task(
        name='roberta_trec', hub='SetFit/TREC-QC', test_split='test',
        template='{mask}: {text}', limits=(('text', 110),),
        label_column='label_coarse_original',
        label_names=('DESC', 'ENTY', 'ABBR', 'HUM', 'LOC', 'NUM'),
        label_words=(' Description', ' Entity', ' Expression', ' Human',
                     ' Location', ' Number')),
)
