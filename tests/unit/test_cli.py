"""The command `vllm-pasta`, without an engine."""

import subprocess
import sys

import pytest

from vllm_pasta import __version__, cli
from vllm_pasta.cli.main import COMMANDS


def exits(argv):
    with pytest.raises(SystemExit) as raised:
        cli.main(argv)
    return raised.value.code


def test_help_lists_commands(capsys):
    assert exits(["--help"]) == 0
    assert "demo" in capsys.readouterr().out


def test_version(capsys):
    assert exits(["--version"]) == 0
    assert capsys.readouterr().out == f"vllm-pasta {__version__}\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "COMMAND"),
        (["dmeo"], "invalid choice: 'dmeo'"),
        (["demo", "--alpha", "0"], "--alpha: expected a finite number above 0, got '0'"),
        (["demo", "--alpha", "nan"], "--alpha: expected a finite number above 0, got 'nan'"),
        (["demo", "--share", "1"], "--share: expected a number above 0 and below 1, got '1'"),
        (
            ["demo", "--share", "0.3", "--alpha", "0.1"],
            "--alpha: not allowed with argument --share",
        ),
        (["eval", "--share", "0.3,2"], "--share: expected a number above 0 and below 1, got '2'"),
        (["demo", "--cases", "-1"], "--cases: expected a whole number from 1 on, got '-1'"),
        (["demo", "--max-tokens", "x"], "--max-tokens: expected a whole number"),
    ],
)
def test_wrong_arguments(argv, message, capsys):
    assert exits(argv) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["demo", "--model", "some/model"], "--model needs --heads"),
        (["demo", "--heads", "nope.json"], "nope.json"),
        (["demo", "--cases", "3"], "VLLM_PASTA_DATA"),
    ],
)
def test_errors_that_we_can_name(argv, message, capsys, monkeypatch):
    """One line on stderr and status 1, not a traceback; no engine is started for it."""
    monkeypatch.delenv("VLLM_PASTA_DATA", raising=False)
    assert cli.main(argv) == 1
    error = capsys.readouterr().err
    assert error.startswith("vllm-pasta: ")
    assert message in error


def test_plugin_left_out(capsys, monkeypatch):
    """The demo would show plain answers twice."""
    monkeypatch.setenv("VLLM_PLUGINS", "")
    assert cli.main(["demo"]) == 1
    assert "VLLM_PLUGINS" in capsys.readouterr().err


def test_imports_neither_vllm_nor_torch():
    code = "import sys, vllm_pasta.cli; print([m for m in ('vllm', 'torch') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_fp32_where_bf16_is_slow(monkeypatch, caplog):
    """On an x86 CPU without AVX-512, whatever starts an engine by itself takes fp32 and says so."""
    import torch

    from vllm_pasta.profiling import engine

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(engine.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: True)
    assert "dtype" not in engine.engine_options({}, eager=True)
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: False)
    assert not caplog.records
    assert engine.engine_options({}, eager=True)["dtype"] == "float32"
    assert [record.message for record in caplog.records] == [engine.FP32_NOTICE]
    assert engine.engine_options({"dtype": "bfloat16"}, eager=True)["dtype"] == "bfloat16"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert engine.cpu_dtype() is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(engine.platform, "machine", lambda: "aarch64")
    assert engine.cpu_dtype() is None


def test_option_is_named(capsys, monkeypatch, tmp_path):
    """A library's message says what is wrong; the command adds which option it is about."""
    monkeypatch.chdir(tmp_path)
    assert cli.main(["eval", "--methods", "nope"]) == 1
    assert capsys.readouterr().err.startswith("vllm-pasta: --methods: method 'nope': expected")
    assert exits(["eval", "--engine", "[]"]) == 2
    assert "--engine: expected a JSON object, got '[]'" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    assert exits([command, "--help"]) == 0
    assert f"usage: vllm-pasta {command}" in capsys.readouterr().out
