"""Finds a text in a prompt, and says what keeps it from being found.

Texts that are canonically equivalent (an é in one or in two characters) are the same text to a
reader, so they are found. Others that look alike (no-break spaces, curly quotes, line ends) are
other tokens; a message names the difference.
"""

import unicodedata
from collections.abc import Callable, Iterator

from vllm_pasta.errors import EmphasisError
from vllm_pasta.request.marks import Occurrence
from vllm_pasta.request.resolution import check_count

_QUOTES = str.maketrans({**dict.fromkeys("‘’‚‛′`´", "'"), **dict.fromkeys("“”„‟″«»", '"')})
_DASHES = str.maketrans(dict.fromkeys("‐‑‒–—―−", "-"))

# What bounds the time that a search takes, whatever the texts are.
MOST_COMBINING = 30  # of one character; Unicode's "stream-safe text" has no more
MOST_AMISS = 1_000  # places that are equivalent, but begin or end amid a character
MOST_LOOKED_AT = 100_000  # characters in which a text that is not there is looked for


def find(
    text: str,
    needle: str,
    occurrence: Occurrence = 0,
    window: tuple[int, int] | None = None,
    field: str = "emphasis.text",
) -> list[tuple[int, int]]:
    """Character ranges of ``needle`` in ``text``; occurrences do not overlap.

    Args:
        text: Where to look.
        needle: What for, letter for letter, but for canonical equivalence.
        occurrence: Which one, from 0; or "last", or "all".
        window: Only within this range of ``text``.
        field: For the message.

    Raises:
        EmphasisError: not there (shows what differs, or where it comes closest), not as often, or
            too often.
    """
    begin, end = window or (0, len(text))
    if len(needle) > 4 * (end - begin):  # however it is composed
        raise EmphasisError(
            f"{_quote(needle)} is not in the prompt: it has {len(needle)} characters, and the "
            f"prompt {end - begin}",
            field=field,
        )
    ranges = [] if _is_stable(text, needle) else list(_equivalent(text[begin:end], needle, field))
    count = len(ranges) or text.count(needle, begin, end)
    if not count:
        raise EmphasisError(
            f"{_quote(needle)} is not in the prompt{_hint(text[begin:end], needle)}"
            ". The prompt is searched as the model sees it, after the chat template, "
            "letter for letter",
            field=field,
        )
    if isinstance(occurrence, int) and occurrence >= count:
        raise EmphasisError(
            f"{_quote(needle)} occurs {count} times, so occurrence (from 0) is at most "
            f"{count - 1}, got {occurrence}",
            field=field,
        )
    if occurrence == "all":
        check_count(count)
    last = count - 1 if isinstance(occurrence, str) else occurrence
    if ranges:
        found = [(begin + a, begin + b) for a, b in ranges[: last + 1]]
    else:
        starts = [text.find(needle, begin, end)]
        while len(starts) <= last:
            starts.append(text.find(needle, starts[-1] + len(needle), end))
        found = [(start, start + len(needle)) for start in starts]
    return found if occurrence == "all" else found[-1:]


def contains(text: str, needle: str, field: str = "emphasis.text") -> bool:
    """Whether `find` finds ``needle`` in ``text``.

    Raises:
        EmphasisError: as `find`, where the needle begins or ends amid very many characters.
    """
    return needle in text or (
        not _is_stable(text, needle) and any(_equivalent(text, needle, field))
    )


def closest(prompt: str, text: str, *, limit: int = 20_000) -> str:
    """The part of ``prompt`` most like ``text``, or an empty string.

    The longest common run fixes the place; the part has the length of ``text`` around it. Only
    the first ``limit`` characters of the prompt and 200 of the text are compared.
    """
    prompt, text = prompt[:limit], text[:200]
    at, start, size = _longest_run(prompt.casefold(), text.casefold())
    if size < min(3, len(text)):
        return ""
    begin = max(0, at - start)
    return prompt[begin : begin + len(text)].strip()


def _longest_run(prompt: str, text: str) -> tuple[int, int, int]:
    """Where the longest run that both have begins in either, the first of several, and its length.

    Every part of ``text`` that may be it is looked for, which takes time that does not depend on
    what the texts are: difflib's takes the product of their lengths where a letter is repeated.
    """
    best: list[int] = []  # where in the text the longest runs begin
    size = start = 0
    for end in range(1, len(text) + 1):
        while text[start:end] not in prompt:  # ends where the part is empty
            start += 1
        if end - start > size:
            best, size = [], end - start
        if end - start == size:
            best.append(start)
    return *min((prompt.find(text[i : i + size]), i) for i in best or [0]), size


