"""Tests of tokens that a tokenizer adds around a text, or that end one."""

import numpy as np
import pytest
from texts import BOS, byte_level, MASK, of_kind, PLAIN, spelled, X
from tokenizers import (
  decoders,
  models,
  normalizers,
  pre_tokenizers,
  processors,
  Tokenizer,
)
import transformers

from mezo_jax import tasks
from mezo_jax.tasks import data as data_lib
from mezo_jax.tasks import score
from mezo_jax.tasks.encode import encode, space_warnings

FILM = dict(text='a film', label=1)
GEN = dict(kind='generation', answers_column='text', max_new_tokens=4)


def fast(raw, **special):
  return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, **special)


def words(single=None, lower=False, metaspace='', **special):
  """A tokenizer of words, or of words with a sign for the space before."""
  vocab = '<s> </s> <unk> <cls> a film It was bad good fun . dull'.split()
  if metaspace:
    vocab += ['▁', *(f'▁{word}' for word in vocab[4:]), '<0x0A>']
  raw = Tokenizer(models.WordLevel(
      {w: i for i, w in enumerate(vocab)}, unk_token='<unk>'))
  raw.pre_tokenizer = pre_tokenizers.Whitespace()
  if metaspace:
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=metaspace)
    raw.decoder = decoders.Metaspace(prepend_scheme=metaspace)
  if lower:
    raw.normalizer = normalizers.Sequence(
        [normalizers.Strip(), normalizers.Lowercase()])
  if single:
    raw.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[('<s>', 0), ('</s>', 1), ('<cls>', 3)])
  return fast(raw, **dict(bos_token='<s>', eos_token='</s>',
                          unk_token='<unk>') | special)


@pytest.mark.parametrize('write_out', [False, True])
@pytest.mark.parametrize('single,start', [
    ('$A', []), ('<s> $A', ['<s>']), ('$A </s>', []),
    ('<s> $A </s>', ['<s>']), ('<cls> $A </s>', ['<cls>']),
    ('<s> <cls> $A </s> </s>', ['<s>', '<cls>'])])
def test_the_answer_is_scored_and_not_what_follows(single, start, write_out):
  tokenizer = words(single)
  of = tokenizer.convert_tokens_to_ids
  task = of_kind(template='{text} It was')
  data = encode(task, [FILM], tokenizer, 64, write_out=write_out)
  assert data.prompts == [of([*start, 'a', 'film', 'It', 'was'])]
  if write_out:
    assert data.candidates == [[of(['bad']), of(['good'])]]
    assert [*map(list, data.scored[0])] == [[0], [0]]
  else:
    assert data.token_ids.tolist() == of(['bad', 'good'])
  gold = encode(task, [FILM], tokenizer, 64, gold_only=True)
  assert gold.candidates == [[of(['good'])]] and gold.prompts == data.prompts
  # What stands before is not lost where the text is cut.
  cut = encode(task, [FILM], tokenizer, 4 + len(start), write_out=write_out)
  assert cut.prompts == [of([*start, 'It', 'was'] if write_out else [
      *start, 'film', 'It', 'was'])[:len(start)] + cut.prompts[0][len(start):]]
  assert cut.prompts[0][-1] == of('was')
  prior = encode(task, [FILM], tokenizer, 64, prompts=[''])
  assert prior.prompts == [of(start or ['<s>'])]


@pytest.mark.parametrize('single', ['<s> $A </s>', '$A </s>'])
def test_a_prompt_to_be_continued_does_not_end(single):
  tokenizer = words(single)
  task = tasks.Task(template='{text} It was ', **GEN)
  data = encode(task, [FILM], tokenizer, 64)
  start = '<s> ' if single[0] == '<' else ''
  assert spelled(tokenizer, data.prompts[0]) == f'{start}a film It was'
  cut = encode(task, [FILM], tokenizer, 7)
  assert spelled(tokenizer, cut.prompts[0]) == (
      '<s> It was' if start else 'film It was')
  gold = encode(task, [FILM | {'text': 'fun'}], tokenizer, 64, gold_only=True)
  assert spelled(tokenizer, gold.candidates[0][0]) == 'fun'


