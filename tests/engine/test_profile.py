"""`vllm-pasta eval` and `profile`: prompts, the store, and whole runs against the oracle."""

import contextlib
import html
import json
import os
import re
import resource
import subprocess
import sys

import pytest
import torch
from models import tiny_model, word_tokenizer, worded_llama

from vllm_pasta import HeadSet, cli
from vllm_pasta.errors import PastaError
from vllm_pasta.profiling import methods
from vllm_pasta.profiling.asker import engine as engine_module
from vllm_pasta.profiling.prompts import Prompter, demonstrations
from vllm_pasta.profiling.search.gradients import GradientModel
from vllm_pasta.profiling.search.ranking import Ranker
from vllm_pasta.profiling.store import Store, Trial
from vllm_pasta.tasks import Answer, Probe, load, sample
from vllm_pasta.verify.oracle import Oracle, Steering

EVERY = [(layer, head) for layer in range(4) for head in range(4)]
PROBE = Probe("p", "one two ", "three four", " five", "six", "seven", ("six", "seven"))


def words():
    """Our own examples' words."""
    texts = [PROBE.text, " six", " seven", "eight nine ten"] * 500
    for task in (load("counterfact"), load("biasbios")):
        texts += [f"{probe.text} {probe.target}" for e in task.make() for probe in task.probes(e)]
    return texts


@pytest.fixture(scope="module")
def worded(tmp_path_factory):
    """A tiny random Llama, 4 layers of 4 query heads, that knows our own examples' words."""
    return worded_llama(tmp_path_factory.mktemp("worded"), words())


@pytest.fixture(scope="module")
def oracle(worded):
    return Oracle(worded)


@pytest.fixture(scope="module")
def prompter(worded):
    from transformers import AutoTokenizer

    return Prompter(AutoTokenizer.from_pretrained(worded))


def decoded(prompter, ids):
    return prompter._tokenizer.decode(ids)


def emphasised(prompter, prompt):
    ((start, end),) = prompt.spans
    return decoded(prompter, prompt.ids[start:end])


def test_files_without_ideal_answers(tmp_path):
    """Are refused for what needs them; demonstrations are then of our own making."""
    task = load("ifeval")
    record = {"prompt": "Write, please.", "instruction_id_list": ["punctuation:no_comma"]}
    messages = [{"role": role, "content": "Write, please."} for role in ("system", "user")]
    lines = [{**record, "key": i, "kwargs": [{}], "messages": messages} for i in range(20)]
    (tmp_path / "ifeval_separated.jsonl").write_text("\n".join(map(json.dumps, lines)))
    train = sample(task, "train", 3, folder=tmp_path)
    with pytest.raises(PastaError, match="likelihood needs ideal answers, and ifeval_separated"):
        Ranker(None, None, task, train, 0.01, likelihood=True)
    with pytest.raises(PastaError, match="gradient search needs ideal answers"):
        Ranker(None, None, task, train, 0.01, likelihood=False).profile(EVERY, "gradient", "")
    shots = demonstrations(task, tmp_path)
    assert [shot.target for shot in shots] == [
        example.fields["target"] for example in sample(task, "train", 3).examples
    ]


def test_methods():
    assert methods.parse("starred", 0.1, EVERY).mark == "*"
    assert len(methods.parse("all", 0.1, EVERY).heads) == 16
    assert methods.parse("layers:1-2", 0.1, EVERY).heads.layers == (
        (1, (0, 1, 2, 3)),
        (2, (0, 1, 2, 3)),
    )
    assert methods.parse("head:3.2", 0.1, EVERY).heads.layers == ((3, (2,)),)
    keys = {methods.parse(name, 0.1, EVERY).key for name in ("zero-shot", "quoted", "few-shot")}
    keys |= {methods.parse("all", alpha, EVERY).key for alpha in (0.1, 0.2)}
    of_shares = methods.parse_all(["quoted", "all"], [0.1], [], EVERY, [0.1, 0.2])
    assert [(method.name, method.share) for method in of_shares] == [
        ("quoted", None), ("all α=0.1", None), ("all share=0.1", 0.1), ("all share=0.2", 0.2),
    ]  # fmt: skip
    keys |= {method.key for method in of_shares[2:]}
    assert len(keys) == 7


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nope", "method 'nope': expected zero-shot, starred"),
        ("layer:4", "layers are 0 to 3"),
        ("layers:2-9", "layers are 0 to 3"),
        ("head:3.4", "last head is 3.3"),
        ("smollm2-135m-instruct", "out of range"),
    ],
)
def test_wrong_methods(name, message):
    with pytest.raises(PastaError, match=message):
        methods.parse(name, 0.1, EVERY)


