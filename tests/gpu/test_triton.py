"""The Triton kernels against dense attention: on a GPU where there is one, else by Triton's
interpreter (conftest turns it on). And compiled for real GPUs, which needs none.

Broken by: a bias on a wrong key, row or head; a key that a row must not see; a part of a split row
that is lost; a plain row, head or padding row that is touched.
"""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gpu_cases import (
    DEVICE,
    LAYER,
    Case,
    Request,
    check_random,
    interpreter_multiplies_bfloat16,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_pasta.kernels.gpu.launch import Workspace, steered_attention
from vllm_pasta.steering.plan import LayerAttention


@pytest.fixture(autouse=True)
def bfloat16():
    with interpreter_multiplies_bfloat16():
        yield


MIXED = [
    Request(40, 40, spans=((3, 9), (20, 22)), heads=(0, 2)),
    Request(70, 3, 69, ((60, 69),), 0.5, (1, 3)),
    Request(33, 1, 30, ((0, 2),), 20.0, (3,)),
    Request(17, 17),
    Request(1, 1),
    Request(97, 20, spans=((80, 85),), heads=(0, 1, 2, 3)),  # a chunk that begins before the span
    Request(30, 5, spans=((29, 30),), heads=(2,)),  # all but its last row are plain
]
DECODE = [
    Request(1025, 1, 600, ((5, 280), (511, 514)), heads=(0, 1, 3)),  # keys for several programs
    Request(97, 1, 97, ((90, 97),), 0.1, (2,)),
    Request(17, 1, 3, ((1, 2),), 5.0, (0, 3)),
    Request(50, 1),
    Request(1, 1, heads=(1,), spans=((0, 1),)),
]
DRAFTED = [  # as speculative decoding verifies
    Request(1025, 4, 1000, ((5, 6), (511, 514)), heads=(0, 1)),
    Request(60, 4),
    Request(40, 4, 38, ((37, 38),), 0.1, (2, 3)),
]
# Half as long: of keys for three programs, the last has one.
SHORTER = [Request(513, 1, 400, ((5, 280), (300, 303)), heads=(0, 1, 3)), *DECODE[1:]]
STEPS = {"mixed": MIXED, "decode": SHORTER}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"nhd": True, "padding": 3},
        {"block_size": 128},
        {"head_size": 80},
        {"head_size": 256, "num_kv_heads": 1},
        {"head_size": 72, "value_size": 64, "latent": True},
        {"num_kv_heads": 4},
        {"num_heads": 6},
        {"window": 24},
        {"window": 5, "sinks": True},
        {"soft_cap": 2.0},
        {"sinks": True},
        {"window": 40, "soft_cap": 5.0, "alibi": True},
        # Sizes that meet no other branch, and features that are above one by one.
        pytest.param({"block_size": 32, "head_size": 128}, marks=pytest.mark.slow),
        pytest.param({"num_heads": 40, "num_kv_heads": 5}, marks=pytest.mark.slow),
        pytest.param({"head_size": 48, "value_size": 32}, marks=pytest.mark.slow),
        pytest.param({"alibi": True, "nhd": True}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_dense(step, options):
    Case(STEPS[step], **options).check()


def test_wide_heads():
    """As of Gemma 4's full layers."""
    Case(MIXED, head_size=512, num_kv_heads=1).check()


def test_long_decode():
    Case(DECODE).check()


@pytest.mark.parametrize("options", [{}, {"padding": 2, "sinks": True}, {"window": 24}], ids=str)
def test_drafted(options):
    Case(DRAFTED, **options).check()


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(step, dtype):
    Case(STEPS[step], dtype=dtype, nhd=True).check()


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("cache_dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_cache(step, cache_dtype):
    Case(STEPS[step], cache_dtype=cache_dtype).check()


STRENGTHS = [
    Request(60, 20, 50, ((3, 9), (9, 12), (30, 40)), 0.01, (0, 2), (0.3, 1.0, 0.05)),
    Request(70, 1, 60, ((0, 3), (50, 55)), 5.0, (0, 1), (2.0, 1.0)),  # all weaker than the rest
    Request(45, 3, 40, ((2, 6), (10, 12)), 0.1, (1, 3), (0.01, 1.0)),  # one weaker, one stronger
    Request(40, 4, 40, ((8, 12),), 1.0, (2,), (0.2,)),  # the rest at full strength
    Request(33, 1, 30, ((1, 5),), 0.5, (0, 1, 2, 3)),
]


@pytest.mark.parametrize("decodes", [False, True])
def test_several_strengths(decodes):
    """Each span its own factor, beside a request of one strength."""
    rows = [replace(r, query_len=1) for r in STRENGTHS] if decodes else STRENGTHS
    Case(rows).check()


SHARED = [
    Request(60, 20, 50, ((3, 9), (9, 12), (30, 40)), heads=(0, 2), share=0.7),
    Request(70, 1, 60, ((0, 3), (50, 55)), heads=(0, 1), share=0.05),  # most have it
    Request(70, 2, 70, ((4, 5),), heads=(1, 3), share=0.9999),  # by the least factor
    Request(33, 1, 30, ((1, 5),), 0.5, (0, 1, 2, 3)),
    Request(17, 4),
]
LONG_SHARED = [
    Request(513, 1, 400, ((5, 280), (300, 303)), heads=(0, 1, 3), share=0.8),
    Request(513, 1, 500, ((5, 9),), heads=(2,), share=0.3),  # direct: keys for several programs
    Request(97, 1, 97, ((90, 97),), 0.1, (2,)),
]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window": 20},
        {"sinks": True, "soft_cap": 2.0, "alibi": True},
        {"dtype": torch.bfloat16},
    ],
    ids=str,
)
@pytest.mark.parametrize("decodes", [False, True])
def test_share(decodes, options):
    """Each (row, head) its own factor, beside a request with one for all and a plain one. Broken
    by: a factor of another row, a mark or its sum that is missed, a least factor that is not."""
    rows = [replace(r, query_len=1) for r in SHARED] if decodes else SHARED
    Case(rows, **options).check()


