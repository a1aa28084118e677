"""Where a request's emphasis is resolved or refused, before it runs: the one way in.

Both ``LLM`` and the server pass here with the prompt's token ids and the sampling params. What
leaves carries a resolved emphasis under ``WIRE_KEY``, or none at all.
"""

import copy
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams

from vllm_pasta.emphasis import KEY, MAX_SPANS, Emphasis, ResolvedEmphasis, has_emphasis, union
from vllm_pasta.errors import EmphasisError, HeadSetError
from vllm_pasta.heads import HeadSet
from vllm_pasta.integration import support
from vllm_pasta.integration.config import PastaConfig
from vllm_pasta.spans import Offsets, decoded_offsets, find_text, to_tokens

if TYPE_CHECKING:
    from vllm.config import VllmConfig

WIRE_KEY = "_vllm_pasta"
"""Key in ``SamplingParams.extra_args`` of the resolved emphasis, in its wire form."""


class Admitted(dict[str, Any]):
    """A resolved emphasis in wire form that `Admission` itself made; users cannot send one."""


class AdmissionError(VLLMValidationError, EmphasisError):
    """A refused request: HTTP 400 on the server, a ``ValueError`` offline."""

    def __init__(self, message: str) -> None:
        VLLMValidationError.__init__(self, message)
        self.field = None

    def __str__(self) -> str:
        return str(self.args[0])


