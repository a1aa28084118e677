"""The programs in examples/, and the README's, run and show what they say; for client.py see
tests/server."""

import contextlib
import os
import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
README = (EXAMPLES.parent / "README.md").read_text(encoding="utf-8")
SHOWN = re.compile(r"```python\n(from vllm import LLM\n.*?)```\n\n```text\n(.*?)```", re.DOTALL)


pytestmark = pytest.mark.xdist_group("test_beam_search")  # where there are workers: one engine


@pytest.fixture
def example(smollm2, smollm2_engine, tmp_path, monkeypatch, capsys):
    """Runs a program as `python FILE MODEL` would, on the engine that tests share."""

    @contextlib.contextmanager
    def session(name):
        yield sys.stderr

    def start(model, additional_config, **options):
        assert model == str(smollm2)
        assert additional_config["pasta"].get("heads") in (None, "smollm2-135m-instruct")
        return smollm2_engine

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("vllm.LLM", start)
    monkeypatch.setattr("vllm_pasta.cli.profile.engine_session", session)

    def run(name):
        monkeypatch.setattr(sys, "argv", [name, str(smollm2)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_mark_text(example):
    plain, emphasised = example("mark_text.py").split("emphasised:")
    assert "Germany" in plain
    assert "Brazil" in emphasised


def test_chat(example):
    plain, emphasised = example("chat.py").split("\nemphasised:\n")
    assert plain.startswith("plain:\n")
    assert "{" in emphasised
    assert "Marine" in emphasised
    assert plain.removeprefix("plain:\n").strip() != emphasised.strip()


def test_beam_search(example):
    lines = example("beam_search.py").splitlines()
    assert [line.split(",")[0] for line in lines] == ["plain"] * 2 + ["emphasised"] * 2
    assert "Germany" in lines[0]
    assert "Brazil" in lines[2]


def test_find_heads(example):
    printed = example("find_heads.py")
    assert "## 5 heads (intersection)" in printed
    assert "\n5 heads, by layer: {" in printed
    assert {path.name for path in Path.cwd().iterdir()} >= {"heads.json", "heads.md"}


def test_readme(smollm2_engine, monkeypatch, capsys):
    """The README's code as it stands, on the engine that tests share, prints what follows it."""
    code, shown = SHOWN.search(README).groups()

    def start(model, additional_config):
        assert model.endswith("SmolLM2-135M-Instruct")
        assert additional_config == {"pasta": {"heads": "smollm2-135m-instruct", "alpha": 0.01}}
        return smollm2_engine

    monkeypatch.setattr("vllm.LLM", start)
    exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("'")]
    assert printed == shown.splitlines()


def test_every_example_is_listed():
    """In the folder's README, and no file there is without a test."""
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    files = {path.name for path in EXAMPLES.glob("*.py")}
    assert all(f"[{name}]({name})" in listed for name in files)
    tests = Path(__file__).read_text(encoding="utf-8")
    tests += (EXAMPLES.parent / "tests/server/test_server.py").read_text(encoding="utf-8")
    assert all(f'"{name}"' in tests for name in files)
    assert os.access(EXAMPLES / "disaggregated" / "proxy.py", os.R_OK)
