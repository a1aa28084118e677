"""The models of vLLM's own recipes, by architecture: what people serve.

From https://github.com/vllm-project/recipes at commit 8959cf6 (2026-08-20), one entry for each file
of ``models/`` whose tasks are text or multimodal. Left out are models of sound, of pictures and of
embeddings, those that only read documents or speech (OCR, ASR), and PLaMo 2, which vLLM dropped in
0.26. Recipes seldom name an architecture, so it is that of the checkpoint's ``config.json``; of
Mistral's own format that of the language model.
"""

from collections.abc import Callable, Iterable

from tools import registry

_TABLE = """
AfmoeForCausalLM: Trinity-Large-Thinking
BailingMoeV2ForCausalLM: Ring-1T-FP8
BailingMoeV2_5ForCausalLM: Ling-2.6-1T, Ling-2.6-flash, Ring-2.6-1T
BailingMoeV3ForCausalLM: Ling-3.0-flash
DeepseekV3ForCausalLM: DeepSeek-R1, DeepSeek-V3, DeepSeek-V3.1, Kimi-K2-Instruct, Kimi-K2-Thinking
DeepseekV32ForCausalLM: DeepSeek-V3.2-Exp, DeepSeek-V3.2
DeepseekV4ForCausalLM: DeepSeek-V4-Flash, DeepSeek-V4-Pro
DiffusionGemmaForBlockDiffusion: diffusiongemma-26B-A4B-it
Dots3NoteForCausalLM: dots3-note-prev
Ernie4_5_MoeForCausalLM: ERNIE-4.5-21B-A3B-PT
Ernie4_5_VLMoeForConditionalGeneration: ERNIE-4.5-VL-28B-A3B-PT
Gemma3ForConditionalGeneration: translategemma-27b-it
Gemma4ForConditionalGeneration: gemma-4-E2B-it, gemma-4-E4B-it, gemma-4-26B-A4B-it, gemma-4-31B-it
Gemma4UnifiedForConditionalGeneration: gemma-4-12B-it
GlmForCausalLM: glm-4-9b-hf
Glm4MoeForCausalLM: GLM-4.5, GLM-4.6, GLM-4.7
Glm4vForConditionalGeneration: GLM-GA, Glyph
Glm4vMoeForConditionalGeneration: GLM-4.5V, GLM-4.6V
GlmMoeDsaForCausalLM: GLM-5, GLM-5.1, GLM-5.2, Macaron-V1-Coding-Venti
GptOssForCausalLM: gpt-oss-20b, gpt-oss-120b
GraniteForCausalLM: granite-3.2-2b-instruct
HunYuanMoEV1ForCausalLM: Hunyuan-A13B-Instruct
HYV3ForCausalLM: Hy3-preview, Hy3
InklingForConditionalGeneration: Inkling-NVFP4, Inkling-Small-NVFP4
InternS1ForConditionalGeneration: Intern-S1
InternS2PreviewForConditionalGeneration: Intern-S2-Preview
InternVLChatModel: InternVL3_5-8B
KimiK25ForConditionalGeneration: Kimi-K2.5, Kimi-K2.6, Kimi-K2.7-Code
KimiK3ForConditionalGeneration: Kimi-K3
KimiLinearForCausalLM: Kimi-Linear-48B-A3B-Instruct
LagunaForCausalLM: Laguna-M.1, Laguna-S-2.1, Laguna-XS-2.1, Laguna-XS.2
Lfm2ForCausalLM: LFM2.5-230M, LFM2.5-350M, LFM2.5-1.2B-Base, LFM2.5-1.2B-Instruct, LFM2.5-1.2B-JP,
    LFM2.5-1.2B-JP-202606, LFM2.5-1.2B-Thinking
Lfm2MoeForCausalLM: LFM2.5-8B-A1B
Lfm2VlForConditionalGeneration: LFM2.5-VL-450M, LFM2.5-VL-1.6B
Llama4ForConditionalGeneration: Llama-4-Scout-17B-16E-Instruct
LlamaForCausalLM: Llama-3.1-8B, Llama-3.1-8B-Instruct, Llama-3.2-1B, Llama-3.2-1B-Instruct,
    Llama-3.2-3B-Instruct, Llama-3.3-70B-Instruct, MiniCPM5-1B
MellumForCausalLM: Mellum2-12B-A2.5B-Instruct, Mellum2-12B-A2.5B-Thinking
MiMoV2FlashForCausalLM: MiMo-V2-Flash
MiMoV2ForCausalLM: MiMo-V2.5-Pro
MiMoV2OmniForCausalLM: MiMo-V2.5
MiniCPMV4_6ForConditionalGeneration: MiniCPM-V-4.6
MiniMaxM2ForCausalLM: MiniMax-M2, MiniMax-M2.1, MiniMax-M2.5, MiniMax-M2.7
MiniMaxM3SparseForConditionalGeneration: MiniMax-M3
MistralLarge3ForCausalLM: Mistral-Large-3-675B-Instruct-2512, Mistral-Small-4-119B-2603
MuseGlimmerForConditionalGeneration: Muse-Glimmer-30B
NemotronHForCausalLM: NVIDIA-Nemotron-Nano-9B-v2, NVIDIA-Nemotron-3-Nano-4B-BF16,
    NVIDIA-Nemotron-3-Nano-30B-A3B-BF16, NVIDIA-Nemotron-3-Super-120B-A12B-BF16,
    NVIDIA-Nemotron-3-Ultra-550B-A55B-BF16, NVIDIA-Nemotron-3.5-Lightning-30B-A3B-BF16
NemotronH_Nano_Omni_Reasoning_V3: Nemotron-3-Nano-Omni-30B-A3B-Reasoning-BF16
NemotronH_Nano_VL_V2: NVIDIA-Nemotron-Nano-12B-v2-VL-BF16
Phi3ForCausalLM: Phi-4-mini-instruct, Phi-4-reasoning
Phi4MMForCausalLM: Phi-4-multimodal-instruct
PixtralForConditionalGeneration: Ministral-3-8B-Reasoning-2512, Ministral-3-14B-Instruct-2512,
    Mistral-Medium-3.5-128B
Plamo3ForCausalLM: plamo-3-nict-31b-base
Qwen2ForCausalLM: Qwen2.5-32B
Qwen2_5_VLForConditionalGeneration: Qwen2.5-VL-7B-Instruct, Qwen2.5-VL-72B-Instruct
Qwen3ForCausalLM: Qwen3-1.7B, Qwen3-4B, Qwen3-8B, Qwen3-32B, Qwen3Guard-Gen-8B
Qwen3MoeForCausalLM: Qwen3-30B-A3B, Qwen3-235B-A22B-Instruct-2507, Qwen3-Coder-480B-A35B-Instruct
Qwen3NextForCausalLM: Qwen3-Next-80B-A3B-Instruct
Qwen3VLMoeForConditionalGeneration: Qwen3-VL-235B-A22B-Instruct
Qwen3_5ForConditionalGeneration: Qwen3.5-0.8B, Qwen3.5-2B, Qwen3.5-4B, Qwen3.5-9B, Qwen3.5-27B,
    Qwen3.6-27B, Qwen3.8-27B
Qwen3_5MoeForConditionalGeneration: Qwen3.5-35B-A3B, Qwen3.5-122B-A10B, Qwen3.5-397B-A17B,
    Qwen3.6-35B-A3B
Qwen3_5MoeForCausalLM: Qwen3.8-2.4T-A95B
SeedOssForCausalLM: Seed-OSS-36B-Instruct
Step3p5ForCausalLM: Step-3.5-Flash
Step3p7ForConditionalGeneration: Step-3.7-Flash
"""

