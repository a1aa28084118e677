"""The interface of tasks: examples, the questions about each, and the scores of the answers."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar


@dataclass(frozen=True)
class Example:
    """One case of a data set.

    Attributes:
        key: Identifies what the example is about; equal keys always fall into the same split.
        fields: The task's own data, as plain JSON values.
    """

    key: str
    fields: Mapping[str, Any]


@dataclass(frozen=True)
class Probe:
    """One question to the model. The prompt is ``before + emphasis + after``.

    Attributes:
        name: Unique among its example's probes.
        before: The prompt before the emphasised part.
        emphasis: The emphasised part.
        after: The prompt after the emphasised part.
        target: The ideal answer, for few-shot demonstrations, likelihoods and gradients.
        foil: A wrong answer; may be empty. With ``choices``, gradients take it as the choice that
            must be less likely than ``target``; otherwise only the tokens of ``target`` that differ
            from ``foil`` count towards its likelihood.
        choices: Answers to compare by the log-probability of each one's first token. Empty means
            that an answer is generated.
        max_tokens: The longest generated answer, in tokens.
        likelihood: Whether to ask for the log-probability of ``target`` instead of an answer.
        chat: Whether to put the prompt into the model's chat template, if it has one.
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
    """The model's answer to a probe.

    Attributes:
        text: The generated answer; empty for a probe with choices or of a likelihood.
        logprobs: One log-probability for each choice. For a likelihood, a single value: the mean
            over those tokens of the target that count.
    """

    text: str = ""
    logprobs: tuple[float, ...] = ()


class Task(ABC):
    """A task: a subclass that the entry-point group ``vllm_pasta.tasks`` names.

    Attributes:
        name: The task's name on the command line.
        files: File names of the public data set; the first file that exists is read.
        columns: The metrics that tables show, each with its meaning. Proportions are from 0 to 1.
        judged: The columns whose mean is the task's score, as in the paper.
        obedience: The columns whose mean says whether the model follows what is emphasised; those
            of ``judged`` unless given.
        retained: The columns whose mean says whether it still does the rest of the task. They must
            not depend on obedience: an answer may be right and disobey. Empty where the task is
            nothing but obedience.
        objective: The metric by which heads are ranked; higher is better.
    """

    name: ClassVar[str]
    files: ClassVar[tuple[str, ...]]
    columns: ClassVar[Mapping[str, str]]
    judged: ClassVar[tuple[str, ...]]
    obedience: ClassVar[tuple[str, ...]] = ()
    retained: ClassVar[tuple[str, ...]] = ()
    objective: ClassVar[str]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "judged" in vars(cls) and "obedience" not in vars(cls):
            cls.obedience = cls.judged

    @abstractmethod
    def read(self, path: Path) -> Iterator[Example]:
        """Reads the examples of a public data set from a file in that data set's own format.

        Raises:
            KeyError, TypeError, ValueError: the file has another format.
        """

    @abstractmethod
    def make(self) -> Iterator[Example]:
        """Generates examples: finitely many, the same each time."""

    @abstractmethod
    def probes(self, example: Example) -> list[Probe]:
        """All probes of an example."""

    def ranking_probes(self, example: Example) -> list[Probe]:
        """The probes that the objective needs; ranking many heads is cheap if they are few."""
        return self.probes(example)

    @abstractmethod
    def score(self, example: Example, answers: Mapping[str, Answer]) -> dict[str, float]:
        """The metrics of one example, without those whose probes have no answer.

        Args:
            example: The example.
            answers: Probe name -> answer.
        """

    def beside_plain(
        self, example: Example, answers: Mapping[str, Answer], plain: Mapping[str, Answer]
    ) -> dict[str, float]:
        """Further metrics of one example, by the plain model's answers to it; none by default.

        They are reported where the plain model is asked, too, as `profile` always does.

        Args:
            example: The example.
            answers: Probe name -> answer.
            plain: Probe name -> the plain model's answer.
        """
        return {}
