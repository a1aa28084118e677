"""Images in a prompt: which tokens of it are which of its text, and which a mark points at."""

import pytest
from models import byte_tokenizer
from transformers import AutoTokenizer

from vllm_pasta.errors import EmphasisError
from vllm_pasta.request.chat import Chat, Images
from vllm_pasta.request.emphasis import Emphasis
from vllm_pasta.request.heads import HeadSet
from vllm_pasta.request.locate import Locator
from vllm_pasta.request.marks import Mark
from vllm_pasta.request.markup import Markup
from vllm_pasta.request.resolution import KEY, Resolution, ResolvedEmphasis
from vllm_pasta.request.tokens import spliced


def encoded(text):
    """A token per character, and one for each <…>."""
    ids, offsets, at = [], [], 0
    while at < len(text):
        end = text.index(">", at) + 1 if text[at] == "<" else at + 1
        ids.append(-1 if text[at] == "<" else ord(text[at]))
        offsets.append((at, end))
        at = end
    return ids, offsets


def expanded(text, counts, surplus=()):
    """Each <…> as that many tokens, with what a processor puts around them."""
    ids, held, counts = [], [], list(counts)
    for token in encoded(text)[0]:
        if token == -1:
            image = [*surplus, *[-1] * counts.pop(0), *surplus]
            held.append((len(ids), len(ids) + len(image)))
            ids += image
        else:
            ids.append(token)
    return ids, held


@pytest.mark.parametrize("surplus", [(), (-2, -3)])
@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("see <i> here", [5]),
        ("<i>", [1]),
        ("<i>a", [3]),
        ("a<i>", [3]),
        ("a<i>a<i>a", [2, 4]),
        ("<i>aa<i>a<i>", [1, 7, 2]),
    ],
)
def test_spliced(text, counts, surplus):
    """Characters outside of images have their tokens, and a placeholder's all of the image."""
    ids, held = expanded(text, counts, surplus)
    tokenized = spliced(text, ids, held, *encoded(text))
    assert len(tokenized.offsets) == len(ids)
    within = {i for start, end in held for i in range(start, end)}
    for i, (start, end) in enumerate(tokenized.offsets):
        assert text[start:end] == ("<i>" if i in within else chr(ids[i]))


def test_spliced_between_two_tokens():
    """An image without a placeholder has no characters."""
    text = "a question"
    ids = [-1, -1, *map(ord, text)]
    tokenized = spliced(text, ids, [(0, 2)], *encoded(text))
    assert tokenized.tokens(0, 1, "x") == (2, 3)
    assert tokenized.tokens(0, len(text), "x") == (2, len(ids))


@pytest.mark.parametrize(
    ("text", "ids", "held"),
    [
        ("a<i>b", [97, -1, -1, 99], [(1, 3)]),  # another text
        ("a<i>bc", [97, -1, -1], [(1, 3)]),  # cut after the image
        ("a<i>bb", [97, -1, -1, 98], [(1, 3)]),
        ("b<i>b", [-1, -1, 98], [(0, 2)]),  # cut before it
        ("a<i><i>", [97, -1, -1], [(1, 3)]),  # cut between two
        ("<i><i>a", [-1, -1, -1, -1, 97], [(0, 2), (2, 4)]),  # which text is whose?
    ],
)
def test_not_spliced(text, ids, held):
    assert spliced(text, ids, held, *encoded(text)) is None


MESSAGES = [
    {"role": "system", "content": "No image."},
    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}},
                                 {"type": "text", "text": "a"}, {"image_url": "y"}]},
    {"role": "user", "content": [{"type": "image_pil", "image_pil": None}]},
]  # fmt: skip
CHAT = Chat(MESSAGES, lambda messages: None)
IMAGES = Images(
    held=((2, 9), (12, 16), (20, 30)),
    features=(((3, 8),), ((12, 16),), ((21, 24), (26, 29))),
)


