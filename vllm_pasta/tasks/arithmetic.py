"""Word problems with an emphasised instruction on the form of the answer.

PASTA is known to break here: on Llama 3.1 8B the paper's settings were reported to bring a format
to 99 % and GSM8K from 82.7 to 48.1 %. The problems are made up and small, so that a small model has
something to lose.
"""

import random
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from vllm_pasta.tasks.base import Answer, Example, Probe, Task
from vllm_pasta.tasks.data import records

MADE_EXAMPLES = 600
MAX_TOKENS = 96

_NAMES = (
    "Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Iris", "Jack", "Karen",
    "Leo", "Mia", "Noah", "Olivia", "Paul",
)  # fmt: skip
_THINGS = (
    "apples",
    "books",
    "coins",
    "eggs",
    "marbles",
    "pencils",
    "stamps",
    "stickers",
    "tickets",
)

# The text, the steps, and the result of the numbers a, b, c; s is a + b.
_PROBLEMS: tuple[tuple[str, str, Callable[[int, int, int], int]], ...] = (
    ("{x} has {a} {t}. {x} buys {b} more. How many {t} does {x} have now?",
     "{a} + {b} = {r}", lambda a, b, c: a + b),
    ("{x} has {s} {t} and gives {b} of them to {y}. How many {t} does {x} have left?",
     "{s} - {b} = {r}", lambda a, b, c: a),
    ("{x} has {a} boxes with {b} {t} in each. How many {t} does {x} have?",
     "{a} * {b} = {r}", lambda a, b, c: a * b),
    ("{x} has {a} {t}. {y} has {b} {t} more than {x}. How many {t} does {y} have?",
     "{a} + {b} = {r}", lambda a, b, c: a + b),
    ("{x} has {a} {t}, finds {b} and buys {c}. How many {t} does {x} have now?",
     "{a} + {b} + {c} = {r}", lambda a, b, c: a + b + c),
    ("{x} has {a} {t}. {x} buys {b} more and gives {a} to {y}. How many {t} does {x} have left?",
     "{a} + {b} - {a} = {r}", lambda a, b, c: b),
)  # fmt: skip

INSTRUCTION = 'Begin your answer with the word "Solution:".'

_FORM = re.compile(r"\W*solution\W*:", re.IGNORECASE)
_NUMBER = re.compile(r"-?\d+")


class Arithmetic(Task):
    """Checks the form that the emphasised instruction asks for, and the result, each by itself."""

    name = "arithmetic"
    files = ("gsm8k.jsonl", "gsm8k_test.jsonl")
    columns: ClassVar = {
        "format": "the answer begins as it was told to",
        "right": "the answer's last number is the result",
        "both": "both",
    }
    judged = ("format", "right")
    obedience = ("format",)
    retained = ("right",)
    objective = "format"

    def read(self, path: Path) -> Iterator[Example]:
        """Reads GSM8K as its authors write it: ``question``, ``answer`` that ends in ``#### 5``."""
        for record in records(path):
            steps, _, result = record["answer"].rpartition("####")
            yield Example(
                record["question"],
                {
                    "problem": record["question"],
                    "steps": re.sub(r"<<.*?>>", "", steps).strip(),
                    "result": int(result.replace(",", "")),
                },
            )

    def make(self) -> Iterator[Example]:
        rng = random.Random(0)
        for number in range(MADE_EXAMPLES):
            problem, steps, result = _PROBLEMS[number % len(_PROBLEMS)]
            a, b, c = (rng.randint(2, 12) for _ in range(3))
            x, y = rng.sample(_NAMES, 2)
            words: dict[str, Any] = {
                "a": a,
                "b": b,
                "c": c,
                "s": a + b,
                "x": x,
                "y": y,
                "t": rng.choice(_THINGS),
            }
            words["r"] = result(a, b, c)
            text = problem.format(**words)
            yield Example(
                text, {"problem": text, "steps": steps.format(**words), "result": words["r"]}
            )

    def probes(self, example: Example) -> list[Probe]:
        fields = example.fields
        plain = f"{fields['steps']}. The answer is {fields['result']}."
        return [
            Probe(
                "answer",
                f"{fields['problem']}\n\n",
                INSTRUCTION,
                "",
                f"Solution: {plain}",
                foil=plain,
                max_tokens=MAX_TOKENS,
                chat=True,
            )
        ]

    def score(self, example: Example, answers: Mapping[str, Answer]) -> dict[str, float]:
        text = answers["answer"].text.replace(",", "")
        numbers = _NUMBER.findall(text)
        form = bool(_FORM.match(text))
        right = bool(numbers) and int(numbers[-1]) == example.fields["result"]
        return {"format": float(form), "right": float(right), "both": float(form and right)}
