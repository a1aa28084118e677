"""The HTTP surface: our fields at the top level of a body, and the report in a header."""

import asyncio
import json
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.routing import Route

from vllm_pasta import Emphasis, EmphasisError
from vllm_pasta.integration import patching, plugin
from vllm_pasta.integration.frontend import metrics
from vllm_pasta.integration.frontend.batch_file import rewrite_batch_line
from vllm_pasta.integration.frontend.middleware import (
    HEADER_LIMIT_BYTES,
    EmphasisMiddleware,
    header,
    rewrite,
)


def rewritten(**request):
    body, wanted = rewrite(json.dumps(request).encode())
    return json.loads(body), wanted


@pytest.mark.parametrize(
    ("emphasis", "carried"),
    [
        ("a", "a"),
        (["a", "b"], ["a", "b"]),
        ({"text": "a"}, '{"text": "a"}'),
        ([{"role": "user"}, "a"], '{"text": [{"role": "user"}, "a"]}'),
        (5, 5),  # vLLM and admission say what is wrong with it
        ('{"name": ""}', ['{"name": ""}']),  # a string is text, also where it is JSON
        (' {"text": "Hi"}', [' {"text": "Hi"}']),
        (None, '{"markup": "off"}'),
        (False, '{"markup": "off"}'),
        ({}, '{"markup": "off"}'),
        ({"prompts": ["a", None]}, '{"prompts": ["a", null]}'),
    ],
)
def test_top_level_moves_into_xargs(emphasis, carried):
    request, wanted = rewritten(model="m", emphasis=emphasis, vllm_xargs={"x": 1})
    assert request == {"model": "m", "vllm_xargs": {"x": 1, "emphasis": carried}}
    assert not wanted


@pytest.mark.parametrize(
    "body",
    [
        rb'{"emph\u0061sis": "a"}',
        '{"emphasis": "a"}'.encode("utf-16"),
        b'{"vllm_xargs": null, "emphasis": "a"}',
        b'{"emphasis": "b", "emphasis": "a"}',
    ],
)
def test_however_json_writes_it(body):
    """What vLLM's parser would take for our field is taken for it here."""
    assert json.loads(rewrite(body)[0]) == {"vllm_xargs": {"emphasis": "a"}}


def test_flat_keys_at_the_top_level():
    """They are not dropped: neither the known, nor a misspelt one, which admission refuses."""
    request, _ = rewritten(emphasis="a", emphasis_alpha=0.5, emphasis_heads={"1": [2]}, emphasise=1)
    assert request["vllm_xargs"] == {
        "emphasis": "a",
        "emphasis_alpha": 0.5,
        "emphasis_heads": '{"1": [2]}',
        "emphasise": 1,
    }


def test_batch_file():
    """A line of `vllm run-batch`."""
    line = {"custom_id": "1", "url": "/v1/chat/completions", "body": {"emphasis": {"text": "a"}}}
    after = json.loads(rewrite_batch_line(json.dumps(line)))
    assert after == {**line, "body": {"vllm_xargs": {"emphasis": '{"text": "a"}'}}}
    from vllm.entrypoints.launchers.run_batch import BatchRequestInput

    plugin.register()
    patching.apply_frontend()
    line["body"]["messages"] = [{"role": "user", "content": "a"}]
    request = BatchRequestInput.model_validate_json(json.dumps({**line, "method": "POST"}))
    assert request.body.to_sampling_params(1, {}).extra_args == {"emphasis": '{"text": "a"}'}
    for bad, words in (
        ({"emphasis": True}, "got True"),
        ({"emphasis": "a", "vllm_xargs": {"emphasis": "b", "mine": 1}}, "given twice"),
        ({"vllm_xargs": {"emphasis": {"text": "a"}}}, "give an object at the top level"),
        ({"emphasis": "a", "return_emphasis": True}, "a header of an HTTP response"),
    ):
        refused = json.loads(rewrite_batch_line(json.dumps({**line, "body": {"n": 1, **bad}})))
        assert refused["custom_id"] == "1"
        xargs = refused["body"].pop("vllm_xargs")
        assert refused["body"] == {"n": 1}
        assert xargs.pop("mine", 1) == 1
        assert words in xargs.pop("emphasis_refused")
        assert not xargs
    plain = json.dumps({**line, "body": {"messages": "emphasis"}})
    assert json.loads(rewrite_batch_line(plain)) == json.loads(plain)
    assert rewrite_batch_line("{") == "{"