def test_a_token_that_the_text_begins_with_is_not_doubled():
  for tokenizer in (words('<s> $A </s>'), BOS):
    task = of_kind(template='<s>{text} It was')
    data = encode(task, [FILM], tokenizer, 64)
    assert data.prompts[0].count(0) == 1 and data.prompts[0][0] == 0
    task = tasks.Task(template='<s>{text} It was', **GEN)
    assert encode(task, [FILM], tokenizer, 64).prompts[0].count(0) == 1


def test_masked_models_and_new_heads_read_all_that_is_added():
  mask = of_kind(template='{text} It was{mask}.', label_words=(' bad', ' good'))
  data = encode(mask, [FILM], MASK, 64, causal=False)
  assert spelled(MASK, data.prompts[0]).split()[::len(data.prompts[0]) - 1] == [
      '<s>', '</s>']
  bare = byte_level(mask_token='<mask>')  # one that adds nothing
  data = encode(mask, [X | {'text': 'abcdef'}], bare, 5, causal=False)
  assert spelled(bare, data.prompts[0]) == 'f ĠIt Ġwas <mask> .'
  head = of_kind('head', label_names=('a', 'b'))
  tokenizer = words('<s> $A </s>')
  tokenizer.truncation_side = 'left'
  data = encode(head, [FILM | {'text': 'a film It was'}], tokenizer, 4)
  assert spelled(tokenizer, data.prompts[0]) == '<s> a film </s>'
  assert tokenizer.truncation_side == 'left' and data.read_at.tolist() == [3]


def test_padding_and_truncation_of_the_tokenizer_s_file_are_off():
  task = of_kind(template='{text} It was')
  want = encode(task, [FILM], words('<s> $A'), 64).prompts
  for side in ('left', 'right'):
    tokenizer = words('<s> $A', padding_side=side, truncation_side=side,
                      model_max_length=3)
    backend = tokenizer.backend_tokenizer
    backend.enable_truncation(3)
    backend.enable_padding(length=12, pad_id=2, direction=side)
    data = encode(task, [FILM, FILM | {'text': 'a'}], fast(
        backend, bos_token='<s>', eos_token='</s>', padding_side=side), 64)
    assert data.prompts[:1] == want and len(data.prompts[1]) == 4
    assert encode(task, [FILM], tokenizer, 64).prompts == want


@pytest.mark.parametrize('scheme', ['always', 'first', 'never'])
def test_words_with_a_sign_for_their_space(scheme):
  tokenizer = words('<s> $A </s>', metaspace=scheme)
  data = encode(of_kind(template='{text} It was'), [FILM], tokenizer, 64)
  assert spelled(tokenizer, data.prompts[0][2:]) == '▁film ▁It ▁was'
  assert spelled(tokenizer, data.token_ids) == '▁bad ▁good'


def test_a_tokenizer_that_changes_case_and_strips():
  tokenizer = words('<s> $A </s>', lower=True)
  task = of_kind(template='{text} . ', label_words=('BAD', 'Good'))
  data = encode(task, [FILM], tokenizer, 64)
  assert spelled(tokenizer, data.prompts[0]) == '<s> a film .'
  assert spelled(tokenizer, data.token_ids) == 'bad good'


def test_a_tokenizer_in_python(tmp_path):
  """Which does not know where in the text a token ends."""
  class Letters(transformers.PythonBackend):
    vocab_size = 128
    model_input_names = ['input_ids', 'attention_mask']

    def get_vocab(self):
      return {chr(i): i for i in range(128)} | self.added_tokens_encoder

    def _tokenize(self, text):
      return [*text]

    def _convert_token_to_id(self, token):
      return ord(token)

    def _convert_id_to_token(self, index):
      return chr(index)

    def convert_tokens_to_string(self, tokens):
      return ''.join(tokens)

    def build_inputs_with_special_tokens(self, one, two=None):
      return [1, *one, 2]
  tokenizer = Letters(bos_token=chr(1), eos_token=chr(2), unk_token=chr(3))
  assert not tokenizer.is_fast
  assert tokenizer('ab')['input_ids'] == [1, 97, 98, 2]
  task = of_kind(label_words=('x', 'y'), limits=(('text', 3),))
  data = encode(task, [X | {'text': 'abcd'}], tokenizer, 64)
  assert data.prompts == [[1, *b'abc']] and data.truncated == 1
  assert data.token_ids.tolist() == [*b'xy']
  task = tasks.Task(kind='generation', template='{text}', stop='\n\n')
  assert score.texts([[*b'Paris\n\nQ', 300]], task, tokenizer) == ['Paris']
  assert score.stop_ids(task, tokenizer) == (2,)