def test_prompts(prompter):
    """Marks, demonstrations and choices; the emphasised words alone are emphasised."""
    plain = prompter.build(PROBE, methods.PLAIN)
    assert decoded(prompter, plain.ids) == "one two three four five"
    assert emphasised(prompter, plain) == " three four"
    assert [decoded(prompter, [i]) for i in plain.choices] == [" six", " seven"]
    assert (plain.target, plain.foil) == (plain.choices[:1], plain.choices[1:])
    shot = Probe("s", "", "eight", " nine", "ten")
    few = prompter.build(PROBE, methods.Method("few-shot", shots=1), [shot])
    assert decoded(prompter, few.ids) == "eight nine ten\n\none two three four five"
    assert emphasised(prompter, few) == " three four"
    starred = prompter.build(PROBE, methods.Method("starred", mark="*"))
    assert decoded(prompter, starred.ids) == "one two *three four* five"
    assert emphasised(prompter, starred) == "three four"


@pytest.mark.parametrize(
    ("foil", "judged"),
    [("", "eight nine ten"), ("eight seven ten", "nine"), ("eight nine ten", "eight nine ten")],
)
def test_judged_tokens(prompter, foil, judged):
    """A likelihood is judged by the words that a wrong answer has not."""
    probe = Probe("p", "", "one", "", "eight nine ten", foil, likelihood=True)
    prompt = prompter.build(probe, methods.PLAIN)
    assert decoded(prompter, [prompt.target[i] for i in prompt.judged]).strip() == judged


def test_chat_prompts(smollm2):
    """In the template; a demonstration is a turn of its own."""
    from transformers import AutoTokenizer

    prompter = Prompter(AutoTokenizer.from_pretrained(smollm2))
    probe = Probe("p", "A text.\n\n", "Answer in JSON.", "", '{"a": 1}', chat=True)
    prompt = prompter.build(probe, methods.Method("few-shot", shots=1), [probe])
    assert decoded(prompter, prompt.ids).count("<|im_start|>assistant") == 2
    assert emphasised(prompter, prompt) == "Answer in JSON."
    assert prompt.spans[0][0] > len(prompt.ids) // 2  # the last one
    assert decoded(prompter, prompt.target) == '{"a": 1}'


def trial(text="one", method=methods.PLAIN):
    task = load("kv")
    return Trial("kv", next(iter(task.make())), Probe("p", "", text, "", ""), method)


def test_store(tmp_path):
    """What was written is there again; a cut line is not; another run's file is refused."""
    path = tmp_path / "answers.jsonl"
    line_ends = "a\nb\u2028c\x85d"  # Python's own splitlines would cut a text at each of them
    Store(path, {"model": "m"}).add(
        [(trial(), Answer(line_ends)), (trial("two"), Answer(logprobs=(-1.0, -2.123456789)))],
        seconds=1.5,
    )
    with path.open("a") as file:
        file.write('{"key": "half')
    again = Store(path, {"model": "m"})
    assert path.read_text().endswith('"seconds": 1.5}\n')
    assert again[trial()] == Answer(line_ends)
    assert again[trial("two")].logprobs == (-1.0, -2.12346)
    assert trial("three") not in again
    assert trial(method=methods.parse("all", 0.1, EVERY)) not in again
    new = Answer(logprobs=(-3.123456789,))
    again.add([(trial("three"), new)])
    before = again[trial("three")]
    del again
    again = Store(path, {"model": "m"})
    assert again[trial("three")] == before != new  # a run is not told more than one that goes on
    assert (again.seconds, len(again)) == (1.5, 3)
    del again
    with pytest.raises(PastaError, match=r"made with another model \('m', now 'n'\)"):
        Store(path, {"model": "n"})
    path.write_text("no JSON\n")
    with pytest.raises(PastaError, match="expected answers of an earlier run"):
        Store(path, {"model": "m"})
    with pytest.raises(PastaError, match="cannot be written: No such file or directory"):
        Store(tmp_path / "no" / "answers.jsonl", {"model": "m"})


