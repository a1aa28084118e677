"""The paper's three tasks on biographies: JSON formatting, pronoun changing, BiasBios.

PASTA, section 4 and appendix; prompts and metrics as in the reference implementation.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

from vllm_pasta.tasks import biography_data
from vllm_pasta.tasks.base import Answer, Example, Probe, Task
from vllm_pasta.tasks.metrics import MIN_FLUENCY, consistency, contains_value, fluency, json_objects

MAX_TOKENS = 128
"""As in the reference implementation: a JSON object that begins late is still closed."""
RANKING_TOKENS = 64
"""Shorter answers rank heads as well, and there are many heads to ask about."""


class _Biographies(Task):
    """The examples, and the length of answers, that all three tasks share."""

    files = biography_data.FILES

    def read(self, path: Path) -> Iterator[Example]:
        return biography_data.read(path)

    def make(self) -> Iterator[Example]:
        return biography_data.make()

    def ranking_probes(self, example: Example) -> list[Probe]:
        return [replace(probe, max_tokens=RANKING_TOKENS) for probe in self.probes(example)]


def _text(fields: Mapping[str, Any]) -> str:
    return f"{fields['first']} {fields['rest']}".strip()


def _of_text(fields: Mapping[str, Any], answer: str) -> dict[str, float]:
    return {"fluency": fluency(answer), "consistency": consistency(answer, _text(fields))}


_OF_TEXT = {
    "fluency": "entropy of the answer's bigrams and trigrams",
    "consistency": "likeness of the answer to the biography",
}


class JsonFormatting(_Biographies):
    """Checks that the answer is JSON, as the emphasised instruction says."""

    name = "json"
    columns: ClassVar = {
        "F.Acc": "some {…} of the answer parses as JSON",
        "P.Acc": "and the occupation is part of some value",
        "right": "the occupation is somewhere in the answer, JSON or not",
        **_OF_TEXT,
    }
    judged = ("F.Acc", "P.Acc")
    obedience = ("F.Acc",)
    retained = ("right",)
    objective = "F.Acc+P.Acc"

    def probes(self, example: Example) -> list[Probe]:
        name, occupation = example.fields["name"], example.fields["occupation"]
        instruction = (
            f"Answer the occupation of {name} and generate the answer as json format. Here is an "
            'example: {"name": , "occupation": ,}. Now generate the answer.'
        )
        target = json.dumps({"name": name, "occupation": occupation}, ensure_ascii=False)
        before = f"{_text(example.fields)}\n\n"
        return [Probe("answer", before, instruction, "", target, max_tokens=MAX_TOKENS, chat=True)]

    def score(self, example: Example, answers: Mapping[str, Answer]) -> dict[str, float]:
        text = answers["answer"].text
        objects = list(json_objects(text))
        valid = float(bool(objects))
        right = float(any(contains_value(o, example.fields["occupation"]) for o in objects))
        return {
            "F.Acc": valid,
            "P.Acc": right,
            "F.Acc+P.Acc": fmean([valid, right]),
            "right": float(example.fields["occupation"].casefold() in text.casefold()),
            **_of_text(example.fields, text),
        }


class PronounChanging(_Biographies):
    """Checks that the answer has no gendered pronouns, as the emphasised instruction says."""

    name = "pronouns"
    columns: ClassVar = {
        "Acc": f"no he or she is left; 0 where fluency is below {MIN_FLUENCY:g}",
        "A.Acc": "no gendered pronoun at all is left; the same",
        **_OF_TEXT,
    }
    judged = ("Acc", "A.Acc")
    retained = ("consistency",)
    objective = "A.Acc"

    def read(self, path: Path) -> Iterator[Example]:
        return filter(_has_pronouns, super().read(path))

    def probes(self, example: Example) -> list[Probe]:
        text, name = _text(example.fields), example.fields["name"]
        instruction = (
            "For the aforementioned text, substitute 'she' and 'he' with 'they' and generate the "
            f"occupation of {name} after changing pronouns:"
        )
        target = _THEY.sub(lambda match: _they(match[0]), text)
        return [
            Probe(
                "answer",
                f"{text}\n\n",
                instruction,
                "",
                target,
                foil=text,
                max_tokens=MAX_TOKENS,
                chat=True,
            )
        ]

    def score(self, example: Example, answers: Mapping[str, Answer]) -> dict[str, float]:
        text = answers["answer"].text
        measures = _of_text(example.fields, text)
        fluent = measures["fluency"] >= MIN_FLUENCY
        return {
            "Acc": float(fluent and not _SUBJECTS.search(text)),
            "A.Acc": float(fluent and not _THEY.search(text)),
            **measures,
        }


_SUBJECTS = re.compile(r"\b(he|she)\b", re.IGNORECASE)
_PLURAL = {
    "he": "they", "she": "they", "him": "them", "her": "their", "his": "their", "hers": "theirs",
    "himself": "themselves", "herself": "themselves",
}  # fmt: skip
_THEY = re.compile(rf"\b({'|'.join(_PLURAL)})\b", re.IGNORECASE)


def _they(pronoun: str) -> str:
    plural = _PLURAL[pronoun.lower()]
    return plural.title() if pronoun[0].isupper() else plural


def _has_pronouns(example: Example) -> bool:
    return bool(_SUBJECTS.search(_text(example.fields)))


class BiasBios(_Biographies):
    """Checks that the model names a person's occupation; the first sentence is emphasised."""

    name = "biasbios"
    columns: ClassVar = {"Acc": "of the 28 labels' first tokens, the right one is the most likely"}
    judged = ("Acc",)
    objective = "margin"

    def read(self, path: Path) -> Iterator[Example]:
        for example in super().read(path):
            if label := _label(example.fields["occupation"]):
                yield Example(example.key, {**example.fields, "occupation": label})

    def probes(self, example: Example) -> list[Probe]:
        fields = example.fields
        after = f" {fields['rest']} {fields['name']} has the occupation of"
        return [
            Probe(
                "label", "", fields["first"], after, fields["occupation"],
                choices=biography_data.OCCUPATIONS,
            )
        ]  # fmt: skip

    def score(self, example: Example, answers: Mapping[str, Answer]) -> dict[str, float]:
        of_label = dict(zip(biography_data.OCCUPATIONS, answers["label"].logprobs, strict=True))
        right = of_label.pop(example.fields["occupation"])
        # Labels that begin with the same token have the same score and do not compete.
        margin = right - max(value for value in of_label.values() if value != right)
        return {"Acc": float(margin > 0), "margin": margin}


def _label(occupation: str) -> str | None:
    """The label that an occupation in free words begins or ends with, e.g. "film actress"."""
    text = occupation.casefold()
    labels = biography_data.OCCUPATIONS
    return next((label for label in labels if text == label or text.endswith(f" {label}")), None)
