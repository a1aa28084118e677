"""Prompts with images: tiny random models of real architectures with real processors, in fp32.

The oracle gets its tokens and pixels from the processor itself. Broken by: marks placed by the
prompt's text before images take their room; markup whose removal moves an image; a mark of the
wrong image or message; KV shared between other images, or other emphasis.
"""

import gc
from dataclasses import dataclass, field

import pytest
import torch
from models import random_ids, tiny_multimodal
from pictures import AROUND, BREAK_TOKEN, IMAGE, data_url, picture, save_processor
from test_exact import LOGPROB_TOLERANCE, check
from vllm import SamplingParams

from vllm_pasta.errors import EmphasisError
from vllm_pasta.verify.oracle import Oracle, Steering

KINDS = ("qwen2_5_vl", "qwen3_vl", "gemma3", "gemma4", "mistral3")
ALL = {layer: [0, 1, 2, 3] for layer in range(4)}
FILLER = "One two three four five six seven eight nine ten eleven twelve. "
IMAGE_TOKEN = 5
TOKENS = 8


@dataclass
class Model:
    """An engine, and what the oracle needs."""

    kind: str
    llm: object
    oracle: Oracle
    processor: object

    def given(self, text, pictures):
        """The prompt's token ids, and the rest that the processor makes of it."""
        made = dict(
            self.processor(
                text=text, images=pictures, return_tensors="pt", return_mm_token_type_ids=True
            )
        )
        ids = made.pop("input_ids")[0].tolist()
        made.pop("attention_mask")
        return ids, made

    def expected(self, answer, text, pictures, spans, alpha=0.01, factors=None):
        """Prompt, and the oracle's tokens and log-probabilities; vLLM's answer is to be judged."""
        ids, images = self.given(text, pictures)
        steering = spans and Steering(spans(ids), ALL, alpha, len(ids), factors)
        guess = answer.outputs[0].token_ids
        return ids, self.oracle.generate(ids, TOKENS, steering or None, images=images, guess=guess)


@pytest.fixture(scope="module", params=KINDS)
def model(request, tmp_path_factory):
    folder = tiny_multimodal(tmp_path_factory.mktemp(request.param), request.param)
    processor = save_processor(folder, request.param)
    llm = start_with_images(
        folder,
        block_size=32,
        prefix_cache_retention_interval=None,  # windowed layers keep all blocks, too
        max_num_batched_tokens=64,
    )
    yield Model(request.param, llm, Oracle(folder), processor)
    del llm
    gc.collect()


def start_with_images(folder, **options):
    from conftest import start

    return start(folder, max_num_seqs=4, limit_mm_per_prompt={"image": 3, "video": 0}, **options)


def params(emphasis=None, alpha=0.01):
    if emphasis is not None:
        heads = {str(layer): heads for layer, heads in ALL.items()}
        emphasis = {"emphasis": {"heads": heads, **emphasis, "alpha": alpha}}
    return SamplingParams(
        temperature=0, max_tokens=TOKENS, ignore_eos=True, logprobs=-1, extra_args=emphasis
    )


def words(*texts):
    """Finds texts in token ids: each byte is a token of its own."""

    def find(ids):
        spans = []
        for text in texts:
            wanted = [byte + 3 for byte in text.encode()]
            starts = [i for i in range(len(ids)) if ids[i : i + len(wanted)] == wanted]
            assert len(starts) == 1, (text, starts)
            spans.append((starts[0], starts[0] + len(wanted)))
        return spans

    return find


def images(*indices):
    """Finds images in token ids: runs of one token, with those between an image's rows."""

    def find(ids):
        edges = [False, *(token in (IMAGE_TOKEN, BREAK_TOKEN) for token in ids), False]
        changes = [i for i in range(len(ids) + 1) if edges[i] != edges[i + 1]]
        runs = list(zip(changes[::2], changes[1::2], strict=True))
        return [runs[i] for i in indices]

    return find


def both(*finders):
    return lambda ids: [span for find in finders for span in find(ids)]


@dataclass
class Talk:
    """A conversation of one image per number, and what of it is marked."""

    messages: list
    emphasis: dict | None = None
    spans: object = None
    clean: list | None = None  # the messages as the model sees them
    alpha: float = 0.01
    factors: list | None = field(default=None)

    def sent(self):
        """As a user sends it: pictures as such, or as URLs."""
        ways = (
            lambda n: {"type": "image_pil", "image_pil": picture(n)},
            lambda n: {"type": "image_url", "image_url": {"url": data_url(picture(n))}},
        )
        return [
            {"role": role, "content": [
                ways[part % 2](part) if isinstance(part, int) else {"type": "text", "text": part}
                for part in parts
            ]}
            for role, *parts in self.messages
        ]  # fmt: skip

    def expected(self, model, answer):
        messages = [
            {"role": role, "content": [
                {"type": "image"} if isinstance(part, int) else {"type": "text", "text": part}
                for part in parts
            ]}
            for role, *parts in self.clean or self.messages
        ]  # fmt: skip
        text = model.processor.apply_chat_template(messages, tokenize=False)
        pictures = [picture(n) for _, *parts in self.messages for n in parts if type(n) is int]
        return model.expected(answer, text, pictures, self.spans, self.alpha, self.factors)


