"""Marks offline, through `LLM`: what the server's tests cannot see, the prompt's tokens."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import vllm
from transformers import PreTrainedTokenizerBase

from vllm_pasta import BeamSearchParams, Emphasis, EmphasisError, SamplingParams
from vllm_pasta.request.markup import Markup
from vllm_pasta.verify.oracle import Steering

WORDS = " ".join(f"word{i % 7}" for i in range(200))
TAGGED = " ".join(f"<emphasis>word{i % 7}</emphasis>" for i in range(200))
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>\n{{ m.content.split('</think>')[-1] }}\n{% endfor %}"
)


def params(emphasis, **options):
    return SamplingParams(
        **{"temperature": 0, "max_tokens": 4, "extra": {"emphasis": emphasis}, **options}
    )


@pytest.fixture(scope="module")
def generate(smollm2_engine):
    def run(prompt, sampling_params):
        return smollm2_engine.generate(prompt, sampling_params, use_tqdm=False)

    return run


@pytest.fixture(scope="module")
def ids(smollm2_engine):
    return lambda text: smollm2_engine.get_tokenizer()(text).input_ids


def test_tags_count_against_no_length(generate, ids):
    """More tokens with tags than the model's length, fewer without: as the text without them."""
    assert len(ids(WORDS)) < 1024 - 4 < len(ids(TAGGED))
    (request,) = generate(TAGGED, params({"markup": "tag"}))
    assert request.prompt_token_ids == ids(WORDS)
    with pytest.raises(vllm.exceptions.VLLMValidationError, match="maximum context length"):
        generate(TAGGED, params(None))


def test_truncation_counts_without_tags(smollm2_engine, ids):
    """What is left are tokens of the text without tags, and the marks in them."""
    (request,) = smollm2_engine.generate(
        "<emphasis>Name</emphasis> a colour, please.", params({"markup": "tag"}), use_tqdm=False,
        tokenization_kwargs={"truncate_prompt_tokens": 3, "truncation_side": "right"},
    )  # fmt: skip
    assert request.prompt_token_ids == ids("Name a colour, please.")[:3]


def test_no_tokenizer_is_copied(smollm2_engine, generate, monkeypatch):
    """By the first request with a mark: that took seconds, in which a server answered nobody."""
    admission = smollm2_engine.llm_engine.input_processor.pasta_admission
    monkeypatch.setattr(admission.locator, "_tokenizer", None)  # as before the first
    copied, deepcopy = [], copy.deepcopy
    monkeypatch.setattr("copy.deepcopy", lambda *args: copied.append(args[0]) or deepcopy(*args))
    generate("Ann lives in Oslo.", params({"text": "Oslo"}))
    assert not [of for of in copied if isinstance(of, PreTrainedTokenizerBase)]


def test_beside_threads_that_tokenize(smollm2_engine):
    """Marks are found in the whole prompt while vLLM cuts and pads texts in other threads."""
    admission = smollm2_engine.llm_engine.input_processor.pasta_admission
    tokenizer = smollm2_engine.get_tokenizer()
    text = f"{WORDS} Ann lives in Oslo."
    ids, end = tokenizer(text).input_ids, threading.Event()
    emphasis = Emphasis.parse({"emphasis": {"text": "Oslo"}})

    def tokenize(length):
        while not end.is_set():
            options = {"truncation": True, "max_length": length, "padding": "max_length"}
            assert len(tokenizer(WORDS, **options).input_ids) == length

    with ThreadPoolExecutor(2) as pool:
        others = [pool.submit(tokenize, length) for length in (5, 1000)]
        try:
            for _ in range(100):
                found = admission.locator.locate(emphasis, Markup("off"), ids, text, None)
                ((start, stop),) = found.spans
                assert tokenizer.decode(ids[start:stop]).strip() == "Oslo"
        finally:
            end.set()
        for other in others:
            other.result()


def test_in_a_chat(smollm2_engine):
    """The same through a chat template; and the conversation given is not changed."""
    messages = [[{"role": "user", "content": text}] for text in (WORDS, TAGGED)]
    before = repr(messages)
    plain, tagged = smollm2_engine.chat(
        messages, [params(None), params({"markup": "tag"})], use_tqdm=False
    )
    assert plain.prompt_token_ids == tagged.prompt_token_ids
    assert repr(messages) == before


def test_beam_search(smollm2_engine, ids):
    beams = BeamSearchParams(beam_width=2, max_tokens=2, extra={"emphasis": {"markup": "tag"}})
    (found,) = smollm2_engine.beam_search([{"prompt": TAGGED}], beams)
    assert found.sequences[0].tokens[: len(ids(WORDS))] == ids(WORDS)


