"""Steering at fixed addresses. Broken by: a row that lags behind its request, a stale step."""

import numpy as np
import pytest

from vllm_pasta.kernels.gpu.launch import Workspace
from vllm_pasta.request.heads import HeadSet
from vllm_pasta.request.resolution import MAX_SPANS, ResolvedEmphasis
from vllm_pasta.steering.slots import (
    EMPHASISED,
    FIRST,
    HEADER,
    LOG_ALPHA,
    NUM_SPANS,
    PLAIN,
    SteeringBuffers,
)


def emphasis(spans=((3, 5),), heads=None, alpha=0.01, prompt_len=9):
    return ResolvedEmphasis(spans, alpha, HeadSet.from_json(heads or {"1": [0, 33]}), prompt_len)


def bits(buffers, slot, layer):
    row = buffers.rows[slot, HEADER + layer * buffers.words :][: buffers.words].numpy()
    return np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")).tolist()


def test_row():
    buffers = SteeringBuffers(4, 6, num_layers=3, num_heads=40)
    buffers.write(2, emphasis(((3, 5), (7, 8)), {"0": [39], "2": [0, 31, 32]}, 0.5, 20))
    assert not buffers.rows.any()  # the device is told by show
    assert buffers.show([0, 2, 1])
    row = buffers.rows[2]
    assert row[[FIRST, NUM_SPANS, EMPHASISED]].tolist() == [3, 2, 3]
    assert row[LOG_ALPHA].numpy().view(np.float32) == np.float32(np.log(0.5))
    assert [bits(buffers, 2, layer) for layer in range(3)] == [[39], [], [0, 31, 32]]
    assert row[buffers.bounds_offset :][:5].tolist() == [3, 5, 7, 8, 20]
    assert buffers.slots.tolist() == [PLAIN, 2, PLAIN, PLAIN, PLAIN, PLAIN]


def test_heads_of_a_rank():
    """Numbered over the whole model; a rank that has none of them steers nothing."""
    ranks = [SteeringBuffers(1, 1, 2, 4, head_offset=offset) for offset in (0, 4, 8)]
    for buffers in ranks:
        buffers.write(0, emphasis(heads={"1": [3, 4, 7]}))
    assert [buffers.show([0]) for buffers in ranks] == [True, True, False]
    assert [bits(buffers, 0, 1) for buffers in ranks[:2]] == [[3], [0, 3]]


def test_slot_is_used_again():
    """By a plain request, then by another steered one: nothing of the first is left."""
    buffers = SteeringBuffers(2, 2, 2, 4)
    buffers.write(1, emphasis(((0, 1), (2, 3)), {"0": [1], "1": [2]}))
    assert buffers.show([1])
    buffers.write(1, None)
    assert not buffers.show([1])
    assert buffers.slots.tolist() == [PLAIN, PLAIN]
    buffers.write(1, emphasis(((4, 6),), {"1": [0]}))
    assert buffers.show([0, 1])
    assert [bits(buffers, 1, layer) for layer in (0, 1)] == [[], [0]]
    assert buffers.rows[1, NUM_SPANS] == 1


def test_steps_of_other_sizes():
    """What an earlier, larger step showed is gone, and so it is before a capture."""
    buffers = SteeringBuffers(4, 4, 2, 4)
    for slot in range(4):
        buffers.write(slot, emphasis(heads={"0": [0]}))
    assert buffers.show(np.arange(4))
    assert buffers.show([3])
    assert buffers.slots.tolist() == [3, PLAIN, PLAIN, PLAIN]
    buffers.hide()
    assert buffers.slots.tolist() == [PLAIN] * 4


def test_only_what_changed_is_copied(monkeypatch):
    """A step of plain requests, or of known ones, moves no rows; one without any moves nothing."""
    buffers = SteeringBuffers(8, 8, 2, 4)
    copied = []
    staged = buffers._pinned
    monkeypatch.setattr(buffers, "_pinned", lambda t: copied.append(tuple(t.shape)) or staged(t))
    assert not buffers.show(range(8))
    assert copied == []
    buffers.write(5, emphasis(heads={"0": [0]}))
    buffers.write(5, emphasis(heads={"0": [1]}))
    assert buffers.show(range(8))
    assert copied == [(1,), (1, buffers.rows.shape[1]), (8,)]
    assert bits(buffers, 5, 0) == [1]
    copied.clear()
    assert buffers.show(range(8))
    assert copied == [(8,)]


@pytest.mark.parametrize("count", [1, MAX_SPANS])
def test_most_spans(count):
    spans = tuple((2 * i, 2 * i + 1) for i in range(count))
    buffers = SteeringBuffers(1, 1, 1, 4)
    buffers.write(0, emphasis(spans, {"0": [0]}, prompt_len=1000))
    buffers.show([0])
    shown = buffers.rows[0, buffers.bounds_offset :][: 2 * count + 1]
    assert shown.tolist() == [bound for span in spans for bound in span] + [1000]


def test_size():
    """Of a large model on a large server, with what the kernels need: below 64 MiB."""
    buffers, workspace = SteeringBuffers(1024, 1024, 80, 64), Workspace(128, "cpu")
    assert buffers.nbytes + workspace.nbytes < 64 * 2**20
