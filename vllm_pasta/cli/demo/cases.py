"""The demo's prompts, and how their answers are judged.

They are of two of the paper's tasks (arXiv 2311.02262, section 4): answers in JSON, with the
instruction emphasised, and CounterFact, with the newer of two facts emphasised.
"""

import json
from dataclasses import dataclass
from importlib import resources
from itertools import islice

from vllm_pasta import envs
from vllm_pasta.errors import PastaError
from vllm_pasta.tasks.counterfact import CounterFact, prompt_parts
from vllm_pasta.tasks.data import find_file
from vllm_pasta.tasks.metrics import json_objects

TASKS = {"json": "valid JSON", "counterfact": "new fact answered"}
"""Each task, and what is counted in its answers."""


@dataclass(frozen=True)
class Case:
    """One prompt.

    Attributes:
        task: A key of ``TASKS``.
        prompt: The user's words.
        emphasis: The part of ``prompt`` to emphasise.
        new: For CounterFact, the answer according to the new fact.
        old: For CounterFact, the answer according to the old fact.
    """

    task: str
    prompt: str
    emphasis: str
    new: str = ""
    old: str = ""

    def succeeds(self, answer: str) -> bool:
        """True if ``answer`` follows the emphasised part."""
        if self.task == "json":
            return has_json(answer)
        return answers_first(answer, self.new, self.old)


@dataclass(frozen=True)
class Result:
    """A case and its two answers."""

    case: Case
    plain: str
    emphasised: str


def has_json(text: str) -> bool:
    """True if some ``{…}`` of ``text`` parses as JSON: the paper's format accuracy (F.Acc).

    An object within an unfinished one counts, as in the paper.
    """
    return next(json_objects(text), None) is not None


def answers_first(text: str, new: str, old: str) -> bool:
    """True if ``text`` has ``new``, and no ``old`` before it; letter case is ignored."""
    text, new, old = text.casefold(), new.casefold(), old.casefold()
    at_new, at_old = text.find(new), text.find(old)
    return at_new >= 0 and (at_old < 0 or at_new < at_old)


def count(results: list[Result]) -> dict[str, dict[str, int]]:
    """For each task: the number of ``cases``, and of successes ``plain`` and ``emphasised``."""
    counts = {}
    for task in dict.fromkeys(result.case.task for result in results):
        of_task = [result for result in results if result.case.task == task]
        counts[task] = {
            "cases": len(of_task),
            "plain": sum(result.case.succeeds(result.plain) for result in of_task),
            "emphasised": sum(result.case.succeeds(result.emphasised) for result in of_task),
        }
    return counts


def json_case(name: str, text: str, instruction: str) -> Case:
    """A biography, followed by the instruction, which is emphasised."""
    emphasis = instruction.format(name=name)
    return Case("json", f"{text}\n\n{emphasis}", emphasis)


def counterfact_case(prompt: str, subject: str, old: str, new: str) -> Case:
    """The old fact, the new one, which is emphasised, and a sentence to complete."""
    start = prompt.format(subject)
    before, fact, after = prompt_parts(start, old, new, start)
    return Case("counterfact", before + fact + after, fact, new, old)


def load_cases(counterfact: int | None) -> list[Case]:
    """The prompts of the demo.

    Args:
        counterfact: The number of real CounterFact cases to take from ``VLLM_PASTA_DATA``; None
            means the demo's own cases instead.

    Raises:
        PastaError: real cases are wanted, and there are none.
    """
    text = (resources.files("vllm_pasta.cli.demo") / "cases.json").read_text(encoding="utf-8")
    own = json.loads(text)
    instruction = own["json"]["instruction"]
    cases = [json_case(**case, instruction=instruction) for case in own["json"]["cases"]]
    if counterfact is None:
        return cases + [counterfact_case(**case) for case in own["counterfact"]]
    return cases + _real_counterfact(counterfact)


def _real_counterfact(count: int) -> list[Case]:
    task = CounterFact()
    folder = envs.data_dir()
    path = find_file(task, folder)
    if path is None:
        raise PastaError(
            "--cases takes real CounterFact cases from counterfact.jsonl in the folder that "
            f"VLLM_PASTA_DATA names; {f'it is not in {folder}' if folder else 'it is not set'}"
        )
    return [
        Case(
            "counterfact", probe.text, probe.emphasis, example.fields["new"], example.fields["old"]
        )
        for example in islice(task.read(path), count)
        for probe in task.ranking_probes(example)
    ]