def test_a_limit_keeps_whole_characters():
  task = of_kind(limits=(('text', 6),))
  for text, want in (('aé½½x', 'aé½'), ('a½½½', 'a½½'), ('abcdef', 'abcdef'),
                     ('½' * 9, '½½½'), ('a  b don ?', 'a  b do')):
    data = encode(task, [X | {'text': text}], PLAIN, 64)
    assert PLAIN.decode(data.prompts[0]) == want


# --- stops ------------------------------------------------------------------


def letters(*merged):
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  merges = [(token[:-1], token[-1]) for token in merged]
  raw = Tokenizer(models.BPE({t: i for i, t in enumerate(
      ['</s>', *alphabet, *merged, '<|end|>'])}, merges))
  raw.pre_tokenizer = pre_tokenizers.ByteLevel(
      add_prefix_space=False, use_regex=False)
  raw.decoder = decoders.ByteLevel()
  tokenizer = fast(raw, eos_token='</s>')
  tokenizer.add_special_tokens({'additional_special_tokens': ['<|end|>']})
  return tokenizer


BREAKS = letters('ĊĊ', '.Ċ', 'sĊ', 'ĊĊQ', 'ĠĊ')


@pytest.mark.parametrize('stop,written,answer', [
    ('\n', [' Paris', '\n', 'Q'], 'Paris'),
    ('\n', [' Paris', '\n\n', 'Q'], 'Paris'),
    ('\n', [' Pari', 's\n', 'Q'], 'Paris'),
    ('\n', [' Paris', '.\n', 'Q'], 'Paris.'),
    ('\n', ['\n\nQ', 'x'], ''),
    ('\n\n', [' a\n', 'b', '\n\nQ', 'c'], 'a\nb'),
    ('\n\n', [' a', '\n', '\n', 'Q'], 'a'),
    ('END', [' a EN', 'D of'], 'a'), ('END', [' a EN', 'C'], 'a ENC'),
    ('½', ['a½', 'b'], 'a'), ('<|end|>', ['a ', '<|end|>', 'b'], 'a'),
    ('', [' a\n', 'b'], 'a\nb'), ('x', [' no such'], 'no such'), ('.', [], '')])
def test_the_answer_ends_at_the_stop(stop, written, answer):
  task = tasks.Task(kind='generation', template='{q}', stop=stop)
  rows = []
  for text in written:
    ids = BREAKS(text, add_special_tokens=False)['input_ids']
    rows += ids
  for row in (rows, [*rows, 0, 5, 6], [*rows, 999]):
    assert score.texts([row], task, BREAKS) == [answer]
  ends = score.stop_ids(task, BREAKS)
  assert ends == tuple(sorted({0, *(
      i for i in range(len(BREAKS)) if stop and stop in BREAKS.decode([i]))}))
  # As on the device: nothing after the first of these tokens, then padding.
  n = next((i + 1 for i, t in enumerate(rows) if t in ends), len(rows))
  stopped = np.array([*rows[:n], *[0] * (len(rows) - n)], np.int32)
  assert score.texts([stopped], task, BREAKS) == [answer]


def test_a_stop_in_a_tokenizer_of_words():
  """A word's space is its own, also where it is the first of an answer."""
  for tokenizer in (words(), words(metaspace='always')):
    task = tasks.Task(kind='generation', template='{q}', stop=' bad')
    for text, answer in (('a film bad fun', 'a film'), ('bad fun', ''),
                         ('good fun', 'good fun'), ('bad', '')):
      ids = tokenizer(text, add_special_tokens=False)['input_ids']
      assert score.texts([ids], task, tokenizer) == [answer]
    assert set(ids) <= set(score.stop_ids(task, tokenizer))


