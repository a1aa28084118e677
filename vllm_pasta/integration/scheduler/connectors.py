"""KV that leaves the engine: which KV connectors may carry it, and what keeps it apart.

A prompt's KV is right for one emphasis alone. What a connector finds KV by decides what is needed:

- **its request** (NIXL): the decode server is told which blocks of the prefill server are its own.
  Nothing is shared, but a proxy that sends the two servers different emphasis would join KV of one
  with decoding of the other. So the prefill server's ``kv_transfer_params`` carry a fingerprint of
  the emphasis, and the decode server refuses a request whose own differs.
- **block hashes** (offloading, Mooncake's store): these know of emphasis, see `cache_keys`.
- **token ids** (vLLM's example connector): these do not, so the keys of steered requests are salted
  with the fingerprint.

A connector that is not known to be one of these is refused, and so is LMCache, whose keys are of
token ids: a salt of steered requests could reach them, but no test shows it.
"""

import copy
import enum
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from vllm.platforms import current_platform

from vllm_pasta.errors import EmphasisError
from vllm_pasta.integration.config import is_enabled
from vllm_pasta.integration.patching import Patch
from vllm_pasta.integration.scheduler.cache_keys import TAG
from vllm_pasta.request.resolution import ResolvedEmphasis

if TYPE_CHECKING:
    from vllm.config import KVTransferConfig


class Keyed(enum.Enum):
    """What a connector finds KV by."""

    REQUEST = enum.auto()
    BLOCK_HASH = enum.auto()
    TOKEN_IDS = enum.auto()


CONNECTORS = {
    "NixlConnector": Keyed.REQUEST,
    "NixlPullConnector": Keyed.REQUEST,
    "OffloadingConnector": Keyed.BLOCK_HASH,
    "SimpleCPUOffloadConnector": Keyed.BLOCK_HASH,
    "MooncakeStoreConnector": Keyed.BLOCK_HASH,
    "ExampleConnector": Keyed.TOKEN_IDS,
}
"""Connectors of vLLM that may carry steered KV, by their registered names."""

UNSALTED = {
    "LMCacheConnectorV1": "a tag in kv_transfer_params (lmcache.tag.NAME)",
    "LMCacheMPConnector": "the request's cache_salt",
}
"""Connectors that find KV by token ids and something else, which the plugin does not set."""

PLAIN = "plain"
"""Fingerprint of a request without emphasis, or with one that changes nothing."""

FIELD = f"kv_transfer_params.{TAG}"


def fingerprint(emphasis: ResolvedEmphasis | None) -> str:
    """`ResolvedEmphasis.fingerprint`, or `PLAIN` where nothing is steered."""
    return PLAIN if emphasis is None or emphasis.is_plain else emphasis.fingerprint


def unknown(config: "KVTransferConfig | None") -> list[str]:
    """The connectors of an engine that are not known to keep steered requests apart."""
    return [
        name
        for name, module_path in _configured(config)
        if module_path is not None or name not in (*CONNECTORS, *UNSALTED)
    ]


def unsalted(config: "KVTransferConfig | None") -> list[str]:
    """The connectors of an engine that are of `UNSALTED`, with what they find KV by beside token
    ids."""
    return [
        f"{name} (beside them by {UNSALTED[name]})"
        for name, module_path in _configured(config)
        if module_path is None and name in UNSALTED
    ]


def needing_gpu(config: "KVTransferConfig | None") -> list[str]:
    """The connectors of an engine without a GPU that copy the KV of GPUs."""
    if not current_platform.is_cpu():
        return []
    return [
        name
        for name, module_path in _configured(config)
        if module_path is None and CONNECTORS.get(name) is Keyed.BLOCK_HASH
    ]


def takes_kv_by_request(config: "KVTransferConfig | None") -> bool:
    """Whether requests to this engine may name KV of another one."""
    return any(CONNECTORS.get(name) is Keyed.REQUEST for name, _ in _configured(config))


def check_received(extra_args: Mapping[str, Any], emphasis: ResolvedEmphasis | None) -> None:
    """Checks that the KV a request names was computed with the very same emphasis.

    Args:
        extra_args: Of the request's sampling params; ``kv_transfer_params`` are what the prefill
            server returned.
        emphasis: What the request resolved to here.

    Raises:
        EmphasisError: it was computed with another emphasis, or nobody can tell.
    """
    params = extra_args.get("kv_transfer_params")
    if not isinstance(params, Mapping):
        return
    if not (params.get("do_remote_prefill") or params.get("remote_block_ids")):
        return
    theirs, ours = params.get(TAG), fingerprint(emphasis)
    if theirs is None:
        raise EmphasisError(
            "the server that computed this KV does not say with which emphasis; start it with "
            "emphasis on too (--plugin pasta), and pass kv_transfer_params on as it returns them",
            field=FIELD,
        )
    if theirs != ours:
        raise EmphasisError(
            f"the KV was computed with another emphasis ({theirs!s:.32}) than this request has "
            f"here ({ours}); send both servers the same body, and start them with the same "
            "emphasis configuration",
            field=FIELD,
        )


