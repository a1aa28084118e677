"""Finds marks of chat messages in the prompt that the chat template made of them.

The marked parts of the messages are wrapped in characters that occur nowhere else, the template is
run again, and the characters are looked up in what comes out. Places there become places in the
prompt by `alignment`, so a template need not make the same text twice: clocks, random ids and
counters may differ. Where a template shows only a part of a message, that part is found.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from vllm_pasta.errors import EmphasisError
from vllm_pasta.request.chat.alignment import Alignment
from vllm_pasta.request.chat.messages import Chat, Place, Placed, replaced
from vllm_pasta.request.marks import Mark
from vllm_pasta.request.markup import Range
from vllm_pasta.request.resolution import check_count, strongest
from vllm_pasta.request.search import contains, find

SENTINELS = [chr(code) for code in range(0xE000, 0xF8FF)]  # private use: no meaning of their own


def locate_messages(
    chat: Chat, marks: Sequence[Mark], prompt: str, marked: Mapping[Place, list[Placed]]
) -> list[Placed]:
    """Where in the prompt the marked parts of a conversation are.

    Args:
        chat: The conversation.
        marks: Marks with ``message`` or ``role``.
        prompt: The prompt that the template made of it.
        marked: More ranges, of the messages' texts, by markup.

    Returns:
        Ranges of ``prompt`` with their factors. What a template leaves out of the prompt is left
        out here, but a mark of which nothing is in the prompt is refused.

    Raises:
        EmphasisError: no such message; a text is not in it; nothing of it is in the prompt; the
            template gives no text; too many.
    """
    wanted: dict[Place, list[Placed]] = {at: list(placed) for at, placed in marked.items()}
    places = [_places(chat, mark) for mark in marks]
    for mark, parts in zip(marks, places, strict=True):
        for at, part in parts:
            wanted.setdefault(at, []).append((part, mark.alpha))
    texts = {(index, part): text for index, parts in enumerate(chat.texts) for part, text in parts}
    pieces = [
        _Piece(at, *_stripped(texts[at], part), alpha)
        for at, placed in sorted(wanted.items(), key=repr)
        for part, alpha in _disjoint(placed)
    ]
    check_count(len(pieces))
    search = _Search(chat, texts, prompt)
    search.run(pieces)
    hidden = [piece for piece in pieces if not piece.found]
    if hidden:  # perhaps both its ends were cut off
        words = [(piece, word) for piece in hidden for word in _words(texts, piece, len(hidden))]
        search.run([word for _, word in words])
        for piece, word in words:
            piece.found += word.found
    for mark, parts in zip(marks, places, strict=True):
        if not any(piece.shows(at, part) for at, part in parts for piece in pieces if piece.found):
            raise EmphasisError(search.why_hidden(mark, parts), field=mark.field)
    for piece in pieces:
        if not piece.found and search.differs(texts[piece.place][piece.start : piece.end]):
            raise EmphasisError(_DIFFERS.format(index=piece.place[0]), field="emphasis")
    return [(place, piece.alpha) for piece in pieces for place in _joined(piece.found, prompt)]


_DIFFERS = (
    "the chat template writes message {index} differently when something in it is marked, so it "
    "cannot be found that way; use `text`, or `chars` of the whole prompt"
)


@dataclass
class _Found:
    """Where a part of a message is in the prompt, and which characters of the message it has."""

    place: Range
    source: Range


@dataclass
class _Piece:
    """A part of a message, ``[start, end)``, to be found in the prompt."""

    place: Place
    start: int
    end: int
    alpha: float
    found: list[_Found] = field(default_factory=list)

    def shows(self, place: Place, part: Range) -> bool:
        """Whether something of ``part`` of a text was found by this piece."""
        return place == self.place and any(
            max(a, part[0]) < min(b, part[1]) for a, b in (found.source for found in self.found)
        )


class _Search:
    """Runs the template on messages with sentinels in them.

    Args:
        chat, texts: The conversation, and its texts by place.
        prompt: What the template made of it.
    """

    def __init__(self, chat: Chat, texts: Mapping[Place, str], prompt: str) -> None:
        self.chat, self.texts, self.prompt = chat, texts, prompt
        self.alignment: Alignment | None = None
        self.failure: Exception | None = None
        used = {char for text in (prompt, *texts.values()) for char in set(text)}
        self.free = [char for char in SENTINELS if char not in used]

    def run(self, pieces: Sequence[_Piece]) -> None:
        """Wraps each piece in two sentinels, and fills in where they come out."""
        opening, closing = self.free[: len(pieces)], self.free[len(pieces) : 2 * len(pieces)]
        by_place: dict[Place, list[int]] = {}
        for i, piece in enumerate(pieces):
            by_place.setdefault(piece.place, []).append(i)
        wrapped: dict[Place, str] = {}
        for at, indices in by_place.items():
            text = self.texts[at]
            for i in sorted(indices, key=lambda i: -pieces[i].start):
                a, b = pieces[i].start, pieces[i].end
                text = f"{text[:a]}{opening[i]}{text[a:b]}{closing[i]}{text[b:]}"
            wrapped[at] = text
        try:
            rendered = self.chat.render(replaced(self.chat.messages, wrapped))
        except Exception as e:  # a template may raise anything, and sees messages it did not expect
            self.failure = e
            return
        if rendered is None:
            raise EmphasisError(
                "this model's chat template gives no text, so messages cannot be found in it; "
                "use `text` or `spans`",
                field="emphasis",
            )
        number = {char: (i, True) for i, char in enumerate(opening)}
        number |= {char: (i, False) for i, char in enumerate(closing)}
        plain, events = _taken_out(rendered, number)
        self.alignment = Alignment(plain, self.prompt)
        for i, opened, closed in _seen(events):
            piece = pieces[i]
            source = self.texts[piece.place][piece.start : piece.end]
            found = self._found(source, opened, closed)
            if found is not None and source[slice(*found[1])].strip():
                place, (start, end) = found
                piece.found.append(_Found(place, (piece.start + start, piece.start + end)))

    def _found(
        self, source: str, opened: int | None, closed: int | None
    ) -> tuple[Range, Range] | None:
        """Where in the prompt the text between two sentinels is, and which part of ``source``.

        Where one of them was cut off, with what stood beside it, the text reaches as far from the
        other one as the prompt goes on like ``source``.
        """
        assert self.alignment is not None
        if opened is not None and closed is not None:
            place = self.alignment.moved(opened, closed)
            return None if place is None or opened == closed else (place, (0, len(source)))
        if opened is not None:
            if (place := self.alignment.moved(opened, opened + 1)) is None:
                return None
            start = place[0]
            length = _same(source, self.prompt[start : start + len(source)])
            return (start, start + length), (0, length)
        assert closed is not None
        if (place := self.alignment.moved(closed - 1, closed)) is None:
            return None
        end = place[1]
        length = _same(source[::-1], self.prompt[max(0, end - len(source)) : end][::-1])
        return (end - length, end), (len(source) - length, len(source))

    def differs(self, text: str) -> bool:
        """Whether a text that was not found is where the prompt differs from the other rendering:
        then the template did something else with the marked messages."""
        if self.alignment is None:
            return text in self.prompt
        return any(text in part for part in self.alignment.only_in_second())

    def why_hidden(self, mark: Mark, parts: Sequence[tuple[Place, Range]]) -> str:
        """Says why nothing of a mark was found."""
        index = parts[0][0][0]
        if any(self.differs(self.texts[at][a:b].strip()) for at, (a, b) in parts):
            return _DIFFERS.format(index=index)
        if self.failure is not None and self.alignment is None:
            return f"the chat template fails once message {index} is marked: {self.failure!r:.200}"
        what = f"message {index}" if mark.role is None else f"the messages of role {mark.role!r}"
        return (
            f"nothing of it is in the prompt: the chat template leaves this part of {what} out of "
            "what the model sees; mark another part, or leave this mark out"
        )


def _taken_out(
    text: str, number: Mapping[str, tuple[int, bool]]
) -> tuple[str, list[tuple[int, int, bool]]]:
    """Takes sentinels out of ``text``: what is left, and ``(position, piece, opens)`` of each."""
    events, length, parts, last = [], 0, [], 0
    for at, char in enumerate(text):
        if char in number:
            parts.append(text[last:at])
            length += at - last
            last = at + 1
            events.append((length, *number[char]))
    return "".join([*parts, text[last:]]), events


def _seen(
    events: Sequence[tuple[int, int, bool]],
) -> Iterator[tuple[int, int | None, int | None]]:
    """By piece, the positions of two sentinels that belong together; None for one cut off."""
    opened: dict[int, int] = {}
    for at, i, opens in events:
        if not opens:
            yield i, opened.pop(i, None), at
            continue
        if i in opened:
            yield i, opened[i], None
        opened[i] = at
    for i, at in opened.items():
        yield i, at, None


def _same(first: str, second: str) -> int:
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def _words(texts: Mapping[Place, str], piece: _Piece, share: int) -> list[_Piece]:
    """A piece as smaller ones: its words, or runs of words where there are very many.

    Args:
        texts: The conversation's, by place.
        piece: The piece.
        share: How many pieces share the sentinels.
    """
    text = texts[piece.place][piece.start : piece.end]
    words = [match.span() for match in re.finditer(r"\S+", text)]
    step = max(1, -(-len(words) * share * 2 // (len(SENTINELS) // 2)))
    return [
        _Piece(piece.place, piece.start + run[0][0], piece.start + run[-1][1], piece.alpha)
        for run in (words[i : i + step] for i in range(0, len(words), step))
    ]


def _joined(found: Sequence[_Found], prompt: str) -> list[Range]:
    """Places in the prompt, those that white space alone separates as one."""
    joined: list[Range] = []
    for start, end in sorted(item.place for item in found):
        text = prompt[start:end]
        start, end = start + len(text) - len(text.lstrip()), end - len(text) + len(text.rstrip())
        if start >= end:
            continue
        if joined and not prompt[joined[-1][1] : start].strip():
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined


def _disjoint(placed: Sequence[Placed]) -> list[Placed]:
    spans, factors = strongest(placed, 0.0)  # which is no mark's, so all are kept
    return list(zip(spans, factors or (1.0,) * len(spans), strict=True))


def _stripped(text: str, part: Range) -> Range:
    """Without white space at the edges, which templates strip."""
    inside = text[part[0] : part[1]]
    start = part[0] + len(inside) - len(inside.lstrip())
    return start, start + len(inside.strip())


def _places(chat: Chat, mark: Mark) -> list[tuple[Place, Range]]:
    """Where a mark points: a text, and a range of it."""
    texts, indices = chat.texts, chat.chosen(mark)
    if not any(texts[i] for i in indices):
        if mark.message is None:
            raise EmphasisError(f"no message of role {mark.role!r} has text", field=mark.field)
        message, why = chat.messages[indices[0]], ""
        if message.get("tool_calls"):
            why = ": it calls a tool"
        elif message.get("content"):
            why = '; give `image` for its images, a number or "all"'
        raise EmphasisError(f"message {indices[0]} has no text{why}", field=mark.field)
    if mark.text is not None and mark.message is None:
        # Of a role's messages, those that have the text are enough; if none has, the last says so.
        whole = {i: "".join(text for _, text in texts[i]) for i in indices}
        having = [i for i in indices if contains(whole[i], mark.text, mark.field)]
        indices = having or indices[-1:]
    places: list[tuple[Place, Range]] = []
    for i in indices:
        ranges = _ranges(mark, "".join(text for _, text in texts[i]), i)
        begin = 0
        for part, text in texts[i]:
            for start, end in ranges:
                a = min(max(start - begin, 0), len(text))
                b = min(max(end - begin, a), len(text))
                if text[a:b].strip():
                    places.append(((i, part), (a, b)))
            begin += len(text)
    if not places:
        raise EmphasisError("nothing but white space to emphasise", field=mark.field)
    return places


def _ranges(mark: Mark, text: str, index: int) -> list[Range]:
    if mark.text is not None:
        return find(text, mark.text, mark.occurrence, field=mark.field)
    if mark.chars is not None:
        if mark.chars[1] > len(text):
            raise EmphasisError(
                f"message {index} has {len(text)} characters, got {list(mark.chars)}",
                field=f"{mark.field}.chars",
            )
        return [mark.chars]
    return [(0, len(text))]
