"""The request's form: what is read, and what is refused with which words."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_pasta import Emphasis, EmphasisError, HeadSet
from vllm_pasta.request.emphasis import has_emphasis
from vllm_pasta.request.marks import Mark

HEADS = HeadSet.from_json({"1": [0]})


@pytest.mark.parametrize(
    ("extra_args", "expected"),
    [
        (None, None),
        ({}, None),
        ({"theirs": 1}, None),
        ({"emphasis": "a b"}, Emphasis(marks=(Mark("a b"),))),
        ({"emphasis": ["a", "b"]}, Emphasis(marks=(Mark("a"), Mark("b")))),
        ({"emphasis": {"text": "a"}}, Emphasis(marks=(Mark("a"),))),
        ({"emphasis": {"spans": [[0, 2], (5, 6)]}}, Emphasis(spans=((0, 2), (5, 6)))),
        ({"emphasis": {"text": ["a"], "spans": [[0, 2]]}}, Emphasis(((0, 2),), (Mark("a"),))),
        ({"emphasis": {"text": "a", "alpha": 2}}, Emphasis(marks=(Mark("a"),), alpha=2.0)),
        ({"emphasis": {"text": "a", "share": 0.3}}, Emphasis(marks=(Mark("a"),), share=0.3)),
        (
            {"emphasis": {"text": "a", "share": 0.3, "alpha": None}},
            Emphasis(marks=(Mark("a"),), share=0.3),
        ),
        ({"emphasis": "a", "emphasis_share": 0.3}, Emphasis(marks=(Mark("a"),), share=0.3)),
        ({"emphasis": {"text": "a", "heads": "name"}}, Emphasis(marks=(Mark("a"),), heads="name")),
        (
            {"emphasis": {"text": "a", "heads": {"1": [0]}}},
            Emphasis(marks=(Mark("a"),), heads=HEADS),
        ),
        ({"emphasis": {"text": "a", "alpha": None, "heads": None}}, Emphasis(marks=(Mark("a"),))),
        ({"emphasis": '{"spans": [[1, 2]], "alpha": 0.5}'}, Emphasis(((1, 2),), alpha=0.5)),
        ({"emphasis": "{braces} are text"}, Emphasis(marks=(Mark("{braces} are text"),))),
        ({"emphasis": {"text": {"text": "a"}}}, Emphasis(marks=(Mark("a"),))),
        (
            {"emphasis": ["a", {"text": "b", "occurrence": "last"}, {"role": "system"}]},
            Emphasis(marks=(Mark("a"), Mark("b", "last"), Mark(role="system"))),
        ),
        (
            {"emphasis": {"chars": [[1, 4], {"message": -1, "chars": [0, 2]}]}},
            Emphasis(marks=(Mark(chars=(1, 4)), Mark(chars=(0, 2), message=-1))),
        ),
        ({"emphasis": {"markup": "tag"}}, Emphasis(markup="tag")),
        (
            {"emphasis": {"markup": "markdown", "keep_marks": False}},
            Emphasis(markup="markdown", keep_marks=False),
        ),
        ({"emphasis": "a", "emphasis_markup": "off"}, Emphasis(marks=(Mark("a"),), markup="off")),
        (
            {"emphasis": "a", "emphasis_alpha": 0.1, "emphasis_heads": '{"1": [0]}'},
            Emphasis(marks=(Mark("a"),), alpha=0.1, heads=HEADS),
        ),
    ],
)
def test_read(extra_args, expected):
    assert Emphasis.parse(extra_args) == expected
    assert has_emphasis(extra_args) == (expected is not None)


@pytest.mark.parametrize(
    "extra_args",
    [
        *({"emphasis": value} for value in (None, False, {}, "{}", {"text": None})),
        {"emphasis": {"markup": "off"}},
        {"emphasis": '{"markup": "off"}'},
        {"emphasis_markup": "off"},
        {"emphasis": None, "emphasis_markup": "off"},
    ],
)
def test_off(extra_args):
    """Each way to say that there be no emphasis, whatever the server's default is."""
    emphasis = Emphasis.parse(extra_args)
    assert emphasis == Emphasis(markup="off")
    assert emphasis.is_off
    assert not Emphasis.parse({"emphasis": "a", "emphasis_markup": "off"}).is_off


