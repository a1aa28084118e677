"""Tiny random models and prompts."""

import json
import re

import torch
from safetensors.torch import load_file, save_file
from tokenizers import (
    AddedToken,
    ByteLevelBPETokenizer,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
)
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from vllm_pasta.verify.models import random_ids as random_ids
from vllm_pasta.verify.models import tiny_llama as tiny_llama

LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


WINDOW = 40
_MIXED = ["sliding_attention", "full_attention"] * 2
ATTENTION_KINDS = {  # model type -> what makes it unlike a Llama of two layers
    "qwen2": {},  # adds to queries, keys and values
    "qwen3": {"num_key_value_heads": 1},  # normalises queries and keys
    "mistral": {"sliding_window": WINDOW},
    "gemma2": {"head_dim": 96, "sliding_window": WINDOW, "layer_types": _MIXED,
               "attn_logit_softcapping": 3.0, "final_logit_softcapping": 30.0,
               "query_pre_attn_scalar": 96, "tie_word_embeddings": True},
    "gemma3_text": {"head_dim": 256, "num_key_value_heads": 1, "sliding_window": WINDOW,
                    "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
                    "query_pre_attn_scalar": 256},
    # Layers of two head sizes, so of two block sizes; the last two use the KV cache of others.
    "gemma4_text": {"head_dim": 256, "global_head_dim": 512, "sliding_window": WINDOW,
                    "num_hidden_layers": 6, "layer_types": _MIXED + _MIXED[:2],
                    "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 0,
                    "tie_word_embeddings": True},
    "gpt_oss": {"sliding_window": WINDOW, "layer_types": _MIXED, "num_local_experts": 4,
                "num_experts_per_tok": 2, "initializer_range": 0.1},
    # Windowed layers have more query heads than full ones.
    "laguna": {"sliding_window": WINDOW, "layer_types": _MIXED,
               "num_attention_heads_per_layer": [6, 4] * 2, "mlp_layer_types": ["dense"] * 4},
    "bloom": {"n_head": 4, "n_layer": 4, "tie_word_embeddings": True},
}  # fmt: skip


_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 1}
_GATED_DELTA_NET = {
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 64, "linear_value_head_dim": 64,
}  # fmt: skip
HYBRIDS = {  # model type -> recurrences beside attention, and which layers have heads
    "granitemoehybrid": {**_MAMBA2, "num_local_experts": 0, "num_experts_per_tok": 0,
                         "shared_intermediate_size": 128, "layer_types": ["mamba", "attention"] * 2,
                         "mamba_expand": 2, "position_embedding_type": "rope",
                         "attention_multiplier": 0.17},
    "falcon_h1": {**_MAMBA2, "mamba_d_ssm": 128, "mamba_n_heads": 4, "mamba_expand": 1},
    "nemotron_h": {"hybrid_override_pattern": "M*-*", "mamba_num_heads": 8, "mamba_head_dim": 32,
                   "ssm_state_size": 16, "n_groups": 1, "attention_head_dim": 32,
                   "time_step_min": 1e-6},  # transformers clamps time steps to it, vLLM does not
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2, "conv_bias": True,  # short convolutions
             "conv_dim": 128, "block_dim": 128, "block_auto_adjust_ff_dim": False,
             "tie_word_embeddings": True},
    "qwen3_5_text": {**_GATED_DELTA_NET, "partial_rotary_factor": 0.5},  # bf16 as the next
    "qwen3_next": {**_GATED_DELTA_NET, "num_experts": 4, "num_experts_per_tok": 2,
                   "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64,
                   "partial_rotary_factor": 0.5},  # vLLM's CPU kernel takes bf16 alone
}  # fmt: skip

_LATENT = {  # vLLM's CPU kernel knows no other ranks
    "kv_lora_rank": 512,
    "head_dim": 64,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "num_key_value_heads": 4,
    "first_k_dense_replace": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "n_group": 1,
    "topk_group": 1,
    # As the real models have it. Without scaling, vLLM 0.32 rotates the queries wrongly on a
    # CPU: its operator takes interleaved queries of three dimensions for ones of two.
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 512,
        "mscale": 0.7,
        "mscale_all_dim": 0.8,
        "beta_fast": 32,
        "beta_slow": 1,
    },
}
_MAMBA1 = {  # model type -> what vLLM has no operator for, on a CPU
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 1,
              "num_experts_per_tok": 1},
}  # fmt: skip
MLA = {  # model type -> multi-head latent attention
    "deepseek_v2": {**_LATENT, "q_lora_rank": None},
    "deepseek_v3": {**_LATENT, "q_lora_rank": 64},  # queries are compressed, too
}