def test_byte_tokens_of_sentencepiece():
  vocab = {'<unk>': 0, '</s>': 1, '▁a': 2, 'b': 3, '▁': 4} | {
      f'<0x{i:02X}>': 5 + i for i in range(256)}
  raw = Tokenizer(models.BPE(vocab, [], unk_token='<unk>', byte_fallback=True))
  raw.normalizer = normalizers.Sequence([
      normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')])
  raw.decoder = decoders.Sequence([
      decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse(),
      decoders.Strip(' ', 1, 0)])
  tokenizer = fast(raw, eos_token='</s>', unk_token='<unk>')
  task = tasks.Task(kind='generation', template='{q}')
  assert score.stop_ids(task, tokenizer) == (1, 15)
  assert score.texts([[2, 3, 15, 3]], task, tokenizer) == ['ab']


# --- spaces before answers --------------------------------------------------


@pytest.mark.parametrize('template,answers,warned', [
    ('{text} It was', (' bad', ' good'), ''),
    ('{text} It was', ('bad', 'good'), 'without a space'),
    ('{text} It was', (' bad', 'good'), 'without a space'),
    ('{text} It was:', ('bad', 'good'), 'without a space'),
    ('"{text}"', ('bad', 'good'), 'without a space'),
    ('{text} It was ', ('bad', 'good'), ''),
    ('{text} It was ', (' bad', ' good'), 'after 2 spaces'),
    ('{text}\n', ('bad', 'good'), ''), ('{text}: "', ('bad', 'good'), ''),
    ('{text} (', ('bad', 'good'), ''), ('{text} is', ('!', '?'), ''),
    ('{text}是', ('好', '坏'), ''), ('{text}：', ('bad', 'good'), ''),
    ('{text}</s>', ('bad', 'good'), '')])
def test_answers_without_their_space(template, answers, warned):
  rows = [dict(text='a film', label=0, choices=[*answers])]
  for task in (of_kind(template=template, label_words=answers),
               of_kind('multiple_choice', template=template,
                       answer='{choice}')):
    found = space_warnings(task, rows, PLAIN)
    assert bool(found) == bool(warned) and warned in ''.join(found)
  assert not space_warnings(of_kind('head'), rows, PLAIN)
  assert not space_warnings(of_kind('generation'), rows, PLAIN)


def test_label_words_of_masked_models_without_their_space():
  rows, without = [X], ('bad', 'good')
  one = byte_level('<s> $A </s>', mask_token='<mask>',
                   words=(' bad', ' good'))
  for template, warned in (('{text} It was{mask}.', True),
                           ('{mask}: {text}', False)):
    task = of_kind(template=template, label_words=without)
    assert bool(space_warnings(task, rows, one)) == warned
    task.label_words = (' bad', ' good')
    assert not space_warnings(task, rows, one)
  tokenizer = words(mask_token='<cls>')  # whose words have no spaces
  assert not space_warnings(of_kind(
      template='{text} It was {mask}', label_words=without), rows, tokenizer)


def test_a_run_warns_of_it():
  rows = [FILM, FILM | {'label': 0}]
  said = []
  data_lib.encode_rows(
      data_lib.Rows(rows, rows, rows, rows), of_kind(
          template='{text} so', label_words=('bad', 'good')), PLAIN,
      causal=True, limit=64, buckets=(64,), say=said.append)
  assert ['without a space' in text for text in said].count(True) == 1


def test_declared_tasks_have_their_spaces():
  rows = dict(
      sst2=dict(sentence='a film'), rte=dict(premise='a', hypothesis='b'),
      copa=dict(premise='a', connective='so', choices=['b', 'c']),
      record=dict(passage='a', choices=['b', 'c']),
      roberta_sst2=dict(sentence='a'), roberta_trec=dict(text='a'),
      roberta_snli=dict(first='a', second='b'))
  for name, row in rows.items():
    tokenizer = MASK if name.startswith('roberta') else PLAIN
    assert not space_warnings(tasks.get(name), [row], tokenizer)
