"""vLLM's own selection of an attention backend on CUDA, on a machine without a GPU.

Prints ``REPORT`` and JSON: for each GPU generation and each backend asked for (none: the
platform's own choice), the class that vLLM's ``get_attn_backend`` gives, or why it gives none.
vLLM's CUDA platform, registry and selector run as they are. Three things are told otherwise: the
compute capability, and that the compiled kernels and FlashInfer can be imported.
"""
# ruff: noqa: E402

import json
import os
import sys
from types import ModuleType, SimpleNamespace

os.environ.update(
    VLLM_LOGGING_LEVEL="ERROR", VLLM_PLUGINS="pasta", VLLM_NO_USAGE_STATS="1", TRITON_INTERPRET="1"
)

from triton.backends import backends

backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: False), compiler=None)

import torch

torch.cuda.get_device_capability = lambda *_: (9, 0)

import vllm
from gpu_stand_ins import STAND_INS


def pretend(name, *attributes):
    """Makes a module of compiled code importable; nothing of it is called here."""
    sys.modules[name] = module = ModuleType(name)
    for attribute in attributes:
        setattr(module, attribute, lambda *_, **__: None)
    setattr(vllm, name.rpartition(".")[2], module)


pretend("vllm._C_stable_libtorch")
torch.ops._C.cutlass_scaled_mm_supports_block_fp8 = lambda _: False  # asked for by VllmConfig
pretend(
    "vllm.vllm_flash_attn",
    *("compile_flash_attn_varlen_func_from_specs", "flash_attn_varlen_func"),
    *("get_scheduler_metadata", "fa_version_unsupported_reason", "is_fa_version_supported"),
)

from vllm import platforms
from vllm.platforms.cuda import NonNvmlCudaPlatform

platforms._current_platform = NonNvmlCudaPlatform()

from vllm.config import AttentionConfig, VllmConfig, set_current_vllm_config
from vllm.plugins import load_general_plugins
from vllm.v1.attention import selector
from vllm.v1.attention.backends.registry import AttentionBackendEnum

GENERATIONS = {"Ampere": (8, 0), "Ada": (8, 9), "Hopper": (9, 0), "Blackwell": (10, 0)}
ASKED = (None, "FLASH_ATTN", "FLASHINFER", "TRITON_ATTN", "TRITON_MLA")


def select(capability, asked):
    """What vLLM's selector gives for a layer of head size 128 in bf16, or for one of DeepSeek's
    where a backend of latent attention is asked for."""
    torch.cuda.get_device_capability = lambda *_: capability
    NonNvmlCudaPlatform.get_device_capability.cache_clear()
    selector._cached_get_attn_backend.cache_clear()
    config = VllmConfig(
        attention_config=AttentionConfig(backend=asked and AttentionBackendEnum[asked])
    )
    with set_current_vllm_config(config):
        try:
            use_mla = asked == "TRITON_MLA"
            size = 576 if use_mla else 128
            backend = selector.get_attn_backend(size, torch.bfloat16, "auto", use_mla)
        except Exception as e:
            return {"error": f"{type(e).__name__}: {e}"}
    return {
        "name": backend.get_name(),
        "builder": backend.get_builder_cls().__mro__[1].__name__,
        "impl": backend.get_impl_cls().__mro__[1].__name__,
    }


def main():
    load_general_plugins()
    for stand_in in STAND_INS.values():
        stand_in()
    report = {
        f"{generation} {asked}": select(capability, asked)
        for generation, capability in GENERATIONS.items()
        for asked in ASKED
    }
    print("REPORT", json.dumps(report))


if __name__ == "__main__":
    main()
