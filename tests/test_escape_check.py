"""The memoryless check: true sizes, power, grades."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binom, chi2

from escape_inference.conditions import Conditions, aggregate
from escape_inference.escape_check import EscapeCheck, check_escape, grade_of, shape_interval
from escape_inference.gamma_intervals import interval_counts


def simulated(
    conditions: int,
    runs: int,
    *,
    mean: float = 1000.0,
    interval: int = 1,
    limit: float = np.inf,
    random_limit: bool = False,
    shape: float = 1.0,
    seed: int = 7,
) -> Conditions:
    """Many equal conditions of Gamma waiting times, censored at (or uniformly up to) ``limit``."""
    rng = np.random.default_rng(seed)
    size = conditions * runs
    steps = np.ceil(rng.gamma(shape, mean / shape, size) / interval) * interval
    limits = np.ceil(rng.uniform(0, limit, size) / interval) * interval if random_limit else np.full(size, limit)
    table = pd.DataFrame(
        {
            "minimum": [f"m{i // runs}" for i in range(size)],
            "run": range(size),
            "learning_rate": 0.03,
            "batch_size": 8,
            "steps": np.maximum(np.minimum(steps, limits), 1).astype(int),
            "escaped": steps <= limits,
            "check_interval": interval,
        }
    )
    return aggregate(table)


EXPERIMENTS = {
    "every time known": {"runs": 40},
    "censored at one length": {"runs": 40, "limit": 1000.0},
    "censored anywhere": {"runs": 60, "limit": 3000.0, "random_limit": True},
    "looks as long as the mean": {"runs": 40, "interval": 1000},
    "coarse and censored": {"runs": 300, "interval": 500, "limit": 2000.0},
}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_exponential_times_are_refused_as_often_as_the_level_says(name: str) -> None:
    check = check_escape(simulated(250, **EXPERIMENTS[name]), seed=3)
    tested = check.frame[check.frame["tested"]]
    count = len(tested)
    assert count > 200
    p_value = tested["ks_p_value"].to_numpy(float)
    for level in (0.05, 0.3, 0.7):
        low, high = binom.ppf([0.002, 0.998], count, level)
        assert low <= (p_value < level).sum() <= high
    # the 99 % interval of the shape leaves 1 out in one of a hundred
    assert (tested["grade"] != "memoryless").sum() <= binom.ppf(0.999, count, 0.012)
    assert check.grade == "memoryless"


@pytest.mark.parametrize("mean", [300.0, 1000.0])
def test_looks_much_longer_than_the_mean_do_not_misfire(mean: float) -> None:
    check = check_escape(simulated(150, 40, mean=mean, interval=2000), seed=3)
    tested = check.frame[check.frame["tested"]]
    assert (tested["ks_p_value"] < 0.05).mean() < 0.09
    assert (tested["grade"] == "memoryless").mean() > 0.97


@pytest.mark.parametrize("interval", [1, 200])
def test_delayed_times_are_graded_delayed(interval: int) -> None:
    check = check_escape(simulated(60, 40, shape=5.0, interval=interval, limit=1500.0 // interval * interval))
    assert (check.frame["grade"] == "delayed").mean() > 0.9
    assert (check.frame["ks_p_value"] < 0.01).mean() > 0.8
    assert check.frame["coefficient_of_variation"].median() == pytest.approx(5**-0.5, abs=0.06)
    assert check.grade == "delayed"


@pytest.mark.parametrize("interval", [1, 200])
def test_nearly_equal_times_are_not_escape(interval: int) -> None:
    check = check_escape(simulated(60, 40, shape=100.0, interval=interval))
    assert (check.frame["grade"] == "not_escape").all()
    assert check.grade == "not_escape"
    assert check.frame["coefficient_of_variation"].median() == pytest.approx(0.1, abs=0.03)


def test_times_that_scatter_far_too_much_are_not_escape() -> None:
    check = check_escape(simulated(40, 60, shape=0.12))
    assert (check.frame["grade"] == "not_escape").mean() > 0.8


def test_heavy_but_not_extreme_scatter_is_graded_delayed() -> None:
    check = check_escape(simulated(40, 120, shape=0.5))
    assert (check.frame["grade"] == "delayed").mean() > 0.9


def test_the_interval_of_the_shape_covers_the_truth() -> None:
    conditions = simulated(300, 50, shape=3.0, interval=100, limit=2000.0)
    times = dict(list(conditions.times.groupby("condition")))
    ends = np.array([shape_interval(interval_counts(times[i], 0.03)) for i in range(300)])
    covered = ((ends[:, 1] < 3.0) & (ends[:, 2] > 3.0)).sum()
    assert binom.ppf(0.001, 300, 0.985) <= covered
    assert (ends[:, 1] < ends[:, 0]).all()
    assert (ends[:, 0] < ends[:, 2]).all()
    narrow = np.array([shape_interval(interval_counts(times[i], 0.03), level=0.5) for i in range(300)])
    assert 110 < ((narrow[:, 1] < 3.0) & (narrow[:, 2] > 3.0)).sum() < 190


def test_the_interval_is_where_the_profile_falls_by_half_a_quantile() -> None:
    rng = np.random.default_rng(5)
    steps = np.ceil(rng.gamma(2.0, 400.0, 80)).astype(int)
    counts = interval_counts(pd.DataFrame({"lower": steps - 1, "upper": steps, "escapes": 1, "censored": 0}), 0.1)
    shape, low, high = shape_interval(counts)
    rates = np.linspace(-7.0, -2.0, 4001)

    def height(value: float) -> float:
        return float(counts.log_likelihood(rates, np.full(4001, np.log(value))).max())

    for end in (low, high):
        assert 2 * (height(shape) - height(end)) == pytest.approx(chi2.ppf(0.99, 1), abs=0.08)


def test_an_interval_may_be_open() -> None:
    all_in_one_look = pd.DataFrame({"lower": [100.0], "upper": [200.0], "escapes": [30], "censored": [0]})
    _, low, high = shape_interval(interval_counts(all_in_one_look, 0.1))
    assert low > 1.0
    assert high == np.inf


def test_few_escapes_ramps_and_a_single_look_are_untested() -> None:
    few = pd.DataFrame({"run": range(19), "steps": range(10, 200, 10), "escaped": True, "minimum": "few"})
    ramps = pd.DataFrame(
        {"run": np.repeat(range(30), 2) + 100, "steps": 50, "escaped": [False, True] * 30, "minimum": "ramp"}
    )
    ramps["learning_rate"] = [0.01, 0.02] * 30
    once = pd.DataFrame({"run": range(500, 540), "steps": 10, "escaped": True, "minimum": "once"})
    table = pd.concat([few, ramps, once]).fillna({"learning_rate": 0.05}).assign(batch_size=8, check_interval=10)
    check = check_escape(aggregate(table))
    assert check.frame["grade"].tolist() == ["untested"] * 4
    assert check.grade == "memoryless"
    assert check.as_dict() == {
        "grade": "memoryless", "conditions_tested": 0, "memoryless": 0, "delayed": 0, "not_escape": 0, "p_value": None,
    }  # fmt: skip
    assert "None of the 4 conditions could be tested" in check.sentence


@pytest.mark.parametrize(("p_value", "meaning"), [(0.4, "look like memoryless"), (8.7e-4, "not quite memoryless")])
def test_the_sentence_does_not_call_memoryless_what_a_small_p_value_speaks_against(
    p_value: float, meaning: str
) -> None:
    frame = pd.DataFrame({"tested": [True] * 9, "grade": "memoryless", "coefficient_of_variation": 0.8})
    sentence = EscapeCheck(frame, "memoryless", p_value).sentence
    assert f"p = {p_value:.2g} for all being exponential, so " in sentence and meaning in sentence


def test_the_overall_grade_is_that_of_more_than_half() -> None:
    def together(shapes: list[float]) -> str:
        parts = []
        for number, shape in enumerate(shapes):
            rng = np.random.default_rng(number)
            steps = np.ceil(rng.gamma(shape, 1000 / shape, 60)).astype(int)
            parts.append(pd.DataFrame({"minimum": f"m{number}", "run": range(60), "steps": steps}))
        table = pd.concat(parts).assign(learning_rate=0.03, batch_size=8, escaped=True)
        return check_escape(aggregate(table)).grade

    assert together([100.0, 100.0, 100.0, 1.0, 1.0]) == "not_escape"
    assert together([100.0, 100.0, 1.0, 1.0]) == "memoryless"
    assert together([100.0, 5.0, 5.0, 1.0]) == "delayed"
    assert together([5.0, 1.0, 1.0]) == "memoryless"


@pytest.mark.parametrize(
    ("shape", "low", "high", "grade"),
    [
        (3.0, 0.9, 9.0, "memoryless"),
        (50.0, 0.9, np.inf, "memoryless"),
        (1.5, 1.1, 2.0, "delayed"),
        (11.0, 9.0, 14.0, "delayed"),
        (11.2, 9.0, 14.0, "not_escape"),
        (0.26, 0.2, 0.4, "delayed"),
        (0.24, 0.2, 0.4, "not_escape"),
    ],
)
def test_grades_follow_the_coefficient_of_variation(shape: float, low: float, high: float, grade: str) -> None:
    assert grade_of(shape, low, high) == grade


def test_the_same_seed_gives_the_same_check_and_the_report_has_its_numbers() -> None:
    conditions = simulated(5, 50)
    first, second = check_escape(conditions, seed=4), check_escape(conditions, seed=4)
    pd.testing.assert_frame_equal(first.frame, second.frame)
    assert not first.frame["ks_p_value"].equals(check_escape(conditions, seed=5).frame["ks_p_value"])
    expected = chi2.sf(-2 * np.log(first.frame["ks_p_value"].to_numpy(float)).sum(), 10)
    assert first.p_value == pytest.approx(float(expected))
    assert list(first.as_dict()) == ["grade", "conditions_tested", "memoryless", "delayed", "not_escape", "p_value"]
    assert first.sentence.startswith("Of 5 conditions 5 had enough escapes to be tested: ")
