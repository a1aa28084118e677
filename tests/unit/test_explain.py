"""`vllm-pasta explain` shows what a request would emphasise."""

import json
import re
import shlex
from functools import cache
from html import unescape
from pathlib import Path

import pytest
from models import byte_tokenizer
from transformers import AutoConfig

from vllm_pasta.cli import main
from vllm_pasta.cli.explain import source


@pytest.fixture(autouse=True, scope="module")
def one_tokenizer():
    """Loading it is nearly all that the command does, and the same for every test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vllm_pasta.cli.explain.load_tokenizer", cache(source.load_tokenizer))
        yield


PROMPT = "Name three colours. Answer in JSON. Be brief."


@pytest.fixture
def explain(smollm2, capsys):
    def run(*arguments):
        status = main(["explain", "--model", str(smollm2), *arguments])
        output = capsys.readouterr()
        return status, output.out, output.err

    return run


def test_text(explain):
    status, out, _ = explain("--prompt", PROMPT, "--emphasis", "Answer in JSON.")
    assert status == 0
    assert "Name three colours.« Answer in JSON.» Be brief." in out
    assert "4 of 11 tokens emphasised: [4, 8)" in out


def test_layers_that_have_heads(tmp_path, capsys):
    """Of a hybrid model, by its configuration; its weights are not there."""
    AutoConfig.for_model(
        "granitemoehybrid", layer_types=["mamba", "attention"] * 2, num_hidden_layers=4
    ).save_pretrained(byte_tokenizer(tmp_path))
    command = ["explain", "--model", str(tmp_path), "--prompt", "a b c", "--emphasis"]
    assert main([*command, '{"text": "b", "heads": {"3": [0]}}']) == 0
    assert "layers with attention heads: 1, 3" in capsys.readouterr().out
    assert main([*command, "b", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["attention_layers"] == [1, 3]
    assert main([*command, '{"text": "b", "heads": {"2": [0]}}']) == 1
    assert "layer 2 has no attention heads" in capsys.readouterr().err


def test_json(explain):
    emphasis = json.dumps({"text": {"text": "e", "occurrence": "last"}})
    _, out, _ = explain("--prompt", PROMPT, "--emphasis", emphasis, "--json")
    report = json.loads(out)
    assert report["prompt_tokens"] == 11
    assert report["emphasised"] == [{"tokens": [9, 10], "text": " brief", "pieces": [" brief"]}]


@pytest.mark.parametrize(
    ("fields", "alpha", "said"),
    [
        ({"alpha": 0.3, "heads": "smollm2-135m-json"}, 0.3, "α 0.3, from the request"),
        ({"heads": "smollm2-135m-json"}, 0.1, "α 0.1, from the head set, unless the server"),
        ({"heads": {"heads": {"1": [0]}, "alpha": 0.2}}, 0.2, "α 0.2, from the head set"),
        ({"heads": {"1": [0]}}, None, ""),
        ({}, None, ""),
    ],
)
def test_strength(explain, fields, alpha, said):
    """As far as the request alone tells: it, or else its head set."""
    emphasis = json.dumps({"text": "JSON", **fields})
    printed = explain("--prompt", PROMPT, "--emphasis", emphasis)[1]
    assert said in printed
    assert bool(said) == ("α" in printed)
    report = json.loads(explain("--prompt", PROMPT, "--emphasis", emphasis, "--json")[1])
    assert report["alpha"] == alpha


def test_tags_and_messages(explain, tmp_path):
    """Tags are read by default; a conversation goes through its template."""
    _, out, _ = explain("--prompt", "a <b>word</b> here", "--tag", "b")
    assert "a« word» here" in out
    messages = tmp_path / "messages.json"
    messages.write_text(
        json.dumps([{"role": "user", "content": [{"type": "text", "text": PROMPT}]}])
    )
    _, out, _ = explain("--messages", f"@{messages}", "--emphasis", '[{"role": "user"}]')
    assert f"<|im_start|>user\n«{PROMPT}»<|im_end|>" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompt", PROMPT, "--emphasis", "Answer in XML"], "closest is 'Answer in JSO'"),
        (["--prompt", PROMPT, "--emphasis", "null"], "got null"),
        (["--prompt", "@/no/such/file"], "cannot be read"),
        (["--messages", "{"], "chat messages as JSON"),
        (["--messages", "{}"], "role"),
        (["--messages", '[{"content": "no role"}]'], "chat template"),
    ],
)
def test_errors(explain, arguments, words):
    status, _, err = explain(*arguments)
    assert status == 1
    assert words in err


def test_pieces_are_not_decoded_alone(capsys, monkeypatch):
    """SentencePiece: a token decoded by itself loses its space."""
    from test_locate import CORPUS, sentencepiece_like

    monkeypatch.setattr("vllm_pasta.cli.explain.load_tokenizer", lambda _: sentencepiece_like())
    arguments = ["--prompt", CORPUS[0], "--emphasis", "three colours"]
    assert main(["explain", "--model", "x", *arguments]) == 0
    shown = capsys.readouterr().out.split("\n\n")[0]
    assert shown.replace("«", "").replace("»", "").endswith(CORPUS[0])
    assert shown.split("«")[1].split("»")[0].strip() == "three colours"
    assert main(["explain", "--model", "x", *arguments, "--json"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)["emphasised"]
    assert entry["text"].strip() == "three colours"


PAGES = "".join(
    (Path(__file__).parents[2] / page).read_text(encoding="utf-8")
    for page in ("README.md", "docs/marking.md")
)
SHOWN = re.findall(r"^\$ (vllm-pasta explain (?:.*\\\n)*.*)\n((?:(?!\$ |```).*\n)*)", PAGES, re.M)


def test_documents_show_every_way():
    words = "".join(command for command, _ in SHOWN)
    for way in ("text", "occurrence", "chars", "spans", "message", "role", "<emphasis>", "**"):
        assert way in words


@pytest.mark.parametrize(("command", "output"), SHOWN, ids=range(len(SHOWN)))
def test_documents(command, output, smollm2, capsys):
    """What README.md and docs/marking.md show is what the program prints."""
    arguments = shlex.split(command.replace("MODEL", str(smollm2)).replace("\\\n", " "))
    assert main(arguments[1:]) == 0
    printed = capsys.readouterr().out
    assert [line.rstrip() for line in printed.rstrip().splitlines()] == output.rstrip().splitlines()


def test_unknown_model(capsys):
    assert main(["explain", "--model", "/no/such/model", "--prompt", "a"]) == 1
    assert "no tokenizer there" in capsys.readouterr().err


def test_html(explain, tmp_path):
    """A page with each token once, the emphasised ones with their strength; text stays text."""
    page = tmp_path / "page.html"
    prompt = "Name a <b>colour</b> 🌍.\nAnswer in JSON."
    marks = [{"text": "colour", "alpha": 0.1}, "Answer in JSON."]
    status, out, _ = explain(
        "--prompt", prompt, "--emphasis", json.dumps(marks), "--html", str(page)
    )
    assert status == 0
    assert "tokens emphasised" in out
    text = page.read_text(encoding="utf-8")
    (shown,) = re.findall(r'<p class="prompt tokens">(.*?)</p>', text, re.DOTALL)
    assert unescape(re.sub(r"<[^>]+>", "", shown)) == prompt
    assert re.findall(r"<mark[^>]*>([^<]*)<", shown) == ["colour", "Answer", " in", " JSON", "."]
    assert '<mark class="weak" title="strength 0.1">colour</mark>' in shown
    assert not re.findall(r"""(?:src|href)=["']|url\(|@import""", text)
    status, _, err = explain("--prompt", prompt, "--html", str(tmp_path / "no" / "page.html"))
    assert status
    assert "--html" in err


def test_images_are_for_engines(explain):
    status, _, err = explain("--prompt", PROMPT, "--emphasis", '[{"image": 0}]')
    assert status != 0
    assert "POST /v1/emphasis/resolve" in err
