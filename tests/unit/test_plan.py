"""Packing: what a kernel is told."""

import math
from dataclasses import replace

import torch

from vllm_pasta import HeadSet, ResolvedEmphasis
from vllm_pasta.steering.plan import ENDLESS, StaticPlan, StepPlan

A = ResolvedEmphasis(((4, 6), (8, 9)), 0.5, HeadSet.from_json({"0": [1, 2], "3": [0]}), 10)
B = ResolvedEmphasis(((0, 1),), 2.0, HeadSet.from_json({"3": [5]}), 7)


def test_static():
    plan = StaticPlan.pack([(2, A), (5, B)])
    assert plan.batch_rows.tolist() == [2, 5]
    assert plan.first.tolist() == [4, 0]
    assert plan.segment_offsets.tolist() == [0, 6, 9]
    assert plan.ends.tolist() == [4, 6, 8, 9, 10, ENDLESS, 1, 7, ENDLESS]
    half, two = math.log(0.5), math.log(2.0)
    expected = torch.tensor([half, 0, half, 0, half, 0, 0, two, 0])
    assert torch.equal(plan.biases, expected)
    assert plan.merge_weights.tolist() == [0, 1, 0, 1, 0, 1, 1, 1, 1]
    assert torch.equal(plan.merge_bases, torch.tensor([half, 0]))
    heads = {layer: (h.offsets.tolist(), h.heads.tolist()) for layer, h in plan.layers.items()}
    assert heads == {0: ([0, 2, 2], [1, 2]), 3: ([0, 1, 2], [0, 5])}


def test_share():
    """No key has a bias; what a row keeps, and what its factor follows from."""
    plan = StaticPlan.pack([(2, replace(A, alpha=1e-4, share=0.2)), (5, B)])
    assert plan.odds.tolist() == [4.0, 0.0]
    assert plan.biases.tolist()[:6] == [0.0] * 6
    assert plan.merge_weights.tolist()[:6] == [0, 1, 0, 1, 0, 1]
    assert torch.equal(plan.merge_bases, torch.tensor([math.log(1e-4), 0]))


def test_heads_of_one_rank():
    """Query heads 2 to 5 of the model are this rank's 0 to 3; a layer without any is left out."""
    plan = StaticPlan.pack([(2, A), (5, B)], [range(2, 6)] * 4)
    heads = {layer: (h.offsets.tolist(), h.heads.tolist()) for layer, h in plan.layers.items()}
    assert heads == {0: ([0, 1, 1], [0]), 3: ([0, 0, 1], [3])}


def test_step():
    static = StaticPlan.pack([(0, A), (2, B)])
    query_start_loc = torch.tensor([0, 3, 4, 9], dtype=torch.int32)
    seq_lens = torch.tensor([5, 30, 5], dtype=torch.int32)
    table = torch.arange(6, dtype=torch.int32).view(3, 2)
    step = StepPlan.build(static, query_start_loc, seq_lens, table)
    assert step.query_start.tolist() == [0, 4]
    assert step.query_len.tolist() == [3, 5]
    assert step.seq_len.tolist() == [5, 5]
    assert step.block_table.tolist() == [[0, 1], [4, 5]]


def test_step_before_any_emphasised_token():
    """The first chunks of a long prompt are plain: no plan, no work."""
    static = StaticPlan.pack([(0, A)])
    loc = torch.tensor([0, 4], dtype=torch.int32)
    table = torch.zeros(1, 1, dtype=torch.int32)
    assert StepPlan.build(static, loc, torch.tensor([4], dtype=torch.int32), table) is None
    assert StepPlan.build(static, loc, torch.tensor([5], dtype=torch.int32), table) is not None


def test_whole_decode():
    """One row for each request, every request steered, every row past the first emphasised one."""
    static = StaticPlan.pack([(0, A), (1, B)])
    table = torch.zeros(3, 1, dtype=torch.int32)

    def whole(query_lens, seq_lens):
        loc = torch.tensor([0, *query_lens], dtype=torch.int32).cumsum(0).int()
        lens = torch.tensor(seq_lens, dtype=torch.int32)
        return StepPlan.build(static, loc, lens, table[: len(seq_lens)]).is_whole_decode

    assert whole([1, 1], [11, 8])
    assert not whole([2, 1], [11, 8])  # a prefill
    assert not whole([1, 1], [4, 8])  # the last row before A's first emphasised token
    assert not whole([1, 1, 1], [11, 8, 5])  # a plain request


def test_whole_layers_where_enough_is_steered():
    """A layer in which few requests have a head is steered after the plain kernel."""
    few = StaticPlan.pack([(0, A), *((i, B) for i in range(1, 8))])
    assert {layer: heads.share for layer, heads in few.layers.items()} == {0: 1 / 8, 3: 1.0}
    loc = torch.arange(9, dtype=torch.int32)
    step = StepPlan.build(few, loc, torch.full((8,), 11, dtype=torch.int32), torch.zeros(8, 1))
    assert step.is_whole_decode
    assert [step.takes_whole(few.layers[layer]) for layer in (0, 3)] == [False, True]