def honouring(connector: type, config: "KVTransferConfig") -> type:
    """The class to use in a connector's place: the same, and it keeps emphasis apart."""
    keyed = CONNECTORS.get(config.kv_connector or "")
    if config.kv_connector_module_path is None and keyed in _MIXINS:
        return _mixed(_MIXINS[keyed], connector)
    return connector


class _Fingerprinted:
    """What the prefill server returns says with which emphasis the KV was computed."""

    _vllm_config: Any

    def request_finished(self, request: Any, *args: Any) -> Any:
        return self._said(request, super().request_finished(request, *args))  # type: ignore[misc]

    def request_finished_all_groups(self, request: Any, *args: Any) -> Any:
        return self._said(
            request,
            super().request_finished_all_groups(request, *args),  # type: ignore[misc]
        )

    def _said(self, request: Any, result: tuple[bool, dict[str, Any] | None]) -> Any:
        delay_free, params = result
        if params and is_enabled(self._vllm_config):
            params = {
                **params,
                TAG: fingerprint(ResolvedEmphasis.carried_by(request.sampling_params)),
            }
        return delay_free, params


class _Salted:
    """vLLM's example connector, whose keys are hashes of token ids and of multimodal identifiers.

    The only inputs of a key that can tell requests apart are the latter, so a steered request is
    shown to it with one more.
    """

    def _found_match_for_request(self, request: Any) -> Any:
        return super()._found_match_for_request(_salted(request))  # type: ignore[misc]

    def update_state_after_alloc(self, request: Any, *args: Any) -> None:
        super().update_state_after_alloc(_salted(request), *args)  # type: ignore[misc]

    def build_connector_meta(self, scheduler_output: Any) -> Any:
        output = copy.copy(scheduler_output)
        output.scheduled_new_reqs = [_salted(r) for r in scheduler_output.scheduled_new_reqs]
        return super().build_connector_meta(output)  # type: ignore[misc]


_MIXINS: dict[Keyed | None, type] = {Keyed.REQUEST: _Fingerprinted, Keyed.TOKEN_IDS: _Salted}


@functools.cache
def _mixed(mixin: type, connector: type) -> type:
    # With its own name, by which vLLM's MultiConnector looks up statistics.
    return type(connector.__name__, (mixin, connector), {"__doc__": mixin.__doc__})


class _Salt:
    """Stands in for a multimodal feature, as far as the example connector reads one."""

    def __init__(self, identifier: str) -> None:
        self.identifier = identifier


def _salted(request: Any) -> Any:
    """The request, or a copy with one more identifier if it is steered."""
    emphasis = ResolvedEmphasis.carried_by(request.sampling_params)
    if emphasis is None:
        return request
    view = copy.copy(request)
    view.mm_features = [*request.mm_features, _Salt(f"{TAG}-{fingerprint(emphasis)}")]
    return view


def _configured(config: "KVTransferConfig | None") -> Iterator[tuple[str, str | None]]:
    """Name and module path of each connector of an engine; a MultiConnector's children for it."""
    if config is not None and config.kv_connector is not None:
        yield from _named(
            config.kv_connector, config.kv_connector_module_path, config.kv_connector_extra_config
        )


def _named(
    name: str, module_path: str | None, extra_config: Mapping[str, Any]
) -> Iterator[tuple[str, str | None]]:
    if name != "MultiConnector" or module_path is not None:
        yield name, module_path
        return
    for child in extra_config.get("connectors") or ():
        yield from _named(
            str(child.get("kv_connector")),
            child.get("kv_connector_module_path"),
            child.get("kv_connector_extra_config") or {},
        )


def _get_connector_class(original: Callable[..., Any], cls: Any, kv_transfer_config: Any) -> Any:
    return honouring(original(cls, kv_transfer_config), kv_transfer_config)


PATCHES = (
    Patch(
        "vllm.distributed.kv_transfer.kv_connector.factory:KVConnectorFactory.get_connector_class",
        _get_connector_class,
        "006f844582d8",
        "kv_connector_class",
    ),
)
HOOKS = {"kv_connector_class": honouring}