ONE = [("system", "Be brief."), ("user", "Look at this: ", 1, " What colour is the sky in it?")]
THREE = [
    ("user", FILLER, 1, "This is the first."),
    ("assistant", "I see."),
    ("user", 2, "And these are the others: ", 3, " which is the best one?"),
]
TALKS = {
    "plain": Talk(THREE),
    "text": Talk(THREE, {"text": "the best one"}, words("the best one")),
    "text before an image": Talk(ONE, {"text": ["Look at"]}, words("Look at")),
    "role": Talk(ONE, {"text": [{"role": "system"}]}, words("Be brief.")),
    "message": Talk(
        THREE,
        {"text": [{"message": 2}]},
        words("And these are the others: ".strip(), "which is the best one?"),
    ),
    "characters of a message": Talk(
        THREE, {"text": [{"message": -1, "chars": [4, 9]}]}, words("these")
    ),
    "markup": Talk(
        [("user", "Say <emphasis>which colour</emphasis> ", 1, " is <emphasis>here</emphasis>!")],
        {"markup": "tag"},
        words("which colour", "here"),
        [("user", "Say which colour ", 1, " is here!")],
    ),
    "an image": Talk(ONE, {"text": [{"image": 0}]}, images(0)),
    "an image of a message": Talk(THREE, {"text": [{"message": 2, "image": 1}]}, images(2)),
    "the last image": Talk(THREE, {"text": [{"image": -1}]}, images(2)),
    "all images": Talk(THREE, {"text": [{"image": "all"}]}, images(0, 1, 2), alpha=0.1),
    "images of a role": Talk(
        THREE, {"text": [{"role": "user", "image": "all"}]}, images(0, 1, 2), alpha=20.0
    ),
    "an image and a text, by strength": Talk(
        THREE,
        {"text": [{"message": 0, "image": 0, "alpha": 0.3}, {"text": "the others"}]},
        both(images(0), words("the others")),
        factors=[0.3, 1.0],
    ),
}


def test_conversations(model):
    """Steered and plain, in chunks and decoding, more requests than the batch holds."""
    talks = list(TALKS.values())
    outputs = model.llm.chat(
        [talk.sent() for talk in talks],
        [params(talk.emphasis, talk.alpha) for talk in talks],
        use_tqdm=False,
    )
    plain = {}
    for (name, talk), output in zip(TALKS.items(), outputs, strict=True):
        ids, expected = talk.expected(model, output)
        assert output.prompt_token_ids == ids, name
        check(output.outputs[0], expected)
        if name == "plain":
            plain = expected[1]
        elif talk.messages is THREE:
            assert (expected[1][0] - plain[0]).abs().max() > 20 * LOGPROB_TOLERANCE, name


def test_completions(model):
    """A prompt of text with its images beside it: marks, markup and characters of that text."""
    image = IMAGE[model.kind]
    marked = f"{FILLER}See {image}, and {image}: <emphasis>what is it</emphasis> of?"
    clean = marked.replace("<emphasis>", "").replace("</emphasis>", "")
    at = clean.index("and")
    first = clean.index(image)
    cases = [
        (marked, {"markup": "tag"}, words("what is it")),
        (clean, {"text": "what is it"}, words("what is it")),
        (clean, {"chars": [[at, at + 3]]}, words("and")),
        (clean, {"chars": [[first, first + len(image)]], "text": [{"image": 0}]}, None),
        (clean, {"text": [{"image": 1}]}, images(1)),
    ]
    pictures = [picture(4), picture(5)]
    outputs = model.llm.generate(
        [{"prompt": text, "multi_modal_data": {"image": pictures}} for text, _, _ in cases],
        [params(emphasis) for _, emphasis, _ in cases],
        use_tqdm=False,
    )
    for (_, emphasis, spans), output in zip(cases, outputs, strict=True):
        if spans is None:  # characters that hold an image's placeholder mark what stands for it

            def spans(ids):
                ((start, end),) = images(0)(ids)
                before, after = AROUND[model.kind]
                return [(start - before, end + after)]

        ids, expected = model.expected(output, clean, pictures, spans)
        assert output.prompt_token_ids == ids, emphasis
        check(output.outputs[0], expected)


