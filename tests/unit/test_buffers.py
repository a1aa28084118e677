"""Steering at fixed addresses. Broken by: a record that lags behind its request, a stale step."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from vllm_pasta.kernels.gpu.launch import Workspace
from vllm_pasta.request.heads import HeadSet
from vllm_pasta.request.resolution import MAX_SPANS, ResolvedEmphasis
from vllm_pasta.steering.slots import (
    ADDS,
    DIRECT,
    EMPHASISED,
    END,
    FIRST,
    GROUP,
    HEADER,
    LOG_ALPHA,
    LOG_FACTOR,
    LOG_REST,
    LOG_WEIGHT,
    NUM_GROUPS,
    PLAIN,
    PROMPT_LEN,
    SEGMENT,
    SEGMENTS,
    SHARES,
    SLOT,
    START,
    SUBTRACTS,
    WAY,
    SteeringBuffers,
)


def emphasis(spans=((3, 5),), heads=None, alpha=0.01, prompt_len=9, factors=()):
    heads = HeadSet.from_json(heads or {"1": [0, 33]})
    return ResolvedEmphasis(spans, alpha, heads, prompt_len, factors)


def bits(buffers, row, layer):
    """The steered heads of a layer, in the step's record of that number."""
    words = buffers.records[row, buffers.heads_at(layer) :][: buffers.words].numpy()
    return np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist()


def segments(buffers, row):
    """Of a step's record and its slot: ``[n, SEGMENT]``."""
    record = buffers.records[row]
    further = buffers.groups[record[SLOT]][: (record[NUM_GROUPS] - 1) * GROUP * SEGMENT]
    words = np.concatenate([record[SEGMENTS:HEADER].numpy(), further.numpy()])
    return words.reshape(-1, SEGMENT)


def floats(words):
    return words.copy().view(np.float32)


def shown(buffers):
    return buffers.records[:, SLOT].tolist()


def test_record():
    buffers = SteeringBuffers(4, 6, num_layers=3, num_heads=40)
    buffers.write(2, emphasis(((3, 5), (7, 8)), {"0": [39], "2": [0, 31, 32]}, 0.5, 20))
    assert shown(buffers) == [PLAIN] * 6  # the device is told by show
    assert buffers.show([0, 2, 1])
    assert shown(buffers) == [PLAIN, 2, PLAIN, PLAIN, PLAIN, PLAIN]
    record = buffers.records[1].numpy()
    assert record[[FIRST, PROMPT_LEN, EMPHASISED, NUM_GROUPS, WAY]].tolist() == [3, 20, 3, 1, ADDS]
    assert floats(record[[LOG_ALPHA, LOG_REST]]).tolist() == [np.float32(math.log(0.5))] * 2
    assert [bits(buffers, 1, layer) for layer in range(3)] == [[39], [], [0, 31, 32]]
    # Those that fill the group are empty, and begin where generated tokens do.
    assert segments(buffers, 1).tolist() == [
        [3, 5, 0, 0], [7, 8, 0, 0], [20, 20, 0, 0], [20, 20, 0, 0],
    ]  # fmt: skip
    assert not buffers.records[0, HEADER:].any()  # a plain record has no steered head


@pytest.mark.parametrize(
    ("alpha", "factors", "way"),
    [
        (0.01, (0.3, 1.0), ADDS), (5.0, (2.0, 1.0), SUBTRACTS), (0.1, (0.01, 1.0), DIRECT),
        (1.0, (0.2, 0.3), DIRECT), (5.0, (), SUBTRACTS), (0.5, (2.0, 1.0), ADDS),
        (5.0, (7.0, 1.0), DIRECT),
    ],
)  # fmt: skip
def test_strengths(alpha, factors, way):
    """Logarithms of the factors, and of what they are above alpha."""
    buffers = SteeringBuffers(1, 1, 2, 40)
    buffers.write(0, emphasis(((1, 2), (4, 6)), alpha=alpha, factors=factors))
    buffers.show([0])
    found = segments(buffers, 0)[:2]
    assert buffers.records[0, WAY] == way
    assert found[:, [START, END]].tolist() == [[1, 2], [4, 6]]
    factors = factors or (1.0, 1.0)
    assert floats(found[:, LOG_FACTOR]) == pytest.approx(np.log(factors), abs=1e-7)
    if way != DIRECT:
        wanted = [math.log((factor - alpha) / (1 - alpha)) for factor in factors]
        assert floats(found[:, LOG_WEIGHT]) == pytest.approx(wanted, abs=1e-7)
        assert found[1, LOG_WEIGHT] == 0  # exactly, at full strength


