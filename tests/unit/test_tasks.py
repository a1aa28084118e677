"""Tasks: metrics on hand-made outputs, generators, public formats, splits."""

import json
import math
import pickle
from contextlib import nullcontext

import nltk
import pytest

from vllm_pasta import tasks
from vllm_pasta.errors import PastaError
from vllm_pasta.profiling import methods
from vllm_pasta.profiling.asker import Asker
from vllm_pasta.profiling.evaluation import evaluate
from vllm_pasta.profiling.store import Store, Trial
from vllm_pasta.tasks import ifeval
from vllm_pasta.tasks.base import Answer, Task
from vllm_pasta.tasks.data import SHARES, split_of
from vllm_pasta.tasks.metrics import consistency, contains_value, fluency, json_objects

ALL = list(tasks.BUILT_IN)


def first(name):
    task = tasks.load(name)
    return task, next(iter(task.make()))


def score(name, **answers):
    task, example = first(name)
    return task.score(example, answers), example.fields


def test_counterfact_scores():
    answers = {
        "efficacy": Answer(logprobs=(-1.0, -3.0)),
        "paraphrase-0": Answer(logprobs=(-1.0, -2.0)),
        "paraphrase-1": Answer(logprobs=(-2.0, -1.0)),
        "neighbour-0": Answer(logprobs=(-2.0, -1.0)),
        "generation": Answer(text="one two three four"),
    }
    scores, _ = score("counterfact", **answers)
    assert scores.pop("fluency") == pytest.approx((2 / 3 * math.log2(3) + 4 / 3) / 2)
    assert scores == {"margin": 2.0, "ES": 1.0, "PS": 0.5, "NS": 1.0, "consistency": 0.0}
    scores, _ = score("counterfact", efficacy=Answer(logprobs=(-1.0, -1.0)))
    assert scores == {"margin": 0.0, "ES": 0.0}


@pytest.mark.parametrize(
    ("answer", "valid", "right"),
    [
        ('{{"name": "{name}", "occupation": "{occupation}"}}', 1, 1),
        ('Sure: {{"who": {{"job": "senior {occupation}"}}}} and so on', 1, 1),
        ('{{"name": "{name}", "occupation": "astronaut"}}', 1, 0),
        ('{{"name": , "occupation": ,}}', 0, 0),  # the instruction's example, repeated
        ("{occupation}", 0, 0),
        ("", 0, 0),
    ],
)
def test_json_scores(answer, valid, right):
    task, example = first("json")
    scores = task.score(example, {"answer": Answer(text=answer.format(**example.fields))})
    assert (scores["F.Acc"], scores["P.Acc"]) == (valid, right)
    assert scores[task.objective] == (valid + right) / 2
    assert scores["right"] == (right or answer == "{occupation}")  # the task itself, JSON or not


@pytest.mark.parametrize(
    ("answer", "form", "right"),
    [
        ("Solution: {steps}", 1, 1),
        (" **Solution**: it is {result}.", 1, 1),
        ("The answer is {result}.", 0, 1),
        ("Solution: {result} and 9999", 1, 0),  # the last number counts
        ("{result} is the Solution: ?", 0, 1),
        ("", 0, 0),
    ],
)
def test_arithmetic_scores(answer, form, right):
    """Form and result by themselves."""
    task, example = first("arithmetic")
    scores = task.score(example, {"answer": Answer(text=answer.format(**example.fields))})
    assert scores == {"format": form, "right": right, "both": form * right}


def test_what_is_retained_is_not_what_obeys():
    """Every task names columns that it has; what it retains is judged by other ones."""
    for name in ALL:
        task = tasks.load(name)
        assert {*task.obedience, *task.retained} <= set(task.columns)
        assert task.obedience
        assert not {*task.obedience} & {*task.retained}


LONG = "were born by the sea and went to school in a small town far away from home"


