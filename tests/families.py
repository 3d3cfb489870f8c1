"""Provides tiny random torch models of each family, with each of its options.
"""

import numpy as np
import transformers

_COMMON = dict(vocab_size=320, hidden_size=32, intermediate_size=64,
               num_hidden_layers=4, num_attention_heads=4,
               max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
               pad_token_id=0)
_GROUPED = _COMMON | dict(num_key_value_heads=2, head_dim=8)
_KINDS = ['sliding_attention', 'full_attention'] * 2
_LLAMA3 = {'rope_type': 'llama3', 'factor': 8.0, 'low_freq_factor': 1.0,
           'high_freq_factor': 4.0, 'original_max_position_embeddings': 16,
           'rope_theta': 1e4}

# {family: (config class, its settings, {name of an option: changed settings})}
FAMILIES = {
    'llama': (transformers.LlamaConfig, _GROUPED, {
        'untied head': dict(tie_word_embeddings=False),
        'tied head': dict(tie_word_embeddings=True),
        'one key-value head': dict(num_key_value_heads=1),
        'wide heads': dict(num_key_value_heads=4, head_dim=16),
        'biases': dict(attention_bias=True, mlp_bias=True),
        'linear rope': dict(rope_parameters={
            'rope_type': 'linear', 'factor': 3.0, 'rope_theta': 1e4}),
        'llama3 rope': dict(rope_parameters=_LLAMA3)}),
    'mistral': (transformers.MistralConfig, _GROUPED, {
        'window': dict(sliding_window=5),
        'no window': dict(sliding_window=None)}),
    'qwen2': (transformers.Qwen2Config, _GROUPED, {
        'no window': dict(),
        'window after two layers': dict(
            use_sliding_window=True, sliding_window=5, max_window_layers=2),
        'window in all layers': dict(
            use_sliding_window=True, sliding_window=5, max_window_layers=0),
        'tied head': dict(tie_word_embeddings=True)}),
    'qwen3': (transformers.Qwen3Config, _GROUPED, {
        'no window': dict(),
        'biases': dict(attention_bias=True),
        'window by layer': dict(
            use_sliding_window=True, sliding_window=5, layer_types=_KINDS)}),
    'gemma': (transformers.GemmaConfig, _GROUPED, {
        'as released': dict(),
        'wide heads': dict(num_key_value_heads=1, head_dim=16),
        'biases, untied': dict(attention_bias=True,
                               tie_word_embeddings=False)}),
    'gemma2': (transformers.Gemma2Config, _GROUPED, {
        'as released': dict(sliding_window=5, query_pre_attn_scalar=16,
                            attn_logit_softcapping=2.0,
                            final_logit_softcapping=3.0),
        'no caps': dict(sliding_window=5, attn_logit_softcapping=None,
                        final_logit_softcapping=None),
        'other layers': dict(sliding_window=4, layer_types=_KINDS[::-1],
                             attn_logit_softcapping=2.0)}),
    'gemma3_text': (transformers.Gemma3TextConfig, _GROUPED, {
        'as released': dict(sliding_window=5, layer_types=_KINDS),
        'scaled rope': dict(
            sliding_window=5, layer_types=_KINDS, query_pre_attn_scalar=5,
            rope_parameters={
                'sliding_attention': {'rope_type': 'default',
                                      'rope_theta': 1e3},
                'full_attention': {'rope_type': 'linear', 'factor': 8.0,
                                   'rope_theta': 1e6}}),
        'one global layer in six': dict(num_hidden_layers=6, sliding_window=5),
        'caps': dict(sliding_window=5, layer_types=_KINDS,
                     final_logit_softcapping=3.0,
                     attn_logit_softcapping=2.0)}),
    'granite': (transformers.GraniteConfig, {
        k: v for k, v in _GROUPED.items() if k != 'head_dim'}, {
            'as released': dict(
                embedding_multiplier=12.0, logits_scaling=8.0,
                residual_multiplier=0.22, attention_multiplier=0.05,
                tie_word_embeddings=True),
            'no factors, biases': dict(attention_bias=True, mlp_bias=True)}),
    'olmo2': (transformers.Olmo2Config, {
        k: v for k, v in _GROUPED.items() if k != 'head_dim'}, {
            'as released': dict(),
            'biases, tied head': dict(attention_bias=True,
                                      tie_word_embeddings=True)}),
    'mixtral': (transformers.MixtralConfig, _GROUPED, {
        'as released': dict(),
        'window': dict(sliding_window=5, num_local_experts=5),
        'one expert': dict(num_experts_per_tok=1)}),
    'qwen3_moe': (transformers.Qwen3MoeConfig, _GROUPED | dict(
        num_experts=16, num_experts_per_tok=4, moe_intermediate_size=24), {
            'as released': dict(norm_topk_prob=True),
            'not normalised, biases': dict(attention_bias=True),
            'window': dict(use_sliding_window=True, sliding_window=5)}),
    'olmoe': (transformers.OlmoeConfig, {
        k: v for k, v in _GROUPED.items() if k != 'head_dim'} | dict(
            num_experts=6, num_experts_per_tok=3), {
                'as released': dict(),
                'normalised, biases': dict(norm_topk_prob=True,
                                           attention_bias=True)}),
    'gpt2': (transformers.GPT2Config, dict(
        vocab_size=320, n_embd=32, n_layer=4, n_head=4, n_positions=64,
        bos_token_id=1, eos_token_id=2, pad_token_id=0), {
            'as released': dict(),
            'narrow, relu, unscaled': dict(
                n_inner=48, activation_function='relu',
                scale_attn_weights=False),
            'untied head': dict(tie_word_embeddings=False)}),
    'opt': (transformers.OPTConfig, dict(
        vocab_size=320, hidden_size=32, ffn_dim=64, num_hidden_layers=4,
        num_attention_heads=4, max_position_embeddings=64,
        word_embed_proj_dim=32, bos_token_id=2, eos_token_id=2,
        pad_token_id=1), {
            'as released': dict(),
            'untied head': dict(tie_word_embeddings=False),
            'no biases, gelu': dict(enable_bias=False,
                                    activation_function='gelu'),
            '350M': dict(do_layer_norm_before=False, word_embed_proj_dim=16),
            'no final norm': dict(_remove_final_layer_norm=True)}),
    'bert': (transformers.BertConfig, _COMMON | dict(type_vocab_size=2), {
        'as released': dict(),
        'relu': dict(hidden_act='relu'),
        'untied head': dict(tie_word_embeddings=False)}),
    'roberta': (transformers.RobertaConfig, _COMMON | dict(
        type_vocab_size=1, pad_token_id=1, bos_token_id=0), {
            'as released': dict(),
            'padding is 3': dict(pad_token_id=3),
            'untied head': dict(tie_word_embeddings=False)}),
}
CASES = [(family, switch) for family, (_, _, switches) in FAMILIES.items()
         for switch in switches]
