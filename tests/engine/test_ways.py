"""Each way to mark, offline: batches through `LLM.generate` and `LLM.chat`; chat templates."""

import json

import pytest
from vllm import SamplingParams
from ways import CHAT_WAYS, USER, WAYS, chat, expected, render, token_ranges

from vllm_pasta.integration.frontend import metrics


@pytest.fixture(scope="module")
def tokenizer(smollm2_engine):
    return smollm2_engine.get_tokenizer()


def params(emphasis=None, max_tokens=4):
    extra_args = None if emphasis is None else {"emphasis": emphasis}
    return SamplingParams(temperature=0, max_tokens=max_tokens, logprobs=0, extra_args=extra_args)


def ran(requests):
    """What each request's first choice was."""
    choices = [request.outputs[0] for request in requests]
    return [(c.text, pytest.approx(c.cumulative_logprob, abs=1e-3)) for c in choices]


@pytest.fixture
def reported(smollm2_engine):
    """Runs requests; gives the emphasised token ranges of each that has any, and the outputs."""

    def run(method, *args, **options):
        entries = []
        token = metrics.report_entries.set(entries)
        try:
            requests = getattr(smollm2_engine, method)(*args, use_tqdm=False, **options)
        finally:
            metrics.report_entries.reset(token)
        return [[span["tokens"] for span in entry["emphasised"]] for entry in entries], requests

    return run


@pytest.mark.parametrize("method", ["generate", "chat"])
def test_ways(method, reported, tokenizer):
    """A batch with one emphasis each, mixed with None: the right tokens, the same output as with
    those tokens given as such, and plain requests untouched."""
    ways = {**WAYS, **CHAT_WAYS} if method == "chat" else WAYS
    wanted = [expected(way, tokenizer, in_chat=method == "chat") for way in ways]
    inputs, emphases = zip(*((text, emphasis) for text, emphasis, *_ in ways.values()), strict=True)
    inputs = [chat(text) if method == "chat" else text for text in inputs]
    plain = [chat(USER) if method == "chat" else USER] * 2
    spans, requests = reported(
        method, [plain[0], *inputs, plain[1]], [params(), *map(params, emphases), params()]
    )
    assert spans == [ranges for _, ranges in wanted]
    alone, as_spans = reported(
        "generate",
        [prompt for prompt, _ in wanted],
        [params({"spans": ranges}) for _, ranges in wanted],
    )
    assert alone == spans
    assert ran(requests[1:-1]) == ran(as_spans)
    without = ran(reported(method, plain[0], params())[1])
    assert ran(requests[:1]) == ran(requests[-1:]) == without
    assert sum(output != without[0] for output in ran(requests[1:-1])) > len(ways) / 2


@pytest.mark.parametrize("method", ["generate", "chat"])
def test_one_emphasis_for_all(method, reported, tokenizer):
    """Found anew in each prompt."""
    texts = ["Answer in JSON.", "Please, if you can: answer in JSON.", "in JSON"]
    inputs = [chat(text) if method == "chat" else text for text in texts]
    spans, _ = reported(method, inputs, params("in JSON"))
    marked = [text.replace("in JSON", "«in JSON»") for text in texts]
    if method == "chat":
        marked = [render(tokenizer, chat(text)) for text in marked]
    assert spans == [token_ranges(tokenizer, text) for text in marked]


