"""The README's Python example prints what the README says."""

import re
from pathlib import Path

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
EXAMPLE = re.compile(r"```python\n(from vllm import LLM\n.*?)```\n\n```text\n(.*?)```", re.DOTALL)


def test_python(smollm2_engine, monkeypatch, capsys):
    """The code as it stands, on the engine that tests share."""
    import vllm

    code, shown = EXAMPLE.search(README).groups()
    pasta = {"heads": "smollm2-135m-instruct", "alpha": 0.01}

    def start(model, additional_config):
        assert model.endswith("SmolLM2-135M-Instruct")
        assert additional_config == {"pasta": pasta}
        return smollm2_engine

    monkeypatch.setattr(vllm, "LLM", start)
    exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("'")]
    assert printed == shown.splitlines()
