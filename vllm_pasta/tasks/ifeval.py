"""IFEval: a program checks that answers fulfil instructions, and the instructions are emphasised.

Zhou et al. 2023, arXiv 2311.07911. The checkers are IFEval's own, from the package
``if-verifiable``: ``pip install vllm-pasta[ifeval]``.
"""

import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

from vllm_pasta import envs
from vllm_pasta.errors import PastaError
from vllm_pasta.tasks import ifeval_data
from vllm_pasta.tasks.base import Answer, Example, Probe, Task
from vllm_pasta.tasks.data import records
from vllm_pasta.tasks.metrics import MIN_FLUENCY, consistency, fluency

MAX_TOKENS = 512
"""Enough for 300 words, which many instructions ask for; the few that ask for more must fail."""

SHORT = "detectable_format:constrained_response"
"""The one instruction that an answer of a few words fulfils."""


class IfEval(Task):
    """Checks that the answer fulfils verifiable instructions."""

    name = "ifeval"
    files = ("ifeval_separated.jsonl", "ifeval_input_data.jsonl", "input_data.jsonl")
    columns: ClassVar = {
        "prompt": f"all instructions are followed; 0 where fluency is below {MIN_FLUENCY:g}",
        "instruction": "share of a prompt's instructions that are followed; the same",
        "prompt, loose": "all are, or would be without first or last line, or stars; the same",
        "instruction, loose": "share of those; the same",
        "fluency": "entropy of the answer's bigrams and trigrams",
        "consistency": "likeness of the answer to the plain model's",
    }
    judged = ("prompt", "instruction")
    retained = ("consistency",)
    objective = "instruction"

    def __init__(self) -> None:
        """Checks that IFEval's checkers are installed, before answers are generated in vain.

        Raises:
            PastaError: a package is missing.
        """
        missing = [name for name in ("if_verifiable", "punkt") if find_spec(name) is None]
        if missing:
            raise PastaError(
                f"task ifeval: needs {' and '.join(missing)}: pip install vllm-pasta[ifeval]"
            )

    def read(self, path: Path) -> Iterator[Example]:
        """Reads IFEval's records, or SystemCheck's, in which the instructions are a message."""
        for record in records(path):
            ids, kwargs = record["instruction_id_list"], record["kwargs"]
            if "messages" in record:
                emphasis, request = (message["content"] for message in record["messages"])
                before, after = f"{request}\n\n", ""
            else:
                before, emphasis, after = _located(record["prompt"], ids, kwargs)
            yield Example(
                str(record["key"]),
                {
                    "prompt": record["prompt"], "ids": ids, "kwargs": kwargs, "target": "",
                    "before": before, "emphasis": emphasis, "after": after,
                },
            )  # fmt: skip

    def make(self) -> Iterator[Example]:
        return ifeval_data.make()

    def probes(self, example: Example) -> list[Probe]:
        before, emphasis, after, target = (
            example.fields[name] for name in ("before", "emphasis", "after", "target")
        )
        return [Probe("answer", before, emphasis, after, target, max_tokens=MAX_TOKENS, chat=True)]

    def score(self, example: Example, answers: Mapping[str, Answer]) -> dict[str, float]:
        text, fields = answers["answer"].text, example.fields
        measure = fluency(text)
        passes = measure >= MIN_FLUENCY or SHORT in fields["ids"]
        evaluate, registry = _checkers()
        _, scores = evaluate(text, fields["ids"], fields["kwargs"], fields["prompt"], registry)
        return {
            "prompt": passes * scores.binary_strict,
            "instruction": passes * scores.partial_strict,
            "prompt, loose": passes * scores.binary_loose,
            "instruction, loose": passes * scores.partial_loose,
            "fluency": measure,
        }

    def beside_plain(
        self, example: Example, answers: Mapping[str, Answer], plain: Mapping[str, Answer]
    ) -> dict[str, float]:
        return {"consistency": consistency(answers["answer"].text, plain["answer"].text)}


@cache
def _checkers() -> tuple[Any, dict[str, Any]]:
    """The function that evaluates an answer, and the checkers' classes by instruction id."""
    _provide_sentence_model()
    import langdetect
    from if_verifiable.common import evaluate_instructions
    from if_verifiable.ifeval.instructions_registry import INSTRUCTION_DICT

    langdetect.DetectorFactory.seed = 0  # the language of a short text is random otherwise
    return evaluate_instructions, INSTRUCTION_DICT


def _provide_sentence_model() -> None:
    """Gives NLTK its English sentence model from a package; NLTK would download it."""
    import nltk
    from nltk.tokenize.punkt import PunktParameters, save_punkt_params
    from punkt import load_model

    root = envs.cache_dir() / "nltk_data"
    if str(root) not in nltk.data.path:
        nltk.data.path.append(str(root))  # the last: the user's own comes first
    folder = root / "tokenizers" / "punkt_tab" / "english"
    if folder.is_dir():
        return
    packaged, parameters = load_model("english"), PunktParameters()
    for name in ("abbrev_types", "collocations", "sent_starters"):
        setattr(parameters, name, set(getattr(packaged, name)))
    parameters.ortho_context.update(packaged.ortho_context)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        save_punkt_params(parameters, f"{scratch}/english")
        with suppress(OSError):  # another process was quicker
            os.rename(f"{scratch}/english", folder)


def _located(prompt: str, ids: list[str], kwargs: list[dict[str, Any]]) -> tuple[str, str, str]:
    """Splits a prompt: before its instructions, the instructions, after them.

    IFEval does not say where its instructions stand. For each one, this takes the sentence that is
    most like the checker's description; the emphasis reaches from the first such sentence to the
    end of the last.
    """
    _, registry = _checkers()
    sentences = list(re.finditer(r"\S.*?(?:[.!?][\"')\]]*(?=\s)|\n|$)", prompt, re.DOTALL))
    found = []
    for name, arguments in zip(ids, kwargs, strict=True):
        given = {key: value for key, value in arguments.items() if value is not None}
        description = registry[name](name).build_description(**given)
        found.append(max(sentences, key=lambda match: consistency(match[0], description)))
    start, end = min(m.start() for m in found), max(m.end() for m in found)
    emphasis = prompt[start:end].rstrip()
    return prompt[:start], emphasis, prompt[start + len(emphasis) :]
