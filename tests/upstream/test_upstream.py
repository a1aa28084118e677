"""The run-time patches: upstream still is what they were written for, and the ledger is true."""

import ast
import re
import sys
import zipfile
from pathlib import Path

import prepared
import pytest
from conftest import start

from tools import check_upstream, generated
from vllm_pasta.errors import UnsupportedError
from vllm_pasta.integration import attach, plugin, refusals

pytestmark = pytest.mark.xdist_group("verdicts")  # as test_registry's
LEDGER = Path(__file__).parents[2] / "patches" / "README.md"


@pytest.mark.parametrize("patch", attach.PATCHES, ids=lambda patch: patch.target)
def test_upstream_unchanged(patch):
    """Fails when vLLM changes a wrapped function: read it again, then record its new digest."""
    assert patch.source_digest in patch.digests.split()


CONNECTORS = "vllm.distributed.kv_transfer.kv_connector"


def test_check_of_another_release(tmp_path):
    """In a vLLM in which a wrapped function changed, another moved to a new file, a third is called
    otherwise and imported by name, one that is relied on does something else, an imported name is
    gone and an overridden method takes other parameters, exactly that is found; in the wheel as in
    a folder."""
    by_name = "from vllm.v1.core.kv_cache_utils import generate_block_hash_extra_keys as keys\n"
    changed = {
        "vllm/v1/core/kv_cache_utils.py": ("generate_block_hash_extra_keys(", "return", "1;return"),
        "vllm/exceptions.py": ("class VLLMValidationError(", "VLLMValidationError", "Renamed"),
        "vllm/v1/attention/backends/cpu_attn.py": ("    def build(", "fast_build:", "faster:"),
        "vllm/v1/engine/llm_engine.py": ("self.input_processor.process_inputs(", "(", "(1, "),
        "vllm/device_allocator/sleep_mode_backend.py": ("def suspend", '("runtime",', "("),
        "vllm/v1/engine/detokenizer.py": ("import tokenizers", "import", f"{by_name}import"),
    }  # fmt: skip
    moved = {f"{CONNECTORS.replace('.', '/')}/factory.py": f"{CONNECTORS.replace('.', '/')}/new.py"}
    wheel = tmp_path / "vllm-9.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path in check_upstream.installed().glob("vllm/**/*.py"):
            name = str(path.relative_to(check_upstream.installed()))
            text = path.read_text(encoding="utf-8")
            if name in changed:
                place, old, new = changed[name]
                before, found, after = text.partition(place)
                assert found
                text = before + (found + after).replace(old, new, 1)
            archive.writestr(moved.get(name, name), text)
    old, new = (check_upstream.Source(p) for p in (check_upstream.installed(), wheel))
    assert {f.state for f in check_upstream.check(old, old)} == {"unchanged"}
    findings = [f for f in check_upstream.check(old, new) if f.state != "unchanged"]
    assert {(f.state, f.what) for f in findings} == {
        ("changed", "wrapped vllm.v1.core.kv_cache_utils:generate_block_hash_extra_keys"),
        ("changed", "wrapped vllm.v1.core.block_pool:generate_block_hash_extra_keys"),
        ("changed", "calls of process_inputs"),
        ("changed", "calls of get_connector_class"),  # itself among the callers that moved
        ("new", "import by name vllm.v1.engine.detokenizer:keys"),
        ("changed", "relied on vllm.device_allocator.sleep_mode_backend:CuMemBackend.suspend"),
        ("moved", f"wrapped {CONNECTORS}.factory:KVConnectorFactory.get_connector_class"),
        ("gone", "imported vllm.exceptions:VLLMValidationError"),
        ("gone", "overridden vllm.exceptions:VLLMValidationError.__init__"),
        ("gone", "overridden vllm.exceptions:VLLMValidationError.__str__"),
        (
            "changed",
            "overridden vllm.v1.attention.backends.cpu_attn:CPUAttentionMetadataBuilder.build",
        ),
    }
    assert [f.detail for f in findings if f.state == "moved"] == [f"now in {CONNECTORS}.new"]


def test_ledger_is_complete():
    """One entry per patch, with every heading; none for what is gone."""
    text = LEDGER.read_text(encoding="utf-8")
    entries = re.split(r"^## ", text.partition("\n# Ledger\n")[2], flags=re.M)[1:]
    assert {entry.split("`")[1] for entry in entries} == {p.target for p in attach.PATCHES}
    for entry in entries:
        for heading in ("why", "how", "upstream status", "can go when"):
            assert heading in entry.lower(), entry


