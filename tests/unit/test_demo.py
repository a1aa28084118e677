"""The demo's judgements and its layout; the whole command: tests/engine/test_demo_command.py."""

import argparse
import io
import json
import shlex
import threading

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.text import Text

from vllm_pasta.cli import terminal
from vllm_pasta.cli.demo.cases import (
    Case,
    Result,
    answers_first,
    count,
    counterfact_case,
    has_json,
    load_cases,
)
from vllm_pasta.cli.demo.command import playground, show
from vllm_pasta.cli.terminal import Phase, printable, side_by_side
from vllm_pasta.errors import PastaError


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        ('{"name": "A"}', True),
        ('Sure:\n```json\n{"name": {"first": "A"}}\n```\nThis is', True),
        ('{broken} then {"a": 1}', True),
        ('{"a": {"b": 1}, "c": ', True),  # the paper's measure takes the inner object
        ('{"name": "A", "occupation": ', False),
        ("{'name': 'A'}", False),
        ("[1, 2]", False),
        ("", False),
        ("{" * 5_000, False),
    ],
)
def test_has_json(text, valid):
    assert has_json(text) is valid


@pytest.mark.parametrize(
    ("text", "new_first"),
    [
        ("Rome.", True),
        ("the city of ROME, not Paris", True),
        ("Paris, now Rome", False),
        ("Paris", False),
        ("somewhere", False),
        ("", False),
    ],
)
def test_answers_first(text, new_first):
    assert answers_first(text, "Rome", "Paris") is new_first


def test_counterfact_case():
    case = counterfact_case("{} is in", "The Louvre", old="Paris", new="Rome")
    assert case.prompt == (
        "Previously, The Louvre is in Paris. Currently, The Louvre is in Rome. The Louvre is in"
    )
    assert case.emphasis == "The Louvre is in Rome"
    assert case.succeeds("Rome")
    assert not case.succeeds("Paris")


def test_own_cases():
    """At least eight, of both tasks; what is emphasised is there, once."""
    cases = load_cases(None)
    assert len(cases) >= 8
    assert {case.task for case in cases} == {"json", "counterfact"}
    for case in cases:
        assert case.prompt.count(case.emphasis) == 1
        assert not case.succeeds(case.old)


def test_real_cases(tmp_path, monkeypatch):
    def row(old, new):
        edit = {"prompt": "{} is in", "subject": "X"}
        return {
            "requested_rewrite": {**edit, "target_true": {"str": old}, "target_new": {"str": new}},
            "paraphrase_prompts": [],
            "neighborhood_prompts": [],
        }

    rows = [row("New York City", "New York"), row("Paris", "Rome"), row("Oslo", "Lima")]
    monkeypatch.setenv("VLLM_PASTA_DATA", str(tmp_path))
    with pytest.raises(PastaError, match="it is not in"):
        load_cases(1)
    (tmp_path / "counterfact.jsonl").write_text("\n".join(map(json.dumps, rows)))
    taken = [case for case in load_cases(1) if case.task == "counterfact"]
    assert [case.new for case in taken] == ["Rome"]  # the first would emphasise the old fact
    assert len([case for case in load_cases(9) if case.task == "counterfact"]) == 2


def test_count():
    case = Case("json", "p", "p")
    results = [Result(case, "no", "{}"), Result(case, "{}", "{}"), Result(case, "no", "no")]
    assert count(results) == {"json": {"cases": 3, "plain": 1, "emphasised": 2}}


def drawn(part, width, stream=None):
    """What rich draws on a terminal of so many columns, as lines without trailing spaces."""
    stream = stream or io.StringIO()
    console = terminal.console(stream)
    console.width = width
    console.print(part)
    return [line.rstrip() for line in stream.getvalue().removesuffix("\n").split("\n")]


def test_answers_keep_lines_and_indentation():
    lines = drawn(side_by_side(("plain", "b"), ('{\n  "a": 1\n}', "one two three"), 60), 60)
    assert [line.partition(" │ ")[0].rstrip(" │") for line in lines] == [
        "plain", "{", '  "a": 1', "}"
    ]  # fmt: skip


