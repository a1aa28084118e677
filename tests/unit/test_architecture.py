"""The house: what pyproject.toml's import contracts (`lint-imports`) cannot see.

Broken by: an import at the wrong time; a name in a string that leads nowhere; a folder that has
grown beyond what a reader takes in.
"""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import vllm_pasta

ROOT = Path(vllm_pasta.__file__).parent
PROJECT = tomllib.loads((ROOT.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]

MOST_NAMES = 12
"""Files and folders in one folder."""


def names(module):
    """What the module of that name defines at its top, without importing it."""
    path = ROOT.parent / module.replace(".", "/")
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign):
            yield from (target.id for target in node.targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.ImportFrom):
            yield from (alias.asname or alias.name for alias in node.names)


def strings():
    """``(file, module, name)`` of every string in the package that names something in it."""
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                text = node.value
                if re.fullmatch(r"vllm_pasta(\.\w+)+", text) and text != "vllm_pasta.tasks":
                    yield path.relative_to(ROOT), text


def test_imports_without_vllm_and_triton():
    """`import vllm_pasta`, and all that does not serve vLLM, where neither is installed."""
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['vllm', 'triton', 'torch']));"
        "import vllm_pasta, vllm_pasta.cli, vllm_pasta.request.tokens;"
        "vllm_pasta.Emphasis.parse({'emphasis': 'x'})"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("folder", [ROOT, *(p.parent for p in ROOT.rglob("*/__init__.py"))])
def test_folders_can_be_taken_in(folder):
    entries = [p.name for p in folder.iterdir() if p.name not in ("__pycache__", ".mypy_cache")]
    assert len(entries) <= MOST_NAMES, sorted(entries)


def test_no_relative_imports():
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            assert not (isinstance(node, ast.ImportFrom) and node.level), path


@pytest.mark.parametrize(
    ("group", "name", "target"),
    [
        (group, name, target)
        for group, entries in {
            "console_scripts": PROJECT["scripts"],
            **PROJECT["entry-points"],
        }.items()
        for name, target in entries.items()
    ],
)
def test_entry_points_lead_somewhere(group, name, target):
    module, _, attribute = target.partition(":")
    assert attribute in set(names(module))


def test_strings_that_name_modules_lead_somewhere():
    """Which attention backends and middleware vLLM is to load, and where data files are."""
    found = list(strings())
    assert len(found) >= 4
    for path, text in found:
        as_module = ROOT.parent / text.replace(".", "/")
        if not (as_module.is_dir() or as_module.with_suffix(".py").exists()):
            module, _, attribute = text.rpartition(".")
            assert attribute in set(names(module)), f"{path}: {text}"


def test_no_decision_depends_on_the_wall_clock():
    """A clock that jumps, as it does when it is set, changes nothing: what waits or times asks a
    clock that does not."""
    clocks = {"time", "time_ns", "now", "utcnow", "today", "localtime", "gmtime"}
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr in clocks:
                of = ast.unparse(node.value)
                assert of not in ("time", "datetime", "date", "datetime.datetime"), path
            if isinstance(node, ast.ImportFrom) and node.module in ("time", "datetime"):
                assert not clocks & {alias.name for alias in node.names}, path
                assert node.module != "datetime", path
