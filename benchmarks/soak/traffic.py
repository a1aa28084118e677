"""Random requests of every kind, as clients send them, each with what the oracle must be told.

Marks are placed here, by the model's tokenizer and chat template alone: nothing of the package says
where they lie, so that a mark that the plugin finds elsewhere shows as a wrong answer.
"""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from vllm_pasta.verify.oracle import Steering

WORDS = (
    "river answer colour house seven paper garden window never often quiet stone light train "
    "market doctor yellow summer bridge letter music winter corner island method simple number"
)

ENDPOINTS = {"completion": "/v1/completions", "chat": "/v1/chat/completions"}
ALPHAS = (0.001, 0.01, 0.05, 0.3)


@dataclass
class Ask:
    """One request.

    Attributes:
        kind: For the counts, as "chat tag stream".
        path: The endpoint's.
        body: As sent.
        ids: The prompt's token ids.
        steering: What the oracle is told; None for a plain request.
        expected: HTTP status.
        leaves_after: The client vanishes after so many chunks of the stream; None if it stays.
        choices: The answers that a structured output allows; None if free. Log-probabilities are
            not compared then: vLLM's are those of the allowed tokens.
    """

    kind: str
    path: str
    body: dict[str, Any]
    ids: list[int]
    steering: Steering | None
    expected: int = 200
    leaves_after: int | None = None
    choices: list[str] | None = None


@dataclass(frozen=True)
class Size:
    """Of the served model: layers, query heads in each, and the longest context in tokens."""

    layers: int
    heads: int
    longest: int


