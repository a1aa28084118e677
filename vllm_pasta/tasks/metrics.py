"""Measures of generated text."""

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

MIN_FLUENCY = 3.0
"""Below this fluency an answer counts as failed (the paper drops it): an empty answer, for example,
has no pronouns."""


def json_objects(text: str) -> Iterator[dict[str, Any]]:
    """Every ``{…}`` of ``text`` that parses as JSON, also within an unfinished one."""
    decoder = json.JSONDecoder()
    for match in re.finditer(r"\{", text):
        try:
            yield decoder.raw_decode(text, match.start())[0]
        except (ValueError, RecursionError):
            continue


def contains_value(value: Any, wanted: str) -> bool:
    """True if ``wanted`` is part of a string in a JSON value; letter case is ignored."""
    if isinstance(value, dict):
        return any(contains_value(item, wanted) for item in value.values())
    if isinstance(value, list):
        return any(contains_value(item, wanted) for item in value)
    return isinstance(value, str) and wanted.casefold() in value.casefold()


def words(text: str) -> list[str]:
    """Words and punctuation marks."""
    return re.findall(r"\w+|[^\w\s]", text)


def fluency(text: str) -> float:
    """Entropy of bigrams and trigrams in bits, as ROME weighs them; low for repetitive text.

    The value is (2/3 H₂ + 4/3 H₃) / 2 (Meng et al. 2022, appendix), and 0 for text of fewer than
    two words. It grows with the text's length, so compare answers of the same length.
    """
    tokens = words(text)
    return (2 / 3 * _entropy(tokens, 2) + 4 / 3 * _entropy(tokens, 3)) / 2


def _entropy(tokens: list[str], n: int) -> float:
    counts = Counter(zip(*(tokens[i:] for i in range(n)), strict=False)).values()
    total = sum(counts)
    return -sum(count / total * math.log2(count / total) for count in counts)


def consistency(text: str, reference: str) -> float:
    """Cosine of the two texts' word counts, 0 to 1; damped, so that one word cannot fill a text.

    The paper compares tf-idf vectors. There is no corpus here to take the idf from, so words of up
    to three letters, which are common, are left out instead.
    """
    a, b = (
        {
            word: 1 + math.log(count)
            for word, count in Counter(words(part.casefold())).items()
            if len(word) > 3
        }
        for part in (text, reference)
    )
    norm = math.sqrt(sum(v * v for v in a.values()) * sum(v * v for v in b.values()))
    return sum(value * b.get(word, 0.0) for word, value in a.items()) / norm if norm else 0.0
