"""Short biographies with an occupation: from BiasBios' files, a stand-in for them, or generated."""

import json
import pickle
import re
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

from vllm_pasta.tasks.base import Example
from vllm_pasta.tasks.data import records

FILES = ("BIOS.pkl", "biasbios.jsonl", "wiki_bios.jsonl")
"""The file that BiasBios' own script writes, the same records as JSON Lines, and the stand-in."""

OCCUPATIONS = (
    "accountant", "architect", "attorney", "chiropractor", "comedian", "composer", "dentist",
    "dietitian", "dj", "filmmaker", "interior designer", "journalist", "model", "nurse", "painter",
    "paralegal", "pastor", "personal trainer", "photographer", "physician", "poet", "professor",
    "psychologist", "rapper", "software engineer", "surgeon", "teacher", "yoga teacher",
)  # fmt: skip
"""The labels of BiasBios (De-Arteaga et al. 2019)."""


class _PlainUnpickler(pickle.Unpickler):
    """Reads lists, dicts, tuples, strings and numbers, and refuses whatever could run code."""

    def find_class(self, module: str, name: str) -> Any:
        raise ValueError(f"expected plain data, got {module}.{name}")


def read(path: Path) -> Iterator[Example]:
    """Reads the examples of one of `FILES`, except biographies without an occupation."""
    if path.suffix == ".pkl":
        with path.open("rb") as file:
            yield from map(_biasbios, _PlainUnpickler(file).load())
        return
    for record in records(path):
        if "completion" not in record:
            yield _biasbios(record)
        elif example := _wiki(record):
            yield example


def _biasbios(record: dict[str, Any]) -> Example:
    """From a record with ``raw`` text, a ``name`` of three parts, and an occupation ``title``."""
    name = " ".join(part for part in record["name"] if part)
    first, rest = _split(" ".join(record["raw"].split()))
    return biography(name, first, rest, record["title"].replace("_", " ").lower())


def _wiki(record: dict[str, Any]) -> Example | None:
    """From a prompt with ``Bio:`` and a completion with ``- name is`` and ``- occupation is``."""
    name = re.search(r"- name is ([^\n<]+)", record["completion"])
    occupation = re.search(r"- occupation is ([^\n<,]+)", record["completion"])
    text = record["prompt"].partition("Bio:")[2]
    if name is None or occupation is None or not text:
        return None
    first, rest = _split(_detokenised(text))
    return biography(name[1].strip(), first, rest, occupation[1].strip())


def _detokenised(text: str) -> str:
    for token, mark in (("-lrb-", "("), ("-rrb-", ")"), ("``", '"'), ("''", '"')):
        text = text.replace(token, mark)
    text = re.sub(r"\s+", " ", text).strip()
    return re.sub(r" ([.,;:)])|(\() | ('s)\b", lambda m: m[1] or m[2] or m[3], text)


def _split(text: str) -> tuple[str, str]:
    """The first sentence, and the rest."""
    match = re.match(r".{20,}?[.!?](?=\s|$)", text, re.DOTALL)
    end = match.end() if match else len(text)
    return text[:end], text[end:].strip()


def biography(name: str, first: str, rest: str, occupation: str) -> Example:
    """An example with the fields name, first (sentence), rest, occupation."""
    return Example(
        name.casefold(), {"name": name, "first": first, "rest": rest, "occupation": occupation}
    )


def make() -> Iterator[Example]:
    """Generates biographies of 960 invented people: a sentence with an occupation, three more."""
    text = (resources.files("vllm_pasta.tasks") / "cases" / "biographies.json").read_text(
        encoding="utf-8"
    )
    data = json.loads(text)
    surnames, places = data["surnames"].split(), data["places"].split()
    number = 0
    for person in data["people"]:
        words = {**person, "She": person["she"].title(), "Their": person["their"].title()}
        for name in (f"{a} {b}" for a in person["names"].split() for b in surnames):
            # Steps that share no divisor with the lists' lengths go through all combinations.
            occupation = OCCUPATIONS[number * 5 % len(OCCUPATIONS)]
            first = data["first"][number * 7 // 3 % len(data["first"])].format(
                name=name,
                occupation=occupation,
                place=places[number * 3 % len(places)],
                a="an" if occupation[0] in "aeiou" else "a",
            )
            rest = data["rest"]
            chosen = [rest[(number + 2 * i) % len(rest)].format(**words) for i in range(3)]
            yield biography(name, first, " ".join(chosen), occupation)
            number += 1