def _is_stable(text: str, needle: str) -> bool:
    """Whether equivalent texts are equal here."""
    return all(t.isascii() or unicodedata.is_normalized("NFC", t) for t in (text, needle))


def _folded(text: str, fold: Callable[[str], str]) -> tuple[str, list[int]]:
    """``text`` folded piece by piece, and where in ``text`` each character's piece begins.

    A piece is a character and the combining ones after it, but for those beyond
    `MOST_COMBINING`, which are pieces of their own.
    """
    starts, combining = [], 0
    for i, char in enumerate(text):
        combining = combining + 1 if unicodedata.combining(char) else 0
        if not combining or not i or combining > MOST_COMBINING:
            starts.append(i)
    parts, places = [], []
    known: dict[str, str] = {}  # texts have few different pieces
    for start, end in zip(starts, [*starts[1:], len(text)], strict=True):
        piece = text[start:end]
        if (part := known.get(piece)) is None:
            part = known[piece] = fold(piece)
        parts.append(part)
        places += [start] * len(part)
    return "".join(parts), [*places, len(text)]


def _decomposed(piece: str) -> str:
    return unicodedata.normalize("NFD", piece)


def _equivalent(text: str, needle: str, field: str) -> Iterator[tuple[int, int]]:
    """Ranges of ``text`` that are canonically equivalent to ``needle``, in whole characters."""
    folded, places = _folded(text, _decomposed)
    wanted, _ = _folded(needle, _decomposed)
    amiss, at = 0, folded.find(wanted)
    while at >= 0:
        end = at + len(wanted)
        if (at == 0 or places[at] != places[at - 1]) and places[end] != places[end - 1]:
            yield places[at], places[end]
            at = folded.find(wanted, end)
            continue
        amiss += 1
        if amiss > MOST_AMISS:
            raise EmphasisError(
                f"{_quote(needle)} begins or ends amid a character, in more than {MOST_AMISS} "
                "places of the prompt: give whole characters",
                field=field,
            )
        at = folded.find(wanted, at + 1)


def _hint(text: str, needle: str) -> str:
    for fold in (_looks, lambda piece: _looks(piece).casefold()):
        if len(needle) > MOST_LOOKED_AT:
            break
        folded, places = _folded(text[:MOST_LOOKED_AT], fold)
        folded, places = _joined(folded, places)
        wanted = _joined(*_folded(needle, fold))[0].strip()
        at = folded.find(wanted) if wanted else -1
        if at >= 0:
            found = text[places[at] : places[at + len(wanted)]]
            return f"; the prompt has {_quote(found)}, which {_difference(needle.strip(), found)}"
    nearest = closest(text, needle)
    return f"; closest is {_quote(nearest)}" if nearest else ""


def _looks(piece: str) -> str:
    """What looks alike, alike: compatibility forms, quotes, dashes, white space, no zero width."""
    piece = unicodedata.normalize("NFKC", piece.translate(_QUOTES).translate(_DASHES))
    return "".join(
        " " if char.isspace() else char for char in piece if unicodedata.category(char) != "Cf"
    )


def _joined(folded: str, places: list[int]) -> tuple[str, list[int]]:
    """The same with runs of white space as one space."""
    kept = [i for i, char in enumerate(folded) if char != " " or not i or folded[i - 1] != " "]
    return "".join(folded[i] for i in kept), [*(places[i] for i in kept), places[-1]]


def _difference(needle: str, found: str) -> str:
    """How two texts that look alike differ first."""
    both = zip(needle, found, strict=False)
    at = next((i for i, (a, b) in enumerate(both) if a != b), min(len(needle), len(found)))
    ours, theirs = (_name(text[at : at + 1]) for text in (needle, found))
    return f"differs at character {at}: it has {theirs} where the text sent has {ours}"


def _name(char: str) -> str:
    if not char:
        return "nothing more"
    names = {"\n": "a line feed", "\r": "a carriage return", "\t": "a tab"}
    return f"U+{ord(char):04X} ({names.get(char) or unicodedata.name(char, 'unnamed').lower()})"


def _quote(text: str) -> str:
    return repr(text if len(text) <= 120 else f"{text[:117]}…")
