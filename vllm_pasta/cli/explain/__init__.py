"""``vllm-pasta explain``: shows what a request would emphasise, without running a model."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any, TextIO

from vllm_pasta.cli import terminal
from vllm_pasta.errors import EmphasisError, PastaError
from vllm_pasta.profiling.report import html
from vllm_pasta.request.chat import Chat
from vllm_pasta.request.emphasis import Emphasis
from vllm_pasta.request.head_sets.library import bundled
from vllm_pasta.request.heads import DEFAULT_ALPHA, HeadSet
from vllm_pasta.request.locate import Located, Locator
from vllm_pasta.request.markup import Markup
from vllm_pasta.request.resolution import KEY, check_share
from vllm_pasta.request.tokens import decoded

HELP = "which tokens an emphasis marks, without running a model"
DESCRIPTION = (
    "Shows which tokens of a prompt an emphasis marks, as a server would resolve it. Needs the "
    "model's tokenizer, not its weights."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``vllm-pasta explain``."""
    parser.add_argument("--model", required=True, help="folder or name with the tokenizer")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", help="the prompt; @FILE reads it from a file")
    what.add_argument("--messages", help="chat messages as JSON; @FILE reads them from a file")
    parser.add_argument(
        "--emphasis", default='{"markup": "tag"}',
        help="the part to emphasise: its text, or JSON as in a request (default: the tags in the "
        "prompt)",
    )  # fmt: skip
    parser.add_argument("--tag", default="emphasis", help="name of the markup tag (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print token ranges as JSON")
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="also write a page that shows every token"
    )


def run(args: argparse.Namespace) -> int:
    """Prints the prompt with the emphasised tokens coloured, or as JSON."""
    tokenizer = load_tokenizer(args.model)
    emphasis = Emphasis.parse({KEY: _emphasis(args.emphasis)})
    if emphasis is None or emphasis.is_off:
        raise PastaError("--emphasis: expected something to emphasise, got null")
    if any(mark.image is not None for mark in emphasis.marks):
        raise PastaError(
            "--emphasis: only an engine knows which tokens stand for an image; ask a server: "
            "POST /v1/emphasis/resolve"
        )
    chat = None
    if args.messages is not None:
        chat = load_chat(tokenizer, _read(args.messages))
        try:
            text = chat.render([dict(message) for message in chat.messages])
        except Exception as e:  # a template may raise anything
            raise PastaError(f"--messages: the chat template fails: {e}") from e
        assert text is not None
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        text = _read(args.prompt)
        ids = tokenizer(text)["input_ids"]
    markup = Markup(emphasis.markup or "off", args.tag, emphasis.keep_marks in (None, True))
    located = Locator(lambda: tokenizer).locate(emphasis, markup, ids, text, chat)
    alpha, alpha_from = strength(emphasis)
    if emphasis.share is not None:
        check_share(emphasis.share, "request", located.factors)
    if args.html:
        write_html(args.html, tokenizer, located, args.model)
    if args.json:
        report = to_json(tokenizer, located)
        if emphasis.share is None:
            report |= {"alpha": alpha, "alpha_from": alpha_from}
        else:
            report |= {"share": emphasis.share, "share_from": "request"}
        print(json.dumps(report, ensure_ascii=False, indent=1))
    else:
        show(tokenizer, located, sys.stdout)
        if emphasis.share is not None:
            print(f"share {emphasis.share:g}, from the request")
        elif alpha is not None:
            unless = ", unless the server has its own" if alpha_from == "head set" else ""
            print(f"α {alpha:g}, from the {alpha_from}{unless}")
    return 0


def strength(emphasis: Emphasis) -> tuple[float | None, str]:
    """The factor of unmarked tokens as far as the request alone tells, and who gives it.

    Returns:
        The factor and "request" or "head set"; or None and who would give it: "server, else the
        head set, else 0.01".
    """
    heads = emphasis.heads
    known = heads if isinstance(heads, HeadSet) else bundled().get(heads or "")
    if emphasis.alpha is not None:
        return emphasis.alpha, "request"
    if known is not None and known.alpha is not None:
        return known.alpha, "head set"
    return None, f"server, else the head set, else {DEFAULT_ALPHA}"