@pytest.mark.parametrize("brackets", [("[", "]"), ('{"text":', "}")])
def test_deeply_nested(brackets):
    """Refused or left to vLLM, at whatever depth Python gives up: reading, writing or showing."""
    opening, closing = brackets
    outcomes = set()
    for depth in (100, *range(sys.getrecursionlimit() - 200, sys.getrecursionlimit()), 5000):
        body = f'{{"emphasis": {opening * depth}1{closing * depth}}}'.encode()
        try:
            carried, _ = rewrite(body)
        except EmphasisError:
            outcomes.add("refused here")
            continue
        if carried == body:
            outcomes.add("left to vLLM")
            continue
        outcomes.add("refused at admission")
        with pytest.raises(EmphasisError):
            Emphasis.parse({"emphasis": json.loads(body)["emphasis"]})
        with pytest.raises(EmphasisError):
            Emphasis.parse(json.loads(carried)["vllm_xargs"])
    assert outcomes >= {"left to vLLM", "refused at admission"}
    nested = []
    for _ in range(5000):  # from Python, where nothing was parsed
        nested = [nested]
    with pytest.raises(EmphasisError, match="deeply nested list"):
        Emphasis.parse({"emphasis": {"chars": [nested]}})


@pytest.mark.parametrize("value", [True, 1])
def test_return_emphasis(value):
    assert rewritten(return_emphasis=value, emphasis="a")[1]
    request, wanted = rewritten(vllm_xargs={"return_emphasis": value, "emphasis": "a"})
    assert wanted
    assert request == {"vllm_xargs": {"emphasis": "a"}}


@pytest.mark.parametrize(
    "request_",
    [
        {"emphasis": "a", "vllm_xargs": {"emphasis": "b"}},
        {"emphasis": True},
        {"return_emphasis": "yes", "emphasis": "a"},
        {"return_emphasis": 2},
        {"vllm_xargs": {"emphasis": {"text": "a"}}},
        {"vllm_xargs": {"emphasis": [{"text": "a"}]}},
    ],
)
def test_refused(request_):
    with pytest.raises(EmphasisError):
        rewrite(json.dumps(request_).encode())


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"{}", b'{"prompt": "a"}', b'{"prompt": "emphasis"', b'["emphasis"]', b"\xff"),
        *(b'{"prompt":  "emphasis"}', b'{"x": {"emphasis": 1}}', b'{"prompt": "\\u00e9"}'),
        *(b'{"emphasis": "a", "vllm_xargs": 3}', b'{"vllm_xargs": {"emphasis":  "a"}}'),
    ],
)
def test_other_bodies_pass_byte_for_byte(body):
    assert rewrite(body) == (body, False)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


@given(json_values, json_values, json_values)
def test_any_json(emphasis, wanted, xargs):
    """Rewritten, refused, or left to vLLM; nothing else, and never dropped."""
    request = {"emphasis": emphasis, "return_emphasis": wanted, "vllm_xargs": xargs, "n": 1}
    try:
        body, _ = rewrite(json.dumps(request).encode())
    except EmphasisError:
        return
    after = json.loads(body)
    assert after["n"] == 1
    if "emphasis" not in after and emphasis is not None:
        assert after["vllm_xargs"]["emphasis"] is not None


@given(json_values, json_values, json_values, json_values)
def test_any_batch_line(emphasis, wanted, xargs, line):
    """None ends the batch: each is rewritten as a request is, or goes on with why it is refused."""
    body = {"emphasis": emphasis, "return_emphasis": wanted, "vllm_xargs": xargs, "n": 1}
    assert json.loads(rewrite_batch_line(json.dumps(line))) == line
    after = json.loads(rewrite_batch_line(json.dumps({"custom_id": "1", "body": body})))
    assert (after["custom_id"], after["body"]["n"]) == ("1", 1)
    carried = after["body"].get("vllm_xargs") or {}
    if isinstance(carried, dict) and "emphasis_refused" in carried:
        return
    expected, in_header = rewrite(json.dumps(body).encode())
    assert after["body"] == json.loads(expected)
    assert not in_header


def test_header_fits():
    """Long texts are cut, never the ranges; it is ASCII."""
    entries = [
        {"prompt": i, "emphasised": [{"tokens": [1, 9], "text": "é🎉" * 3000}]} for i in range(5)
    ]
    text = header(entries)
    assert len(text) <= HEADER_LIMIT_BYTES
    assert text.isascii()
    assert [entry["emphasised"][0]["tokens"] for entry in json.loads(text)] == [[1, 9]] * 5
    many = [{"prompt": 0, "emphasised": [{"tokens": [i, i + 1], "text": ""} for i in range(999)]}]
    assert "999 ranges" in json.loads(header(many))["error"]


def call(body, path="/v1/completions", app=None, root_path=""):
    """One request through the middleware, its body in two pieces."""
    seen, sent = {}, []

    async def default(scope, receive, send):
        seen["body"] = (await receive())["body"]
        seen["headers"] = dict(scope["headers"])
        if (entries := metrics.report_entries.get()) is not None:
            entries.append({"prompt": 0, "emphasised": []})
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def run():
        pieces = [body[:3], body[3:]]

        async def receive():
            piece = pieces.pop(0)
            return {"type": "http.request", "body": piece, "more_body": bool(pieces)}

        async def send(message):
            sent.append(message)

        scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "root_path": root_path,
            "headers": [
                (b"content-length", str(len(body)).encode()),
                (b"content-type", b"application/json"),
            ],
        }
        await EmphasisMiddleware(app or default)(scope, receive, send)

    asyncio.run(run())
    return seen, sent


