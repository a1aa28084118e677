"""Head set files: both forms, and what is refused."""

import pytest

from vllm_pasta import HeadSet, HeadSetError
from vllm_pasta.request.heads import bundled


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


def test_check():
    heads = HeadSet.from_json({"2": [0, 8]})
    heads.check(3, 9)
    for sizes in ((2, 9), (3, 8)):
        with pytest.raises(HeadSetError, match=f"layer 2, head 8.*{sizes[0]} layers.*{sizes[1]} "):
            heads.check(*sizes)


def test_bundled_fit_their_models():
    sets = bundled()
    sets["smollm2-135m-instruct"].check(30, 9)
    for heads in sets.values():
        assert heads.provenance["model"]
