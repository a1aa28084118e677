"""The resolved emphasis: its canonical form, its wire form, what is plain."""

import copy
import json
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_pasta import EmphasisError, HeadSet, ResolvedEmphasis
from vllm_pasta.request.resolution import MAX_SPANS, strongest, union

HEADS = HeadSet.from_json({"7": [1, 2]})
SENT = ResolvedEmphasis(((1, 3), (5, 9)), 1 / 3, HEADS, 12)
FACTORS = (0.01, 0.1, 0.5, 1.0, 1.3)

ranges = st.tuples(st.integers(0, 30), st.integers(1, 10)).map(lambda r: (r[0], r[0] + r[1]))


@given(st.lists(ranges, max_size=8))
def test_union(spans):
    """The same tokens; sorted; neither overlapping nor touching."""
    merged = union(spans)
    assert {t for a, b in merged for t in range(a, b)} == {t for a, b in spans for t in range(a, b)}
    assert all(b < c for (_, b), (c, _) in pairwise(merged))


@given(st.lists(st.tuples(ranges, st.sampled_from(FACTORS)), max_size=12), st.sampled_from(FACTORS))
def test_the_strongest_mark_of_a_token_counts(marks, alpha):
    """A weaker mark that wins; a span too many, or one of two that touch and are alike."""
    spans, factors = strongest(marks, alpha)
    expected = {}
    for (a, b), factor in marks:
        expected |= {t: max(factor, expected.get(t, 0.0)) for t in range(a, b)}
    expected = {t: factor for t, factor in expected.items() if factor != alpha}
    written = factors or (1.0,) * len(spans)
    got = {t: f for (a, b), f in zip(spans, written, strict=True) for t in range(a, b)}
    assert got == expected
    assert sum(b - a for a, b in spans) == len(got)
    assert all(
        b < c or (b == c and f != g)
        for ((_, b), f), ((c, _), g) in pairwise(zip(spans, written, strict=True))
    )
    assert factors == () or set(factors) != {1.0}


@given(st.lists(ranges, max_size=8))
def test_marks_of_full_strength_are_a_union(spans):
    """One strength is what it was before there were several."""
    assert strongest([(span, 1.0) for span in spans], 0.01) == (union(spans), ())


def test_marks_that_cut_each_other_up_are_counted():
    """More ranges than a slot on the GPU has room for."""
    nested = [((i, 1000 - i), 1.0 + i) for i in range(MAX_SPANS // 2)]
    assert len(strongest(nested, 0.01)[0]) == MAX_SPANS - 1
    with pytest.raises(EmphasisError, match="at most 256"):
        strongest([*nested, ((400, 500), 5000.0)], 0.01)


@pytest.mark.parametrize("changes", [{}, {"factors": (0.1, 0.2)}, {"share": 0.3}], ids=str)
def test_wire(changes):
    """What arrives equals what was sent, through JSON-like types alone."""
    sent = replace(SENT, **changes)
    arrived = ResolvedEmphasis.from_wire(json.loads(json.dumps(sent.to_wire())))
    assert arrived == sent
    assert arrived.digest == sent.digest
    assert copy.deepcopy(sent) == sent


def test_one_strength_is_sent_as_ever():
    """Fingerprints that differ from those of a server that knows one strength alone."""
    assert replace(SENT, factors=(1.0, 1.0)) == SENT
    assert set(SENT.to_wire()) == {"spans", "alpha", "heads", "prompt_len"}
    with pytest.raises(ValueError, match="expected 2 factors, got 1"):
        replace(SENT, factors=(0.5,))


def test_share():
    """A digest that does not tell one share from another, or from none."""
    shares = [replace(SENT, share=share) for share in (None, 0.3, 0.31)]
    for digest in ("digest", "fingerprint"):
        assert len({getattr(emphasis, digest) for emphasis in shares}) == 3
    assert shares[1].odds == pytest.approx(0.7 / 0.3)
    assert not shares[1].is_plain
    with pytest.raises(ValueError, match="no factors beside a share"):
        replace(shares[1], factors=(0.5, 1.0))


@pytest.mark.parametrize(
    ("spans", "alpha", "factors", "plain"),
    [
        ((), 0.1, (), True),
        (((0, 12),), 0.1, (), True),
        (((0, 11),), 0.1, (), False),
        (((3, 4),), 1.0, (), True),
        (((3, 4),), 1.0, (0.5,), False),
        (((0, 12),), 0.1, (0.5,), True),
        (((0, 4), (4, 12)), 0.1, (0.5, 0.4), False),
    ],
)
def test_is_plain(spans, alpha, factors, plain):
    """Plain is where no token of the prompt is emphasised over another."""
    assert ResolvedEmphasis(spans, alpha, HEADS, 12, factors).is_plain == plain