LAST_NORMS = ("model.norm.weight", "transformer.ln_f.weight", "model.embedding_norm.weight")


def _soften_gemma4(model_type, name, parameter):
    """It does not scale down what it attends by: else its wide heads see one key alone."""
    if model_type.startswith("gemma4") and name.endswith("self_attn.q_norm.weight"):
        torch.nn.init.constant_(parameter, 0.2)


def tiny_model(folder, model_type, dtype=torch.float32, **options):
    """Saves a random model of 4 layers, one of ATTENTION_KINDS, HYBRIDS or MLA, or a Jamba."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        model_type,
        **{
            "vocab_size": 256,
            "hidden_size": 128,
            "intermediate_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "max_position_embeddings": 2048,
            "initializer_range": 0.15,
            "tie_word_embeddings": False,
            **(ATTENTION_KINDS | HYBRIDS | MLA | _MAMBA1)[model_type],
            **options,
        },
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            torch.nn.init.normal_(parameter, 1.0)
        _soften_gemma4(model_type, name, parameter)
        if config.tie_word_embeddings and name in LAST_NORMS:
            # Else the last token is repeated for ever. Gemma adds 1.
            torch.nn.init.normal_(parameter, -1.0 if model_type == "gemma2" else 0.0)
    model.to(dtype).save_pretrained(folder)
    return folder


_VISION = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
           "num_attention_heads": 2, "image_size": 56, "patch_size": 14}  # fmt: skip
MULTIMODAL = {  # model type -> its language model's options, and the rest
    "qwen2_5_vl": (
        {"rope_scaling": {"type": "mrope", "rope_type": "default", "mrope_section": [4, 6, 6]}},
        {"vision_config": {"depth": 2, "hidden_size": 64, "intermediate_size": 64, "num_heads": 2,
                           "out_hidden_size": 128, "fullatt_block_indexes": [1]},
         "image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 7,
         "vision_end_token_id": 8},
    ),
    "qwen3_vl": (  # its vision tower adds to the hidden states of the first layers (deepstack)
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0,
                             "mrope_section": [6, 5, 5], "mrope_interleaved": True}},
        {"vision_config": {"depth": 3, "hidden_size": 64, "intermediate_size": 64, "num_heads": 2,
                           "out_hidden_size": 128, "deepstack_visual_indexes": [0, 1],
                           "patch_size": 14, "num_position_embeddings": 64,
                           "initializer_range": 0.15},
         "image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 7,
         "vision_end_token_id": 8},
    ),
    "qwen3_5": (  # a hybrid one
        {**_GATED_DELTA_NET,
         "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0,
                             "partial_rotary_factor": 0.5, "mrope_section": [3, 3, 2],
                             "mrope_interleaved": True}},
        {"vision_config": {"depth": 2, "hidden_size": 64, "intermediate_size": 64, "num_heads": 2,
                           "out_hidden_size": 128, "patch_size": 14, "num_position_embeddings": 64,
                           "initializer_range": 0.15},
         "image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 7,
         "vision_end_token_id": 8},
    ),
    "gemma3": (  # its image tokens attend both ways
        {"sliding_window": WINDOW, "layer_types": _MIXED, "query_pre_attn_scalar": 32},
        {"vision_config": _VISION, "mm_tokens_per_image": 4, "image_token_index": 5,
         "boi_token_index": 7, "eoi_token_index": 8},
    ),
    "gemma4": (  # the last two layers use the KV cache of others
        {"sliding_window": WINDOW, "layer_types": _MIXED, "global_head_dim": 32,
         "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 0,
         "vocab_size_per_layer_input": 256},
        {"vision_config": {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
                           "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32,
                           "patch_size": 4, "pooling_kernel_size": 3, "initializer_range": 0.1,
                           "position_embedding_size": 64, "default_output_length": 70},
         "audio_config": None, "image_token_id": 5, "video_token_id": 6, "boi_token_id": 7,
         "eoi_token_id": 8, "audio_token_id": 9, "boa_token_id": 10, "eoa_token_index": 11},
    ),
    "mistral3": (
        {"model_type": "mistral"},
        {"vision_config": {**_VISION, "model_type": "pixtral", "head_dim": 32},
         "image_token_index": 5},  # beside it, a token ends each row of an image, another the last
    ),
}  # fmt: skip


def tiny_multimodal(folder, model_type, dtype=torch.float32):
    """Saves a random model of MULTIMODAL: 4 layers of language model, a tiny vision tower."""
    torch.manual_seed(0)
    text, others = MULTIMODAL[model_type]
    config = AutoConfig.for_model(
        model_type,
        text_config={
            "vocab_size": 256, "hidden_size": 128, "intermediate_size": 128,
            "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
            "head_dim": 32, "max_position_embeddings": 2048, "initializer_range": 0.15,
            "tie_word_embeddings": False, **text,
        },
        tie_word_embeddings=False,
        **others,
    )  # fmt: skip
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    # It never says what stands for an image in prompts: transformers would look for its features.
    torch.nn.init.zeros_(model.lm_head.weight[5:7])
    for name, parameter in model.named_parameters():
        _soften_gemma4(model_type, name, parameter)
    model.to(dtype).save_pretrained(folder)
    if model_type == "gemma3":  # as published; transformers 5 saves another name, and reads both
        weights = load_file(folder / "model.safetensors")
        named = {re.sub(r"(vision_tower\.)(?!vision_model)", r"\1vision_model.", name): value
                 for name, value in weights.items()}  # fmt: skip
        save_file(named, folder / "model.safetensors", {"format": "pt"})
    return folder


def byte_tokenizer(folder, added=None, **options):
    """Saves a tokenizer of 256 tokens: three special ones, then a byte each, of token id byte + 3.

    Bytes 253 to 255, which no UTF-8 text holds, have none. Nor have those in whose place ``added``
    ({token id: text}) puts other tokens.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    symbols = {byte: chr(byte) for byte in printable}  # as in GPT-2, which ByteLevel expects
    symbols |= {byte: chr(256 + i) for i, byte in enumerate(others)}
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2} | {symbols[b]: b + 3 for b in range(253)}
    names = {index: name for name, index in vocab.items()} | (added or {})
    tokenizer = Tokenizer(models.BPE(vocab={n: i for i, n in names.items()}, merges=[]))
    tokenizer.add_special_tokens([AddedToken(n, normalized=False) for n in (added or {}).values()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        **options,
    ).save_pretrained(folder)
    return folder


def lora_adapter(model, folder, *, seed, rank=4, scale=0.3):
    """A random LoRA adapter in PEFT's format, and the model with it merged in.

    Returns:
        The folders of the adapter and of the merged model.
    """
    generator = torch.Generator().manual_seed(seed)
    merged = LlamaForCausalLM.from_pretrained(model)
    weights = {}
    for name, module in merged.named_modules():
        if name.rpartition(".")[2] in LORA_TARGETS:
            rows, columns = module.weight.shape
            a = torch.randn(rank, columns, generator=generator) / columns**0.5
            b = torch.randn(rows, rank, generator=generator) * scale
            weights[f"base_model.model.{name}.lora_A.weight"] = a
            weights[f"base_model.model.{name}.lora_B.weight"] = b
            module.weight.data += 2 * b @ a  # lora_alpha / rank
    merged.save_pretrained(folder / "merged")
    (folder / "adapter").mkdir()
    save_file(weights, folder / "adapter" / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": LORA_TARGETS,
        "bias": "none",
    }
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    return folder / "adapter", folder / "merged"


def worded_llama(folder, texts, vocab=4096):
    """A tiny random Llama with a tokenizer as `word_tokenizer` makes it."""
    return tiny_llama(word_tokenizer(folder, texts, vocab), vocab=vocab)


def word_tokenizer(folder, texts, vocab=4096):
    """Saves a tokenizer, trained on ``texts``: their common words are tokens."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=vocab, show_progress=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer).save_pretrained(folder)
    return folder