def test_middleware():
    seen, sent = call(json.dumps({"emphasis": {"text": "a"}, "return_emphasis": True}).encode())
    assert json.loads(seen["body"]) == {"vllm_xargs": {"emphasis": '{"text": "a"}'}}
    assert seen["headers"] == {
        b"content-length": str(len(seen["body"])).encode(),
        b"content-type": b"application/json",
    }
    assert dict(sent[0]["headers"])[b"x-emphasis"] == b'[{"prompt": 0, "emphasised": []}]'
    assert metrics.report_entries.get() is None


def test_middleware_without_report():
    _, sent = call(b'{"emphasis": "a"}')
    assert sent[0]["headers"] == []


@pytest.mark.parametrize("value", [None, False, {}])
def test_no_emphasis_in_xargs(value):
    """vLLM's own model would refuse these there; they ask for nothing."""
    request, _ = rewritten(vllm_xargs={"emphasis": value})
    assert request == {"vllm_xargs": {"emphasis": '{"markup": "off"}'}}


def test_behind_the_door():
    """However a server stacks its middlewares, this one is inside all of them: what another one
    turns away is not read."""
    read = []

    class Door:
        def __init__(self, app):
            self.app = app

        async def __call__(self, scope, receive, send):
            if dict(scope["headers"]).get(b"authorization") == b"yes":
                await self.app(scope, receive, send)
            else:
                await JSONResponse({}, status_code=401)(scope, receive, send)

    async def endpoint(request):
        return JSONResponse(await request.json())

    app = Starlette(
        routes=[Route("/v1/completions", endpoint, methods=["POST"])],
        middleware=[Middleware(EmphasisMiddleware), Middleware(Door)],
    )

    async def ask(headers):
        sent = []

        async def receive():
            read.append(headers)
            return {"type": "http.request", "body": b'{"emphasis": true}', "more_body": False}

        async def send(message):
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"",
                 "headers": headers}  # fmt: skip
        await app(scope, receive, send)
        return sent[0]["status"]

    before = metrics.counters().refused.labels("emphasis")._value.get()
    assert asyncio.run(ask([])) == 401
    assert not read
    assert metrics.counters().refused.labels("emphasis")._value.get() == before
    assert asyncio.run(ask([(b"authorization", b"yes")])) == 400
    assert metrics.counters().refused.labels("emphasis")._value.get() == before + 1


def test_middleware_refuses():
    seen, sent = call(b'{"emphasis": true}')
    assert not seen
    assert sent[0]["status"] == 400
    assert json.loads(sent[1]["body"])["error"]["param"] == "emphasis"


@pytest.mark.parametrize(
    ("path", "root_path"),
    [("/invocations", ""), ("/v1/messages", ""), ("/v1/chat/completions/render", ""),
     ("/api/v1/completions", "/api"), ("/v1/completions", "/api")],
)  # fmt: skip
def test_every_way_in(path, root_path):
    """Other endpoints whose models have vllm_xargs; a proxy's prefix, stripped or not."""
    seen, _ = call(b'{"emphasis": "a"}', path=path, root_path=root_path)
    assert json.loads(seen["body"]) == {"vllm_xargs": {"emphasis": "a"}}


@pytest.mark.parametrize(
    "path", ["/v1/chat/completions/batch", "/inference/v1/generate", "/generative_scoring"]
)
def test_endpoints_that_would_drop_it(path):
    """Refused where vLLM's models have no room for it; other bodies pass as they are."""
    for body in (b'{"emphasis": "a"}', b'{"vllm_xargs": {"emphasis_alpha": 1}}'):
        seen, sent = call(body, path=path)
        assert (seen, sent[0]["status"]) == ({}, 400)
        assert path in json.loads(sent[1]["body"])["error"]["message"]
    if path == "/inference/v1/generate":
        seen, sent = call(b'{"sampling_params": {"emphasis": "a"}}', path=path)
        assert (seen, sent[0]["status"]) == ({}, 400)
        assert b"give it in sampling_params.extra_args" in sent[1]["body"]
        body = b'{"sampling_params": {"extra_args": {"emphasis": "a"}}}'
        assert call(body, path=path)[0]["body"] == body
    for body in (b'{"prompt":  "emphasis"}', b"{", b'{"emphasis": null}', b'{"emphasis": {}}'):
        assert call(body, path=path)[0]["body"] == body


def test_our_routes_read_bodies_themselves():
    seen, _ = call(b'{"emphasis": true}', path="/v1/emphasis/resolve")
    assert seen["body"] == b'{"e'
