"""Chat templates of the forms that models use, and what they should write.

The templates are written for these tests. Each comes with its special tokens
and with the text of one conversation (`MESSAGES`, without the system's message
if the template has no place for one), in which the parts that the model has to
write are in the brackets « and ».
"""

import dataclasses

from tokenizers import decoders, models, pre_tokenizers, Tokenizer
from transformers import PreTrainedTokenizerFast

SYSTEM = {'role': 'system', 'content': 'Be brief.'}
MESSAGES = [SYSTEM,
            {'role': 'user', 'content': 'Hi'},
            {'role': 'assistant', 'content': 'Hello, you.'},
            {'role': 'user', 'content': 'Bye\nnow'},
            {'role': 'assistant', 'content': 'See\n\nyou'}]


@dataclasses.dataclass(frozen=True)
class Form:
  """Holds a template and what it writes."""

  template: str
  special: tuple[str, ...]
  written: str  # the conversation, with « and »
  bos: str = ''
  eos: str = ''
  system: bool = True  # whether it has a place for the system's message
  # Whether it writes a conversation as a prefix of a longer one.
  prefix: bool = True

  @property
  def messages(self):
    """Returns the messages of the conversation."""
    return MESSAGES if self.system else MESSAGES[1:]


def _turns(turn: str, prompt: str, before: str = '') -> str:
  """Returns a template that writes every turn in the same way."""
  return (f'{before}{{% for m in messages %}}{turn}{{% endfor %}}'
          f'{{% if add_generation_prompt %}}{prompt}{{% endif %}}')