@pytest.mark.parametrize(
    ("answer", "acc", "all_acc"),
    [
        (f"They {LONG} with their dog", 1, 1),
        (f"They {LONG} with her dog", 1, 0),
        (f"She {LONG}", 0, 0),
        (f"HE {LONG}", 0, 0),
        (f"The {LONG}", 1, 1),
        ("They", 0, 0),
        ("", 0, 0),  # nothing is left of the text, so no pronoun either
    ],
)
def test_pronoun_scores(answer, acc, all_acc):
    scores, _ = score("pronouns", answer=Answer(text=answer))
    assert (scores["Acc"], scores["A.Acc"]) == (acc, all_acc)


def test_biasbios_scores():
    task, example = first("biasbios")
    (probe,) = task.probes(example)
    at = probe.choices.index(example.fields["occupation"])
    logprobs = [-5.0] * len(probe.choices)
    logprobs[at] = -4.0
    assert task.score(example, {"label": Answer(logprobs=tuple(logprobs))}) == {
        "Acc": 1.0,
        "margin": 1.0,
    }
    logprobs[at - 1] = -3.0
    assert task.score(example, {"label": Answer(logprobs=tuple(logprobs))})["Acc"] == 0.0


def test_kv_scores():
    task, example = first("kv")
    (probe,) = task.probes(example)
    assert task.score(example, {"answer": Answer(text=f" {probe.target} and")}) == {"Acc": 1.0}
    other = next(v for k, v in example.fields["pairs"] if k != example.fields["key"])
    assert task.score(example, {"answer": Answer(text=other)}) == {"Acc": 0.0}


IFEVAL = {
    "key": 1001,
    "prompt": "Tell me about Japan. Your answer must not have any commas.",
    "instruction_id_list": ["punctuation:no_comma"],
    "kwargs": [{"num_words": None}],
}
SEPARATED = {
    **IFEVAL,
    "messages": [
        {"role": "system", "content": "Do not use commas."},
        {"role": "user", "content": "Tell me about Japan."},
    ],
}
SENTENCE = "Mr. Sato has lived by the sea for ten years"


@pytest.mark.parametrize(
    ("answer", "strict", "loose"),
    [
        (f"{SENTENCE}.", 1, 1),
        (f"{SENTENCE}, he says.", 0, 0),
        (f"Well, here it is:\n{SENTENCE}.", 0, 1),  # without the first line
        ("Sea.", 0, 0),  # has no comma, but says nothing
        ("the sea " * 20, 0, 0),
        ("", 0, 0),
    ],
)
def test_ifeval_scores(answer, strict, loose):
    task, example = first("ifeval")
    assert example.fields["ids"] == IFEVAL["instruction_id_list"]
    scores = task.score(example, {"answer": Answer(text=answer)})
    scores.pop("fluency")
    assert scores == {
        "prompt": strict,
        "instruction": strict,
        "prompt, loose": loose,
        "instruction, loose": loose,
    }


def test_ifeval_counts_each_instruction():
    task = tasks.load("ifeval")
    example = next(e for e in task.make() if len(e.fields["ids"]) == 3)
    capitals = example.fields["target"].replace("P.S.", "")
    scores = task.score(example, {"answer": Answer(text=capitals)})
    assert (scores["prompt"], scores["instruction"]) == (0, pytest.approx(2 / 3))


def test_ifeval_retains_the_plain_answer(tmp_path):
    """Likeness to what the plain model says: only where that is asked, and of each example."""
    task, store = tasks.load("ifeval"), Store(tmp_path / "answers.jsonl", {})
    examples, steered = list(task.make())[:2], methods.steer("steered", [(0, 0)], 0.1)
    told = {methods.PLAIN: ("by harbours", "of comets"), steered: ("BY HARBOURS", "of fish")}
    store.add(
        (Trial("ifeval", example, *task.probes(example), method), Answer(text))
        for method, texts in told.items()
        for example, text in zip(examples, texts, strict=True)
    )
    with Asker("no model", {}, store, nullcontext) as asker:  # the store has every answer
        plain, other = evaluate(asker, task, examples, list(told))
        (alone,) = evaluate(asker, task, examples, [steered])
    assert plain.retained == pytest.approx(1.0)
    assert other.retained == pytest.approx(0.5)
    assert alone.retained is None


