"""KV that leaves the engine: prefill and decode on separate servers, and what is refused.

Real servers and a real proxy on loopback. Both connectors are on: NIXL for requests that come
through the proxy, and, for those sent to the decode server directly, the example connector's files.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import msgspec
import psutil
import pytest
import zmq
from conftest import ALL_CORES
from models import random_ids
from servers import SERVE, USUAL, VLLM, free_port, http, metric, running
from vllm import SamplingParams
from vllm.config import KVTransferConfig
from vllm.distributed.kv_events import BlockStored, KVEventBatch

from vllm_pasta import EmphasisError, HeadSet, ResolvedEmphasis, UnsupportedError
from vllm_pasta.integration.scheduler import connectors
from vllm_pasta.verify.oracle import Steering

PROXY = Path(__file__).parents[2] / "examples" / "disaggregated" / "proxy.py"
FACT = "Ann lives in Oslo"
HEADS = {str(layer): list(range(9)) for layer in range(8, 25)}
BLOCK = 32
TEXT = "Previously, Ann lived in Rome. Currently, Ann lives in Oslo. " * 7 + "Ann lives in"
"""Three full blocks and a part of one."""
EMPHASES = [
    None,
    FACT,
    {"text": {"text": FACT, "occurrence": 2}},
    {"text": "Ann lived in Rome", "alpha": 0.1},
    {"text": "Ann lived in Rome", "alpha": 0.1, "heads": {"9": [0, 1, 2], "20": [4]}},
]


@dataclass
class Cluster:
    prefill: str
    decode: str
    proxy: str
    events: list[zmq.Socket]
    store: Path

    def forget(self):
        """Empties the decode server's prefix cache and the files."""
        assert http.post(f"{self.decode}/reset_prefix_cache").status_code == 200
        shutil.rmtree(self.store, ignore_errors=True)
        self.store.mkdir()

    def transferred(self):
        """Prompt tokens whose KV the decode server got from elsewhere."""
        return metric(self.decode, "vllm:external_prefix_cache_hits_total")


@pytest.fixture(
    scope="module",
    params=[False, pytest.param(True, marks=pytest.mark.slow)],
    ids=["quick prefill", "usual prefill"],
)
def cluster(smollm2, tmp_path_factory, request):
    """Prefill server, decode server and proxy, and what the servers publish. Only the decode server
    has a worker in a process of its own, as users' have it; or both."""
    is_usual = request.param
    folder = tmp_path_factory.mktemp("disaggregated")
    heads = folder / "heads.json"
    heads.write_text(json.dumps(HEADS))
    store = {"shared_storage_path": str(folder / "store")}
    context, commands, events = zmq.Context(), [], []
    for i, role in enumerate(("kv_producer", "kv_consumer")):
        transfer = {
            "kv_connector": "MultiConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {
                "connectors": [
                    {"kv_connector": "NixlConnector", "kv_role": role},
                    {
                        "kv_connector": "ExampleConnector",
                        "kv_role": "kv_both",
                        "kv_connector_extra_config": store,
                    },
                ]
            },
        }
        endpoint = f"ipc://{folder}/{i}"
        publish = {"enable_kv_cache_events": True, "publisher": "zmq", "endpoint": endpoint}
        command = [
            VLLM, "serve", smollm2, *SERVE, "--pasta-heads", heads, "--block-size", str(BLOCK),
            "--kv-transfer-config", json.dumps(transfer), "--kv-events-config", json.dumps(publish),
        ]  # fmt: skip
        env = {
            "VLLM_PLUGINS": "pasta",
            # While it holds KV for a reader, vLLM steps without a pause: in one process, where the
            # worker of a second would wait busily for it.
            **(USUAL if role == "kv_consumer" or is_usual else {}),
            "VLLM_SERVER_DEV_MODE": "1",  # for /reset_prefix_cache
            "VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port()),
            "VLLM_CPU_OMP_THREADS_BIND": str(ALL_CORES[i % len(ALL_CORES)]),
        }
        commands.append((command, env))
        subscriber = context.socket(zmq.SUB)
        subscriber.subscribe(b"")
        subscriber.connect(endpoint)
        events.append(subscriber)
    with running(commands, folder, are_prepared=True) as (prefill, decode):
        command = [sys.executable, PROXY, "--prefill", prefill, "--decode", decode]
        with running([(command, {})], tmp_path_factory.mktemp("proxy")) as (proxy,):
            yield Cluster(prefill, decode, proxy, events, folder / "store")
    context.destroy(linger=0)


