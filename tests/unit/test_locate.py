"""Marks to token ranges, over byte-level BPE, SentencePiece-like and WordPiece tokenizers."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from vllm_pasta import Emphasis, EmphasisError
from vllm_pasta.request.chat import Chat
from vllm_pasta.request.locate import Locator
from vllm_pasta.request.marks import Mark
from vllm_pasta.request.markup import Markup
from vllm_pasta.request.resolution import KEY

CORPUS = [
    "Answer in JSON. Be brief, and name three colours: red, green, blue.",
    "Ünïcode naïve café, İstanbul, straße; 東京 is a city. مرحبا بالعالم. 🎉🎊 party 👩‍👩‍👧",
    "The quick brown fox jumps over the lazy dog, again and again and again.",
]
SPECIAL = ["<unk>", "<s>", "</s>"]


def _wrap(tokenizer, prefix, suffix, **options):
    tokenizer.post_processor = TemplateProcessing(
        single=f"{prefix} $A {suffix}".strip(),
        special_tokens=[(s, tokenizer.token_to_id(s)) for s in (prefix, suffix) if s],
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **options)


def byte_level():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def sentencepiece_like():
    """Unigram over ▁-marked words, NFKC and collapsed spaces, byte fallback off, BOS in front."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=220, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _wrap(tokenizer, "<s>", "", bos_token="<s>", eos_token="</s>")


