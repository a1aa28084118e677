"""Searches, selection and statistics on made-up scores: no model."""

import random

import pytest

from vllm_pasta import tasks
from vllm_pasta.errors import PastaError
from vllm_pasta.profiling import auto, methods
from vllm_pasta.profiling.estimates import Estimate, overlap, rank_correlation
from vllm_pasta.profiling.evaluation import Row
from vllm_pasta.profiling.report import plots, tables
from vllm_pasta.profiling.search import selection, sizes, strategies

HEADS = [(layer, head) for layer in range(30) for head in range(9)]
EXAMPLES = 100


class Scores:
    """Heads of known worth, seen through noise; counts what is asked."""

    def __init__(self, noise=0.0):
        rng = random.Random(1)
        self.worth = {head: rng.random() for head in HEADS}
        self.noise, self.asked = noise, []

    def __call__(self, pairs):
        self.asked += pairs
        return [
            self.worth[head] + self.noise * random.Random(f"{head}{example}").gauss(0, 1)
            for head, example in pairs
        ]

    def best(self, k):
        return sorted(HEADS, key=lambda head: -self.worth[head])[:k]


def order(ranking):
    return [ranked.head for ranked in ranking]


def test_full():
    scores = Scores()
    ranking = strategies.full(HEADS, 5, scores)
    assert order(ranking) == scores.best(len(HEADS))
    assert len(set(scores.asked)) == len(scores.asked) == len(HEADS) * 5
    # One example's requests are neighbours: they share their prompt's cached prefix.
    assert [example for _, example in scores.asked] == sorted(e for _, e in scores.asked)


def test_equal_scores_keep_the_models_order():
    assert order(strategies.full(HEADS, 1, lambda pairs: [0.5] * len(pairs))) == HEADS


def test_halving():
    """The exact ranking of those left where there is no noise, nearly the best where there is."""
    scores = Scores()
    ranking = strategies.halving(HEADS, EXAMPLES, scores)
    assert order(ranking) == scores.best(len(HEADS))
    assert len(scores.asked) == len(set(scores.asked)) <= len(HEADS) * EXAMPLES / strategies.SAVING
    assert [ranked.examples for ranked in ranking] == sorted(
        (ranked.examples for ranked in ranking), reverse=True
    )
    assert len({ranked.examples for ranked in ranking}) == strategies.ROUNDS
    noisy = Scores(noise=0.3)
    found = order(strategies.halving(HEADS, EXAMPLES, noisy))
    assert sorted(found) == HEADS
    assert overlap(found, noisy.best(30), 30) >= 0.7


@pytest.mark.parametrize("examples", [1, 3, 8])
def test_halving_of_few_examples(examples):
    """Never an example that is not there."""
    scores = Scores()
    assert sorted(order(strategies.halving(HEADS, examples, scores))) == HEADS
    assert {example for _, example in scores.asked} <= set(range(examples))


def test_gradient():
    """Heads that the estimate puts first are ranked by what they really score."""
    scores = Scores()
    estimates = {head: worth + 0.02 * head[1] for head, worth in scores.worth.items()}
    ranking = strategies.gradient(HEADS, EXAMPLES, scores, estimates)
    verified = [ranked for ranked in ranking if ranked.score is not None]
    assert len(scores.asked) <= len(HEADS) * EXAMPLES / strategies.SAVING
    assert order(verified) == sorted(order(verified), key=lambda head: -scores.worth[head])
    assert order(verified) != sorted(order(verified), key=lambda head: -estimates[head])
    rest = ranking[len(verified) :]
    assert order(rest) == sorted(order(rest), key=lambda head: -estimates[head])
    assert sorted(order(ranking)) == HEADS


RANKINGS = {"a": [(2, 0), (1, 0), (0, 0), (3, 0)], "b": [(1, 0), (3, 0), (2, 0), (0, 0)]}


@pytest.mark.parametrize(
    ("k", "kind", "expected"),
    [
        (2, "intersection", {"": [(1, 0)]}),
        (3, "intersection", {"": [(1, 0), (2, 0)]}),
        (2, "union", {"": [(1, 0), (2, 0), (3, 0)]}),
        (2, "task", {"a": [(1, 0), (2, 0)], "b": [(1, 0), (3, 0)]}),
        (1, "intersection", {"": []}),
    ],
)
def test_select(k, kind, expected):
    assert selection.select(RANKINGS, k, kind) == expected


def test_nothing_selected():
    with pytest.raises(PastaError, match="no head is among the first 1 of every task"):
        selection.check_not_empty(selection.select(RANKINGS, 1, "intersection"), 1)