def test_which_prompt_of_a_list(generate, ids):
    """Offline too the error says which; each prompt is read by its own params."""
    prompts = ["Ann in Oslo", "Ben in <emphasis>Oslo</emphasis>", "Cy in Rome"]
    with pytest.raises(EmphasisError, match=r"^prompt 2: emphasis.text\[0\]: 'Oslo' is not"):
        generate(prompts, params("Oslo"))
    tagged = generate(prompts, [params("Oslo"), params({"markup": "tag"}), params(None)])[1]
    assert tagged.prompt_token_ids == ids("Ben in Oslo")
    with pytest.raises(EmphasisError, match="prompt 1: markup: </emphasis>"):
        generate(["a", "b</emphasis>"], params({"markup": "tag"}))


def test_one_emphasis_for_each_prompt(generate):
    each = {"prompts": ["Oslo", None]}
    alone = [generate("In Oslo", params("Oslo")), generate("In Rome", params(None))]
    together = generate(["In Oslo", "In Rome"], params(each))
    assert [r.outputs[0].token_ids for r in together] == [r[0].outputs[0].token_ids for r in alone]
    with pytest.raises(EmphasisError, match="there are 3 prompts, got 2"):
        generate(["In Oslo"] * 3, params(each))


@pytest.mark.parametrize("off", [None, False, {}, {"markup": "off"}])
def test_off(off, generate):
    plain = generate("In Oslo", vllm.SamplingParams(temperature=0, max_tokens=4))
    assert generate("In Oslo", params(off))[0].outputs[0].token_ids == plain[0].outputs[0].token_ids


def test_markup_that_marks_nothing(generate):
    with pytest.raises(EmphasisError, match="nothing is emphasised: <Emphasis> at character 0"):
        generate("<Emphasis>a</Emphasis>", params({"markup": "tag"}))
    assert generate("Nothing here.", params({"markup": "tag"}))


def test_template_that_cuts(smollm2_engine):
    """A mark on a whole message is on what the template shows of it."""
    messages = [
        {"role": "assistant", "content": "<think>Red it is.</think>It is red."},
        {"role": "user", "content": "Another one?"},
    ]

    def chat(emphasis):
        (reply,) = smollm2_engine.chat(
            messages, params(emphasis), chat_template=TEMPLATE, use_tqdm=False
        )
        return list(reply.outputs[0].token_ids)

    assert chat([{"message": 0}]) == chat({"text": "It is red."}) == chat([{"role": "assistant"}])
    with pytest.raises(EmphasisError, match="leaves this part of message 0 out"):
        chat([{"message": 0, "text": "Red"}])


HEADS = {22: [0, 1, 2, 3, 4, 5, 6, 7, 8], 23: [1, 4]}
DOOR = "The door is closed. It waits for repairs. Ask again. What is the door?"


def test_strengths(generate, ids, smollm2_oracle):
    """Marks of several strengths, the request's for the rest: the oracle's tokens; where marks
    overlap the strongest counts, and strengths of 1 are today's result."""
    heads = {str(layer): indices for layer, indices in HEADS.items()}

    def span(part):
        start, end = DOOR.index(part), DOOR.index(part) + len(part)
        return len(ids(DOOR[:start].rstrip())), len(ids(DOOR[:end]))

    def expected(spans, factors):
        steering = Steering(spans, HEADS, 0.05, len(ids(DOOR)), factors)
        return smollm2_oracle.generate(ids(DOOR), 8, steering, stop_ids=(2,))[0]

    def answer(prompt, emphasis):
        request = params({"alpha": 0.05, "heads": heads, **emphasis}, max_tokens=8)
        return list(generate(prompt, request)[0].outputs[0].token_ids)

    weak, strong = span("The door is closed."), span("closed.")
    marks = [{"text": "The door is closed.", "alpha": 0.3}, {"text": "repairs", "alpha": 0.001}]
    factors = [0.3, 0.001]
    assert answer(DOOR, {"text": marks}) == expected([weak, span("repairs")], factors)
    overlapping = [marks[0], {"text": "closed.", "alpha": 3}]
    assert answer(DOOR, {"text": overlapping}) == expected([weak, strong], [0.3, 3.0])
    tagged = DOOR.replace("repairs", '<emphasis alpha="0.001">repairs</emphasis>').replace(
        "The door is closed.", "<emphasis alpha='0.3'>The door is closed.</emphasis>"
    )
    assert answer(tagged, {"markup": "tag"}) == expected([weak, span("repairs")], factors)
    plain = expected([span("repairs")], None)
    assert answer(DOOR, {"text": "repairs"}) == plain
    assert answer(DOOR, {"text": {"text": "repairs", "alpha": 1}}) == plain
    spans = [
        {"tokens": list(weak), "alpha": 0.3},
        {"tokens": list(span("repairs")), "alpha": 0.001},
    ]
    assert answer(DOOR, {"spans": spans}) == expected([weak, span("repairs")], factors)
