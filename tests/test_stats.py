"""Figures and their intervals, against formulas, simulation and scipy-free references."""

import json
import math
import random

import numpy as np
import pytest

from nanostlm import stats


def coverage(draw, make, truth: float, times: int = 400) -> float:
    """The share of experiments whose interval holds the true value."""
    rng = np.random.default_rng(0)
    figures = [make(*draw(rng)) for _ in range(times)]
    return np.mean([f.low <= truth <= f.high for f in figures])


def test_intervals_hold_the_truth_in_95_percent_of_experiments():
    def lengths_and_sums(rng):
        n = rng.integers(1, 100, 200)
        return rng.gamma(n) * 0.7, n

    assert 0.9 < coverage(lambda rng: [rng.normal(3, 2, 50)], lambda x: stats.mean("", x), 3) < 0.99
    assert 0.9 < coverage(lengths_and_sums, lambda a, b: stats.ratio("", a, b), 0.7) < 0.99
    assert (
        0.9
        < coverage(lambda rng: [rng.binomial(40, 0.03)], lambda k: stats.proportion("", k, 40), 0.03)
        < 0.99
    )

    def strata(rng):
        return [[rng.random(60) < p for p in (0.1, 0.5, 0.8)]]

    assert 0.9 < coverage(strata, lambda groups: stats.stratified("", groups), 1.4 / 3) < 0.99


def test_mean_and_ratio_of_equal_weights_agree():
    x = [random.Random(i).random() for i in range(30)]
    mean, ratio = stats.mean("x", x), stats.ratio("x", x, [1] * 30)
    assert mean.value == pytest.approx(sum(x) / 30)
    assert mean.high - mean.value == pytest.approx(1.959964 * np.std(x, ddof=1) / math.sqrt(30))
    assert mean == pytest.approx(ratio)


def test_wilson_interval():
    """Against the two solutions of (p - k/n)^2 = z^2 p (1 - p) / n."""
    for k, n in ((0, 10), (3, 10), (10, 10), (99, 100)):
        f = stats.proportion("", k, n)
        for p in (f.low, f.high):
            assert (p - k / n) ** 2 == pytest.approx(1.959964**2 * p * (1 - p) / n, abs=1e-12)
        assert -1e-12 <= f.low <= f.value + 1e-12 <= f.high + 2e-12 <= 1 + 3e-12
        assert f.percent and f.n == n


def test_strata_weigh_the_same():
    f = stats.stratified("", [[1, 1, 1, 0], [0, 0], []])
    assert f.value == pytest.approx(0.375) and f.n == 6, "an empty group does not count"
    single = stats.stratified("", [[1, 1, 1, 0], [0]])
    assert single.value == pytest.approx(0.375) and 0 <= single.low < 0.375 < single.high <= 1


def test_too_few_items_have_no_interval():
    for f in (stats.mean("", [2.0]), stats.ratio("", [4], [2])):
        assert f.value == 2 and math.isnan(f.low) and f.n == 1
    empty = [
        stats.mean("", []),
        stats.ratio("", [], []),
        stats.proportion("", 0, 0),
        stats.stratified("", []),
    ]
    assert all(math.isnan(f.value) and f.n == 0 for f in empty)
    assert "nan" not in stats.table({"a": [("task", f._replace(name=str(i))) for i, f in enumerate(empty)]})


def test_transform_maps_value_and_interval():
    f = stats.transform("perplexity", stats.Figure("nats", 1.0, 0.5, 2.0, 9), math.exp)
    assert f[1:4] == pytest.approx([math.e, math.exp(0.5), math.exp(2)]) and (f.name, f.n) == (
        "perplexity",
        9,
    )


def test_table_of_one_model():
    figures = [
        ("bpb", stats.Figure("loss", 1.25, 1.2, 1.3, 1234)),
        ("blimp", stats.proportion("mean", 5, 10)),
    ]
    head, first, second = stats.table({"run": figures}).splitlines()
    assert head.split() == ["task", "figure", "value", "95%", "interval", "items"]
    assert first.split() == ["bpb", "loss", "1.2500", "1.2000", "to", "1.3000", "1,234"]
    assert second.split() == ["blimp", "mean", "50.0%", "23.7%", "to", "76.3%", "10"]


def test_table_of_several_models_has_a_column_for_each():
    a, b = stats.Figure("loss", 1.25, 1.2, 1.3, 12), stats.Figure("other", 400.0, math.nan, math.nan, 1)
    head, first, second = stats.table({"one": [("bpb", a)], "two": [("bpb", a), ("bpb", b)]}).splitlines()
    assert head.split() == ["task", "figure", "one", "two"]
    assert first.count("1.2500 (1.2000 to 1.3000; 12)") == 2
    assert second.split() == ["bpb", "other", "-", "400.0", "(-;", "1)"]


def test_result_as_json():
    result = stats.Result([stats.mean("x", [1.0])], ["note"], [{"id": 1, "parts": [(math.nan, 2.0)]}])
    data = json.loads(json.dumps(result.as_dict(items=True), allow_nan=False))
    assert data["figures"][0] == {
        "name": "x",
        "value": 1.0,
        "low": None,
        "high": None,
        "n": 1,
        "percent": False,
    }
    assert (
        data["notes"] == ["note"]
        and data["items"] == [{"id": 1, "parts": [[None, 2.0]]}]
        and "items" not in result.as_dict()
    )
