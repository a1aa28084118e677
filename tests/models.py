"""Tiny random models and prompts."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def tiny_llama(folder, *, heads=4, kv_heads=2, head_size=32, layers=4, dtype=torch.float32):
    """Saves a random Llama whose greedy choices are clear and react to its context."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=heads * head_size,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_size,
        max_position_embeddings=2048,
        initializer_range=0.15,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    return folder


def random_ids(n, seed=0, vocab=256):
    """``n`` token ids; none of the special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(10, vocab, (n,), generator=generator).tolist()
