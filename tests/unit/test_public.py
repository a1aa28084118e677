"""What users build on stays: each name here is public, and to lose one breaks somebody.

A name may be added without a word here. Broken by: a public name, command, option, field, route,
metric, variable or head set that is renamed or gone.
"""

import argparse
import re
import tomllib
from pathlib import Path

import pytest

import vllm_pasta
from vllm_pasta import ConfigError, EmphasisError, envs, tasks
from vllm_pasta.cli.main import parser
from vllm_pasta.request.head_sets.library import bundled

ROOT = Path(vllm_pasta.__file__).parent
PROJECT = tomllib.loads((ROOT.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_names():
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


def test_tasks():
    assert set(tasks.__all__) >= {
        *("Answer", "Example", "Probe", "Sample", "Split", "Task", "load", "names", "sample")
    }
    assert all(hasattr(tasks, name) for name in tasks.__all__)
    assert tasks.GROUP == "vllm_pasta.tasks"
    assert set(tasks.names()) >= {
        "counterfact",
        "json",
        "pronouns",
        "biasbios",
        "arithmetic",
        "kv",
        "ifeval",
    }


def test_entry_points():
    assert set(PROJECT["scripts"]) >= {"vllm-pasta"}
    for group in ("general_plugins", "endpoint_plugins", "logits_processors"):
        assert set(PROJECT["entry-points"][f"vllm.{group}"]) >= {"pasta"}
    assert set(PROJECT["optional-dependencies"]) >= {"cpu", "cuda", "bench", "ifeval", "dev"}


RUN = "model --tasks --examples --seed --data --engine --eager --stop-after --alpha --out"


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("demo", "--model --heads --alpha --share --max-tokens --cases --compile --json"),
        ("explain", "--model --prompt --messages --emphasis --tag --json --html"),
        (
            "eval",
            f"{RUN} --share --methods --head-counts --split --generations --plots --markdown "
            "--json --html",
        ),
        ("profile", f"{RUN} --top-k --select --search --likelihood --shard --compare"),
        ("verify", "model --shape --only --runs --logs --json"),
    ],
)
def test_commands(command, arguments):
    (commands,) = (a for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
    actions = commands.choices[command]._actions
    assert {n for a in actions for n in (*a.option_strings, a.dest)} >= set(arguments.split())


def test_fields_of_the_configuration():
    from vllm_pasta.integration.config import PastaConfig

    with pytest.raises(ConfigError) as refused:
        PastaConfig.parse({"no such field": 1})
    known = re.search("known are (.*)", str(refused.value))[1].split(", ")
    assert set(known) >= {"heads", "alpha", "share", "head_sets", "markup", "tag", "keep_marks"}


def test_fields_of_a_request():
    for key, known in (
        (
            {"emphasis": {"no such field": 1}},
            "spans text chars markup keep_marks alpha heads share",
        ),
        (
            {"emphasis_no": 1},
            "emphasis emphasis_alpha emphasis_heads emphasis_markup emphasis_share",
        ),
    ):
        with pytest.raises(EmphasisError) as refused:
            vllm_pasta.Emphasis.parse(key)
        assert set(re.search("known are (.*)", str(refused.value))[1].split(", ")) >= set(
            known.split()
        )


def test_flags_of_vllm():
    from vllm_pasta.integration.frontend import flags

    made = argparse.ArgumentParser()
    flags.add_plugin_flag(made)
    flags.add_flags(made)
    options = {option for action in made._actions for option in action.option_strings}
    assert options >= {
        "--plugin",
        "--pasta-heads",
        "--pasta-alpha",
        "--pasta-share",
        "--pasta-playground",
    }


def test_routes_and_header():
    from fastapi import FastAPI

    from vllm_pasta.integration.frontend.middleware import HEADER
    from vllm_pasta.integration.frontend.routes import EmphasisRoutes

    app = FastAPI()
    app.state.args = argparse.Namespace(pasta_playground=True)
    EmphasisRoutes().attach_router(app)
    served = {(method, route.path) for route in app.routes for method in route.methods}
    assert served >= {
        ("GET", "/v1/emphasis/head_sets"),
        ("POST", "/v1/emphasis/resolve"),
        ("POST", "/v1/emphasis/attention"),
        ("GET", "/playground"),
    }
    assert HEADER in ("x-emphasis", b"x-emphasis")


def test_metrics():
    from prometheus_client import REGISTRY

    from vllm_pasta.integration.frontend import metrics

    metrics.counters()
    names = {metric.name for metric in REGISTRY.collect()}
    assert names >= {
        "pasta_requests_steered",
        "pasta_requests_refused",
        "pasta_emphasised_tokens",
        "pasta_step_rows",
    }


def test_environment_variables(monkeypatch):
    for name, function in (
        ("VLLM_PASTA_CACHE", envs.cache_dir),
        ("VLLM_PASTA_DATA", envs.data_dir),
        ("VLLM_PASTA_KERNEL", envs.kernel),
    ):
        monkeypatch.setenv(name, "reference")
        assert str(function()) == "reference"


def test_head_sets():
    assert set(bundled()) >= {
        f"smollm2-135m-{name}"
        for name in ("biasbios", "counterfact", "instruct", "json", "multi", "pronouns")
    }
