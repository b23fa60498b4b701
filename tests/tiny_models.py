"""Random models of three architectures, small enough to be made on the spot."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from train.recipes.llm.tiny import EOS, tokenizer

VOCABULARY = 300
CONTEXT = 128
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role ' + m.role) }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}<assistant>"
)

_COMMON = {"vocab_size": VOCABULARY, "bos_token_id": EOS, "eos_token_id": EOS, "pad_token_id": EOS}
CONFIGS = {
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=CONTEXT, **_COMMON),
    "llama": LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        **_COMMON,
    ),
    "qwen2": Qwen2Config(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=1,
        max_position_embeddings=CONTEXT,
        use_sliding_window=True,
        sliding_window=16,
        max_window_layers=1,
        **_COMMON,
    ),
}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, so that characters really come in pieces; and an end-of-sequence."""
    fast = tokenizer()
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make(kind: str, folder: Path, *, seed: int = 0, context: int = CONTEXT) -> Path:
    """Write a random model of ``kind`` with a byte tokenizer and ``context`` into ``folder``."""
    torch.manual_seed(seed)
    config = copy.deepcopy(CONFIGS[kind])
    config.max_position_embeddings = context
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():  # far from uniform, so that argmax is decided
            if parameter.dim() > 1:
                parameter.mul_(8)
            elif kind != "gpt2":  # whose greedy answers would never end
                # Gains that are not all one, biases that are not all zero.
                parameter.add_(torch.randn_like(parameter) / 4)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
