"""A real `vllm serve` with the plugin, over real HTTP."""

import json
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import prepared
import pytest
import vllm
from servers import SERVE, USUAL, VLLM, environment, http, metric, running
from specs import random_prompts, random_spec
from ways import CHAT_WAYS, TAGGED, USER, WAYS, chat, expected

from benchmarks.admission import HARD
from vllm_pasta.verify.oracle import Steering

PROMPT = "Previously, Ann lived in Rome. Currently, Ann lives in Oslo. Ann lives in"
FACT = "Ann lives in Oslo"
HEADS = {str(layer): list(range(9)) for layer in range(20, 25)}
MESSAGES = [{"role": "user", "content": "Name a colour. Answer in JSON."}]
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def heads_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("server") / "heads.json"
    path.write_text(json.dumps(HEADS))
    return path


@pytest.fixture(scope="module")
def server(smollm2, heads_file, tmp_path_factory):
    """The base URL of a server with the bundled heads as default."""
    command = [VLLM, "serve", smollm2, *SERVE, "--pasta-heads", heads_file, "--pasta-alpha", "0.01"]
    folder, env = tmp_path_factory.mktemp("log"), {"VLLM_PLUGINS": "pasta", **USUAL}
    with running([(command, env)], folder, are_prepared=True) as (url,):
        yield url


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0)


def complete(client, xargs=None, prompt=PROMPT, **options):
    options = {"max_tokens": 8, "temperature": 0, **options}
    body = {"vllm_xargs": xargs} if xargs else None
    return client.completions.create(model="m", prompt=prompt, extra_body=body, **options)


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture(scope="module")
def steered(tokenizer, smollm2_oracle):
    """What the oracle answers to PROMPT with FACT emphasised, and to PROMPT."""
    ids = tokenizer(PROMPT).input_ids
    start = len(tokenizer("Previously, Ann lived in Rome. Currently,").input_ids)
    end = len(tokenizer("Previously, Ann lived in Rome. Currently, Ann lives in Oslo").input_ids)
    heads = {int(layer): h for layer, h in HEADS.items()}
    steering = Steering([(start, end)], heads, 0.01, len(ids))
    return tuple(tokenizer.decode(smollm2_oracle.generate(ids, 8, s)[0]) for s in (steering, None))


def test_completions(client, steered):
    """Emphasised and plain, as the oracle says; every form that HTTP can carry."""
    assert steered[0] != steered[1]
    assert complete(client).choices[0].text == steered[1]
    for xargs in (
        {"emphasis": FACT},
        {"emphasis": [FACT]},
        {"emphasis": json.dumps({"text": FACT, "alpha": 0.01, "heads": HEADS})},
        {"emphasis": FACT, "emphasis_alpha": 0.01, "emphasis_heads": json.dumps(HEADS)},
    ):
        assert complete(client, xargs).choices[0].text == steered[0], xargs
    assert complete(client).choices[0].text == steered[1]


