"""`vllm-pasta explain` shows what a request would emphasise."""

import json

import pytest

from vllm_pasta.cli import main

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


def test_json(explain):
    emphasis = json.dumps({"text": {"text": "e", "occurrence": "last"}})
    _, out, _ = explain("--prompt", PROMPT, "--emphasis", emphasis, "--json")
    report = json.loads(out)
    assert report["prompt_tokens"] == 11
    assert report["emphasised"] == [{"tokens": [9, 10], "text": " brief", "pieces": [" brief"]}]


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
    ],
)
def test_errors(explain, arguments, words):
    status, _, err = explain(*arguments)
    assert status == 1
    assert words in err


def test_unknown_model(capsys):
    assert main(["explain", "--model", "/no/such/model", "--prompt", "a"]) == 1
    assert "no tokenizer there" in capsys.readouterr().err
