"""Text to tokens: which occurrence, whole edge tokens, truncation, help where it is not there."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_pasta import EmphasisError
from vllm_pasta.request.search import closest, find
from vllm_pasta.request.tokens import Tokenized, align, decoded

CATS = "a cat, a cat, a catcat"


@pytest.mark.parametrize(
    ("occurrence", "starts"),
    [(0, [2]), (1, [9]), (3, [19]), ("last", [19]), ("all", [2, 9, 16, 19])],
)
def test_occurrence(occurrence, starts):
    assert find(CATS, "cat", occurrence) == [(start, start + 3) for start in starts]


def test_occurrences_do_not_overlap():
    assert find("aaaaa", "aa", "all") == [(0, 2), (2, 4)]


def test_too_few_occurrences():
    with pytest.raises(EmphasisError, match=r"occurs 4 times.*at most 3, got 4"):
        find(CATS, "cat", 4)


def test_window():
    """Only what truncation has left is searched."""
    assert find(CATS, "cat", 0, (5, 20)) == [(9, 12)]
    with pytest.raises(EmphasisError):
        find(CATS, "cat", 0, (3, 11))


def test_not_there_shows_the_closest():
    """Other case, a typo, other white space: the user sees what the prompt really says."""
    prompt = "<|im_start|>user\nAnswer in JSON please.<|im_end|>"
    for text in ("answer in json", "Answer in Jason", "Answer  in JSON"):
        with pytest.raises(EmphasisError) as refused:
            find(prompt, text, field="emphasis.text[3]")
        assert repr(text) in str(refused.value)
        assert "nswer in J" in str(refused.value).split("closest is")[1]
        assert refused.value.field == "emphasis.text[3]"
    assert closest("abc", "xyz") == ""


def test_edge_tokens_count():
    """A token that lies partly inside is inside; special tokens (no characters) are not."""
    offsets = [(0, 0), (0, 3), (3, 4), (4, 9), (9, 9), (9, 12)]
    tokenized = Tokenized("abcdefghijklmn", offsets, (0, 14))
    assert tokenized.tokens(3, 4, "f") == (2, 3)
    assert tokenized.tokens(2, 5, "f") == (1, 4)
    assert tokenized.tokens(8, 10, "f") == (3, 6)
    for start, end in ((12, 14), (12, 15)):
        with pytest.raises(EmphasisError):
            tokenized.tokens(start, end, "f")


OFFSETS = [(0, 0), (0, 2), (2, 4), (4, 6), (6, 8), (8, 8)]
ENCODED = [1, 11, 12, 13, 14, 2]


@pytest.mark.parametrize(
    ("ids", "offsets", "window"),
    [
        (ENCODED, OFFSETS, (0, 8)),
        ([13, 14, 2], OFFSETS[3:], (4, 8)),
        ([1, 13, 14, 2], [(0, 0), *OFFSETS[3:]], (4, 8)),
        ([1, 11, 12], OFFSETS[:3], (0, 4)),
        ([1, 11, 12, 2], [*OFFSETS[:3], (8, 8)], (0, 4)),
    ],
)
def test_truncated(ids, offsets, window):
    """Cut at the start or the end, with or without the special tokens there: never shifted."""
    tokenized = align("abcdefgh", ids, ENCODED, OFFSETS)
    assert (list(tokenized.offsets), tokenized.window) == (offsets, window)
    inside = tokenized.tokens(*window, "f")
    assert [ids[i] for i in range(*inside)] == [i for i in ids if i > 10]
    if window != (0, 8):
        with pytest.raises(EmphasisError, match="cut off"):
            tokenized.tokens(0, 8, "f")


def test_other_tokens_do_not_align():
    for ids in ([1, 11, 12, 99, 14, 2], [12, 13], [99], [], [*ENCODED, 3]):
        assert align("abcdefgh", ids, ENCODED, OFFSETS) is None


@given(st.text(min_size=1, max_size=12).filter(lambda s: "\ufffd" not in s))
def test_offsets_of_a_byte_level_tokenizer(text):
    """Every token of a character, one byte each, has the character's range."""
    data = text.encode(errors="surrogatepass").decode(errors="ignore").encode()
    text = data.decode()
    tokenized = decoded(list(data), lambda ids: bytes(ids).decode(errors="replace"))
    assert tokenized.text == text
    expected = [(i, i + 1) for i, char in enumerate(text) for _ in char.encode()]
    assert tokenized.offsets == expected