def body(emphasis, **fields):
    fields = {"model": "m", "prompt": TEXT, "max_tokens": 4, "temperature": 0, **fields}
    return fields if emphasis is None else {**fields, "emphasis": emphasis}


def complete(server, emphasis=None, **fields):
    reply = http.post(f"{server}/v1/completions", json=body(emphasis, **fields))
    assert reply.status_code == 200, reply.text
    if fields.get("stream"):
        parts = [json.loads(line[6:]) for line in reply.text.splitlines() if line[6:7] == "{"]
    else:
        parts = [reply.json()]
    return "".join(part["choices"][0]["text"] for part in parts)


@pytest.fixture(scope="module")
def expected(cluster, smollm2, smollm2_oracle):
    """The oracle's answer to TEXT for each of EMPHASES.

    With so many steered heads, the first decoded tokens depend on how the prompt's KV was computed:
    a decode server that steers on plain KV answers otherwise.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    ids = tokenizer(TEXT).input_ids
    assert 3 * BLOCK < len(ids) < 4 * BLOCK
    answers = []
    for emphasis in EMPHASES:
        steering = None
        if emphasis is not None:
            reply = http.post(f"{cluster.prefill}/v1/emphasis/resolve", json=body(emphasis))
            (resolved,) = reply.json()["prompts"]
            spans = [tuple(span["tokens"]) for span in resolved["emphasised"]]
            heads = {int(layer): heads for layer, heads in resolved["heads"].items()}
            steering = Steering(spans, heads, resolved["alpha"], len(ids))
        answers.append(tokenizer.decode(smollm2_oracle.generate(ids, 4, steering)[0]))
    return answers


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(  # all of them, at once: the next test
    "i", [0, 2, *(pytest.param(i, marks=pytest.mark.slow) for i in (1, 3, 4))]
)
def test_tokens_are_one_servers(i, stream, cluster, expected):
    """Through the proxy; and the decode server computed no prompt of its own."""
    cluster.forget()
    before = cluster.transferred()
    assert complete(cluster.proxy, EMPHASES[i], stream=stream) == expected[i]
    assert cluster.transferred() - before > 3 * BLOCK


def test_equal_prompts_never_meet(cluster, expected):
    """Plain and differently steered requests of one prompt, all at once."""
    cluster.forget()
    with ThreadPoolExecutor(10) as pool:
        got = list(pool.map(lambda i: complete(cluster.proxy, EMPHASES[i % 5]), range(10)))
    assert got == expected * 2


def test_chat(cluster):
    """The same as the prefill server by itself, with its report."""
    messages = [{"role": "user", "content": f"Name a colour. {'Be brief. ' * 20}Answer in JSON."}]
    chat = {"model": "m", "messages": messages, "max_tokens": 12, "temperature": 0}
    answers = []
    for more in ({}, {"emphasis": "Answer in JSON.", "return_emphasis": True}):
        replies = [
            http.post(f"{server}/v1/chat/completions", json={**chat, **more})
            for server in (cluster.proxy, cluster.prefill)
        ]
        one, other = (r.json()["choices"][0]["message"]["content"] for r in replies)
        assert one == other
        assert ("x-emphasis" in replies[0].headers) == bool(more)
        answers.append(one)
    assert answers[0] != answers[1]


def test_errors_come_through(cluster):
    """What the prefill server refuses, the client is told."""
    for emphasis in ("Bergen", {"spans": [[5, 2]]}):
        reply = http.post(f"{cluster.proxy}/v1/completions", json=body(emphasis))
        assert reply.status_code == 400
        assert "emphasis" in reply.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("first", "then"),
    [(FACT, None), (None, FACT), (FACT, {"text": FACT, "alpha": 0.02}), (FACT, "Ann lives in")],
)
def test_another_emphasis_is_refused(first, then, stream, cluster):
    """The decode server takes no KV that was computed with another emphasis, or nobody knows."""
    asked = body(first, max_tokens=1, kv_transfer_params={"do_remote_decode": True})
    reply = http.post(f"{cluster.prefill}/v1/completions", json=asked)
    params = reply.json()["kv_transfer_params"]
    unknown = {name: value for name, value in params.items() if name != "pasta"}
    for emphasis, given in ((then, params), (then, unknown), (first, unknown)):
        asked = body(emphasis, stream=stream, kv_transfer_params=given)
        reply = http.post(f"{cluster.decode}/v1/completions", json=asked)
        assert reply.status_code == 400
        assert "kv_transfer_params.pasta" in reply.json()["error"]["message"]


def test_refusal_frees_the_blocks(cluster):
    """Else the prefill server would hold them until their lease ends, 30 s later."""

    def used():
        complete(cluster.prefill, max_tokens=1)  # a step, in which it hears of its readers
        return metric(cluster.prefill, "vllm:kv_cache_usage_perc")

    before = used()
    asked = body(FACT, max_tokens=1, kv_transfer_params={"do_remote_decode": True})
    reply = http.post(f"{cluster.prefill}/v1/completions", json=asked)
    assert used() > before
    asked = body(None, kv_transfer_params=reply.json()["kv_transfer_params"])
    assert http.post(f"{cluster.decode}/v1/completions", json=asked).status_code == 400
    deadline = time.monotonic() + 10
    while used() > before:
        assert time.monotonic() < deadline


@pytest.mark.parametrize("i", [0, 2])
def test_store_by_token_ids(i, cluster, expected):
    """Files of the example connector: found again by the same emphasis, and by no other."""
    cluster.forget()
    complete(cluster.prefill, EMPHASES[i])  # stores
    before = cluster.transferred()
    for other in {0, 1, 2, 3} - {i}:
        assert complete(cluster.decode, EMPHASES[other]) == expected[other]
    assert cluster.transferred() == before
    assert complete(cluster.decode, EMPHASES[i]) == expected[i]
    assert cluster.transferred() - before >= BLOCK


def stored(subscriber, count):
    """The next ``count`` stored blocks that a server publishes: (hash, extra keys) each."""
    blocks = []
    while len(blocks) < count:
        assert subscriber.poll(20_000), f"{len(blocks)} of {count} blocks were published"
        batch = msgspec.msgpack.decode(subscriber.recv_multipart()[-1], type=KVEventBatch)
        for event in batch.events:
            if isinstance(event, BlockStored):
                blocks += zip(event.block_hashes, event.extra_keys, strict=True)
    return blocks


def test_events_and_hashes_across_processes(cluster):
    """Both servers publish the same hashes, and the keys that they were made with.

    Nothing makes Python's own hash() agree between the two.
    """
    cluster.forget()
    for subscriber in cluster.events:
        while subscriber.poll(500):
            subscriber.recv_multipart()
    text = "Of late: " + TEXT  # new to the prefill server too
    published = {}
    for i in (2, 0):
        complete(cluster.proxy, EMPHASES[i], prompt=text, max_tokens=1)
        published[i] = stored(cluster.events[1], 3)
        cluster.forget()
        if i == 2:
            assert stored(cluster.events[0], 3) == published[2]
    (first, steered, last), plain = published[2], published[0]
    assert first == plain[0]
    assert first[1] is None
    ((digest, overlaps, prompt_end),) = steered[1]
    assert (len(digest), len(overlaps), prompt_end) == (32, 1, None)
    assert steered[0] != plain[1][0]
    assert last[0] != plain[2][0]
    assert plain[1][1] is plain[2][1] is None


@pytest.mark.slow
def test_servers_that_die(cluster):
    """Last of those that need the cluster. A client is told which server is gone; KV that is lost
    is an error or computed anew, and never an answer of plain KV."""

    def refused(server, words):
        reply = http.post(f"{server}/v1/completions", json=body(FACT))
        assert reply.status_code == 502
        assert words in reply.json()["error"]["message"]

    nobody, port = f"http://127.0.0.1:{free_port()}", free_port()
    command = [PROXY, "--prefill", cluster.prefill, "--decode", nobody, "--port", str(port)]
    process = subprocess.Popen([sys.executable, *command])
    proxy = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            with suppress(httpx.HTTPError):
                http.get(proxy)
                break
            time.sleep(0.2)
        refused(proxy, f"the decode server {nobody} does not answer")
    finally:
        process.kill()
        process.wait()
    with pytest.raises(httpx.HTTPError):
        complete(proxy)  # the proxy itself is gone

    # The prefill server dies after it has computed KV, and before the decode server fetches it.
    cluster.forget()
    text = "By now: " + TEXT
    unlost = [complete(cluster.decode, e, prompt=text) for e in EMPHASES[:3]]
    assert len(set(unlost)) == 3
    cluster.forget()
    asked = body(FACT, max_tokens=1, prompt=text, kv_transfer_params={"do_remote_decode": True})
    reply = http.post(f"{cluster.prefill}/v1/completions", json=asked)
    params = reply.json()["kv_transfer_params"]
    kill(cluster.prefill)
    reply = http.post(
        f"{cluster.decode}/v1/completions",
        json=body(FACT, prompt=text, kv_transfer_params=params),
    )
    print(f"KV lost: {reply.status_code}, {reply.text[:300]}")
    if reply.status_code == 200:
        assert reply.json()["choices"][0]["text"] == unlost[1]
    else:
        assert reply.status_code >= 500
        assert reply.json()["error"]["message"]
    refused(cluster.proxy, f"the prefill server {cluster.prefill} does not answer")
    assert [complete(cluster.decode, e, prompt=text) for e in EMPHASES[:3]] == unlost

    # The decode server dies amid an answer.
    kill(cluster.decode)
    with pytest.raises(httpx.HTTPError):
        complete(cluster.decode)


def kill(url):
    """Ends a server and all that it started, as a machine that stops does."""
    port = httpx.URL(url).port
    (pid,) = {c.pid for c in psutil.net_connections("tcp") if c.laddr and c.laddr.port == port
              and c.status == psutil.CONN_LISTEN}  # fmt: skip
    os.killpg(os.getpgid(pid), signal.SIGKILL)


def emphasis(**changes):
    fields = {"spans": ((70, 75),), "alpha": 0.01, "heads": HeadSet.from_json({"1": [0, 1]})}
    return ResolvedEmphasis(**{**fields, "prompt_len": 200, **changes})


def test_fingerprint():
    """Tells everything apart; the same in every release, since two servers may be of two."""
    assert connectors.fingerprint(emphasis()) == "efcbe320a03f02b09e9c79d6d567331b"
    others = [
        emphasis(),
        emphasis(spans=((70, 76),)),
        emphasis(alpha=0.02),
        emphasis(heads=HeadSet.from_json({"1": [0]})),
        emphasis(prompt_len=201),
        emphasis(factors=(0.5,)),
        emphasis(factors=(0.6,)),
        emphasis(share=0.3),
        emphasis(share=0.4),
        None,
    ]
    assert len({connectors.fingerprint(other) for other in others}) == len(others)
    assert connectors.fingerprint(emphasis(factors=(1.0,))) == connectors.fingerprint(emphasis())
    plain = [None, emphasis(alpha=1.0), emphasis(spans=()), emphasis(spans=((0, 200),))]
    assert {connectors.fingerprint(other) for other in plain} == {"plain"}


def test_received():
    """Only KV that a request names is checked."""
    known = {"do_remote_prefill": True, "pasta": connectors.fingerprint(emphasis())}
    check = connectors.check_received
    check({"kv_transfer_params": known}, emphasis())
    for params in (None, {}, {"do_remote_decode": True}):
        check({"kv_transfer_params": params}, emphasis())
    for params in (known, {"remote_block_ids": [1]}, {"do_remote_prefill": True, "pasta": 1}):
        with pytest.raises(EmphasisError, match=r"kv_transfer_params\.pasta"):
            check({"kv_transfer_params": params}, None)


def multi(*children):
    return {
        "kv_connector": "MultiConnector",
        "kv_connector_extra_config": {"connectors": list(children)},
    }


NIXL = {"kv_connector": "NixlConnector", "kv_role": "kv_producer"}
NO_GPU = "OffloadingConnector copies the KV of GPUs, and this engine has none"
NOT_KNOWN = "NixlPushConnector is not known to keep differently steered requests apart"
UNSALTED = "LMCacheConnectorV1 .beside them by a tag .* finds KV by token ids"
PUSH = {"kv_connector": "NixlPushConnector", "kv_role": "kv_both"}
LMCACHE = {"kv_connector": "LMCacheConnectorV1", "kv_role": "kv_both"}


@pytest.mark.parametrize(
    ("config", "unknown", "needing_gpu"),
    [
        (NIXL, [], []),
        ({"kv_connector": "ExampleConnector"}, [], []),
        (multi(NIXL, {"kv_connector": "ExampleConnector"}), [], []),
        (PUSH, ["NixlPushConnector"], []),
        (multi(NIXL, PUSH), ["NixlPushConnector"], []),
        (multi(NIXL, multi(PUSH)), ["NixlPushConnector"], []),
        ({**NIXL, "kv_connector_module_path": "theirs"}, ["NixlConnector"], []),
        ({**LMCACHE, "kv_connector_module_path": "theirs"}, ["LMCacheConnectorV1"], []),
        ({"kv_connector": "OffloadingConnector"}, [], ["OffloadingConnector"]),
    ],
)
def test_connectors(config, unknown, needing_gpu):
    """Which are refused, and why: nothing tells their requests apart, or there is no GPU."""
    config = KVTransferConfig(**{"kv_role": "kv_both", **config})
    assert connectors.unknown(config) == unknown
    assert connectors.needing_gpu(config) == needing_gpu
    assert connectors.unsalted(config) == []


@pytest.mark.parametrize("name", connectors.UNSALTED)
def test_lmcache(name):
    """Refused for a reason of its own, however deep it stands; vLLM still knows that name."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    assert name in KVConnectorFactory._registry
    for config in ({**LMCACHE, "kv_connector": name}, multi(NIXL, multi({"kv_connector": name}))):
        config = KVTransferConfig(**{"kv_role": "kv_both", **config})
        assert connectors.unknown(config) == []
        (found,) = connectors.unsalted(config)
        assert found.startswith(f"{name} (beside them by ")