@pytest.mark.parametrize("value", [None, False, {}])
def test_nothing_is_not_asked_for(value):
    assert not has_emphasis({"emphasis": value})


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"text": {"text": "a", "alpha": 0.1}}, Emphasis(marks=(Mark("a", alpha=0.1),))),
        (
            ["a", {"role": "user", "alpha": 2}, {"message": 0, "text": "b", "alpha": 0.5}],
            Emphasis(
                marks=(Mark("a"), Mark(role="user", alpha=2.0), Mark("b", message=0, alpha=0.5))
            ),
        ),
        (
            {"chars": [{"chars": [0, 3], "alpha": 0.1}]},
            Emphasis(marks=(Mark(chars=(0, 3), alpha=0.1),)),
        ),
        (
            {"spans": [[0, 2], {"tokens": [5, 6], "alpha": 0.1}, {"tokens": [7, 8]}]},
            Emphasis(((0, 2), (5, 6), (7, 8)), alphas=(1.0, 0.1, 1.0)),
        ),
        ({"spans": [{"tokens": [5, 6], "alpha": 1}]}, Emphasis(((5, 6),))),
    ],
)
def test_strengths(value, expected):
    """A mark's own alpha, in every way of marking; 1 is as good as none."""
    assert Emphasis.parse({"emphasis": value}) == expected


PROMPTS = {"prompts": ["a", None, {"spans": [[0, 1]]}, '{"a": 1}']}


def test_one_for_each_prompt():
    """Each prompt's own; a string is text there; null is none."""
    each = [Emphasis.parse({"emphasis": PROMPTS}, (i, 4)) for i in range(4)]
    assert each == [
        Emphasis(marks=(Mark("a"),)),
        Emphasis(markup="off"),
        Emphasis(((0, 1),)),
        Emphasis(marks=(Mark('{"a": 1}'),)),
    ]
    assert Emphasis.parse({"emphasis": json.dumps(PROMPTS)}, (2, 4)) == each[2]
    assert Emphasis.parse({"emphasis": {"prompts": ["a"]}}) == each[0]
    for value, words in (
        (PROMPTS, "there are 3 prompts, got 4"),
        ({"prompts": "a"}, "expected a list of emphases"),
        ({"prompts": ["a"] * 3, "alpha": 1}, "goes alone"),
        ({"prompts": [{"prompts": ["a"]}] * 3}, "unknown field 'prompts'"),
    ):
        with pytest.raises(EmphasisError, match=words):
            Emphasis.parse({"emphasis": value}, (1, 3))