def test_share_of_many_keys_and_spans():
    Case(LONG_SHARED).check()
    spans = tuple((5 * i + 2, 5 * i + 3 + i % 4) for i in range(9))
    for query_len in (1, 40):
        Case([Request(50, query_len, 48, spans, heads=(0, 3), share=0.8)]).check()


@pytest.mark.parametrize("query_len", [1, 5])
def test_share_of_marks_far_away(query_len):
    """Beside the nearest keys nothing is left of their weight: the least factor, not none."""
    case = Case([Request(250, query_len, 250, ((5, 9),), heads=(0, 1, 3), share=0.7)], alibi=True)
    slopes = torch.tensor([1.0, 0.5, 0.0, 0.01]).to(DEVICE)
    case.attention = replace(case.attention, alibi_slopes=slopes)
    case.check()


@pytest.mark.parametrize("options", [{}, {"window": 20}], ids=str)
@pytest.mark.parametrize("query_len", [1, 40])
def test_many_spans(query_len, options):
    """More than a kernel holds at a time; some begin where a group of them does."""
    spans = tuple((5 * i + 2, 5 * i + 3 + i % 4) for i in range(9))
    factors = tuple((1.0, 0.5, 0.2)[i % 3] for i in range(9))
    Case([
        Request(50, query_len, 48, spans, 0.01, (0, 3)),
        Request(50, query_len, 48, spans, 0.3, (2,), factors),
    ], **options).check()  # fmt: skip


def test_difference_that_cancels():
    """With alpha above 1 a merge subtracts. Where the emphasised keys have nearly all the weight,
    little is left, and the rows are computed from their keys instead, as exactly as ever. Broken
    by: `MAX_GAIN` = 1e9."""
    case = Case([Request(64, 1, 60, ((2, 40),), 500.0, (0, 1, 2, 3))])
    blocks = case.batch.block_table[0].long()
    case.cache[blocks[:2], ..., :64] *= 6  # keys that attract
    case.check()


