"""Steps of random numbers for the GPU's kernels, and what they come to: dense attention in fp64,
which shares no code with the kernels. On a GPU where there is one, else by Triton's interpreter, if
TRITON_INTERPRET was set before Triton was imported.
"""

import itertools
import random
from contextlib import contextmanager
from dataclasses import dataclass, field

import interpreter  # noqa: F401
import pytest
import torch
import triton.language as tl

from vllm_pasta.kernels.gpu import launch
from vllm_pasta.kernels.gpu.launch import Batch, Workspace, steered_attention
from vllm_pasta.request.heads import HeadSet
from vllm_pasta.request.resolution import LEAST_FACTOR, ResolvedEmphasis
from vllm_pasta.steering.plan import LayerAttention
from vllm_pasta.steering.slots import SteeringBuffers

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAYER = 1


@dataclass
class Request:
    """``heads`` of LAYER are steered; none: a plain request."""

    seq_len: int
    query_len: int
    prompt_len: int = 10**6
    spans: tuple = ()
    alpha: float = 0.01
    heads: tuple = ()
    factors: tuple = ()  # of the spans, where they are not all 1
    share: float | None = None  # instead of alpha


@dataclass
class Case:
    """A step of random numbers, and what it should come to."""

    requests: list
    num_heads: int = 4
    num_kv_heads: int = 2
    head_size: int = 64
    value_size: int = 0  # 0: as the keys'
    latent: bool = False  # values are the first part of their keys, the same for all KV heads
    block_size: int = 16
    dtype: torch.dtype = torch.float32
    cache_dtype: torch.dtype | None = None
    nhd: bool = False
    window: int | None = None
    soft_cap: float | None = None
    alibi: bool = False
    sinks: bool = False
    padding: int = 0
    seed: int = 0
    tensors: dict = field(default_factory=dict)

    def __post_init__(self):
        torch.manual_seed(self.seed)
        blocks = [-(-r.seq_len // self.block_size) for r in self.requests]
        total = sum(blocks) + 1
        self.value_size = self.value_size or self.head_size
        width = self.head_size + (0 if self.latent else self.value_size)
        kv_heads = 1 if self.latent else self.num_kv_heads
        shape = (total, kv_heads, self.block_size, width)
        if self.nhd:
            shape = (total, self.block_size, kv_heads, width)
        cache = torch.randn(shape)
        if self.nhd:
            cache = cache.transpose(1, 2)
        cache[0] = float("nan")  # vLLM's null block: nothing may be read from it
        cache = cache.to(self.cache_dtype or self.dtype)
        table = torch.zeros(len(blocks) + self.padding, max(blocks) + 1, dtype=torch.int32)
        order = iter(torch.randperm(total - 1) + 1)
        for r, count in enumerate(blocks):
            table[r, :count] = torch.tensor([next(order) for _ in range(count)])
            if self.window is not None:  # blocks that no row of the step sees are given away
                gone = self.requests[r].seq_len - self.requests[r].query_len + 1 - self.window
                table[r, : max(0, gone) // self.block_size] = 0
        ends = list(itertools.accumulate(r.query_len for r in self.requests))
        query_start = [0, *ends, *[ends[-1]] * self.padding]
        tokens = ends[-1] + self.padding
        size = (tokens, self.num_heads, self.head_size)
        self.attention = LayerAttention(
            self.head_size**-0.5, self.window, self.soft_cap,
            (torch.rand(self.num_heads) / 8).to(DEVICE) if self.alibi else None,
            torch.randn(self.num_heads).to(DEVICE) if self.sinks else None,
        )  # fmt: skip
        self.scales = (
            None
            if self.cache_dtype is None
            else (torch.tensor([0.7]).to(DEVICE), torch.tensor([1.3]).to(DEVICE))
        )
        self.query = torch.randn(size).to(self.dtype).to(DEVICE)
        self.cache = cache.to(DEVICE).expand(-1, self.num_kv_heads, -1, -1)
        seq_lens = [r.seq_len for r in self.requests] + [0] * self.padding
        self.batch = Batch(
            torch.tensor(query_start, dtype=torch.int32).to(DEVICE),
            torch.tensor(seq_lens, dtype=torch.int32).to(DEVICE),
            table.to(DEVICE),
            max(r.query_len for r in self.requests),
        )
        self.buffers = SteeringBuffers(
            len(self.requests) + 3, len(self.requests) + self.padding, 3, self.num_heads,
            device=DEVICE,
        )  # fmt: skip
        self.workspace = Workspace(self.value_size, DEVICE)
        self.slots = [len(self.requests) + 1 - r for r in range(len(self.requests))]
        self.write()

    def write(self):
        for r, request in enumerate(self.requests):
            steered = request.heads and ResolvedEmphasis(
                request.spans,
                request.alpha if request.share is None else LEAST_FACTOR,
                HeadSet.from_json({str(LAYER): request.heads, "2": [0]}),
                min(request.prompt_len, request.seq_len),
                request.factors,
                request.share,
            )
            self.buffers.write(self.slots[r], steered or None)
        return self.buffers.show(self.slots)

    def is_steered(self):
        """bool ``[num_tokens, num_heads]``."""
        steered = torch.zeros(self.query.shape[:2], dtype=torch.bool)
        for r, request in enumerate(self.requests):
            end = int(self.batch.query_start[r + 1])
            for head in request.heads:
                rows = min(request.seq_len - request.spans[0][0], request.query_len)
                steered[end - max(rows, 0) : end, head] = True
        return steered

    def dense(self, steer, dtype=torch.float64):
        """Output and log-sum-exp of each row, computed in ``dtype``, request by request."""
        output = torch.zeros(*self.query.shape[:2], self.value_size, dtype=dtype)
        lse = torch.zeros(self.query.shape[:2], dtype=dtype)
        group = self.num_heads // self.num_kv_heads
        for r, request in enumerate(self.requests):
            begin = int(self.batch.query_start[r])
            blocks = self.batch.block_table[r].long()
            cached = self.cache.to(dtype)[blocks].transpose(1, 2).flatten(0, 1)[: request.seq_len]
            keys, values = cached.cpu().tensor_split([self.head_size], dim=-1)
            if self.latent:
                values = keys[..., : self.value_size]
            if self.scales is not None:
                keys, values = keys * self.scales[0].item(), values * self.scales[1].item()
            first = request.spans[0][0] if request.heads else None
            prompt_len = min(request.prompt_len, request.seq_len)
            bias = torch.zeros(request.seq_len, dtype=dtype)
            bias[:prompt_len] = torch.tensor(request.alpha, dtype=torch.float64).log()
            factors = request.factors or [1.0] * len(request.spans)
            for (start, end), factor in zip(request.spans, factors, strict=True):
                bias[start:end] = torch.tensor(factor, dtype=torch.float64).log()
            for i, h in itertools.product(range(request.query_len), range(self.num_heads)):
                position = request.seq_len - request.query_len + i
                begin_key = 0 if self.window is None else max(0, position + 1 - self.window)
                seen = slice(begin_key, position + 1)
                logits = keys[seen, h // group] @ self.query[begin + i, h].cpu().to(dtype)
                logits = logits * self.attention.scale
                if self.soft_cap is not None:
                    logits = (logits / self.soft_cap).tanh() * self.soft_cap
                if self.alibi:
                    distance = torch.arange(begin_key, position + 1) - position
                    logits = logits + (self.attention.alibi_slopes[h].item() * distance).to(dtype)
                lse[begin + i, h] = logits.logsumexp(0)
                if steer and h in request.heads and position >= first:
                    if request.share is None:
                        logits = logits + bias[seen]
                    else:
                        key = torch.arange(begin_key, position + 1)
                        marked = sum((key >= a) & (key < b) for a, b in request.spans) > 0
                        rest = ~marked & (key < prompt_len)
                        of_marked, of_rest = (logits[x].exp().sum() for x in (marked, rest))
                        if of_marked > 0 and of_marked / (of_marked + of_rest) < request.share:
                            factor = (of_marked / request.share - of_marked) / of_rest
                            logits[rest] += factor.clamp(min=1e-4).log()
                if self.sinks:
                    sink = self.attention.sinks[h].cpu().to(dtype)[None]
                    logits = torch.cat([logits, sink])
                weights = logits.softmax(0)[: position + 1 - begin_key]
                output[begin + i, h] = weights @ values[seen, h // group]
        return output, lse

    def run(self, output, lse=None):
        """The kernels, over the plain ``output``."""
        output = output.to(self.dtype).to(DEVICE)
        steered_attention(
            self.query, self.cache, output, self.buffers, LAYER, self.batch, self.attention,
            self.workspace, self.scales, None if lse is None else lse.float().to(DEVICE),
            value_at=0 if self.latent else None,
        )  # fmt: skip
        assert not self.workspace.counters.any()  # as the next launch must find them
        return output.cpu()

    def check(self, tolerance=1e-5):
        """Both kernels give the dense result, and touch nothing that is plain."""
        plain, lse = self.dense(steer=False)
        wanted, _ = self.dense(steer=True)
        same = ~self.is_steered()
        assert (plain == wanted).all(-1)[same].all()
        for given_lse in (None, lse):
            output = self.run(plain, given_lse)
            assert torch.equal(output[same], plain.to(self.dtype)[same])
            error = (output.double() - wanted).abs().max()
            if self.dtype == torch.float32:
                assert error < tolerance
            else:  # at most twice that of plain torch in that dtype, and its last digit
                plain_error = (self.dense(True, self.dtype)[0].double() - wanted).abs().max()
                digit = torch.finfo(self.dtype).eps * wanted.abs().max()
                assert error <= 2 * plain_error + digit, (error, plain_error, digit)


@contextmanager
def interpreter_multiplies_bfloat16():
    """Triton 3.7's interpreter keeps bfloat16 as uint16, and `tl.dot` multiplies these integers."""
    if DEVICE == "cuda":
        yield
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    dot = InterpreterBuilder.create_dot

    def widen(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype("uint32") << 16).view("float32"), tl.float32)

    InterpreterBuilder.create_dot = lambda self, a, b, *rest: dot(self, widen(a), widen(b), *rest)
    try:
        yield
    finally:
        InterpreterBuilder.create_dot = dot


def check_random(seed: int) -> None:
    """One step of any kind that vLLM can ask for, small; the same for the same seed."""
    rng = random.Random(seed)
    case = random_case(rng)
    with interpreter_multiplies_bfloat16(), pytest.MonkeyPatch.context() as patch:
        if DEVICE == "cpu":
            # A program takes milliseconds even where it finds nothing to do. So few share a row's
            # keys, but they do so already where there are few keys.
            patch.setattr(launch, "MAX_PARTS", rng.choice((1, 2, 2, 3, 4)))
            patch.setattr(launch, "SHARE", rng.choice((16, 32, 64, launch.SHARE)))
        case.check()


FACTORS = (1e-4, 0.01, 0.1, 0.3, 0.5, 0.99, 1.0, 1.3, 4.0)


def random_case(rng: random.Random) -> Case:
    """Interpreted, a step takes a tenth of a second or more: lengths are those of a few tiles."""
    num_kv_heads = rng.choice((1, 1, 2))
    num_heads = num_kv_heads * rng.choice((1, 2, 3, 4))
    decodes = rng.random() < 0.4
    requests = [_random_request(rng, num_heads, decodes) for _ in range(rng.choice((1, 2, 3)))]
    if not any(r.heads for r in requests):
        requests.append(Request(30, 1, 25, ((2, 5),), heads=(0,)))
    dtype = rng.choice((torch.float32, torch.float32, torch.bfloat16, torch.float16))
    fp8 = rng.choice((torch.float8_e4m3fn, torch.float8_e5m2))
    return Case(
        requests, num_heads, num_kv_heads, rng.choice((32, 64, 80, 128)),
        block_size=rng.choice((16, 32, 128)),
        dtype=dtype,
        cache_dtype=fp8 if dtype == torch.float32 and rng.random() < 0.2 else None,
        nhd=rng.random() < 0.5,
        window=rng.choice((None, None, None, 1, 7, 24, 40)),
        soft_cap=rng.choice((None, None, None, 2.0, 30.0)),
        alibi=rng.random() < 0.15,
        sinks=rng.random() < 0.2,
        padding=rng.choice((0, 0, 3)),
        seed=rng.randrange(2**31),
    )  # fmt: skip


def _random_request(rng: random.Random, num_heads: int, decodes: bool) -> Request:
    seq_len = int(2 ** rng.uniform(0, 7)) + (300 if decodes and rng.random() < 0.2 else 0)
    query_len = 1 if decodes else rng.randint(1, min(seq_len, 40))
    if rng.random() < 0.2:
        return Request(seq_len, query_len)
    prompt_len = rng.choice((seq_len, rng.randint(1, seq_len)))
    cuts = sorted(rng.sample(range(prompt_len + 1), min(prompt_len + 1, rng.choice((2, 3, 6, 12)))))
    pairs = itertools.pairwise(cuts)
    spans = tuple(span for span in pairs if rng.random() < 0.7) or (tuple(cuts[:2]),)
    strength = {"alpha": rng.choice((*FACTORS, 20.0))}
    if rng.random() < 0.3:
        strength = {"share": rng.choice((0.05, 0.3, 0.7, 0.95))}
    elif rng.random() < 0.4:
        strength["factors"] = tuple(rng.choice(FACTORS) for _ in spans)
    heads = tuple(sorted(rng.sample(range(num_heads), rng.randint(1, num_heads))))
    return Request(seq_len, query_len, prompt_len, spans, heads=heads, **strength)