def test_curl(server, steered):
    body = {"model": "m", "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
    result = subprocess.run(
        ["curl", "-s", f"{server}/v1/completions", "-H", "Content-Type: application/json",
         "-d", json.dumps({**body, "vllm_xargs": {"emphasis": FACT}})],
        capture_output=True, check=True, text=True,
    )  # fmt: skip
    assert json.loads(result.stdout)["choices"][0]["text"] == steered[0]


def test_streaming(client, steered):
    chunks = complete(client, {"emphasis": FACT}, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == steered[0]


def test_chat_and_responses(client):
    """Emphasis changes the answer on both, and on both alike."""
    answers = []
    for body in (None, {"vllm_xargs": {"emphasis": "Answer in JSON."}}):
        reply = client.chat.completions.create(
            model="m", messages=MESSAGES, max_tokens=12, temperature=0, extra_body=body
        )
        response = client.responses.create(
            model="m", input=MESSAGES, max_output_tokens=12, temperature=0, extra_body=body
        )
        answers.append(reply.choices[0].message.content)
        assert response.output_text == answers[-1]
    assert answers[0] != answers[1]


BAD = {
    "text not in the prompt": {"emphasis": "Ann lives in Bergen"},
    "span past the prompt": {"emphasis": '{"spans": [[3, 99]]}'},
    "reversed span": {"emphasis": '{"spans": [[3, 2]]}'},
    "unknown field": {"emphasis": '{"txt": "Ann"}'},
    "misspelt key": {"emphasis": "Ann", "emphasis_alhpa": 0.1},
    "alpha": {"emphasis": "Ann", "emphasis_alpha": 0},
    "NaN": {"emphasis": '{"text": "Ann", "alpha": NaN}'},
    "head set": {"emphasis": "Ann", "emphasis_heads": "nope"},
    "head out of range": {"emphasis": "Ann", "emphasis_heads": '{"0": [9]}'},
    "too many": {"emphasis": ["Ann"] * 257},
    "nothing": {"emphasis": ""},
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("case", BAD)
def test_bad_request(case, stream, client):
    """400 with the field in the message, for a stream too, before anything is sent."""
    with pytest.raises(openai.BadRequestError, match="emphasis"):
        complete(client, BAD[case], stream=stream)


def test_bad_chat_and_responses(client):
    body = {"vllm_xargs": {"emphasis": "Answer in XML."}}
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match="closest is 'Answer in JSON"):
            client.chat.completions.create(
                model="m", messages=MESSAGES, extra_body=body, stream=stream
            )
        with pytest.raises(openai.BadRequestError, match="closest is 'Answer in JSON"):
            client.responses.create(model="m", input=MESSAGES, extra_body=body, stream=stream)


def test_object_without_quotes(server):
    """vLLM's own model refuses a nested object; it is not dropped."""
    body = {"model": "m", "prompt": PROMPT, "vllm_xargs": {"emphasis": {"text": FACT}}}
    assert http.post(f"{server}/v1/completions", json=body).status_code == 400


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_beam_search(endpoint, client, smollm2, smollm2_oracle):
    """The oracle's beams, steered and plain, while others search for theirs; marked in the field
    of the body's top level, reported, and refused with 400."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    text, part = PROMPT, FACT
    if endpoint == "chat":
        text = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
        part = "Answer in JSON."
    ids = tokenizer(text, add_special_tokens=False).input_ids
    before = text[: text.index(part)].rstrip()
    span = [
        len(tokenizer(t, add_special_tokens=False).input_ids) for t in (before, before + " " + part)
    ]
    heads = {int(layer): h for layer, h in HEADS.items()}

    def search(emphasis):
        options = {"model": "m", "max_tokens": 4, "n": 3, "temperature": 0}
        extra = {"use_beam_search": True, "emphasis": emphasis, "return_emphasis": True}
        if endpoint == "chat":
            ask = client.chat.completions.with_raw_response.create
            raw = ask(messages=MESSAGES, extra_body=extra, **options)
            texts = [choice.message.content for choice in raw.parse().choices]
        else:
            ask = client.completions.with_raw_response.create
            raw = ask(prompt=PROMPT, extra_body=extra, **options)
            texts = [choice.text for choice in raw.parse().choices]
        return texts, raw.headers.get("x-emphasis")

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(search, [part, None, {"spans": [[0, 2]]}, part]))
    assert found[3] == found[0]
    for (texts, report), spans in zip(found, [[span], None, [[0, 2]]], strict=False):
        steering = spans and Steering(spans, heads, 0.01, len(ids))
        beams = smollm2_oracle.beam_search(
            ids, 3, 4, steering, tokenizer.eos_token_id,
            counts_prompt=vllm.__version__.startswith("0.32."),
        )  # fmt: skip
        assert texts == [tokenizer.decode(t, skip_special_tokens=True) for t, _ in beams]
        told = report and [entry["tokens"] for entry in json.loads(report)[0]["emphasised"]]
        assert told == spans
    assert found[0][0] != found[1][0]
    with pytest.raises(openai.BadRequestError, match="is not in the prompt"):
        search("Nothing of that.")


def test_list_of_prompts(client, steered):
    """Each prompt's own token ranges; one that lacks the text refuses the request."""
    longer = "Some words before. " + PROMPT
    texts = [c.text for c in complete(client, {"emphasis": FACT}, [longer, PROMPT]).choices]
    assert texts[1] == steered[0]
    assert texts[0] == complete(client, {"emphasis": FACT}, longer).choices[0].text
    with pytest.raises(openai.BadRequestError, match="not in the prompt"):
        complete(client, {"emphasis": FACT}, [PROMPT, "Nothing of that."])


def test_refused_requests_disturb_no_other(client, steered):
    """Plain, steered and malformed requests at once."""

    def ask(i):
        if i % 3 == 2:
            with pytest.raises(openai.BadRequestError):
                complete(client, list(BAD.values())[i % len(BAD)])
            return True
        xargs = {"emphasis": FACT} if i % 3 else None
        return complete(client, xargs).choices[0].text == steered[0 if i % 3 else 1]

    with ThreadPoolExecutor(12) as pool:
        assert all(pool.map(ask, range(48)))


def ask(client, endpoint, text, stream=False, **body):
    """The answer's text, and what the response says was emphasised."""
    options = {"model": "m", "stream": stream, "extra_body": {"return_emphasis": True, **body}}
    messages = chat(text)
    if endpoint == "completions":
        raw = client.completions.with_raw_response.create(
            prompt=text, max_tokens=6, temperature=0, **options
        )
    elif endpoint == "chat":
        raw = client.chat.completions.with_raw_response.create(
            messages=messages, max_tokens=6, temperature=0, **options
        )
    else:
        raw = client.responses.with_raw_response.create(
            input=messages, max_output_tokens=6, temperature=0, **options
        )
    report = json.loads(raw.headers["x-emphasis"]) if "x-emphasis" in raw.headers else None
    if stream:
        return b"".join(raw.http_response.iter_bytes()).decode(), report
    reply = raw.parse()
    if endpoint == "completions":
        return reply.choices[0].text, report
    return reply.choices[0].message.content if endpoint == "chat" else reply.output_text, report


@pytest.mark.parametrize("endpoint", ["completions", "chat", "responses"])
@pytest.mark.parametrize("way", [*WAYS, *CHAT_WAYS])
def test_ways(way, endpoint, client, tokenizer):
    """Each way to mark, at the top level and in vllm_xargs, on each endpoint; offline is in
    test_ways.py."""
    text, emphasis, *_ = {**WAYS, **CHAT_WAYS}[way]
    if endpoint == "completions" and way in CHAT_WAYS:
        with pytest.raises(openai.BadRequestError, match="for chats"):
            ask(client, endpoint, text, emphasis=emphasis)
        return
    prompt, spans = expected(way, tokenizer, in_chat=endpoint != "completions")
    xargs = {"emphasis": json.dumps(emphasis if isinstance(emphasis, dict) else {"text": emphasis})}
    with ThreadPoolExecutor() as pool:  # at once, which takes the server as long as one
        asked = [
            pool.submit(ask, client, endpoint, text, emphasis=emphasis),
            pool.submit(ask, client, endpoint, text, vllm_xargs=xargs),
            # The same token ranges, given as such, on the text as the model sees it.
            pool.submit(ask, client, "completions", prompt, emphasis={"spans": spans}),
        ]
        (answer, report), *others = (of.result() for of in asked)
    assert [span["tokens"] for span in report[0]["emphasised"]] == spans
    assert others == [(answer, report)] * 2


@pytest.mark.parametrize("endpoint", ["completions", "chat", "responses"])
def test_report_while_streaming(endpoint, client):
    """The header comes with the stream's start, and says the same."""
    _, report = ask(client, endpoint, USER, emphasis="answer in JSON")
    _, streamed = ask(client, endpoint, USER, stream=True, emphasis="answer in JSON")
    assert streamed == report
    assert report[0]["emphasised"][0]["text"].strip() == "answer in JSON"


def test_no_report_unless_asked(client):
    raw = client.completions.with_raw_response.create(
        model="m", prompt=PROMPT, max_tokens=2, extra_body={"emphasis": FACT}
    )
    assert "x-emphasis" not in raw.headers
    assert ask(client, "completions", PROMPT)[1] is None  # nothing was emphasised


def test_echo_has_no_tags(client):
    """What is echoed is what the model saw."""
    reply = complete(client, {"emphasis": '{"markup": "tag"}'}, TAGGED, echo=True)
    assert reply.choices[0].text.startswith("Name a colour. Be brief, and answer in JSON.")
    assert reply.usage.prompt_tokens == complete(client, None, USER).usage.prompt_tokens


def test_truncated_prompt(client):
    """truncate_prompt_tokens: found in what is left, refused in what is cut off."""
    body = {"truncate_prompt_tokens": 6, "return_emphasis": True}
    for text, found in (("Ann lives in", True), ("Rome", False)):
        options = {"model": "m", "prompt": PROMPT, "max_tokens": 2}
        extra = {**body, "emphasis": text}
        if found:
            raw = client.completions.with_raw_response.create(**options, extra_body=extra)
            report = json.loads(raw.headers["x-emphasis"])
            assert report[0]["emphasised"][0]["text"].strip() == text
        else:
            with pytest.raises(openai.BadRequestError, match="not in the prompt"):
                client.completions.create(**options, extra_body=extra)


def test_routes(server, heads_file):
    """What is known, and a dry run."""
    known = http.get(f"{server}/v1/emphasis/head_sets").json()
    attention_layers = list(range(30))
    assert known["model"] == {
        "layers": 30,
        "query_heads": 9,
        "attention_layers": attention_layers,
        "query_heads_of_layers": {str(layer): 9 for layer in attention_layers},
    }
    assert known["default"]["count"] == 45
    assert known["head_sets"]["smollm2-135m-instruct"]["provenance"]["model"]
    assert all(name.startswith("smollm2-135m-") for name in known["head_sets"])  # what fits
    url = f"{server}/v1/emphasis/resolve"
    body = {"model": "m", "prompt": PROMPT, "emphasis": FACT}
    (resolved,) = http.post(url, json=body).json()["prompts"]
    assert resolved["emphasised"][0]["text"].strip() == FACT
    assert (resolved["alpha"], resolved["heads"]) == (0.01, HEADS)
    assert resolved["alpha_from"] == known["default"]["alpha_from"]
    own = known["head_sets"]["smollm2-135m-json"]
    named = {**body, "emphasis": {"text": FACT, "heads": "smollm2-135m-json"}}
    (resolved,) = http.post(url, json=named).json()["prompts"]
    assert {key: resolved[key] for key in ("alpha", "alpha_from", "heads")} == {
        key: own[key] for key in ("alpha", "alpha_from", "heads")
    }
    talk = {"model": "m", "messages": chat(USER), "emphasis": [{"role": "system"}]}
    (resolved,) = http.post(url, json=talk).json()["prompts"]
    assert resolved["emphasised"][0]["text"].strip() == "Be brief."
    for bad in ({**body, "emphasis": "Bergen"}, {**body, "emphasis": {"spans": [[1, 0]]}}, {}):
        assert http.post(url, json=bad).status_code == 400


def test_metrics(server, client):
    """Requests, tokens and rows are counted as they are; a client's own words are no label."""
    names = (
        "pasta_requests_steered_total",
        "pasta_emphasised_tokens_total",
        'pasta_requests_refused_total{reason="emphasis.text"}',
        'pasta_step_rows_total{kind="steered"}',
        'pasta_step_rows_total{kind="plain"}',
    )
    before = [metric(server, name) for name in names]
    replies = [complete(client, {"emphasis": '{"spans": [[2, 7]]}'}), complete(client)]
    for xargs in ({"emphasis": "Bergen"}, {"emphasis_mine": "x"}):
        with pytest.raises(openai.BadRequestError):
            complete(client, xargs)
    after = [metric(server, name) for name in names]
    rows = [reply.usage.completion_tokens for reply in replies]
    assert [b - a for a, b in zip(before, after, strict=True)] == [1, 5, 1, *rows]
    assert "emphasis_mine" not in http.get(f"{server}/metrics").text


HOSTILE = {
    "unpaired surrogate in a field's name": {"emphasis_\ud800": "x"},
    "in a text": {"emphasis": "\ud800"},
    "in a head set's name": {"emphasis": {"text": "Ann", "heads": "\ud800"}},
    "in a layer": {"emphasis": {"text": "Ann", "heads": {"\ud800": [1]}}},
    "huge number": {"emphasis": {"spans": [[0, 10**4000]]}},
    "too many ranges": {"emphasis": {"text": [{"text": "n", "occurrence": "all"}] * 200}},
    "xargs of another type": {"emphasis": "Ann", "vllm_xargs": "x"},
}


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/emphasis/resolve"])
def test_hostile_bodies(case, path, server):
    """What trips JSON, UTF-8 or a label: 400, with a message."""
    body = json.dumps({"model": "m", "prompt": PROMPT, "max_tokens": 1, **HOSTILE[case]})
    reply = http.post(f"{server}{path}", content=body, headers=JSON)
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/emphasis/resolve"])
def test_deeply_nested_bodies(path, server):
    """Wherever Python's recursion gives up: in our reading, in vLLM's, or in a message."""
    with httpx.Client(base_url=server, headers=JSON) as http:
        for depth in (90, 450, *range(880, 1000, 10), 3000):
            for opening, closing in (("[", "]"), ('{"text":', "}")):
                nested = f"{opening * depth}1{closing * depth}"
                body = f'{{"model": "m", "prompt": "Ann", "emphasis": {nested}}}'
                assert http.post(path, content=body).status_code == 400, depth


CHAT_BODY = {"model": "m", "messages": MESSAGES, "max_tokens": 1}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/messages", CHAT_BODY),
        ("/invocations", CHAT_BODY),
        ("/invocations", {"model": "m", "prompt": "Name a colour", "max_tokens": 1}),
    ],
)
def test_other_ways_in(path, body, server):
    """Endpoints beside OpenAI's: emphasised, reported, refused alike."""
    body = {**body, "emphasis": "colour", "return_emphasis": True}
    reply = http.post(f"{server}{path}", json=body)
    assert json.loads(reply.headers["x-emphasis"])[0]["emphasised"][0]["text"].strip() == "colour"
    body["emphasis"] = "Bergen"
    reply = http.post(f"{server}{path}", json=body)
    assert reply.status_code == 400
    assert "not in the prompt" in reply.text