@pytest.mark.parametrize(
    ("scores", "fluencies", "expected"),
    [
        ({10: 0.90, 20: 0.95, 50: 0.95}, {10: 1, 20: 1, 50: 1}, 20),  # the smallest of the best
        ({10: 0.90, 20: 0.95, 50: 0.953}, {10: 1, 20: 1, 50: 1}, 20),  # nearly the best is enough
        ({10: 0.90, 20: 0.95, 50: 0.99}, {10: 1, 20: 0.96, 50: 0.9}, 20),  # 50 babbles
        ({10: 0.90, 20: 0.95}, {10: 0.8, 20: 0.7}, 20),  # all do
    ],
)
def test_best_size(scores, fluencies, expected):
    """Where the task is nothing but obedience."""
    obedience = {(k, 0.1): value for k, value in scores.items()} | {sizes.PLAIN_CHOICE: 0.2}
    fluency = {(k, 0.1): value for k, value in fluencies.items()}
    assert sizes.best(obedience, dict.fromkeys(obedience), fluency) == (expected, 0.1)


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ({(5, 0.1): (0.9, 0.3), (9, 0.1): (0.95, 0.2)}, (5, 0.1)),  # the larger sum
        ({(5, 0.1): (0.9, 0.3), (5, 0.3): (0.9, 0.3)}, (5, 0.3)),  # the mildest
        ({(5, 0.1): (0.9, 0.1), (5, 0.9): (0.21, 0.9)}, (5, 0.1)),  # hardly obeys: not considered
        ({(5, 0.1): (0.1, 0.5), (9, 0.1): (0.15, 0.2)}, (5, 0.1)),  # nothing obeys more than plain
    ],
)
def test_best_weighs_obedience_and_the_task(points, expected):
    points = {sizes.PLAIN_CHOICE: (0.2, 0.9), **points}
    obedience, retained = ({c: p[i] for c, p in points.items()} for i in (0, 1))
    assert sizes.best(obedience, retained, dict.fromkeys(list(points)[1:], 1.0)) == expected


def test_front():
    """What another beats in one respect, and in the other no less, is not on it."""
    points = {"a": (0.1, 0.9), "b": (0.5, 0.5), "c": (0.5, 0.4), "d": (0.4, 0.5), "e": (0.9, 0.1)}
    assert sizes.front(points) == ["a", "b", "e"]


def rows(points):
    task = tasks.load("counterfact")
    for name, (x, y) in points.items():
        yield Row(task.name, methods.Method(name), {}, x, x, y)


def test_table_of_obedience_and_the_task():
    """Both for every method; a star where no other is better in both."""
    points = {"zero-shot": (0.2, 0.9), "all α=0.1": (0.8, 0.1), "all α=0.5": (0.1, 0.85)}
    task = tasks.load("counterfact")
    assert tables.both([task], list(rows(points))) == [
        ["", "counterfact obeys", "counterfact retains"],
        ["zero-shot", "20.0 *", "90.0"],
        ["all α=0.1", "80.0 *", "10.0"],
        ["all α=0.5", "10.0", "85.0"],
    ]


def test_plot_of_obedience_and_the_task(tmp_path):
    pytest.importorskip("matplotlib")
    points = {"zero-shot": (0.2, 0.9), "all α=0.1": (0.8, 0.1)}
    task = tasks.load("counterfact")
    plots.pareto(tmp_path / "a.png", [task], list(rows(points)), "m")
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(PastaError, match="nothing to draw"):
        plots.pareto(tmp_path / "b.png", [tasks.load("kv")], [], "m")


def test_auto_tries_every_number_of_heads_at_every_strength(monkeypatch):
    """Many heads with a mild strength may do better than few with a strong one."""
    ranking = HEADS[::-1]
    points = {(5, 0.1): (0.9, 0.2), (22, 0.3): (0.95, 0.4), (43, 0.1): (1.0, 0.0)}

    def score(asker, samples, chosen, generations):
        assert generations == 0
        assert set(chosen) == {(k, alpha) for k in (5, 22, 43) for alpha in (0.1, 0.3)}
        for (k, _), of in chosen.items():
            assert of == {"counterfact": sorted(ranking[:k])}
        every = dict.fromkeys(chosen, (0.3, 0.5)) | points | {sizes.PLAIN_CHOICE: (0.2, 0.9)}
        return {choice: list(rows({"zero-shot": point})) for choice, point in every.items()}

    monkeypatch.setattr(sizes, "score", score)
    found, choice = auto._try(None, {tasks.load("counterfact"): []}, ranking)
    assert (len(found), choice) == (7, (22, 0.3))


def test_estimates():
    """Wilson's interval, by hand: 9 of 10 is 0.596 to 0.982; it never is empty."""
    some = Estimate.of([1.0] * 9 + [0.0])
    assert (some.low, some.high) == (pytest.approx(0.596, abs=1e-3), pytest.approx(0.982, abs=1e-3))
    every = Estimate.of([1.0] * 10)
    assert every.low == pytest.approx(0.722, abs=1e-3)
    assert every.high == pytest.approx(1.0)
    one = Estimate.of([0.25, 0.75])
    assert (one.mean, one.high - one.mean) == (0.5, pytest.approx(1.96 * 0.25, abs=1e-4))


def test_likeness_of_rankings():
    assert rank_correlation([1, 2, 3], [1, 2, 3]) == 1
    assert rank_correlation([1, 2, 3], [3, 2, 1]) == -1
    assert overlap([1, 2, 3, 4], [4, 2, 9, 9], 2) == 0.5


def test_heat_map_of_a_hybrid_model():
    """Layers without heads have no row."""
    changes = {(3, 1): 4.0, (1, 0): 1.0, (3, 0): 3.0, (1, 1): 2.0}
    assert plots.by_layer(changes) == ([1, 3], [[1.0, 2.0], [3.0, 4.0]])