class Traffic:
    """Makes requests, the same for the same seed.

    Args:
        tokenizer: The served model's.
        size: The served model's.
        sets: Head sets that the server knows, by name, as ``{layer: [heads]}``.
        seed: Another one gives other requests.
        models: Names that the server answers to: the model's first, then its adapters'.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        size: Size,
        sets: dict[str, dict[int, list[int]]],
        seed: int,
        models: Sequence[str] = ("m",),
    ) -> None:
        self._models = tuple(models)
        self._tokenizer, self._size, self._sets = tokenizer, size, sets
        self._rng = random.Random(seed)
        self._openings = [self._words(40) for _ in range(6)]
        self._count = 0
        self._chats: list[list[dict[str, str]]] = []

    def next(self) -> Ask:
        """The next request."""
        rng = self._rng
        self._count += 1
        kind = rng.choices(("plain", "steered", "refused"), (3, 7, 1))[0]
        if kind == "refused":
            return self._refused()
        if rng.random() < 0.35:
            return self._chat(kind == "steered")
        return self._completion(kind == "steered")

    # What is sent

    def _completion(self, is_steered: bool) -> Ask:
        before, marked, after = self._parts(self._length())
        text, range_ = before + marked + after, (len(before), len(before) + len(marked))
        if not is_steered:
            return self._ask("completion plain", "completion", {"prompt": text}, text, [], None)
        strength, told = self._strength()
        ways: dict[str, Callable[[], tuple[dict[str, Any], str]]] = {
            "text": lambda: ({"text": marked.strip()}, text),
            "occurrence": lambda: (
                {"text": {"text": marked.strip(), "occurrence": "last"}}, text
            ),
            "chars": lambda: ({"chars": [list(range_)]}, text),
            "spans": lambda: ({"spans": [list(self._tokens(text, range_))]}, text),
            "tag": lambda: (
                {"markup": "tag"}, f"{before}<emphasis>{marked}</emphasis>{after}"
            ),
        }  # fmt: skip
        way = self._rng.choice(list(ways))
        mark, sent = ways[way]()
        body = {"prompt": sent, "emphasis": {**mark, **told}}
        return self._ask(f"completion {way}", "completion", body, text, [range_], strength)

    def _chat(self, is_steered: bool) -> Ask:
        messages, marked = self._conversation()
        text = self._render(messages)
        body: dict[str, Any] = {"messages": messages}
        if not is_steered:
            return self._ask("chat plain", "chat", body, text, [], None)
        strength, told = self._strength()
        content = messages[-1]["content"]
        start = text.rindex(content) + content.index(marked)
        range_ = (start, start + len(marked))
        way = self._rng.choice(("message", "part", "role", "tag", "stars"))
        mark: dict[str, Any] = {}
        if way == "message":
            range_ = (text.rindex(content), text.rindex(content) + len(content))
            mark = {"text": [{"message": -1}]}
        elif way == "part":
            mark = {"text": [{"message": -1, "text": marked}]}
        elif way == "role":
            system = messages[0]["content"]
            range_ = (text.index(system), text.index(system) + len(system))
            mark = {"text": [{"role": "system"}]}
        else:
            opens, closes = ("<emphasis>", "</emphasis>") if way == "tag" else ("**", "**")
            written = content.replace(marked, opens + marked + closes)
            body = {"messages": [*messages[:-1], {"role": "user", "content": written}]}
            mark = {"markup": way} if way == "tag" else {"markup": way, "keep_marks": False}
        body["emphasis"] = {**mark, **told}
        return self._ask(f"chat {way}", "chat", body, text, [range_], strength)

    def _refused(self) -> Ask:
        """What must not run: HTTP 400."""
        before, marked, after = self._parts(30)
        emphasis = self._rng.choice(
            [
                {"text": f"no such words {self._count}"},
                {"spans": [[0, 100_000]]},
                {"text": marked.strip(), "alpha": -1},
                {"text": marked.strip(), "heads": "no such set"},
                {"text": marked.strip(), "heads": {str(self._size.layers): [0]}},
                {"markup": "tag", "txt": 1},
            ]
        )
        text = before + marked + after
        body = {"prompt": text, "emphasis": emphasis}
        ask = self._ask("refused", "completion", body, text, [], None)
        ask.expected, ask.leaves_after = 400, None
        return ask

    def _ask(
        self,
        kind: str,
        endpoint: str,
        body: dict[str, Any],
        text: str,
        ranges: list[tuple[int, int]],
        strength: dict[str, Any] | None,
    ) -> Ask:
        rng = self._rng
        is_chat = endpoint == "chat"
        ids = self._encode(text)
        steering = None
        if strength is not None:
            spans = [self._tokens(text, range_) for range_ in ranges]
            steering = Steering(spans, prompt_len=len(ids), **strength)
        room = self._size.longest - len(ids)
        body = {
            "model": self._rng.choices(self._models, (6, *[1] * (len(self._models) - 1)))[0],
            "max_tokens": max(1, min(room, rng.choice((1, 4, 8, 16, 32)))),
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
            "logprobs": True if is_chat else 0,
            **body,
        }
        if body["model"] != self._models[0]:
            kind = f"{kind}, LoRA"
        leaves_after = choices = None
        extra = rng.random()
        if extra < 0.25:
            body["stream"], kind = True, f"{kind}, stream"
        elif extra < 0.32:
            body.update(stream=True, max_tokens=max(1, min(room, 64)))
            leaves_after, kind = rng.randint(1, 8), f"{kind}, client leaves"
        elif extra < 0.42:
            body.update(n=2, temperature=0.8, seed=self._count)
            kind = f"{kind}, n = 2"
        elif extra < 0.5 and room > 16:
            choices = [self._words(2) for _ in range(3)]
            body.update(structured_outputs={"choice": choices}, max_tokens=min(room, 24))
            body.pop("ignore_eos")
            kind = f"{kind}, structured"
        return Ask(
            kind, ENDPOINTS[endpoint], body, ids, steering,
            leaves_after=leaves_after, choices=choices,
        )  # fmt: skip

    # What it is made of

    def _strength(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Heads and strength: as the oracle is told, and as the request says it."""
        rng = self._rng
        if self._sets and rng.random() < 0.4:
            name = rng.choice(sorted(self._sets))
            heads = self._sets[name]
            said: dict[str, Any] = {"heads": name}
        else:
            count = rng.randint(1, min(5, self._size.layers))
            layers = sorted(rng.sample(range(self._size.layers), count))
            heads = {
                layer: sorted(rng.sample(range(self._size.heads), rng.randint(1, self._size.heads)))
                for layer in layers
            }
            said = {"heads": {str(layer): some for layer, some in heads.items()}}
        if rng.random() < 0.25:
            share = rng.choice((0.2, 0.5))
            return {"heads": heads, "alpha": 1.0, "share": share}, {**said, "share": share}
        alpha = rng.choice(ALPHAS)
        return {"heads": heads, "alpha": alpha}, {**said, "alpha": alpha}

    def _length(self) -> int:
        """Words of a prompt: mostly short, some as long as the model reads."""
        rng = self._rng
        most = int(self._size.longest * 0.8)
        return rng.choices((rng.randint(1, 40), rng.randint(40, most // 2), most), (6, 3, 1))[0]

    def _parts(self, words: int) -> tuple[str, str, str]:
        """What stands before a mark, the marked words, which stand there alone, and the rest.

        One of a few openings comes first, so that prompts meet in the prefix cache.
        """
        rng = self._rng
        opening = rng.choice(self._openings) if words > 60 else ""
        before = f"{opening} {self._words(rng.randint(0, max(0, words - len(opening.split()))))}"
        marked = f" mark {self._count} {self._words(rng.randint(1, 6))}."
        return before.strip(), marked if before.strip() else marked.strip(), " So then"

    def _conversation(self) -> tuple[list[dict[str, str]], str]:
        """A chat with growing history, and words of its last message that stand there alone."""
        rng = self._rng
        if not self._chats or rng.random() < 0.3:
            system = f"Be brief, rule {self._count}: {self._words(4)}."
            self._chats.append([{"role": "system", "content": system}])
            del self._chats[:-8]
        chat = rng.choice(self._chats)
        marked = f"mark {self._count} {self._words(3)}"
        chat.append({"role": "user", "content": f"{self._words(8)} {marked} {self._words(3)}?"})
        messages = [dict(message) for message in chat]
        chat.append({"role": "assistant", "content": f"{self._words(5)}."})
        if len(self._encode(self._render(chat))) > self._size.longest // 2:
            self._chats.remove(chat)
        return messages, marked

    def _words(self, count: int) -> str:
        return " ".join(self._rng.choice(WORDS.split()) for _ in range(count))

    def _render(self, messages: list[dict[str, str]]) -> str:
        text = self._tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        assert isinstance(text, str)
        return text

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False).input_ids
        return ids

    def _tokens(self, text: str, range_: tuple[int, int]) -> tuple[int, int]:
        """The tokens that a range of characters touches."""
        offsets = self._tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True
        ).offset_mapping
        touched = [i for i, (a, b) in enumerate(offsets) if a < range_[1] and b > range_[0]]
        return touched[0], touched[-1] + 1


def dumps(body: dict[str, Any]) -> bytes:
    """A body as it is sent."""
    return json.dumps(body).encode()