def test_batch_invariance():
    """A row's result does not depend on what is beside it, to the bit, nor on the step's kind.
    Broken by: keys shared among as many programs as the step leaves room for."""
    decode = Request(600, 1, 400, ((5, 280), (311, 314)), heads=(0, 1, 3))
    steps = ([decode], [Request(40, 30, spans=((3, 9),), heads=(0, 2)), decode])
    for options in ({}, {"window": 300}):
        cases = []
        for step in steps:
            case = Case(step, **options)
            case.workspace = Workspace(case.head_size, DEVICE, is_invariant=True)
            if cases:  # the same tokens
                case.query[-1] = cases[0].query[-1]
                tables = case.batch.block_table[-1], cases[0].batch.block_table[0]
                mine, first = (table[:38].long() for table in tables)
                case.cache[mine] = cases[0].cache[first]
            plain, lse = case.dense(steer=False)
            case.outputs = [case.run(plain, given_lse)[-1] for given_lse in (None, lse)]
            cases.append(case)
        assert all(map(torch.equal, cases[0].outputs, cases[1].outputs))


def test_rows_of_a_program():
    """A block of rows comes to several tiles, which programs share or one goes over."""
    steered = Request(150, 149, spans=((3, 9),), heads=(0, 1, 2, 3))
    case = Case([steered, Request(140, 140, spans=((7, 8),), heads=(2,))], dtype=torch.bfloat16)
    case.check()


@st.composite
def requests(draw):
    seq_len = draw(st.integers(1, 80))
    query_len = draw(st.integers(1, seq_len))
    prompt_len = draw(st.integers(1, seq_len))
    cuts = sorted(draw(st.sets(st.integers(0, prompt_len), min_size=2, max_size=8)))
    spans = tuple(zip(cuts[::2], cuts[1::2], strict=False))
    heads = tuple(sorted(draw(st.sets(st.integers(0, 3)))))
    alpha = draw(st.sampled_from([1e-4, 0.01, 0.5, 3.0]))
    return Request(seq_len, query_len, prompt_len, spans, alpha, heads if spans else ())


@settings(max_examples=15, deadline=None)
@given(st.lists(requests(), min_size=1, max_size=4), st.sampled_from([None, 1, 7]), st.booleans())
def test_any_step(batch, window, nhd):
    case = Case(batch, window=window, nhd=nhd)
    plain, lse = case.dense(steer=False)
    wanted, _ = case.dense(steer=True)
    for given_lse in (None, lse):
        assert (case.run(plain, given_lse).double() - wanted).abs().max() < 1e-5


@pytest.mark.slow
def test_random_steps():
    """With every feature of the kernel; `python -m tools.fuzz_kernel --kernel triton` runs as many
    as one wants."""
    for seed in range(50):
        check_random(seed)


@pytest.mark.parametrize("query_len", [1, 5])
def test_more_heads_than_a_tile_has_rows(query_len):
    """20 to a KV head."""
    steered = Request(30, query_len, 28, ((2, 5),), heads=(0, 18, 39))
    Case([steered, Request(20, query_len)], num_heads=40, num_kv_heads=2).check()


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU has its own order")
def test_programs_in_another_order(monkeypatch):
    """Those that share a row's keys leave their parts in places of their own."""
    from triton.runtime.interpreter import InterpreterBuilder

    set_grid_idx = InterpreterBuilder.set_grid_idx
    calls = []

    def last_parts_first(self, *at):
        calls.append(at)
        x, y, z = self.grid_dim
        part, block = divmod((at[0] * y + at[1]) * z + at[2], x * y)
        set_grid_idx(self, *divmod(block, y), z - 1 - part)

    monkeypatch.setattr(InterpreterBuilder, "set_grid_idx", last_parts_first)
    Case(DECODE).check()
    assert calls


def test_other_layers_heads(monkeypatch):
    """A layer without steered heads, though others of the request have some."""
    case = Case(MIXED)
    plain, _ = case.dense(steer=False)
    monkeypatch.setattr("gpu_cases.LAYER", 0)
    assert torch.equal(case.run(plain), plain.float())