FORMS = {
    'chatml': Form(
        _turns("{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' "
               "+ '\n' }}", "{{ '<|im_start|>assistant\n' }}"),
        ('<|im_start|>', '<|im_end|>'),
        '<|im_start|>system\nBe brief.<|im_end|>\n'
        '<|im_start|>user\nHi<|im_end|>\n'
        '<|im_start|>assistant\n«Hello, you.<|im_end|>»\n'
        '<|im_start|>user\nBye\nnow<|im_end|>\n'
        '<|im_start|>assistant\n«See\n\nyou<|im_end|>»\n'),
    'llama 3': Form(
        _turns("{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + "
               "m.content | trim + '<|eot_id|>' }}",
               "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}",
               '{{ bos_token }}'),
        ('<|begin_of_text|>', '<|start_header_id|>', '<|end_header_id|>',
         '<|eot_id|>'),
        '<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n'
        'Be brief.<|eot_id|>'
        '<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>'
        '<|start_header_id|>assistant<|end_header_id|>\n\n'
        '«Hello, you.<|eot_id|>»'
        '<|start_header_id|>user<|end_header_id|>\n\nBye\nnow<|eot_id|>'
        '<|start_header_id|>assistant<|end_header_id|>\n\n'
        '«See\n\nyou<|eot_id|>»', bos='<|begin_of_text|>'),
    'gemma': Form(
        _turns("{% if m.role == 'system' %}{{ raise_exception('no system') }}"
               "{% endif %}{{ '<start_of_turn>' + ('model' if m.role == "
               "'assistant' else m.role) + '\n' + m.content | trim + "
               "'<end_of_turn>\n' }}", "{{ '<start_of_turn>model\n' }}",
               '{{ bos_token }}'),
        ('<bos>', '<start_of_turn>', '<end_of_turn>'),
        '<bos><start_of_turn>user\nHi<end_of_turn>\n'
        '<start_of_turn>model\n«Hello, you.<end_of_turn>»\n'
        '<start_of_turn>user\nBye\nnow<end_of_turn>\n'
        '<start_of_turn>model\n«See\n\nyou<end_of_turn>»\n',
        bos='<bos>', system=False),
    'mistral': Form(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
        "{{ '[INST] ' + m.content + ' [/INST]' }}{% elif m.role == 'assistant' "
        "%}{{ ' ' + m.content + eos_token }}{% else %}"
        "{{ raise_exception('only user and assistant') }}{% endif %}"
        '{% endfor %}',
        ('<s>', '</s>', '[INST]', '[/INST]'),
        '<s>[INST] Hi [/INST]« Hello, you.</s>»'
        '[INST] Bye\nnow [/INST]« See\n\nyou</s>»',
        bos='<s>', eos='</s>', system=False),
    'llama 2': Form(
        "{% if messages[0].role == 'system' %}{% set ns = namespace(s='<<SYS>>"
        "\n' + messages[0].content + '\n<</SYS>>\n\n') %}{% else %}"
        "{% set ns = namespace(s='') %}{% endif %}{% for m in messages %}"
        "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + ns.s + m.content "
        "+ ' [/INST]' }}{% set ns.s = '' %}{% elif m.role == 'assistant' %}"
        "{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}",
        ('<s>', '</s>'),
        '<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST]'
        '« Hello, you. </s>»<s>[INST] Bye\nnow [/INST]« See\n\nyou </s>»',
        bos='<s>', eos='</s>'),
    # Thoughts are written in the last turn only.
    'qwen 3': Form(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n' + "
        "m.reasoning_content | default('') + '\n</think>\n\n' }}{% endif %}"
        "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
        "{% if enable_thinking is defined and not enable_thinking %}"
        "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}",
        ('<|im_start|>', '<|im_end|>'),
        '<|im_start|>system\nBe brief.<|im_end|>\n'
        '<|im_start|>user\nHi<|im_end|>\n'
        '<|im_start|>assistant\nHello, you.<|im_end|>\n'
        '<|im_start|>user\nBye\nnow<|im_end|>\n'
        '<|im_start|>assistant\n«<think>\n\n</think>\n\nSee\n\nyou<|im_end|>»\n',
        prefix=False),
    # The last turn ends with another token than earlier ones.
    'harmony': Form(
        "{% for m in messages %}{{ '<|start|>' + m.role }}"
        "{% if m.role == 'assistant' %}{{ '<|channel|>final' }}{% endif %}"
        "{{ '<|message|>' + m.content }}{% if m.role == 'assistant' and "
        "loop.last %}{{ '<|return|>' }}{% else %}{{ '<|end|>' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant' }}"
        '{% endif %}',
        ('<|start|>', '<|channel|>', '<|message|>', '<|end|>', '<|return|>'),
        '<|start|>system<|message|>Be brief.<|end|>'
        '<|start|>user<|message|>Hi<|end|>'
        '<|start|>assistant<|channel|>final<|message|>Hello, you.<|end|>'
        '<|start|>user<|message|>Bye\nnow<|end|>'
        '<|start|>assistant«<|channel|>final<|message|>See\n\nyou<|return|>»',
        prefix=False),
    'phi 3': Form(
        _turns("{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}",
               "{{ '<|assistant|>\n' }}"),
        ('<|system|>', '<|user|>', '<|assistant|>', '<|end|>'),
        '<|system|>\nBe brief.<|end|>\n<|user|>\nHi<|end|>\n'
        '<|assistant|>\n«Hello, you.<|end|>»\n<|user|>\nBye\nnow<|end|>\n'
        '<|assistant|>\n«See\n\nyou<|end|>»\n'),
    'phi 4': Form(
        _turns("{{ '<|im_start|>' + m.role + '<|im_sep|>' + m.content + "
               "'<|im_end|>' }}", "{{ '<|im_start|>assistant<|im_sep|>' }}"),
        ('<|im_start|>', '<|im_sep|>', '<|im_end|>'),
        '<|im_start|>system<|im_sep|>Be brief.<|im_end|>'
        '<|im_start|>user<|im_sep|>Hi<|im_end|>'
        '<|im_start|>assistant<|im_sep|>«Hello, you.<|im_end|>»'
        '<|im_start|>user<|im_sep|>Bye\nnow<|im_end|>'
        '<|im_start|>assistant<|im_sep|>«See\n\nyou<|im_end|>»'),
    'zephyr': Form(
        _turns("{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}",
               "{{ '<|assistant|>\n' }}"),
        ('</s>',),
        '<|system|>\nBe brief.</s>\n<|user|>\nHi</s>\n'
        '<|assistant|>\n«Hello, you.</s>»\n<|user|>\nBye\nnow</s>\n'
        '<|assistant|>\n«See\n\nyou</s>»\n', eos='</s>'),
    'deepseek': Form(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
        "{{ '<｜User｜>' + m.content }}{% elif m.role == 'assistant' %}"
        "{{ '<｜Assistant｜>' + m.content + eos_token }}{% else %}"
        '{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}'
        "{{ '<｜Assistant｜>' }}{% endif %}",
        ('<｜begin｜>', '<｜end｜>', '<｜User｜>', '<｜Assistant｜>'),
        '<｜begin｜>Be brief.<｜User｜>Hi<｜Assistant｜>«Hello, you.<｜end｜>»'
        '<｜User｜>Bye\nnow<｜Assistant｜>«See\n\nyou<｜end｜>»',
        bos='<｜begin｜>', eos='<｜end｜>'),
    'granite': Form(
        _turns("{{ '<|start_of_role|>' + m.role + '<|end_of_role|>' + m.content"
               " + '<|end_of_text|>\n' }}",
               "{{ '<|start_of_role|>assistant<|end_of_role|>' }}"),
        ('<|start_of_role|>', '<|end_of_role|>', '<|end_of_text|>'),
        '<|start_of_role|>system<|end_of_role|>Be brief.<|end_of_text|>\n'
        '<|start_of_role|>user<|end_of_role|>Hi<|end_of_text|>\n'
        '<|start_of_role|>assistant<|end_of_role|>«Hello, you.<|end_of_text|>»'
        '\n<|start_of_role|>user<|end_of_role|>Bye\nnow<|end_of_text|>\n'
        '<|start_of_role|>assistant<|end_of_role|>«See\n\nyou<|end_of_text|>»'
        '\n'),
    # No token ends the turns of the user.
    'vicuna': Form(
        "{% for m in messages %}{% if m.role == 'system' %}{{ m.content + ' ' "
        "}}{% elif m.role == 'user' %}{{ 'USER: ' + m.content + ' ' }}"
        "{% else %}{{ 'ASSISTANT: ' + m.content + eos_token }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}"
        '{% endif %}',
        ('</s>',),
        'Be brief. USER: Hi ASSISTANT: «Hello, you.</s>»'
        'USER: Bye\nnow ASSISTANT: «See\n\nyou</s>»', eos='</s>'),
}


