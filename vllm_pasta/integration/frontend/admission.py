"""Where a request's emphasis is resolved or refused, before it runs: the one way in.

Both ``LLM`` and the server pass here with the prompt's token ids and the sampling params. What
leaves carries a resolved emphasis under ``WIRE_KEY``, or none at all.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from vllm.exceptions import VLLMValidationError
from vllm.logger import init_logger
from vllm.sampling_params import BeamSearchParams, SamplingParams
from vllm.tokenizers.hf import ThreadSafeHFTokenizerMixin

from vllm_pasta.errors import EmphasisError, HeadSetError
from vllm_pasta.integration import support
from vllm_pasta.integration.config import PastaConfig, is_enabled
from vllm_pasta.integration.frontend import images, metrics
from vllm_pasta.integration.scheduler import connectors
from vllm_pasta.request.chat import Chat, Reading, read_messages, read_text
from vllm_pasta.request.emphasis import REFUSED_KEY, Emphasis, has_emphasis, is_ours
from vllm_pasta.request.head_sets.library import describe
from vllm_pasta.request.heads import HeadSet
from vllm_pasta.request.locate import CHAT_KEY, INDEX_KEY, READING_KEY, Locator
from vllm_pasta.request.markup import Markup
from vllm_pasta.request.resolution import (
    KEY,
    LEAST_FACTOR,
    WIRE_KEY,
    Resolution,
    ResolvedEmphasis,
    check_share,
    strongest,
)
from vllm_pasta.request.shape import ModelShape

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger(f"vllm.{__name__}")  # vLLM shows what is below its own name alone


class Admitted(dict[str, Any]):
    """A resolved emphasis in wire form that `Admission` itself made; users cannot send one."""


def _extra_args(params: Any) -> Mapping[str, Any]:
    return getattr(params, "extra_args", None) or getattr(params, "extra_kwargs", None) or {}


def _with_wire(params: Any, wire: Admitted) -> Any:
    """A copy of ``params`` that carries ``wire``, and no other field of this plugin."""
    admitted = copy.copy(params)
    admitted.extra_args = {k: v for k, v in _extra_args(params).items() if not is_ours(k)}
    admitted.extra_args[WIRE_KEY] = wire
    return admitted


class AdmissionError(VLLMValidationError, EmphasisError):
    """A refused request: HTTP 400 on the server, a ``ValueError`` offline."""

    def __init__(self, error: EmphasisError) -> None:
        VLLMValidationError.__init__(self, str(error))
        self.field = error.field

    def __str__(self) -> str:
        return str(self.args[0])


def _of_prompt(error: EmphasisError, index: tuple[int, int] | None) -> EmphasisError:
    """The same error, which says the prompt where a request has several."""
    if index is None:
        return error
    return EmphasisError(error.message, field=error.field, prompt=index[0])


def _token_ids(emphasis: Emphasis, prompt: Mapping[str, Any]) -> list[int]:
    """The prompt's token ids; for a prompt of embeddings as many zeros, of which only the number
    means anything.

    Raises:
        EmphasisError: the prompt is of neither kind, or embeddings are to be searched for text.
    """
    if prompt.get("type") in ("token", "multimodal"):
        return list(prompt["prompt_token_ids"])
    if prompt.get("type") != "embeds":
        raise EmphasisError(
            f"expected a prompt of tokens, got one of type {prompt.get('type')}", field=KEY
        )
    if emphasis.marks or emphasis.markup is not None or not emphasis.spans:
        raise EmphasisError(
            "a prompt of embeddings has no text in which a mark could be found; give `spans`, the "
            "positions of the embeddings to emphasise",
            field=KEY,
        )
    return list(prompt.get("prompt_token_ids") or [0] * len(prompt["prompt_embeds"]))


def _no_text(token_ids: list[int]) -> str:
    """In place of a decoder, for embeddings."""
    return ""


def _for_threads(tokenizer: Any) -> Any:
    """A tokenizer that can be used while vLLM uses its own in other threads: that one itself where
    vLLM has made a pool of it, as of every fast one, with a copy to spare. To copy a vocabulary of
    150,000 tokens takes seconds, in which a server answers nobody."""
    is_safe = isinstance(tokenizer, ThreadSafeHFTokenizerMixin)
    return tokenizer if is_safe else copy.deepcopy(tokenizer)


class Admission:
    """Resolves the emphasis of every request of one engine.

    Args:
        vllm_config: The engine's.
        get_tokenizer: Gives the engine's tokenizer, or None; called when first needed.
        get_renderer: Gives vLLM's renderer, or None.

    Attributes:
        config: The engine's configuration; None where emphasis is off.
        locator: Finds marks in prompts; decodes token ids.
        shape: The model's layers and heads; without any where emphasis is off.
        known: Names of the head sets that fit the model; none where emphasis is off.

    Raises:
        UnsupportedError: emphasis is on, and the engine cannot honour it.
        ConfigError, HeadSetError: the configuration is malformed or does not fit the model.
    """

    def __init__(
        self,
        vllm_config: "VllmConfig",
        get_tokenizer: Callable[[], Any],
        get_renderer: Callable[[], Any] = lambda: None,
    ) -> None:
        self.config: PastaConfig | None = None
        self.locator = Locator(lambda: _for_threads(get_tokenizer()))
        self._get_tokenizer = get_tokenizer
        self._get_renderer = get_renderer
        self._model_config = vllm_config.model_config
        self.shape = ModelShape(0, 0, ())
        self.known: list[str] = []
        self._takes_kv = False
        if is_enabled(vllm_config):
            support.check_engine(vllm_config)
            self._takes_kv = connectors.takes_kv_by_request(vllm_config.kv_transfer_config)
            model = support.model_of(vllm_config)
            self.shape = model.shape
            config = PastaConfig.of(vllm_config, model)
            self.config, self.known = config, config.names(model)
            if config.heads is not None:
                self.shape.check(config.heads)
                logger.info(
                    "Emphasis: requests that name no heads steer %s: %s.",
                    describe(config.heads),
                    config.origin,
                )

    def admit(self, params: Any, prompt: dict[str, Any], *, resumable: bool = False) -> Any:
        """Resolves ``params``' emphasis for one prompt.

        Args:
            params: The request's; never changed.
            prompt: The rendered prompt (vLLM's ``EngineInput``). Where markup is taken out of it,
                its ``prompt`` and ``prompt_token_ids`` are replaced in place.
            resumable: Whether more prompt will follow.

        Returns:
            ``params`` itself where there is nothing to resolve, else a copy.

        Raises:
            AdmissionError: the emphasis is malformed, or cannot be honoured.
        """
        extra_args = _extra_args(params)
        if isinstance(extra_args.get(WIRE_KEY), Admitted):
            return params
        if isinstance(beam := prompt.get(WIRE_KEY), Admitted):
            return _with_wire(params, beam)
        resolution = self.check(params, prompt, resumable=resumable)
        if resolution is None:
            # What asks for none, as one of several prompts may, must not reach a worker either.
            asked = has_emphasis(extra_args) and isinstance(params, SamplingParams)
            return _with_wire(params, Admitted()) if asked else params
        emphasis = resolution.emphasis
        # An empty form says that there is nothing to steer, and that we have been here.
        wire = Admitted({} if emphasis.is_plain else emphasis.to_wire())
        decode = self.locator.decode if prompt.get("prompt_token_ids") else _no_text
        if decode is not _no_text and resolution.token_ids != prompt["prompt_token_ids"]:
            assert resolution.text is not None
            prompt["prompt"] = resolution.text
            prompt["prompt_token_ids"] = resolution.token_ids
            prompt.pop("prompt_token_offsets", None)
        metrics.resolved(resolution, decode)
        return _with_wire(params, wire)

    def admit_beams(self, params: Any, prompt: dict[str, Any]) -> dict[str, Any]:
        """Resolves a beam search's emphasis, once, against its prompt.

        vLLM runs every step of every beam as a request of its own, whose prompt is the original
        prompt and what the beam has generated. Marks must not be searched in that, and its
        generated tokens are not to be scaled; so each of those prompts carries the resolved form.

        Args:
            params: vLLM's ``BeamSearchParams``, with an attribute ``extra_args`` if any.
            prompt: As for `admit`.

        Returns:
            ``prompt`` itself where there is nothing to resolve, else a copy that carries the
            resolved emphasis under ``WIRE_KEY``.

        Raises:
            AdmissionError: as `admit`.
        """
        wire = _extra_args(self.admit(params, prompt)).get(WIRE_KEY)
        return prompt if wire is None else {**prompt, WIRE_KEY: wire}

    def check(
        self, params: Any, prompt: Mapping[str, Any], *, resumable: bool = False
    ) -> Resolution | None:
        """As `admit`, but changes nothing; None where no emphasis is asked for."""
        extra_args = _extra_args(params)
        try:
            if WIRE_KEY in extra_args:
                raise EmphasisError(f"reserved; send `{KEY}`", field=WIRE_KEY)
            resolution = self.resolve(params, extra_args, prompt, resumable=resumable)
            if self._takes_kv:
                emphasis = None if resolution is None else resolution.emphasis
                connectors.check_received(extra_args, emphasis)
            return resolution
        except EmphasisError as e:
            metrics.refused(e.field)
            self.forget(prompt)
            raise AdmissionError(e) from None

    def forget(self, prompt: Mapping[str, Any]) -> None:
        """Undoes what vLLM keeps of a prompt that will not run."""
        images.forget(self._get_renderer(), prompt)

    def read(
        self,
        extra_args: Mapping[str, Any],
        prompt: Any,
        *,
        is_chat: bool,
        index: tuple[int, int] | None = None,
    ) -> tuple[Any, Reading] | None:
        """Reads markup in a prompt that is not tokens yet.

        Args:
            extra_args: The request's.
            prompt: vLLM's ``DictPrompt``, or a list of messages.
            is_chat: Whether it is messages.
            index: Which prompt of the request's list, and how many there are.

        Returns:
            The prompt without its markup, and what was read; None where there is no text to read,
            or this engine does not honour emphasis.

        Raises:
            AdmissionError: the emphasis, or the markup, is malformed.
        """
        if self.config is None:
            return None
        try:
            emphasis = self._parsed(extra_args, index) or Emphasis()
            markup = self._markup(emphasis)
            self._check_length(prompt, is_chat, markup)
            if is_chat:
                messages, reading = read_messages(prompt, markup)
                return (messages if reading.changed else prompt), reading
            text = prompt.get("prompt") if isinstance(prompt, Mapping) else None
            if not isinstance(text, str) or "prompt_token_ids" in prompt:
                return None
            clean, reading = read_text(text, markup)
            return ({**prompt, "prompt": clean} if reading.changed else prompt), reading
        except EmphasisError as e:
            metrics.refused(e.field)
            raise AdmissionError(_of_prompt(e, index)) from None

    def _check_length(self, prompt: Any, is_chat: bool, markup: Markup) -> None:
        """Refuses what is to be read and cannot be a prompt of this model, before it is read: vLLM
        refuses it too, unless the request lets it cut the prompt, but only afterwards."""
        if markup.kind == "off" or (longest := self._longest) is None:
            return
        if is_chat:
            texts = [text for of in Chat(prompt, lambda _: None).texts for _, text in of]
        else:
            texts = [prompt.get("prompt") or ""] if isinstance(prompt, Mapping) else []
        length = sum(map(len, texts))
        if length > longest and any(map(markup.may_be_in, texts)):
            raise EmphasisError(
                f"markup is read in at most {longest} characters, which is what this model's "
                f"{self._model_config.max_model_len} tokens can have, got {length}: send less, or "
                '"markup": "off"',
                field="emphasis.markup",
            )

    @cached_property
    def _longest(self) -> int | None:
        """Characters of the longest text that can be a prompt, as vLLM counts it; None where that
        is not known."""
        each = getattr(self._get_tokenizer(), "max_chars_per_token", None)
        return None if each is None else each * self._model_config.max_model_len

    def resolve(
        self,
        params: Any,
        extra_args: Mapping[str, Any],
        prompt: Mapping[str, Any],
        *,
        resumable: bool = False,
    ) -> Resolution | None:
        """As `check`, but counts nothing, and raises a plain `EmphasisError`."""
        try:
            return self._resolve(params, extra_args, prompt, resumable=resumable)
        except EmphasisError as e:
            raise _of_prompt(e, prompt.get(INDEX_KEY)) from None

    def _resolve(
        self,
        params: Any,
        extra_args: Mapping[str, Any],
        prompt: Mapping[str, Any],
        *,
        resumable: bool,
    ) -> Resolution | None:
        emphasis = self._parsed(extra_args, prompt.get(INDEX_KEY))
        if emphasis is not None and emphasis.is_off:
            return None
        asked = emphasis is not None
        if self.config is None:
            if asked:
                raise EmphasisError(
                    "this engine does not honour emphasis: start it with --plugin pasta, or with "
                    "additional_config={'pasta': {…}}",
                    field=KEY,
                )
            return None
        text, reading = prompt.get("prompt"), prompt.get(READING_KEY)
        if emphasis is None:
            if reading is not None:
                if not reading.marks:
                    return None
            elif not (isinstance(text, str) and self.config.markup.may_be_in(text)):
                return None
            emphasis = Emphasis()
        if not isinstance(params, SamplingParams | BeamSearchParams):
            if not asked:
                return None
            raise EmphasisError("expected a generation request, got a pooling request", field=KEY)
        if resumable:
            raise EmphasisError("a prompt that arrives in parts cannot be emphasised", field=KEY)
        token_ids = _token_ids(emphasis, prompt)
        if prompt["type"] == "embeds":
            text = reading = None
        pictures = images.images_of(prompt, self._model_config, is_gpu=support.is_gpu())
        markup = self._markup(emphasis)
        if emphasis.markup is None and emphasis.keep_marks is None and not isinstance(text, str):
            markup = Markup()  # the server's default is for text
        located = self.locator.locate(
            emphasis, markup, token_ids, text, prompt.get(CHAT_KEY), reading, pictures
        )
        heads = self._heads(emphasis.heads, needed=bool(located.marks))
        share, strength_from = self.config.share_of(emphasis)
        if share is None:
            alpha, strength_from = self.config.alpha_of(heads, emphasis.alpha)
        else:
            alpha = LEAST_FACTOR
            check_share(share, strength_from, located.factors)
        spans, factors = strongest(located.marks, alpha)
        resolved = ResolvedEmphasis(spans, alpha, heads, len(located.token_ids), factors, share)
        text = None if located.tokenized is None else located.tokenized.text
        index, _ = prompt.get(INDEX_KEY) or (0, 1)
        return Resolution(
            resolved,
            located.token_ids,
            text,
            located.spans,
            located.factors,
            index,
            strength_from,
            pictures.features,
        )

    @staticmethod
    def _parsed(extra_args: Mapping[str, Any], index: tuple[int, int] | None) -> Emphasis | None:
        if REFUSED_KEY in extra_args:
            raise EmphasisError(str(extra_args[REFUSED_KEY]))
        return Emphasis.parse(extra_args, index)

    def _markup(self, emphasis: Emphasis) -> Markup:
        """The markup that a request asks for, or the server's."""
        assert self.config is not None
        markup = self.config.markup
        keep = markup.keep_marks if emphasis.keep_marks is None else emphasis.keep_marks
        return replace(markup, kind=emphasis.markup or markup.kind, keep_marks=keep)

    def _heads(self, wanted: HeadSet | str | None, *, needed: bool) -> HeadSet:
        assert self.config is not None
        known = ", ".join(self.known) or "none"
        sizes = f"this model has {self.shape}"
        if wanted is None:
            if self.config.heads is None and needed:
                raise EmphasisError(
                    "no head set: the request gives none and the server has no default. Give "
                    f'{{"layer": [heads]}} or a name; known head sets that fit: {known}; {sizes}. '
                    'A server that is started with "heads": "auto" finds some for its model',
                    field="emphasis.heads",
                )
            return self.config.heads or HeadSet(())
        if isinstance(wanted, str):
            if wanted not in self.config.head_sets:
                raise EmphasisError(
                    f"unknown head set {wanted!r:.80}; known head sets that fit: {known}; {sizes}",
                    field="emphasis.heads",
                )
            wanted = self.config.head_sets[wanted]
        try:
            self.shape.check(wanted)
        except HeadSetError as e:
            raise EmphasisError(
                f"{e}; known head sets that fit: {known}", field="emphasis.heads"
            ) from None
        return wanted
