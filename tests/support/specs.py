"""Random requests that are often nearly right, for fuzzing the server."""

FACT = "Ann lives in Oslo"
TEXTS = (
    "Previously, Ann lived in Rome. Currently, Ann lives in Oslo. Ann lives in",
    "Ann <emphasis>lives</emphasis> in <emphasis alpha='0.1'>Oslo</emphasis>.",
    "Ann <emphasis alpha='x'>lives</emphasis>",
    "</emphasis> Ann **lives** in __Oslo__",
    "**Ann\n\nlives** `in **Oslo**`, <Emphasis>é🎉</Emphasis>",
    "- **Ann\n> lives**\n\n    **in**",
    "Cafe\u0301 \ue000 Ann</think>\n\nlives in \u00a0Oslo",
    "x",
)
LEAVES = (
    None, True, False, 0, 1, -1, 5, 2**70, 1e400, float("nan"), 0.01, "", " ", "Ann", FACT, "é🎉",
    "tag", "markdown", "stars", "off", "all", "last", "smollm2-135m-instruct", "<emphasis>",
    "Café", "assistant", "user", '{"text": "Ann"}', '{"name": ""}', {}, [[0, 3]], [[3, 1]],
    {"1": [0]}, {"99": [0]}, [[0, 1]] * 300, ["Ann"] * 300, {"tokens": [0, 2], "alpha": 0.1},
)  # fmt: skip
KEYS = (
    "text", "spans", "chars", "alpha", "heads", "markup", "keep_marks", "occurrence", "message",
    "role", "tokens", "prompts", "x", "0",
)  # fmt: skip


def random_spec(rng, depth=0):
    """JSON for the field ``emphasis``."""
    kind = rng.random()
    if depth > 2 or kind < 0.4:
        return rng.choice(LEAVES)
    if kind < 0.8:
        return {rng.choice(KEYS): random_spec(rng, depth + 1) for _ in range(rng.randrange(1, 4))}
    return [random_spec(rng, depth + 1) for _ in range(rng.randrange(4))]


def likely_spec(rng):
    """One whose shape is right, in any way of marking, with strengths."""

    def alpha():
        return {"alpha": rng.choice((0.001, 0.1, 1, 2))} if rng.random() < 0.5 else {}

    ways = {
        "text": lambda: [{"text": rng.choice(("Ann", "in", "Oslo", "Café", "x")), **alpha()}],
        "chars": lambda: [{"chars": [0, rng.randrange(1, 9)], **alpha()}],
        "spans": lambda: [{"tokens": [0, rng.randrange(1, 4)], **alpha()}],
        "markup": lambda: rng.choice(("tag", "markdown", "stars", "off")),
        "keep_marks": lambda: rng.random() < 0.5,
        "alpha": lambda: rng.choice((0.01, 0.5, 1, 3)),
    }
    return {key: ways[key]() for key in rng.sample(list(ways), rng.randrange(1, 4))}


def random_prompts(rng):
    """A prompt, or several, and an emphasis for all or each."""
    count = rng.randrange(1, 4)
    prompts = [rng.choice(TEXTS) for _ in range(count)]
    choose = rng.choice((random_spec, likely_spec))
    if rng.random() < 0.3:
        return prompts, {"prompts": [choose(rng) for _ in range(rng.choice((count, count, 2)))]}
    return (prompts[0] if rng.random() < 0.5 else prompts), choose(rng)


def random_messages(rng):
    """A conversation, and an emphasis that may point into it."""
    roles = ("system", "user", "assistant", "tool", "developer")
    messages = [
        {"role": rng.choice(roles), "content": rng.choice((*TEXTS, "", None))}
        for _ in range(rng.randrange(1, 5))
    ]
    place = rng.choice(({"message": rng.randrange(-3, 4)}, {"role": rng.choice(roles)}))
    mark = {**place, **rng.choice(({}, {"text": "Ann"}, {"chars": [0, 3]}, {"alpha": 0.1}))}
    return messages, rng.choice(([mark], [mark, "Ann"], likely_spec(rng), random_spec(rng), None))