def tokenizer(form: Form | None = None, merges=()) -> PreTrainedTokenizerFast:
  """Returns a tokenizer of single bytes, with a template.

  Args:
    form: The template and its special tokens. Defaults to None, for none.
    merges: Pairs of byte-level tokens that are joined. Defaults to none.
  """
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  vocab = {t: i for i, t in enumerate([*alphabet, *map(''.join, merges)])}
  raw = Tokenizer(models.BPE(vocab, list(merges)))
  raw.pre_tokenizer = pre_tokenizers.ByteLevel(
      add_prefix_space=False, use_regex=False)
  raw.decoder = decoders.ByteLevel()
  special = {'bos_token': form.bos, 'eos_token': form.eos} if form else {}
  made = PreTrainedTokenizerFast(
      tokenizer_object=raw, chat_template=form and form.template,
      **{name: token for name, token in special.items() if token})
  if form:
    made.add_special_tokens(
        {'additional_special_tokens': [*form.special]})
  return made


def expected(form: Form, made) -> list[tuple[int, bool]]:
  """Returns the tokens of a conversation, and whether each is trained.

  They are found from the text with brackets, piece by piece.
  """
  out, trained = [], False
  for piece in form.written.replace('»', '«').split('«'):
    ids = made(piece, add_special_tokens=False)['input_ids'] if piece else []
    out += [(token, trained) for token in ids]
    trained = not trained
  return out
