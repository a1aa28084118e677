"""What an emphasis marks: as JSON, in a terminal, and as a page."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from vllm_pasta.cli import terminal
from vllm_pasta.errors import PastaError
from vllm_pasta.profiling.report import html
from vllm_pasta.request.locate import Located
from vllm_pasta.request.tokens import decoded


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


def write_html(
    path: Path, tokenizer: Any, located: Located, model: str, more: Sequence[html.Part] = ()
) -> None:
    """Writes a page that shows each token of the prompt, and each emphasised range; and ``more``.

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
        html.write(path, "What an emphasis marks", intro, [*parts, *more])
    except OSError as e:
        raise PastaError(f"--html {path}: cannot be written: {e.strerror}") from e
