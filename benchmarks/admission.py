"""Times what admission adds to a request: where its marks lie, by the length of its prompt.

Every way of marking, on prompts of 1,000, 10,000 and 100,000 characters, beside what tokenising the
prompt takes, which vLLM does for every request. Also what a request that is refused takes, and what
is hard for the readers of markup and for the search of the nearest match. No model runs.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.throughput import describe
from vllm_pasta.cli.explain import load_chat, load_tokenizer
from vllm_pasta.errors import EmphasisError
from vllm_pasta.request.chat import Chat
from vllm_pasta.request.emphasis import Emphasis
from vllm_pasta.request.locate import Locator
from vllm_pasta.request.markup import Markup
from vllm_pasta.request.resolution import KEY

LENGTHS = (1_000, 10_000, 100_000)
SENTENCE = "The quick brown fox jumps over the lazy dog, and then it rests beside the river. "
MARK = "Answer in JSON."


def prompt(length: int, mark: str = MARK) -> str:
    """A text of about that length; the mark stands at its end."""
    return SENTENCE * max(1, (length - len(mark)) // len(SENTENCE)) + mark


def chat(length: int) -> list[dict[str, Any]]:
    """Ten messages of about that length in all; the mark ends the last one."""
    each = length // 10
    messages = [
        {"role": "user" if i % 2 == 0 else "assistant", "content": prompt(each, "")}
        for i in range(9)
    ]
    return [{"role": "system", "content": "Be brief."}, *messages[:-1],
            {"role": "user", "content": prompt(each)}]  # fmt: skip


HARD: dict[str, tuple[str, str]] = {
    "stars that never close": ("markdown", "**a " * 25_000),
    "stars one after another": ("markdown", "*" * 100_000),
    "brackets": ("markdown", "[" * 100_000),
    "backticks of every length": ("markdown", " ".join("`" * i for i in range(1, 440))),
    "quotes within quotes": ("markdown", "> " * 50_000 + "a"),
    "tags within tags": ("tag", "<emphasis>" * 5_000 + "a" + "</emphasis>" * 5_000),
    "tags that never close": ("tag", "<emphasis>" * 10_000),
    "half a tag": ("tag", "<emphasis " * 10_000),
    "stars that open nothing": ("markdown", "a** __ " * 14_000),
    "bullets, then stars on one line": ("markdown", "> " * 25_000 + "** " * 16_000),
    "lists within lists, then empty lines": ("markdown", "- " * 150 + "a" + "\n" * 99_000),
    "a tag without its partner, then white space": ("tag", "<emphasis>a<" + "\n" * 99_000),
}
"""Name -> the markup, and 100,000 characters that take its reader the longest."""


class Cases:
    """Calls that find marks, in texts of any length.

    Args:
        model: Its tokenizer is used.
    """

    def __init__(self, model: str) -> None:
        self.tokenizer = load_tokenizer(model)
        self._locator = Locator(lambda: self.tokenizer)

    def of_length(self, length: int) -> dict[str, Callable[[], Any]]:
        """Every way of marking, by name."""
        text = prompt(length)
        messages = chat(length)
        rendered = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        talk = load_chat(self.tokenizer, json.dumps(messages))
        return {
            TOKENISING: lambda: self.tokenizer(text),
            "spans": self.case({"spans": [[0, 2]]}, text),
            "characters": self.case({"chars": [[0, 9]]}, text),
            "text": self.case({"text": MARK}, text),
            "tag": self.case({"markup": "tag"}, prompt(length, f"<emphasis>{MARK}</emphasis>")),
            "markdown": self.case({"markup": "markdown"}, prompt(length, f"**{MARK}**")),
            "message of a chat": self.case(
                {"text": [{"message": -1, "text": MARK}]}, rendered, talk
            ),
            "role of a chat": self.case({"text": [{"role": "system"}]}, rendered, talk),
            REFUSED: self.case({"text": "Answer in YAML, please."}, text),
        }

    def hard(self) -> dict[str, Callable[[], Any]]:
        """What takes its reader the longest, by name."""
        text = prompt(100_000)
        near = "The quick brown fox jumps over the lazy dog " * 200
        accents = "e" + "\u0301\u0316" * 10_000
        return {
            **{name: self.case({"markup": kind}, hard) for name, (kind, hard) in HARD.items()},
            "1,200 places of one mark": self.case(
                {"text": [{"text": "fox", "occurrence": "all"}]}, text
            ),
            "a long mark that is nearly there": self.case({"text": near}, text),
            "a letter again and again": self.case({"text": "a" * 300 + "b"}, "a" * 100_000),
            "20,000 accents on one letter": self.case({"text": "e\u0301"}, accents),
        }

    def case(
        self, emphasis: dict[str, Any], text: str, talk: Chat | None = None
    ) -> Callable[[], Any]:
        """A call that reads an emphasis and finds its marks in a prompt."""
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        markup = Markup(emphasis.get("markup", "off"), "emphasis", True)

        def call() -> Any:
            parsed = Emphasis.parse({KEY: emphasis})
            assert parsed is not None
            return self._locator.locate(parsed, markup, ids, text, talk)

        return call


TOKENISING = "tokenising, which vLLM does for every request"
REFUSED = "text that is not there: refused, with the nearest match"


def milliseconds(call: Callable[[], Any], runs: int, *, refused: bool | None) -> float:
    """The median. refused: whether an `EmphasisError` must come; None if it may."""
    seconds = []
    for _ in range(runs):
        begin = time.perf_counter()
        try:
            call()
            came = False
        except EmphasisError:
            came = True
        seconds.append(time.perf_counter() - begin)
        if refused is not None and came != refused:
            raise SystemExit(f"expected it to be {'refused' if refused else 'admitted'}")
    return round(1000 * statistics.median(seconds), 3)


def run(model: str, runs: int) -> dict[str, Any]:
    """Name of the case -> length -> ms; and hard texts -> ms."""
    cases = Cases(model)
    by_length: dict[str, dict[int, float]] = {}
    for length in LENGTHS:
        for name, call in cases.of_length(length).items():
            took = milliseconds(call, runs, refused=name == REFUSED)
            by_length.setdefault(name, {})[length] = took
    hard = {name: milliseconds(call, runs, refused=None) for name, call in cases.hard().items()}
    return {"ms": by_length, "hard_ms": hard}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.admission",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", help="folder or name; default: SmolLM2-135M from its package")
    parser.add_argument("--runs", type=int, default=5, help="runs of each (default: 5)")
    parser.add_argument("--json", metavar="FILE", help="also write the figures here")
    options = parser.parse_args()
    if options.model is None:
        from vllm_pasta.cli.smollm2 import model_path

        options.model = str(model_path())
    options.dtype = None  # no model runs
    result = {**describe("admission", options), **run(options.model, options.runs)}
    print("| ms, at so many characters | " + " | ".join(f"{n:,}" for n in LENGTHS) + " |")
    print("|---|" + "---:|" * len(LENGTHS))
    for name, row in result["ms"].items():
        print(f"| {name} | " + " | ".join(f"{row[n]:g}" for n in LENGTHS) + " |")
    print("\n| hard for its reader, 100,000 characters | ms |\n|---|---:|")
    for name, value in result["hard_ms"].items():
        print(f"| {name} | {value:g} |")
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
