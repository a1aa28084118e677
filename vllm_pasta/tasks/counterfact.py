"""CounterFact: two facts that contradict each other in the prompt, the new one emphasised.

PASTA, section 4; data of ROME (Meng et al. 2022), whose ``counterfact.json`` is read as it is.
"""

import json
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

from vllm_pasta.tasks.base import Answer, Example, Probe, Task
from vllm_pasta.tasks.data import records
from vllm_pasta.tasks.metrics import consistency, fluency

PARAPHRASES = 2
NEIGHBOURS = 2
"""The largest numbers of an example's paraphrases and neighbours that are asked."""


class CounterFact(Task):
    """Checks that the model answers by the new fact, and for this subject alone."""

    name = "counterfact"
    files = ("counterfact.jsonl", "counterfact.json")
    columns: ClassVar = {
        "ES": "P(new) > P(old) at the first token of the answer",
        "PS": "the same where the question is paraphrased",
        "NS": "P(old) > P(new) for a question about another subject, for which old is true",
        "fluency": "entropy of the answer's bigrams and trigrams",
        "consistency": "likeness of the answer to the new fact",
    }
    judged = ("ES", "PS")
    retained = ("NS",)
    objective = "margin"

    def read(self, path: Path) -> Iterator[Example]:
        for record in records(path):
            edit = record["requested_rewrite"]
            old, new = edit["target_true"]["str"], edit["target_new"]["str"]
            # If one answer begins with the other, their first tokens do not distinguish them.
            if not old.startswith(new) and not new.startswith(old):
                yield _example(
                    edit["prompt"], edit["subject"], old, new,
                    record["paraphrase_prompts"], record["neighborhood_prompts"],
                )  # fmt: skip

    def make(self) -> Iterator[Example]:
        text = (resources.files("vllm_pasta.tasks") / "cases" / "facts.json").read_text(
            encoding="utf-8"
        )
        for relation in json.loads(text):
            subjects: Mapping[str, list[str]] = relation["subjects"]
            answers = list(subjects)
            for number, old in enumerate(answers):
                for shift, subject in enumerate(subjects[old], 1):
                    new = answers[(number + shift) % len(answers)]
                    yield _example(
                        relation["prompt"], subject, old, new,
                        [prompt.format(subject) for prompt in relation["paraphrases"]],
                        [
                            relation["prompt"].format(other)
                            for other in subjects[old]
                            if other != subject
                        ],
                    )  # fmt: skip

    def probes(self, example: Example) -> list[Probe]:
        fields = example.fields
        questions = {"efficacy": fields["question"]}
        for kind, count in (("paraphrase", PARAPHRASES), ("neighbour", NEIGHBOURS)):
            for i, question in enumerate(fields[f"{kind}s"][:count]):
                questions[f"{kind}-{i}"] = question
        asked = [_probe(fields, name, question) for name, question in questions.items()]
        return [*asked, _probe(fields, "generation", fields["question"], generate=True)]

    def ranking_probes(self, example: Example) -> list[Probe]:
        return [_probe(example.fields, "efficacy", example.fields["question"])]

    def score(self, example: Example, answers: Mapping[str, Answer]) -> dict[str, float]:
        margins: dict[str, list[float]] = {}
        for name, answer in answers.items():
            if answer.logprobs:
                new, old = answer.logprobs
                margins.setdefault(name.split("-")[0], []).append(new - old)
        scores = {}
        if "efficacy" in margins:
            scores["margin"] = margins["efficacy"][0]
            scores["ES"] = float(margins["efficacy"][0] > 0)
        if "paraphrase" in margins:
            scores["PS"] = fmean([float(margin > 0) for margin in margins["paraphrase"]])
        if "neighbour" in margins:
            scores["NS"] = fmean([float(margin < 0) for margin in margins["neighbour"]])
        if "generation" in answers:
            text = answers["generation"].text
            scores["fluency"] = fluency(text)
            scores["consistency"] = consistency(text, _fact(example.fields))
        return scores


def prompt_parts(start: str, old: str, new: str, question: str) -> tuple[str, str, str]:
    """The prompt: before the new fact, the new fact, and after."""
    return f"Previously, {start} {old}. Currently, ", f"{start} {new}", f". {question}"


def _fact(fields: Mapping[str, Any]) -> str:
    return f"{fields['question']} {fields['new']}"


def _probe(fields: Mapping[str, Any], name: str, question: str, generate: bool = False) -> Probe:
    old, new = fields["old"], fields["new"]
    before, emphasis, after = prompt_parts(fields["question"], old, new, question)
    choices = () if generate else (new, old)
    return Probe(name, before, emphasis, after, new, old, choices)


def _example(
    prompt: str, subject: str, old: str, new: str, paraphrases: list[str], neighbours: list[str]
) -> Example:
    return Example(
        f"{prompt}|{subject}",
        {
            "question": prompt.format(subject),
            "old": old,
            "new": new,
            "paraphrases": paraphrases,
            "neighbours": neighbours,
        },
    )
