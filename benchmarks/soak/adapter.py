"""A random LoRA adapter: written as vLLM reads it, and merged into the oracle's weights."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK = 4
SCALE = 0.1
"""Of the random weights: large enough that an answer by the wrong weights shows."""


def write(model: nn.Module, folder: Path, seed: int) -> None:
    """Writes an adapter of ``model``, one of transformers', in PEFT's format."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, module in _targets(model).items():
        rows, columns = module.weight.shape
        a = torch.randn(RANK, columns, generator=generator) / columns**0.5
        b = torch.randn(rows, RANK, generator=generator) * SCALE * float(module.weight.data.std())
        weights[f"base_model.model.{name}.lora_A.weight"] = a
        weights[f"base_model.model.{name}.lora_B.weight"] = b
    folder.mkdir(parents=True)
    save_file(weights, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": list(TARGETS),
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")


def merge(model: nn.Module, folder: Path) -> None:
    """Adds the adapter in ``folder`` to the weights of ``model``, in place."""
    weights = load_file(folder / "adapter_model.safetensors")
    for name, module in _targets(model).items():
        a, b = (weights[f"base_model.model.{name}.lora_{which}.weight"] for which in "AB")
        module.weight.data += 2 * b @ a  # lora_alpha / rank


def _targets(model: nn.Module) -> dict[str, Any]:
    """The layers that the adapter changes, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in TARGETS and isinstance(module, nn.Linear)
    }
