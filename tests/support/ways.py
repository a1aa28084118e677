"""The ways to mark, with what each must come to; and token ranges worked out on their own.

What is to be emphasised stands between « and » in a text that is otherwise as the model sees it.
"""

import re

SYSTEM = "Be brief."
USER = "Name a colour. Be brief, and answer in JSON."
TAGGED = "Name a colour. Be brief, and <emphasis>answer in JSON</emphasis>."
BOLD = "Name a colour. Be brief, and **answer in JSON**."
ANSWER = "Name a colour. Be brief, and «answer in JSON»."

# The user's text, the emphasis, and what the user's text must come to.
WAYS = {
    "text": (USER, "answer in JSON", ANSWER),
    "last occurrence": (
        USER,
        {"text": {"text": "in", "occurrence": "last"}},
        "Name a colour. Be brief, and answer «in» JSON.",
    ),
    "all occurrences": (
        USER.replace("and", "a colour"),
        {"text": {"text": "colour", "occurrence": "all"}},
        "Name a «colour». Be brief, a «colour» answer in JSON.",
    ),
    "several": (
        USER,
        ["Name a", "in JSON"],
        "«Name a» colour. Be brief, and answer «in JSON».",
    ),
    "tag": (TAGGED, {"markup": "tag"}, ANSWER),
    "markdown, kept": (
        BOLD,
        {"markup": "markdown"},
        "Name a colour. Be brief, and **«answer in JSON»**.",
    ),
    "markdown, taken out": (BOLD, {"markup": "markdown", "keep_marks": False}, ANSWER),
    "chars": (USER, {"chars": [[20, 30]]}, None),  # of the whole prompt
    "spans": (USER, {"spans": [[1, 3]]}, None),
}
# For chats alone; a fourth is what the system's text must come to.
CHAT_WAYS = {
    "message": (USER, [{"message": 0}], USER, "«Be brief.»"),
    "message from the end": (
        USER,
        [{"message": -1, "text": "Be brief"}],
        "Name a colour. «Be brief», and answer in JSON.",
        SYSTEM,
    ),
    "message chars": (
        USER,
        {"chars": [{"message": 1, "chars": [0, 4]}]},
        "«Name» a colour. Be brief, and answer in JSON.",
        SYSTEM,
    ),
    "role": (USER, [{"role": "system"}], USER, "«Be brief.»"),
    "role and tag": (
        TAGGED,
        {"markup": "tag", "text": [{"role": "system"}]},
        ANSWER,
        "«Be brief.»",
    ),
}


def chat(user, system=SYSTEM):
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]


def expected(way, tokenizer, *, in_chat):
    """The model's prompt as text, and the token ranges that must be emphasised in it."""
    text, emphasis, user, system = (*{**WAYS, **CHAT_WAYS}[way], SYSTEM)[:4]
    marked = user or text
    if in_chat:
        marked = render(tokenizer, chat(marked, system))
    if user is None and "chars" in emphasis:
        ((start, end),) = emphasis["chars"]
        marked = f"{marked[:start]}«{marked[start:end]}»{marked[end:]}"
    if user is None and "spans" in emphasis:
        return marked, emphasis["spans"]
    return marked.replace("«", "").replace("»", ""), token_ranges(tokenizer, marked)


def render(tokenizer, messages, **options):
    return tokenizer.apply_chat_template(
        messages, tokenize=False, **{"add_generation_prompt": True, **options}
    )


def token_ranges(tokenizer, marked):
    """Token ranges of what stands between « and »: every token that is partly inside."""
    text = marked.replace("«", "").replace("»", "")
    ids = tokenizer(text, add_special_tokens=False).input_ids
    ends = [len(tokenizer.decode(ids[: i + 1])) for i in range(len(ids))]
    ranges = []
    for n, match in enumerate(re.finditer("«([^»]*)»", marked)):
        start = match.start() - 2 * n
        end = start + len(match[1])
        inside = [i for i, e in enumerate(ends) if e > start and (i and ends[i - 1]) < end]
        ranges.append([inside[0], inside[-1] + 1])
    return ranges