RECIPES: dict[str, list[str]] = {
    name: models.split(", ")
    for name, models in (
        line.split(": ") for line in _TABLE.replace(",\n    ", ", ").strip().splitlines()
    )
}
"""Names of models by architecture."""


def reach() -> str:
    """How many architectures of vLLM, and models of its recipes, are accepted, as each kind of
    model comes to those before it; and what refuses the others."""
    found = registry.verdicts()
    accepted = {name for name, verdict in found.items() if verdict.reason == registry.ACCEPTED}
    models = sum(map(len, RECIPES.values()))
    lines = [
        f"| step | of {len(found)} architectures | of {models} models in vLLM's recipes |",
        "|---|---|---|",
    ]
    reached: set[str] = set()
    for step, belongs in _STEPS.items():
        reached |= {name for name in accepted if belongs(name, found[name])}
        lines.append(f"| {step} | {len(reached)} | {_models(reached)} |")
    assert reached == accepted
    reasons = {verdict.reason for verdict in found.values()} - {registry.ACCEPTED}
    for reason in sorted(reasons):
        names = {name for name, verdict in found.items() if verdict.reason == reason}
        shown = ", ".join(sorted(model for name in names for model in RECIPES.get(name, ())))
        count = f"{_models(names)}: {shown}" if shown else "0"
        lines.append(f"| out: {reason} | {len(names)} | {count} |")
    return "\n".join(lines)


def _is_multimodal(name: str) -> bool:
    return name in registry.MAPS["multimodal models"] or "MultiModal" in name


_STEPS: dict[str, Callable[[str, registry.Verdict], bool]] = {
    "decoders of text": lambda name, v: not (v.uses_mla or v.is_hybrid or _is_multimodal(name)),
    "and multimodal ones": lambda name, v: not (v.uses_mla or v.is_hybrid),
    "and hybrid models": lambda name, v: not v.uses_mla,
    "and multi-head latent attention (MLA)": lambda name, v: True,
}
"""Kinds of models, each with those before it."""


def _models(architectures: Iterable[str]) -> int:
    return sum(len(RECIPES.get(name, ())) for name in architectures)
