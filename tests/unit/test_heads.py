"""Head set files: both forms, and what is refused."""

import threading
from types import SimpleNamespace

import pytest

from vllm_pasta import HeadSet, HeadSetError
from vllm_pasta.request.head_sets import auto
from vllm_pasta.request.head_sets.library import (
    Model,
    bundled,
    chosen_for,
    describe,
    fits,
    names,
)
from vllm_pasta.request.shape import ModelShape, layer_heads


def test_reference_form(tmp_path):
    """The reference's file loads as it is; keys may be in any order."""
    path = tmp_path / "mine.json"
    path.write_text('{"12": [3, 1], "2": [0]}')
    heads = HeadSet.load(path)
    assert heads.layers == ((2, (0,)), (12, (1, 3)))
    assert (len(heads), heads.name) == (3, "mine")


def test_our_form_keeps_provenance(tmp_path):
    HeadSet.from_json({"heads": {"2": [0]}, "model": "m", "alpha": 0.01}).save(tmp_path / "a.json")
    loaded = HeadSet.load(tmp_path / "a.json")
    assert loaded.provenance == {"model": "m", "alpha": 0.01}
    assert loaded == HeadSet.from_json({"2": [0]})  # provenance is no part of its identity


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "cannot be read"),
        ("", "Expecting value"),
        ("[1]", "list"),
        ("{}", "at least one head"),
        ('{"heads": []}', "list"),
        ('{"heads": {}}', "at least one head"),
        ('{"1": []}', "at least one head"),
        ('{"-1": [0]}', "layer"),
        ('{"1.5": [0]}', "layer"),
        ('{"1": "01"}', "list of heads"),
        ('{"1": [0.0]}', "head of layer 1"),
        ('{"1": [true]}', "head of layer 1"),
        ('{"1": [99999999999999999999]}', "head of layer 1"),
        ('{"1": [0], "01": [1]}', "twice"),
    ],
)
def test_malformed_file(text, words, tmp_path):
    """The message names the file and says why."""
    path = tmp_path / "heads.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(HeadSetError, match=words) as refused:
        HeadSet.load(path)
    assert str(path) in str(refused.value)


def test_a_set_has_its_own_alpha():
    assert HeadSet.from_json({"heads": {"2": [0]}, "alpha": 0.1}).alpha == 0.1
    assert HeadSet.from_json({"heads": {"2": [0]}}).alpha is None
    assert HeadSet.from_json({"2": [0]}).alpha is None
    for wrong in (0, -1, "0.1", True, float("nan")):
        with pytest.raises(HeadSetError, match="alpha of the head set: expected a finite number"):
            HeadSet.from_json({"heads": {"2": [0]}, "alpha": wrong})


def test_check():
    heads = HeadSet.from_json({"2": [0, 8]})
    heads.check(3, 9)
    for sizes in ((2, 9), (3, 8)):
        with pytest.raises(HeadSetError, match=f"layer 2, head 8.*{sizes[0]} layers.*{sizes[1]} "):
            heads.check(*sizes)


def model(name, *, model_type="qwen3", hidden_size=4096, layers=36, heads=32):
    return Model(name, model_type, hidden_size, ModelShape(layers, heads, tuple(range(layers))))


def test_check_where_layers_differ():
    HeadSet.from_json({"0": [5], "1": [3]}).check(2, (6, 4))
    with pytest.raises(HeadSetError, match=r"layer 1, head 4.* 4 query heads .*in this layer"):
        HeadSet.from_json({"0": [5], "1": [4]}).check(2, (6, 4))
    with pytest.raises(HeadSetError, match="layer 2, head 0 is out of range: this model has 2 lay"):
        HeadSet.from_json({"2": [0]}).check(2, (6, 4))


STEP = {  # Step 3.5
    "layer_types": ["full_attention", "sliding_attention", "full_attention", "one more"],
    "attention_other_setting": {"attention_type": "sliding_attention", "num_attention_heads": 6},
}
EACH = {
    "is_heterogeneous": True,
    "per_layer_config": [SimpleNamespace(num_attention_heads=n) for n in (2, 4, 8)],
}


