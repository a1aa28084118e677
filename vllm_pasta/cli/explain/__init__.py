"""``vllm-pasta explain``: what a request would emphasise; with ``--attention``, what that does."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from vllm_pasta.cli.explain import attention
from vllm_pasta.cli.explain.show import show, to_json, write_html
from vllm_pasta.cli.explain.source import load_chat, load_shape, load_tokenizer
from vllm_pasta.cli.options import json_object
from vllm_pasta.errors import PastaError
from vllm_pasta.request.emphasis import Emphasis
from vllm_pasta.request.head_sets.library import bundled
from vllm_pasta.request.heads import DEFAULT_ALPHA, HeadSet, ranges
from vllm_pasta.request.locate import Locator
from vllm_pasta.request.markup import Markup
from vllm_pasta.request.resolution import KEY, check_share

HELP = "which tokens an emphasis marks, and where the attention goes"
DESCRIPTION = (
    "Shows which tokens of a prompt an emphasis marks, as a server would resolve it. Needs the "
    "model's tokenizer, not its weights; with --attention it also runs the model, and shows where "
    "the attention of the prompt's last token goes, plain and emphasised."
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
    parser.add_argument(
        "--attention", nargs="?", const="", type=attention.head, default=False,
        metavar="LAYER:HEAD",
        help="run the model, and show how much each steered head attends to the marks, and how "
        "much LAYER:HEAD does to each token (default: the head that gains most)",
    )  # fmt: skip
    parser.add_argument(
        "--heads", metavar="SET",
        help="with --attention: the heads of an emphasis that names none: a file, a bundled head "
        "set's name, or 'auto' (default: as a server has it)",
    )  # fmt: skip
    parser.add_argument(
        "--engine", type=json_object, default={}, metavar="JSON",
        help="with --attention: arguments of vllm.LLM, e.g. '{\"dtype\": \"float32\"}'",
    )  # fmt: skip


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
    shape = load_shape(args.model)
    if shape is not None and isinstance(emphasis.heads, HeadSet):
        shape.check(emphasis.heads)
    told = None
    if args.attention is not False:
        given = {"heads": emphasis.heads, "alpha": emphasis.alpha, "share": emphasis.share}
        told = attention.look(
            args.model, args.heads, args.engine, located,
            {k: v for k, v in given.items() if v is not None}, args.attention,
        )  # fmt: skip
    elif args.heads or args.engine:
        raise PastaError("--heads and --engine go with --attention, which runs the model")
    if args.html:
        more = attention.parts(told, located, tokenizer) if told else ()
        write_html(args.html, tokenizer, located, args.model, more)
    if args.json:
        report = to_json(tokenizer, located)
        if told:
            report["attention"] = told
        elif emphasis.share is None:
            report |= {"alpha": alpha, "alpha_from": alpha_from}
        else:
            report |= {"share": emphasis.share, "share_from": "request"}
        if shape is not None and shape.is_hybrid:
            report["attention_layers"] = list(shape.attention_layers)
        print(json.dumps(report, ensure_ascii=False, indent=1))
    else:
        show(tokenizer, located, sys.stdout)
        if told:
            which = "α" if "alpha" in told else "share"
            key = "alpha" if "alpha" in told else "share"
            print(f"{which} {told[key]:g}, from the {told[f'{key}_from']}")
            attention.show(told, located, tokenizer)
        elif emphasis.share is not None:
            print(f"share {emphasis.share:g}, from the request")
        elif alpha is not None:
            unless = ", unless the server has its own" if alpha_from == "head set" else ""
            print(f"α {alpha:g}, from the {alpha_from}{unless}")
        if shape is not None and shape.is_hybrid:
            print(f"layers with attention heads: {ranges(shape.attention_layers)}")
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


def _emphasis(value: str) -> Any:
    try:
        return json.loads(value)
    except ValueError:
        return value


def _read(value: str) -> str:
    if not value.startswith("@"):
        return value
    try:
        return Path(value[1:]).read_text(encoding="utf-8")
    except OSError as e:
        raise PastaError(f"{value[1:]}: cannot be read: {e.strerror}") from e