@pytest.mark.parametrize(
    ("value", "field", "words"),
    [
        (5, "emphasis", "got 5"),
        ('{"name": ""}', "emphasis", "is read as an emphasis; where it is the text to emphasise"),
        ({"text": {"alpha": 0.1}}, "emphasis.text[0]", "expected one of text, chars"),
        ({"text": {"text": "a", "alpha": 0}}, "emphasis.text[0].alpha", "above 0, got 0"),
        ({"text": {"role": "user", "alpha": "1"}}, "emphasis.text[0].alpha", "got '1'"),
        ({"spans": [{"tokens": [0, 1], "alpha": math.inf}]}, "emphasis.spans[0].alpha", "got inf"),
        ({"spans": [{"tokens": [1, 0]}]}, "emphasis.spans[0].tokens", "start < end"),
        ({"spans": [{"alpha": 0.1}]}, "emphasis.spans[0].tokens", "got None"),
        ({"spans": [{"span": [0, 1]}]}, "emphasis.spans[0]", "unknown field 'span'"),
        (True, "emphasis", "got True"),
        ([], "emphasis", "got neither"),
        ({"text": []}, "emphasis", "got neither"),
        ({"alpha": 0.1}, "emphasis", "got neither"),
        (
            {"txt": "a"},
            "emphasis",
            "unknown field 'txt'; known are spans, text, chars, markup, keep_marks, alpha, heads",
        ),
        ({"markup": "html"}, "emphasis.markup", "tag, markdown, stars, off"),
        ({"markup": "tag", "keep_marks": True}, "emphasis.keep_marks", "never stay"),
        ({"markup": "markdown", "keep_marks": 1}, "emphasis.keep_marks", "got 1"),
        ({"chars": 3}, "emphasis.chars", "got 3"),
        ({"chars": [[3, 1]]}, "emphasis.chars[0]", "start < end"),
        ({"chars": ["ab"]}, "emphasis.chars[0]", "character positions"),
        ({"text": [{}]}, "emphasis.text[0]", "got none"),
        ({"text": [{"txt": "a"}]}, "emphasis.text[0]", "unknown field 'txt'"),
        ({"text": [{"text": 1}]}, "emphasis.text[0].text", "got 1"),
        ({"text": [{"text": "a", "chars": [0, 1]}]}, "emphasis.text[0]", "got both"),
        ({"text": [{"message": 0, "role": "user"}]}, "emphasis.text[0]", "got both"),
        ({"text": [{"message": 0, "occurrence": 1}]}, "emphasis.text[0]", "goes with text"),
        ({"text": [{"message": "0"}]}, "emphasis.text[0].message", "got '0'"),
        ({"text": [{"role": 1}]}, "emphasis.text[0].role", "got 1"),
        (
            {"text": [{"text": "a", "occurrence": "first"}]},
            "emphasis.text[0].occurrence",
            "got 'first'",
        ),
        (
            {"text": [{"text": "a", "occurrence": -1}]},
            "emphasis.text[0].occurrence",
            "from 0 on",
        ),
        ({"text": 3}, "emphasis.text", "got 3"),
        ({"text": ["a", 3]}, "emphasis.text[1]", "got 3"),
        ({"text": [""]}, "emphasis.text[0]", "got ''"),
        ({"text": " \n"}, "emphasis.text[0]", "words"),
        ({"spans": 3}, "emphasis.spans", "got 3"),
        ({"spans": "ab"}, "emphasis.spans", "got 'ab'"),
        ({"spans": [3, 4]}, "emphasis.spans[0]", "got 3"),
        ({"spans": [[1, 2], [3]]}, "emphasis.spans[1]", "got [3]"),
        ({"spans": [[1, 2.0]]}, "emphasis.spans[0]", "got [1, 2.0]"),
        ({"spans": [[0, True]]}, "emphasis.spans[0]", "got [0, True]"),
        ({"spans": [[2, 2]]}, "emphasis.spans[0]", "start < end"),
        ({"spans": [[3, 2]]}, "emphasis.spans[0]", "start < end"),
        ({"spans": [[-1, 2]]}, "emphasis.spans[0]", "from 0 on"),
        ({"spans": [[i, i + 1] for i in range(257)]}, "emphasis", "at most 256"),
        ({"text": "a", "alpha": 0}, "emphasis.alpha", "got 0"),
        ({"text": "a", "alpha": -0.1}, "emphasis.alpha", "got -0.1"),
        ({"text": "a", "alpha": math.nan}, "emphasis.alpha", "got nan"),
        ({"text": "a", "alpha": math.inf}, "emphasis.alpha", "got inf"),
        ({"text": "a", "alpha": 10**400}, "emphasis.alpha", "above 0"),
        ({"text": "a", "alpha": "0.1"}, "emphasis.alpha", "got '0.1'"),
        ({"text": "a", "alpha": True}, "emphasis.alpha", "got True"),
        ({"text": "a", "share": 0}, "emphasis.share", "above 0 and below 1, got 0"),
        ({"text": "a", "share": 1}, "emphasis.share", "above 0 and below 1, got 1"),
        ({"text": "a", "share": math.nan}, "emphasis.share", "got nan"),
        ({"text": "a", "share": "0.3"}, "emphasis.share", "got '0.3'"),
        ({"text": "a", "share": True}, "emphasis.share", "got True"),
        ({"text": "a", "share": 0.3, "alpha": 0.1}, "emphasis.share", "`alpha` or `share`"),
        ({"text": {"text": "a", "share": 0.3}}, "emphasis.text[0]", "unknown field 'share'"),
        ({"text": "a", "heads": 3}, "emphasis.heads", "int"),
        ({"text": "a", "heads": {}}, "emphasis.heads", "at least one head"),
        ({"text": "a", "heads": {"x": [1]}}, "emphasis.heads", "layer"),
        ({"text": "a", "heads": {"1": 1}}, "emphasis.heads", "list of heads"),
        ({"text": "a", "heads": {"1": [-1]}}, "emphasis.heads", "from 0 on"),
        ({"text": "a", "heads": {"1": [0, 0]}}, "emphasis.heads", "twice"),
        ('{"text": "a", "alpha": NaN}', "emphasis.alpha", "got nan"),
        ('{"oops": 1}', "emphasis", "unknown field 'oops'"),
    ],
)
def test_refused(value, field, words):
    """The message names the field, what was expected and what came."""
    with pytest.raises(EmphasisError) as refused:
        Emphasis.parse({"emphasis": value})
    assert refused.value.field == field
    assert str(refused.value).startswith(f"{field}: ")
    assert words in str(refused.value)


@pytest.mark.parametrize("key", ["emphasise", "emphasis_aplha", "emphasis.alpha"])
def test_misspelt_key_is_refused(key):
    """Not ignored: what begins like ours is meant for us."""
    with pytest.raises(EmphasisError, match="unknown field"):
        Emphasis.parse({"emphasis": "a", key: 1})


def test_given_twice():
    with pytest.raises(EmphasisError, match="twice"):
        Emphasis.parse({"emphasis": {"text": "a", "alpha": 1}, "emphasis_alpha": 2})


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                ["text", "spans", "chars", "markup", "message", "role", "alpha", "heads", "0", "x"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(json_values)
def test_anything_is_read_or_refused(value):
    """No other exception, whatever comes; and as a JSON string the same."""
    outcomes = []
    for form in (value, json.dumps(value)) if isinstance(value, dict) else (value,):
        try:
            outcomes.append(Emphasis.parse({"emphasis": form}))
        except EmphasisError as e:
            outcomes.append(str(e).split(":")[0])
    assert len({str(outcome) for outcome in outcomes}) == 1
