"""A tiny random Llama and a byte-level tokenizer with a chat template, made in milliseconds."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["CHAT_TEMPLATE", "tiny_batch", "tiny_llama", "tiny_tokenizer"]

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_llama(seed: int = 0, **overrides: Any) -> Any:
    """A random `LlamaForCausalLM`: 2 blocks, D 32, F 64, 4 heads, 2 KV heads, V 288 (fits `tiny_tokenizer`)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {
        "vocab_size": 288,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "pad_token_id": 258,
        "bos_token_id": 256,
        "eos_token_id": 257,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**{**sizes, **overrides}))


def tiny_tokenizer() -> Any:
    """One token per byte (ids 0-255), <|im_start|> 256, <|im_end|> 257 (end of turn and eos), <pad> 258, <unk> 259."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<|im_start|>", "<|im_end|>", "<pad>", "<unk>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<pad>",
        unk_token="<unk>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def tiny_batch(rows: int = 3, length: int = 10, seed: int = 0, pad: int = 2) -> dict[str, Any]:
    """A right-padded batch for `tiny_llama`: row i has i * `pad` positions of padding; the first third is no target."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 256, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    for i in range(rows):
        if i * pad:
            mask[i, length - i * pad :] = 0
    ids = ids.masked_fill(mask == 0, 258)
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, : length // 3] = -100
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": labels,
        "sample_ids": torch.arange(rows),
        "sample_weight": torch.ones(rows),
    }