@pytest.mark.parametrize(
    ("config", "heads"),
    [
        ({}, ()),
        ({"num_attention_heads_per_layer": [6, 4, 6]}, (6, 4, 6)),
        (STEP, (4, 6, 4)),
        (EACH, (2, 4, 8)),
    ],
)
def test_heads_of_layers_by_configuration(config, heads):
    assert layer_heads(SimpleNamespace(num_attention_heads=4, **config), 3) == heads
    shape = ModelShape(3, max(heads, default=4), (0, 1, 2), heads)
    assert [shape.heads_of(layer) for layer in range(3)] == list(heads or (4, 4, 4))
    counts = f"{min(heads)} to {max(heads)}" if heads else "4"
    assert str(shape) == f"3 layers of {counts} query heads"


def test_bundled_fit_their_models():
    """Each is for a model that has all of its heads; those of others say whose they are."""
    for name, heads in bundled().items():
        assert heads.provenance["model"]
        made_for = heads.provenance["for"]
        heads.check(made_for["layers"], made_for["query_heads"])
        if not name.startswith("smollm2"):
            assert heads.provenance["published_by"]
            assert heads.provenance["licence"] in ("MIT", "Apache-2.0")
            assert "not measured by this project" in describe(heads)
            assert heads.provenance["note"].startswith("Not measured by this project.")


SNAPSHOT = f"/cache/hub/models--Qwen--Qwen3-8B-Base/snapshots/{'0123456789' * 4}"


@pytest.mark.parametrize(
    "name", ["Qwen/Qwen3-8B-Base", "/models/qwen3-8b-base/", "Qwen3-8B-Base", SNAPSHOT]
)
def test_a_set_is_chosen_for_its_model(name):
    served = model(name)
    found = chosen_for(served, bundled())
    assert found.name == "qwen3-8b-base-seka"
    assert list(names(bundled(), served)) == ["qwen3-8b-base-seka"]


@pytest.mark.parametrize(
    "served",
    [
        model("Qwen/Qwen3-8B"),  # the same shape, another model
        model("Qwen3-8B-Base-mine"),
        model("Qwen3-8B-Base", layers=35),
        model("Qwen3-8B-Base", heads=16),
        model("Qwen3-8B-Base", hidden_size=2560),
        model("Qwen3-8B-Base", model_type="llama"),
    ],
)
def test_nothing_is_chosen_for_another_model(served):
    assert chosen_for(served, bundled()) is None


def test_what_fits_may_be_named():
    """A chat model of the same shape may use the base model's set; another shape may not."""
    sets = bundled()
    assert fits(sets["qwen3-8b-base-seka"], model("Qwen3-8B"))
    assert not fits(sets["qwen3-4b-base-seka"], model("Qwen3-8B"))
    assert fits(HeadSet.from_json({"35": [31]}), model("any"))
    assert not fits(HeadSet.from_json({"36": [31]}), model("any"))


def fake_model(folder, weights=b"weights"):
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(weights)
    return str(folder)


def test_found_heads_are_kept_by_model(tmp_path, monkeypatch):
    """A copy of a model has its heads; one with other weights has none."""
    monkeypatch.setenv("VLLM_PASTA_CACHE", str(tmp_path / "cache"))
    weights = bytes(3 * auto.SAMPLES * auto.SAMPLE_BYTES)
    one, copy = (fake_model(tmp_path / name, weights) for name in ("one", "copy"))
    other = fake_model(tmp_path / "other", weights[:-1] + b"1")
    assert auto.load(one) is None
    heads = HeadSet.from_json({"heads": {"1": [0]}, "alpha": 0.3})
    with auto.alone(auto.path(one), pytest.fail):
        heads.save(auto.path(one))
    for same in (one, copy):
        assert (auto.load(same), auto.load(same).alpha, auto.load(same).name) == (
            heads,
            0.3,
            "auto",
        )
    assert auto.load(other) is None
    assert auto.ensure(one, None, {}) == heads  # nothing is searched
    assert auto.path("no/such-model") is None
    snapshot = tmp_path / "snapshots" / ("0123456789" * 4)
    snapshot.parent.mkdir()
    assert auto.digest(fake_model(snapshot)) == "0123456789012345"


def test_one_search_at_a_time(tmp_path):
    """The second waits for the first, and says so."""
    file, waits, done = tmp_path / "heads" / "a.json", threading.Event(), threading.Event()

    def second():
        with auto.alone(file, waits.set):
            done.set()

    with auto.alone(file, pytest.fail):
        thread = threading.Thread(target=second)
        thread.start()
        assert waits.wait(30)
        assert not done.is_set()
    thread.join(30)
    assert done.is_set()