def test_launches_do_not_depend_on_what_is_steered(monkeypatch):
    """A CUDA graph replays launches: with other contents they must be the same."""
    from vllm_pasta.kernels.gpu import steer

    launches = []

    class Recorder:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            def launch(*args, **options):
                shown = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in args]
                launches.append((self.name, grid, shown, options))

            return launch

    monkeypatch.setattr(steer, "steer", Recorder("steer"))
    case = Case(DECODE)
    output = torch.zeros_like(case.query)
    lse = torch.zeros(case.query.shape[:2], device=DEVICE)
    recorded = []
    for requests in (DECODE, [Request(r.seq_len, 1) for r in DECODE], DECODE[::-1]):
        case.requests = requests
        case.write()
        launches.clear()
        steered_attention(
            case.query, case.cache, output, case.buffers, LAYER, case.batch, case.attention,
            case.workspace, lse=lse,
        )  # fmt: skip
        recorded.append(list(launches))
    assert recorded[0]
    assert recorded[0] == recorded[1] == recorded[2]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: setattr(c, "cache", c.cache.half()), "a KV cache in the query's dtype"),
        (lambda c: setattr(c, "cache", c.cache[..., :64]), "head_size \\+ value_size"),
        (
            lambda c: setattr(c, "query", c.query[:, :3]),
            "number of heads.*multiple of the KV heads",
        ),
        (lambda c: setattr(c, "attention", LayerAttention(0.0)), "scale, window and soft_cap"),
        (lambda c: setattr(c.buffers, "records", c.buffers.records[:4]), "5 requests for 4 rec"),
    ],
)
def test_wrong_arguments(change, words):
    case = Case(DECODE)
    output, _ = case.dense(steer=False)
    change(case)
    with pytest.raises(ValueError, match=words):
        case.run(output)


@pytest.mark.cuda
@pytest.mark.parametrize("use_lse", [False, True])
def test_cuda_graph(use_lse):
    """Captured while nothing is shown; replayed with requests that come, change and go."""
    case = Case(DECODE)
    plain, lse = case.dense(steer=False)
    lse = lse.float().to(DEVICE) if use_lse else None
    output = plain.float().to(DEVICE)

    def step():
        steered_attention(
            case.query, case.cache, output, case.buffers, LAYER, case.batch, case.attention,
            case.workspace, lse=lse,
        )  # fmt: skip

    case.buffers.hide()
    step()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    steered = [*DECODE[:2], Request(17, 1, 3, ((0, 1), (2, 3)), 0.2, (1,)), *DECODE[3:]]
    for requests in (DECODE, steered, [Request(r.seq_len, 1) for r in DECODE], DECODE):
        case.requests = requests
        case.write()
        output.copy_(plain)
        graph.replay()
        wanted, _ = case.dense(steer=True)
        assert (output.cpu().double() - wanted).abs().max() < 1e-4


@pytest.mark.cuda
def test_split_keys_many_times():
    """Whoever comes last: parts are put together in their own order, so not a bit differs."""
    case = Case([Request(4000 + r, 1, 3000, ((5, 2000),), heads=(0, 1, 3)) for r in range(8)])
    plain, lse = case.dense(steer=False)
    for given_lse in (None, lse):
        first = case.run(plain, given_lse)
        assert all(torch.equal(case.run(plain, given_lse), first) for _ in range(200))


@pytest.mark.cuda
@pytest.mark.skipif(not shutil.which("compute-sanitizer"), reason="needs compute-sanitizer")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_sanitizer(tool):
    """No access out of bounds, and no race in shared memory."""
    done = subprocess.run(
        [
            *("compute-sanitizer", "--tool", tool, "--error-exitcode", "9"),
            *(sys.executable, "-m", "pytest", "-q", __file__, "-k", "test_dense or fp8"),
            *("-m", ""),  # slow ones, too
        ],
        capture_output=True,
        text=True,
    )
    assert not done.returncode, done.stdout[-3000:]


VARIANTS = (
    # compute capability, dtypes of query and cache, head size, then whether it decodes, is crowded,
    # is given the log-sum-exp, and has the rest: a window, ALiBi, a soft cap
    (80, "fp16", "fp8e5", 64, False, False, False, True),
    (80, "fp32", "fp32", 256, False, False, True, True),
    (90, "bf16", "bf16", 128, False, False, True, False),
    (90, "bf16", "bf16", 128, True, True, True, False),
    (90, "bf16", "fp8e4nv", 64, True, True, False, True),
    (90, "bf16", "bf16", 576, True, False, False, False),  # a latent cache: values are 512 of 576
)
OTHER_VARIANTS = (
    (80, "bf16", "bf16", 128, True, False, True, False),
    (80, "bf16", "bf16", 128, False, False, True, True),
    (90, "bf16", "bf16", 128, True, False, True, False),
    (90, "bf16", "bf16", 128, False, False, False, False),
    (90, "bf16", "bf16", 256, False, False, True, True),
    (80, "bf16", "bf16", 512, True, False, True, False),  # Gemma 4's full layers
    (90, "bf16", "bf16", 512, False, False, True, True),
)

