"""What finds KV by block hashes shares it as the prefix cache does: offloading, and stores.

Broken by: a hash that does not know of emphasis; a connector whose keys are of something else.
"""

import inspect
import sys
from itertools import combinations

import prepared
import pytest
from vllm import SamplingParams
from vllm.distributed.kv_transfer.kv_connector.v1.mooncake.store import data as mooncake
from vllm.plugins import load_general_plugins
from vllm.utils.hashing import sha256
from vllm.v1.core import kv_cache_utils
from vllm.v1.kv_offload.base import make_offload_key
from vllm.v1.request import Request

from vllm_pasta import HeadSet, ResolvedEmphasis
from vllm_pasta.integration.scheduler.connectors import CONNECTORS, Keyed
from vllm_pasta.request.resolution import WIRE_KEY

BLOCK, PROMPT = 16, list(range(10, 106))  # six blocks
EMPHASES = {  # and how many of its blocks come before the first emphasised token
    "plain": (None, 6),
    "early": (((20, 24),), 1),
    "late": (((50, 60), (90, 92)), 3),
    "late, other alpha": (((50, 60), (90, 92)), 3),
    "late, other heads": (((50, 60), (90, 92)), 3),
    "late, other end": (((50, 61), (90, 92)), 3),
}

KEYS = {  # connector -> its keys of a request's blocks
    "OffloadingConnector": lambda hashes: [make_offload_key(h, 0) for h in hashes],
    "SimpleCPUOffloadConnector": lambda hashes: [
        kv_cache_utils.make_block_hash_with_group_id(h, 0) for h in hashes
    ],
    "MooncakeStoreConnector": lambda hashes: list(
        mooncake.chunk_hashes_for_block_size(hashes, BLOCK, BLOCK)
    ),
}


def request(name, lookahead=0):
    """A request of the engine core, as the front end leaves it, with its block hashes."""
    load_general_plugins()
    kv_cache_utils.init_none_hash(sha256)
    spans, _ = EMPHASES[name]
    extra = {}
    if spans:
        alpha = 0.1 if "alpha" in name else 0.01
        heads = HeadSet.from_json({"1": [1] if "heads" in name else [0]})
        extra[WIRE_KEY] = ResolvedEmphasis(spans, alpha, heads, len(PROMPT)).to_wire()
    options = [lookahead] if lookahead else []
    return Request(
        name, PROMPT, SamplingParams(extra_args=extra or None), None,
        block_hasher=kv_cache_utils.get_request_block_hasher(
            BLOCK, sha256, *options
        ),
    )  # fmt: skip


def shared(a, b):
    """How many blocks two requests share from the first on; none after one that they do not."""
    equal = [x == y for x, y in zip(a, b, strict=True)]
    count = equal.index(False) if False in equal else len(equal)
    assert not any(equal[count:])
    return count


@pytest.mark.parametrize("connector", KEYS)
def test_connectors_by_block_hash(connector):
    """Equal requests share all; others what comes before the first emphasised token of either."""
    assert CONNECTORS[connector] is Keyed.BLOCK_HASH
    keys = {name: KEYS[connector](request(name).block_hashes) for name in EMPHASES}
    assert all(keys[name] == KEYS[connector](request(name).block_hashes) for name in keys)
    for a, b in combinations(EMPHASES, 2):
        assert shared(keys[a], keys[b]) == min(EMPHASES[a][1], EMPHASES[b][1]), (a, b)


def test_all_are_tested():
    assert {name for name, keyed in CONNECTORS.items() if keyed is Keyed.BLOCK_HASH} == set(KEYS)


@pytest.mark.parametrize("tokens", [1, 3])
def test_hashes_that_look_ahead(tokens):
    """vLLM 0.33 hashes a block with the tokens after it, on which a draft's KV depends. A block
    that looks into an emphasised range is shared with none that does not."""
    hasher = kv_cache_utils.get_request_block_hasher
    if "num_hash_lookahead_tokens" not in inspect.signature(hasher).parameters:
        pytest.skip("this vLLM's block hashes do not look ahead")
    hashes = {name: request(name, tokens).block_hashes for name in EMPHASES}
    assert len(hashes["plain"]) == 5  # the last block's next token is not there yet
    for a, b in combinations(EMPHASES, 2):
        first = min(EMPHASES[name][0][0][0] for name in (a, b) if EMPHASES[name][0])
        if (a, b) == ("late", "late, other end"):
            first = 60  # up to there they are the same
        expected = next(i for i in range(6) if (i + 1) * BLOCK + tokens > first)
        assert shared(hashes[a], hashes[b]) == expected, (a, b)


def test_events_of_simple_offloading():
    """Its module imports vLLM's function by name, with its connector: after the plugin."""
    code = (
        "import sys; import vllm.v1.engine.core, vllm.entrypoints.llm;"
        "name = 'vllm.v1.simple_kv_offload.manager'; assert name not in sys.modules;"
        "from vllm.plugins import load_general_plugins; load_general_plugins();"
        "import vllm.distributed.kv_transfer.kv_connector.v1.simple_cpu_offload_connector;"
        "keys = sys.modules[name].generate_block_hash_extra_keys;"
        "print(hasattr(keys, '_vllm_pasta_original'))"
    )
    done = prepared.run([sys.executable, "-c", code])
    assert done.stdout.splitlines()[-1:] == ["True"], done.stderr[-3000:]