class Admission:
    """Resolves the emphasis of every request of one engine.

    Args:
        vllm_config: The engine's.
        get_tokenizer: Gives the engine's tokenizer, or None; called when first needed.

    Raises:
        UnsupportedError: emphasis is on, and the engine cannot honour it.
        ConfigError, HeadSetError: the configuration is malformed or does not fit the model.
    """

    def __init__(self, vllm_config: "VllmConfig", get_tokenizer: Callable[[], Any]) -> None:
        self._config = PastaConfig.of(vllm_config)
        self._get_tokenizer = get_tokenizer
        self._tokenizer: Any = None
        self._lock = threading.Lock()
        if self._config is not None:
            support.check_engine(vllm_config)
            model, parallel = vllm_config.model_config, vllm_config.parallel_config
            self._num_layers = model.get_total_num_hidden_layers()
            self._num_heads = (
                model.get_num_attention_heads(parallel) * parallel.tensor_parallel_size
            )
            if self._config.heads is not None:
                self._config.heads.check(self._num_layers, self._num_heads)

    def admit(
        self,
        params: Any,
        token_ids: Sequence[int] | None,
        text: str | None,
        *,
        resumable: bool = False,
    ) -> Any:
        """Resolves ``params``' emphasis for one prompt.

        Args:
            params: The request's; never changed.
            token_ids: The prompt's.
            text: The prompt's text, if known; need not be what was tokenised.
            resumable: Whether more prompt will follow.

        Returns:
            ``params`` itself where there is nothing to resolve, else a copy.

        Raises:
            AdmissionError: the emphasis is malformed, or cannot be honoured.
        """
        extra_args = getattr(params, "extra_args", None) or getattr(params, "extra_kwargs", None)
        if not extra_args or isinstance(extra_args.get(WIRE_KEY), Admitted):
            return params
        if WIRE_KEY in extra_args:
            raise AdmissionError(f"{WIRE_KEY} is reserved; send `{KEY}`")
        if not has_emphasis(extra_args):
            return params
        try:
            resolved = self._resolve(params, extra_args, token_ids, text, resumable)
        except EmphasisError as e:
            raise AdmissionError(str(e)) from None
        admitted = copy.copy(params)
        admitted.extra_args = {k: v for k, v in extra_args.items() if not k.startswith(KEY)}
        if not resolved.is_plain:
            admitted.extra_args[WIRE_KEY] = Admitted(resolved.to_wire())
        return admitted

    def _resolve(
        self,
        params: Any,
        extra_args: Mapping[str, Any],
        token_ids: Sequence[int] | None,
        text: str | None,
        resumable: bool,
    ) -> ResolvedEmphasis:
        if self._config is None:
            raise EmphasisError(
                "this engine does not honour emphasis: start it with --plugin pasta, or with "
                "additional_config={'pasta': {…}}",
                field=KEY,
            )
        emphasis = Emphasis.parse(extra_args)
        assert emphasis is not None
        if not isinstance(params, SamplingParams):
            raise EmphasisError("expected a generation request, got a pooling request", field=KEY)
        if resumable:
            raise EmphasisError("a prompt that arrives in parts cannot be emphasised", field=KEY)
        if token_ids is None:
            raise EmphasisError("a prompt of embeddings cannot be emphasised", field=KEY)
        heads = self._heads(emphasis.heads)
        spans = list(emphasis.spans)
        for i, (start, end) in enumerate(spans):
            if end > len(token_ids):
                raise EmphasisError(
                    f"expected an end of at most {len(token_ids)}, the prompt's number of "
                    f"tokens, got [{start}, {end}]",
                    field=f"emphasis.spans[{i}]",
                )
        if emphasis.text:
            prompt, offsets = self._offsets(token_ids, text)
            for i, needle in enumerate(emphasis.text):
                field = f"emphasis.text[{i}]"
                spans.append(to_tokens(offsets, *find_text(prompt, needle, field), field))
        assert len(spans) <= MAX_SPANS
        return ResolvedEmphasis(
            spans=union(spans),
            alpha=self._config.alpha if emphasis.alpha is None else emphasis.alpha,
            heads=heads,
            prompt_len=len(token_ids),
        )

    def _heads(self, wanted: HeadSet | str | None) -> HeadSet:
        assert self._config is not None
        known = ", ".join(sorted(self._config.head_sets)) or "none"
        sizes = f"this model has {self._num_layers} layers of {self._num_heads} query heads"
        if wanted is None:
            if self._config.heads is None:
                raise EmphasisError(
                    "no head set: the request gives none and the server has no default. Give "
                    f'{{"layer": [heads]}} or a name; known head sets: {known}; {sizes}',
                    field="emphasis.heads",
                )
            return self._config.heads
        if isinstance(wanted, str):
            if wanted not in self._config.head_sets:
                raise EmphasisError(
                    f"unknown head set {wanted!r:.80}; known head sets: {known}; {sizes}",
                    field="emphasis.heads",
                )
            wanted = self._config.head_sets[wanted]
        try:
            wanted.check(self._num_layers, self._num_heads)
        except HeadSetError as e:
            raise EmphasisError(f"{e}; known head sets: {known}", field="emphasis.heads") from None
        return wanted

    def _offsets(self, token_ids: Sequence[int], text: str | None) -> tuple[str, Offsets]:
        """The prompt's text as the model sees it, and each token's characters in it."""
        ids = list(token_ids)
        with self._lock:  # fast tokenizers cannot be shared between threads, so this is a copy
            if self._tokenizer is None:
                tokenizer = self._get_tokenizer()
                if tokenizer is None:
                    raise EmphasisError(
                        "the engine runs without a tokenizer, so text cannot be found; "
                        "give `spans`",
                        field="emphasis.text",
                    )
                self._tokenizer = copy.deepcopy(tokenizer)
            tokenizer = self._tokenizer

            def decode(part: list[int]) -> str:
                return str(tokenizer.decode(part, skip_special_tokens=False))

            candidates = [decode(ids)] if text is None else [text, decode(ids)]
            if getattr(tokenizer, "is_fast", False):
                for candidate in candidates:
                    for special in (True, False):
                        encoded = tokenizer(
                            candidate, add_special_tokens=special, return_offsets_mapping=True
                        )
                        if encoded["input_ids"] == ids:
                            return candidate, encoded["offset_mapping"]
            return decoded_offsets(ids, decode)
