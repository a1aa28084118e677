"""The command `vllm-pasta`, without an engine."""

import subprocess
import sys

import pytest

from vllm_pasta import __version__, cli


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