def test_generated_tables(verdicts):
    """The tables of refusals and of wrapped functions are what the code says."""
    assert generated.differing() == [], "run `python -m tools.generated`"


def test_refusals_are_shown():
    """Each refusal has an id of its own, and its test speaks of it: a text in the test's file
    matches its sentence."""
    refused = [*refusals.ENGINE, *refusals.LAYERS, *refusals.BACKEND, *refusals.LAYER]
    refused += (*refusals.MLA_LAYER, *refusals.RECURRENCE)
    assert len({refusal.id for refusal in refused}) == len(refused)
    for refusal in refused:
        path, _, name = refusal.test.partition("::")
        tree = ast.parse((LEDGER.parents[1] / path).read_text(encoding="utf-8"))
        assert name in {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}
        texts = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)}
        parts = [part for part in re.split("[…(:]", refusal.summary) if len(part) > 9]
        assert any(
            isinstance(text, str)
            and (
                (len(text) > 9 and text in refusal.summary)
                or any(part.strip() in text for part in parts)
            )
            for text in texts
        ), f"{refusal.id}: {path} does not say {refusal.summary!r}"


def test_register_twice():
    """Idempotent: a second call wraps nothing twice."""
    plugin.register()
    functions = [patch.function for patch in attach.PATCHES]
    plugin.register()
    assert functions == [patch.function for patch in attach.PATCHES]


def test_other_vllm_is_refused(monkeypatch):
    """A vLLM that nothing was tested on does not start with us, rather than steer by luck."""
    monkeypatch.setattr("vllm.__version__", "0.34.1")
    with pytest.raises(UnsupportedError, match=r"0\.34\.1.*VLLM_PLUGINS"):
        plugin.register()


def test_another_backend(tiny):
    """Where another plugin takes CPU_ATTN, nothing is left unsteered in silence."""
    from vllm import SamplingParams
    from vllm.plugins import load_general_plugins
    from vllm.v1.attention import selector
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    load_general_plugins()  # once in a process: the engine does not register ours again
    AttentionBackendEnum.CPU_ATTN.clear_override()
    selector._cached_get_attn_backend.cache_clear()
    try:
        llm = start(tiny, skip_tokenizer_init=True)
        params = [SamplingParams(max_tokens=1, detokenize=False) for _ in range(2)]
        prompt = {"prompt_token_ids": [5, 6, 7]}
        assert llm.generate(prompt, params[0], use_tqdm=False)
        params[1].extra_args = {"emphasis": {"spans": [[1, 2]], "heads": {"0": [0]}}}
        with pytest.raises(UnsupportedError, match="attention backend"):
            llm.generate(prompt, params[1], use_tqdm=False)
    finally:
        plugin.register()
        selector._cached_get_attn_backend.cache_clear()


SWITCHED = """
import os
from vllm import envs, plugins
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm_pasta.integration import patching
for names in ("", "other", "pasta"):
    os.environ["VLLM_PLUGINS"] = names
    envs.disable_envs_cache()
    plugins.plugins_loaded = False  # else vLLM loads them once in a process
    plugins.load_general_plugins()
    print(patching.is_applied(), AttentionBackendEnum.CPU_ATTN.is_overridden())
"""


def test_switched_off():
    """With VLLM_PLUGINS= nothing of vLLM is changed, nor where it names another plugin."""
    result = prepared.run([sys.executable, "-c", SWITCHED], {"PATH": ""})
    answers = result.stdout.strip().splitlines()[-3:]
    assert answers == ["False False", "False False", "True True"], result.stderr


def test_installed_beside_model_runner_v2():
    """V2 (vLLM's default on GPUs) rejects logits processors of the V1 kind when an engine starts;
    ours is loaded there too, even where emphasis is off, and must change nothing."""
    import torch
    from vllm import SamplingParams
    from vllm.config import VllmConfig
    from vllm.v1.worker.gpu.sample.logits_processor import loader

    classes = loader._load_v2_logitsprocs(None)
    (ours,) = [cls for cls in classes if cls.__module__.startswith("vllm_pasta")]
    rows = ours(VllmConfig(), None)
    logits = torch.randn(2, 5)
    assert rows.add_request(0, SamplingParams()) is False
    assert rows.apply(logits, None) is logits
    loader.build_custom_logits_processors_params_validator(None)(SamplingParams())
