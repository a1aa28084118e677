"""What the documents say is there: tests, files, headings, code."""

import ast
import json
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from vllm_pasta.request.head_sets.library import bundled

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    *sorted(ROOT.glob("*.md")),
    *sorted(ROOT.glob("*/README.md")),
    *sorted(ROOT.glob("docs/*.md")),
]

BLOCK = re.compile(r"^( *)(`{3,})(\w*)\n(.*?)^\1\2$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r'\]\(([^)\s]+)\)|(?:src|href)="([^"]+)"')


def name(path):
    return str(path.relative_to(ROOT))


def blocks(path, *languages):
    """The fenced blocks of a document in these languages."""
    text = path.read_text(encoding="utf-8")
    return [match[4] for match in BLOCK.finditer(text) if match[3] in languages]


def links(path):
    """Relative links of a document as ``(file, anchor)``, code left out."""
    text = re.sub(r"`[^`\n]+`", "", BLOCK.sub("", path.read_text(encoding="utf-8")))
    for match in LINK.finditer(text):
        target = match[1] or match[2]
        if not re.match(r"[a-z]+:", target):
            file, _, anchor = target.partition("#")
            yield (path.parent / file).resolve() if file else path, anchor


def anchors(path):
    """The anchors of a document's headings, as code hosts and the site make them."""
    text = BLOCK.sub("", path.read_text(encoding="utf-8"))
    for heading in re.findall(r"^#+ +(.+)$", text, re.MULTILINE):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        yield re.sub(r"[^\w\- ]", "", words.lower()).strip().replace(" ", "-")


def test_features_name_their_tests():
    """Every row of docs/features.md names a test, and it exists."""
    text = (ROOT / "docs" / "features.md").read_text(encoding="utf-8")
    rows = [row for row in text.splitlines() if row.startswith("| ") and "| feature |" not in row]
    assert rows
    for row in rows:
        (path, name), *rest = re.findall(r"`(tests/\w+/\w+\.py)::(\w+)`", row)
        assert not rest
        assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8"), row
        assert re.search(r"\| (works|engine does not start|request refused) \|", row), row


def test_readme_is_short():
    """A stranger reads it in five minutes; the rest is in docs/, by the reader's question."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(readme.splitlines()) <= 200
    first = readme.index("```bash")
    assert readme[first:].startswith("```bash\nmake demo")
    for page in (ROOT / "docs").glob("*.md"):
        assert f"(docs/{page.name})" in readme


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_links(path):
    """Relative links lead to files, and their anchors to headings."""
    for file, anchor in links(path):
        assert file.exists(), f"{name(path)}: {file} is not there"
        if anchor:
            assert anchor in set(anchors(file)), f"{name(path)}: {name(file)} has no #{anchor}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_code(path):
    """Code in the documents is code."""
    for code in blocks(path, "python"):
        ast.parse(code)
    for code in blocks(path, "json"):
        json.loads(code)
    for code in blocks(path, "bash"):
        subprocess.run(["bash", "-n"], input=code, text=True, check=True)


def test_every_file_named_is_there():
    """Files of the repository that the documents name in backticks exist."""
    for path in DOCUMENTS:
        text = BLOCK.sub("", path.read_text(encoding="utf-8"))
        for file in re.findall(r"`((?:vllm_pasta|tests|docs|tools|examples)/[\w/.-]+)`", text):
            assert (ROOT / file).exists(), f"{name(path)}: {file} is not there"


def test_head_sets_are_listed():
    """docs/heads.md has a row for every head set that comes with the package."""
    text = (ROOT / "docs" / "heads.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `([\w-]+)` \| (\d+[^|]*\| [\d.–]+) \|", text, re.MULTILINE))
    for head_set, heads in bundled().items():
        count, alpha = re.fullmatch(r"(\d+).*\| ([\d.–]+)", rows.pop(head_set)).groups()
        shown = None if alpha == "–" else float(alpha)
        assert (int(count), shown) == (len(heads), heads.alpha), head_set
    assert not rows


def test_what_operators_use_is_listed():
    """docs/serving.md has every flag, environment variable, route and metric."""
    source = "".join(p.read_text(encoding="utf-8") for p in (ROOT / "vllm_pasta").rglob("*.py"))
    text = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    counters = re.findall(r'Counter\(\s*"(\w+)"', source)
    names = {
        *re.findall(r'"(--pasta-[a-z]+)"', source),
        *re.findall(r"\b(VLLM_PASTA_[A-Z]+)\b", source),
        *re.findall(r'"(/v1/emphasis/\w+)"', source),
        *(f"{counter}_total" for counter in counters),
    }
    assert len(counters) >= 4
    assert not {name for name in names if name not in text}


def test_the_actor_is_named():
    """The documents say "the plugin", "vLLM", "the GPU path"."""
    for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")]:
        text = path.read_text(encoding="utf-8")
        assert not re.findall(r"\b(ours|theirs|[Ww]e|[Oo]ur|GPU's way)\b", text), path.name


def module_state(tree):
    """Names of a module that hold state between calls: globals that functions set, context
    variables, caches, containers that are no constants."""
    local = {
        n.name for n in tree.body if isinstance(n, ast.ClassDef) and "local" in unparse(n.bases)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Global):
            yield from node.names
        elif isinstance(node, ast.FunctionDef) and re.search(
            r"\b(lru_)?cache\b", unparse(node.decorator_list)
        ):
            yield node.name
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            kind = unparse(node.value.func) if isinstance(node.value, ast.Call) else ""
            name = unparse(node.targets if isinstance(node, ast.Assign) else node.target)
            mutable = re.match(r"_?[a-z]", name) and isinstance(
                node.value, ast.List | ast.Dict | ast.Set
            )
            if mutable or kind in {"ContextVar", "WeakValueDictionary", *local}:
                yield name


def foreign_attributes(tree):
    """Attributes that a module sets on objects of other modules' classes."""
    own, foreign = set(), set()
    for node in ast.walk(tree):
        for target in getattr(node, "targets", [getattr(node, "target", None)]):
            for item in target.elts if isinstance(target, ast.Tuple) else [target]:
                if isinstance(item, ast.Attribute):
                    is_own = re.match(r"(self|_\w+)$", unparse(item.value))
                    (own if is_own else foreign).add(item.attr)
    return foreign - own


def unparse(nodes):
    return ", ".join(map(ast.unparse, nodes if isinstance(nodes, list) else [nodes]))


def test_hidden_state_is_listed():
    """docs/architecture.md lists module globals, and attributes put on objects of vLLM."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    section = text.split("## Where state hides")[1].split("\n## ")[0]
    cells = [row.split(" | ") for row in section.splitlines() if row.startswith("| ")]
    names = [[re.findall(r"`([\w/.]+)`", cell) for cell in row[:2]] for row in cells]
    listed = {(a[0], name) for a, b in names if a and "/" in a[0] for name in b}
    attributes = {name for a, b in names if not (a and "/" in a[0]) for name in b}
    package = ROOT / "vllm_pasta"
    found = set()
    for path in package.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        file = path.relative_to(package).as_posix()
        found |= {(file, name) for name in module_state(tree)}
        if file.startswith("integration/"):
            missing = set(foreign_attributes(tree)) - attributes
            assert not missing, f"{file} sets attributes that are not listed: {missing}"
    assert found == listed


def test_layers_are_those_of_the_contracts():
    """docs/architecture.md shows the rooms in the order that import-linter checks."""
    shown = blocks(ROOT / "docs" / "architecture.md", "text")
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = config["tool"]["importlinter"]["contracts"]
    layers = ["\n".join(c["layers"]) + "\n" for c in contracts if c["type"] == "layers"]
    assert len(layers) == 2
    assert set(layers) <= set(shown)
