"""The diffs in patches/: they apply to the supported vLLM, and with them no run-time patch is left.

Broken by: a diff that no longer applies; a run-time patch without a diff; a hook of a diff that is
not called, or that our code does not register with.
"""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import main_job
import pytest

from vllm_pasta.integration import attach

TESTS = Path(__file__).parent.parent
SUPPORT = TESTS / "support"
PATCHES = TESTS.parent / "patches"
# Another vLLM's folder holds those that differ.
MINOR = ".".join(importlib.metadata.version("vllm").split(".")[:2])
DIFFS = [
    own if (own := PATCHES / f"vllm-{MINOR}" / diff.name).exists() else diff
    for diff in sorted((PATCHES / "vllm-0.32").glob("*.patch"))
]


def message(diff):
    return diff.read_text(encoding="utf-8").partition("\n---\n")[0]


def files(diff):
    """The files that a diff changes or adds."""
    return re.findall(r"^\+\+\+ b/(\S+)$", diff.read_text(encoding="utf-8"), flags=re.M)


def link(source, target, changed):
    """Makes ``target`` a copy of the folder ``source``: links, but real copies of what is
    ``changed`` (relative to ``source``) and real folders above that. Bytecode is linked too."""
    target.mkdir()
    inner = {path.parts[0] for path in changed if len(path.parts) > 1}
    own = {path.parts[0] for path in changed if len(path.parts) == 1}
    for entry in source.iterdir():
        if entry.name in inner:
            deeper = [Path(*p.parts[1:]) for p in changed if p.parts[0] == entry.name]
            link(entry, target / entry.name, deeper)
        elif entry.name in own:
            shutil.copy2(entry, target)
        elif entry.name == "__pycache__":
            (target / entry.name).mkdir()
            for compiled in entry.iterdir():
                if f"{compiled.name.partition('.')[0]}.py" not in own:
                    (target / entry.name / compiled.name).symlink_to(compiled)
        else:
            (target / entry.name).symlink_to(entry)


@pytest.fixture(scope="module")
def patched(tmp_path_factory):
    """A folder with the installed vLLM and every diff applied; git allows no fuzz."""
    folder = tmp_path_factory.mktemp("patched")
    changed = {Path(f) for diff in DIFFS for f in files(diff)}
    installed = Path(find_spec("vllm").origin).parent
    vllm_files = [f.relative_to("vllm") for f in changed if f.parts[0] == "vllm"]
    link(installed, folder / "vllm", vllm_files)
    for diff in DIFFS:
        result = subprocess.run(
            ["git", "apply", str(diff)],
            cwd=folder,
            env={**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent)},
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, f"{diff.name}: {result.stderr}"
    for file in changed:  # not skipped, not through a link into the installed vLLM
        assert not (folder / file).is_symlink()
        assert (folder / file).is_file()
    return folder


@pytest.fixture(scope="module")
def report(patched, tiny_text, tmp_path_factory):
    """What the main job reports on the patched copy."""
    heads = tmp_path_factory.mktemp("heads") / "heads.json"
    heads.write_text(json.dumps(main_job.SOME_HEADS))
    own_tests = [patched / f for diff in DIFFS for f in files(diff) if f.startswith("tests/")]
    assert own_tests
    path = [str(patched), str(TESTS.parent), str(SUPPORT), os.environ.get("PYTHONPATH", "")]
    result = subprocess.run(
        [sys.executable, SUPPORT / "main_job.py", tiny_text, heads, *own_tests],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
        capture_output=True,
        text=True,
    )
    lines = [line for line in result.stdout.splitlines() if line.startswith("REPORT ")]
    assert result.returncode == 0, result.stderr[-5000:]
    return json.loads(lines[0].removeprefix("REPORT "))


def test_every_patch_has_a_diff():
    """Named in the diff's message; and the diff in the ledger's entry."""
    ledger = (PATCHES / "README.md").read_text(encoding="utf-8")
    table, _, entries = ledger.partition("\n# Ledger\n")
    entries = {entry.split("`")[1]: entry for entry in re.split(r"^## ", entries, flags=re.M)[1:]}
    named = {}
    for diff in DIFFS:
        assert f"| `{diff.name}` |" in table
        for target in re.findall(r"^  (vllm\.\S+:\S+)$", message(diff), flags=re.M):
            named[target] = diff.name
    for patch in attach.PATCHES:
        assert f"`{named[patch.target]}`" in entries[patch.target]


def test_fit_for_upstream():
    """Nothing in a diff is about us."""
    for diff in DIFFS:
        code = diff.read_text(encoding="utf-8").partition("\n---\n")[2]
        assert not re.search("pasta|emphasis|steer", code, flags=re.I), diff.name
        assert message(diff).startswith("From 0000000000000000000000000000000000000000 "), diff.name


def test_all_superseded(report, patched):
    """The program ran on the patched copy, and no function of vLLM was wrapped there."""
    assert Path(report["vllm"]).is_relative_to(patched)
    assert report["wrapped"] == []


def test_same_tokens(report, engine, tiny_text):
    """As stock vLLM with our run-time patches; emphasis does something; nothing leaks."""
    llm = engine(tiny_text, **main_job.OPTIONS, additional_config=main_job.CONFIG)
    expected = main_job.offline(llm)
    assert main_job.wrapped_functions()  # else the other run's empty list would prove nothing
    assert report["offline"] == expected
    mixed, plain = ([tokens for tokens, _ in expected[run]] for run in ("mixed", "plain"))
    assert [a == b for a, b in zip(mixed, plain, strict=True)] == [
        emphasis is None for emphasis in main_job.EMPHASES
    ]
    assert all(cached > 0 for _, cached in expected["again"])
    assert len(expected["refused"]) == 2
    assert expected["chat"][0][0] != expected["chat"][1][0]
    assert report["beams"] == main_job.beams(llm)
    assert report["connector"] == main_job.connector_bases()


def test_speculative_decoding(report):
    """The rows are known there too, from the attention metadata."""
    for run in ("mixed", "again", "plain", "chat"):
        drafted, alone = (report[engine][run] for engine in ("speculative", "offline"))
        assert [tokens for tokens, _ in drafted] == [tokens for tokens, _ in alone], run


def test_server(report):
    """Flags, middleware, chat marks; a refused stream is a 400."""
    http, offline = report["http"], report["offline"]
    assert http["completion"]["tokens"] == offline["mixed"][1][0]
    assert '"text": " Oslo"' in http["completion"]["header"]
    assert http["chat"]["tokens"] == http["batch"]["tokens"] == offline["chat"][0][0]
    assert http["beam search"]["text"] == http["completion"]["text"]  # width 1 is greedy
    assert re.search(r'^pasta_step_rows_total{kind="steered"} [1-9]', http["metrics"], flags=re.M)
    for name in ("bad completion", "bad chat", "bad response"):
        assert http[name]["status"] == 400, name
        assert "'not there' is not in the prompt" in http[name]["message"]


def test_diffs_own_tests(report):
    """What the diffs add under tests/, run on the patched copy."""
    assert report["own_tests"] == 0
