"""Key-value retrieval from a long context; the queried pair is emphasised.

Lost in the Middle (Liu et al. 2023), whose ``kv-retrieval-*_keys.jsonl`` is read as it is.
"""

import json
import random
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar

from vllm_pasta.tasks.base import Answer, Example, Probe, Task
from vllm_pasta.tasks.data import records

MADE_PAIRS = 20
MADE_EXAMPLES = 400


class KeyValueRetrieval(Task):
    """Checks that the model finds the value of a key among many pairs."""

    name = "kv"
    files = (
        "kv_retrieval_75.jsonl", "kv-retrieval-75_keys.jsonl", "kv-retrieval-140_keys.jsonl",
        "kv-retrieval-300_keys.jsonl",
    )  # fmt: skip
    columns: ClassVar = {"Acc": "the value is in the answer"}
    judged = ("Acc",)
    objective = "Acc"

    def read(self, path: Path) -> Iterator[Example]:
        for record in records(path):
            pairs = [[str(key), str(value)] for key, value in record["ordered_kv_records"]]
            yield Example(record["key"], {"pairs": pairs, "key": record["key"]})

    def make(self) -> Iterator[Example]:
        rng = random.Random(0)
        for _ in range(MADE_EXAMPLES):
            pairs = [
                [str(uuid.UUID(int=rng.getrandbits(128), version=4)) for _ in range(2)]
                for _ in range(MADE_PAIRS)
            ]
            key = rng.choice(pairs)[0]
            yield Example(key, {"pairs": pairs, "key": key})

    def probes(self, example: Example) -> list[Probe]:
        key = example.fields["key"]
        lines = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in example.fields["pairs"]]
        at = [k for k, _ in example.fields["pairs"]].index(key)
        before = "".join(f" {line},\n" for line in lines[:at])
        after = "".join(f",\n {line}" for line in lines[at + 1 :])
        return [
            Probe(
                "answer",
                "Extract the value corresponding to the specified key in the JSON object below."
                f"\n\nJSON data:\n{{{before} ",
                lines[at],
                f"{after}}}\n\nKey: {json.dumps(key)}\nCorresponding value:",
                json.dumps(_value(example)),
            )
        ]

    def score(self, example: Example, answers: Mapping[str, Answer]) -> dict[str, float]:
        return {"Acc": float(_value(example).casefold() in answers["answer"].text.casefold())}


def _value(example: Example) -> str:
    return str(dict(example.fields["pairs"])[example.fields["key"]])