@given(st.text(), st.text(), st.integers(60, 200))
@example("word" * 30, "日本" * 40, 60)
def test_columns_line_up_and_lose_nothing(left, right, width):
    """Whatever a model answers: wide, combining and control characters, words of any length."""
    left, right = (text.replace("│", "|") for text in (left, right))
    lines = drawn(side_by_side(("plain", "emphasised"), (left, right), width), width)
    columns = [line.partition(" │") for line in lines]
    for line, (before, bar, _) in zip(lines, columns, strict=True):
        assert cell_len(line) <= width
        assert bar
        assert cell_len(before) == (width - 3) // 2
    for i, (title, text) in enumerate((("plain", left), ("emphasised", right))):
        shown = "".join("".join(column[2 * i] for column in columns).split())
        assert shown == "".join((title + printable(text)).split())


def test_side_by_side():
    assert drawn(side_by_side(("a", "b"), ("x\ny", "日本"), 63), 63) == [
        "a" + " " * 29 + " │ b",
        "x" + " " * 29 + " │ 日本",
        "y" + " " * 29 + " │",
    ]


def test_narrow_terminals_stack():
    assert drawn(side_by_side(("a", "b"), ("x", "y z"), 59), 59) == ["a", "  x", "b", "  y z"]
    assert drawn(side_by_side(("a", "b"), ("x", "y z"), 3), 3)[-2:] == ["  y", "  z"]


def test_emphasis_goes_on_over_line_ends():
    stream = Terminal()
    drawn(terminal.marked([("a ", False), ("b\nc", True), (" d", False)], True), 80, stream)
    assert stream.getvalue() == "a \x1b[1;33mb\x1b[0m\n\x1b[1;33mc\x1b[0m d\n"


def test_printable_cannot_steer_the_terminal():
    assert printable("a\x1b[31m\r\nb\tc\x01") == "a·[31m·\nb   c·"
    assert terminal.marked([("\x1b[31m", True)], False).plain == "«·[31m»"


class Terminal(io.StringIO):
    def isatty(self):
        return True


REPORT = {
    "model": "m",
    "heads": "h",
    "num_heads": 3,
    "alpha": 0.01,
    "counts": {"json": {"cases": 1, "plain": 0, "emphasised": 1}},
    "seconds": {"generation": 1.0},
}


@pytest.mark.parametrize(
    ("stream", "no_color", "expected"),
    [
        (Terminal(), "", "Say \x1b[1;33min JSON\x1b[0m now"),
        (Terminal(), "1", "Say «in JSON» now"),
        (io.StringIO(), "", "Say «in JSON» now"),
    ],
)
def test_show(stream, no_color, expected, monkeypatch):
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setenv("COLUMNS", "100")
    show(REPORT, [Result(Case("json", "Say in JSON now", "in JSON"), "no", "{}")], stream)
    text = stream.getvalue()
    assert expected in text
    assert "plain ✗ valid JSON" in text
    assert "emphasised ✓ valid JSON" in text
    assert "0/1          1/1" in text
    assert all(cell_len(Text.from_ansi(line).plain) <= 100 for line in text.split("\n"))


def test_playground():
    """The command that opens the page: of this environment, with flags that there are."""
    from vllm_pasta.integration.frontend import flags

    text = playground("/a model", "heads.json")
    (line,) = (line for line in text.splitlines() if " serve " in line)
    _, program, serve, model, *options = shlex.split(line)
    assert program.endswith("/vllm")
    assert (serve, model) == ("serve", "/a model")
    parser = argparse.ArgumentParser()
    flags.add_plugin_flag(parser)
    flags.add_flags(parser)
    given, others = parser.parse_known_args(options)
    assert (given.plugin, given.pasta_playground) == (["pasta"], True)
    assert given.pasta_heads == "heads.json"
    assert not [option for option in others if option.startswith("--pasta")]
    assert "http://localhost:8000/playground" in text


def test_phase_times_and_stops_its_thread():
    stream = io.StringIO()
    threads = threading.active_count()
    with pytest.raises(KeyError), Phase("Work", stream):
        raise KeyError
    assert stream.getvalue() == "Work …\nWork: failed after 0.0 s\n"
    assert threading.active_count() == threads