CAUSAL = [f for f in FAMILIES if f not in ('bert', 'roberta')]
IDS = np.random.RandomState(0).randint(4, 320, (3, 20)).astype(np.int32)
MASKS = {  # Attention masks for IDS, by the side of the padding.
    'right': (np.arange(20) < np.array([[20], [15], [4]])).astype(np.int32),
    'left': (np.arange(20) >= np.array([[0], [5], [16]])).astype(np.int32)}


def torch_model(family: str, switch: str, scale: float = 0.2):
  """Returns a random model of which no weights, biases or norms are trivial."""
  import torch
  torch.manual_seed(0)
  make, settings, switches = FAMILIES[family]
  config = make(**settings | switches[switch])
  auto = (transformers.AutoModelForCausalLM if family in CAUSAL
          else transformers.AutoModelForMaskedLM)
  model = auto.from_config(config, attn_implementation='eager').eval()
  with torch.no_grad():
    for x in model.parameters():
      x.add_(scale * torch.randn_like(x))
  return model.float()


def torch_logits(model, ids, mask, **kwargs) -> np.ndarray:
  """Returns the logits of a torch model as float32 arrays.

  The input is that of `torch_outputs`.
  """
  return torch_outputs(model, ids, mask, **kwargs).logits.float().numpy()


def torch_outputs(model, ids, mask, **kwargs):
  """Returns the outputs of a torch model.

  Padding is replaced by the padding token, and positions do not count it.
  """
  import torch
  ids = np.where(mask == 1, ids, model.config.pad_token_id)
  at = np.maximum(np.cumsum(mask, 1) - 1, 0)
  if model.config.model_type in ('gpt2', 'bert'):
    kwargs['position_ids'] = torch.tensor(at)
  with torch.no_grad():
    return model(
        torch.tensor(ids), attention_mask=torch.tensor(mask), **kwargs)


def torch_sums(reference, tokenizer, prompt, answers):
  """Returns log-likelihoods of answers, and their numbers of tokens.

  A torch model computes them for one text at a time, without padding.
  """
  import torch
  sums, counts = [], []
  for answer in answers:
    ids = tokenizer(prompt + answer)['input_ids']
    n = len(ids) - len(tokenizer(prompt)['input_ids'])
    with torch.no_grad():
      log_p = reference(torch.tensor([ids])).logits[0].log_softmax(-1).numpy()
    sums.append(log_p[range(len(ids) - n - 1, len(ids) - 1), ids[-n:]].sum())
    counts.append(n)
  return np.array(sums), np.array(counts)
