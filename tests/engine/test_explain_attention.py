"""`vllm-pasta explain --attention`, as a whole command: an engine in a process of its own."""

import json
import os
import re
import sys
from html import unescape

import prepared
import pytest
from last_row import last_row
from transformers import AutoTokenizer

from vllm_pasta.cli import main
from vllm_pasta.verify.oracle import Steering

PROMPT = "The office is closed. Call for repairs."
HEADS = {1: [0, 3], 2: [2]}


def explain(model, *options):
    env = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    command = [sys.executable, "-m", "vllm_pasta.cli", "explain", "--model", model, *options]
    return prepared.run(command, env, timeout=600)


def test_attention(tiny, tiny_oracle, tmp_path):
    """Mass on the marks of every steered head, and one head's weights, as the oracle has them."""
    page = tmp_path / "page.html"
    emphasis = {"text": "Call for", "heads": HEADS, "alpha": 0.05}
    engine = {"dtype": "float32", "max_model_len": 256}
    done = explain(
        tiny, "--prompt", PROMPT, "--emphasis", json.dumps(emphasis), "--attention", "2:2",
        "--engine", json.dumps(engine), "--json", "--html", page,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    ((start, end),) = [marked["tokens"] for marked in told["emphasised"]]
    seen = told["attention"]
    assert (seen["alpha"], seen["alpha_from"]) == (0.05, "request")
    assert (seen["layer"], seen["head"]) == (2, 2)
    ids = AutoTokenizer.from_pretrained(tiny)(PROMPT).input_ids
    assert told["prompt_tokens"] == len(ids)
    steering = Steering([(start, end)], HEADS, 0.05, len(ids))
    for kind, how in (("plain", None), ("emphasised", steering)):
        weights = last_row(tiny_oracle, ids, how)
        for of in seen["heads"]:
            mass = float(weights[of["layer"]][of["head"]][start:end].sum())
            assert of[kind] == pytest.approx(mass, abs=2e-4), (of, kind)
        assert seen["map"][kind] == pytest.approx(weights[2][2].tolist(), abs=2e-4)
    text = page.read_text()
    shown = re.findall(r'<span title="([\d.]+)" style="[^"]*">([^<]*)</span>', text)
    assert "".join(unescape(piece) for _, piece in shown) == 2 * PROMPT
    assert [float(n) for n, _ in shown] == pytest.approx(
        seen["map"]["plain"] + seen["map"]["emphasised"], abs=1e-4
    )


def test_options_without_attention(tiny, capsys):
    """They would have no effect."""
    arguments = ["explain", "--model", str(tiny), "--prompt", PROMPT, "--emphasis", "Call"]
    assert main([*arguments, "--heads", "auto"]) == 1
    assert "go with --attention" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*arguments, "--attention", "2"])
    assert "expected LAYER:HEAD" in capsys.readouterr().err
