"""A real `vllm serve` with the plugin, over real HTTP."""

import json
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
from oracle import Steering

VLLM = Path(sys.executable).parent / "vllm"
PROMPT = "Previously, Ann lived in Rome. Currently, Ann lives in Oslo. Ann lives in"
FACT = "Ann lives in Oslo"
HEADS = {str(layer): list(range(9)) for layer in range(20, 25)}
MESSAGES = [{"role": "user", "content": "Name a colour. Answer in JSON."}]


def environment(**changes):
    """As a user's: nothing of what conftest sets for in-process engines."""
    env = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    return {**env, "VLLM_CPU_KVCACHE_SPACE": "1", **changes}


@pytest.fixture(scope="module")
def heads_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("server") / "heads.json"
    path.write_text(json.dumps(HEADS))
    return path


@pytest.fixture(scope="module")
def server(smollm2, heads_file, tmp_path_factory):
    """The base URL of a server with the bundled heads as default."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    log = (tmp_path_factory.mktemp("log") / "server.log").open("w+")
    process = subprocess.Popen(
        [VLLM, "serve", smollm2, "--served-model-name", "m", "--host", "127.0.0.1",
         "--port", str(port), "--dtype", "float32", "--enforce-eager", "--max-model-len", "1024",
         "--gpu-memory-utilization", "0.05",
         "--plugin", "pasta", "--pasta-heads", heads_file, "--pasta-alpha", "0.01"],
        env=environment(), stdout=log, stderr=subprocess.STDOUT,
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            try:
                if httpx.get(f"{url}/health").status_code == 200:
                    break
            except httpx.HTTPError:
                pass
            if process.poll() is not None:
                break
            time.sleep(1)
        else:
            pytest.fail("the server did not come up")
        if process.poll() is not None:
            log.seek(0)
            pytest.fail(log.read()[-5000:])
        yield url
    finally:
        process.terminate()
        process.wait(timeout=60)


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0)


def complete(client, xargs=None, prompt=PROMPT, **options):
    options = {"max_tokens": 8, "temperature": 0, **options}
    body = {"vllm_xargs": xargs} if xargs else None
    return client.completions.create(model="m", prompt=prompt, extra_body=body, **options)


@pytest.fixture(scope="module")
def steered(smollm2, smollm2_oracle):
    """What the oracle answers to PROMPT with FACT emphasised, and to PROMPT."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
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
        chat = client.chat.completions.create(
            model="m", messages=MESSAGES, max_tokens=12, temperature=0, extra_body=body
        )
        response = client.responses.create(
            model="m", input=MESSAGES, max_output_tokens=12, temperature=0, extra_body=body
        )
        answers.append(chat.choices[0].message.content)
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
    assert httpx.post(f"{server}/v1/completions", json=body).status_code == 400


def test_beam_search_is_refused(client):
    """It would lose the emphasis; without emphasis it goes on."""
    for xargs in ({"emphasis": FACT}, None):
        body = {"use_beam_search": True, "vllm_xargs": xargs}
        ask = lambda body=body: client.completions.create(  # noqa: E731
            model="m", prompt=PROMPT, max_tokens=4, n=2, extra_body=body
        )
        if xargs:
            with pytest.raises(openai.BadRequestError, match="beam search"):
                ask()
        else:
            assert len(ask().choices) == 2


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


def serve(*arguments, **env):
    return subprocess.run(
        [VLLM, "serve", *arguments],
        env=environment(**env), capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def test_missing_head_set_file(smollm2):
    """The server does not start, and says why."""
    result = serve(smollm2, "--pasta-heads", "/no/such/heads.json")
    assert result.returncode != 0
    assert "/no/such/heads.json: cannot be read" in result.stdout + result.stderr


def test_unknown_plugin(smollm2):
    result = serve(smollm2, "--plugin", "pesto")
    assert result.returncode != 0
    assert "no plugin 'pesto'; installed: " in result.stderr


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
    ],
)
def test_flags(arguments, expected, tiny):
    """What each way to start puts into the engine's configuration."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    args = AsyncEngineArgs.from_cli_args(parser.parse_args(["--model", str(tiny), *arguments]))
    assert args.additional_config.get("pasta") == expected


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


def test_offline_in_engine_processes(smollm2, steered, tmp_path):
    """LLM as users run it, engine core and worker in processes, switched on by VLLM_PLUGINS."""
    script = tmp_path / "script.py"
    script.write_text(OFFLINE)
    result = subprocess.run(
        [sys.executable, script, smollm2, PROMPT, FACT],
        env=environment(VLLM_PLUGINS="pasta"), capture_output=True, text=True,
    )  # fmt: skip
    answers = [line[7:] for line in result.stdout.splitlines() if line.startswith("ANSWER")]
    assert answers == [repr(steered[1]), repr(steered[0])], result.stderr[-3000:]
