"""Which architectures of the installed vLLM are accepted: the code that refuses engines decides.

Broken by: a refusal that takes more models than it should; a vLLM whose registry, or whose models'
source, is not what `tools.registry` reads.
"""

import pytest

from tools import registry

pytestmark = pytest.mark.xdist_group("verdicts")  # as test_upstream's


def test_every_architecture_has_a_verdict(verdicts):
    """Most are accepted; those that are not, by a refusal that exists, or could not be read."""
    assert len(verdicts) == sum(len(names) for names in registry.MAPS.values()) >= 262
    reasons = {verdict.reason for verdict in verdicts.values()}
    ids = {refusal.id for refusal in (*registry.ENGINE, *registry.LAYER, *registry.MLA_LAYER)}
    assert reasons <= {registry.ACCEPTED, registry.NOT_READ, *ids}
    assert sum(verdict.reason == registry.ACCEPTED for verdict in verdicts.values()) >= 200


def test_kinds(verdicts):
    """Architectures that were read by hand have the verdict that follows from their layers."""
    for name in ("LlamaForCausalLM", "GptOssForCausalLM", "Qwen2_5_VLForConditionalGeneration",
                 "Gemma3ForConditionalGeneration", "SmolLM3ForCausalLM"):  # fmt: skip
        assert verdicts[name].reason == registry.ACCEPTED
        assert not verdicts[name].is_hybrid
        assert not verdicts[name].uses_mla
    assert verdicts["LlamaForCausalLM"].layers == {"Attention"}
    for name in ("Qwen3NextForCausalLM", "NemotronHForCausalLM", "JambaForCausalLM",
                 "Lfm2ForCausalLM", "Qwen3_5ForConditionalGeneration"):  # fmt: skip
        assert verdicts[name].reason == registry.ACCEPTED
        assert verdicts[name].is_hybrid
    for name in ("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM", "LongcatFlashForCausalLM"):
        assert verdicts[name].reason == registry.ACCEPTED
        assert verdicts[name].uses_mla
        assert "MLAAttention" in verdicts[name].layers
    assert "DeepseekV32IndexerCache" in verdicts["GlmMoeDsaForCausalLM"].layers
    assert "DeepseekV32IndexerCache" not in verdicts["DeepseekV3ForCausalLM"].layers
    for name, reason in {
        "Mamba2ForCausalLM": "no-attention",
        "WhisperForConditionalGeneration": "encoder-decoder",
        "DiffusionGemmaForBlockDiffusion": "diffusion",
        "Llama4ForCausalLM": "layer-kind",
        "MiniMaxM3SparseForCausalLM": "layer-kind",
        "DeepseekV32ForCausalLM": "sparse-attention",
        "GlmMoeDsaForCausalLM": "sparse-attention",
    }.items():
        assert verdicts[name].reason == reason