def wordpiece():
    """BERT's: lower case, accents stripped, a special token at both ends."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=260, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _wrap(tokenizer, "<s>", "</s>", bos_token="<s>", eos_token="</s>")


TOKENIZERS = {"byte-level": byte_level, "sentencepiece": sentencepiece_like, "wordpiece": wordpiece}


@pytest.fixture(scope="module", params=[*TOKENIZERS, "smollm2"])
def tokenizer(request):
    if request.param == "smollm2":
        return AutoTokenizer.from_pretrained(request.getfixturevalue("smollm2"))
    return TOKENIZERS[request.param]()


def locate(tokenizer, ids, prompt, *, chat=None, markup=None, **fields):
    emphasis = Emphasis.parse({KEY: fields}) if fields else Emphasis()
    return Locator(lambda: tokenizer).locate(emphasis, markup or Markup(), ids, prompt, chat)


def letters(tokenizer, ids):
    """What tokens say, as far as every tokenizer keeps it."""
    text = tokenizer.decode(ids, skip_special_tokens=True)
    return "".join(text.casefold().split())


@pytest.mark.parametrize(
    "part", ["Answer in JSON", "brief", "three colours: red", "blue.", "in JSON. Be"]
)
def test_text(tokenizer, part):
    """The tokens found say the words, whole tokens at the edges, and no further."""
    ids = tokenizer(CORPUS[0])["input_ids"]
    for text in (CORPUS[0], None):
        if text is None and "word" in repr(tokenizer.backend_tokenizer.model).lower():
            continue  # lower case: the text that token ids decode to has other letters
        ((start, end),) = locate(tokenizer, ids, text, text=part).spans
        wanted = "".join(part.casefold().split())
        assert wanted in letters(tokenizer, ids[start:end])
        if letters(tokenizer, ids[start : start + 1]):  # not a lone mark of a word's start
            assert wanted not in letters(tokenizer, ids[start + 1 : end])
        assert wanted not in letters(tokenizer, ids[start : end - 1])


texts = st.lists(
    st.sampled_from([*" \n.,é東🎉ß", "naïve", "مرحبا", "👩‍👩‍👧", "fox ", "JSON", "A", "ﬁ", "İ"]),
    min_size=1,
    max_size=16,
).map("".join)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data(), text=texts | st.text(min_size=1, max_size=30))
def test_any_mark(tokenizer, data, text):
    """For any text and range: the tokens cover it, and only edge tokens reach beyond."""
    start = data.draw(st.integers(0, len(text) - 1))
    end = data.draw(st.integers(start + 1, len(text)))
    encoded = tokenizer(text, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    covered = {c for a, b in offsets for c in range(a, b)}
    try:
        spans = locate(tokenizer, ids, text, chars=[[start, end]]).spans
    except EmphasisError:
        # Refused: white space, nothing that a token stands for, or special tokens alone.
        rest = "".join(c for i, c in enumerate(text[start:end], start) if i in covered)
        special = set(tokenizer.all_special_ids)
        hit = [i for i, (a, b) in zip(ids, offsets, strict=True) if a < end and b > start and a < b]
        assert not rest.strip() or special.issuperset(hit)
        return
    ((first, last),) = spans
    inside = {c for a, b in offsets[first:last] for c in range(a, b)}
    assert {c for c in range(start, end) if c in covered} <= inside
    for a, b in (offsets[first], offsets[last - 1]):
        assert a < end
        assert b > start


def test_special_tokens_and_white_space_are_refused(tokenizer):
    text = CORPUS[0] + "  "
    ids = tokenizer(text)["input_ids"]
    for fields in ({"text": "  "}, {"chars": [[len(text) - 2, len(text)]]}):
        with pytest.raises(EmphasisError, match=r"words|white space|no token"):
            locate(tokenizer, ids, text, **fields)
    end = "<|im_end|>" if "<|im_end|>" in tokenizer.all_special_tokens else "</s>"
    text = f"some words{end} more"
    with pytest.raises(EmphasisError, match="special tokens"):
        locate(tokenizer, tokenizer(text)["input_ids"], text, text=end)


def test_truncated(tokenizer):
    """truncate_prompt_tokens: ranges move with the tokens, or are refused; never shifted."""
    text = CORPUS[2]
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    ((start, end),) = locate(tokenizer, whole, text, text="lazy dog").spans
    cut = whole[start - 2 :]
    assert locate(tokenizer, cut, text, text="lazy dog").spans == ((2, 2 + end - start),)
    with pytest.raises(EmphasisError, match="not in the prompt"):
        locate(tokenizer, cut, text, text="quick brown")
    at = text.index("quick")
    with pytest.raises(EmphasisError, match="cut off"):
        locate(tokenizer, cut, text, chars=[[at, at + 5]])
    head = whole[:end]
    assert locate(tokenizer, head, text, text="lazy dog").spans == ((start, end),)
    with pytest.raises(EmphasisError, match="not in the prompt"):
        locate(tokenizer, head, text, text="again")


def test_truncated_where_it_repeats_itself(tokenizer):
    """The tokens do not tell which end was cut: text is found, positions are refused."""
    text = "again " * 9
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    left, right = whole[4:], whole[:-4]
    if left != right:
        pytest.skip("this tokenizer's tokens tell")
    assert locate(tokenizer, left, text, text="again").spans
    with pytest.raises(EmphasisError, match="cannot be told"):
        locate(tokenizer, left, text, chars=[[24, 29]])


def test_tokens_of_another_text(tokenizer):
    """Where tokens are not those of the text, positions in the text mean nothing."""
    ids = tokenizer(CORPUS[0], add_special_tokens=False)["input_ids"]
    with pytest.raises(EmphasisError, match="cannot be told"):
        locate(tokenizer, ids, "Words before. " + CORPUS[0] + " And after.", chars=[[20, 30]])


def test_markdown_that_stays(tokenizer):
    """The text is as it was, so truncation and token ranges go with it."""
    text = "Name **three** colours, **please**."
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    ((start, end),) = locate(tokenizer, ids, text, chars=[[26, 32]]).spans
    located = locate(tokenizer, ids, text, markup=Markup("markdown"), spans=[[0, 1]])
    assert located.token_ids == ids
    assert (start, end) in located.spans
    assert located.spans[0][0] == 0
    with pytest.raises(EmphasisError, match="cut off"):  # three
        locate(tokenizer, ids[start - 1 :], text, markup=Markup("markdown"))


def test_add_special_tokens(tokenizer):
    """With and without them in front: positions count the tokens that are there."""
    with_special = tokenizer(CORPUS[2])["input_ids"]
    without = tokenizer(CORPUS[2], add_special_tokens=False)["input_ids"]
    ((a, b),) = locate(tokenizer, with_special, CORPUS[2], text="lazy").spans
    ((c, d),) = locate(tokenizer, without, CORPUS[2], text="lazy").spans
    assert with_special[a:b] == without[c:d]
    assert a - c == with_special.index(without[0])


def test_markup_is_taken_out(tokenizer):
    """The tokens are those of the text without tags; special tokens are kept as they were."""
    clean = "Name three colours. Be brief, please."
    tagged = "Name three colours. <emphasis>Be brief</emphasis>, please."
    for special in (True, False):
        ids = tokenizer(tagged, add_special_tokens=special)["input_ids"]
        located = locate(tokenizer, ids, tagged, markup=Markup("tag"))
        assert located.token_ids == tokenizer(clean, add_special_tokens=special)["input_ids"]
        expected = locate(tokenizer, located.token_ids, clean, text="Be brief")
        assert located.spans == expected.spans


def test_text_without_marks_is_untouched(tokenizer):
    ids = tokenizer(CORPUS[1])["input_ids"]
    for kind in ("tag", "markdown"):
        located = locate(tokenizer, ids, CORPUS[1], markup=Markup(kind))
        assert located.token_ids == ids
        assert located.spans == ()


@pytest.mark.parametrize(
    ("kind", "text", "words"),
    [
        ("tag", "Be <Emphasis>brief</Emphasis>.", "<Emphasis> at character 3"),
        ("markdown", "**Be\n\nbrief.**", "closed in another paragraph"),
    ],
)
def test_markup_that_marks_nothing(tokenizer, kind, text, words):
    """Refused where the request asks for markup; served where it is the server's, or where there
    is another mark."""
    ids, markup = tokenizer(text)["input_ids"], Markup(kind)

    def asked(chat=None, **fields):
        emphasis = Emphasis.parse({KEY: {"markup": kind, **fields}})
        return Locator(lambda: tokenizer).locate(emphasis, markup, ids, text, chat)

    with pytest.raises(EmphasisError, match=f"(?s)nothing is emphasised: .*{words}"):
        asked()
    chat = Chat([{"role": "user", "content": text}], lambda messages: messages[0]["content"])
    with pytest.raises(EmphasisError, match=f"(?s)nothing is emphasised: message 0: .*{words}"):
        asked(chat)
    assert asked(text="rief").spans
    assert locate(tokenizer, ids, text, markup=markup).spans == ()


def test_markup_needs_text(tokenizer):
    ids = tokenizer("<emphasis>a</emphasis> b")["input_ids"]
    with pytest.raises(EmphasisError, match="came as token ids"):
        locate(tokenizer, ids, None, markup=Markup("tag"))
    with pytest.raises(EmphasisError, match="truncated"):
        locate(tokenizer, ids[2:], "<emphasis>a</emphasis> b", markup=Markup("tag"))
    with pytest.raises(EmphasisError, match="token positions"):
        locate(tokenizer, ids, "<emphasis>a</emphasis> b", markup=Markup("tag"), spans=[[0, 1]])


def test_no_chat(tokenizer):
    ids = tokenizer(CORPUS[0])["input_ids"]
    with pytest.raises(EmphasisError, match="for chats"):
        locate(tokenizer, ids, CORPUS[0], text=[{"role": "user"}])


def test_too_many_ranges(tokenizer):
    text = "ha " * 300
    ids = tokenizer(text)["input_ids"]
    with pytest.raises(EmphasisError, match="at most 256 spans and marks, got 300"):
        locate(tokenizer, ids, text, text=[{"text": "ha", "occurrence": "all"}])


def test_mark_object_is_hashable_and_frozen():
    assert hash(Mark("a")) == hash(Mark("a", field="elsewhere"))
