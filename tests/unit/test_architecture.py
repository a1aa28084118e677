"""The house's arrows, and what importing it needs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import vllm_pasta

ROOT = Path(vllm_pasta.__file__).parent
MODULES = sorted(ROOT.rglob("*.py"))

# Each layer may import those before it. Nothing but entry points imports integration.
CORE = ["_version", "errors", "envs", "request", "steering", "kernels"]


def imports(path):
    """Modules that a file imports when it is imported itself."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    lazy = {
        node
        for scope in ast.walk(tree)
        if isinstance(scope, ast.FunctionDef | ast.AsyncFunctionDef)
        or (isinstance(scope, ast.If) and ast.unparse(scope.test) == "TYPE_CHECKING")
        for node in ast.walk(scope)
    }
    for node in ast.walk(tree):
        if node in lazy:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def layer(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_arrows(path):
    """integration -> kernels -> steering -> request -> errors; vllm in one place."""
    imported = list(imports(path))
    if layer(path) != "integration":
        assert not [m for m in imported if m == "vllm" or m.startswith("vllm.")]
        assert not [m for m in imported if m.startswith("vllm_pasta.integration")]
    if layer(path) in CORE:
        allowed = CORE[: CORE.index(layer(path)) + 1]
        for module in imported:
            parts = module.split(".")
            if parts[0] == "vllm_pasta" and len(parts) > 1:
                assert parts[1] in allowed, f"{path.name} imports {module}"


def test_imports_without_vllm_and_triton():
    """`import vllm_pasta`, and all that does not serve vLLM, where neither is installed."""
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['vllm', 'triton', 'torch']));"
        "import vllm_pasta, vllm_pasta.cli, vllm_pasta.request.tokens;"
        "vllm_pasta.Emphasis.parse({'emphasis': 'x'})"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names():
    """Everything in __all__ is there, and nothing public is missing from it."""
    for name in vllm_pasta.__all__:
        assert getattr(vllm_pasta, name) is not None
    assert set(vllm_pasta.__all__) == {
        "BeamSearchParams",
        "ConfigError",
        "Emphasis",
        "EmphasisError",
        "HeadSet",
        "HeadSetError",
        "KernelError",
        "PastaError",
        "ResolvedEmphasis",
        "SamplingParams",
        "UnsupportedError",
        "__version__",
    }