COMPILE = """
import json
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from vllm_pasta.kernels.gpu.launch import tile
from vllm_pasta.kernels.gpu.steer import steer

POINTERS = {"records": "i32", "groups": "i32", "query_start": "i32", "seq_lens": "i32",
            "block_table": "i32", "sums": "fp32", "counters": "i32"}
GIVEN = {"lse": "fp32", "alibi_slopes": "fp32", "key_scale": "fp32", "value_scale": "fp32"}
ALIGNED = ("query", "kv_cache", "output", "records", "groups", "sums", "counters")
for variant in json.loads(sys.argv[1]):
    capability, dtype, cache, head_size, decodes, crowded, has_lse, has_rest = variant
    has_scales = cache != dtype
    pointers = {**POINTERS, "query": dtype, "output": dtype, "kv_cache": cache}
    given = {"lse": has_lse, "alibi_slopes": has_rest, "sinks": has_rest and not has_lse,
             "key_scale": has_scales, "value_scale": has_scales}
    pointers |= {name: GIVEN.get(name, dtype) for name, is_given in given.items() if is_given}
    pairs, keys, num_warps, num_stages, max_registers = tile(
        4, head_size, 4 if dtype == "fp32" else 2, decodes, crowded, has_lse)
    fixed = {
        "SCALE": 0.1, "LSE_SCALE": 1.0, "SOFT_CAP": 30.0 if has_rest else None,
        "WINDOW": 1024 if has_rest else None, "NUM_KV_HEADS": 8, "GROUP": 4, "HEAD": head_size,
        "VALUE": min(head_size, 512), "VALUE_AT": 0 if head_size > 512 else head_size,
        "BLOCK_SIZE": 16, "ALIGN": 16, "MAX_REQUESTS": 256, "ROWS": pairs, "BLOCK_M": pairs,
        "BLOCK_N": keys, "SHARE": 256, "PART_ROWS": 16384, "ALONE": 16384, "MAX_GAIN": 2.0,
        "IS_DECODE": decodes, **{name: None for name, is_given in given.items() if not is_given},
    }
    signature = {
        name: "constexpr" if name in fixed
        else f"*{pointers[name]}" if name in pointers
        else "i32"
        for name in steer.arg_names
    }
    known = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(steer.arg_names) if name in ALIGNED
    }
    compiled = triton.compile(
        ASTSource(steer, signature, fixed, known), target=GPUTarget("cuda", capability, 32),
        options={"num_warps": num_warps, "num_stages": num_stages, "maxnreg": max_registers},
    )
    assert compiled.asm["cubin"]
    print(capability, dtype, cache, head_size, "cp.async.c" in compiled.asm["ptx"],
          compiled.metadata.shared)
"""


@pytest.mark.parametrize(
    "variants", [VARIANTS, pytest.param(OTHER_VARIANTS, marks=pytest.mark.slow)], ids=len
)
def test_compiles_for_gpus(variants):
    """To machine code, by the compiler that a GPU user has; the interpreter forgives what it does
    not. The next tile is copied while one is computed; shared memory fits the smallest GPUs."""
    env = {"PYTHONPATH": str(Path(__file__).parents[2]), "HOME": str(Path.home())}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, json.dumps(variants)],
        capture_output=True, text=True, env=env, timeout=900,
    )  # fmt: skip
    assert not done.returncode, done.stderr[-3000:]
    compiled = [line.split()[-3:] for line in done.stdout.splitlines()]
    assert len(compiled) == len(variants)
    assert all(is_pipelined == "True" for _, is_pipelined, _ in compiled), done.stdout
    for head_size, _, shared in compiled:
        assert int(shared) <= (99 if int(head_size) <= 256 else 163) * 1024  # else an A100's
