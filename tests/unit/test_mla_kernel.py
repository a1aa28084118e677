"""The kernel over a latent KV cache, against attention that is computed per head and in fp64."""

import pytest
import torch
from latent import DECODES, LAYER, NOPE, NUM_HEADS, RANK, SCALE, VALUE, Batch

from vllm_pasta.kernels import mla


def run(batch):
    """Rows of decoding requests and of prompts in calls of their own, as vLLM has them."""
    output = torch.full((len(batch.query), NUM_HEADS, VALUE), float("nan"))
    heads, middle = batch.plan.static.layers[LAYER], batch.starts[DECODES]
    for start, end in ((0, middle), (middle, len(batch.query))):
        for part in mla.steered_parts(batch.plan, heads, start, end - start, batch.cache):
            query = batch.query[start:end][part.rows][:, part.heads]
            absorbed = torch.einsum(
                "rhn,hnl->rhl", query[..., :NOPE].float(), batch.w_k[part.heads]
            )
            query = torch.cat([absorbed, query[..., NOPE:]], dim=-1)
            latent = mla.latent_attention(query, part, SCALE, RANK)
            assert torch.isnan(output[start:end][part.rows, part.heads]).all()  # once each
            output[start:end][part.rows, part.heads] = torch.einsum(
                "rhl,hlv->rhv", latent, batch.w_v[part.heads]
            )
    return output


@pytest.mark.parametrize("tile", [mla.TILE, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_attention_per_head(dtype, tile, monkeypatch):
    """Exactly the steered pairs, in whatever tiles. bf16 tensors are computed with in fp32."""
    monkeypatch.setattr(mla, "TILE", tile)
    batch = Batch(dtype)
    got, expected = run(batch), batch.dense()
    assert torch.equal(torch.isnan(got), torch.isnan(expected))
    assert (~torch.isnan(got)).sum() > 1000
    torch.testing.assert_close(
        got.double().nan_to_num(), expected.nan_to_num(), rtol=2e-5, atol=2e-5
    )
