"""Provides byte-level tokenizers and tasks for tests with short texts."""

from tokenizers import decoders, models, pre_tokenizers, processors, Tokenizer
from transformers import PreTrainedTokenizerFast

from mezo_jax import tasks

NLI = [' Yes', ' Maybe', ' No']
GOOD = [' terrible', ' bad', ' okay', ' good', ' great']
TREC = [
    ' Description', ' Entity', ' Expression', ' Human', ' Location', ' Number']


def byte_level(single='$A', pair=None, words=(*GOOD, *NLI, *TREC), **special):
  """Returns a byte-level tokenizer of the kind that RoBERTa has.

  Args:
    single: Template of a single text, with special tokens. Defaults to none.
    pair: Template of a pair of texts. Defaults to None.
    words: Words that are one token each, with the space before them.
    **special: Special tokens, as arguments of `PreTrainedTokenizerFast`.
  """
  merges = []
  for word in (' It', ' was', *words):
    merges += [('Ġ' + word[1:n], word[n]) for n in range(1, len(word))]
  vocab = {t: i for i, t in enumerate(dict.fromkeys((
      '<s>', '</s>', '<unk>', '<mask>',
      *sorted(pre_tokenizers.ByteLevel.alphabet()), *map(''.join, merges))))}
  raw = Tokenizer(models.BPE(vocab, [*dict.fromkeys(merges)]))
  raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  raw.decoder = decoders.ByteLevel()
  raw.post_processor = processors.TemplateProcessing(
      single=single, pair=pair, special_tokens=[('<s>', 0), ('</s>', 1)])
  return PreTrainedTokenizerFast(
      tokenizer_object=raw, unk_token='<unk>', **special, model_input_names=[
          'input_ids', *(['token_type_ids'] if pair else [])])


PLAIN = byte_level(eos_token='</s>')
BOS = byte_level('<s> $A', bos_token='<s>', eos_token='</s>')
MASK = byte_level('<s> $A </s>', mask_token='<mask>')
PAIR = byte_level('<s> $A </s>', '<s> $A </s> $B:1 </s>:1')


def spelled(tokenizer, ids):
  """Returns the tokens of ids, separated by spaces."""
  return ' '.join(tokenizer.convert_ids_to_tokens(ids))


def of_kind(kind='classification', **changes):
  """Returns a task of a kind, with some fields changed."""
  words = (' bad', ' good') if kind == 'classification' else ()
  return tasks.Task(**dict(kind=kind, template='{text}',
                           label_words=words) | changes)


X = dict(text='a', label=0)