def test_endpoint_that_would_drop_it(server):
    """A batch of chats has no room for it in vLLM's model: refused, plain ones are served."""
    body = {**CHAT_BODY, "messages": [MESSAGES, MESSAGES]}
    url = f"{server}/v1/chat/completions/batch"
    assert http.post(url, json=body).status_code == 200
    reply = http.post(url, json={**body, "emphasis": "colour"})
    assert reply.status_code == 400
    assert "takes no emphasis" in reply.text


def test_fuzz(server, client, steered):
    """Random specs, prompts with markup and lists of prompts: a steered answer or a 400 with a
    message, nothing else; VLLM_PASTA_FUZZ says how many. Of more than 2,000, nine in ten are
    admitted or refused and not run. A plain request beside them always gets the same answer."""
    rng = random.Random(int(os.environ.get("VLLM_PASTA_FUZZ_SEED", "0")))
    count = int(os.environ.get("VLLM_PASTA_FUZZ", "300"))
    specs = [random_spec(rng) for _ in range(count)]
    prompts = [random_prompts(rng) for _ in range(count)]
    statuses, ran = Counter(), Counter()

    def send(i):
        if i % 50 == 0:
            assert complete(client).choices[0].text == steered[1]
        body = {"model": "m", "prompt": PROMPT, "max_tokens": 1}
        if i % 3 == 1:
            body["prompt"], body["emphasis"] = prompts[i]
        elif i % 3 == 2:
            body["emphasis"] = specs[i]
        else:
            body["vllm_xargs"] = {"emphasis": json.dumps(specs[i]), "emphasis_alpha": 0.5}
        runs = count <= 2_000 or i % 10 == 0
        # As text, since httpx refuses NaN, and a client may send it.
        path = "/v1/completions" if runs else "/v1/emphasis/resolve"
        reply = http.post(path, content=json.dumps(body))
        statuses[reply.status_code] += 1
        ran[runs and reply.status_code == 200] += 1
        if reply.status_code != 200:
            assert reply.json()["error"]["message"], specs[i]
        assert reply.status_code in (200, 400), (specs[i], reply.text)

    with (
        httpx.Client(base_url=server, timeout=120, headers=JSON) as http,
        ThreadPoolExecutor(16) as pool,
    ):
        list(pool.map(send, range(count)))
    assert statuses[400] > count / 4
    assert statuses[200]
    print(f"fuzz: {count} specs, {dict(statuses)}, {ran[True]} of them run")


