"""Tiny models that draft for others, from the target's own hidden states: EAGLE, EAGLE 3, MTP.

Each says the target's last token again, by and large: weights that let a hidden state pass, and
random ones for a little noise. So some drafts are right, wherever a text repeats a token.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

NOISE = 0.02


def _weights(folder):
    return load_file(Path(folder) / "model.safetensors"), json.loads(
        (Path(folder) / "config.json").read_text()
    )


def _layer(weights, index, noise):
    """The target's layer of that index, or one as large of little noise."""
    prefix = f"model.layers.{index}."
    layer = {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}
    if noise:
        generator = torch.Generator().manual_seed(0)
        for name, weight in layer.items():
            if weight.dim() > 1 or name.endswith("bias"):
                layer[name] = torch.randn(weight.shape, generator=generator) * NOISE
    return {name: weight.clone() for name, weight in layer.items()}


def _save(folder, weights, config):
    save_file(weights, Path(folder) / "model.safetensors")
    (Path(folder) / "config.json").write_text(json.dumps(config))
    return folder


def eagle(target, folder):
    """Saves an EAGLE draft of one layer for a Llama: what it reads of a token is noise."""
    weights, config = _weights(target)
    size = config["hidden_size"]
    layer = _layer(weights, 0, noise=True)
    del layer["input_layernorm.weight"]
    draft = {f"layers.0.{name}": weight for name, weight in layer.items()}
    draft["fc.weight"] = torch.cat([NOISE * torch.randn(size, size), torch.eye(size)], 1)
    draft["embed_tokens.weight"] = weights["model.embed_tokens.weight"]
    return _save(folder, draft, {**config, "num_hidden_layers": 1})


def eagle3(target, folder):
    """Saves an EAGLE 3 draft for a Llama: the target's last layer, on what came into that."""
    weights, config = _weights(target)
    size, last = config["hidden_size"], config["num_hidden_layers"] - 1
    layer = _layer(weights, last, noise=False)
    layer["hidden_norm.weight"] = layer["input_layernorm.weight"].clone()
    for name in ("q", "k", "v"):  # they read the token, then the hidden state
        weight = layer[f"self_attn.{name}_proj.weight"]
        layer[f"self_attn.{name}_proj.weight"] = torch.cat([NOISE * weight, weight], 1)
    draft = {f"midlayer.{name}": weight for name, weight in layer.items()}
    passing = [torch.zeros(size, size), torch.zeros(size, size), torch.eye(size)]
    draft["fc.weight"] = torch.cat(passing, 1)
    draft["norm.weight"] = weights["model.norm.weight"]
    draft["lm_head.weight"] = weights["lm_head.weight"]
    draft["embed_tokens.weight"] = weights["model.embed_tokens.weight"]
    own = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "num_hidden_layers": 1,
        "draft_vocab_size": config["vocab_size"],
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 2, last]},
    }
    return _save(folder, draft, {**config, **own})


def with_mtp(folder):
    """Gives a Qwen 2 an MTP layer, which makes it a MiMo; to transformers it stays a Qwen 2."""
    weights, config = _weights(folder)
    size = config["hidden_size"]
    layer = _layer(weights, 0, noise=True)
    for name in ("token_layernorm", "final_layernorm"):
        layer[f"{name}.weight"] = torch.ones(size)
    layer["hidden_layernorm.weight"] = weights["model.norm.weight"].clone()
    layer["input_proj.weight"] = torch.cat([torch.eye(size), NOISE * torch.randn(size, size)], 1)
    weights |= {f"model.mtp_layers.0.{name}": weight for name, weight in layer.items()}
    own = {"architectures": ["MiMoForCausalLM"], "num_nextn_predict_layers": 1}
    return _save(folder, weights, {**config, **own})
