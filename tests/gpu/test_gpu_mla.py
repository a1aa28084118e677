"""Steering over vLLM's Triton backend for MLA: the impl and the kernel, over a base that gives the
plain attention, against attention per head in fp64. `test_gpu_engine` runs it in vLLM's engine.

Broken by: a decoding row that is taken for a prompt's; a head set of another tile; the values of a
latent cache sought behind its keys; what is captured for a graph without anything steered.
"""

from types import SimpleNamespace

import interpreter  # noqa: F401
import pytest
import torch
from latent import (
    BLOCK,
    DECODES,
    LAYER,
    NOPE,
    NUM_HEADS,
    RANK,
    REQUESTS,
    ROPE,
    SCALE,
    VALUE,
    Batch,
)

from vllm_pasta.integration.worker import gpu_mla
from vllm_pasta.kernels.gpu import launch
from vllm_pasta.steering.plan import LayerAttention, StaticPlan, StepPlan
from vllm_pasta.steering.slots import SteeringBuffers

PLAIN = 7.0  # what the base leaves in a prompt's output


class Base:
    def forward_mqa(self, q, kv_cache, metadata, layer):
        return metadata.plain.clone(), None

    def forward_mha(self, q, kv_c, k_pe, kv_cache, metadata, k_scale, output, output_scale):
        output.fill_(PLAIN)


class Impl(gpu_mla.GPUMLASteeringImpl, Base):
    def __init__(self, batch):
        self.layer_index, self.num_heads = LAYER, NUM_HEADS
        self.attention = LayerAttention(SCALE)
        self.kv_lora_rank, self.qk_nope_head_dim, self.v_head_dim = RANK, NOPE, VALUE
        self.layer = SimpleNamespace(W_UK_T=batch.w_k, W_UV=batch.w_v)


def latent_plain(batch, query):
    """Plain attention of the decoding rows, in the latent space."""
    plain = torch.zeros(len(query), NUM_HEADS, RANK)
    for i, latent in enumerate(batch.latents[:DECODES]):
        row = batch.starts[i]
        weights = (query[row] @ latent.T * SCALE).softmax(-1)
        plain[row] = weights @ latent[:, :RANK]
    return plain


@pytest.mark.parametrize("most_rows", [1, 2], ids=["decodes", "may verify drafts"])
def test_equals_attention_per_head(most_rows):
    batch = Batch(torch.float32)
    middle, device = batch.starts[DECODES], "cpu"
    buffers = SteeringBuffers(len(REQUESTS), len(REQUESTS), LAYER + 1, NUM_HEADS)
    for row, emphasis in batch.emphases:
        buffers.write(row, emphasis)
    workspace = launch.Workspace(RANK, device)
    shape = (NUM_HEADS, gpu_mla.tiles_of(NUM_HEADS), RANK + ROPE)
    launch.warm_up(
        buffers, workspace, LayerAttention(SCALE), shape, BLOCK, torch.float32, value=(RANK, 0)
    )
    buffers.show(range(len(REQUESTS)))
    start = torch.tensor(batch.starts, dtype=torch.int32)
    seq_lens = torch.tensor([r.seq_len for r in REQUESTS], dtype=torch.int32)
    prompts = StaticPlan.pack([(row, e) for row, e in batch.emphases if row >= DECODES])
    steering = gpu_mla.MLASteering(
        buffers,
        {RANK: workspace},
        launch.Batch(start[: DECODES + 1], seq_lens[:DECODES], batch.table[:DECODES], most_rows),
        middle,
        is_steered=True,
        prompts=StepPlan.build(prompts, start, seq_lens, batch.table),
    )

    query = batch.query[:middle]
    absorbed = torch.einsum("rhn,hnl->rhl", query[..., :NOPE], batch.w_k)
    plain = latent_plain(batch, torch.cat([absorbed, query[..., NOPE:]], -1))
    metadata = SimpleNamespace(steering=steering, plain=plain, num_decode_tokens=middle)
    impl = Impl(batch)
    latent, _ = impl.forward_mqa((absorbed, query[..., NOPE:]), batch.cache, metadata, None)
    output = torch.zeros(len(batch.query) - middle, NUM_HEADS * VALUE)
    impl.forward_mha(batch.query[middle:], None, None, batch.cache, metadata, None, output)

    expected = batch.dense()
    steered = ~expected.isnan()
    decoded = torch.einsum("rhl,hlv->rhv", latent, batch.w_v)
    got = torch.cat([decoded, output.view(-1, NUM_HEADS, VALUE)]).double()
    torch.testing.assert_close(got[steered], expected[steered], rtol=2e-5, atol=2e-5)
    others = ~steered.any(-1)
    assert torch.equal(latent[others[:middle]], plain[others[:middle]])
    assert (got[middle:][others[middle:]] == PLAIN).all()
    assert steered[:middle].any()
    assert steered[middle:].any()


def test_tiles():
    """As many heads as tensor cores take, or the most that divide the heads."""
    sizes = {heads: heads // gpu_mla.tiles_of(heads) for heads in (1, 5, 16, 20, 64, 128)}
    assert sizes == {1: 1, 5: 5, 16: 16, 20: 10, 64: 16, 128: 16}
