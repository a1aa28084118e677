"""What a task is: examples, what the model is asked about each, and how its answers are scored."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar


@dataclass(frozen=True)
class Example:
    """One case of a data set.

    Attributes:
        key: What it is about; examples with the same key never stand in two splits.
        fields: What the task needs to know, as plain JSON values.
    """

    key: str
    fields: Mapping[str, Any]


@dataclass(frozen=True)
class Probe:
    """One question to the model. The prompt is ``before + emphasis + after``.

    Attributes:
        name: Unique among its example's probes.
        before: The prompt up to what is emphasised.
        emphasis: What is emphasised.
        after: The rest.
        target: The ideal answer: for few-shot demonstrations and for gradients.
        foil: A wrong answer; may be empty. Of choices, the one that must be less likely than
            ``target``, for gradients; else ``target`` is judged by those of its words that the foil
            has not.
        choices: Answers to compare by the log-probability of each one's first token. Empty means
            that an answer is generated.
        max_tokens: Longest generated answer.
        likelihood: Whether to ask for the log-probability of ``target`` instead of an answer.
        chat: Whether the prompt goes into the chat template, where the model has one.
    """

    name: str
    before: str
    emphasis: str
    after: str
    target: str
    foil: str = ""
    choices: tuple[str, ...] = ()
    max_tokens: int = 64
    likelihood: bool = False
    chat: bool = False

    @property
    def text(self) -> str:
        return self.before + self.emphasis + self.after


@dataclass(frozen=True)
class Answer:
    """What the model answered to a probe: ``text``; or ``logprobs``, one per choice.

    For a likelihood, the one of ``logprobs`` is the mean over the target's tokens that are judged.
    """

    text: str = ""
    logprobs: tuple[float, ...] = ()


class Task(ABC):
    """A task. A new one is a subclass, named in the entry-point group ``vllm_pasta.tasks``.

    Attributes:
        name: What the command line calls it.
        files: Names of the public data set's files; the first that is there is read.
        columns: The metrics that tables show, with their meaning. Proportions are within 0 to 1.
        judged: The columns whose mean is the task's score, as the paper averages.
        objective: The metric by which heads are ranked; higher is better.
    """

    name: ClassVar[str]
    files: ClassVar[tuple[str, ...]]
    columns: ClassVar[Mapping[str, str]]
    judged: ClassVar[tuple[str, ...]]
    objective: ClassVar[str]

    @abstractmethod
    def read(self, path: Path) -> Iterator[Example]:
        """The examples of a public data set's file, in its own format.

        Raises:
            KeyError, TypeError, ValueError: the file has another format.
        """

    @abstractmethod
    def make(self) -> Iterator[Example]:
        """Examples of our own making, always the same; finitely many."""

    @abstractmethod
    def probes(self, example: Example) -> list[Probe]:
        """All that is asked about an example."""

    def ranking_probes(self, example: Example) -> list[Probe]:
        """The probes that the objective needs: as few and as cheap as can be."""
        return self.probes(example)

    @abstractmethod
    def score(self, example: Example, answers: Mapping[str, Answer]) -> dict[str, float]:
        """Metrics of one example. A metric whose probes were not asked is left out."""