def test_image_that_attends_both_ways(model):
    """A mark of an image's part is drawn out over the whole image where its tokens attend both
    ways, and is not elsewhere."""
    text = f"{FILLER}See {IMAGE[model.kind]} there"
    ids, _ = model.given(text, [picture(6)])
    ((start, end),) = images(0)(ids)
    (output,) = model.llm.generate(
        {"prompt": text, "multi_modal_data": {"image": picture(6)}},
        params({"spans": [[start + 1, start + 2]]}),
        use_tqdm=False,
    )
    whole = model.kind == "gemma3"
    span = (start, end) if whole else (start + 1, start + 2)
    _, expected = model.expected(output, text, [picture(6)], lambda _: [span])
    check(output.outputs[0], expected)


def test_prefix_cache(model):
    """Blocks before the image are shared by prompts of another, and before the first emphasised
    token with plain ones; no others."""
    model.llm.reset_prefix_cache()
    text = f"{FILLER}{FILLER[:20]}See {IMAGE[model.kind]} there, {FILLER}and tell me."
    ids, _ = model.given(text, [picture(7)])
    ((start, _),) = images(0)(ids)
    before, whole = start // 32 * 32, (len(ids) - 1) // 32 * 32
    marked, later = {"text": [{"image": 0}]}, {"text": "tell me"}
    for number, emphasis, shared in (
        (7, None, 0),
        (7, None, whole),
        (8, None, before),
        (7, marked, before),
        (7, marked, whole),
        (8, marked, before),
        (7, later, words("tell me")(ids)[0][0] // 32 * 32),
    ):
        (output,) = model.llm.generate(
            {"prompt": text, "multi_modal_data": {"image": picture(number)}},
            params(emphasis),
            use_tqdm=False,
        )
        assert output.num_cached_tokens == shared, (number, emphasis)
        spans = {id(None): None, id(marked): images(0), id(later): words("tell me")}[id(emphasis)]
        check(output.outputs[0], model.expected(output, text, [picture(number)], spans)[1])


def test_hybrid(tmp_path):
    """Gated delta net beside attention (Qwen3.5), which vLLM's CPU kernel computes in bf16 alone:
    error at most twice plain PyTorch's."""
    folder = tiny_multimodal(tmp_path, "qwen3_5", torch.bfloat16)
    truth, plain = Oracle(folder), Oracle(folder, torch.bfloat16)
    model = Model("qwen3_5", None, truth, save_processor(folder, "qwen3_5"))
    model.llm = start_with_images(folder, dtype="bfloat16", max_num_batched_tokens=64)
    text = f"{FILLER}{FILLER}See {IMAGE['qwen3_5']}, and {IMAGE['qwen3_5']}: what is it of?"
    pictures = [picture(8), picture(9)]
    ids, made = model.given(text, pictures)
    for emphasis, spans in (
        ({"text": [{"image": 1}]}, images(1)),
        ({"text": "what is it"}, words("what is it")),
    ):
        asked = params({**emphasis, "heads": {"1": [0, 1, 2, 3], "3": [0, 1, 2, 3]}})
        asked.prompt_logprobs = -1
        (output,) = model.llm.generate(
            {"prompt": text, "multi_modal_data": {"image": pictures}}, asked, use_tqdm=False
        )
        assert output.prompt_token_ids == ids
        first = spans(ids)[0][0]
        rows = output.prompt_logprobs[first + 1 :]  # nothing before it is steered
        got = torch.tensor([[row[i].logprob for i in range(256)] for row in rows])
        steering = Steering(spans(ids), {layer: [0, 1, 2, 3] for layer in (1, 3)}, 0.01, len(ids))
        exact, rounded, unsteered = (
            oracle.prompt_logprobs(ids, of, made)[first:-1]
            for oracle, of in ((truth, steering), (plain, steering), (truth, None))
        )
        allowed = 2 * (rounded - exact).abs().mean()
        assert (got - exact).abs().mean() < allowed
        assert allowed < (unsteered - exact).abs().mean()  # else the bound would prove nothing


@pytest.mark.parametrize(
    ("mark", "match"),
    [
        ({"image": 1}, r"the prompt holds 1 images \(0 to 0\), got 1"),
        ({"message": 0, "image": "all"}, r"message 0 holds 0 images \(none\), got 'all'"),
        ({"message": 5, "image": 0}, "there are 2 messages"),
        ({"role": "tool", "image": 0}, "no message of role 'tool'"),
    ],
)
def test_images_that_are_not_there(model, mark, match):
    with pytest.raises(EmphasisError, match=match):
        model.llm.chat(TALKS["an image"].sent(), params({"text": [mark]}), use_tqdm=False)


def test_other_media_are_refused(model):
    """What is neither text nor an image, by name; plain requests with it are admitted."""
    admission = model.llm.llm_engine.input_processor.pasta_admission
    prompt = {
        "type": "multimodal",
        "prompt_token_ids": random_ids(24, 1),
        "mm_placeholders": {"image": [], "video": [object()]},
    }
    plain = params()
    assert admission.admit(plain, dict(prompt)) is plain
    with pytest.raises(EmphasisError, match="got one with video"):
        admission.admit(params({"spans": [[2, 4]]}), dict(prompt))