def test_share():
    """The odds in place of what a merge with a known alpha needs; no key has a bias."""
    buffers = SteeringBuffers(1, 1, 2, 40)
    buffers.write(0, replace(emphasis(alpha=1e-4), share=0.2))
    buffers.show([0])
    record = buffers.records[0].numpy()
    assert record[WAY] == SHARES
    assert floats(record[[LOG_ALPHA, LOG_REST]]) == pytest.approx([math.log(1e-4), 4.0])
    assert not segments(buffers, 0)[:, LOG_FACTOR:].any()


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
    assert shown(buffers) == [PLAIN, PLAIN]
    buffers.write(1, emphasis(((4, 6),), {"1": [0]}))
    assert buffers.show([0, 1])
    assert [bits(buffers, 1, layer) for layer in (0, 1)] == [[], [0]]
    assert segments(buffers, 1)[:, START].tolist() == [4, 9, 9, 9]


def test_slot_changes_under_the_same_step():
    """The step's slots are those of the step before, but one has another request."""
    buffers = SteeringBuffers(2, 2, 2, 4)
    for start in (3, 5):
        buffers.write(0, emphasis(((start, 7),), {"0": [1]}))
        assert buffers.show([0])
        assert buffers.records[0, FIRST] == start


def test_steps_of_other_sizes():
    """What an earlier, larger step showed is gone, and so it is before a capture."""
    buffers = SteeringBuffers(4, 4, 2, 4)
    for slot in range(4):
        buffers.write(slot, emphasis(heads={"0": [0]}))
    assert buffers.show(np.arange(4))
    assert buffers.show([3])
    assert shown(buffers) == [3, PLAIN, PLAIN, PLAIN]
    assert not buffers.records[1:, HEADER:].any()
    buffers.hide()
    assert shown(buffers) == [PLAIN] * 4


def test_only_what_changed_is_copied(monkeypatch):
    """A step of plain requests, or of the same steered ones as before, copies nothing."""
    buffers = SteeringBuffers(8, 8, 2, 4)
    copied = []
    staged = buffers._pinned
    monkeypatch.setattr(buffers, "_pinned", lambda t: copied.append(t.shape) or staged(t))
    assert not buffers.show(range(8))
    assert copied == []
    buffers.write(5, emphasis(heads={"0": [0]}))
    buffers.write(5, emphasis(heads={"0": [1]}))
    assert buffers.show(range(8))
    assert copied == [(8, buffers.records.shape[1])]
    assert bits(buffers, 5, 0) == [1]
    assert buffers.show(range(8))
    assert len(copied) == 1
    assert buffers.show([5])
    assert len(copied) == 2


def test_step_in_flight(monkeypatch):
    """With async scheduling the device is behind: its copies of a step run when the slot has its
    next request on the host already. Broken by: a copy from what the next request is written to."""
    buffers, waiting = SteeringBuffers(3, 4, 2, 34), []
    many = tuple((i, i + 1) for i in range(0, 4 * GROUP, 2))  # more than a record holds
    copy = torch.Tensor.copy_
    with monkeypatch.context() as device:
        device.setattr(torch.Tensor, "copy_", lambda *args, **_: waiting.append(args))
        buffers.write(1, emphasis(many, prompt_len=99))
        buffers.show([1])
        steps = [waiting[:]]
        for later in (emphasis(((2, 3), *many[2:]), prompt_len=50), None):
            waiting.clear()
            buffers.write(1, later)
            buffers.show([1])
            steps.append(waiting[:])
    for step, first, prompt_len in zip(steps, (0, 2, None), (99, 50, None), strict=True):
        for args in step:
            copy(*args)
        if first is None:
            assert buffers.records[0, SLOT] == PLAIN
            continue
        assert buffers.records[0, [SLOT, FIRST, PROMPT_LEN]].tolist() == [1, first, prompt_len]
        starts = segments(buffers, 0)[:, START]
        assert starts[starts < prompt_len].tolist() == ([2] if first else [0, 2]) + list(
            range(4, 4 * GROUP, 2)
        )


@pytest.mark.parametrize("count", [1, GROUP, GROUP + 1, MAX_SPANS])
def test_most_spans(count):
    spans = tuple((2 * i, 2 * i + 1) for i in range(count))
    buffers = SteeringBuffers(1, 1, 1, 4)
    buffers.write(0, emphasis(spans, {"0": [0]}, prompt_len=1000))
    buffers.show([0])
    assert buffers.records[0, NUM_GROUPS] == -(-count // GROUP)
    found = segments(buffers, 0)
    assert [tuple(pair) for pair in found[:count, [START, END]]] == list(spans)
    assert (found[count:, [START, END]] == 1000).all()


def test_size():
    """Of a large model on a large server, with what the kernels need: below 64 MiB."""
    buffers, workspace = SteeringBuffers(1024, 1024, 80, 64), Workspace(128, "cpu")
    assert buffers.nbytes + workspace.nbytes < 64 * 2**20