def test_store_of_another_run(tmp_path):
    """Two runs that write one file, or one that reads a shard's file amid its writing."""
    path = tmp_path / "answers.jsonl"
    first = Store(path, {"model": "m"})
    for paths in ([path], [tmp_path / "whole.jsonl", [path]]):
        with pytest.raises(PastaError, match=r"answers\.jsonl: another run is writing"):
            Store(paths[0], {"model": "m"}, *paths[1:])
    first.add([(trial(), Answer("a"))])
    del first
    whole = Store(tmp_path / "whole.jsonl", {"model": "m"}, [path])
    assert whole[trial()] == Answer("a")


def test_store_on_a_full_disk(tmp_path):
    """Half an answer in the file, or one that counts though it was not kept."""
    path = tmp_path / "answers.jsonl"
    store = Store(path, {"model": "m"})
    store.add([(trial(), Answer("a"))])
    kept = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(kept) + 50, limits[1]))
    try:
        with pytest.raises(PastaError, match=r"answers\.jsonl: cannot be written: File too"):
            store.add([(trial("two"), Answer("b" * 99))])
        with pytest.raises(PastaError, match=r"answers\.jsonl: cannot be written: File too"):
            store.note("name", "value" * 20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == kept
    assert trial("two") not in store
    assert not store.notes
    store.add([(trial("two"), Answer("b"))])
    del store
    assert Store(path, {"model": "m"})[trial("two")] == Answer("b")


@pytest.fixture
def command(worded, on_engine):
    """Runs `vllm-pasta …` on the tiny model in this process, on an engine that tests share."""
    return on_engine(worded)


@pytest.fixture
def on_engine(engine, tmp_path, monkeypatch, capsys):
    """Makes what runs `vllm-pasta …` on a model."""

    @contextlib.contextmanager
    def session(name):
        yield sys.stderr

    monkeypatch.chdir(tmp_path)
    for module in ("profile", "eval"):
        monkeypatch.setattr(f"vllm_pasta.cli.{module}.engine_session", session)

    def make(model):
        llm = engine(model, max_num_seqs=64, max_num_batched_tokens=1024)
        monkeypatch.setattr("vllm.LLM", lambda model, **options: llm)

        def run(name, *options, status=0):
            assert cli.main([name, str(model), *options]) == status
            return capsys.readouterr()

        return run

    return make


def brute_force(oracle, prompter, examples, alpha, heads=EVERY):
    """Every head's mean margin by the oracle; None is the plain model."""
    task = load("counterfact")
    margins = {}
    for head in [None, *heads]:
        total = 0.0
        for example in examples:
            prompt = prompter.build(task.ranking_probes(example)[0], methods.PLAIN)
            steering = head and Steering(
                list(prompt.spans), {head[0]: [head[1]]}, alpha, len(prompt.ids)
            )
            row = oracle.prompt_logprobs(prompt.ids, steering)[-1]
            total += float(row[prompt.choices[0]] - row[prompt.choices[1]])
        margins[head] = total / len(examples)
    return margins


def test_profile_equals_brute_force(command, oracle, prompter):
    """Every head's score is the oracle's, so is the ranking, and the best are selected."""
    command("profile", "--examples", "3", "--top-k", "4", "--alpha", "0.1")
    heads = HeadSet.load("heads.json")
    profile = heads.provenance["profiles"]["counterfact"]
    expected = brute_force(oracle, prompter, sample(load("counterfact"), "train", 3).examples, 0.1)
    assert profile["plain"] == pytest.approx(expected.pop(None), abs=1e-3)
    best = sorted(expected, key=lambda head: -expected[head])
    assert profile["ranking"] == [f"{layer}.{head}" for layer, head in best]
    assert profile["scores"] == pytest.approx([expected[head] for head in best], abs=1e-3)
    assert heads == methods.head_set(best[:4])
    assert heads.provenance["requests"] == 48
    with open("heads.md") as report:
        assert f"| {profile['ranking'][0]} |" in report.read()
    with open("heads.html") as report:
        page = report.read()
    rows = dict(re.findall(r"<td>([\d.]+)</td><td>(-?[\d.]+)</td>", page))
    for head, score in zip(profile["ranking"], profile["scores"], strict=True):
        assert float(rows[head]) == pytest.approx(score, abs=1e-3)
    assert is_alone(page)


def test_hybrid(on_engine, prompter, tmp_path):
    """The heads of attention layers alone, over the recurrences of the others."""
    folder = tiny_model(
        word_tokenizer(tmp_path / "m", words()), "granitemoehybrid", vocab_size=4096
    )
    command, heads = on_engine(folder), [(layer, head) for layer in (1, 3) for head in range(4)]
    for search in ("full", "gradient"):
        command("profile", "--examples", "2", "--top-k", "3", "--alpha", "0.1", "--search", search)
        profile = HeadSet.load("heads.json").provenance["profiles"]["counterfact"]
        assert set(profile["ranking"]) == {f"{layer}.{head}" for layer, head in heads}
        if search == "full":
            examples = sample(load("counterfact"), "train", 2).examples
            expected = brute_force(Oracle(folder), prompter, examples, 0.1, heads)
            assert profile["plain"] == pytest.approx(expected.pop(None), abs=1e-3)
            best = sorted(expected, key=lambda head: -expected[head])
            assert profile["ranking"] == [f"{layer}.{head}" for layer, head in best]
            assert profile["scores"] == pytest.approx([expected[h] for h in best], abs=1e-3)
    arguments = ("--examples", "2", "--generations", "1", "--json", "--methods")
    rows = json.loads(command("eval", *arguments, "zero-shot,all,layer:3,heads.json").out)["rows"]
    assert {row["method"]: row["heads"] for row in rows} == {
        "zero-shot": 0, "all": 8, "layer:3": 4, "heads.json": 3,
    }  # fmt: skip
    assert len({json.dumps(row["metrics"]) for row in rows}) > 1  # else nothing was steered
    refused = command("eval", *arguments, "layer:2", status=1).err
    assert "layers are 1, 3 (the others have no attention heads)" in refused


def test_interrupted_and_sharded(command, monkeypatch):
    """A run that was stopped goes on; shards together give what one run gives."""
    arguments = ("--examples", "3", "--top-k", "4", "--alpha", "0.1")
    command("profile", *arguments, "--out", "whole.json")
    monkeypatch.setattr(engine_module, "CHUNK", 10)
    stopped = command("profile", *arguments, "--out", "cut.json", "--stop-after", "0", status=1)
    assert "stopped after the time given" in stopped.err
    asked = []
    answer = engine_module.Engine.answer

    left = [None, None, KeyboardInterrupt()]  # the third call is interrupted

    def interrupted(self, questions):
        asked.append(len(questions))
        if left and (interruption := left.pop(0)):
            raise interruption
        return answer(self, questions)

    monkeypatch.setattr(engine_module.Engine, "answer", interrupted)
    assert "interrupted" in command("profile", *arguments, "--out", "cut.json", status=130).err
    command("profile", *arguments, "--out", "cut.json")
    assert sum(asked[:2] + asked[3:]) == 3 + 48  # the plain model's, and each head's, once
    for part in ("0/2", "1/2"):
        asked.clear()
        command("profile", *arguments, "--out", "parts.json", "--shard", part)
        assert sum(asked) == {"0/2": 32, "1/2": 16}[part]  # of three examples: two, one
    asked.clear()
    command("profile", *arguments, "--out", "parts.json")
    assert asked == [3]  # the plain model's alone
    whole, cut, parts = (
        HeadSet.load(f"{name}.json").provenance["profiles"] for name in ("whole", "cut", "parts")
    )
    assert whole == cut == parts
    with pytest.raises(SystemExit):
        cli.main(["profile", "--shard", "2/2"])
    assert (
        "only --search full"
        in command("profile", "--shard", "0/2", "--search", "halving", status=1).err
    )


@pytest.mark.slow  # the answers of one engine are each in a quicker test
def test_over_ray(command, worded, tmp_path):
    """Two engines on one machine, as commands are run: the result is one engine's."""
    pytest.importorskip("ray", reason="needs vllm-pasta[ray]")
    arguments = ["--examples", "3", "--top-k", "4", "--alpha", "0.1"]
    command("profile", *arguments, "--out", "one.json")
    env = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    engine = {"dtype": "float32", "enforce_eager": True, "max_model_len": 256}
    done = subprocess.run(
        [sys.executable, "-m", "vllm_pasta.cli", "profile", worded, *arguments,
         "--tasks", "counterfact", "--out", tmp_path / "two.json", "--ray", "local",
         "--ray-workers", "2", "--engine", json.dumps(engine)],
        capture_output=True, text=True, env=env,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    one, two = (HeadSet.load(tmp_path / f"{name}.json") for name in ("one", "two"))
    assert one.layers == two.layers
    assert one.provenance["answers"] == two.provenance["answers"]
    profiles = [of.provenance["profiles"]["counterfact"] for of in (one, two)]
    assert profiles[0]["ranking"] == profiles[1]["ranking"]
    assert profiles[0]["scores"] == pytest.approx(profiles[1]["scores"], abs=1e-4)


def test_workers_without_a_cluster(command):
    assert "goes with --ray" in command("profile", "--ray-workers", "2", status=1).err


def test_sizes_by_held_out_score(command):
    """`--top-k auto` reports every size it tried, on examples that no ranking saw."""
    printed = command("profile", "--examples", "3", "--top-k", "auto", "--search", "halving").out
    provenance = HeadSet.load("heads.json").provenance
    assert list(provenance["held_out"]) == ["0", "1", "2", "3", "5", "8", "12"]
    assert str(provenance["top_k"]) in provenance["held_out"]
    assert "## Held-out examples, by number of heads" in printed
    command(
        "profile", "--examples", "3", "--top-k", "auto", "--search", "halving", "--alpha", "0.1,0.5"
    )  # fmt: skip
    provenance = HeadSet.load("heads.json").provenance
    k, alpha = provenance["top_k"], provenance["alpha"]
    assert f"{k} α={alpha:g}" in provenance["held_out"]
    assert len(provenance["held_out"]) == 1 + 2 * 6
    refused = command("profile", "--alpha", "0.1,0.5", "--top-k", "3", status=1).err
    assert "--alpha: several are for --top-k auto" in refused


def test_several_tasks(command):
    """The intersection holds heads that are among the first of both."""
    command("profile", "--tasks", "counterfact,biasbios", "--examples", "2", "--top-k", "12")
    heads = HeadSet.load("heads.json")
    first = [set(p["ranking"][:12]) for p in heads.provenance["profiles"].values()]
    assert {f"{layer}.{head}" for layer, of in heads.layers for head in of} == first[0] & first[1]
    command(
        "profile", "--tasks", "counterfact,biasbios", "--examples", "2", "--select", "task",
        "--top-k", "3",
    )  # fmt: skip
    assert len(HeadSet.load("heads-biasbios.json")) == 3


def test_gradient_estimates(worded, oracle, prompter):
    """For weak steering, the estimate is what steering really does (first order)."""
    examples = sample(load("counterfact"), "train", 3).examples
    prompts = [
        prompter.build(load("counterfact").ranking_probes(e)[0], methods.PLAIN) for e in examples
    ]
    estimates = GradientModel(str(worded)).estimate(prompts, 0.99)
    exact = brute_force(oracle, prompter, examples, 0.99)
    plain = exact.pop(None)
    changes = torch.tensor([exact[head] - plain for head in EVERY])
    found = torch.tensor([estimates[head] for head in EVERY])
    assert changes.abs().max() > 1e-4
    torch.testing.assert_close(found, changes, rtol=0.05, atol=2e-5)


def test_likelihood(command, oracle, prompter):
    """The ideal answer's log-probability is what it would be if it had been generated."""
    import dataclasses

    command("profile", "--tasks", "json", "--examples", "1", "--likelihood", "--top-k", "3")
    profile = HeadSet.load("heads.json").provenance["profiles"]["json"]
    (example,) = sample(load("json"), "train", 1).examples
    (probe,) = load("json").probes(example)
    prompt = prompter.build(dataclasses.replace(probe, likelihood=True), methods.PLAIN)
    length = len(prompt.ids) - len(prompt.target)
    layer, head = map(int, profile["ranking"][0].split("."))
    steering = Steering([prompt.spans[0]], {layer: [head]}, 0.01, length)
    for score, of in ((profile["plain"], None), (profile["scores"][0], steering)):
        rows = oracle.prompt_logprobs(prompt.ids, of)[length - 1 : -1]
        expected = rows[range(len(prompt.target)), prompt.target].mean()
        assert score == pytest.approx(float(expected), abs=1e-3)
    assert profile["scores"][0] != pytest.approx(profile["plain"], abs=1e-2)


def test_gradient_search(command, monkeypatch):
    arguments = ("--examples", "2", "--search", "gradient", "--top-k")
    command("profile", *arguments, "2")
    with monkeypatch.context() as patch:
        patch.delattr("vllm_pasta.profiling.search.gradients.GradientModel")  # estimates are kept
        command("profile", *arguments, "3")
    ranking = HeadSet.load("heads.json").provenance["profiles"]["counterfact"]
    assert len(ranking["estimates"]) == len(ranking["ranking"]) == 16
    assert ranking["scores"][0] is not None
    printed = command(
        "profile", "--examples", "2", "--top-k", "3", "--out", "full.json", "--compare",
        "heads.json",
    ).out  # fmt: skip
    assert "counterfact: rank correlation" in printed


def test_gradients_of_several_tasks_together(command):
    """Tasks that share passes, with prompts of other lengths beside them, keep their estimates."""
    found = []
    for tasks in ("counterfact,biasbios", "counterfact", "biasbios"):
        command(
            "profile", "--tasks", tasks, "--examples", "2", "--search", "gradient", "--select",
            "union", "--top-k", "2", "--out", f"{len(found)}.json",
        )  # fmt: skip
        profiles = HeadSet.load(f"{len(found)}.json").provenance["profiles"]
        found.append(
            {
                (task, head): estimate
                for task, of in profiles.items()
                for head, estimate in zip(of["ranking"], of["estimates"], strict=True)
            }
        )
    together, *alone = found
    assert len(together) == 32
    assert together == pytest.approx(alone[0] | alone[1], abs=2e-4)
    assert max(map(abs, together.values())) > 1e-2


def test_eval(command):
    """All methods on the same examples; nothing is asked twice; every answer is kept."""
    arguments = (
        "--examples", "4", "--generations", "1", "--methods",
        "zero-shot,starred,few-shot,all,layer:1,head:2.3", "--alpha", "0.1,0.01", "--share", "0.3",
        "--json",
    )  # fmt: skip
    result = json.loads(command("eval", *arguments).out)
    rows = {row["method"]: row for row in result["rows"]}
    assert list(rows) == [
        "zero-shot", "starred", "few-shot",
        *(f"{name} {s}" for name in ("all", "layer:1", "head:2.3")
          for s in ("α=0.1", "α=0.01", "share=0.3")),
    ]  # fmt: skip
    assert [rows[f"all {s}"]["share"] for s in ("α=0.1", "share=0.3")] == [None, 0.3]
    assert rows["zero-shot"]["metrics"]["ES"]["examples"] == 4
    assert rows["zero-shot"]["metrics"]["fluency"]["examples"] == 1
    assert result["data"]["counterfact"]["examples"] == 4
    with open("answers.jsonl") as lines:
        kept = [json.loads(line) for line in lines]
    assert sum("text" in line for line in kept) == len(rows)
    again = json.loads(command("eval", *arguments).out)
    assert again == result
    with open("answers.jsonl") as lines:
        assert len(list(lines)) == len(kept)
    shown = command("eval", *arguments[:-1], "--markdown", "--html", "page.html").out
    assert "| zero-shot |" in shown
    with open("page.html") as report:
        page = report.read()
    table = [line.strip("| ").split(" | ") for line in shown.splitlines()]
    cells = [re.findall("<td>(.*?)</td>", row) for row in re.findall("<tr>(.*?)</tr>", page)]
    assert [line for line in cells if line] == table[2:]
    (answer,) = (line["text"] for line in kept if line.get("method") == "head:2.3 α=0.1"
                 and "text" in line)  # fmt: skip
    shown = re.findall(r'<p class="answer">(.*?)</p>', page, re.DOTALL)
    assert answer in map(html.unescape, shown)
    probe = load("counterfact").probes(sample(load("counterfact"), "test", 1).examples[0])[0]
    assert f"<mark>{probe.emphasis}</mark>" in page
    assert is_alone(page)
    assert (
        "page.html: cannot be written"
        in command("eval", *arguments[:-1], "--html", "no/page.html", status=1).err
    )


def is_alone(page):
    """Whether a page needs no other file."""
    return not re.findall(r"""\s(?:src|href)=["'](?!#)|url\((?!#)|@import""", page)


def test_counts_of_a_profiles_heads(command):
    command("profile", "--examples", "2", "--top-k", "3")
    printed = command(
        "eval", "--examples", "2", "--methods", "heads.json", "--head-counts", "1,2"
    ).out
    assert [line.split("  ")[0] for line in printed.splitlines()[1:]] == [
        "heads.json", "heads.json: top 1", "heads.json: top 2"
    ]  # fmt: skip
