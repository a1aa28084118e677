"""From a probe and a method to token ids and emphasised token ranges."""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cached_property
from typing import Any

from vllm_pasta.errors import PastaError
from vllm_pasta.profiling.methods import Method
from vllm_pasta.request.resolution import Span
from vllm_pasta.request.tokens import Tokenized
from vllm_pasta.tasks import Probe


@dataclass(frozen=True)
class Prompt:
    """A probe as the model sees it.

    Attributes:
        ids: The prompt's token ids; for a likelihood, the target's after them.
        spans: Emphasised token ranges.
        choices: The first token of each choice; none where an answer is generated.
        target: Token ids of the ideal answer.
        foil: Token ids of the answer that must be less likely.
        judged: Which of the target's tokens its likelihood is judged by: those that the foil has
            not, or all where it has all or is empty.
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
        """The prompt of one probe.

        Args:
            probe: What is asked.
            method: Its mark is put around what is emphasised, here and in demonstrations.
            shots: Probes to show before, each with its target.

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
            # Where a token stands for the prompt's end and the answer's beginning, comparing
            # answers by their first tokens would tell nothing.
            if whole[: len(ids)] != ids or len(whole) == len(ids):
                raise PastaError(f"the tokens of {words!r} merge with those of {question[-40:]!r}")
            return whole[len(ids) :]

        target, foil = answer(probe.target), answer(probe.foil)
        if probe.likelihood:
            # As if it had been generated: generated tokens are never scaled, nor are these.
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
