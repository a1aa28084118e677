"""Generates requests with verifiable instructions, and answers that fulfil them."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

from vllm_pasta.tasks.base import Example

Topic = Mapping[str, Any]
"""``about``, ``title``, ``sentences`` (four, without commas), ``words`` that are in them."""


@dataclass(frozen=True)
class _Instruction:
    """One of IFEval's instructions.

    Attributes:
        name: The instruction's id in IFEval.
        text: The instruction in words; ``{}`` stands for ``said``.
        fulfil: Turns an answer to the topic into one that fulfils the instruction.
        arguments: The checker's arguments for the topic.
        said: The text that replaces ``{}``, for the topic.
    """

    name: str
    text: str
    fulfil: Callable[[Topic, str], str] = lambda topic, answer: answer
    arguments: Callable[[Topic], dict[str, Any]] = lambda topic: {}
    said: Callable[[Topic], str] = lambda topic: ""


def _words(topic: Topic) -> str:
    return " and ".join(topic["words"])


NO_COMMA = _Instruction("punctuation:no_comma", "Do not use any commas.")
LOWERCASE = _Instruction(
    "change_case:english_lowercase", "Use lowercase letters only.", lambda _, a: a.lower()
)
CAPITALS = _Instruction(
    "change_case:english_capital", "Use capital letters only.", lambda _, a: a.upper()
)
FEW_WORDS = _Instruction(
    "length_constraints:number_words", "Use fewer than 60 words.",
    arguments=lambda _: {"num_words": 60, "relation": "less than"},
)  # fmt: skip
SENTENCES = _Instruction(
    "length_constraints:number_sentences", "Write at least 4 sentences.",
    arguments=lambda _: {"num_sentences": 4, "relation": "at least"},
)  # fmt: skip
KEYWORDS = _Instruction(
    "keywords:existence", "Use the words {}.", said=_words,
    arguments=lambda topic: {"keywords": topic["words"]},
)  # fmt: skip
FORBIDDEN = _Instruction(
    "keywords:forbidden_words", "Do not use the words very and really.",
    arguments=lambda _: {"forbidden_words": ["very", "really"]},
)  # fmt: skip
QUOTED = _Instruction(
    "startend:quotation", "Put your whole answer in double quotation marks.",
    lambda _, answer: f'"{answer}"',
)  # fmt: skip
ENDING = _Instruction(
    "startend:end_checker", "End with exactly these words: That is all I know.",
    lambda _, answer: f"{answer} That is all I know.",
    lambda _: {"end_phrase": "That is all I know."},
)  # fmt: skip
TITLE = _Instruction(
    "detectable_format:title", "Give it a title in double angular brackets, such as <<title>>.",
    lambda topic, answer: f"<<{topic['title']}>>\n\n{answer}",
)  # fmt: skip
BULLETS = _Instruction(
    "detectable_format:number_bullet_lists",
    "Write exactly 4 bullet points, each on a line that begins with a star, such as: * This.",
    lambda topic, _: "\n".join(f"* {sentence}" for sentence in topic["sentences"]),
    lambda _: {"num_bullets": 4},
)  # fmt: skip
POSTSCRIPT = _Instruction(
    "detectable_content:postscript", "Add a postscript at the end that begins with P.S.",
    lambda _, answer: f"{answer}\n\nP.S. There is more to say.",
    lambda _: {"postscript_marker": "P.S."},
)  # fmt: skip

TOGETHER = (
    (NO_COMMA,), (LOWERCASE,), (CAPITALS,), (FEW_WORDS,), (SENTENCES,), (KEYWORDS,), (FORBIDDEN,),
    (QUOTED,), (ENDING,), (TITLE,), (BULLETS,), (POSTSCRIPT,),
    (NO_COMMA, LOWERCASE), (TITLE, SENTENCES), (FEW_WORDS, QUOTED), (BULLETS, FORBIDDEN),
    (KEYWORDS, ENDING), (CAPITALS, FEW_WORDS), (NO_COMMA, KEYWORDS, POSTSCRIPT),
)  # fmt: skip
"""The instructions of one request each; ideal answers are built in this order."""


def make() -> Iterator[Example]:
    """Generates a request for every topic and every one of `TOGETHER`, with an ideal answer."""
    text = (resources.files("vllm_pasta.tasks") / "cases" / "topics.json").read_text(
        encoding="utf-8"
    )
    for topic in json.loads(text):
        for instructions in TOGETHER:
            request = f"Write a short text about {topic['about']}."
            said = " ".join(i.text.format(i.said(topic)) for i in instructions)
            answer = " ".join(topic["sentences"])
            for instruction in instructions:
                answer = instruction.fulfil(topic, answer)
            ids = [instruction.name for instruction in instructions]
            yield Example(
                f"{topic['about']}|{'|'.join(ids)}",
                {
                    "prompt": f"{request}\n\n{said}",
                    "ids": ids,
                    "kwargs": [instruction.arguments(topic) for instruction in instructions],
                    "before": f"{request}\n\n",
                    "emphasis": said,
                    "after": "",
                    "target": answer,
                },
            )
