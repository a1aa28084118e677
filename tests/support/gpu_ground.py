"""Imported first: vLLM as it is on a GPU, on a machine without one. Triton interprets.

Told otherwise than they are: that Triton has a backend for CPUs, and what a GPU can do. vLLM looks
for Triton when it is imported, so this goes for a whole process (`prepared.GPU`).
"""
# ruff: noqa: E402

import os
from types import SimpleNamespace

os.environ.update(
    TRITON_INTERPRET="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_LOGGING_LEVEL="WARNING",
    HF_HUB_OFFLINE="1",
    VLLM_NO_USAGE_STATS="1",
)
from triton.backends import backends

backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: False), compiler=None)

import torch

torch.cuda.get_device_capability = lambda *_: (9, 0)

import interpreter as interpreter