@pytest.mark.parametrize(
    ("mark", "spans"),
    [
        ({"image": 0}, [(3, 8)]),
        ({"image": -1}, [(21, 29)]),
        ({"image": "all"}, [(3, 8), (12, 16), (21, 29)]),
        ({"message": 1, "image": 1}, [(12, 16)]),
        ({"message": -1, "image": 0}, [(21, 29)]),
        ({"role": "user", "image": "all"}, [(3, 8), (12, 16), (21, 29)]),
        ({"role": "user", "image": 2}, [(21, 29)]),
    ],
)
def test_image_of_a_mark(mark, spans):
    marks = Emphasis.parse({KEY: [{**mark, "alpha": 0.5}]}).marks
    assert IMAGES.located(marks, CHAT) == [(span, 0.5) for span in spans]


@pytest.mark.parametrize(
    ("mark", "match"),
    [
        ({"image": "first"}, 'expected a number or "all"'),
        ({"image": True}, 'expected a number or "all"'),
        ({"image": 0, "text": "a"}, "expected text or image, got both"),
        ({"image": 0, "chars": [0, 1]}, "expected chars or image, got both"),
        ({"image": 0, "occurrence": 1}, "occurrence goes with text"),
        ({"image": 3}, r"the prompt holds 3 images \(0 to 2\), got 3"),
        ({"message": 0, "image": 0}, r"message 0 holds 0 images \(none\), got 0"),
        ({"message": 1, "image": -3}, "message 1 holds 2 images"),
    ],
)
def test_refused(mark, match):
    with pytest.raises(EmphasisError, match=match):
        IMAGES.located(Emphasis.parse({KEY: [mark]}).marks, CHAT)


def test_images_that_cannot_be_counted():
    """Where the prompt holds other images than the messages, only the prompt's can be named."""
    chat = Chat(MESSAGES[:2], lambda messages: None)
    assert IMAGES.located([Mark(image=2)], chat) == [((21, 29), 1.0)]
    with pytest.raises(EmphasisError, match="the messages hold 2 images and the prompt 3"):
        IMAGES.located([Mark(image=0, message=1)], chat)
    with pytest.raises(EmphasisError, match="for chats"):
        IMAGES.located([Mark(image=0, message=1)], None)


def test_widened():
    """Only over images that it touches, and only where they attend both ways."""
    marks = [((0, 4), 1.0), ((8, 12), 0.5), ((15, 22), 1.0)]
    assert IMAGES.widened(marks) == marks
    both = Images(IMAGES.held, IMAGES.features, both_ways=True)
    assert both.widened(marks) == [((0, 8), 1.0), ((8, 12), 0.5), ((12, 24), 1.0)]


def test_characters_of_a_placeholder(tmp_path):
    """They mark the image, though a tokenizer may count its tokens as special ones (Gemma 4)."""
    byte_tokenizer(tmp_path, {5: "<image>"}, extra_special_tokens={"image_token": "<image>"})
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert 5 in tokenizer.all_special_ids
    text, ids = "see <image> here", tokenizer("see <image><image><image> here")["input_ids"]
    images = Images(held=((4, 7),), features=(((4, 7),),))
    marked = Emphasis.parse({KEY: {"chars": [[4, 11]]}})
    off = Markup("off", "emphasis", True)
    located = Locator(lambda: tokenizer).locate(marked, off, ids, text, None, images=images)
    assert located.spans == ((4, 7),)
    with pytest.raises(EmphasisError, match="nothing but special tokens"):
        Locator(lambda: tokenizer).locate(marked, off, ids[:5] + ids[7:], text, None)


def test_report():
    """An image is one token of the text, and its number is named."""
    emphasis = ResolvedEmphasis(((0, 10),), 0.1, HeadSet(((0, (0,)),)), 32)
    spans = ((0, 10), (14, 28), (30, 31))
    resolution = Resolution(emphasis, list(range(32)), None, spans, images=IMAGES.features)
    report = resolution.report(lambda ids: " ".join(map(str, ids)))
    assert report == [
        {"tokens": [0, 10], "text": "0 1 2 3 8 9", "images": [0]},
        {"tokens": [14, 28], "text": "14 16 17 18 19 20 21 24 25", "images": [1, 2]},
        {"tokens": [30, 31], "text": "30"},
    ]