MANY = 10_000
HOSTILE_SIZES = {
    "10,000 marks": {"emphasis": ["Ann"] * MANY},
    "10,000 ranges": {"emphasis": {"spans": [[i, i + 1] for i in range(MANY)]}},
    "10,000 fields": {"emphasis": {f"text{i}": "Ann" for i in range(MANY)}},
    "10,000 heads": {"emphasis": {"text": "Ann", "heads": {str(i): [0] for i in range(MANY)}}},
    "10,000 emphases": {"emphasis": {"prompts": ["Ann"] * MANY}},
    "a name of megabytes": {"emphasis": "Ann", "emphasis_heads": "x" * 3_000_000},
    "a mark of megabytes": {"emphasis": "Ann " * 1_000_000},
    "accents of megabytes": {"emphasis": "e" + "\u0301\u0316" * 500_000},
    "a key of megabytes": {"emphasis": {"x" * 3_000_000: 1}},
    **{
        f"{name}, megabytes of it": {"prompt": text * 10, "emphasis": {"markup": kind}}
        for name, (kind, text) in HARD.items()
    },
    "10,000 messages": {
        "messages": [{"role": "user", "content": "**Ann**"}] * MANY,
        "emphasis": {"markup": "markdown"},
    },
    "10,000 messages, marked": {
        "messages": [{"role": "user", "content": "Ann"}] * MANY,
        "emphasis": [{"role": "user", "text": "Ann", "occurrence": "all"}],
    },
}


