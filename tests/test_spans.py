"""Text to tokens: the first occurrence, whole edge tokens, help where it is not there."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_pasta import EmphasisError
from vllm_pasta.spans import closest, decoded_offsets, find_text, to_tokens


def test_first_occurrence():
    assert find_text("a cat, a cat", "cat") == (2, 5)


def test_not_there_shows_the_closest():
    """Other case, a typo, other white space: the user sees what the prompt really says."""
    prompt = "<|im_start|>user\nAnswer in JSON please.<|im_end|>"
    for text in ("answer in json", "Answer in Jason", "Answer  in JSON"):
        with pytest.raises(EmphasisError) as refused:
            find_text(prompt, text, "emphasis.text[3]")
        assert repr(text) in str(refused.value)
        assert "closest is" in str(refused.value)
        assert "nswer in J" in str(refused.value).split("closest is")[1]
        assert refused.value.field == "emphasis.text[3]"
    assert closest("abc", "xyz") == ""


def test_edge_tokens_count():
    """A token that lies partly inside is inside; special tokens (no characters) are not."""
    offsets = [(0, 0), (0, 3), (3, 4), (4, 9), (9, 9), (9, 12)]
    assert to_tokens(offsets, 3, 4) == (2, 3)
    assert to_tokens(offsets, 2, 5) == (1, 4)
    assert to_tokens(offsets, 8, 10) == (3, 6)
    with pytest.raises(EmphasisError):
        to_tokens(offsets, 12, 14)


@given(st.text(min_size=1, max_size=12).filter(lambda s: "\ufffd" not in s))
def test_offsets_of_a_byte_level_tokenizer(text):
    """Every token of a character, one byte each, has the character's range."""
    data = text.encode(errors="surrogatepass").decode(errors="ignore").encode()
    text = data.decode()
    decoded, offsets = decoded_offsets(list(data), lambda ids: bytes(ids).decode(errors="replace"))
    assert decoded == text
    expected = [(i, i + 1) for i, char in enumerate(text) for _ in char.encode()]
    assert offsets == expected
