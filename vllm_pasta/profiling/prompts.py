"""Builds prompts: from a probe and a method to token ids and emphasised token ranges."""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cached_property
from pathlib import Path
from typing import Any

from vllm_pasta.errors import PastaError
from vllm_pasta.profiling.methods import SHOTS, Method
from vllm_pasta.request.resolution import Span
from vllm_pasta.request.tokens import Tokenized
from vllm_pasta.tasks import Probe, Task, sample


@dataclass(frozen=True)
class Prompt:
    """A probe as the model sees it.

    Attributes:
        ids: The prompt's token ids; for a likelihood, the target's after them.
        spans: Emphasised token ranges.
        choices: The first token of each choice; empty if an answer is generated.
        target: Token ids of the ideal answer.
        foil: Token ids of the answer that must be less likely.
        judged: Indices of the target's tokens that count towards its likelihood: those that differ
            from the foil, or all if none differs or there is no foil.
    """

    ids: list[int]
    spans: tuple[Span, ...]
    choices: list[int]
    target: list[int]
    foil: list[int]

    @cached_property
    def judged(self) -> list[int]:
        pieces = SequenceMatcher(None, self.foil, self.target, autojunk=False).get_opcodes()
        found = [i for tag, _, _, start, end in pieces if tag != "equal" for i in range(start, end)]
        return found or list(range(len(self.target)))


class Prompter:
    """Builds prompts with a model's tokenizer (a fast one of transformers)."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def build(self, probe: Probe, method: Method, shots: Sequence[Probe] = ()) -> Prompt:
        """Builds the prompt of one probe.

        Args:
            probe: The question.
            method: Its mark is put around the emphasised part, here and in demonstrations.
            shots: Probes to show before the question, each with its target.

        Raises:
            PastaError: the chat template changes the prompt's text; or an answer's tokens merge
                with the prompt's.
        """
        start = len(probe.before) + len(method.mark)
        question = _marked(probe, method.mark)
        demonstrations = [(_marked(shot, method.mark), shot.target) for shot in shots]
        chat = probe.chat and self._tokenizer.chat_template is not None
        if chat:
            text = self._chat(demonstrations, question)
        else:
            text = "".join(f"{asked} {answer}\n\n" for asked, answer in demonstrations) + question
        at = text.rfind(question)
        if at < 0:
            raise PastaError(f"the chat template changes the text of the prompt {question!r:.120}")
        encoded = self._encode(text, chat)
        ids = list(encoded["input_ids"])
        spans = Tokenized(text, encoded["offset_mapping"], (0, len(text))).tokens(
            at + start, at + start + len(probe.emphasis), "emphasis"
        )

        def answer(words: str) -> list[int]:
            if not words:
                return []
            whole = list(self._encode(text + ("" if chat else " ") + words, chat)["input_ids"])
            # If one token covers the prompt's end and the answer's beginning, comparing answers by
            # their first tokens would say nothing.
            if whole[: len(ids)] != ids or len(whole) == len(ids):
                raise PastaError(f"the tokens of {words!r} merge with those of {question[-40:]!r}")
            return whole[len(ids) :]

        target, foil = answer(probe.target), answer(probe.foil)
        if probe.likelihood:
            # Generated tokens are never scaled, so the target's are emphasised as well.
            ranges = spans, (len(ids), len(ids) + len(target))
            return Prompt(ids + target, ranges, [], target, foil)
        choices = [answer(choice)[0] for choice in probe.choices]
        return Prompt(ids, (spans,), choices, target, foil)

    def _encode(self, text: str, chat: bool) -> Any:
        # A chat template writes the special tokens itself.
        return self._tokenizer(text, return_offsets_mapping=True, add_special_tokens=not chat)

    def _chat(self, demonstrations: list[tuple[str, str]], question: str) -> str:
        turns = [
            {"role": role, "content": content}
            for shot in demonstrations
            for role, content in zip(("user", "assistant"), shot, strict=True)
        ]
        turns.append({"role": "user", "content": question})
        return str(
            self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        )


def _marked(probe: Probe, mark: str) -> str:
    return f"{probe.before}{mark}{probe.emphasis}{mark}{probe.after}"


def demonstrations(task: Task, folder: Path | None) -> list[Probe]:
    """Probes with ideal answers to show before a question: always the same of the train split.

    Args:
        task: The task.
        folder: Folder with public files, see `sample`. If the task's file has no ideal answers,
            generated examples take its place.
    """
    probes = [
        task.ranking_probes(example)[0]
        for example in sample(task, "train", SHOTS, folder=folder).examples
    ]
    return probes if all(probe.target for probe in probes) else demonstrations(task, None)