def test_hostile_sizes(server, client, steered):
    """Megabytes, thousands of marks, what is hard for the readers of markup: a 400 with a message
    that is no novel, in the time that reading the body takes, and plain requests are answered as
    ever."""
    with httpx.Client(base_url=server, timeout=120, headers=JSON) as http:
        for i, (name, fields) in enumerate(HOSTILE_SIZES.items()):
            chats = "messages" in fields
            body = {
                "model": "m",
                "max_tokens": 1,
                **({} if chats else {"prompt": PROMPT}),
                **fields,
            }
            path = "/v1/chat/completions" if chats else "/v1/completions"
            began = time.monotonic()
            reply = http.post(path, content=json.dumps(body))
            print(f"hostile: {name}: {reply.status_code}, {time.monotonic() - began:.2f} s")
            assert reply.status_code == 400, (name, reply.text[:500])
            message = reply.json()["error"]["message"]
            assert message, name
            assert len(message) < 2_000, (name, message[:3_000])
            if i % 5 == 0:
                assert complete(client).choices[0].text == steered[1], name


def test_missing_head_set_file(smollm2):
    """The server does not start, and says why."""
    command = [VLLM, "serve", smollm2, "--pasta-heads", "/no/such/heads.json"]
    result = prepared.run(command, environment(), timeout=300)
    assert result.returncode != 0
    assert "/no/such/heads.json: cannot be read" in result.stdout + result.stderr