def to_json(tokenizer: Any, located: Located) -> dict[str, Any]:
    """The prompt's size and each emphasised range with its tokens, as JSON values."""
    ids = located.token_ids
    seen = decoded(ids, tokenizer.decode)
    return {
        "prompt_tokens": len(ids),
        "emphasised_tokens": sum(end - start for start, end in located.spans),
        "emphasised": [
            {
                "tokens": [start, end],
                "text": seen.text[seen.offsets[start][0] : seen.offsets[end - 1][1]],
                "pieces": [tokenizer.decode([i]) for i in ids[start:end]],
                **({} if alpha == 1.0 else {"alpha": alpha}),
            }
            for (start, end), alpha in located.strengths
        ],
    }


def show(tokenizer: Any, located: Located, stream: TextIO) -> None:
    """Prints, for people, the prompt as the model sees it; the emphasised tokens stand out."""
    # Decoded as one text: pieces by themselves may lose spaces, or parts of a character.
    seen = decoded(located.token_ids, tokenizer.decode)
    parts, position = [], 0
    for start, end in located.spans:
        a, b = seen.offsets[start][0], seen.offsets[end - 1][1]
        parts += [(seen.text[position:a], False), (seen.text[a:b], True)]
        position = b
    parts.append((seen.text[position:], False))
    count = sum(end - start for start, end in located.spans)
    where = (
        ", ".join(
            f"[{start}, {end})" + ("" if alpha == 1.0 else f" at {alpha:g}")
            for (start, end), alpha in located.strengths
        )
        or "none"
    )
    console = terminal.console(stream)
    console.print(terminal.marked(parts, terminal.coloured(stream)), soft_wrap=True)
    console.print(
        f"\n{count} of {len(located.token_ids)} tokens emphasised: {where}",
        style="dim",
        soft_wrap=True,
    )


def write_html(path: Path, tokenizer: Any, located: Located, model: str) -> None:
    """Writes a page that shows each token of the prompt, and each emphasised range.

    Raises:
        PastaError: the file cannot be written.
    """
    told = to_json(tokenizer, located)
    seen = decoded(located.token_ids, tokenizer.decode)
    factors = {i: alpha for (start, end), alpha in located.strengths for i in range(start, end)}
    pieces, position = [], 0
    for i, (_, end) in enumerate(seen.offsets):  # tokens that make up a character share it
        pieces.append((seen.text[position:end], factors.get(i)))
        position = max(position, end)
    ranges = [
        [f"[{at['tokens'][0]}, {at['tokens'][1]})", f"{at.get('alpha', 1):g}", at["text"]]
        for at in told["emphasised"]
    ]
    intro = (
        f"{told['emphasised_tokens']} of {told['prompt_tokens']} tokens are emphasised, as "
        f"{model} tokenises them. A token that lies only partly in a mark counts as a whole."
    )
    parts: list[html.Part] = [html.Prompt("The prompt, token by token", pieces)]
    if ranges:
        parts.append(html.Table("Where", [["tokens", "strength", "text"], *ranges]))
    try:
        html.write(path, "What an emphasis marks", intro, parts)
    except OSError as e:
        raise PastaError(f"--html {path}: cannot be written: {e.strerror}") from e


def load_tokenizer(model: str) -> Any:
    """The model's tokenizer, loaded by transformers.

    Raises:
        PastaError: the model has none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as e:
        raise PastaError(f"--model {model}: no tokenizer there: {str(e).splitlines()[0]}") from e


def _emphasis(value: str) -> Any:
    try:
        return json.loads(value)
    except ValueError:
        return value


def load_chat(tokenizer: Any, text: str) -> Chat:
    """Messages, as JSON, and how the tokenizer's chat template renders them.

    Raises:
        EmphasisError: the text is no list of messages.
    """
    try:
        messages = json.loads(text)
    except ValueError as e:
        raise EmphasisError(f"expected chat messages as JSON: {e}", field="--messages") from None
    if not isinstance(messages, list) or not all(isinstance(item, dict) for item in messages):
        raise EmphasisError('expected [{"role": …, "content": …}, …]', field="--messages")

    def render(messages: list[dict[str, Any]]) -> str:
        try:
            rendered = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except TypeError:  # a template for plain strings; vLLM joins the parts for it too
            rendered = tokenizer.apply_chat_template(
                [_joined(message) for message in messages],
                tokenize=False,
                add_generation_prompt=True,
            )
        return str(rendered)

    return Chat(messages, render)


def _joined(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    if not isinstance(content, list):
        return message
    texts = [part if isinstance(part, str) else part.get("text", "") for part in content]
    return {**message, "content": "\n".join(texts)}


def _read(value: str) -> str:
    if not value.startswith("@"):
        return value
    try:
        return Path(value[1:]).read_text(encoding="utf-8")
    except OSError as e:
        raise PastaError(f"{value[1:]}: cannot be read: {e.strerror}") from e