def test_ifeval_splits_sentences_without_a_download(tmp_path, monkeypatch):
    """By the packaged model, which knows abbreviations; NLTK's own would be downloaded."""
    monkeypatch.setenv("VLLM_PASTA_CACHE", str(tmp_path))
    monkeypatch.setattr(nltk.data, "path", [])
    ifeval._provide_sentence_model()
    assert [str(tmp_path / "nltk_data")] == nltk.data.path
    assert nltk.sent_tokenize(f"{SENTENCE}. So do I.") == [f"{SENTENCE}.", "So do I."]


def test_ifeval_needs_its_checkers(monkeypatch):
    monkeypatch.setattr(ifeval, "find_spec", lambda name: None)
    with pytest.raises(PastaError, match=r"pip install vllm-pasta\[ifeval\]"):
        tasks.load("ifeval")


def test_measures_of_text():
    assert fluency("") == fluency("one") == 0.0
    assert fluency("la la la la la la la") == 0.0
    assert fluency("a b c d e f g h") > fluency("a b a b a b a b") > 0
    assert consistency("", "bright comets") == 0.0
    assert consistency("comets bright", "bright comets") == pytest.approx(1.0)
    assert 0 < consistency("bright bright bright bright", "bright comets") < 1
    assert list(json_objects('{"a": {"b": 1}, "c": ')) == [{"b": 1}]
    assert contains_value({"a": ["x", {"b": "a Painter"}]}, "painter")
    assert not contains_value({"painter": 1}, "painter")


