"""Declares the eleven tasks on which the MeZO paper fine-tunes OPT.

The rows are those of the data sets on the hub, or of a local file with the same
columns. The ``label`` of the SuperGLUE tasks has the meaning that SuperGLUE
gives it.

References:
  Malladi et al. (2023), Fine-Tuning Language Models with Just Forward Passes,
    Appendix E.2 and the prompts of Table 14.
"""

from mezo_jax.core.errors import InputError
from mezo_jax.tasks.task import Task

_SUPER_GLUE = 'aps/super_glue'


def _boolq(row):
  """Gives the question a capital and a question mark, and converts the label.

  Class 0 is true, because the label words are 'Yes' and 'No'.
  """
  question, answer = row['question'], str(row['answer']).strip().lower()
  question += '' if question.endswith('?') else '?'
  labels = {'true': 0, '1': 0, 'false': 1, '0': 1}
  if answer not in labels:
    raise InputError(f"task 'boolq': the answer {row['answer']!r} in column "
                     "'answer' is neither true nor false; fix the row.")
  return row | {'question': question[:1].upper() + question[1:],
                'label': labels[answer]}


def _wsc(row):
  """Writes the pronoun in lower case."""
  return row | {'span2_text': row['span2_text'].lower()}


def _copa(row):
  """Prepares premise, connective and choices as parts of one sentence."""
  def continues(choice):
    """Writes the first word of a choice in lower case, unless it is 'I'."""
    first, *rest = choice.split(' ')
    return ' '.join([first if first == 'I' else first.lower(), *rest])
  premise = row['premise'].rstrip()
  return row | {
      'premise': premise[:-1] if premise.endswith('.') else premise,
      'connective': 'so' if row['question'] == 'effect' else 'because',
      'choices': [continues(row['choice1']), continues(row['choice2'])]}


def _record(row):
  """Fills the blank of the query with each entity, which gives the choices.

  Several of them may be right. A row whose answers are not among its entities
  is left out.
  """
  for column in ('entities', 'answers'):
    if not isinstance(row[column], (list, tuple)):
      raise InputError(f"task 'record': column {column!r} must be a list, got "
                       f'{row[column]!r}; use a jsonl or parquet file.')
  entities = list(dict.fromkeys(row['entities']))
  answers = [a for a in row['answers'] if a in entities]
  if not answers:
    return None
  return row | {
      'passage': row['passage'].replace('@highlight\n', '- '),
      'choices': [row['query'].replace('@placeholder', e) for e in entities],
      'label': [entities.index(a) for a in answers]}


def _drop(row):
  """Collects the spans of the answers in a list."""
  if not isinstance(row['answers_spans'], dict):
    raise InputError("task 'drop': column 'answers_spans' must be an object, "
                     f"got {row['answers_spans']!r}; use a jsonl or parquet "
                     'file.')
  return row | {'question': row['question'].strip(),
                'answers': list(row['answers_spans']['spans'])}


TASKS = (
    Task(
        name='sst2', hub='nyu-mll/glue', subset='sst2',
        template='{sentence} It was', calibration=' It was',
        label_words=(' terrible', ' great')),
    Task(
        name='rte', hub=_SUPER_GLUE, subset='rte', strip=False, calibration='',
        template='{premise}\nDoes this mean that "{hypothesis}" is true? '
                 'Yes or No?\n',
        label_words=('Yes', 'No')),
    Task(
        name='cb', hub=_SUPER_GLUE, subset='cb', strip=False, calibration='',
        template='Suppose {premise} Can we infer that "{hypothesis}"? '
                 'Yes, No, or Maybe?\n',
        label_words=('Yes', 'No', 'Maybe')),
    Task(
        name='boolq', hub='google/boolq', strip=False, calibration='',
        row=_boolq, template='{passage} {question}\n',
        label_words=('Yes', 'No')),
    Task(
        name='wsc', hub=_SUPER_GLUE, subset='wsc.fixed', strip=False,
        calibration='', row=_wsc,
        template='{text}\nIn the previous sentence, does the pronoun '
                 '"{span2_text}" refer to {span1_text}? Yes or No?\n',
        label_words=('No', 'Yes')),
    Task(
        name='wic', hub=_SUPER_GLUE, subset='wic', strip=False, calibration='',
        template='Does the word "{word}" have the same meaning in these two '
                 'sentences? Yes, No?\n{sentence1}\n{sentence2}\n',
        label_words=('No', 'Yes')),
    Task(
        name='multirc', hub=_SUPER_GLUE, subset='multirc', strip=False,
        calibration='',
        template='{paragraph}\nQuestion: {question}\nI found this answer '
                 '"{answer}". Is that correct? Yes or No?\n',
        label_words=('No', 'Yes')),
    Task(
        name='copa', kind='multiple_choice', hub=_SUPER_GLUE, subset='copa',
        strip=False, row=_copa, template='{premise} {connective}',
        calibration='{connective}'),
    Task(
        name='record', kind='multiple_choice', hub=_SUPER_GLUE,
        subset='record', strip=False, row=_record, template='{passage}\n-',
        calibration='-'),
    Task(
        name='squad', kind='generation', hub='rajpurkar/squad', strip=False,
        row=lambda row: row | {'question': row['question'].strip()},
        template='Title: {title}\nContext: {context}\nQuestion: {question}\n'
                 'Answer:'),
    Task(
        name='drop', kind='generation', hub='ucinlp/drop', strip=False,
        row=_drop,
        template='Passage: {passage}\nQuestion: {question}\nAnswer:'),
)
