"""Text to tokens: which occurrence, whole edge tokens, truncation, help where it is not there."""

import unicodedata
from difflib import SequenceMatcher

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_pasta import EmphasisError
from vllm_pasta.request.search import _longest_run, closest, find
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
    for text, hint in (
        ("answer in json", "the prompt has 'Answer in JSON'"),
        ("Answer in Jason", "closest is 'Answer in JSON"),
        ("Answer  in JSON", "the prompt has 'Answer in JSON'"),
    ):
        with pytest.raises(EmphasisError) as refused:
            find(prompt, text, field="emphasis.text[3]")
        assert repr(text) in str(refused.value)
        assert hint in str(refused.value)
        assert refused.value.field == "emphasis.text[3]"
    assert closest("abc", "xyz") == ""


@given(st.text(alphabet="abc ", max_size=60), st.text(alphabet="abcz", max_size=20))
def test_longest_run_is_difflibs(prompt, text):
    """Whose time is the product of the lengths, where a letter is repeated."""
    run = SequenceMatcher(None, prompt, text, autojunk=False).find_longest_match()
    found = _longest_run(prompt, text)
    assert found[2] == run.size
    assert found == (run.a, run.b, run.size) or not run.size


@pytest.mark.parametrize(
    ("prompt", "needle", "words"),
    [
        ("a" * 100_000, "a" * 300 + "b", "closest is 'aaa"),
        ("b" + "a" * 100_000, "b" + "a" * 90_000 + "c", "closest is 'baaa"),
        ("e" + "\u0301\u0316" * 50_000, "f", "is not in the prompt"),
        ("e" + "\u0301" * 100_000, "\u0301" * 50_000 + "e", "is not in the prompt"),
        ("e\u0301" * 50_000, "e\u0301" * 25_000 + "e", "more than 1000 places"),
        ("\ufdfa" * 20_000, "\ufdfa" * 10_000 + "b", "is not in the prompt"),
        ("Ann", "Ann" * 1_000_000, "it has 3000000 characters, and the prompt 3"),
    ],
    ids=range(7),
)
def test_hard_searches_end(prompt, needle, words):
    """Where the time grows with the square of a length, they take minutes."""
    with pytest.raises(EmphasisError, match=words):
        find(prompt, needle)


CAFE = "Le café, le cafe\u0301 noir; 각 한"  # the first and second é are composed differently


@pytest.mark.parametrize(
    ("needle", "occurrence", "found"),
    [
        ("café", "all", ["café", "cafe\u0301"]),
        ("cafe\u0301", "all", ["café", "cafe\u0301"]),
        ("cafe\u0301 noir", 0, ["cafe\u0301 noir"]),
        ("café noir", "last", ["cafe\u0301 noir"]),
        ("\u1100\u1161\u11a8", 0, ["각"]),
        ("a\u0323\u0302", 0, ["ậ"]),
    ],
)
def test_canonically_equivalent(needle, occurrence, found):
    """The same text to a reader, composed or not, whichever of the two the prompt has."""
    text = CAFE + " ậ"
    assert [text[a:b] for a, b in find(text, needle, occurrence)] == found


@pytest.mark.parametrize("needle", ["\u1100\u1161", "cafe\u0302"])
def test_part_of_a_character_is_not_found(needle):
    with pytest.raises(EmphasisError, match="not in the prompt"):
        find(CAFE, needle)


@given(st.text(alphabet="eé\u0301\u0323 ab각\u1100\u1161", max_size=12), st.data())
def test_every_form_of_a_part_is_found(text, data):
    """A part of the prompt in any normal form is found, and what is found is equivalent to it."""
    start = data.draw(st.integers(0, len(text)))
    stop = data.draw(st.integers(start, len(text)))
    part = text[start:stop]
    for form in ("NFC", "NFD"):
        needle = unicodedata.normalize(form, part)
        if not needle or unicodedata.combining(text[start]):
            continue  # nothing; or it begins within a character
        try:
            ranges = find(text, needle, "all")
        except EmphasisError:
            # It ends within a character, which goes on after it.
            assert stop < len(text)
            longer = unicodedata.normalize("NFC", part + text[stop])
            assert (
                unicodedata.combining(text[stop])
                or longer != unicodedata.normalize("NFC", part) + text[stop]
            )
            continue
        for a, b in ranges:
            assert unicodedata.normalize("NFC", text[a:b]) == unicodedata.normalize("NFC", part)


@pytest.mark.parametrize(
    ("prompt", "needle", "words"),
    [
        (
            "a\u00a0b",
            "a b",
            r"U\+00A0 \(no-break space\) where the text sent has U\+0020 \(space\)",
        ),
        ("say “hi”", 'say "hi"', r"character 4: it has U\+201C \(left double quotation mark\)"),
        ("a\r\nb", "a\nb", r"U\+000D \(a carriage return\) where .* U\+000A \(a line feed\)"),
        ("a\nb", "a\r\nb", r"U\+000A \(a line feed\) where .* U\+000D \(a carriage return\)"),
        ("zero\u200bwidth", "zerowidth", r"U\+200B \(zero width space\)"),
        ("1–2", "1-2", r"U\+2013 \(en dash\)"),
        ("Ｊson", "json", r"U\+FF2A \(fullwidth latin capital letter j\)"),
    ],
)
def test_looks_equal_and_is_not(prompt, needle, words):
    """The message says what differs, not the same-looking text once more."""
    with pytest.raises(EmphasisError, match=words):
        find(f"Here: {prompt}.", needle)


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