TEMPLATE = """
{%- for tool in tools or [] %}<|im_start|>tool {{ tool | tojson }}<|im_end|>{% endfor %}
{%- for m in messages %}<|im_start|>{{ m.role }}
{{ m.content | trim }}{% if not (loop.last and continue_final_message) %}<|im_end|>{% endif %}
{%- endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "paint",
            "description": "**Use it**, <emphasis> or not: answer in JSON",
            "parameters": {"type": "object", "properties": {}},
        },
    }
]
TALK = [
    *chat(f"  {USER}\n", "Be <emphasis>brief</emphasis>."),
    {"role": "assistant", "content": "Here it is: **red**"},
]


@pytest.mark.parametrize(
    ("emphasis", "marks"),
    [
        ([{"message": 1, "text": "answer in JSON"}], ["answer in JSON"]),
        ({"markup": "tag"}, ["brief"]),
        ({"markup": "markdown"}, ["red"]),
        ({"markup": "markdown", "keep_marks": False, "text": "brief"}, ["brief", "red"]),
        ([{"role": "assistant"}, {"role": "user"}], [USER, "Here it is: **red**"]),
    ],
)
@pytest.mark.parametrize("ending", ["generation prompt", "nothing", "continued"])
@pytest.mark.parametrize("tools", [None, TOOLS])
def test_chat_templates(tools, ending, emphasis, marks, reported, tokenizer):
    """Tools that hold the same words and even marks, a template that strips, an open last message:
    what is emphasised is in the messages, and what the template adds is left alone."""
    options = {
        "chat_template": TEMPLATE,
        "add_generation_prompt": ending == "generation prompt",
        "continue_final_message": ending == "continued",
        "tools": tools,
    }
    spans, (request,) = reported("chat", TALK, params(emphasis, 1), **options)
    messages = json.loads(json.dumps(TALK))
    if isinstance(emphasis, dict) and emphasis["markup"] == "tag":
        messages[0]["content"] = "Be brief."
    if isinstance(emphasis, dict) and emphasis.get("keep_marks") is False:
        messages[2]["content"] = "Here it is: red"
    prompt = render(tokenizer, messages, **options)
    assert request.prompt_token_ids == tokenizer(prompt).input_ids
    start = prompt.index("<|im_start|>system")
    marked = prompt[start:]
    for mark in marks:
        marked = marked.replace(mark, f"«{mark}»", 1)
    assert spans == [token_ranges(tokenizer, prompt[:start] + marked)]


def test_raw_prompt(smollm2_engine, tokenizer):
    """vLLM's deprecated way in, a string that the engine tokenises itself: markup is taken out
    there too, and the output is that of the token ranges."""
    engine = smollm2_engine.llm_engine
    text, emphasis, *_ = WAYS["tag"]
    prompt, spans = expected("tag", tokenizer, in_chat=False)
    requests = []
    for i, (raw, wanted) in enumerate(((text, emphasis), (prompt, {"spans": spans}))):
        engine.add_request(f"raw-{i}", raw, params(wanted))
        while engine.has_unfinished_requests():
            requests += [output for output in engine.step() if output.finished]
    assert requests[0].prompt_token_ids == tokenizer(prompt).input_ids
    assert ran(requests[:1]) == ran(requests[1:])
    assert ran(requests[:1]) != ran(smollm2_engine.generate(prompt, params(), use_tqdm=False))
    with pytest.raises(ValueError, match="has no </emphasis>"):
        engine.add_request("raw", "a <emphasis>b", params(emphasis))


def test_prompt_logprobs_of_echo(smollm2_engine, tokenizer):
    """`echo` with logprobs reads the prompt's own: those of the steered prompt, as the model saw
    it."""
    options = {"temperature": 0, "max_tokens": 1, "prompt_logprobs": 0}
    text, emphasis, *_ = WAYS["tag"]
    prompt, spans = expected("tag", tokenizer, in_chat=False)
    rows = []
    for raw, wanted in ((text, emphasis), (prompt, {"spans": spans}), (prompt, None)):
        extra_args = wanted and {"emphasis": wanted}
        (request,) = smollm2_engine.generate(
            raw, SamplingParams(extra_args=extra_args, **options), use_tqdm=False
        )
        assert request.prompt_token_ids == tokenizer(prompt).input_ids
        rows.append(
            [next(iter(row.values())).logprob for row in request.prompt_logprobs if row is not None]
        )
    assert rows[0] == pytest.approx(rows[1], abs=1e-3)
    first = spans[0][0]
    assert rows[0][:first] == pytest.approx(rows[2][:first], abs=1e-3)
    assert rows[0] != pytest.approx(rows[2], abs=1e-2)


def test_message_of_a_template_that_changes_it(reported):
    """Refused where the template makes of a message what only it knows: here, its length."""
    template = TEMPLATE.replace("m.content | trim", "(m.content | length) ~ m.content")
    mark = {"message": 1, "chars": [3, 9]}
    with pytest.raises(ValueError, match="does not put this message into the prompt"):
        reported("chat", chat(USER), params([mark]), chat_template=template)
