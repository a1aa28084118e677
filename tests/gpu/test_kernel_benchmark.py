"""What the GPU kernels' benchmark times is right, and seen to be wrong where it is."""

import pytest
import torch

from benchmarks import kernel_gpu


@pytest.mark.parametrize("query_len", [1, 40])
def test_gpu_kernels_equal_dense_attention(query_len):
    """The check that comes before the timing, on what a GPU benchmark runs; and its peers."""
    case = kernel_gpu.Case(3, query_len, 70, 0.5, 16, 4, 2, 64)
    bench = kernel_gpu.Bench(case, "cuda" if torch.cuda.is_available() else "cpu")
    bench.check()
    if query_len == 1:
        wanted = torch.stack([bench.dense(r, steer=True)[0][0] for r in range(3)])
        for name, run in bench.peers().items():
            got = run().reshape(wanted.shape).float()
            assert (got - wanted).abs().max() < 1e-4, name
    bench.buffers.hide()
    with pytest.raises(AssertionError):
        bench.check()


def test_gpu_benchmark_needs_a_gpu(monkeypatch):
    monkeypatch.setattr("sys.argv", ["kernel_gpu"])
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="needs a CUDA device"):
            kernel_gpu.main()
    assert set(kernel_gpu.packing_us(4, "cpu")) == {"new", "known"}