@pytest.mark.parametrize("name", ALL)
def test_generators(name):
    """Enough examples, the same each time; an ideal answer scores best; emphasis is there."""
    task = tasks.load(name)
    examples = list(task.make())
    assert [e.fields for e in examples] == [e.fields for e in task.make()]
    for split, share in SHARES.items():
        assert len(tasks.sample(task, split, 5 * share).examples) == 5 * share
    for example in examples[:: len(examples) // 20]:
        probes = task.probes(example)
        asked = {probe.name for probe in probes}
        assert len(asked) == len(probes)
        assert {probe.name for probe in task.ranking_probes(example)} <= asked
        ideal = {}
        for probe in probes:
            assert probe.emphasis.strip()
            assert probe.text.index(probe.emphasis) >= 0
            wanted = probe.foil if probe.name.startswith("neighbour") else probe.target
            ideal[probe.name] = Answer(
                text="" if probe.choices else wanted,
                logprobs=tuple(0.0 if choice == wanted else -1.0 for choice in probe.choices),
            )
        scores = task.score(example, ideal) | task.beside_plain(example, ideal, ideal)
        assert scores.keys() >= {*task.columns, task.objective}
        for metric in task.columns.keys() - {"fluency", "consistency"}:
            assert scores[metric] == 1.0, metric


def test_splits_do_not_overlap():
    """Whatever the seed: it chooses within a split."""
    task = tasks.load("counterfact")
    keys = {
        (split, seed): {e.key for e in tasks.sample(task, split, 30, seed).examples}
        for split in SHARES
        for seed in (0, 1)
    }
    for split in SHARES:
        assert keys[split, 0] != keys[split, 1]
        for other in SHARES.keys() - {split}:
            assert not keys[split, 0] & (keys[other, 0] | keys[other, 1])
    one, two = (tasks.sample(task, "train", 10, seed=3) for _ in range(2))
    assert one == two
    assert {split_of(e.key) for e in one.examples} == {"train"}
    with pytest.raises(PastaError, match="expected 100000 examples of the test split"):
        tasks.sample(task, "test", 100_000)


ROME = {
    "requested_rewrite": {
        "prompt": "{} is in",
        "subject": "X",
        "target_new": {"str": "Rome"},
        "target_true": {"str": "Paris"},
    },
    "paraphrase_prompts": ["X lies in"],
    "neighborhood_prompts": ["Y is in"],
}
WIKI = {
    "prompt": "Read the bio below.\n\nBio: ann lee -lrb- born 1950 -rrb- is an english painter . "
    "she lives in york .",
    "completion": "- occupation is landscape painter\n\n- name is ann lee<|endoftext|>",
}
BIOS = {
    "raw": "Dr. Ann Lee is a software engineer. She lives in York.",
    "name": ("Ann", "", "Lee"),
    "title": "software_engineer",
}


def test_public_formats(tmp_path):
    counterfact = tasks.load("counterfact")
    (tmp_path / "counterfact.json").write_text(json.dumps([ROME]))
    (example,) = counterfact.read(tmp_path / "counterfact.json")
    texts = [probe.text for probe in counterfact.probes(example)]
    shared = "Previously, X is in Paris. Currently, X is in Rome. "
    assert texts == [shared + end for end in ("X is in", "X lies in", "Y is in", "X is in")]
    assert counterfact.probes(example)[0].emphasis == "X is in Rome"

    (tmp_path / "wiki_bios.jsonl").write_text(json.dumps(WIKI) + "\n")
    (example,) = tasks.load("biasbios").read(tmp_path / "wiki_bios.jsonl")
    assert example.fields == {
        "name": "ann lee",
        "first": "ann lee (born 1950) is an english painter.",
        "rest": "she lives in york.",
        "occupation": "painter",
    }
    (tmp_path / "BIOS.pkl").write_bytes(pickle.dumps([BIOS]))
    (example,) = tasks.load("biasbios").read(tmp_path / "BIOS.pkl")
    assert example.fields["occupation"] == "software engineer"
    assert example.fields["first"] == "Dr. Ann Lee is a software engineer."

    pair = {"ordered_kv_records": [["a", "1"], ["b", "2"]], "key": "b", "value": "2"}
    (tmp_path / "kv_retrieval_75.jsonl").write_text(json.dumps(pair))
    (example,) = tasks.load("kv").read(tmp_path / "kv_retrieval_75.jsonl")
    assert tasks.load("kv").probes(example)[0].emphasis == '"b": "2"'

    gsm8k = {"question": "Two and 1,000?", "answer": "2+1000 = <<2+1000=1002>>1002\n#### 1,002"}
    (tmp_path / "gsm8k.jsonl").write_text(json.dumps(gsm8k))
    (example,) = tasks.load("arithmetic").read(tmp_path / "gsm8k.jsonl")
    assert (example.fields["steps"], example.fields["result"]) == ("2+1000 = 1002", 1002)

    for record, emphasis in (
        (IFEVAL, "Your answer must not have any commas."),
        (SEPARATED, "Do not use commas."),
    ):
        (tmp_path / "ifeval.jsonl").write_text(json.dumps(record))
        (example,) = tasks.load("ifeval").read(tmp_path / "ifeval.jsonl")
        (probe,) = tasks.load("ifeval").probes(example)
        assert probe.emphasis == emphasis
        assert probe.before.strip() == "Tell me about Japan."
        assert probe.after == ""


def test_wrong_formats(tmp_path):
    (tmp_path / "counterfact.jsonl").write_text('{"prompt": "no such thing"}\n')
    with pytest.raises(PastaError, match=r"counterfact\.jsonl: not in the format of counterfact"):
        tasks.sample(tasks.load("counterfact"), "train", 1, folder=tmp_path)
    (tmp_path / "BIOS.pkl").write_bytes(pickle.dumps(print))
    with pytest.raises(PastaError, match="expected plain data"):
        tasks.sample(tasks.load("json"), "train", 1, folder=tmp_path)


def test_names(monkeypatch):
    """Other packages' tasks are found by their entry point."""
    assert set(ALL) <= set(tasks.names())
    with pytest.raises(PastaError, match="unknown; known are counterfact, json"):
        tasks.load("nope")

    class Mine(tasks.load("kv").__class__):
        name = "mine"

    class Entry:
        name = "mine"

        def load(self):
            return Mine

    monkeypatch.setattr(tasks, "entry_points", lambda **_: [Entry()])
    assert "mine" in tasks.names()
    assert isinstance(tasks.load("mine"), Task)