def parsed(*arguments):
    """What vLLM's own parser makes of the arguments of `vllm serve`."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return AsyncEngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args(arguments)


def test_unknown_plugin(capsys):
    with pytest.raises(SystemExit) as exit:
        parsed("--plugin", "pesto")
    assert exit.value.code == 2
    assert "no plugin 'pesto'; installed: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], None),
        (["--plugin", "pasta"], {}),
        (["--pasta-heads", "h.json"], {"heads": "h.json"}),
        (["--pasta-alpha", "0.5"], {"alpha": 0.5}),
        (["--additional-config", '{"pasta": {"heads": "h.json"}}'], {"heads": "h.json"}),
        (
            ["--additional-config", '{"pasta": {"heads": "h.json"}}', "--pasta-alpha", "2"],
            {"heads": "h.json", "alpha": 2.0},
        ),
        (
            ["--additional-config", '{"pasta": {"alpha": 2}}', "--pasta-share", "0.3"],
            {"share": 0.3},
        ),
    ],
)
def test_flags(arguments, expected, tiny):
    """What each way to start puts into the engine's configuration."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    args = parsed("--model", str(tiny), *arguments)
    config = AsyncEngineArgs.from_cli_args(args).additional_config
    assert config.get("pasta") == expected
    assert args.additional_config == config  # what a second API server starts from