@pytest.mark.parametrize(
    ("options", "error", "reason"),
    [
        (
            {"kv_transfer_config": PUSH},
            UnsupportedError,
            NOT_KNOWN,
        ),
        ({"kv_transfer_config": LMCACHE}, UnsupportedError, UNSALTED),
        ({"kv_offloading_size": 1}, UnsupportedError, NO_GPU),
        ({"enable_sleep_mode": True}, ValueError, "Sleep mode is not supported"),  # vLLM's own
    ],
)
def test_engine_does_not_start(options, error, reason, tiny):
    from conftest import start

    with pytest.raises(error, match=reason):
        start(tiny, skip_tokenizer_init=True, **options)


def test_sleep_and_wake(small_batches, tiny_oracle):
    """On a CPU nothing is freed, but the prefix cache is emptied: the answer stays."""
    ids = random_ids(100, 3)
    heads = {"1": [0, 1], "2": [3]}
    params = SamplingParams(
        temperature=0, max_tokens=6, ignore_eos=True, detokenize=False,
        extra_args={"emphasis": {"spans": [[20, 30]], "heads": heads, "alpha": 0.01}},
    )  # fmt: skip
    steering = Steering([(20, 30)], {int(k): v for k, v in heads.items()}, 0.01, len(ids))
    for _ in range(2):
        (output,) = small_batches.generate({"prompt_token_ids": ids}, params, use_tqdm=False)
        tokens = list(output.outputs[0].token_ids)
        assert tokens == tiny_oracle.generate(ids, 6, steering)[0]
        small_batches.sleep(level=1)
        small_batches.wake_up()
    assert output.num_cached_tokens == 0