OFFLINE = """
import sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    llm = LLM(sys.argv[1], dtype="float32", enforce_eager=True, gpu_memory_utilization=0.05,
              max_model_len=512)
    heads = {str(layer): list(range(9)) for layer in range(20, 25)}
    for extra in (None, {"emphasis": {"text": sys.argv[3], "heads": heads}}):
        params = SamplingParams(temperature=0, max_tokens=8, extra_args=extra)
        print("ANSWER", repr(llm.generate(sys.argv[2], params)[0].outputs[0].text))
"""


# The demo runs such an LLM, and others with processes are in engine/test_parallel.
@pytest.mark.slow
def test_offline_in_engine_processes(smollm2, steered, tmp_path):
    """LLM as users run it, engine core and worker in processes, switched on by VLLM_PLUGINS."""
    script = tmp_path / "script.py"
    script.write_text(OFFLINE)
    result = subprocess.run(
        [sys.executable, script, smollm2, PROMPT, FACT],
        env=environment(VLLM_PLUGINS="pasta", **USUAL), capture_output=True, text=True,
    )  # fmt: skip
    answers = [line[7:] for line in result.stdout.splitlines() if line.startswith("ANSWER")]
    assert answers == [repr(steered[1]), repr(steered[0])], result.stderr[-3000:]


def test_example(server):
    """examples/client.py: the answers follow the emphasis, and what cannot be marked is refused."""
    program = Path(__file__).parents[2] / "examples" / "client.py"
    done = subprocess.run(
        [sys.executable, program, f"{server}/v1"], capture_output=True, text=True, check=True
    )
    lines = dict(line.split(":", 1) for line in done.stdout.splitlines() if ":" in line)
    assert "Germany" in lines["plain"]
    assert "Brazil" in lines["emphasised"]
    assert lines["chat"].strip()
    assert "a citizen of Bra" in lines["refused"]


def test_readme(server):
    """The request of the README's curl: the fact with emphasis, the model's own without."""
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    path, body = re.search(
        r"curl -s localhost:8000(\S+) .*? -d '(.*?)'\n", readme, re.DOTALL
    ).groups()
    emphasised = {**json.loads(body), "model": "m"}
    plain = {key: value for key, value in emphasised.items() if key != "emphasis"}
    answers = [
        httpx.post(server + path, json=request, timeout=60).json()["choices"][0]["text"]
        for request in (plain, emphasised)
    ]
    assert answers[0].startswith(" Germany.")
    assert answers[1].startswith(" Brazil.")
